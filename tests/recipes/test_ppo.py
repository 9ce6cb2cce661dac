"""PPO against a slow version on plain transformers modules, and its runs: layouts, ranks, resume, bad input."""

import json
import math
import os
import random
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from methods import KINDS, movement, read_method
from methods import train as train_method
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toy_task import make_files
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import kitae
from kitae.algos import averaging, ppo
from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.errors import ConfigError, ModelError
from kitae.models import value_head
from kitae.models.critic import load_critic
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.recipes import _ppo
from kitae.recipes.ppo import PPOSettings
from kitae.settings import resolve
from kitae.train.learner import Learner
from kitae.types import Problem, Rollout, Row, Score

HERE = Path(__file__).parent
TEMPERATURE = 0.8
FORMULAS = PPOSettings(
    kl_coef=0.07, gamma=0.98, lam=0.9, clip_low=0.2, clip_high=0.3, value_clip=0.15, value_coef=0.4, entropy_coef=0.03,
    reward_clip=5.0, missing_eos_penalty=0.5,
)  # fmt: skip
REWARDS = """
def letters(completion, *, prompt, answer, **columns):
    return sum("a" <= c <= "z" for c in completion) / max(len(completion), 1)


def sometimes(completion, *, prompt, answer, **columns):
    return None if sum(map(ord, prompt)) % 3 == 0 else float(len(completion.strip("0123456789")))


def never(completion, *, prompt, answer, **columns):
    return None
"""


# a round by itself -------------------------------------------------------------------------------------------------


def make_round(seed=0, prompts=3, group=3):
    """Random rollouts with scores, and reference log-probs and old values that differ from what the models say."""
    rng = random.Random(seed)
    groups, scores = [], []
    for p in range(prompts):
        problem = Problem(
            prompt="?", token_ids=[rng.randrange(3, 90) for _ in range(rng.randint(1, 9))], index=p
        )
        rollouts = []
        for _ in range(group):
            ids = [rng.randrange(3, 90) for _ in range(rng.randint(1, 13))]
            logprobs = [-4.6 + rng.gauss(0, 0.4) for _ in ids]
            finish = rng.choice(["stop", "length"])
            rollouts.append(
                Rollout(problem=problem, text="", token_ids=ids, logprobs=logprobs, finish_reason=finish)
            )
        groups.append(rollouts)
        scores.append([Score(rng.uniform(-9, 9)) for _ in range(group)])
    scores[0][1] = Score(None, "could not be scored")
    return groups, scores


def scored_rows(groups, scores, settings, *, is_masking=False, seed=1):
    """The round's rows with invented streams of reference and critic."""
    rng = random.Random(seed)
    return [
        [
            replace(
                row,
                streams={
                    **row.streams,
                    "ref_logprobs": [0.0] * row.prompt_length
                    + [-4.6 + rng.gauss(0, 0.3) for _ in range(row.num_taught)],
                    "old_values": [0.0] * row.prompt_length
                    + [rng.gauss(0, 0.5) for _ in range(row.num_taught)],
                },
            )
            for row in group
        ]
        for group in _ppo.to_rows(groups, scores, is_masking=is_masking, settings=settings)
    ]


