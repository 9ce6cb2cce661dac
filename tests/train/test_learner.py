"""The Learner against plain torch: gradients, updates, guard, memory, state."""

import copy
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from kitae.algos.losses import clipped_policy_gradient, cross_entropy
from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.errors import CheckpointError, NonFiniteError, PlanError
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.train.learner import Learner
from kitae.types import Row

OOM = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"


def make_rows(lengths: list[int], *, seed: int = 0) -> list[Row]:
    """Ragged rows with untaught tokens at the front, and the streams of a policy gradient."""
    rng = random.Random(seed)
    rows = []
    for n in lengths:
        ids = [rng.randrange(8, 90) for _ in range(n)]
        first = rng.randrange(1, max(2, n // 3))
        streams = {
            "advantages": [rng.gauss(0, 1)] * n,
            "old_logprobs": [-4.5 + rng.gauss(0, 0.3) for _ in range(n)],
        }
        rows.append(Row(token_ids=ids, loss_mask=[t >= first for t in range(n)], streams=streams))
    return rows


ROWS = make_rows([2, 30, 9, 3, 61, 17, 5])
TAUGHT = float(sum(row.num_taught for row in ROWS))


def make_learner(folder, *, dtype: str = "float32", rank: int = 0, **optim) -> Learner:
    model = ModelSettings(name_or_path=str(folder), dtype=dtype, device="cpu")
    policy = load_policy(model, lora=LoraSettings(rank=rank) if rank else None)
    settings = {"learning_rate": 1e-2, "lr_scheduler": "constant", **optim}
    return Learner(policy, optim=OptimSettings(**settings), total_steps=10, world=World())


def gradient(
    learner: Learner, rows: list[Row], loss_fn=cross_entropy, *, rows_per_forward: int, **options
) -> Tensor:
    batches = collate(rows, rows_per_forward=rows_per_forward, **options)
    learner.forward_backward(batches, loss_fn, denominator=TAUGHT)
    found = learner.flat.grad.clone()
    learner.flat.zero_grad()
    learner._has_gradient = False
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def plain_loss(model, rows: list[Row]) -> Tensor:
    """One row at a time through transformers, full logits, summed and divided once."""
    total = torch.zeros(())
    for row in rows:
        logits = model(input_ids=torch.tensor([row.token_ids])).logits[0].float()
        targets = torch.tensor([t if m else -100 for t, m in zip(row.token_ids, row.loss_mask, strict=True)])
        total = total + F.cross_entropy(logits[:-1], targets[1:], reduction="sum", ignore_index=-100)
    return total / TAUGHT


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.named_parameters()}


# ------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
def test_loss_and_gradient_equal_plain_transformers_for_every_micro_batch_size(tiny, family):
    folder = tiny(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loss = plain_loss(model, ROWS)
    loss.backward()
    learner = make_learner(folder)
    expected = dict(model.named_parameters())
    for rows_per_forward in (1, 2, 4, 8):
        batches = collate(ROWS, rows_per_forward=rows_per_forward)
        metrics = learner.forward_backward(batches, cross_entropy, denominator=TAUGHT)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for slot in learner.flat.slots:
            torch.testing.assert_close(slot.grad, expected[slot.name].grad, rtol=1e-4, atol=2e-7)
        learner.flat.zero_grad()


@pytest.mark.parametrize("loss_fn", [cross_entropy, clipped_policy_gradient])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_gradient_does_not_depend_on_how_rows_are_cut_into_passes(tiny, loss_fn, rank):
    learner = make_learner(tiny(), rank=rank)
    whole = gradient(learner, ROWS, loss_fn, rows_per_forward=8)
    for rows_per_forward in (1, 2, 4):
        assert relative(gradient(learner, ROWS, loss_fn, rows_per_forward=rows_per_forward), whole) <= 1e-6


def test_a_shared_prompt_does_not_change_the_gradient(tiny):
    prompt = list(range(10, 30))
    rows = [
        Row(
            token_ids=prompt + r.token_ids,
            loss_mask=[False] * 20 + [True] * len(r.token_ids),
            prompt_length=20,
        )
        for r in ROWS
    ]
    learner = make_learner(tiny())
    alone = gradient(learner, rows, rows_per_forward=1)
    assert relative(gradient(learner, rows, rows_per_forward=4), alone) <= 1e-6
    assert relative(gradient(learner, rows, rows_per_forward=7, share_prompts=False), alone) <= 1e-6


def test_a_linear_loss_has_the_gradient_of_the_same_loss_that_does_not_say_so(tiny):
    def not_said(out, weights_N, **streams):
        return cross_entropy(out, weights_N, **streams)

    learner = make_learner(tiny())
    said = gradient(learner, ROWS, rows_per_forward=3)
    assert relative(gradient(learner, ROWS, not_said, rows_per_forward=3), said) <= 1e-6


def test_two_calls_before_an_update_add_up(tiny):
    learner = make_learner(tiny())
    whole = gradient(learner, ROWS, rows_per_forward=7)
    for part in (ROWS[:3], ROWS[3:]):
        learner.forward_backward(collate(part, rows_per_forward=2), cross_entropy, denominator=TAUGHT)
    assert relative(learner.flat.grad, whole) <= 1e-6


def test_no_batches_at_all_leave_a_zero_gradient(tiny):
    learner = make_learner(tiny())
    assert learner.forward_backward([], cross_entropy, denominator=0.0) == {"loss": 0.0}
    assert learner.optim_step()["grad_norm"] == 0.0


def test_low_precision_gradients_are_accumulated_in_float32(tiny):
    learner = make_learner(tiny(), dtype="bfloat16")
    rows = ROWS * 8
    each = [gradient(learner, [row], rows_per_forward=1) for row in rows]
    exact = torch.stack(each).double().sum(0)
    in_bf16 = torch.zeros_like(each[0], dtype=torch.bfloat16)
    for one in each:
        in_bf16 += one.bfloat16()
    assert relative(gradient(learner, rows, rows_per_forward=1), exact) <= 1e-6
    assert relative(in_bf16, exact) > 1e-3
    assert all(p.grad is None and p.dtype == torch.bfloat16 for p in learner.policy.parameters())


def test_metrics_are_sums_over_the_denominator_and_entropy_comes_when_asked(tiny):
    learner = make_learner(tiny())
    batches = collate(ROWS, rows_per_forward=3)
    metrics = learner.forward_backward(
        batches, clipped_policy_gradient, denominator=TAUGHT, with_entropy=True
    )
    (batch,) = collate(ROWS, rows_per_forward=7)
    with torch.no_grad():
        logprobs_N, entropy_N, *_ = learner.policy(batch, with_entropy=True)
    ratio_N = (logprobs_N - batch.streams["old_logprobs"]).exp()
    clipped = (ratio_N.clamp(0.8, 1.2) * batch.streams["advantages"]) < ratio_N * batch.streams["advantages"]
    assert metrics["entropy"] == pytest.approx(entropy_N.mean().item(), rel=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(clipped.float().mean().item(), abs=1e-6)
    assert set(metrics) == {"loss", "clip_fraction", "approx_kl", "entropy"}


# --------------------------------------------------------------------------------------------- updates
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_training_equals_a_plain_torch_loop(tiny, max_grad_norm):
    folder = tiny("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    plain = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-3,
        eps=1e-4,
    )
    learner = make_learner(
        folder, learning_rate=1e-3, weight_decay=0.1, epsilon=1e-4, max_grad_norm=max_grad_norm
    )
    for _ in range(3):
        loss = plain_loss(model, ROWS)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or 1e9)
        plain.step()
        plain.zero_grad()
        metrics = (
            learner.forward_backward(collate(ROWS, rows_per_forward=3), cross_entropy, denominator=TAUGHT)
            | learner.optim_step()
        )
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        assert metrics["learning_rate"] == 1e-3
    theirs = dict(model.named_parameters())
    for name, parameter in learner.policy.named_trainable():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3", "llama", "deepseek_v3"])
def test_every_parameter_of_a_half_precision_model_has_about_the_float32_gradient(tiny, family, dtype):
    exact = make_learner(tiny(family))
    learner = make_learner(tiny(family), dtype=dtype)
    scale = learner.loss_scale.value if learner.loss_scale else 1.0
    for one in (exact, learner):
        one.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)
    close = 0.3 if family == "deepseek_v3" else 0.1  # rounding sends a token or two to another expert
    for slot, other in zip(learner.flat.slots, exact.flat.slots, strict=True):
        assert relative(slot.grad / scale, other.grad) < close, slot.name
    learner.optim_step()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_bf16_weights_are_the_rounded_float32_masters(tiny, family):
    learner = make_learner(tiny(family), dtype="bfloat16", learning_rate=1e-5)
    before = weights(learner)
    for _ in range(2):  # steps too small for most bf16 weights: only the masters remember them
        learner.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)
        learner.optim_step()
    for slot in learner.flat.slots:
        assert torch.equal(slot.parameter, slot.master.bfloat16())
        assert not torch.equal(slot.master, before["causal_lm." + slot.name].float())


