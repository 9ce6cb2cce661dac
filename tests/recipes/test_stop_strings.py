"""rollout.stop: what is judged and what is trained on end with the stop string, with either engine."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kitae.config import ModelSettings, OptimSettings, RolloutSampling, RolloutSettings, SamplingSettings
from kitae.models.load import load_policy, load_tokenizer
from kitae.parallel.world import World
from kitae.recipes._run import run_recipe
from kitae.recipes._sampling import Sampler
from kitae.recipes.grpo import to_rows
from kitae.rollout.choose import open_engine
from kitae.settings import resolve
from kitae.train.learner import Learner
from kitae.types import Problem, Score

STOP = ["7", "ab", "</answer>"]


@pytest.mark.parametrize("engine", ["generic", "native"])
def test_a_completion_is_the_unstopped_one_up_to_the_token_that_completes_a_stop_string(
    tiny: Callable[..., Path], kernels: ctypes.CDLL, engine: str
):
    model = ModelSettings(
        name_or_path=str(tiny("qwen3", initializer_range=0.2)), dtype="float32", device="cpu"
    )
    decode = load_tokenizer(model).decode
    learner = Learner(load_policy(model), optim=OptimSettings(), total_steps=1, world=World())
    opened, _ = open_engine(
        learner.policy, wanted=engine, setting="", expected_tokens=0, stop_ids=[], decode=decode, max_rows=8
    )
    problems = [Problem(prompt="", prefill="<think>", token_ids=[i, 5, 9], index=i) for i in range(3, 8)]

    def sampled(stop: list[str]):
        rollout = RolloutSettings(max_new_tokens=24, stop=stop)
        sampler = Sampler(opened, learner=learner, rollout=rollout, seed=1)
        groups = sampler.sample(problems, n=3, temperature=1.0, step=4) + sampler.greedy(problems)
        return [r for group in groups for r in group]

    lengths = set()
    for stopped, whole in zip(sampled(STOP), sampled([]), strict=True):
        texts = [decode(whole.token_ids[:count]) for count in range(1, 25)]
        length = next((i for i, text in enumerate(texts, 1) if any(s in text for s in STOP)), 24)
        assert stopped.token_ids == whole.token_ids[:length]
        assert stopped.logprobs == pytest.approx(whole.logprobs[:length], abs=1e-5)
        is_stopped = any(s in texts[length - 1] for s in STOP)
        assert stopped.finish_reason == ("stop" if is_stopped else "length")
        assert stopped.text == "<think>" + texts[length - 1]  # a token is a character here
        lengths.add(length)
        (row,) = to_rows(
            [stopped], [Score(1.0)], advantages_G=torch.ones(1), rollout=RolloutSettings(stop=STOP)
        )
        assert row.token_ids[3:] == stopped.token_ids and row.loss_mask == [False] * 3 + [True] * length
    assert len(lengths) > 3


def test_what_follows_the_stop_string_within_its_token_is_trained_on_and_not_judged(tiny):
    model = ModelSettings(name_or_path=str(tiny()), dtype="float32", device="cpu")
    policy = load_policy(model, trainable=False)
    words = {7: "</answer> and"}

    def decode(ids: list[int]) -> str:
        return "".join(words.get(i, "x") for i in ids)

    engine, _ = open_engine(
        policy, wanted="generic", setting="", expected_tokens=0, stop_ids=[], decode=decode, max_rows=8
    )
    problem = Problem(prompt="", token_ids=[5], index=0)
    how = {"stop": ["</answer>"], "temperature": 10.0, "max_new_tokens": 400}
    ((kept,),) = engine.generate([problem], n=1, sampling=RolloutSampling(**how), seed=0)
    ((cut,),) = engine.generate([problem], n=1, sampling=SamplingSettings(**how), seed=0)
    assert kept.token_ids == cut.token_ids and kept.token_ids[-1] == 7 and kept.finish_reason == "stop"
    before = "x" * (len(kept.token_ids) - 1)
    assert (kept.text, cut.text) == (before + "</answer>", before)


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "distill"])
def test_every_recipe_that_samples_stops(tiny, tmp_path, recipe: str):
    folder = tiny("qwen3", initializer_range=0.2)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1", "answer": str(i + 1)}) + "\n" for i in range(6)))
    stop = list("aeiou0123456789")
    given = {
        "model_name_or_path": str(folder), "dataset_name": str(data), "output_dir": str(tmp_path / "run"),
        "max_steps": 1, "stop": stop, "num_generations": 4, "max_new_tokens": 64, "report_to": "none",
        "dtype": "float32", "engine": "generic",
    }  # fmt: skip
    if recipe == "distill":
        given |= {"teacher.name_or_path": str(folder), "distill.on_policy_share": 1.0}
    run_recipe(recipe, resolve(recipe, given, world_size=1)[0])
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    texts = [sample["completion"] for sample in samples]
    ended = [text for text in texts if text[-1:] in stop]
    assert len(ended) > len(texts) // 2
    assert all(sum(character in stop for character in text) <= 1 for text in texts)