def slow_targets(rows, scores, settings):
    """Advantages and returns of each row, every formula written out over Python numbers."""
    advantages, returns = [], []
    token_rewards = []
    for row, score in zip(rows, scores, strict=True):
        n = row.num_taught
        old, ref, values = (
            row.streams[name][row.prompt_length :] for name in ("old_logprobs", "ref_logprobs", "old_values")
        )
        r = [-settings.kl_coef * (old[t] - ref[t]) for t in range(n)]
        r[-1] += score
        token_rewards.append(r)
    if settings.whiten_rewards:
        every = torch.tensor([x for r in token_rewards for x in r], dtype=torch.float64)
        spread = (every.var() + 1e-8).sqrt().item()
        mean = every.mean().item()
        token_rewards = [[(x - mean) / spread + mean for x in r] for r in token_rewards]
    for row, r in zip(rows, token_rewards, strict=True):
        n, values = row.num_taught, row.streams["old_values"][row.prompt_length :]
        deltas = [r[t] + settings.gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
        own = [
            sum((settings.gamma * settings.lam) ** k * deltas[t + k] for k in range(n - t)) for t in range(n)
        ]
        advantages.append(own)
        returns.append([a + v for a, v in zip(own, values, strict=True)])
    every = torch.tensor([x for own in advantages for x in own], dtype=torch.float64)
    white = [
        ((torch.tensor(own) - every.mean()) / (every.var() + 1e-8).sqrt()).tolist() for own in advantages
    ]
    return white, returns


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_and_returns_of_a_round_equal_the_slow_ones(whiten_rewards):
    settings = FORMULAS.model_copy(update={"whiten_rewards": whiten_rewards})
    groups, scores = make_round()
    rows = scored_rows(groups, scores, settings)
    controller = ppo.KLController(settings.kl_coef, target=0.1, horizon=100)
    found, metrics = _ppo.estimate(rows, settings=settings, controller=controller, world=World())
    assert [len(group) for group in found] == [2, 3, 3]
    flat = _ppo.flat(rows)
    shaped = [
        max(-5.0, min(5.0, s.value)) - (0.5 if r.finish_reason == "length" else 0.0)
        for g, own in zip(groups, scores, strict=True)
        for r, s in zip(g, own, strict=True)
        if s.value is not None
    ]
    white, returns = slow_targets(flat, shaped, settings)
    for row, w, r in zip(_ppo.flat(found), white, returns, strict=True):
        assert set(row.streams) == set(_ppo.STREAMS) and row.numbers == {}
        assert row.streams["advantages"] == pytest.approx([0.0] * row.prompt_length + w, rel=1e-5, abs=1e-6)
        assert row.streams["returns"] == pytest.approx([0.0] * row.prompt_length + r, rel=1e-5, abs=1e-6)
    kl = sum(
        o - f
        for row in flat
        for o, f in zip(row.streams["old_logprobs"], row.streams["ref_logprobs"], strict=True)
    ) / len(flat)
    assert metrics["rollout/kl"] == pytest.approx(kl)
    assert metrics["train/kl_coef"] == settings.kl_coef
    assert controller.coef == pytest.approx(0.07 * (1 + max(-0.2, min(0.2, kl / 0.1 - 1)) * 8 / 100))
    all_returns = torch.tensor([x for own in returns for x in own])
    old = torch.tensor([v for row in flat for v in row.streams["old_values"][row.prompt_length :]])
    assert metrics["rollout/return_mean"] == pytest.approx(all_returns.mean().item(), rel=1e-5)
    assert metrics["rollout/value_mean"] == pytest.approx(old.mean().item(), rel=1e-5)
    explained = 1 - (all_returns - old).var() / all_returns.var()
    assert metrics["train/explained_variance"] == pytest.approx(explained.item(), rel=1e-4)


def test_masked_and_unscored_completions_count_nowhere():
    groups, scores = make_round(seed=5)
    kept = [
        [r for r, s in zip(g, own, strict=True) if s.value is not None and r.finish_reason == "stop"]
        for g, own in zip(groups, scores, strict=True)
    ]
    assert 0 < sum(map(len, kept)) < 8
    rows = scored_rows(groups, scores, FORMULAS, is_masking=True)
    assert [[row.token_ids[row.prompt_length :] for row in own] for own in rows] == [
        [r.token_ids for r in own] for own in kept
    ]


def test_a_round_in_which_nothing_could_be_scored_has_no_targets():
    groups, scores = make_round()
    nothing = [[Score(None)] * len(own) for own in scores]
    rows = _ppo.to_rows(groups, nothing, is_masking=False, settings=FORMULAS)
    controller = ppo.KLController(0.1, target=1.0)
    found, metrics = _ppo.estimate(rows, settings=FORMULAS, controller=controller, world=World())
    assert found == [[], [], []]
    assert controller.coef == 0.1
    assert all(math.isfinite(value) for value in metrics.values())


# gradients against plain modules -----------------------------------------------------------------------------------


def slow_losses(folder, rows, *, head, is_shared):
    """Every row by itself through plain modules: eq. 7 and 9 of arXiv:1707.06347, gradients of policy and critic."""
    s = FORMULAS
    policy = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    backbone = policy.get_decoder()
    if not is_shared:
        classifier = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, num_labels=1, attn_implementation="eager"
        )
        backbone = classifier.model
    head = head.clone().requires_grad_()
    policy_sum, value_sum, entropy_sum, tokens = 0.0, 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row.token_ids])
        logits = policy(ids).logits[0].float() / TEMPERATURE
        hidden = backbone(input_ids=ids).last_hidden_state[0]
        for t in range(row.prompt_length, len(row.token_ids)):
            distribution = logits[t - 1].log_softmax(-1)
            a, old, ret, old_v = (
                row.streams[name][t] for name in ("advantages", "old_logprobs", "returns", "old_values")
            )
            ratio = (distribution[row.token_ids[t]] - old).exp()
            policy_sum = policy_sum - torch.min(ratio * a, ratio.clamp(1 - s.clip_low, 1 + s.clip_high) * a)
            entropy_sum = entropy_sum - (distribution.exp() * distribution).sum()
            value = hidden[t - 1] @ head
            near = old_v + (value - old_v).clamp(-s.value_clip, s.value_clip)
            value_sum = value_sum + 0.5 * torch.max((value - ret) ** 2, (near - ret) ** 2)
            tokens += 1
    policy_loss, value_loss = policy_sum / tokens, value_sum / tokens
    total = policy_loss - s.entropy_coef * entropy_sum / tokens
    (total + s.value_coef * value_loss if is_shared else total + value_loss).backward()
    gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    of_critic = (
        {} if is_shared else {n: p.grad for n, p in classifier.named_parameters() if p.grad is not None}
    )
    return policy_loss.item(), value_loss.item(), gradients, of_critic, head.grad


