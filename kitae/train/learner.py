"""The model under training and the verbs a recipe may use on it: gradient, update, score.

    batches --policy, loss_fn--> sums / one denominator --backward--> float32 gradient --clip, guard--> new weights

A step's gradient is a SUM over every row of every forward pass and rank, divided by one number: it depends neither
on how rows are cut into passes nor on the number of ranks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from kitae.config import OptimSettings
from kitae.data.collate import empty_batch
from kitae.errors import CheckpointError, NonFiniteError
from kitae.parallel import fsdp
from kitae.parallel.world import World
from kitae.train.flat import FlatParameters
from kitae.train.memory import Passes
from kitae.train.optim import LossScale, learning_rate, make_optimizer, update
from kitae.types import Batch, TokenOutputs

if TYPE_CHECKING:
    from kitae.algos.losses import LossFn
    from kitae.models.policy import Policy

log = logging.getLogger(__name__)


class Learner:
    """Owns the policy's float32 masters, its optimizer and schedule; knows nothing about algorithms."""

    def __init__(self, policy: Policy, *, optim: OptimSettings, total_steps: int, world: World) -> None:
        self.policy = policy
        self.optim = optim
        self.total_steps = total_steps
        self.world = world
        self.step = 0
        self.flat = FlatParameters(policy.named_trainable(), kernels=policy.seams.kernels)
        self.optimizer = make_optimizer(
            optim, [slot.master for slot in self.flat.slots], world=world if self.flat.is_sharded else World()
        )
        self.loss_scale = LossScale() if policy.dtype == torch.float16 else None
        self._passes = Passes(policy, world)
        self._has_gradient = False
        self._problem = ""
        self._skipped_in_a_row = 0
        if world.world_size > 1:
            self.logprobs([empty_batch()])  # FSDP takes the first module that runs for its root

    def forward_backward(
        self, batches: Sequence[Batch], loss_fn: LossFn, *, denominator: float, with_entropy: bool = False
    ) -> dict[str, float]:
        """Add the gradient of loss_fn over all batches of all ranks, divided by the sum of all denominators.

        `batches` and `denominator` are this rank's share, possibly none and 0. Returns "loss", the loss's own metrics
        and, where asked for (or where the loss has `needs_entropy`), "entropy": each its sum over the denominator, the
        same on every rank. Several calls before optim_step add up.
        """
        shares = self.world.gather_json([denominator, len(batches)])
        total = sum(share for share, _ in shares)
        scale = 1.0 / total if total else 0.0
        before = self.flat.grad.clone() if self._has_gradient else None
        with_entropy = with_entropy or getattr(loss_fn, "needs_entropy", False)

        def one_pass(batch: Batch) -> dict[str, Tensor]:
            return self._one_pass(batch, loss_fn, scale=scale, with_entropy=with_entropy)

        def start_again() -> None:
            self.flat.zero_grad()
            if before is not None:
                self.flat.grad.copy_(before)

        self.policy.train()
        sums = self._passes.run(batches, one_pass, start_again=start_again)
        for _ in range(max(passes for _, passes in shares) - len(batches)):
            out = self.policy(empty_batch())  # takes part in the others' collectives
            said = torch.cat([x for x in (out.logprobs_N, out.values_N) if x is not None])
            torch.autograd.backward((said * 0.0).sum())
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
        is_updated = False
        try:
            if self._may_update(grad_norm, rate=rate):
                self._update(grad_norm, rate=rate, loss_scale=loss_scale)
                is_updated = True
            else:
                metrics["skipped"] = 1.0
        finally:
            if not is_updated:  # an update clears it
                self.flat.zero_grad()
            self._has_gradient = False
            self._problem = ""
        return metrics

    def logprobs(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Log-probabilities of each batch's predictions, without gradient and dropout."""
        return self._score(batches, lambda out: out.logprobs_N)

    def values(self, batches: Sequence[Batch]) -> list[Tensor]:
        """A critic's values at each batch's predictions, likewise."""
        return self._score(batches, lambda out: cast(Tensor, out.values_N))

    def _score(self, batches: Sequence[Batch], field: Callable[[TokenOutputs], Tensor]) -> list[Tensor]:
        """One field of the outputs of each batch; ranks with fewer batches take part with empty ones."""

        def one_pass(batch: Batch) -> Tensor:
            return field(self.policy(batch))

        most = max(self.world.gather_json(len(batches)))
        self.policy.eval()
        with torch.no_grad():
            scored = [torch.cat(self._passes.run([batch], one_pass)) for batch in batches]
            for _ in range(most - len(batches)):
                self.policy(empty_batch())
        return scored

    def without_adapter(self) -> Scorer:
        """The model a LoRA run started from, at no memory: its adapter off, or as it was loaded."""
        return Scorer(self)

    def unsharded(self) -> AbstractContextManager[None]:
        """Meanwhile the whole policy is on every rank, which may sample different numbers of tokens."""
        return fsdp.unsharded(self.policy)

    def full_tensors(self) -> dict[str, Tensor] | None:
        """Whole trainable parameters for saving, on rank 0; None where the policy's own are whole. All ranks call it."""
        if not self.flat.is_sharded:
            return None
        named = fsdp.full_tensors(self.policy)
        return {name: tensor.cpu() for name, tensor in named if self.world.is_main}

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
                key: value.to(slot.master.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in moments.items()
            }
        self.flat.publish()
        fsdp.drop_gathered(self.policy)

    def _one_pass(
        self, batch: Batch, loss_fn: LossFn, *, scale: float, with_entropy: bool
    ) -> dict[str, Tensor]:
        """Add the gradient of one forward pass; return its sums, not yet divided."""
        batch = _on(batch, self.policy.device)
        factor = scale * (self.loss_scale.value if self.loss_scale else 1.0)
        is_linear = getattr(loss_fn, "is_linear", False)
        coefficients_N = _coefficients(batch, loss_fn, factor=factor) if is_linear else None
        out: TokenOutputs = self.policy(batch, with_entropy=with_entropy, coefficients_N=coefficients_N)
        loss, metrics = loss_fn(out, batch.weights_N, **batch.streams, **batch.numbers)
        torch.autograd.backward(loss * factor)
        sums = {"loss": loss.detach(), **metrics}
        if out.entropy_N is not None:
            sums["entropy"] = (out.entropy_N.detach() * batch.weights_N).sum()
        return sums

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

    def _update(self, grad_norm: float, *, rate: float, loss_scale: float) -> None:
        factor = 1.0 / loss_scale
        if self.optim.max_grad_norm > 0:
            factor *= min(1.0, self.optim.max_grad_norm / (grad_norm + 1e-6))
        update(self.optimizer, self.flat, learning_rate=rate, scale=factor)
        fsdp.drop_gathered(self.policy)
        if self.loss_scale:
            self.loss_scale.went_well()


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores batches with the model its learner started from."""

    learner: Learner

    def logprobs(self, batches: Sequence[Batch]) -> list[Tensor]:
        with self.learner.policy.reference():
            return self.learner.logprobs(batches)


def _coefficients(batch: Batch, loss_fn: LossFn, *, factor: float) -> Tensor:
    """d (factor x loss) / d logprob of a loss that is linear in the log-probs: its derivative anywhere, so at zero."""
    zeros_N = torch.zeros_like(batch.weights_N, requires_grad=True)
    out = TokenOutputs(logprobs_N=zeros_N, row_N=batch.row_N, num_rows=batch.num_rows)
    loss, _ = loss_fn(out, batch.weights_N, **batch.streams, **batch.numbers)
    (coefficients_N,) = torch.autograd.grad(loss * factor, zeros_N)
    return coefficients_N


def _on(batch: Batch, device: torch.device) -> Batch:
    """The batch with what a loss reads on the device; the policy moves the rest itself."""
    return replace(
        batch,
        weights_N=batch.weights_N.to(device),
        row_N=batch.row_N.to(device),
        streams={name: stream.to(device) for name, stream in batch.streams.items()},
        numbers={name: number.to(device) for name, number in batch.numbers.items()},
    )
