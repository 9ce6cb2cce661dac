"""The model under training and the verbs a recipe may use on it: gradient, update, score.

    batches --policy, loss_fn--> sums / one denominator --backward--> float32 gradient --clip, guard--> new weights

A step's gradient is a SUM over every row of every forward pass and rank, divided by one number: it depends neither
on how rows are cut into passes nor on the number of ranks.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from kitae.config import OptimSettings
from kitae.data.collate import collate, empty_batch
from kitae.errors import CheckpointError, NonFiniteError, PlanError
from kitae.parallel.world import World
from kitae.train.flat import FlatParameters
from kitae.train.optim import LossScale, learning_rate, make_optimizer
from kitae.types import Batch, TokenOutputs

if TYPE_CHECKING:
    from kitae.algos.losses import LossFn
    from kitae.models.policy import Policy

log = logging.getLogger(__name__)
T = TypeVar("T")


class Learner:
    """Owns the policy's float32 masters, its optimizer and schedule; knows nothing about algorithms."""

    def __init__(self, policy: Policy, *, optim: OptimSettings, total_steps: int, world: World) -> None:
        self.policy = policy
        self.optim = optim
        self.total_steps = total_steps
        self.world = world
        self.step = 0
        self.flat = FlatParameters(policy.named_trainable())
        self.optimizer = make_optimizer(optim, [slot.master for slot in self.flat.slots])
        self.loss_scale = LossScale() if policy.dtype == torch.float16 else None
        self._has_gradient = False
        self._problem = ""
        self._skipped_in_a_row = 0
        self._too_many_tokens: float = math.inf

    def forward_backward(
        self, batches: Sequence[Batch], loss_fn: LossFn, *, denominator: float, with_entropy: bool = False
    ) -> dict[str, float]:
        """Add the gradient of loss_fn over all batches of all ranks, divided by the sum of all denominators.

        `batches` and `denominator` are this rank's share, possibly none and 0. Returns "loss", the loss's own metrics
        and, where asked for, "entropy": each its sum over the denominator, the same on every rank. Several calls
        before optim_step add up.
        """
        shares = self.world.gather_json([denominator, len(batches)])
        total = sum(share for share, _ in shares)
        scale = 1.0 / total if total else 0.0
        before = self.flat.grad.clone() if self._has_gradient else None
        random_state = torch.get_rng_state()

        def one_pass(batch: Batch) -> dict[str, Tensor]:
            return self._one_pass(batch, loss_fn, scale=scale, with_entropy=with_entropy)

        def start_again() -> None:
            self.flat.zero_grad()
            if before is not None:
                self.flat.grad.copy_(before)
            torch.set_rng_state(random_state)

        self.policy.train()
        sums = self._over(batches, one_pass, start_again=start_again)
        for _ in range(max(passes for _, passes in shares) - len(batches)):
            logprobs_N, _ = self.policy(_on(empty_batch(), self.policy.device))
            (logprobs_N * 0.0).sum().backward()
        self._has_gradient = True
        return self._metrics(sums, scale=scale)

    def optim_step(self) -> dict[str, float]:
        """Clip the gradient, update the weights, clear the gradient; a non-finite one changes no weight.

        Returns "grad_norm" (before clipping) and "learning_rate"; "skipped" where the step was skipped. A float16
        overflow halves "loss_scale" and skips too.
        """
        self.step += 1
        rate = learning_rate(self.optim, step=self.step, total_steps=self.total_steps)
        if not self.flat.is_sharded:
            self.world.sum(self.flat.grad)
        loss_scale = self.loss_scale.value if self.loss_scale else 1.0
        grad_norm = self.flat.grad_norm(self.world) / loss_scale
        metrics = {"grad_norm": grad_norm, "learning_rate": rate}
        if self.loss_scale:
            metrics["loss_scale"] = loss_scale
        try:
            if self._may_update(grad_norm, rate=rate):
                self._update(grad_norm, rate=rate, loss_scale=loss_scale)
            else:
                metrics["skipped"] = 1.0
        finally:
            self.flat.zero_grad()
            self._has_gradient = False
            self._problem = ""
        return metrics

    def logprobs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Log-probabilities of each batch's predictions, without gradient and dropout."""
        passes = max(self.world.gather_json(len(batches)))
        self.policy.eval()
        with torch.no_grad():
            scored = [torch.cat(self._over([batch], self._score, start_again=_nothing)) for batch in batches]
            for _ in range(passes - len(batches)):
                self._score(_on(empty_batch(), self.policy.device))
        return scored

    def without_adapter(self) -> Scorer:
        """The model as it was before its adapter: a LoRA run's reference, at no memory."""
        return Scorer(self)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on besides random generators: live tensors and JSON values of this rank."""
        slots = self.flat.slots
        return {
            "step": self.step,
            "skipped_in_a_row": self._skipped_in_a_row,
            "world_size": self.world.world_size,
            "loss_scale": self.loss_scale.state() if self.loss_scale else None,
            "master": {slot.name: slot.master.detach() for slot in slots},
            "optimizer": {slot.name: dict(self.optimizer.state.get(slot.master, {})) for slot in slots},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken; it must come from the same parameters and number of ranks."""
        if state["world_size"] != self.world.world_size:
            raise CheckpointError(
                f"the checkpoint was written by {state['world_size']} ranks and this run has "
                f"{self.world.world_size}; resume with --nproc_per_node {state['world_size']}"
            )
        ours = {slot.name: tuple(slot.master.shape) for slot in self.flat.slots}
        theirs = {name: tuple(master.shape) for name, master in state["master"].items()}
        if ours != theirs:
            name, here, there = next(
                (n, ours.get(n), theirs.get(n)) for n in [*ours, *theirs] if ours.get(n) != theirs.get(n)
            )
            raise CheckpointError(
                f"trainable parameter {name} has shape {here} here and {there} in the checkpoint; resume with "
                "the same model and lora settings"
            )
        self.step, self._skipped_in_a_row = state["step"], state["skipped_in_a_row"]
        if self.loss_scale and state["loss_scale"]:
            self.loss_scale.load_state(state["loss_scale"])
        for slot in self.flat.slots:
            slot.master.data.copy_(state["master"][slot.name])
            moments = state["optimizer"][slot.name]
            self.optimizer.state[slot.master] = {
                key: value.clone() if isinstance(value, Tensor) else value for key, value in moments.items()
            }
        self.flat.publish()

    def _one_pass(
        self, batch: Batch, loss_fn: LossFn, *, scale: float, with_entropy: bool
    ) -> dict[str, Tensor]:
        """Add the gradient of one forward pass; return its sums, not yet divided."""
        factor = scale * (self.loss_scale.value if self.loss_scale else 1.0)
        is_linear = getattr(loss_fn, "is_linear", False)
        coefficients_N = _coefficients(batch, loss_fn, factor=factor) if is_linear else None
        logprobs_N, entropy_N = self.policy(batch, with_entropy=with_entropy, coefficients_N=coefficients_N)
        loss, metrics = loss_fn(
            TokenOutputs(
                logprobs_N=logprobs_N, entropy_N=entropy_N, row_N=batch.row_N, num_rows=batch.num_rows
            ),
            batch.weights_N,
            **batch.streams,
        )
        (loss * factor).backward()
        sums = {"loss": loss.detach(), **metrics}
        if entropy_N is not None:
            sums["entropy"] = (entropy_N.detach() * batch.weights_N).sum()
        return sums

    def _score(self, batch: Batch) -> Tensor:
        logprobs_N, _ = self.policy(batch)
        return logprobs_N

    def _metrics(self, sums: list[dict[str, Tensor]], *, scale: float) -> dict[str, float]:
        """Add up passes and ranks, and note a loss that is not finite."""
        mine = {"loss": 0.0}
        bad_pass = None
        for number, one in enumerate(sums, start=1):
            for name, value in one.items():
                mine[name] = mine.get(name, 0.0) + float(value)
            if bad_pass is None and not math.isfinite(mine["loss"]):
                bad_pass = f"forward pass {number} of {len(sums)} on rank {self.world.rank}"
        metrics: dict[str, float] = {}
        for theirs, their_bad_pass in self.world.gather_json([mine, bad_pass]):
            for name, total in theirs.items():
                metrics[name] = metrics.get(name, 0.0) + total * scale
            if their_bad_pass and not self._problem:
                self._problem = f"the loss became {theirs['loss']} in {their_bad_pass}"
        return metrics

    def _may_update(self, grad_norm: float, *, rate: float) -> bool:
        """Whether the gradient is good; raises NonFiniteError where the settings say stop."""
        is_finite = math.isfinite(grad_norm)
        if is_finite and not self._problem:
            self._skipped_in_a_row = 0
            return True
        if self.loss_scale and not self._problem and self.loss_scale.overflowed():
            return False
        problem = self._problem or f"the gradient norm is {grad_norm}"
        self._skipped_in_a_row += 1
        if self.optim.on_nonfinite == "skip" and self._skipped_in_a_row <= self.optim.max_skipped:
            if self.world.is_main:
                log.warning("step %d skipped: %s", self.step, problem)
            return False
        raise NonFiniteError(
            f"step {self.step}: {problem}; no weight was changed. Look at the step's rows, lower "
            f"optim.learning_rate (here {rate:.3g}) or optim.max_grad_norm"
            + (
                f"; {self.optim.max_skipped} steps in a row were skipped already (optim.max_skipped)"
                if self.optim.on_nonfinite == "skip"
                else ", or set optim.on_nonfinite = skip"
            )
        )

    @torch.no_grad()
    def _update(self, grad_norm: float, *, rate: float, loss_scale: float) -> None:
        factor = 1.0 / loss_scale
        if self.optim.max_grad_norm > 0:
            factor *= min(1.0, self.optim.max_grad_norm / (grad_norm + 1e-6))
        if factor != 1.0:
            self.flat.grad.mul_(factor)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.flat.publish()
        if self.loss_scale:
            self.loss_scale.went_well()

    def _over(
        self, batches: Sequence[Batch], one: Callable[[Batch], T], *, start_again: Callable[[], None]
    ) -> list[T]:
        """one(batch) for every batch. Out of memory: cut that batch in halves, undo everything, and start again."""
        todo = [part for batch in batches for part in self._parts_that_fit(batch)]
        done: list[T] = []
        while len(done) < len(todo):
            batch = todo[len(done)]
            try:
                done.append(one(_on(batch, self.policy.device)))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refuse_if_hopeless(batch, error)
            # Here, and not in the handler: the error's traceback holds the tensors of the failed pass.
            gc.collect()
            if self.policy.device.type != "cpu":
                torch.accelerator.empty_cache()
            if math.isinf(self._too_many_tokens):
                log.warning(
                    "out of memory at %d rows (%d tokens) in one forward pass; such passes are halved from now "
                    "on, which changes no result but costs time: lower the rows per forward pass to avoid it",
                    len(batch.rows), batch.packing.num_tokens,
                )  # fmt: skip
            self._too_many_tokens = batch.packing.num_tokens
            todo[len(done) : len(done) + 1] = split_batch(batch)
            done = []
            start_again()
        return done

    def _parts_that_fit(self, batch: Batch) -> list[Batch]:
        if batch.packing.num_tokens < self._too_many_tokens or len(batch.rows) < 2:
            return [batch]
        return [part for half in split_batch(batch) for part in self._parts_that_fit(half)]

    def _refuse_if_hopeless(self, batch: Batch, error: BaseException) -> None:
        size = f"{len(batch.rows)} rows of {batch.packing.num_real_tokens} tokens together"
        reason = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        if self.world.world_size > 1:
            raise PlanError(
                f"rank {self.world.rank} ran out of memory in a forward pass of {size} ({reason}). With several "
                "ranks a pass cannot be cut while the others wait; lower the rows per forward pass "
                "(train.per_device_train_batch_size, rollout.rows_per_forward)"
            ) from error
        if len(batch.rows) < 2:
            held = sum(p.numel() * p.element_size() for p in self.policy.parameters())
            held += sum(4 * slot.master.numel() for slot in self.flat.slots)
            raise PlanError(
                f"a single row of {batch.packing.num_real_tokens} tokens does not fit into memory ({reason}); "
                f"weights and gradients alone take {held / 2**30:.2f} GiB. Lower data.max_length (or "
                "rollout.max_new_tokens), set model.gradient_checkpointing = true, or train a LoRA (lora.rank)"
            ) from error


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores batches with a learner's model while its adapter is off."""

    learner: Learner

    def logprobs(self, batches: Sequence[Batch]) -> list[Tensor]:
        with self.learner.policy.without_adapter():
            return self.learner.logprobs(batches)