def make_learner(model):
    return Learner(model, optim=OptimSettings(), total_steps=1, world=World())


def gradients_of(learner):
    return {slot.name: slot.grad.clone() for slot in learner.flat.slots}


def assert_same_gradients(found, expected):
    for name, grad in expected.items():
        scale = grad.abs().max().item() + 1e-8
        assert (found[name].view_as(grad) - grad).abs().max().item() <= 5e-5 * scale + 1e-7, name


def forget(learner):
    learner.flat.zero_grad()
    learner._has_gradient = False


def fixed_head(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(9)) * 0.2


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_losses_and_gradients_equal_slow_ppo_for_every_cut(tiny, family, is_shared):
    folder = tiny(family)
    rows = scored_rows(*make_round(), FORMULAS)
    controller = ppo.KLController(FORMULAS.kl_coef)
    rows, _ = _ppo.estimate(rows, settings=FORMULAS, controller=controller, world=World())
    rows = _ppo.flat(rows)
    model = ModelSettings(name_or_path=str(folder), dtype="float32")
    policy = load_policy(model)
    head = fixed_head(policy.config.hidden_size)
    expected = slow_losses(folder, rows, head=head, is_shared=is_shared)
    slow_policy, slow_value, slow_gradients, of_critic, of_head = expected
    value = partial(ppo.value_loss, value_clip=FORMULAS.value_clip)
    objective = ppo.Objective(
        policy=partial(ppo.policy_loss, clip_low=FORMULAS.clip_low, clip_high=FORMULAS.clip_high),
        value=value if is_shared else None,
        value_coef=FORMULAS.value_coef,
        entropy_coef=FORMULAS.entropy_coef,
    )
    if is_shared:
        value_head.attach(policy, start=folder)
        policy.value_head.weight.data.copy_(head[None])
    else:
        critic = load_critic(model)
        critic.causal_lm.score.weight.data.copy_(head[None])
        critic_learner = make_learner(critic)
    learner = make_learner(policy)
    weighed, denominator = averaging.weigh(rows, "token")
    for rows_per_forward, share in [(1, False), (3, True), (64, False), (64, True)]:
        batches = collate(
            weighed, rows_per_forward=rows_per_forward, share_prompts=share, temperature=TEMPERATURE
        )
        found = learner.forward_backward(batches, objective, denominator=denominator)
        assert found["policy_loss"] == pytest.approx(slow_policy, rel=1e-5, abs=1e-6)
        assert found["entropy"] > 0
        gradients = gradients_of(learner)
        if is_shared:
            assert found["value_loss"] == pytest.approx(slow_value, rel=1e-5)
            assert_same_gradients(gradients, {"value_head.weight": of_head})
        else:
            on_values = ppo.Objective(value=value)
            told = critic_learner.forward_backward(batches, on_values, denominator=denominator)
            assert told["loss"] == told["value_loss"] == pytest.approx(slow_value, rel=1e-5)
            assert_same_gradients(gradients_of(critic_learner), {**of_critic, "score.weight": of_head})
            forget(critic_learner)
        assert_same_gradients(gradients, slow_gradients)
        forget(learner)


