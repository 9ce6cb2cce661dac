"""Chunked divergences from a teacher against the definitions written out, one prediction at a time in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kitae.algos.distillation import Divergence, distillation
from kitae.config import LoraSettings, ModelSettings, OptimSettings, SeamSettings
from kitae.data.collate import collate
from kitae.models.divergence import (
    FromStates,
    FromTopK,
    LiveTeacher,
    chunked_divergence,
    common_factor,
    plain_divergence,
)
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.train.learner import Learner
from kitae.train.memory import split_batch
from kitae.types import TokenOutputs
from tests.models.conftest import batch_of, random_row

N, H, V = 150, 12, 40
TEACHER_H, TEACHER_V = 20, 48
KINDS = [
    Divergence(kind="forward_kl"),
    Divergence(kind="reverse_kl", temperature=0.6),
    Divergence(kind="forward_kl", temperature=2.0),
    Divergence(kind="jsd", beta=0.5),
    Divergence(kind="jsd", beta=0.1, temperature=1.7),
    Divergence(kind="jsd", beta=0.9),
    Divergence(kind="forward_kl", top_k=5),
    Divergence(kind="reverse_kl", top_k=3, temperature=1.4),
    Divergence(kind="jsd", beta=0.3, top_k=1),
]


def name_of(how):
    return f"{how.kind}-{how.beta}-{how.temperature}-{how.top_k}"


def problem(*, bias=False, seed=0, vocabulary=V):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    hidden = normal(N, H).requires_grad_()
    weight = (normal(vocabulary, H) / 2).requires_grad_()
    bias_V = normal(vocabulary).requires_grad_() if bias else None
    targets = torch.arange(N) % V
    coefficients = normal(N), normal(N).abs() + 0.1
    return (hidden, weight, bias_V), targets, coefficients


def teacher_states(how, *, vocabulary=V, seed=9, with_logprobs=False):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, TEACHER_H, generator=generator)
    weight = torch.randn(vocabulary, TEACHER_H, generator=generator) / 3
    soft = FromStates(
        hidden_NH=hidden,
        logits_of=lambda h: h @ weight.t(),
        how=how,
        num_columns=min(V, vocabulary),
        with_logprobs=with_logprobs,
    )
    return soft, hidden.double() @ weight.double().t()


def slow(hidden, weight, bias, targets, teacher_logits, how, *, columns=V):
    """Log-probs and divergences by the definitions: arXiv:2306.13649 eq. 1, and the two KL divergences."""
    logprobs, divergences = [], []
    hidden, weight, bias = (x if x is None else x.double() for x in (hidden, weight, bias))
    for n in range(len(hidden)):
        logits = weight @ hidden[n] + (0 if bias is None else bias)
        logprobs.append((logits[targets[n]].exp() / logits.exp().sum()).log())
        q = torch.exp(logits[:columns] / how.temperature)
        q = q / q.sum()
        p = torch.exp(teacher_logits[n][:columns] / how.temperature)
        p = p / p.sum()
        if how.top_k:
            best = p.argsort(descending=True)[: how.top_k].tolist()
            others = [v for v in range(columns) if v not in best]
            p = torch.stack([*(p[v] for v in best), p[others].sum()])
            q = torch.stack([*(q[v] for v in best), q[others].sum()])
        m = how.beta * p + (1 - how.beta) * q
        divergences.append(
            {
                "forward_kl": (p * (p / q).log()).sum(),
                "reverse_kl": (q * (q / p).log()).sum(),
                "jsd": how.beta * (p * (p / m).log()).sum() + (1 - how.beta) * (q * (q / m).log()).sum(),
            }[how.kind]
        )
    return torch.stack(logprobs).float(), torch.stack(divergences).float()


def gradients(inputs):
    return [None if x is None else x.grad for x in inputs]


def assert_equal_to_slow(found, got, how, *, bias, teacher_logits, vocabulary=V, columns=V):
    inputs, targets, coefficients = problem(bias=bias, vocabulary=vocabulary)
    expected = slow(*inputs, targets, teacher_logits, how, columns=columns)
    sum((o * c).sum() for o, c in zip(expected, coefficients, strict=True)).backward()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)
    for a, b in zip(got, gradients(inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("foretold", [None, 3.0], ids=["recomputed", "foretold"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("how", KINDS, ids=name_of)
def test_divergences_and_gradients_equal_their_definitions(how, bias, foretold):
    inputs, targets, coefficients = problem(bias=bias)
    soft, teacher_logits = teacher_states(how)
    ahead = None if foretold is None else tuple(c / foretold for c in coefficients)
    *found, teacher = chunked_divergence(
        *inputs, targets, soft=soft, how=how, coefficients=ahead, budget_bytes=1
    )
    assert teacher is None
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert_equal_to_slow(found, gradients(inputs), how, bias=bias, teacher_logits=teacher_logits)


@pytest.mark.parametrize("how", KINDS, ids=name_of)
def test_full_logits_give_the_same(how):
    inputs, targets, coefficients = problem()
    soft, teacher_logits = teacher_states(how, with_logprobs=True)
    logits = inputs[0] @ inputs[1].t()
    *found, teacher = plain_divergence(logits, targets, soft=soft, how=how)
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert_equal_to_slow(found, gradients(inputs), how, bias=False, teacher_logits=teacher_logits)
    exact = teacher_logits.log_softmax(-1).gather(1, targets[:, None])[:, 0].float()
    torch.testing.assert_close(teacher, exact, rtol=1e-5, atol=1e-5)
    chunked = chunked_divergence(*problem()[0], targets, soft=soft, how=how)[2]
    torch.testing.assert_close(chunked, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [KINDS[0], KINDS[4], KINDS[7]], ids=name_of)
@pytest.mark.parametrize(("own", "theirs"), [(V, TEACHER_V), (TEACHER_V, V)], ids=["teacher", "student"])
def test_columns_that_pad_one_of_the_vocabularies_are_cut(how, own, theirs):
    inputs, targets, coefficients = problem(vocabulary=own)
    soft, teacher_logits = teacher_states(how, vocabulary=theirs)
    *found, _ = chunked_divergence(*inputs, targets, soft=soft, how=how)
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert_equal_to_slow(
        found, gradients(inputs), how, bias=False, teacher_logits=teacher_logits, vocabulary=own
    )


@pytest.mark.parametrize("how", KINDS[6:], ids=name_of)
def test_stored_best_tokens_give_what_the_teacher_itself_gives(how):
    inputs, targets, _ = problem()
    soft, _ = teacher_states(how)
    target = soft.chunk(0, N, N, targets)
    stored = FromTopK(ids_NK=target.ids_CK, logp_NB=target.logp_CB, num_columns=V)
    live = chunked_divergence(*inputs, targets, soft=soft, how=how)[1]
    torch.testing.assert_close(chunked_divergence(*inputs, targets, soft=stored, how=how)[1], live)


def test_more_of_the_teachers_tokens_come_ever_closer_to_the_whole_distribution():
    inputs, targets, _ = problem()
    values = [
        chunked_divergence(*inputs, targets, soft=teacher_states(how)[0], how=how)[1].sum().item()
        for how in (Divergence(kind="reverse_kl", top_k=k) for k in (1, 4, 16, V - 1, 0))
    ]
    assert values == sorted(values)
    assert values[-2] == pytest.approx(values[-1], rel=1e-4)


@pytest.mark.parametrize("how", [KINDS[0], KINDS[1], KINDS[3], KINDS[6]], ids=name_of)
def test_a_student_that_says_what_its_teacher_says_has_no_divergence_and_no_gradient(how):
    inputs, targets, _ = problem()
    weight = inputs[1].detach()
    soft = FromStates(
        hidden_NH=inputs[0].detach(), logits_of=lambda h: h @ weight.t(), how=how, num_columns=V
    )
    divergence = chunked_divergence(*inputs, targets, soft=soft, how=how)[1]
    divergence.sum().backward()
    assert divergence.abs().max() < 1e-6
    assert inputs[0].grad.abs().max() < 1e-6


def test_the_two_limits_of_the_mixture_are_the_two_kl_divergences():
    inputs, targets, _ = problem()

    def total(**how):
        spec = Divergence(**how)
        return chunked_divergence(*inputs, targets, soft=teacher_states(spec)[0], how=spec)[1].sum().item()

    assert total(kind="jsd", beta=1e-3) / 1e-3 == pytest.approx(total(kind="forward_kl"), rel=0.05)
    assert total(kind="jsd", beta=1 - 1e-3) / 1e-3 == pytest.approx(total(kind="reverse_kl"), rel=0.05)


def test_coefficients_that_do_not_arrive_are_noticed():
    how = KINDS[3]
    soft, teacher_logits = teacher_states(how)
    inputs, targets, coefficients = problem()
    wrong = (torch.zeros(N), torch.ones(N))
    *found, _ = chunked_divergence(*inputs, targets, soft=soft, how=how, coefficients=wrong)
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert_equal_to_slow(found, gradients(inputs), how, bias=False, teacher_logits=teacher_logits)


def test_a_common_factor_is_found_up_to_rounding_and_only_then():
    a = (torch.tensor([0.0, 1.0]), torch.tensor([0.3, -2.0]))
    assert common_factor(a, [x * 0.7 for x in a]) == pytest.approx(0.7, rel=1e-7)
    assert common_factor(a, [a[0] * 0.7, a[1] * 0.70001]) is None
    assert common_factor(a, [a[0] * torch.nan, a[1]]) is None
    zeros = (torch.zeros(2), torch.zeros(2))
    assert common_factor(a, zeros) == 0.0 == common_factor(zeros, zeros)
    assert common_factor(zeros, a) is None


@pytest.mark.parametrize("foretold", [False, True])
def test_a_bfloat16_heads_gradient_is_summed_in_float32(foretold):
    how = KINDS[0]
    soft, teacher_logits = teacher_states(how)
    (hidden, weight, _), targets, coefficients = problem()
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    low[1].main_grad = torch.full((V, H), 3.0)
    ahead = coefficients if foretold else None
    *found, _ = chunked_divergence(
        *low, None, targets, soft=soft, how=how, coefficients=ahead, budget_bytes=1
    )
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert low[1].grad is None
    exact = [x.detach().float().requires_grad_() for x in low]
    expected = slow(*exact, None, targets, teacher_logits, how)
    sum((o * c).sum() for o, c in zip(expected, coefficients, strict=True)).backward()
    error = (low[1].main_grad - 3.0 - exact[1].grad).norm() / exact[1].grad.norm()
    assert 1e-6 < error < 0.02


@pytest.mark.parametrize("foretold", [False, True])
def test_a_frozen_head_gets_no_gradient(foretold):
    how = KINDS[3]
    (hidden, weight, _), targets, coefficients = problem()
    weight.requires_grad_(False)
    ahead = coefficients if foretold else None
    *found, _ = chunked_divergence(
        hidden, weight, None, targets, soft=teacher_states(how)[0], how=how, coefficients=ahead
    )
    sum((o * c).sum() for o, c in zip(found, coefficients, strict=True)).backward()
    assert weight.grad is None
    assert hidden.grad is not None


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers any operation has returned in one tensor."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("top_k", [0, 8])
@pytest.mark.parametrize("foretold", [False, True])
def test_no_tensor_of_all_tokens_and_the_vocabulary_ever_exists(foretold, top_k):
    n, vocabulary = 2000, 3000
    how = Divergence(kind="jsd", top_k=top_k)
    hidden = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)
    soft = FromStates(
        hidden_NH=torch.randn(n, 8),
        logits_of=lambda h: h @ torch.ones(8, vocabulary),
        how=how,
        num_columns=vocabulary,
    )
    ahead = (torch.zeros(n), torch.ones(n)) if foretold else None
    with LargestTensor() as seen:
        _, divergence, _ = chunked_divergence(
            hidden, weight, None, torch.zeros(n, dtype=torch.long), soft=soft, how=how, coefficients=ahead
        )
        divergence.sum().backward()
    assert seen.largest <= 128 * vocabulary < n * vocabulary / 10


# policies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher_of(tiny):
    """A function (divergence, how asked) -> LiveTeacher of another architecture, width and start."""
    folder = tiny("llama", hidden_size=48, seed=5, initializer_range=0.4)

    def make(how, **asked):
        policy = load_policy(ModelSettings(name_or_path=str(folder), dtype="float32"), trainable=False)
        return LiveTeacher(policy=policy, how=how, num_columns=112, **asked)

    return make


def rows_of():
    prompt = random_row(9, seed=3).token_ids
    return [random_row(12), random_row(30), random_row(7, prompt=prompt), random_row(11, prompt=prompt)]


def slow_loss(student, teacher, rows, how, *, ce_coef):
    """Row by row through transformers' own modules."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.token_ids])
        taught = torch.tensor(row.loss_mask)[1:]
        logq = (student(input_ids=ids).logits[0, :-1][taught] / how.temperature).log_softmax(-1)
        with torch.no_grad():
            logp = (teacher(input_ids=ids).logits[0, :-1][taught] / how.temperature).log_softmax(-1)
        logm = (how.beta * logp.exp() + (1 - how.beta) * logq.exp()).log()
        total = total + how.beta * (logp.exp() * (logp - logm)).sum()
        total = total + (1 - how.beta) * (logq.exp() * (logq - logm)).sum()
        plain = student(input_ids=ids).logits[0, :-1][taught].log_softmax(-1)
        total = total - ce_coef * plain.gather(1, ids[0, 1:][taught][:, None]).sum()
    return total


