"""Preference recipes: gradients against the plain transformers module, where the reference comes from, evaluation."""

import json
import math
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from kitae.algos import preference
from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.errors import CheckpointError, ConfigError, DataError
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.plugins import load
from kitae.recipes._preference import AdapterOff, ReferenceCache, at_reference_point
from kitae.recipes._run import run_recipe
from kitae.settings import resolve
from kitae.train.learner import Learner
from kitae.types import Row

FAMILIES = ["qwen3", "llama", "deepseek_v3"]
RECIPES = ["dpo", "simpo", "kto", "orpo"]
CUTS = [(2, True), (2, False), (4, True), (100, False), (100, True)]
"""Rows per forward pass, and whether prompts are shared."""


def make_learner(folder, **lora):
    model = ModelSettings(name_or_path=str(folder), dtype="float32")
    policy = load_policy(model, lora=LoraSettings(**lora))
    return Learner(policy, optim=OptimSettings(learning_rate=1e-2), total_steps=10, world=World())


def make_pairs(count=4, seed=0):
    """Pairs of rows that share their prompt, with a reference's log-prob each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randint(1, 30))]
        for _ in range(2):
            completion = [rng.randrange(3, 90) for _ in range(rng.randint(1, 12))]
            mask = [False] * len(prompt) + [True] * len(completion)
            reference = -4.6 * len(completion) + rng.gauss(0, 2)
            rows.append(
                Row(
                    token_ids=prompt + completion,
                    loss_mask=mask,
                    prompt_length=len(prompt),
                    numbers={"ref_logprob": reference},
                )
            )
    return rows


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def slow_logprobs(model, rows):
    """Log-prob of each completion: all rows padded to one width, through the plain module."""
    width = max(len(row.token_ids) for row in rows)
    ids = torch.tensor([row.token_ids + [0] * (width - len(row.token_ids)) for row in rows])
    attention = torch.tensor([[int(i < len(row.token_ids)) for i in range(width)] for row in rows])
    all_logprobs = model(ids, attention_mask=attention).logits.float().log_softmax(-1)
    return [
        torch.stack(
            [all_logprobs[b, t - 1, row.token_ids[t]] for t in range(row.prompt_length, len(row.token_ids))]
        )
        for b, row in enumerate(rows)
    ]


def slow_loss(name, logprobs, rows):
    """The mean over pairs (kto: rows), from the papers."""
    reference = [row.numbers["ref_logprob"] for row in rows]
    total = torch.zeros(())
    if name == "kto":
        for logp, ref, row in zip(logprobs, reference, rows, strict=True):
            gain = 0.2 * (logp.sum() - ref - row.numbers["reference_point"])
            sign, weight = (1, 1.5) if row.numbers["label"] else (-1, 1.0)
            total = total + weight * (1 - torch.sigmoid(sign * gain))
        return total / len(rows)
    for i in range(0, len(rows), 2):
        w, l = logprobs[i], logprobs[i + 1]  # noqa: E741 - the papers' letters
        if name == "dpo":
            total = total - F.logsigmoid(0.2 * (w.sum() - reference[i]) - 0.2 * (l.sum() - reference[i + 1]))
            total = total - 0.1 * w.mean()
        elif name == "simpo":
            total = total - F.logsigmoid(2.0 * w.mean() - 2.0 * l.mean() - 1.0)
        else:
            odds = [p / (1 - p) for p in (w.mean().exp(), l.mean().exp())]
            total = total - w.mean() - 0.5 * F.logsigmoid(torch.log(odds[0] / odds[1]))
    return total / (len(rows) / 2)


LOSSES = {
    "dpo": partial(preference.dpo, beta=0.2, nll_coef=0.1),
    "simpo": partial(preference.simpo, beta=2.0, gamma=1.0),
    "orpo": partial(preference.orpo, odds_coef=0.5),
    "kto": partial(preference.kto, beta=0.2, desirable_weight=1.5),
}


def numbers_for(name, rows):
    """What the loss takes besides the outputs."""
    if name == "kto":
        return [
            replace(row, numbers={**row.numbers, "label": float(i % 3 == 0), "reference_point": 0.4})
            for i, row in enumerate(rows)
        ]
    return rows if name == "dpo" else [replace(row, numbers={}) for row in rows]


@pytest.mark.parametrize(
    ("name", "family"),
    [*(("dpo", f) for f in FAMILIES), ("simpo", "qwen3"), ("orpo", "llama"), ("kto", "qwen3")],
)
def test_gradients_equal_separate_padded_rows_for_every_cut(name, family, tiny):
    """Shared prompts, micro-batches and packing change nothing: chosen and rejected each through the plain module."""
    pairs = make_pairs()
    rows = numbers_for(name, pairs)
    model = plain(tiny(family))
    given = rows if name in ("dpo", "kto") else pairs
    expected = slow_loss(name, slow_logprobs(model, rows), given)
    expected.backward()
    learner = make_learner(tiny(family))
    denominator = len(rows) / (1 if name == "kto" else 2)
    for rows_per_forward, share in CUTS:
        batches = collate(rows, rows_per_forward=rows_per_forward, share_prompts=share, rows_per_unit=2)
        metrics = learner.forward_backward(batches, LOSSES[name], denominator=denominator)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        slots = {slot.name: slot.grad for slot in learner.flat.slots}
        for parameter, value in model.named_parameters():
            if value.grad is not None:
                scale = value.grad.abs().max().item() + 1e-8
                assert (slots[parameter] - value.grad).abs().max() < 2e-5 * scale + 1e-7, parameter
        learner.flat.zero_grad()
        learner._has_gradient = False


# where the reference comes from -------------------------------------------------------------------------------


def moved(learner, rows, *, denominator=4.0):
    """The learner after a step that changes its log-probs."""
    batches = collate(rows, rows_per_forward=100, rows_per_unit=2)
    learner.forward_backward(batches, LOSSES["dpo"], denominator=denominator)
    learner.optim_step()
    return learner


def test_an_adapters_reference_is_the_model_it_started_from(tiny):
    rows = make_pairs()
    learner = make_learner(tiny("qwen3"), rank=4)
    lay_out = partial(collate, rows_per_forward=4, rows_per_unit=2)
    reference = AdapterOff(learner.without_adapter(), collate=lay_out)
    start = [sum(x.tolist()) for x in slow_logprobs(plain(tiny("qwen3")), rows)]
    for _ in range(3):
        found = [row.numbers["ref_logprob"] for row in reference.annotate(rows)]
        assert found == pytest.approx(start, rel=1e-5)
        moved(learner, rows)
    now = [sum(x.tolist()) for x in learner.logprobs(lay_out(rows))]
    assert abs(sum(now) - sum(start)) > 0.1, "the policy has moved"


class Counting:
    """A learner whose scored rows are counted."""

    def __init__(self, learner):
        self.learner, self.world, self.policy, self.rows = learner, learner.world, learner.policy, 0

    def logprobs(self, batches):
        self.rows += sum(batch.num_rows for batch in batches)
        return self.learner.logprobs(batches)


def cache_for(path, learner, **model):
    lay_out = partial(collate, rows_per_forward=8, rows_per_unit=2)
    return ReferenceCache(path, model={"name_or_path": "m", **model}, learner=learner, collate=lay_out)


def as_items(rows):
    return [rows[i : i + 2] for i in range(0, len(rows), 2)]


def test_full_training_scores_every_completion_once_and_keeps_it(tiny, tmp_path):
    rows, path = make_pairs(count=70), tmp_path / "reference.jsonl"
    items = as_items(rows)
    learner = Counting(make_learner(tiny("qwen3")))
    cache = cache_for(path, learner)
    cache.prepare(items, range(70))
    assert learner.rows == 140
    start = [sum(x.tolist()) for x in slow_logprobs(plain(tiny("qwen3")), rows)]
    before = [row.numbers["ref_logprob"] for row in cache.annotate(rows)]
    assert before == pytest.approx(start, rel=1e-5)
    moved(learner.learner, rows)
    assert [row.numbers["ref_logprob"] for row in cache.annotate(rows)] == before
    assert learner.rows == 140, "nothing is scored after step 1"


def test_a_cache_that_was_cut_off_goes_on_where_it_was(tiny, tmp_path):
    """Three lines of a model and two parts; the second part is torn, as a power cut leaves it."""
    rows, path = make_pairs(count=70), tmp_path / "reference.jsonl"
    items = as_items(rows)
    whole = cache_for(path, make_learner(tiny("qwen3")))
    whole.prepare(items, range(70))
    expected = [row.numbers for row in whole.annotate(rows)]
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 3
    path.write_bytes(b"".join(lines[:2]) + lines[2][:50])
    learner = Counting(make_learner(tiny("qwen3")))
    again = cache_for(path, learner)
    again.prepare(items, range(70))
    assert learner.rows == 4 + 140 - 64, (
        "four rows to see that the weights are the same, and what was missing"
    )
    assert [row.numbers for row in again.annotate(rows)] == expected
    assert path.read_bytes() == b"".join(lines)
    complete = Counting(make_learner(tiny("qwen3")))
    cache_for(path, complete).prepare(items, range(70))
    assert complete.rows == 4


def test_only_items_that_the_run_takes_are_scored(tiny, tmp_path):
    learner = Counting(make_learner(tiny("qwen3")))
    items = as_items(make_pairs(count=10))
    cache = cache_for(tmp_path / "reference.jsonl", learner)
    cache.prepare(items, [1, 7])
    assert learner.rows == 4
    cache.annotate([*items[1], *items[7]])


def test_numbers_of_other_weights_are_refused_and_of_another_model_made_anew(tiny, tmp_path, caplog):
    rows, path = make_pairs(), tmp_path / "reference.jsonl"
    cache_for(path, make_learner(tiny("qwen3"))).prepare(as_items(rows), range(4))
    other = Counting(make_learner(tiny("qwen3", seed=1)))
    with pytest.raises(CheckpointError, match=r"are not those of m .*its weights have changed since"):
        cache_for(path, other).prepare(as_items(rows), range(4))
    cache_for(path, other, dtype="bfloat16").prepare(as_items(rows), range(4))
    assert "is of another model and is made anew" in caplog.text
    assert json.loads(path.read_text().splitlines()[0]) == {
        "model": {"name_or_path": "m", "dtype": "bfloat16"}
    }


def test_ktos_reference_point_is_the_mean_log_ratio_and_at_least_0(tiny):
    rows = make_pairs()
    learner = make_learner(tiny("qwen3"))
    slow = [sum(x.tolist()) for x in slow_logprobs(plain(tiny("qwen3")), rows)]
    for shift in (-2.0, 3.0):
        own = [
            replace(row, numbers={"ref_logprob": value + shift * (1 + i % 2)})
            for i, (row, value) in enumerate(zip(rows, slow, strict=True))
        ]
        for rows_per_forward in (1, 3, 100):
            batches = at_reference_point(
                own, learner, collate=partial(collate, rows_per_forward=rows_per_forward)
            )
            found = [x for batch in batches for x in batch.numbers["reference_point"].tolist()]
            assert found == pytest.approx([max(0.0, -2 * shift)] * 4, abs=1e-4)
            assert [row.token_ids for batch in batches for row in batch.rows] == [
                row.token_ids for row in rows[0::2]
            ]


# runs ---------------------------------------------------------------------------------------------------------


def write_pairs(path, count=12, seed=0):
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rows.append(
            {
                "prompt": f"{i}: {a}+{b}",
                "chosen": f"{a + b} " + "a" * (1 + i % 4),
                "rejected": f"{a} bcd"[: 4 + i % 2],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(recipe, folder, model, data, /, **more):
    given = {
        "output_dir": str(folder),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [str(data)], "max_length": 64},
        "train": {"max_steps": 3, "per_device_train_batch_size": 4, "num_threads": 1},
        "optim": {"learning_rate": 1e-3},
        "log": {"report_to": ["none"]},
    }
    for section, values in more.items():
        given[section] = {**given.get(section, {}), **values} if isinstance(values, dict) else values
    cfg, _ = resolve(recipe, given)
    run_recipe(recipe, cfg)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_after_the_cache_no_reference_forward_is_run(recipe, tiny, tmp_path, monkeypatch):
    """No pass without gradient after the first update, but KTO's own one of mismatched completions each step."""
    passes = []
    policy_class = load("kitae.models.policy:Policy", package="", attribute="")
    forward, update = policy_class.forward, Learner.optim_step

    def noting(self, batch, **how):
        passes.append((torch.is_grad_enabled(), len(batch.rows)))
        return forward(self, batch, **how)

    def noting_update(self):
        passes.append("update")
        return update(self)

    monkeypatch.setattr(policy_class, "forward", noting)
    monkeypatch.setattr(Learner, "optim_step", noting_update)
    run(recipe, tmp_path / "run", tiny("qwen3"), write_pairs(tmp_path / "rows.jsonl"))
    later = passes[passes.index("update") :]
    expected = [(True, 8), "update"] if recipe == "dpo" else [(False, 4), (True, 4), "update"]
    assert later == ["update", *expected * 2]
    assert any(p[0] is False for p in passes if p != "update")


