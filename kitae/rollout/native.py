"""Sampling with kitae's own kernels: the decoders of Qwen2, Qwen3, Llama and DeepSeek on a CPU.

    admit groups -> prefill their prompts -> share pages -> first tokens -> up to 16 steps a call -> retire ...

Every token is computed by itself in a fixed order of sums, so a completion has the same bits whatever runs beside it.
Layouts and phases are described in kernels/.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kitae.config import SamplingSettings
from kitae.models.native import check_ids
from kitae.models.policy import Policy
from kitae.rollout import structs
from kitae.rollout.base import OnRollout, OnTokens, Request, draw_tokens
from kitae.rollout.packed import PackedModel
from kitae.rollout.pages import PAGE, Pages
from kitae.rollout.scheduler import Scheduler
from kitae.rollout.scratch import make_scratch
from kitae.rollout.session import STREAM_S, Session, sample_all
from kitae.rollout.structs import pointer
from kitae.types import Problem, Rollout

STEPS_PER_CALL = 16
"""Decode steps before Python looks; a call ends early when a row does."""
PREFILL_TOKENS = 256
"""Prompt tokens of one pass."""
LONGEST = 1 << 17
"""A row's most tokens, where neither the caller nor the model knows; only a first guess at memory depends on it."""


class NativeEngine:
    """A RolloutEngine that samples from the weights the policy had at the last sync(), or else at the first call."""

    def __init__(
        self,
        policy: Policy,
        *,
        kernels: ctypes.CDLL,
        stop_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        max_rows: int,
        shares_embedding: bool = True,
    ) -> None:
        """Without `shares_embedding`, nothing of the policy is read between two calls of sync()."""
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        self._kernels = structs.declare(kernels)
        self._shares_embedding = shares_embedding
        self._model: PackedModel | None = None

    def sync(self) -> None:
        """See RolloutEngine."""
        if self._model is None:
            self._model = PackedModel(self.policy, shares_embedding=self._shares_embedding)
        self._model.take(self.policy)

    def generate(
        self,
        problems: Sequence[Problem],
        *,
        n: int,
        sampling: SamplingSettings,
        seed: int,
        on_tokens: OnTokens | None = None,
        on_rollout: OnRollout | None = None,
    ) -> list[list[Rollout]]:
        """See RolloutEngine."""
        limits = [[sampling.max_new_tokens] * n] * len(problems)
        return sample_all(
            self,
            limits,
            problems=problems,
            sampling=sampling,
            seed=seed,
            on_tokens=on_tokens,
            on_rollout=on_rollout,
        )

    generate_up_to = sample_all

    def open_session(self, *, max_rows: int | None = None, longest: int | None = None) -> Session:
        """See SessionEngine."""
        if self._model is None:
            self.sync()
        assert self._model is not None
        max_rows = max_rows or self.max_rows
        context = getattr(self.policy.config, "max_position_embeddings", None)
        expected = max_rows * -(-(longest or context or LONGEST) // PAGE)
        rows = NativeRows(
            self._model,
            Pages(self._model, expected=expected),
            kernels=self._kernels,
            max_rows=max_rows,
            stop_ids=self.stop_ids,
        )
        return Session(rows, Scheduler(max_rows=max_rows), decode=self.decode, context=context)


def needs_logits(request: Request) -> bool:
    """Whether draw_tokens has to see every step's logits: for penalties, a set of tokens kept, or the likeliest ones."""
    s = request.sampling
    is_truncated = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)
    has_penalty = s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0
    return is_truncated or has_penalty or request.num_top_logprobs > 0