def test_values_are_those_of_the_states_before_each_token(tiny):
    """The value of a token is read where the token is not seen yet, under every cut."""
    folder = tiny("llama")
    rows = _ppo.flat(_ppo.to_rows(*make_round(), is_masking=False, settings=FORMULAS))
    critic = load_critic(ModelSettings(name_or_path=str(folder), dtype="float32"))
    head = fixed_head(critic.config.hidden_size)
    critic.causal_lm.score.weight.data.copy_(head[None])
    plain = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1)
    expected = []
    with torch.no_grad():
        for row in rows:
            hidden = plain.model(input_ids=torch.tensor([row.token_ids])).last_hidden_state[0]
            expected.append((hidden @ head)[row.prompt_length - 1 : -1].tolist())
    learner = make_learner(critic)
    for rows_per_forward in (1, 3, 64):
        batches = collate(rows, rows_per_forward=rows_per_forward)
        [found] = _ppo.with_values([rows], batches, learner.values(batches))
        for row, values in zip(found, expected, strict=True):
            assert row.streams["old_values"] == pytest.approx([0.0] * row.prompt_length + values, abs=1e-5)


def test_an_adapters_value_head_trains_and_leaves_the_reference_alone(tiny):
    model = ModelSettings(name_or_path=str(tiny("qwen3")), dtype="float32")
    policy = load_policy(model, lora=LoraSettings(rank=4))
    value_head.attach(policy, start=Path(model.name_or_path))
    learner = make_learner(policy)
    assert {"value_head.weight", "value_head.bias"} <= {slot.name for slot in learner.flat.slots}
    batches = collate([Row(token_ids=[5, 6, 7], loss_mask=[False, True, True])], rows_per_forward=1)
    before = learner.without_adapter().logprobs(batches)[0]
    streams = {"returns": torch.ones(2), "old_values": torch.zeros(2)}
    batches[0].streams.update(streams)
    learner.forward_backward(batches, ppo.Objective(value=ppo.value_loss), denominator=1.0)
    learner.optim_step()
    assert policy.value_head.bias.item() != 0.0
    batches[0].streams.clear()
    assert torch.equal(learner.without_adapter().logprobs(batches)[0], before)


# runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """A data file of sums and a file of rewards."""
    rng = random.Random(0)
    rows = [{"prompt": f"{rng.randint(1, 999)}+{rng.randint(1, 9)}", "answer": "1"} for _ in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def given(files, model, name="run", *, reward="letters", **sections):
    """Settings of a short run: rounds of five prompts, two passes, two updates a pass."""
    base = {
        "output_dir": str(files / name),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [str(files / "rows.jsonl")], "system_prompt": ""},
        "reward": {"function": f"{files / 'rewards.py'}:{reward}", "num_workers": 1, "timeout_s": 20},
        "rollout": {
            "prompts_per_round": 5,
            "max_new_tokens": 7,
            "updates_per_round": 2,
            "epochs_per_round": 2,
        },
        "ppo": {"kl_coef": 0.05},
        "train": {"max_steps": 8, "num_threads": 1},
        "optim": {"learning_rate": 3e-3},
        "log": {"report_to": ["none"]},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return base


SEPARATE = {"critic": {"learning_rate": 3e-3}}
SHARED = {"ppo": {"kl_coef": 0.05, "critic": "shared"}}


def lines_of(folder, *, all_names=False):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if all_names or not k.startswith(("time", "perf/"))} for line in lines
    ]