def test_float16_scales_its_loss_and_skips_an_overflow(tiny):
    exact = gradient(make_learner(tiny()), ROWS, rows_per_forward=4)
    learner = make_learner(tiny(), dtype="float16")
    learner.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)
    assert relative(learner.flat.grad / 2**16, exact) < 0.02
    assert learner.optim_step()["grad_norm"] == pytest.approx(exact.norm().item(), rel=0.02)

    learner.loss_scale.value = 2.0**40
    before = weights(learner)
    learner.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)
    metrics = learner.optim_step()
    assert metrics["skipped"] == 1.0 and metrics["loss_scale"] == 2.0**40
    assert learner.loss_scale.value == 2.0**39
    assert all(torch.equal(before[name], p) for name, p in learner.policy.named_parameters())


# ----------------------------------------------------------------------------------------------- guard
def nan_loss(out, weights_N, **_):
    return (out.logprobs_N * weights_N).sum() * float("nan"), {}


def infinite_gradient(out, weights_N, **_):
    return (out.logprobs_N - out.logprobs_N.detach()).clamp(min=0).sqrt().sum(), {}


@pytest.mark.parametrize(
    ("loss_fn", "told"),
    [(nan_loss, "loss became nan in forward pass 1 of 3"), (infinite_gradient, "gradient norm is")],
)
def test_a_non_finite_step_stops_and_changes_no_weight(tiny, loss_fn, told):
    learner = make_learner(tiny())
    before = weights(learner)
    learner.forward_backward(collate(ROWS, rows_per_forward=3), loss_fn, denominator=TAUGHT)
    with pytest.raises(NonFiniteError, match=f"step 1: the {told}"):
        learner.optim_step()
    assert all(torch.equal(before[name], p) for name, p in learner.policy.named_parameters())
    assert not learner.optimizer.state


