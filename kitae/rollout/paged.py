"""Sampling on a GPU with the policy's own module: keys and values in pages, and decode steps that are recorded and replayed.

    prompts --packed, as in training--> pages, first tokens
    rows' last tokens --replay: module, one-token attention over pages, head--> logits --draw--> next ones, up to 16 times

A step of a large model is over a thousand small kernels, which take longer to launch than to run; a replay launches them at
once. Tokens stay on the device between the steps of a call: a row that ends meanwhile computes tokens that nobody reads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kitae import backends
from kitae.backends import Recording
from kitae.models.policy import Policy
from kitae.rollout.base import Request, draw_tokens
from kitae.rollout.budget import Budget, most_pages, pages_of
from kitae.rollout.page_cache import Attend, PageCache, Step, attend_slowly
from kitae.rollout.page_rows import PageRows, as_table, needs_logits
from kitae.rollout.pages import PAGE, Pages
from kitae.rollout.plain import eval_mode
from kitae.rollout.sampling import inverse_cdf
from kitae.rollout.scheduler import Scheduler
from kitae.rollout.session import Session, sample_all, sample_groups
from kitae.types import Packing, Segment

log = logging.getLogger(__name__)

ROUND_TO = 64
"""Packed prompts are padded to a multiple of this many tokens, so that shapes repeat."""
LONGEST = 1 << 17
"""A row's most tokens, where neither the caller nor the model knows."""