def weights_of(folder):
    """Every tensor of the model and its critic, by file and name."""
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted([*Path(folder).glob("*.safetensors"), *Path(folder).glob("critic/*.safetensors")])
        for name, tensor in load_file(path).items()
    }


def assert_close(one, two):
    first, second = lines_of(one), lines_of(two)
    assert [set(m) for m in first] == [set(m) for m in second]
    for a, b in zip(first, second, strict=True):
        assert b == pytest.approx(a, rel=5e-4, abs=5e-6)
    theirs = weights_of(two)
    for name, tensor in weights_of(one).items():
        assert (tensor - theirs[name]).abs().max() < 5e-5, name


@pytest.mark.parametrize("critic", [SEPARATE, SHARED])
def test_rows_per_forward_change_nothing(critic, files, tiny):
    for name, rows_per_forward in (("one", 1), ("all", 64)):
        rollout = {**given(files, "")["rollout"], "rows_per_forward": rows_per_forward}
        kitae.train("ppo", given(files, tiny("qwen3"), name, **critic, rollout=rollout))
    assert_close(files / "one", files / "all")


@pytest.mark.parametrize(("critic", "rank"), [(SEPARATE, 0), (SHARED, 0), (SEPARATE, 4), (SHARED, 4)])
def test_a_run_reports_everything_and_leaves_an_ordinary_model_and_its_critic(critic, rank, files, tiny):
    held_out = {"eval": {"steps": 4, "max_rows": 2}}
    out = kitae.train("ppo", given(files, tiny("qwen3"), **critic, lora={"rank": rank}, **held_out))
    first, *_, last = lines_of(out)
    rounds = {
        "rollout/reward", "rollout/kl", "rollout/value_mean", "rollout/return_mean", "rollout/entropy",
        "rollout/completion_length", "rollout/truncated", "rollout/temperature", "train/kl_coef",
        "train/explained_variance",
    }  # fmt: skip
    every = {
        "train/loss", "train/policy_loss", "train/value_loss", "train/clip_fraction", "train/value_clip_fraction",
        "train/approx_kl", "train/grad_norm", "train/learning_rate",
    }  # fmt: skip
    assert rounds | every <= set(first) and every <= set(last) and not rounds & set(last)
    assert ("train/critic_grad_norm" in last) == (critic is SEPARATE)
    assert {"eval/accuracy", "eval/reward"} <= set(last)
    assert first["rollout/kl"] == pytest.approx(0, abs=1e-5), "policy and reference start equal"
    assert "rollout/dead_groups" not in first
    names = {name.rpartition(":")[2] for name in weights_of(out) if not name.startswith("critic/")}
    assert names and not any("value_head" in name or "score" in name for name in names)
    base = AutoModelForCausalLM.from_pretrained(tiny("qwen3") if rank else out, dtype=torch.float32)
    PeftModel.from_pretrained(base, out) if rank else base
    if critic is SHARED:
        assert set(load_file(out / "critic" / "value_head.safetensors")) == {"weight", "bias"}
    elif not rank:
        scored = AutoModelForSequenceClassification.from_pretrained(out / "critic", dtype=torch.float32)
        assert scored.score.weight.abs().max() > 0


def test_a_reward_model_judges_and_starts_the_critic(files, tiny):
    """Any classifier of one label will do; here a critic that an earlier run left."""
    model = tiny("qwen3")
    judge = kitae.train("ppo", given(files, model, "judge", **SEPARATE)) / "critic"
    settings = given(files, model, critic={"name_or_path": str(judge)})
    settings["reward"] = {"function": str(judge)}
    first = lines_of(kitae.train("ppo", settings))[0]
    assert first["rollout/reward_std"] > 0 and first["rollout/value_mean"] != 0.0