def split_batch(batch: Batch) -> list[Batch]:
    """The same rows in two forward passes; predictions keep their order."""
    half = -(-len(batch.rows) // 2)
    shares = any(segment.prefix_length for segment in batch.packing.segments)
    return collate(batch.rows, rows_per_forward=half, share_prompts=shares, temperature=batch.temperature)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on an accelerator or in the CPU's allocators."""
    told = ("DefaultCPUAllocator", "std::bad_alloc")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(name in str(error) for name in told)


def _coefficients(batch: Batch, loss_fn: LossFn, *, factor: float) -> Tensor:
    """d (factor x loss) / d logprob of a loss that is linear in the log-probs: its derivative anywhere, so at zero."""
    zeros_N = torch.zeros_like(batch.weights_N, requires_grad=True)
    out = TokenOutputs(logprobs_N=zeros_N, row_N=batch.row_N, num_rows=batch.num_rows)
    loss, _ = loss_fn(out, batch.weights_N, **batch.streams)
    (coefficients_N,) = torch.autograd.grad(loss * factor, zeros_N)
    return coefficients_N


def _on(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on the device."""
    if device.type == "cpu":
        return batch
    tensors = {f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors, streams={k: v.to(device) for k, v in batch.streams.items()})


def _nothing() -> None:
    pass