class PagedEngine:
    """A RolloutEngine that calls the policy's own module; it always samples from the present weights."""

    def __init__(
        self,
        policy: Policy,
        *,
        stop_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        max_rows: int,
        attend: Attend = attend_slowly,
        records: bool = False,
        kv_cache_tokens: int | None = None,
        kv_setting: str = "kv_cache_tokens",
    ) -> None:
        """`attend` is the steps' attention. With `records` steps are recorded, and replayed from then on.

        `kv_cache_tokens`, the value of the user's setting `kv_setting`, is how many tokens' keys and values there may be;
        None takes what the rows can need, up to a share of the free memory (budget.py).
        """
        self.policy = policy
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_rows = max_rows
        self._attend, self._records = attend, records
        self._kv_cache_tokens, self._kv_setting = kv_cache_tokens, kv_setting
        self._steps: DecodeSteps | None = None

    def sync(self) -> None:
        """Nothing to do: the weights are the policy's own."""

    generate = sample_groups
    generate_up_to = sample_all

    def open_session(self, *, max_rows: int | None = None, longest: int | None = None) -> Session:
        """See SessionEngine. One at a time: the memory is the engine's, so the session before can go no further."""
        max_rows = max_rows or self.max_rows
        context = getattr(self.policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
        longest = longest or context or LONGEST
        steps = self._steps_for(max_rows, longest)
        steps.num_sessions += 1
        pages = Pages(steps.cache, expected=steps.num_pages, most=steps.num_pages)
        budget = Budget(pages, most=steps.num_pages, reason=steps.reason)
        rows = PagedRows(self.policy, steps, pages, budget, stop_ids=self.stop_ids)
        scheduler = Scheduler(max_rows=max_rows, room=budget.admit)
        return Session(rows, scheduler, decode=self.decode, context=context or longest, budget=budget)

    def _steps_for(self, max_rows: int, longest: int) -> DecodeSteps:
        """Those of the session before where they suffice: memory and recordings stay from one session to the next."""
        had_rows, had_longest = (self._steps.max_rows, self._steps.longest) if self._steps else (0, 0)
        if max_rows > had_rows or longest > had_longest:
            self._steps = None
            if self.policy.device.type != "cpu":
                torch.accelerator.empty_cache()  # so that its memory counts as free
            self._steps = DecodeSteps(
                self.policy,
                max_rows=max(max_rows, had_rows),
                longest=max(_round_up(longest), had_longest),
                attend=self._attend,
                records=self._records,
                kv_cache_tokens=self._kv_cache_tokens,
                kv_setting=self._kv_setting,
            )
        assert self._steps is not None
        return self._steps


class DecodeSteps:
    """The memory of keys and values, and the steps over it: each takes its rows' tokens from tensors that never move."""

    def __init__(
        self,
        policy: Policy,
        *,
        max_rows: int,
        longest: int,
        attend: Attend,
        records: bool,
        kv_cache_tokens: int | None,
        kv_setting: str,
    ) -> None:
        self.policy, self.max_rows, self.longest = policy, max_rows, longest
        device = policy.device
        config = policy.causal_lm.config
        self.cache = PageCache(config, device=device, dtype=policy.dtype, attend=attend)
        most, self.reason = most_pages(self.cache, device=device, tokens=kv_cache_tokens, setting=kv_setting)
        needed = max_rows * pages_of(longest)
        self.num_pages = min(most, needed)
        self.nowhere = self.num_pages
        """A page beside those of the rows, for tokens that nobody reads."""
        self.cache.resize(self.num_pages + 1)
        width = _width_of(max_rows)
        self.ids_B = torch.zeros(width, dtype=torch.int64, device=device)
        self.positions_B = torch.zeros(width, dtype=torch.int64, device=device)
        self.tables_BP = torch.full(
            (width, pages_of(longest)), self.nowhere, dtype=torch.int32, device=device
        )
        self.num_sessions = 0
        self._backend, self._records = backends.of(device), records
        self._recordings: dict[int, Recording] = {}

    def place(self, requests: Sequence[Request], tables: list[list[int]]) -> int:
        """Put the rows' last tokens where the steps read them; returns how many rows a step computes."""
        width = _width_of(len(requests))
        empty = width - len(requests)
        ids = [r.token_ids[-1] for r in requests] + [0] * empty
        positions = [r.length - 1 for r in requests] + [0] * empty
        table = as_table(tables + [[self.nowhere]] * empty, width=max(map(len, tables)))
        self.ids_B[:width] = torch.tensor(ids)
        self.positions_B[:width] = torch.tensor(positions)
        self.tables_BP[:width, : table.shape[1]] = table.to(self.tables_BP.device)
        return width

    def logits(self, width: int) -> Tensor:
        """Logits [width, V] of the tokens in place, which may be overwritten until the next step."""
        if self._records and width not in self._recordings:
            self._record(width)
        if not self._records:
            return self._compute(width)
        recording = self._recordings[width]
        recording.replay()
        return recording.result

    def prefill(self, prompts: list[list[int]], places: list[int]) -> Tensor:
        """Compute packed prompts, keep the keys and values of each token at its place; logits of the last tokens."""
        ids = [token for prompt in prompts for token in prompt]
        positions = [place for prompt in prompts for place in range(len(prompt))]
        padding = [0] * (-len(ids) % ROUND_TO)
        segments, last, start = [], [], 0
        for prompt in prompts:
            segments.append(Segment(start, len(prompt)))
            start += len(prompt)
            last.append(start - 1)
        device = self.policy.device
        ids_T, positions_T = (torch.tensor(x + padding, device=device) for x in (ids, positions))
        self.cache.coming = torch.tensor(places, device=device)
        packing = Packing(segments=segments, num_tokens=len(ids) + len(padding))
        hidden_TH = self.policy.hidden(ids_T, positions_T, packing, cache=self.cache)
        return self.policy.logits(hidden_TH[torch.tensor(last, device=device)])

    def _compute(self, width: int) -> Tensor:
        positions_B = self.positions_B[:width]
        self.cache.coming = Step.of(self.tables_BP[:width], positions_B)
        packing = Packing(segments=[Segment(row, 1) for row in range(width)], num_tokens=width)
        hidden_BH = self.policy.hidden(self.ids_B[:width], positions_B, packing, cache=self.cache)
        return self.policy.logits(hidden_BH)

    def _record(self, width: int) -> None:
        pool = next(iter(self._recordings.values())).pool if self._recordings else None
        try:
            with torch.accelerator.device_index(self.policy.device.index):
                recording = self._backend.record(lambda: self._compute(width), pool=pool)
        except RuntimeError as error:
            log.warning(
                "rollouts: this model's decode steps cannot be recorded (%s); they are launched one kernel at a time, "
                "which is slower",
                (str(error).strip().splitlines() or [type(error).__name__])[0],
            )
            self._records = False
            self._recordings.clear()
            return
        self._recordings[width] = recording


class PagedRows(PageRows):
    """Rows of one session; see Rows in session.py."""

    def __init__(
        self,
        policy: Policy,
        steps: DecodeSteps,
        pages: Pages,
        budget: Budget,
        *,
        stop_ids: frozenset[int],
    ) -> None:
        num_embeddings = policy.causal_lm.get_input_embeddings().weight.shape[0]
        super().__init__(pages, budget, stop_ids=stop_ids, num_embeddings=num_embeddings)
        self._policy, self._steps = policy, steps
        self._session = steps.num_sessions
        self._logits_BV = torch.empty(0)

    def _require_its_pages(self) -> None:
        newest = self._steps.num_sessions
        assert newest == self._session, f"session {newest} has the pages of session {self._session}"

    def _prefill(self, prompts: list[list[int]], known: list[int], tables: list[list[int]]) -> None:
        self._require_its_pages()
        # What another row has computed already is computed once more, and what that row reads stays as it is.
        places = [
            (table[t // PAGE] if t >= start else self._steps.nowhere) * PAGE + t % PAGE
            for prompt, start, table in zip(prompts, known, tables, strict=True)
            for t in range(len(prompt))
        ]
        with eval_mode(self._policy):
            self._logits_BV = self._steps.prefill(prompts, places)

    def _draw(self, requests: list[Request], logits_row: list[int]) -> None:
        rows = torch.tensor(logits_row, device=self._logits_BV.device)
        draw_tokens(self._logits_BV[rows], requests, stop_ids=self._stop_ids)

    @torch.no_grad()
    def advance(self, scheduler: Scheduler, *, within_s: float | None) -> None:
        """The next tokens of every running row."""
        self._require_its_pages()
        is_plain = all(_is_plain(r) for r in scheduler.running)
        steps = self._most_steps(scheduler.running, within_s=within_s) if is_plain else 1
        steps = self._make_room(scheduler, steps=steps)
        requests = scheduler.running
        width = self._steps.place(requests, [self._pages_of[request] for request in requests])
        with eval_mode(self._policy):
            if is_plain:
                began = time.perf_counter()
                self._advance_plainly(requests, width, steps=steps)
                self._step_s = max(time.perf_counter() - began, 1e-6) / steps
            else:
                logits_BV = self._steps.logits(width)[: len(requests)]
                draw_tokens(logits_BV, requests, stop_ids=self._stop_ids)

    def _advance_plainly(self, requests: Sequence[Request], width: int, *, steps: int) -> None:
        """Several steps, of which the host sees the tokens at the end."""
        device, empty = self._policy.device, width - len(requests)
        uniforms = [r.uniforms.peek(steps) for r in requests] + [[0.0] * steps] * empty
        uniforms_SB = torch.tensor(uniforms, dtype=torch.float64).t().to(device)
        temperatures = [r.sampling.temperature for r in requests] + [1.0] * empty
        temperatures_B = torch.tensor(temperatures, device=device)
        is_greedy_B = temperatures_B == 0
        any_greedy = 0 in temperatures
        temperatures_B1 = temperatures_B.masked_fill(is_greedy_B, 1)[:, None]
        found = []
        for step in range(steps):
            logits_BV = self._steps.logits(width)
            best_B = logits_BV.argmax(1) if any_greedy else None
            token_B, logprob_B = inverse_cdf(logits_BV.div_(temperatures_B1), uniforms_SB[step])
            if best_B is not None:
                best_logprob_B = logits_BV.gather(1, best_B[:, None])[:, 0] - logits_BV.logsumexp(1)
                token_B = torch.where(is_greedy_B, best_B, token_B)
                logprob_B = torch.where(is_greedy_B, best_logprob_B.double(), logprob_B)
            found.append((token_B, logprob_B))
            self._steps.ids_B[:width] = token_B
            self._steps.positions_B[:width] += 1
        ids = torch.stack([token_B for token_B, _ in found], dim=1).tolist()
        logprobs = torch.stack([logprob_B for _, logprob_B in found], dim=1).tolist()
        for row, request in enumerate(requests):
            request.uniforms.take(steps)
            for token, logprob in zip(ids[row], logprobs[row], strict=True):
                if request.finish_reason is None:
                    request.add(token, logprob, stop_ids=self._stop_ids)


def _is_plain(request: Request) -> bool:
    """Whether its tokens can be drawn without the host, from the whole distribution."""
    s = request.sampling
    is_truncated = s.temperature > 0 and (s.top_k > 0 or s.top_p < 1 or s.min_p > 0)
    return not is_truncated and not needs_logits(request)


def _width_of(num_rows: int) -> int:
    """Rows of a step: few different numbers, since each has a recording of its own."""
    return 1 << (num_rows - 1).bit_length()


def _round_up(length: int) -> int:
    """A number at most a quarter larger, or 255, so that few sessions need more than those before."""
    step = max(256, _width_of(length) // 8)
    return -(-length // step) * step