def test_non_finite_steps_are_skipped_at_most_max_skipped_times_in_a_row(tiny):
    learner = make_learner(tiny(), on_nonfinite="skip", max_skipped=2)
    batches = collate(ROWS, rows_per_forward=7)

    def step(loss_fn):
        learner.forward_backward(batches, loss_fn, denominator=TAUGHT)
        return learner.optim_step()

    before = weights(learner)
    assert step(nan_loss)["skipped"] == step(nan_loss)["skipped"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in learner.policy.named_parameters())
    assert "skipped" not in step(cross_entropy)
    step(nan_loss)
    step(nan_loss)
    with pytest.raises(NonFiniteError, match="2 steps in a row were skipped already"):
        step(nan_loss)


# ---------------------------------------------------------------------------------------------- memory
class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(OOM)


def fail_when(policy, is_too_much, *, where: str) -> list[int]:
    """Let the policy run out of memory in passes of too many rows; returns the row counts it was called with."""
    calls: list[int] = []
    ordinary = policy.forward

    def forward(batch, **options):
        calls.append(batch.num_rows)
        if not is_too_much(calls):
            return ordinary(batch, **options)
        if where == "forward":
            raise RuntimeError(OOM)
        if where == "a kernel":
            raise MemoryError("kitae_attend found no memory to work in")
        # Its backward comes last: all other gradients are there.
        embedding = policy.causal_lm.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda *args: _FailingBackward.apply(args[-1]))
        try:
            return ordinary(batch, **options)
        finally:
            handle.remove()

    policy.forward = forward
    return calls


