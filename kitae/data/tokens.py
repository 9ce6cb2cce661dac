"""Text to token ids such that nothing somebody wrote can become a control token.

A tokenizer turns the text `<|im_end|>` into the control token of that name wherever it stands, and its own switch
(`split_special_tokens`) leaves out added tokens that are not marked special, such as DeepSeek's roles and think tags.
Here text is searched for control tokens with the tokenizer itself; what it finds is encoded by the bare model beneath.
Text without any is encoded in one piece, so its ids are those of the plain tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from kitae.errors import ModelError

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
"""The only control tokens an assistant's text may contain."""

_PROBE = "\uff1cThink\uff1e e\u0301"
"""Text that a tokenizer which rewrites its input before it looks for control tokens would change."""

_MARK = 0xF0000
_MARKS = re.compile("[\U000f0000-\U000ffffd]")
"""Private-use characters that stand for cut-out text while a template is rendered."""


class TextEncoder:
    """Encodes and decodes with a Hugging Face fast tokenizer; `tokenizer` is Any because transformers is untyped."""

    def __init__(self, tokenizer: Any) -> None:
        core = getattr(tokenizer, "backend_tokenizer", None)
        if core is None:
            raise ModelError("the tokenizer has no tokenizer.json; convert it to a fast tokenizer first")
        core.no_truncation()
        core.no_padding()
        self._core = core
        self._bare = _without_added_tokens(core)
        added = {str(token): i for i, token in core.get_added_tokens_decoder().items()}
        self.control_ids = {literal: i for literal, i in added.items() if not literal.isspace()}
        """Added tokens by their text. White-space ones (code models have them) are text like any other."""
        self.tag_ids = {self.control_ids[tag] for tag in TAGS if tag in self.control_ids}
        self.ids = frozenset(self.control_ids.values())
        """Ids of all control tokens."""
        self._search = re.compile(
            "|".join(map(re.escape, sorted(self.control_ids, key=len, reverse=True))) or r"(?!)"
        )
        self._normalizes = core.normalizer is not None and core.normalizer.normalize_str(_PROBE) != _PROBE
        self._heads = {text[:n] for text in self.control_ids for n in range(2, len(text))}
        self._tails = {text[n:] for text in self.control_ids for n in range(1, len(text) - 1)}
        self._longest = max(map(len, self.control_ids), default=0)
        self._anchor = self._prefix_anchor()

    def encode_template(self, text: str) -> list[int]:
        """Ids of text a template wrote: control tokens are meant."""
        return list(self._core.encode(text, add_special_tokens=False).ids)

    def encode_text(self, text: str, *, allowed: Iterable[str] = ()) -> list[int]:
        """Ids of text somebody wrote: no control token but the allowed ones, and no space put before it."""
        marks = Marks(self)
        marked = marks.hide(text, allowed=allowed)
        return marks.encode(marked, is_start=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, think and answer tags included, every other control token left out."""
        shown = [i for i in ids if i not in self.ids or i in self.tag_ids]
        anchor = self._core.encode(self._anchor, add_special_tokens=False).ids if self._anchor else []
        text = str(self._core.decode([*anchor, *shown], skip_special_tokens=False))
        return text.removeprefix(self._anchor)

    def _prefix_anchor(self) -> str:
        """A line feed where the tokenizer puts a space before the start of a text (SentencePiece), else nothing."""
        alone, feed, after = (self.encode_template(text) for text in ("a", "\n", "\na"))
        return "" if feed + alone == after else "\n"

    def _spans(self, text: str, allowed: set[str]) -> list[tuple[int, int]]:
        """Where the tokenizer sees control tokens in a text."""
        if not self._normalizes and allowed.issuperset(self._search.findall(text)):
            return []
        refused = self.ids.difference(self.control_ids.get(literal, -1) for literal in allowed)
        found = self._core.encode(text, add_special_tokens=False)
        return [span for i, span in zip(found.ids, found.offsets, strict=True) if i in refused]

    def _edges(self, text: str) -> list[tuple[int, int]]:
        """Parts of control tokens at the ends of a text, which its neighbours could complete; also Marks' own marks."""
        spans = [m.span() for m in _MARKS.finditer(text)]
        lengths = range(2, min(self._longest, len(text) + 1))
        spans += [(len(text) - n, len(text)) for n in lengths if text[-n:] in self._heads]
        spans += [(0, n) for n in lengths if text[:n] in self._tails]
        return spans

    def _encode_bare(self, text: str) -> list[int]:
        """Ids of a piece that the tokenizer takes for a control token, by the model without added tokens."""
        skip = len(self._bare.encode(self._anchor, add_special_tokens=False).ids) if self._anchor else 0
        ids = list(self._bare.encode(self._anchor + text, add_special_tokens=False).ids)[skip:]
        if not self.ids.intersection(ids):
            return ids
        # The vocabulary itself holds the control token as an ordinary word: take it apart.
        if len(text) == 1:
            raise ModelError(f"the tokenizer has no ids for the text {text!r} other than a control token")
        half = len(text) // 2
        return self._encode_bare(text[:half]) + self._encode_bare(text[half:])


class Marks:
    """Cuts control tokens out of texts before a template sees them, and puts them back as plain text after.

    A template may strip, split or repeat what it is given; the one character that stands for a cut-out piece
    goes along with its neighbours.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._pieces: list[str] = []
        self.num_control = 0
        """How many whole control tokens were found in the texts."""

    def hide(self, text: str, *, allowed: Iterable[str] = ()) -> str:
        """The text with a private-use character for each control token in it."""
        parts, done = [], 0
        whole = self._encoder._spans(text, set(allowed))
        self.num_control += len(whole)
        for start, end in _disjoint(whole + self._encoder._edges(text)):
            parts += [text[done:start], chr(_MARK + len(self._pieces))]
            self._pieces.append(text[start:end])
            if len(self._pieces) > 0xFFFD:
                raise ModelError("one conversation holds more than 65,533 control tokens as text")
            done = end
        return "".join(parts) + text[done:] if parts else text

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """Ids of a text with marks; `is_start` lets a SentencePiece tokenizer put its space before it."""
        ids: list[int] = []
        done = 0
        for mark in [*_MARKS.finditer(text), None]:
            end = mark.start() if mark else len(text)
            if end > done:
                ids += self._continue(text[done:end], is_start=is_start and done == 0)
            if mark:
                ids += self._encoder._encode_bare(self._pieces[ord(mark.group()) - _MARK])
                done = mark.end()
        return ids

    def show(self, text: str) -> str:
        """The text with every mark replaced by what it stands for."""
        return _MARKS.sub(lambda mark: self._pieces[ord(mark.group()) - _MARK], text)

    def _continue(self, text: str, *, is_start: bool) -> list[int]:
        anchor = "" if is_start else self._encoder._anchor
        skip = len(self._encoder.encode_template(anchor)) if anchor else 0
        return self._encoder.encode_template(anchor + text)[skip:]


def _disjoint(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in order, those that touch or overlap made one."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return merged


def _without_added_tokens(core: Any) -> Any:
    """The same normalizer, pre-tokenizer and model, without the added tokens on top."""
    from tokenizers import Tokenizer

    bare = Tokenizer(core.model)
    if core.normalizer is not None:
        bare.normalizer = core.normalizer
    if core.pre_tokenizer is not None:
        bare.pre_tokenizer = core.pre_tokenizer
    return bare