def loss_and_gradients(policy, teacher, rows, *, rows_per_forward, ce_coef):
    learner = Learner(policy, optim=OptimSettings(), total_steps=1, world=World())
    batches = [replace(b, teacher=teacher) for b in collate(rows, rows_per_forward=rows_per_forward)]

    def loss_fn(out, weights_N, **streams):
        return distillation(out, weights_N, ce_coef=ce_coef, **streams)

    metrics = learner.forward_backward(batches, loss_fn, denominator=10.0)
    return metrics, {slot.name: slot.grad.clone() for slot in learner.flat.slots}


@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
@pytest.mark.parametrize("ce_coef", [0.0, 0.3])
def test_a_policys_loss_and_gradient_equal_the_plain_modules(
    family, ce_coef, policy_of, plain_model, teacher_of, tiny
):
    how = Divergence(kind="jsd", beta=0.4, temperature=1.5)
    teacher = teacher_of(how, ce_coef=ce_coef)
    student = plain_model(family)
    plain_teacher = plain_model(path=tiny("llama", hidden_size=48, seed=5, initializer_range=0.4))
    expected = slow_loss(student, plain_teacher, rows_of(), how, ce_coef=ce_coef) / 10
    expected.backward()
    exact = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    cuts = [
        (4, SeamSettings(), teacher),
        (1, SeamSettings(), teacher),
        (3, SeamSettings(), replace(teacher, ce_coef=None)),
        (2, SeamSettings(head=False, attention=False), teacher),
    ]
    for rows_per_forward, seams, asked in cuts:
        metrics, found = loss_and_gradients(
            policy_of(family, seams=seams),
            asked,
            rows_of(),
            rows_per_forward=rows_per_forward,
            ce_coef=ce_coef,
        )
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert metrics["divergence"] + ce_coef * metrics["cross_entropy"] == pytest.approx(metrics["loss"])
        assert found.keys() == exact.keys()
        for name, grad in exact.items():
            error = (found[name] - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
            assert error < 2e-5, name


def test_a_pass_that_is_halved_keeps_its_teacher(policy_of, teacher_of):
    teacher = teacher_of(Divergence(kind="reverse_kl"), with_logprobs=True)
    policy = policy_of("qwen3", trainable=False)
    batch = replace(batch_of(rows_of()), teacher=teacher)
    with torch.no_grad():
        whole = policy(batch)
        halves = [policy(half) for half in split_batch(batch)]
    assert len(halves) == 2
    for name in ("divergence_N", "logprobs_N", "teacher_logprobs_N"):
        parts = torch.cat([getattr(half, name) for half in halves])
        torch.testing.assert_close(parts, getattr(whole, name), rtol=1e-5, atol=1e-5)
    teachers = teacher.policy(batch_of(rows_of())).logprobs_N
    torch.testing.assert_close(whole.teacher_logprobs_N, teachers, rtol=1e-5, atol=1e-5)
    plain = policy(batch_of(rows_of()), with_entropy=True)
    both = policy(batch, with_entropy=True)
    torch.testing.assert_close(both.entropy_N, plain.entropy_N)
    torch.testing.assert_close(both.logprobs_N, plain.logprobs_N, rtol=1e-5, atol=1e-5)


def test_adapters_get_the_gradient_and_the_teacher_none(policy_of, teacher_of):
    teacher = teacher_of(Divergence(kind="forward_kl"), ce_coef=0.0)
    policy = policy_of("qwen3", lora=LoraSettings(rank=4))
    metrics, found = loss_and_gradients(policy, teacher, rows_of(), rows_per_forward=4, ce_coef=0.0)
    assert metrics["divergence"] > 0.01
    assert all("lora_" in name for name in found)
    assert any(grad.abs().max() > 0 for grad in found.values())
    assert all(p.grad is None for p in teacher.policy.parameters())


def test_the_loss_names_what_it_is_made_of():
    weights = torch.tensor([1.0, 0.5, 0.0])
    out = TokenOutputs(
        torch.tensor([-1.0, -2.0, -3.0]),
        divergence_N=torch.tensor([0.1, 0.2, 9.0]),
        teacher_logprobs_N=torch.tensor([-1.0, -2.5, 0.0]),
    )
    loss, metrics = distillation(out, weights, ce_coef=0.5, is_sampled=True)
    assert loss.item() == pytest.approx(0.1 + 0.1 + 0.5 * (1 + 1))
    assert metrics["divergence"].item() == pytest.approx(0.2)
    assert metrics["cross_entropy"].item() == pytest.approx(2.0)
    assert metrics["kl"].item() == pytest.approx(0.5 * (-2.0 + 2.5))
    assert "kl" not in distillation(out, weights)[1]