def test_the_next_run_goes_on_with_the_critic_of_the_last(files, tiny):
    model = tiny("qwen3")
    one = kitae.train("ppo", given(files, model, "one", **SEPARATE))
    cfg, _ = resolve("ppo", given(files, one, "two", **SEPARATE))
    assert _ppo._critic_model(cfg).name_or_path == str(one / "critic")
    cfg, _ = resolve("ppo", given(files, model, "two", **SEPARATE))
    assert _ppo._critic_model(cfg) == cfg.model
    cfg, _ = resolve("ppo", given(files, model, "two", critic={"name_or_path": str(one / "critic")}))
    assert _ppo._critic_model(cfg).name_or_path == str(one / "critic")

    two = kitae.train("ppo", given(files, model, "shared", **SHARED))
    policy = load_policy(ModelSettings(name_or_path=str(two), dtype="float32"))
    assert value_head.attach(policy, start=two) == two / "critic" / "value_head.safetensors"
    saved = load_file(two / "critic" / "value_head.safetensors")
    assert torch.equal(policy.value_head.weight, saved["weight"]) and saved["weight"].abs().max() > 0
    again = kitae.train("ppo", given(files, two, "again", **SHARED))
    assert f"the value head starts from {two / 'critic'}" in (again / "train.log").read_text()


def test_while_the_critic_warms_up_the_policy_stands_still(files, tiny):
    warm = {"critic": {"learning_rate": 3e-3, "warmup_rounds": 1}}
    out = kitae.train("ppo", given(files, tiny("qwen3"), **warm))
    lines = lines_of(out)
    assert [("train/policy_loss" in line, "train/value_loss" in line) for line in lines] == [
        *[(False, True)] * 4,
        *[(True, True)] * 4,
    ]
    assert lines[4]["rollout/kl"] == pytest.approx(0, abs=1e-5), (
        "the second round is still the first policy's"
    )
    assert lines[4]["rollout/value_mean"] != 0.0 == lines[0]["rollout/value_mean"]
    assert lines[4]["train/learning_rate"] == 3e-3 > lines[4]["train/critic_learning_rate"]
    with pytest.raises(
        ConfigError, match=r"critic.warmup_rounds is 2, which at 4 steps a round .* none of the run's 8"
    ):
        kitae.train("ppo", given(files, tiny("qwen3"), "none", critic={"warmup_rounds": 2}))


def test_the_steered_weight_follows_the_papers_rule(files, tiny):
    steered = {"kl_coef": 0.05, "target_kl": 0.3, "kl_horizon": 50}
    out = kitae.train(
        "ppo", given(files, tiny("qwen3"), ppo=steered, train={"max_steps": 16, "num_threads": 1})
    )
    rounds = [line for line in lines_of(out) if "rollout/kl" in line]
    assert len(rounds) == 4
    for before, after in pairwise(rounds):
        error = min(max(before["rollout/kl"] / 0.3 - 1, -0.2), 0.2)
        assert after["train/kl_coef"] == pytest.approx(before["train/kl_coef"] * (1 + error * 5 / 50))


@pytest.mark.parametrize("critic", [SEPARATE, SHARED])
def test_completions_that_nobody_can_score_move_nothing(critic, files, tiny):
    model = tiny("qwen3")
    out = kitae.train("ppo", given(files, model, reward="never", **critic))
    assert all(line["rollout/unscored"] == 1.0 for line in lines_of(out) if "rollout/unscored" in line)
    before = load_file(model / "model.safetensors")
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in load_file(out / "model.safetensors").items()
    )
    out = kitae.train("ppo", given(files, model, "some", reward="sometimes", **critic))
    assert 0 < lines_of(out)[0]["rollout/unscored"] < 1 and lines_of(out)[0]["train/grad_norm"] > 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_critic_learns_the_toy_task_too(kind, tmp_path):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    method = read_method("ppo")
    method.settings["ppo"]["critic"] = "shared"
    del method.settings["critic"]
    lines = train_method(method, files=make_files(tmp_path), output_dir=tmp_path / "run", kind=kind)
    first, last = movement(lines, metric="rollout/reward", window=5)
    assert last - first > method.rises_by


