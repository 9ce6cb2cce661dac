"""Sampling with kitae's own kernels: the dense decoders of Qwen2, Qwen3 and Llama on a CPU.

    admit groups -> prefill their prompts -> share pages -> first tokens -> up to 16 steps a call -> retire ...

Every token is computed by itself in a fixed order of sums, so a completion has the same bits whatever runs beside it.
Layouts and phases are described in kernels/.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kitae.config import SamplingSettings
from kitae.errors import NonFiniteError
from kitae.models.policy import Policy
from kitae.rollout import structs
from kitae.rollout.base import OnTokens, Request, as_rollout, check_lengths, make_requests
from kitae.rollout.packed import BLOCK, PackedModel
from kitae.rollout.pages import PAGE, Pages
from kitae.rollout.sampling import Draw, draw
from kitae.rollout.scheduler import Scheduler
from kitae.rollout.structs import pointer
from kitae.types import Problem, Rollout

STEPS_PER_CALL = 16
"""Decode steps before Python looks; a call ends early when a row does."""
STREAM_S = 0.1
"""Somebody who reads along sees new tokens about this often."""
PREFILL_TOKENS = 256
"""Prompt tokens of one pass."""


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
    ) -> None:
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        self._kernels = structs.declare(kernels)
        self._model: PackedModel | None = None

    def sync(self) -> None:
        """See RolloutEngine."""
        if self._model is None:
            self._model = PackedModel(self.policy)
        self._model.take(self.policy)

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
        check_lengths(problems, limits, context=getattr(self.policy.config, "max_position_embeddings", None))
        groups = make_requests(problems, limits, sampling=sampling, seed=seed)
        if self._model is None:
            self.sync()
        assert self._model is not None
        if any(groups):
            _Round(
                groups,
                call=_Call(problems, sampling, on_tokens, self.stop_ids),
                model=self._model,
                kernels=self._kernels,
                max_rows=min(self.max_rows, sum(map(len, groups))),
            ).run()
        return [
            [as_rollout(r, problem, stop_ids=self.stop_ids, decode=self.decode) for r in group]
            for problem, group in zip(problems, groups, strict=True)
        ]


class _Call(NamedTuple):
    """The arguments of one generate()."""

    problems: Sequence[Problem]
    sampling: SamplingSettings
    on_tokens: OnTokens | None
    stop_ids: frozenset[int]

    @property
    def needs_logits(self) -> bool:
        """Whether sampling.draw has to see every step's logits, for penalties or a set of tokens kept."""
        s = self.sampling
        is_truncated = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)
        return is_truncated or s.repetition_penalty != 1 or s.no_repeat_ngram_size > 0


@dataclass(slots=True, eq=False)
class _Row:
    """A request while it runs."""

    request: Request
    pages: list[int]
    ahead: list[float] = field(default_factory=list)
    """Numbers drawn for steps that were not taken."""

    def uniforms(self, count: int) -> list[float]:
        """Its next random numbers; those that are used up must be taken off."""
        draw_one = self.request.uniforms.random
        self.ahead += [draw_one() for _ in range(count - len(self.ahead))]
        return self.ahead[:count]


