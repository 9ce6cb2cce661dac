"""Answers held to a JSON schema: schema --compile, in a thread of its own--> Form --start--> one Constraint a completion.

The library llguidance turns a schema into the set of tokens that may come next. What a client can make it do is bounded:
the schema's size here, everything else by the library's own limits, so that neither compiling nor a step can hang.
Where a model thinks first, the form begins after `</think>`; an answer can end only once its form is complete.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kitae.data.tokens import TAGS
from kitae.errors import DataError
from kitae.rollout.constraint import Constraint
from kitae.serve.refusals import Refusal
from kitae.serve.tokens import TokenTexts

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Thinking = Literal["none", "may", "must"]
"""Whether the answer begins inside a `<think>` block (must), may open one (may), or has none."""
MAX_SCHEMA_BYTES = 1 << 16
KEPT_FORMS = 32
"""Compiled schemas that are kept for the next request with the same one."""
LIMITS: dict[str, Any] = {"step_max_items": 20_000, "max_lexer_states": 25_000, "max_grammar_size": 200_000}
"""Of the library: a step takes some tens of milliseconds at the worst, and a completion's state some tens of MB."""
WHITE_SPACE = r"[ ]|\n[ \t]{0,32}"
"""Between the parts of JSON: one space, or a line feed and an indent. Without a bound a model may go on with it for ever."""
GRAMMARS: dict[Thinking, str] = {
    "none": "start: %json ",
    "must": 'start: thought /[ \\n]{0,4}/ json\nthought[suffix="</think>"]: /(?s:.*)/\njson: %json ',
    "may": 'start: ("<think>" thought /[ \\n]{0,4}/)? json\nthought[suffix="</think>"]: /(?s:.*)/\njson: %json ',
}
"""In the library's dialect of Lark."""


class Forms:
    """Compiles schemas for one tokenizer."""

    def __init__(self, texts: TokenTexts, *, stop_ids: Collection[int]) -> None:
        self._texts, self._stop_ids = texts, sorted(stop_ids)
        # One thread: a second schema waits, and what is kept needs no lock.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kitae-schema")
        self._tokenizer: LLTokenizer | None = None
        self._kept: dict[tuple[str, Thinking], LLMatcher] = {}

    async def compile(self, schema: dict[str, Any], *, thinking: Thinking) -> Callable[[], Constraint]:
        """What makes the constraint of each completion; a Refusal where the schema cannot be followed."""
        try:
            text = json.dumps(schema)
        except RecursionError as error:  # Python reads JSON a little deeper than it writes it from here
            raise _refusal("the schema is nested too deeply") from error
        if len(text) > MAX_SCHEMA_BYTES:
            raise _refusal(f"the schema has {len(text):,} bytes; {MAX_SCHEMA_BYTES:,} are allowed")
        loop = asyncio.get_running_loop()
        form = await loop.run_in_executor(self._thread, self._compiled, schema, text, thinking)
        return lambda: JsonConstraint(form.deep_copy())

    def _compiled(self, schema: dict[str, Any], text: str, thinking: Thinking) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ModuleNotFoundError as error:
            raise _refusal(
                "response_format needs the package llguidance on the server; run: pip install 'kitae[serve]'"
            ) from error
        found = self._kept.pop((text, thinking), None)
        if found is None:
            options = {"whitespace_pattern": WHITE_SPACE, "lenient": False}
            own = json.dumps(schema | {"x-guidance": options})
            found = LLMatcher(
                self._tokens(),
                GRAMMARS[thinking] + own,
                log_level=0,
                limits=LLParserLimits(verbose_errors=False, **LIMITS),
            )
            if not found.is_error():
                found.compute_bitmask()  # a schema that leaves no first token is found out here
            if found.is_error():
                raise _refusal(f"the schema cannot be followed: {_first_line(found)}")
        self._kept[text, thinking] = found
        if len(self._kept) > KEPT_FORMS:
            del self._kept[next(iter(self._kept))]
        return found

    def _tokens(self) -> LLTokenizer:
        if self._tokenizer is None:
            from llguidance import LLTokenizer, TokenizerWrapper

            known = _Vocabulary(self._texts, self._stop_ids)
            slices = LLTokenizer.json_slices()
            self._tokenizer = LLTokenizer(
                TokenizerWrapper(known), n_vocab=len(known.tokens), eos_token=known.ends, slices=slices
            )
        return self._tokenizer


class _Vocabulary:
    """The tokenizer as the library reads it. Control tokens are no text, but for the think and answer tags."""

    bos_token_id = None

    def __init__(self, texts: TokenTexts, stop_ids: list[int]) -> None:
        size = max(texts.ids) + 1
        self.tokens = [texts.bytes(i) for i in range(size)]
        self.special_token_ids = sorted(texts.control_ids)
        self.ends = stop_ids
        if not stop_ids:  # a tokenizer without end token: an id beyond it stands for the end
            self.tokens.append(b"<end>")
            self.special_token_ids.append(size)
            self.ends = [size]
        self.eos_token_id = self.ends[0]
        self._encode = texts.encode

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("text is wanted")  # the library asks which of the two it may send
        return self._encode(text)


class JsonConstraint:
    """One completion on its way through a schema; see Constraint."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self.failure: Exception | None = None

    def mask_(self, logits_V: Tensor) -> None:
        """See Constraint. After a failure nothing is masked."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            self._fail(_first_line(self._matcher))
        if self.failure is not None:
            return
        bytes_M = torch.frombuffer(bytearray(bits), dtype=torch.uint8).to(logits_V.device)
        may_come = (bytes_M[:, None] >> torch.arange(8, device=logits_V.device) & 1).bool().flatten()
        size = min(len(may_come), len(logits_V))
        if not may_come[:size].any():
            self._fail("no token of this model's vocabulary goes on in it")
            return
        logits_V[:size].masked_fill_(~may_come[:size], -torch.inf)
        logits_V[size:] = -torch.inf

    def accept(self, token: int) -> bool:
        """See Constraint."""
        if self.failure is None and not self._matcher.consume_token(token):
            self._fail(_first_line(self._matcher))
        return self.failure is not None or self._matcher.is_stopped()

    def _fail(self, reason: str) -> None:
        self.failure = DataError(f"response_format: the schema could not be followed to the end: {reason}")


def asks_to_think(prefill: str, *, thinks: bool | None, texts: TokenTexts) -> Thinking:
    """How an answer begins after a prompt that ends with `prefill`; `thinks` is what the request says of it."""
    if "</think>" in prefill:
        return "none"
    if "<think>" in prefill:
        return "must"
    return "may" if thinks is not False and set(TAGS[:2]) <= texts.added else "none"


def _first_line(matcher: LLMatcher) -> str:
    return str(matcher.get_error()).partition("\n")[0][:500]


def _refusal(message: str) -> Refusal:
    return Refusal(message, param="response_format")