def train_by_command(settings, *, ranks):
    words = [word for name, value in flattened(settings) for word in (f"--{name}", *value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kitae", "launch", "--nproc_per_node", str(ranks), "train", "ppo", *words],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def flattened(settings, prefix=""):
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", [str(v) for v in value] if isinstance(value, list) else [str(value)]


@pytest.mark.parametrize(("critic", "rank"), [(SEPARATE, 0), (SHARED, 0), (SHARED, 4)])
def test_two_ranks_learn_what_one_process_does(critic, rank, files, tiny):
    """Five prompts a round and completions of any length: the ranks' shares are as uneven as can be."""
    short = {
        "rollout": {"prompts_per_round": 5, "max_new_tokens": 6, "epochs_per_round": 2},
        "train": {"max_steps": 4, "num_threads": 1},
        "lora": {"rank": rank},
    }

    def settings(name):
        own = given(files, tiny("qwen3"), name, reward="sometimes", **critic)
        return own | short

    kitae.train("ppo", settings("one"))
    train_by_command(settings("two"), ranks=2)
    assert_close(files / "one", files / "two")
    first, *_, last = lines_of(files / "one")
    assert 0 < first["rollout/unscored"] < 1 and first["train/grad_norm"] > 0 and last["train/value_loss"] > 0


KILLS = [
    ["kitae.train.learner", "Learner", "optim_step", 3],
    ["kitae.rollout.generic", "PackedRows", "advance", 3],
]


@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_killed_in_the_middle_of_rounds_equals_continuous(critic, files, tiny):
    """To the last bit: policy, critic, both optimizers, the steered KL weight and the rest of the round."""
    steered = {"kl_coef": 0.05, "target_kl": 0.3, "kl_horizon": 50, "critic": critic}

    def live(name, kills):
        settings = given(files, tiny("qwen3"), name, ppo=steered, save={"steps": 1})
        settings["train"] = {"max_steps": 10, "num_threads": 1}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(files / "home")}
        done = subprocess.run(
            [sys.executable, str(HERE / "killed_lives.py"), "ppo", json.dumps(settings), json.dumps(kills)],
            capture_output=True, text=True, env=environment, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.count("was killed")

    live("whole", [])
    assert live("killed", KILLS) == len(KILLS)
    assert lines_of(files / "killed") == lines_of(files / "whole")
    ours, theirs = weights_of(files / "killed"), weights_of(files / "whole")
    assert {n: t.numpy().tobytes() for n, t in ours.items()} == {
        n: t.numpy().tobytes() for n, t in theirs.items()
    }
    assert any(name.startswith("critic/") for name in ours)


# what a user can get wrong -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--target_kl 6 --kl_coef 0", "ppo.target_kl is 6.0 and ppo.kl_coef 0"),
        (
            "--ppo.critic shared --critic.warmup_rounds 2",
            "critic.warmup_rounds .* no effect: ppo.critic is shared",
        ),
        ("--value_coef 0.5", "ppo.value_coef .* no effect: ppo.critic is separate"),
        ("--kl_horizon 5", "ppo.kl_horizon .* no effect: ppo.target_kl is 0"),
        (
            "--mask_truncated --missing_eos_penalty 1",
            "ppo.missing_eos_penalty .* no effect: rollout.mask_truncated",
        ),
        ("--loss my.py:loss --clip_low 0.1", "ppo.clip_low .* no effect: the policy's loss is your own"),
        ("--updates_per_round 99", "rollout.updates_per_round is 99"),
        ("--gamma 0", "ppo.gamma is '0'.*greater than 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(words, told):
    with pytest.raises(ConfigError, match=told):
        resolve("ppo", ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", *words.split()])


def test_trls_and_colossals_names_mean_the_same_here():
    needed = ["--dataset_name", "d.jsonl"]
    trl = (
        "--sft_model_path m --num_ppo_epochs 3 --num_mini_batches 2 --per_device_train_batch_size 8 "
        "--gradient_accumulation_steps 2 --cliprange 0.1 --cliprange_value 0.3 --gamma 0.99 --lam 0.9 "
        "--whiten_rewards --kl_coef 0.2 --response_length 33 --missing_eos_penalty 1.0 --reward_model_path rm"
    )
    cfg, notes = resolve("ppo", [*needed, *trl.split()], world_size=2)
    assert (cfg.rollout.prompts_per_round, cfg.rollout.updates_per_round, cfg.rollout.epochs_per_round) == (
        64,
        2,
        3,
    )
    assert (cfg.ppo.clip_low, cfg.ppo.clip_high, cfg.ppo.value_clip) == (0.1, 0.1, 0.3)
    assert (cfg.ppo.gamma, cfg.ppo.lam, cfg.ppo.kl_coef, cfg.ppo.whiten_rewards) == (0.99, 0.9, 0.2, True)
    assert (cfg.rollout.max_new_tokens, cfg.ppo.missing_eos_penalty, cfg.model.name_or_path) == (33, 1.0, "m")
    assert (cfg.reward.function, notes.warnings) == ("rm", [])
    cfg, _ = resolve("ppo", [*needed, "--pretrain", "m", "--ppo.critic", "shared", "--vf_coef", "0.3"])
    assert cfg.ppo.value_coef == 0.3
    colossal = (
        "--pretrain m --num_collect_steps 2 --num_update_steps 4 --experience_batch_size 8 --train_batch_size 4 "
        "--accumulation_steps 2 --lr 9e-6 --critic_lr 8e-6 --kl_coef 0.1 --num_episodes 5"
    )
    cfg, _ = resolve("ppo", [*needed, *colossal.split()], world_size=1)
    assert (cfg.rollout.prompts_per_round, cfg.rollout.updates_per_round, cfg.rollout.epochs_per_round) == (
        16,
        2,
        4,
    )
    assert (cfg.optim.learning_rate, cfg.critic.learning_rate, cfg.ppo.kl_coef) == (9e-6, 8e-6, 0.1)
    assert cfg.train.max_steps == 5 * 2 * 4


def test_a_critic_with_another_vocabulary_is_refused(files, tiny, tmp_path):
    from kitae.models.toy import make_model, make_tokenizer

    other = make_model(tmp_path / "other", "qwen3", tokenizer=make_tokenizer(extra="é"))
    with pytest.raises(ConfigError, match=r"critic.name_or_path .*other has another vocabulary"):
        kitae.train("ppo", given(files, tiny("qwen3"), critic={"name_or_path": str(other)}))


def test_a_value_head_of_another_size_is_refused(tiny, tmp_path):
    (tmp_path / "critic").mkdir()
    save_file(
        {"weight": torch.zeros(1, 3), "bias": torch.zeros(1)}, tmp_path / "critic" / "value_head.safetensors"
    )
    policy = load_policy(ModelSettings(name_or_path=str(tiny("qwen3")), dtype="float32"))
    with pytest.raises(ModelError, match=r"value_head.safetensors does not fit a model of hidden size 64"):
        value_head.attach(policy, start=tmp_path)


@pytest.mark.parametrize("critic", [SEPARATE, SHARED])
def test_a_loss_of_ones_own_takes_the_policys_place_and_sees_the_critics_streams(critic, files, tiny):
    (files / "mine.py").write_text(
        "def loss(out, weights_N, *, advantages, returns):\n"
        "    return -(out.logprobs_N * advantages * weights_N).sum(), {'mean_return': (returns * weights_N).sum()}\n"
    )
    own = given(files, tiny("qwen3"), **critic) | {"loss": f"{files / 'mine.py'}:loss"}
    line = lines_of(kitae.train("ppo", own))[0]
    assert (
        line["train/mean_return"] != 0 and "train/clip_fraction" not in line and line["train/value_loss"] > 0
    )
