"""Sampling with the policy itself: any transformers model, through the same attention seam as training.

    admit groups -> prefill their prompts, packed -> first tokens -> one step for all rows -> tokens -> retire ...

A prompt is computed once for its group. A step is one packed row of one-token rows, and only the last positions
reach the vocabulary head. Where the attention seam is off, the model's own cache is used, one group at a time.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kitae.config import SamplingSettings
from kitae.errors import NonFiniteError
from kitae.models.policy import Policy
from kitae.rollout.base import OnTokens, Request, as_rollout, check_lengths, make_requests
from kitae.rollout.cache import Prompt, SlotCache
from kitae.rollout.sampling import draw
from kitae.rollout.scheduler import Scheduler, round_up_rows
from kitae.types import Packing, Problem, Rollout, Segment

log = logging.getLogger(__name__)

ROUND_TO = 64
"""Packed prompts are padded to a multiple of this many tokens, so that shapes repeat."""
ROWS_PER_HEAD = 128
"""Rows whose logits exist at the same time."""


class GenericEngine:
    """A RolloutEngine that calls the policy's own module; it always samples from the present weights."""

    def __init__(
        self, policy: Policy, *, stop_ids: Sequence[int], decode: Callable[[list[int]], str], max_rows: int
    ) -> None:
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        if policy.seams.attention:
            log.info(
                "rollouts: generic engine, %d rows at a time, packed through the attention seam", max_rows
            )
        else:
            log.info(
                "rollouts: generic engine, one group at a time with the model's own cache (the attention seam is "
                "off for %s)",
                policy.causal_lm.config.model_type,
            )

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    def generate(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        sampling: SamplingSettings,
        seed: int,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Rollout]]:
        """See RolloutEngine."""
        limits = [[sampling.max_new_tokens] * n] * len(problems)
        return self.generate_up_to(
            limits, problems=problems, sampling=sampling, seed=seed, on_tokens=on_tokens
        )

    @torch.no_grad()
    def generate_up_to(
        self,
        limits: Sequence[Sequence[int]],
        *,
        problems: Sequence[Problem],
        sampling: SamplingSettings,
        seed: int,
        on_tokens: OnTokens | None = None,
    ) -> list[list[Rollout]]:
        """As generate, with a limit of its own per completion: limits[p][s] tokens for sample s of problem p."""
        config = self.policy.causal_lm.config.get_text_config()
        check_lengths(problems, limits, context=getattr(config, "max_position_embeddings", None))
        groups = make_requests(problems, limits, sampling=sampling, seed=seed)
        run = self._run_packed if self.policy.seams.attention else self._run_plain
        with _eval_mode(self.policy):
            run(groups, _Call(problems, sampling, on_tokens))
        return [
            [as_rollout(r, problem, stop_ids=self.stop_ids, decode=self.decode) for r in group]
            for problem, group in zip(problems, groups, strict=True)
        ]

    def _run_packed(self, groups: Sequence[Sequence[Request]], call: _Call) -> None:
        scheduler = Scheduler(groups, max_rows=min(self.max_rows, max(1, sum(map(len, groups)))))
        device = self.policy.device
        # bfloat16 products of one row with its keys are slower than float32 ones on a CPU.
        dtype = torch.float32 if device.type == "cpu" else self.policy.dtype
        max_length = max((r.prompt_length + r.max_new_tokens for group in groups for r in group), default=0)
        cache = SlotCache(num_slots=scheduler.num_slots, max_length=max_length, device=device, dtype=dtype)
        while not scheduler.is_done:
            while entering := scheduler.admit():
                self._prefill(entering, cache, call)
                scheduler.retire()
            cache.move(scheduler.compact())
            if scheduler.running:
                self._step(scheduler, cache, call)
                scheduler.retire()

    def _prefill(self, groups: list[list[Request]], cache: SlotCache, call: _Call) -> None:
        """Compute each group's prompt once, and sample the first token of all its rows."""
        ids: list[int] = []
        positions: list[int] = []
        prompts: list[Prompt] = []
        for group in groups:
            prompt = call.problems[group[0].problem_number].token_ids
            prompts.append(Prompt(len(ids), len(prompt), [r.slot for r in group]))
            ids += prompt
            positions += range(len(prompt))
        padding = [0] * (-len(ids) % ROUND_TO)
        packing = Packing(
            segments=[Segment(p.start, p.length) for p in prompts], num_tokens=len(ids) + len(padding)
        )
        cache.begin_prefill(prompts)
        hidden_TH = self.policy.hidden(
            self._tensor(ids + padding), self._tensor(positions + padding), packing, cache=cache
        )
        last_tokens = [p.start + p.length - 1 for p in prompts for _ in p.slots]
        self._sample(hidden_TH, last_tokens, [r for group in groups for r in group], call)

    def _step(self, scheduler: Scheduler, cache: SlotCache, call: _Call) -> None:
        """One more token of every running row. A slot without a row computes a token nobody reads."""
        width = scheduler.width
        ids, positions = [0] * width, [0] * width
        for request in scheduler.running:
            ids[request.slot] = request.token_ids[-1]
            positions[request.slot] = request.length - 1
        packing = Packing(segments=[Segment(i, 1) for i in range(width)], num_tokens=width)
        cache.begin_step(positions)
        hidden_BH = self.policy.hidden(self._tensor(ids), self._tensor(positions), packing, cache=cache)
        self._sample(hidden_BH, [r.slot for r in scheduler.running], scheduler.running, call)

    def _sample(
        self, hidden_TH: Tensor, places: Sequence[int], requests: Sequence[Request], call: _Call
    ) -> None:
        """The next token of each request, whose last hidden state lies at the same index's place."""
        for first in range(0, len(requests), ROWS_PER_HEAD):
            rows = slice(first, first + ROWS_PER_HEAD)
            here = list(places[rows])
            padding = [here[-1]] * (round_up_rows(len(here)) - len(here))
            logits_BV = self.policy.logits(hidden_TH[self._tensor(here + padding)])
            self._draw(logits_BV[: len(here)], requests[rows], call)

    def _draw(self, logits_BV: Tensor, requests: Sequence[Request], call: _Call) -> None:
        sampled = draw(
            logits_BV,
            sampling=call.sampling,
            uniforms=[r.uniforms.random() for r in requests],
            histories=[r.history for r in requests],
        )
        for row, request in enumerate(requests):
            if not math.isfinite(sampled.logprobs[row]):
                raise NonFiniteError(
                    f"the model's logits are not finite after {request.length} tokens of prompt "
                    f"{request.problem_number}: the weights are broken (a learning rate too high?) or overflow "
                    f"{self.policy.dtype}"
                )
            request.add(sampled, row, stop_ids=self.stop_ids)
            if call.on_tokens is not None:
                call.on_tokens(request.problem_number, request.sample_number, request.token_ids[-1:])

    def _run_plain(self, groups: Sequence[Sequence[Request]], call: _Call) -> None:
        """One group at a time through the model's own cache; its rows are equally long, so nothing is padded."""
        for group in groups:
            for first in range(0, len(group), self.max_rows):
                self._run_plain_rows(group[first : first + self.max_rows], call)

    def _run_plain_rows(self, rows: Sequence[Request], call: _Call) -> None:
        ids_BT = self._tensor(call.problems[rows[0].problem_number].token_ids).expand(len(rows), -1)
        name = _cache_name(self.policy.causal_lm)
        cache = None
        while unfinished := [i for i, r in enumerate(rows) if r.finish_reason is None]:
            out = self.policy.causal_lm(input_ids=ids_BT, use_cache=True, logits_to_keep=1, **{name: cache})
            cache = out[name]
            self._draw(out.logits[unfinished, -1].float(), [rows[i] for i in unfinished], call)
            ids_BT = self._tensor([[r.token_ids[-1]] for r in rows])

    def _tensor(self, values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(values, device=self.policy.device)


class _Call(NamedTuple):
    """The arguments of one generate()."""

    problems: Sequence[Problem]
    sampling: SamplingSettings
    on_tokens: OnTokens | None


def _cache_name(causal_lm: nn.Module) -> str:
    """What this model and transformers version call the argument and output that hold the cache."""
    parameters = inspect.signature(causal_lm.forward).parameters
    return next(name for name in ("cache", "past_key_values", "cache_params") if name in parameters)


@contextmanager
def _eval_mode(policy: Policy) -> Iterator[None]:
    """No dropout while sampling; the policy's mode comes back."""
    was_training = policy.training
    policy.eval()
    try:
        yield
    finally:
        policy.train(was_training)