@pytest.mark.parametrize("recipe", ["dpo", "kto"])
def test_an_adapters_cache_and_its_adapter_switched_off_say_the_same(recipe, tiny, tmp_path):
    data = write_pairs(tmp_path / "rows.jsonl")
    both = [
        run(
            recipe,
            tmp_path / how,
            tiny("qwen3"),
            data,
            lora={"rank": 4},
            eval={"steps": 2},
            data={"hold_out": 0.3},
            **{recipe: {"reference": how}},
        )
        for how in ("cache", "each_step")
    ]
    assert (tmp_path / "cache" / "reference.jsonl").exists()
    assert not (tmp_path / "each_step" / "reference.jsonl").exists()
    for one, two in zip(*both, strict=True):
        known = {name: value for name, value in one.items() if name.startswith(("train/", "eval/"))}
        assert {name: two[name] for name in known} == pytest.approx(known, rel=1e-4, abs=1e-5)


def test_the_first_step_starts_from_the_reference(tiny, tmp_path):
    for name, lora in (("full", {}), ("lora", {"rank": 4})):
        first = run("dpo", tmp_path / name, tiny("qwen3"), write_pairs(tmp_path / "rows.jsonl"), lora=lora)[0]
        assert first["train/loss"] == pytest.approx(math.log(2), rel=1e-6)
        assert first["train/margin"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_step_depends_on_pairs_per_step_only(recipe, tiny, tmp_path):
    data = write_pairs(tmp_path / "rows.jsonl")
    runs = [
        run(
            recipe,
            tmp_path / f"{size}",
            tiny("llama"),
            data,
            eval={"steps": 3},
            data={"hold_out": 0.3},
            train={"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size},
        )
        for size in (1, 2, 4)
    ]
    for line, *others in zip(*runs, strict=True):
        known = {name: value for name, value in line.items() if name.startswith(("train/", "eval/"))}
        for other in others:
            assert {name: other[name] for name in known} == pytest.approx(known, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("recipe", ["dpo", "simpo", "orpo"])
def test_the_token_limit_of_a_pass_never_parts_a_pair(recipe, tiny, tmp_path):
    """Three of these rows fit into the 1,024 tokens of a CPU's pass, a pair and a half."""
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(
            json.dumps({"prompt": f"{i}", "chosen": f"{i}" + "ab" * 140, "rejected": f"{i}" + "cd" * 140})
            + "\n"
            for i in range(6)
        )
    )
    more = {"data": {"max_length": 400, "shuffle": False}, "optim": {"warmup_ratio": 0.0}}
    one, four = (
        run(
            recipe,
            tmp_path / f"{size}",
            tiny("qwen3"),
            path,
            train={
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 4 // size,
                "max_steps": 2,
            },
            **more,
        )
        for size in (1, 4)
    )
    for a, b in zip(one, four, strict=True):
        for name in ("train/loss", "train/margin", "train/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_out_pairs_are_judged_as_the_loss_judges(recipe, tiny, tmp_path):
    """Before the first step, the evaluation of some rows is what a step on the same rows reports."""
    data = write_pairs(tmp_path / "rows.jsonl", count=6)
    copy = tmp_path / "copy.jsonl"
    copy.write_text(data.read_text())
    rows = 12 if recipe == "kto" else 6
    lines = run(
        recipe,
        tmp_path / "run",
        tiny("qwen3"),
        data,
        data={"eval": [str(copy)]},
        eval={"at_start": True, "batch_size": 2},
        train={"per_device_train_batch_size": rows, "max_steps": 1},
    )
    start, step = lines[0], lines[1]
    assert start["step"] == 0 and step["step"] == 1
    for name in ("loss", "accuracy", "margin"):
        assert start[f"eval/{name}"] == pytest.approx(step[f"train/{name}"], rel=1e-5, abs=1e-6)
    assert step["eval/loss"] < start["eval/loss"], "one step on the same rows lowers the loss"


@pytest.mark.parametrize("recipe", RECIPES)
def test_bad_rows_stop_the_run_before_any_weights_are_read(recipe, tiny, tmp_path):
    """The model's folder has no weights that could be read."""
    shutil.copytree(tiny("qwen3"), tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "chosen": "a", "rejected": "a"}\n{"prompt": "q", "chosen": "a"}\n')
    with pytest.raises(DataError, match="2 of 2 rows cannot be used") as error:
        run(recipe, tmp_path / "run", tmp_path / "model", path)
    assert f"{path}:1: chosen and rejected are identical" in str(error.value)
    assert f"{path}:2: no preference" in str(error.value)


def test_weights_mix_sources_of_pairs(tiny, tmp_path):
    """Pairs of several files, mixed and held out as SFT's rows are."""
    for name, seed in (("one", 0), ("two", 1)):
        write_pairs(tmp_path / f"{name}.jsonl", seed=seed)
    for recipe in ("dpo", "kto"):
        lines = run(
            recipe,
            tmp_path / recipe,
            tiny("qwen3"),
            "",
            data={
                "train": [str(tmp_path / f"{n}.jsonl") for n in ("one", "two")],
                "weights": [3, 1],
                "hold_out": 0.2,
            },
            eval={"steps": 3},
        )
        assert len(lines) == 3 and "eval/loss" in lines[-1]


def test_a_loss_of_your_own_gets_the_reference(tiny, tmp_path):
    """DPO written by hand gives the run that DPO gives."""
    (tmp_path / "mine.py").write_text(
        "import torch.nn.functional as F\n"
        "def loss(out, weights_N, *, ref_logprob):\n"
        "    score_B = out.per_row(out.logprobs_N) - ref_logprob\n"
        "    return -F.logsigmoid(0.1 * (score_B[0::2] - score_B[1::2])).sum(), {}\n"
    )
    data = write_pairs(tmp_path / "rows.jsonl")
    own = run("dpo", tmp_path / "own", tiny("qwen3"), data, loss=f"{tmp_path / 'mine.py'}:loss")
    ours = run("dpo", tmp_path / "ours", tiny("qwen3"), data)
    assert [line["train/loss"] for line in own] == pytest.approx(
        [line["train/loss"] for line in ours], rel=1e-5
    )
    with pytest.raises(ConfigError, match="needs 'ref_logprob', which this run does not produce"):
        run("simpo", tmp_path / "simpo", tiny("qwen3"), data, loss=f"{tmp_path / 'mine.py'}:loss")


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"dpo.reference": "each_step"}, "dpo.reference is each_step and lora.rank is 0"),
        (
            {"dpo.reference": "each_step", "lora.rank": 4, "lora.bias": "all"},
            "biases of the model itself train",
        ),
        ({"dpo.loss_type": "ipo", "dpo.label_smoothing": 0.1}, "dpo.label_smoothing .* would have no effect"),
        ({"data.target": "as_is"}, "data.target .* would have no effect"),
        ({"save.final": "best", "eval.steps": 1, "save.metric": "eval/perplexity"}, "dpo does not evaluate"),
        ({"beta": 0}, "dpo.beta"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(given, reason):
    with pytest.raises(ConfigError, match=reason):
        resolve("dpo", {"model_name_or_path": "m", "data.train": ["d"], **given})


def test_biases_that_train_are_kept_apart_by_a_cache(tiny, tmp_path):
    data = write_pairs(tmp_path / "rows.jsonl")
    lines = run("dpo", tmp_path / "run", tiny("qwen2"), data, lora={"rank": 4, "bias": "all"})
    assert (tmp_path / "run" / "reference.jsonl").exists()
    assert lines[0]["train/margin"] == pytest.approx(0, abs=1e-6) and lines[-1]["train/margin"] != 0


def test_trls_and_llama_factorys_flags_map():
    cfg, _ = resolve(
        "dpo", ["--model_name_or_path", "m", "--dataset_name", "d", "--beta", "0.3", "--loss_type", "ipo",
                "--rpo_alpha", "0.5", "--precompute_ref_log_probs", "--max_prompt_length", "99"],
    )  # fmt: skip
    assert (cfg.dpo.beta, cfg.dpo.loss_type, cfg.dpo.nll_coef, cfg.dpo.reference) == (
        0.3,
        "ipo",
        0.5,
        "cache",
    )
    assert cfg.data.max_prompt_length == 99
    cfg, _ = resolve("orpo", ["--pretrain", "m", "--dataset", "d", "--lam", "0.2", "--max_epochs", "2"])
    assert cfg.orpo.odds_coef == 0.2 and cfg.train.num_train_epochs == 2
    cfg, _ = resolve("kto", ["--model_name_or_path", "m", "--dataset_name", "d", "--desirable_weight", "1.3"])
    assert cfg.kto.desirable_weight == 1.3
    cfg, notes = resolve("simpo", ["--model_name_or_path", "m", "--dataset_name", "d", "--simpo_gamma", "0.5",
                                   "--pref_beta", "2.5", "--loss_type", "simpo"])  # fmt: skip
    assert (cfg.simpo.gamma, cfg.simpo.beta) == (0.5, 2.5)
    assert any("--loss_type" in warning for warning in notes.warnings)
