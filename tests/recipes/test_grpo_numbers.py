"""GRPO's loss and gradient, and SFT's, against slow obvious versions on the plain transformers module."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from kitae.algos import advantages, averaging, losses
from kitae.algos.baselines import estimate
from kitae.config import ModelSettings, OptimSettings, RolloutSettings
from kitae.data.collate import collate
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.recipes._variants import loss_of
from kitae.recipes.grpo import GRPOSettings, teaches, to_rows
from kitae.train.learner import Learner
from kitae.types import Problem, Rollout, Row, Score

FAMILIES = ["qwen3", "llama", "deepseek_v3"]
TEMPERATURE = 0.8
CLIP_LOW, CLIP_HIGH, KL_COEF = 0.2, 0.28, 0.05


def make_round(seed=0, prompts=3, group=4):
    """Random rollouts whose old and reference log-probs differ from the policy's, so that clip and KL matter."""
    rng = random.Random(seed)
    groups, scores = [], []
    for p in range(prompts):
        prompt = [rng.randrange(3, 90) for _ in range(rng.randint(1, 9))]
        problem = Problem(prompt="?", token_ids=prompt, answer="1", index=p)
        rollouts = []
        for _ in range(group):
            ids = [rng.randrange(3, 90) for _ in range(rng.randint(1, 17))]
            logprobs = [-4.6 + rng.gauss(0, 0.4) for _ in ids]
            finish = rng.choice(["stop", "length"])
            rollouts.append(
                Rollout(problem=problem, text="", token_ids=ids, logprobs=logprobs, finish_reason=finish)
            )
        groups.append(rollouts)
        scores.append([Score(float(rng.choice([0, 1, 10]))) for _ in range(group)])
    scores[0][1] = Score(None, "could not be scored")
    scores[2] = [Score(1.0)] * group
    return groups, scores


