"""Sampling with kitae's own kernels: the decoders of Qwen2, Qwen3, Llama and DeepSeek on a CPU.

    admit groups -> prefill their prompts -> share pages -> first tokens -> up to 16 steps a call -> retire ...

Every token is computed by itself in a fixed order of sums, so a completion has the same bits whatever runs beside it.
Layouts and phases are described in kernels/.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from kitae.models.policy import Policy
from kitae.rollout import structs
from kitae.rollout.base import Request, draw_tokens
from kitae.rollout.budget import Budget, most_pages, pages_of
from kitae.rollout.packed import PackedModel
from kitae.rollout.page_rows import PageRows, as_table, needs_logits
from kitae.rollout.pages import PAGE, HostPages, Pages
from kitae.rollout.scheduler import Scheduler
from kitae.rollout.scratch import make_scratch
from kitae.rollout.session import Session, sample_all, sample_groups
from kitae.rollout.structs import pointer

PREFILL_TOKENS = 256
"""Prompt tokens of one pass."""
IDLE_BYTES = 512 << 20
"""Keys and values that a session without an end keeps of texts that are done, so that others go on from them."""
BELOW_ONE = 1 - 2**-24
"""The largest number below 1 in float32."""
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
        quantization: Literal["none", "int8"] = "none",
        kv_cache_tokens: int | None = None,
        kv_setting: str = "kv_cache_tokens",
    ) -> None:
        """Without `shares_embedding`, nothing of the policy is read between two calls of sync().

        `kv_cache_tokens`, the value of the user's setting `kv_setting`, is how many tokens' keys and values there may be;
        None takes a share of the free memory (budget.py).
        """
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        self._kernels = structs.declare(kernels)
        self._shares_embedding, self._quantization = shares_embedding, quantization
        self._kv_cache_tokens, self._kv_setting = kv_cache_tokens, kv_setting
        self._model: PackedModel | None = None

    def sync(self) -> None:
        """See RolloutEngine."""
        if self._model is None:
            self._model = PackedModel(
                self.policy, shares_embedding=self._shares_embedding, quantization=self._quantization
            )
        self._model.take(self.policy)

    generate = sample_groups
    generate_up_to = sample_all

    def open_session(self, *, max_rows: int | None = None, longest: int | None = None) -> Session:
        """See SessionEngine."""
        if self._model is None:
            self.sync()
        assert self._model is not None
        max_rows = max_rows or self.max_rows
        context = getattr(self.policy.config, "max_position_embeddings", None)
        store = HostPages(self._model)
        most, reason = most_pages(
            store, device=self.policy.device, tokens=self._kv_cache_tokens, setting=self._kv_setting
        )
        expected = max_rows * pages_of(longest or context or LONGEST)
        idle_bytes = 0 if longest else IDLE_BYTES  # without an end to foresee, texts may come again
        most_idle = min(most // 4, idle_bytes // (PAGE * self._model.bytes_per_token))
        pages = Pages(store, expected=expected, most=most, most_idle=most_idle)
        budget = Budget(pages, most=most, reason=reason)
        rows = NativeRows(
            self._model,
            store,
            pages,
            budget,
            kernels=self._kernels,
            max_rows=max_rows,
            stop_ids=self.stop_ids,
        )
        scheduler = Scheduler(max_rows=max_rows, room=budget.admit)
        return Session(rows, scheduler, decode=self.decode, context=context, budget=budget)


def lists_kept_ids(request: Request) -> bool:
    """Whether each token comes with the ids that top-k, top-p and min-p left."""
    s = request.sampling
    is_truncated = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)
    return is_truncated and request.wants_kept_ids


class NativeRows(PageRows):
    """Rows whose keys and values lie in pages, and the arrays the kernels work on; see Rows in session.py."""

    def __init__(
        self,
        model: PackedModel,
        store: HostPages,
        pages: Pages,
        budget: Budget,
        *,
        kernels: ctypes.CDLL,
        max_rows: int,
        stop_ids: frozenset[int],
    ) -> None:
        super().__init__(pages, budget, stop_ids=stop_ids, num_embeddings=model.num_embeddings)
        self._model, self._kernels = model, kernels
        self._num_taken = model.num_taken
        self._struct = structs.Model.from_buffer_copy(model.struct)
        self._struct.layers = store.layers
        self._scratch, self._logits_BV, self._buffers = make_scratch(
            model, tokens=max(max_rows, PREFILL_TOKENS), logits=max_rows
        )
        self._stop_ids_tensor = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._is_bf16 = int(model.dtype == torch.bfloat16)
        self._threads = torch.get_num_threads()

    def _require_its_weights(self) -> None:
        """Keys and values in the pages, those kept for later texts too, are of the weights the session began with."""
        taken = self._model.num_taken
        assert taken == self._num_taken, f"sync() number {taken} under a session of number {self._num_taken}"

    # prompts --------------------------------------------------------------------------------------------------

    def enter(self, groups: list[list[Request]]) -> None:
        """See PageRows."""
        self._require_its_weights()
        num_positions = max(r.prompt_length + r.max_new_tokens for group in groups for r in group)
        self._angles = self._model.angles(num_positions)
        self._struct.cosines, self._struct.sines = map(pointer, self._angles)
        super().enter(groups)

    def _prefill(self, prompts: list[list[int]], known: list[int], tables: list[list[int]]) -> None:
        """Fill the prompts' pages but for their first `known` tokens, which stand there already, or will when the passes
        come to them: a pass writes all its keys before any of them is read.

        The logits of each prompt's last token are in its row afterwards.
        """
        spans = list(zip(prompts, known, strict=True))
        ids = torch.tensor([token for prompt, start in spans for token in prompt[start:]])
        positions = torch.cat([torch.arange(start, len(p), dtype=torch.int32) for p, start in spans])
        lengths = torch.tensor([len(prompt) - start for prompt, start in spans])
        table_of = torch.arange(len(prompts), dtype=torch.int32).repeat_interleave(lengths)
        last = lengths.cumsum(0) - 1
        table = as_table(tables, width=max(map(len, tables)))
        num_before = 0
        for first in range(0, len(ids), PREFILL_TOKENS):
            here = slice(first, first + PREFILL_TOKENS)
            end = min(first + PREFILL_TOKENS, len(ids))
            wanted = (last[(last >= first) & (last < end)] - first).int()
            tokens = _tokens(ids[here], positions[here], table, table_of[here])
            self._forward(tokens, wanted, at=num_before)
            num_before += len(wanted)

    def _draw(self, requests: list[Request], logits_row: list[int]) -> None:
        """Draw each request's token from its row of logits; one row may serve several requests."""
        chosen = [i for i, request in enumerate(requests) if needs_logits(request)]
        if chosen:
            logits_BV = self._logits_BV[[logits_row[i] for i in chosen]]
            draw_tokens(logits_BV, [requests[i] for i in chosen], stop_ids=self._stop_ids)
        plain = [i for i, request in enumerate(requests) if not needs_logits(request)]
        if plain:
            here = [requests[i] for i in plain]
            buffers = self._sampling_buffers(here, steps=1)
            row_of = torch.tensor([logits_row[i] for i in plain], dtype=torch.int32)
            self._run(self._kernels.kitae_sample, pointer(row_of), len(here), buffers.struct)
            self._add(buffers, here, num_steps=1)

    # completions ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """The next tokens of every running row, up to the first that ends."""
        self._require_its_weights()
        by_kernel = not any(map(needs_logits, scheduler.running))
        steps = self._most_steps(scheduler.running, within_s=within_s) if by_kernel else 1
        steps = self._make_room(scheduler, steps=steps)
        requests = scheduler.running
        tables = [self._pages_of[request] for request in requests]
        tokens = _tokens(
            torch.tensor([r.token_ids[-1] for r in requests]),
            torch.tensor([r.length - 1 for r in requests], dtype=torch.int32),
            as_table(tables, width=max(map(len, tables))),
            torch.arange(len(requests), dtype=torch.int32),
        )
        if not by_kernel:
            self._forward(tokens, tokens.table_of, at=0)
            self._draw(requests, list(range(len(requests))))
            return
        buffers = self._sampling_buffers(requests, steps=steps)
        began = time.perf_counter()
        decode = self._kernels.kitae_decode
        done = self._run(decode, tokens.struct, buffers.struct, self._is_bf16, self._threads)
        self._step_s = max(time.perf_counter() - began, 1e-6) / done
        self._add(buffers, requests, num_steps=done)

    def _sampling_buffers(self, requests: Sequence[Request], *, steps: int) -> _SamplingBuffers:
        return _SamplingBuffers(
            requests, steps=steps, stop_ids=self._stop_ids_tensor, vocabulary=self._model.vocabulary
        )

    def _forward(self, tokens: _TokenBuffers, wanted: Tensor, *, at: int) -> None:
        wanted_here = pointer(wanted), len(wanted), at
        self._run(self._kernels.kitae_forward, tokens.struct, *wanted_here, self._is_bf16, self._threads)

    def _run(self, kernel: Callable[..., int], *arguments: Any) -> int:
        """Call a kernel with the model and its scratch."""
        return kernel(self._struct, self._scratch, *arguments)

    def _add(self, buffers: _SamplingBuffers, requests: Sequence[Request], *, num_steps: int) -> None:
        """Hand each request its tokens; those behind a stop string are dropped."""
        ids, logprobs = buffers.ids[:num_steps].t().tolist(), buffers.logprobs[:num_steps].t().tolist()
        for row, (request, own_ids, own_logprobs) in enumerate(zip(requests, ids, logprobs, strict=True)):
            request.uniforms.take(num_steps)
            has_kept_ids = lists_kept_ids(request)
            for step, (token, logprob) in enumerate(zip(own_ids, own_logprobs, strict=True)):
                if request.finish_reason is None:
                    if has_kept_ids:
                        request.kept_ids.append(buffers.kept_ids(step, row))
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
    """A Sampling struct, and the tensors it points at: [steps, rows] each, or [rows]."""

    def __init__(self, requests: Sequence[Request], *, steps: int, stop_ids: Tensor, vocabulary: int) -> None:
        uniforms = [request.uniforms.peek(steps) for request in requests]
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64).t().contiguous()
        self._temperatures = torch.tensor([r.sampling.temperature for r in requests], dtype=torch.float32)
        self._stop_ids = stop_ids
        settings = [r.sampling for r in requests]
        self._top_ks = torch.tensor([min(s.top_k, vocabulary) for s in settings], dtype=torch.int64)
        # One just below 1 would be 1 in float32: off, and no id kept.
        top_ps = [s.top_p if s.top_p == 1 else min(s.top_p, BELOW_ONE) for s in settings]
        self._top_ps = torch.tensor(top_ps, dtype=torch.float32)
        self._log_min_ps = torch.tensor([s.min_p for s in settings], dtype=torch.float64).log().float()
        self._kept: Tensor | None = None
        if any(map(lists_kept_ids, requests)):
            self._kept = torch.zeros((steps, len(requests), -(-vocabulary // 8)), dtype=torch.uint8)
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
            top_ks=pointer(self._top_ks),
            top_ps=pointer(self._top_ps),
            log_min_ps=pointer(self._log_min_ps),
            kept=pointer(self._kept),
            kept_stride=0 if self._kept is None else self._kept.shape[2],
        )

    def kept_ids(self, step: int, row: int) -> list[int]:
        """The ids of which the kernel has set the bits."""
        assert self._kept is not None
        bits = np.unpackbits(self._kept[step, row].numpy(), bitorder="little")
        return np.flatnonzero(bits).tolist()