class _Round:
    """One generate() under way: rows, their pages, and the arrays the kernels work on."""

    def __init__(
        self,
        groups: Sequence[Sequence[Request]],
        *,
        call: _Call,
        model: PackedModel,
        kernels: ctypes.CDLL,
        max_rows: int,
    ) -> None:
        self._call, self._model, self._kernels = call, model, kernels
        longest = max(r.prompt_length + r.max_new_tokens for group in groups for r in group)
        model.require_positions(longest)
        self._scheduler = Scheduler(groups, max_rows=max_rows)
        self._pages_per_row = -(-longest // PAGE)
        self._pages = Pages(model, expected=max_rows * self._pages_per_row)
        self._rows: dict[Request, _Row] = {}
        self._scratch, self._logits_BV, self._buffers = _make_scratch(model, max_rows=max_rows)
        self._stop_ids = torch.tensor(sorted(call.stop_ids), dtype=torch.int64)
        self._is_bf16 = int(model.dtype == torch.bfloat16)
        self._threads = torch.get_num_threads()
        self._step_s = STREAM_S  # of the last call; the first one takes one step

    def run(self) -> None:
        scheduler = self._scheduler
        while not scheduler.is_done:
            while entering := scheduler.admit():
                self._enter(entering)
                self._retire()
            if scheduler.running:
                self._decode()
                self._retire()

    def _retire(self) -> None:
        for request in self._scheduler.retire():
            self._pages.give_back(self._rows.pop(request).pages)

    # prompts --------------------------------------------------------------------------------------------------

    def _enter(self, groups: list[list[Request]]) -> None:
        """Compute each group's prompt once, share its pages, and sample the first token of all its rows."""
        prompts = [self._call.problems[group[0].problem_number].token_ids for group in groups]
        tables = [self._pages.take(-(-len(prompt) // PAGE)) for prompt in prompts]
        self._prefill(prompts, tables)
        requests = [request for group in groups for request in group]
        logits_row = [number for number, group in enumerate(groups) for _ in group]
        self._share(groups, prompts, tables)
        self._first_tokens(requests, logits_row)

    def _prefill(self, prompts: list[list[int]], tables: list[list[int]]) -> None:
        """Fill the prompts' pages; the logits of each prompt's last token are in its row afterwards."""
        ids = torch.tensor([token for prompt in prompts for token in prompt])
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
            self._rows[group[0]] = _Row(group[0], table)
            for request in group[1:]:
                own = self._pages.take(len(table) - num_full)
                source += table[num_full:]
                target += own
                self._rows[request] = _Row(request, table[:num_full] + own)
        self._pages.copy(source, target)

    def _first_tokens(self, requests: list[Request], logits_row: list[int]) -> None:
        if self._call.needs_logits:
            self._draw(self._logits_BV[logits_row], requests)
            return
        uniforms = [self._rows[r].uniforms(1) for r in requests]
        buffers = _SamplingBuffers(uniforms, self._call, self._stop_ids)
        row_of = torch.tensor(logits_row, dtype=torch.int32)
        self._kernels.kitae_sample(
            self._model.struct, self._scratch, pointer(row_of), len(requests), buffers.struct
        )
        self._add(buffers, requests, num_steps=1)

    # completions ----------------------------------------------------------------------------------------------

    def _decode(self) -> None:
        """The next tokens of every running row."""
        requests = self._scheduler.running
        most = min(STEPS_PER_CALL, *(r.max_new_tokens - len(r.token_ids) for r in requests))
        if self._call.on_tokens is not None:
            most = min(most, max(1, int(STREAM_S / self._step_s)))
        steps = 1 if self._call.needs_logits else most
        rows = [self._rows[r] for r in requests]
        for row in rows:  # the token fed at step k lies at position length - 1 + k
            missing = -(-(row.request.length - 1 + steps) // PAGE) - len(row.pages)
            row.pages += self._pages.take(max(missing, 0))
        tokens = _tokens(
            torch.tensor([r.token_ids[-1] for r in requests]),
            torch.tensor([r.length - 1 for r in requests], dtype=torch.int32),
            _as_table([row.pages for row in rows], width=self._pages_per_row),
            torch.arange(len(rows), dtype=torch.int32),
        )
        if self._call.needs_logits:
            self._forward(tokens, tokens.table_of, at=0)
            self._draw(self._logits_BV[: len(requests)].contiguous(), requests)
            return
        buffers = _SamplingBuffers([row.uniforms(steps) for row in rows], self._call, self._stop_ids)
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

    def _draw(self, logits_BV: Tensor, requests: Sequence[Request]) -> None:
        sampled = draw(
            logits_BV,
            sampling=self._call.sampling,
            uniforms=[r.uniforms.random() for r in requests],
            histories=[r.history for r in requests],
        )
        for row, request in enumerate(requests):
            self._add_one(request, sampled, row)

    def _add(self, buffers: _SamplingBuffers, requests: Sequence[Request], *, num_steps: int) -> None:
        for request in requests:
            del self._rows[request].ahead[:num_steps]
        ids, logprobs = buffers.ids[:num_steps].tolist(), buffers.logprobs[:num_steps].tolist()
        for step in range(num_steps):
            sampled = Draw(ids[step], logprobs[step], None)
            for row, request in enumerate(requests):
                self._add_one(request, sampled, row)

    def _add_one(self, request: Request, sampled: Draw, row: int) -> None:
        if not math.isfinite(sampled.logprobs[row]):
            raise NonFiniteError(
                f"the model's logits are not finite after {request.length} tokens of prompt "
                f"{request.problem_number}: the weights are broken (a learning rate too high?) or overflow "
                f"{self._model.dtype}"
            )
        request.add(sampled, row, stop_ids=self._call.stop_ids)
        if self._call.on_tokens is not None:
            self._call.on_tokens(request.problem_number, request.sample_number, request.token_ids[-1:])


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

    def __init__(self, uniforms: list[list[float]], call: _Call, stop_ids: Tensor) -> None:
        """`uniforms`: each row's numbers for all steps."""
        self._uniforms = torch.tensor(uniforms, dtype=torch.float64).t().contiguous()
        self._stop_ids = stop_ids
        self.ids = torch.empty(self._uniforms.shape, dtype=torch.int64)
        self.logprobs = torch.empty(self._uniforms.shape, dtype=torch.float32)
        self.struct = structs.Sampling(
            steps=len(self._uniforms),
            uniforms=pointer(self._uniforms),
            temperature=call.sampling.temperature,
            ids=pointer(self.ids),
            logprobs=pointer(self.logprobs),
            stop_ids=pointer(stop_ids),
            num_stop_ids=len(stop_ids),
        )


def _as_table(pages: list[list[int]], *, width: int) -> Tensor:
    """Page numbers [rows, width]; what a row has not is 0 and not read."""
    return torch.tensor([own + [0] * (width - len(own)) for own in pages], dtype=torch.int32)


def _make_scratch(model: PackedModel, *, max_rows: int) -> tuple[structs.Scratch, Tensor, list[Tensor]]:
    """Room for a pass; its logits [max_rows, vocabulary]; and the tensors that must live as long."""
    rows = max(max_rows, PREFILL_TOKENS)
    layer = model.layers[0]
    widths = {
        "hidden": -(-model.hidden_size // BLOCK) * BLOCK,
        "qkv": layer.qkv.columns,
        "attended": model.query_heads * model.head_size,
        "activated": layer.gate_up.columns // 2,
        "logits": model.struct.head.columns,
    }
    buffers = {
        "hidden": torch.empty(rows, widths["hidden"]),
        "normed": torch.empty(rows, widths["hidden"], dtype=model.dtype),
        "qkv": torch.empty(rows, widths["qkv"]),
        "attended": torch.empty(rows, widths["attended"], dtype=model.dtype),
        "activated": torch.empty(rows, widths["activated"], dtype=model.dtype),
        "logits": torch.empty(max_rows, widths["logits"]),
    }
    struct = structs.Scratch(
        **{name: pointer(buffer) for name, buffer in buffers.items()},
        **{f"{name}_stride": width for name, width in widths.items()},
    )
    return struct, buffers["logits"][:, : model.vocabulary], list(buffers.values())