def slow_grpo(folder, groups, scores, references, *, average, max_tokens, kl_coef, mask_truncated):
    """Every completion by itself through the plain module; sums and means written out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total, tokens, rows = torch.zeros(()), 0, 0
    for group, own, refs in zip(groups, scores, references, strict=True):
        values = [s.value for s in own if s.value is not None]
        mean = sum(values) / len(values)
        deviation = (sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5
        for rollout, score, ref in zip(group, own, refs, strict=True):
            rows += 1
            if score.value is None or (mask_truncated and rollout.finish_reason == "length"):
                continue
            advantage = 0.0 if deviation == 0 else (score.value - mean) / (deviation + 1e-4)
            ids = rollout.problem.token_ids + rollout.token_ids
            logits = model(torch.tensor([ids])).logits[0].float() / TEMPERATURE
            start = len(rollout.problem.token_ids)
            per_token = []
            for t, token in enumerate(rollout.token_ids):
                logp = logits[start + t - 1].log_softmax(-1)[token]
                ratio = (logp - rollout.logprobs[t]).exp()
                bounded = ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH)
                loss = -torch.min(ratio * advantage, bounded * advantage)
                if kl_coef:
                    r = (ref[t] - logp).exp()
                    loss = loss + kl_coef * (r - r.log() - 1)
                per_token.append(loss)
            tokens += len(per_token)
            summed = torch.stack(per_token).sum()
            total = total + (summed / len(per_token) if average == "sequence" else summed)
    denominator = {"token": tokens, "sequence": rows, "constant": rows * max_tokens}[average]
    (total / denominator).backward()
    return (total / denominator).item(), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def grads_of(learner):
    return {slot.name: slot.grad.clone() for slot in learner.flat.slots}


def assert_same_gradients(found, expected):
    for name, grad in expected.items():
        scale = grad.abs().max().item() + 1e-8
        assert (found[name] - grad).abs().max().item() <= 2e-5 * scale + 1e-7, name


def make_learner(folder):
    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype="float32"))
    return Learner(policy, optim=OptimSettings(), total_steps=1, world=World())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("average", ["token", "sequence", "constant"])
def test_grpo_equals_the_slow_version_for_every_cut(tiny, family, average):
    folder = tiny(family)
    groups, scores = make_round()
    rng = random.Random(1)
    references = [[[-4.6 + rng.gauss(0, 0.3) for _ in r.token_ids] for r in group] for group in groups]
    kl_coef = KL_COEF if average != "constant" else 0.0
    mask_truncated = average == "sequence"
    rollout = RolloutSettings(max_new_tokens=20, mask_truncated=mask_truncated)
    slow_loss, slow_grads = slow_grpo(
        folder, groups, scores, references, average=average, max_tokens=20, kl_coef=kl_coef,
        mask_truncated=mask_truncated,
    )  # fmt: skip
    rewards = torch.tensor([[float("nan") if s.value is None else s.value for s in g] for g in scores])
    adv = advantages.group_relative(rewards)
    rows = [
        r
        for g, s, a in zip(groups, scores, adv, strict=True)
        for r in to_rows(g, s, advantages_G=a, rollout=rollout)
    ]
    flat_refs = [ref for group in references for ref in group]
    for row, ref in zip(rows, flat_refs, strict=True):
        if kl_coef:
            row.streams["ref_logprobs"] = [0.0] * row.prompt_length + ref
    weighed, denominator = averaging.weigh(rows, average, max_tokens=20)
    teaching = [row for row in weighed if teaches(row, keeps_dead=bool(kl_coef))]
    loss_fn = partial(losses.clipped_policy_gradient, clip_low=CLIP_LOW, clip_high=CLIP_HIGH, kl_coef=kl_coef)
    learner = make_learner(folder)
    for rows_per_forward, share in [(1, False), (2, True), (5, False), (5, True), (64, True)]:
        batches = collate(
            teaching, rows_per_forward=rows_per_forward, share_prompts=share, temperature=TEMPERATURE
        )
        metrics = learner.forward_backward(batches, loss_fn, denominator=denominator)
        assert metrics["loss"] == pytest.approx(slow_loss, rel=1e-5, abs=1e-6)
        assert_same_gradients(grads_of(learner), slow_grads)
        learner.flat.zero_grad()
        learner._has_gradient = False


VARIANTS = {
    "gspo": {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.05},
    "cispo": {"objective": "cispo", "clip_high": 0.28},
    "dual clip, entropy bonus, truncated weights": {"dual_clip": 1.5, "entropy_coef": 0.05, "is_cap": 1.3},
}


def slow_variant(folder, rows, *, average, objective="clip", ratio="token", clip_low=0.2, clip_high=0.2, dual_clip=0.0,
                 entropy_coef=0.0, is_cap=0.0):  # fmt: skip
    """Every row by itself through the plain module."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    total, tokens = torch.zeros(()), 0
    for row in rows:
        logits = model(torch.tensor([row.token_ids])).logits[0].float() / TEMPERATURE
        taught = [t for t, is_taught in enumerate(row.loss_mask) if is_taught]
        if not taught:
            continue
        tokens += len(taught)
        logp = {t: logits[t - 1].log_softmax(-1) for t in taught}
        difference = {t: logp[t][row.token_ids[t]] - row.streams["old_logprobs"][t] for t in taught}
        mean = sum(difference.values()) / len(taught)
        summed = torch.zeros(())
        for t in taught:
            a = row.streams["advantages"][t]
            r = (mean if ratio == "sequence" else difference[t]).exp()
            if objective == "cispo":
                term = r.detach().clamp(max=1 + clip_high) * a * logp[t][row.token_ids[t]]
            else:
                term = torch.min(r * a, r.clamp(1 - clip_low, 1 + clip_high) * a)
                if dual_clip and a < 0:
                    term = torch.max(term, torch.tensor(dual_clip * a))
            if is_cap:
                gap = row.streams["old_logprobs"][t] - row.streams["sampler_logprobs"][t]
                term = term * min(torch.tensor(gap).exp().item(), is_cap)
            entropy = -(logp[t].exp() * logp[t]).sum()
            summed = summed - term - entropy_coef * entropy
        total = total + (summed / len(taught) if average == "sequence" else summed)
    loss = total / {"token": tokens, "sequence": len(rows)}[average]
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_equals_the_slow_version_for_every_cut(tiny, name, average):
    folder, how = tiny("qwen3"), VARIANTS[name]
    groups, scores = make_round(seed=4)
    rewards = torch.tensor([[float("nan") if s.value is None else s.value for s in g] for g in scores])
    adv = estimate(rewards, baseline="reinforce++", scale="group")
    rollout = RolloutSettings(max_new_tokens=20)
    rows = [
        r
        for g, s, a in zip(groups, scores, adv, strict=True)
        for r in to_rows(g, s, advantages_G=a, rollout=rollout)
    ]
    rng = random.Random(2)
    if how.get("is_cap"):
        for row in rows:
            row.streams["sampler_logprobs"] = [x + rng.gauss(0, 0.3) for x in row.streams["old_logprobs"]]
    slow_loss, slow_grads = slow_variant(folder, rows, average=average, **how)
    loss_fn = loss_of(GRPOSettings(**how))
    weighed, denominator = averaging.weigh(rows, average)
    keeps_dead = bool(how.get("entropy_coef"))
    teaching = [row for row in weighed if teaches(row, keeps_dead=keeps_dead)]
    learner = make_learner(folder)
    for rows_per_forward, share in [(1, False), (2, True), (5, False), (64, True)]:
        batches = collate(
            teaching, rows_per_forward=rows_per_forward, share_prompts=share, temperature=TEMPERATURE
        )
        metrics = learner.forward_backward(batches, loss_fn, denominator=denominator)
        assert metrics["loss"] == pytest.approx(slow_loss, rel=1e-5, abs=1e-6)
        assert ("entropy" in metrics) == keeps_dead
        assert_same_gradients(grads_of(learner), slow_grads)
        learner.flat.zero_grad()
        learner._has_gradient = False


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_equals_transformers_cross_entropy_for_every_cut(tiny, family):
    folder = tiny(family)
    rng = random.Random(3)
    rows = []
    for length in (2, 5, 3, 40, 130, 17):
        ids = [rng.randrange(3, 90) for _ in range(length)]
        mask = [False] + [rng.random() < 0.6 for _ in ids[1:]]
        mask[-1] = True
        rows.append(Row(token_ids=ids, loss_mask=mask))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    width = max(len(r.token_ids) for r in rows)
    ids = torch.tensor([r.token_ids + [0] * (width - len(r.token_ids)) for r in rows])
    attention = torch.tensor([[1] * len(r.token_ids) + [0] * (width - len(r.token_ids)) for r in rows])
    labels = torch.full_like(ids, -100)
    for i, r in enumerate(rows):
        for t, taught in enumerate(r.loss_mask):
            if taught:
                labels[i, t] = r.token_ids[t]
    logits = model(ids, attention_mask=attention).logits
    expected = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100
    )
    expected.backward()
    slow_grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    weighed, denominator = averaging.weigh(rows, "token")
    learner = make_learner(folder)
    for rows_per_forward in (1, 2, 4, 6):
        batches = collate(weighed, rows_per_forward=rows_per_forward)
        metrics = learner.forward_backward(batches, losses.cross_entropy, denominator=denominator)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert_same_gradients(grads_of(learner), slow_grads)
        learner.flat.zero_grad()
        learner._has_gradient = False