@pytest.mark.parametrize("where", ["forward", "a kernel", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_out_of_memory_halves_the_pass_and_keeps_the_gradient(tiny, where, dtype, caplog):
    learner = make_learner(tiny(), dtype=dtype)
    halves = [gradient(learner, rows, rows_per_forward=4) for rows in (ROWS[:4], ROWS[4:6], ROWS[6:])]
    calls = fail_when(learner.policy, lambda calls: len(calls) == 2, where=where)
    with caplog.at_level(logging.WARNING):
        found = gradient(learner, ROWS, rows_per_forward=4)
    assert calls == [4, 3, 4, 2, 1]
    assert relative(found, torch.stack(halves).sum(0)) <= 1e-6
    assert caplog.text.count("out of memory in a forward pass of 3 rows") == 1


def pair_margin(out, weights_N, *, number, **_streams):
    """A loss of neighbouring rows: it breaks when a pair is cut apart."""
    scores_P2 = out.per_row(out.logprobs_N * weights_N).view(-1, 2)
    margin_P = (scores_P2[:, 0] - scores_P2[:, 1]) * number.view(-1, 2)[:, 0]
    return -torch.nn.functional.logsigmoid(margin_P).sum(), {"pairs": margin_P.new_tensor(len(margin_P))}


def test_a_pass_of_pairs_is_halved_between_pairs(tiny):
    learner = make_learner(tiny())
    rows = [replace(row, numbers={"number": 0.1 + i // 2}) for i, row in enumerate(ROWS[:6])]

    def step(rows_per_forward):
        learner.flat.zero_grad()
        learner._has_gradient = False
        batches = collate(rows, rows_per_forward=rows_per_forward, rows_per_unit=2)
        metrics = learner.forward_backward(batches, pair_margin, denominator=3)
        return metrics, learner.flat.grad.clone()

    expected, whole = step(6)
    calls = fail_when(learner.policy, lambda calls: len(calls) == 1, where="forward")
    metrics, halved = step(6)
    assert calls == [6, 4, 2] and metrics["pairs"] == pytest.approx(1.0)
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert relative(halved, whole) <= 1e-5


def test_a_gradient_from_an_earlier_call_survives_out_of_memory(tiny):
    learner = make_learner(tiny())
    whole = gradient(learner, ROWS, rows_per_forward=7)
    learner.forward_backward(collate(ROWS[:3], rows_per_forward=3), cross_entropy, denominator=TAUGHT)
    fail_when(learner.policy, lambda calls: calls[-1] > 2, where="backward")
    learner.forward_backward(collate(ROWS[3:], rows_per_forward=4), cross_entropy, denominator=TAUGHT)
    assert relative(learner.flat.grad, whole) <= 1e-6


def test_later_passes_of_that_size_are_cut_before_they_are_tried(tiny, caplog):
    learner = make_learner(tiny())
    long_rows = make_rows([130, 140, 150, 160])
    calls = fail_when(learner.policy, lambda calls: calls[-1] > 1, where="forward")
    with caplog.at_level(logging.WARNING):
        gradient(learner, long_rows, rows_per_forward=4)
        assert calls == [4, 2, 1, 1, 1, 1]
        calls.clear()
        gradient(learner, long_rows, rows_per_forward=4)
    assert calls == [1, 1, 1, 1]
    assert caplog.text.count("out of memory") == 1


def test_a_single_row_that_does_not_fit_is_refused_with_an_estimate(tiny):
    learner = make_learner(tiny())
    fail_when(learner.policy, lambda calls: True, where="forward")
    with pytest.raises(
        PlanError, match=r"cannot be cut further .*about \d+\.\d\d GiB and .* GiB are free; lower"
    ):
        learner.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)


def test_with_several_ranks_out_of_memory_is_refused_at_once(tiny):
    learner = make_learner(tiny())
    learner._passes.world = World(rank=1, world_size=2)
    fail_when(learner.policy, lambda calls: True, where="forward")
    with pytest.raises(PlanError, match="rank 1 ran out of memory in a forward pass of 4 rows"):
        learner._passes.run(collate(ROWS, rows_per_forward=4), learner.policy)


def test_other_errors_of_a_pass_are_not_taken_for_out_of_memory(tiny):
    learner = make_learner(tiny())
    learner.policy.forward = lambda *args, **options: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="size"):
        learner.forward_backward(collate(ROWS, rows_per_forward=4), cross_entropy, denominator=TAUGHT)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the address space can be limited on Linux only"
)
def test_the_real_cpu_allocator_running_dry_is_survived(tiny):
    """A process of its own leaves itself 40 MiB more than it holds, for a pass that needs well over 100."""
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_learner import collate, cross_entropy, make_learner, make_rows, relative

rows = make_rows([200] * 64)
taught = float(sum(row.num_taught for row in rows))
learner = make_learner({str(tiny())!r})
learner.forward_backward(collate(rows, rows_per_forward=2), cross_entropy, denominator=taught)
expected = learner.flat.grad.clone()
learner.flat.zero_grad()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
learner._has_gradient = False
learner.forward_backward(collate(rows, rows_per_forward=64), cross_entropy, denominator=taught)
assert learner._passes.too_many_tokens <= 12800, "memory did not run out"
assert relative(learner.flat.grad, expected) <= 1e-6
"""
    # glibc's own default, so that kitae leaves the heap alone: it would have reserved addresses beforehand.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("out of memory in a forward pass of 64 rows and 12800 tokens") == 1


# --------------------------------------------------------------------------------------------- scoring
def test_logprobs_keep_the_order_of_predictions_also_when_memory_runs_out(tiny):
    learner = make_learner(tiny())
    batches = collate(ROWS, rows_per_forward=4)
    plain = learner.logprobs(batches)
    fail_when(learner.policy, lambda calls: calls[-1] > 1, where="forward")
    cut = learner.logprobs(batches)
    assert [len(x) for x in cut] == [len(b.source_N) for b in batches]
    torch.testing.assert_close(torch.cat(cut), torch.cat(plain), rtol=1e-5, atol=1e-5)
    assert not cut[0].requires_grad


def test_without_adapter_scores_with_the_model_before_lora(tiny):
    batches = collate(ROWS, rows_per_forward=4)
    before = make_learner(tiny()).logprobs(batches)
    learner = make_learner(tiny(), rank=4)
    for _ in range(2):
        learner.forward_backward(batches, cross_entropy, denominator=TAUGHT)
        learner.optim_step()
    reference, trained = learner.without_adapter().logprobs(batches), learner.logprobs(batches)
    torch.testing.assert_close(torch.cat(reference), torch.cat(before))
    assert (torch.cat(trained) - torch.cat(before)).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------- state
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_restored_state_continues_to_the_last_bit(tiny, name, dtype):
    if name == "adamw_8bit":
        pytest.importorskip("bitsandbytes")

    def step(learner: Learner) -> dict[str, float]:
        batches = collate(ROWS, rows_per_forward=4)
        return learner.forward_backward(batches, cross_entropy, denominator=TAUGHT) | learner.optim_step()

    options = {"dtype": dtype, "name": name, "lr_scheduler": "cosine", "warmup_steps": 2}
    straight = make_learner(tiny(), **options)
    step(straight)
    saved = copy.deepcopy(straight.state())
    resumed = make_learner(tiny(), **options)
    step(resumed), step(resumed)  # what it did before loading must not matter
    resumed.load_state(saved)
    for _ in range(2):
        assert step(resumed) == step(straight)
    for ours, theirs in zip(resumed.policy.parameters(), straight.policy.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.state()["step"] == 3


def test_a_state_of_other_parameters_or_ranks_is_refused(tiny):
    saved = make_learner(tiny(), rank=2).state()
    with pytest.raises(CheckpointError, match=r"lora_A.* has shape \(4, .* and \(2, .* in the checkpoint"):
        make_learner(tiny(), rank=4).load_state(saved)
    with pytest.raises(CheckpointError, match="None in the checkpoint"):
        make_learner(tiny()).load_state(saved)
    with pytest.raises(CheckpointError, match=r"written by 3 ranks .* --nproc_per_node 3"):
        make_learner(tiny(), rank=2).load_state({**saved, "world_size": 3})