class NativeRows:
    """Rows whose keys and values lie in pages, and the arrays the kernels work on; see Rows in session.py."""

    def __init__(
        self,
        model: PackedModel,
        pages: Pages,
        *,
        kernels: ctypes.CDLL,
        max_rows: int,
        stop_ids: frozenset[int],
    ) -> None:
        self._model, self._pages, self._kernels = model, pages, kernels
        self._pages_of: dict[Request, list[int]] = {}
        self._scratch, self._logits_BV, self._buffers = make_scratch(
            model, tokens=max(max_rows, PREFILL_TOKENS), logits=max_rows
        )
        self._stop_ids = stop_ids
        self._stop_ids_tensor = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._is_bf16 = int(model.dtype == torch.bfloat16)
        self._threads = torch.get_num_threads()
        self._step_s = STREAM_S  # of the last call; the first one takes one step

    def leave(self, request: Request) -> None:
        """See Rows."""
        self._pages.give_back(self._pages_of.pop(request))

    # prompts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, groups: list[list[Request]]) -> None:
        """Compute each group's prompt once, share its pages, and sample the first token of all its rows."""
        self._model.require_positions(
            max(r.prompt_length + r.max_new_tokens for group in groups for r in group)
        )
        prompts = [group[0].problem.token_ids for group in groups]
        tables = [self._pages.take(-(-len(prompt) // PAGE)) for prompt in prompts]
        self._prefill(prompts, tables)
        requests = [request for group in groups for request in group]
        logits_row = [number for number, group in enumerate(groups) for _ in group]
        self._share(groups, prompts, tables)
        self._draw(requests, logits_row)

    def _prefill(self, prompts: list[list[int]], tables: list[list[int]]) -> None:
        """Fill the prompts' pages; the logits of each prompt's last token are in its row afterwards."""
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        check_ids(ids, self._model.num_embeddings)
        positions = torch.cat([torch.arange(len(p), dtype=torch.int32) for p in prompts])
        lengths = torch.tensor([len(p) for p in prompts])
        table_of = torch.arange(len(prompts), dtype=torch.int32).repeat_interleave(lengths)
        last = lengths.cumsum(0) - 1
        table = _as_table(tables, width=max(map(len, tables)))
        num_before = 0
        for first in range(0, len(ids), PREFILL_TOKENS):
            here = slice(first, first + PREFILL_TOKENS)
            end = min(first + PREFILL_TOKENS, len(ids))
            wanted = (last[(last >= first) & (last < end)] - first).int()
            tokens = _tokens(ids[here], positions[here], table, table_of[here])
            self._forward(tokens, wanted, at=num_before)
            num_before += len(wanted)

    def _share(self, groups: list[list[Request]], prompts: list[list[int]], tables: list[list[int]]) -> None:
        """Every row reads its prompt's full pages; the last one, if it is not full, is copied for all but the first."""
        source: list[int] = []
        target: list[int] = []
        for group, prompt, table in zip(groups, prompts, tables, strict=True):
            num_full = len(prompt) // PAGE
            self._pages.share(table[:num_full], readers=len(group) - 1)
            self._pages_of[group[0]] = table
            for request in group[1:]:
                own = self._pages.take(len(table) - num_full)
                source += table[num_full:]
                target += own
                self._pages_of[request] = table[:num_full] + own
        self._pages.copy(source, target)

    def _draw(self, requests: list[Request], logits_row: list[int]) -> None:
        """Draw each request's token from its row of logits; one row may serve several requests."""
        chosen = [i for i, request in enumerate(requests) if needs_logits(request)]
        if chosen:
            logits_BV = self._logits_BV[[logits_row[i] for i in chosen]]
            draw_tokens(logits_BV, [requests[i] for i in chosen], stop_ids=self._stop_ids)
        plain = [i for i, request in enumerate(requests) if not needs_logits(request)]
        if plain:
            here = [requests[i] for i in plain]
            buffers = _SamplingBuffers(here, steps=1, stop_ids=self._stop_ids_tensor)
            row_of = torch.tensor([logits_row[i] for i in plain], dtype=torch.int32)
            self._kernels.kitae_sample(
                self._model.struct, self._scratch, pointer(row_of), len(here), buffers.struct
            )
            self._add(buffers, here, num_steps=1)

    # completions ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """The next tokens of every running row, up to the first that ends."""
        requests = scheduler.running
        steps = min(STEPS_PER_CALL, *(r.max_new_tokens - len(r.token_ids) for r in requests))
        if within_s is not None:
            steps = min(steps, max(1, int(within_s / self._step_s)))
        by_kernel = not any(map(needs_logits, requests))
        if not by_kernel:
            steps = 1
        for request in requests:  # the token fed at step k lies at position length - 1 + k
            own = self._pages_of[request]
            own += self._pages.take(max(-(-(request.length - 1 + steps) // PAGE) - len(own), 0))
        tables = [self._pages_of[request] for request in requests]
        tokens = _tokens(
            torch.tensor([r.token_ids[-1] for r in requests]),
            torch.tensor([r.length - 1 for r in requests], dtype=torch.int32),
            _as_table(tables, width=max(map(len, tables))),
            torch.arange(len(requests), dtype=torch.int32),
        )
        if not by_kernel:
            self._forward(tokens, tokens.table_of, at=0)
            self._draw(requests, list(range(len(requests))))
            return
        buffers = _SamplingBuffers(requests, steps=steps, stop_ids=self._stop_ids_tensor)
        began = time.perf_counter()
        done = self._kernels.kitae_decode(
            self._model.struct, self._scratch, tokens.struct, buffers.struct, self._is_bf16, self._threads
        )
        self._step_s = max(time.perf_counter() - began, 1e-6) / done
        self._add(buffers, requests, num_steps=done)

    def _forward(self, tokens: _TokenBuffers, wanted: Tensor, *, at: int) -> None:
        self._kernels.kitae_forward(
            self._model.struct,
            self._scratch,
            tokens.struct,
            pointer(wanted),
            len(wanted),
            at,
            self._is_bf16,
            self._threads,
        )

    def _add(self, buffers: _SamplingBuffers, requests: Sequence[Request], *, num_steps: int) -> None:
        """Hand each request its tokens; those behind a stop string are dropped."""
        ids, logprobs = buffers.ids[:num_steps].t().tolist(), buffers.logprobs[:num_steps].t().tolist()
        for request, own_ids, own_logprobs in zip(requests, ids, logprobs, strict=True):
            request.uniforms.take(num_steps)
            for token, logprob in zip(own_ids, own_logprobs, strict=True):
                if request.finish_reason is None:
                    request.add(token, logprob, stop_ids=self._stop_ids)


class _TokenBuffers(NamedTuple):
    """A Tokens struct and the tensors it points at."""

    struct: structs.Tokens
    ids: Tensor
    positions: Tensor
    tables: Tensor
    table_of: Tensor


def _tokens(ids: Tensor, positions: Tensor, tables: Tensor, table_of: Tensor) -> _TokenBuffers:
    struct = structs.Tokens(
        count=len(ids),
        ids=pointer(ids),
        positions=pointer(positions),
        tables=pointer(tables),
        table_stride=tables.shape[1],
        table_of=pointer(table_of),
    )
    return _TokenBuffers(struct, ids, positions, tables, table_of)


class _SamplingBuffers:
    """A Sampling struct, and the tensors it points at: [steps, rows] each."""

    def __init__(self, requests: Sequence[Request], *, steps: int, stop_ids: Tensor) -> None:
        uniforms = [request.uniforms.peek(steps) for request in requests]
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64).t().contiguous()
        self._temperatures = torch.tensor([r.sampling.temperature for r in requests], dtype=torch.float32)
        self._stop_ids = stop_ids
        self.ids = torch.empty(self._uniforms.shape, dtype=torch.int64)
        self.logprobs = torch.empty(self._uniforms.shape, dtype=torch.float32)
        self.struct = structs.Sampling(
            steps=steps,
            uniforms=pointer(self._uniforms),
            temperatures=pointer(self._temperatures),
            ids=pointer(self.ids),
            logprobs=pointer(self.logprobs),
            stop_ids=pointer(stop_ids),
            num_stop_ids=len(stop_ids),
        )


def _as_table(pages: list[list[int]], *, width: int) -> Tensor:
    """Page numbers [rows, width]; what a row has not is 0 and not read."""
    return torch.tensor([own + [0] * (width - len(own)) for own in pages], dtype=torch.int32)
