"""The shape of an answer in normalised text: a list, an assignment, a statement about two sides, or words."""

from __future__ import annotations

import re
from typing import NamedTuple

ASSIGNED = re.compile(
    r"(?:[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\([A-Za-z](?:, ?[A-Za-z])+\))\s*(?:=|\\in )\s*"
)
RELATION = re.compile(r"=|<|>|\\(?:le|ge|ne|lt|gt|approx|equiv|sim|in)(?![A-Za-z])")


def is_relation(text: str) -> bool:
    """Whether `text` says something about two sides, such as 6=5 or x<3, rather than naming a value."""
    return RELATION.search(text) is not None


def without_spaces(text: str) -> str:
    """The text without spaces, but for those between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def is_words(text: str) -> bool:
    """Whether `text` is a word or several rather than symbols: Tuesday, no solution; but not xy."""
    letters = text.replace(" ", "").replace("-", "").replace("'", "").replace(".", "")
    return letters.isalpha() and len(letters) >= (3 if letters.isascii() else 1)


def assigned_name(text: str) -> str:
    """What `assigned_value` takes off: "x" in "x = 5", "" where nothing is assigned."""
    value = assigned_value(text)
    return text[: len(text) - len(value)].rstrip("= ").removesuffix("\\in")


def assigned_value(text: str) -> str:
    """What a name is set to: "x = 5" -> "5", "f(x) = 2x" -> "2x"; any other text as it is."""
    match = ASSIGNED.match(text)
    if match is None or is_relation(text[match.end() :]):
        return text
    return text[match.end() :]


class Parts(NamedTuple):
    """A list's brackets and its parts; one part without brackets is no list."""

    opening: str
    closing: str
    parts: list[str]

    @property
    def is_ordered(self) -> bool:
        return self.opening in ("(", "[")


def as_list(text: str) -> Parts:
    r"""Cut at the commas, `and`, `or` and \cup that lie outside all brackets.

    Example: "(1, 2)" -> "(" ")" ["1", "2"]; r"\{1,2\}" -> r"\{" r"\}" ["1", "2"]; "x=1 or x=2" -> "" "" ["x=1", "x=2"].
    """
    for left, right in ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left):
            inner = text[len(left) : -len(right)]
            parts = _cut(inner, thousands=False)
            if parts is not None:
                return Parts(left, right, parts)
    parts = _cut(text, thousands=True)
    if parts is not None and len(parts) == 1 and text.count(r"\pm") == 1:
        parts = [text.replace(r"\pm", "").strip(), text.replace(r"\pm", "-").strip()]
    return Parts("", "", [text] if parts is None else parts)


SEPARATOR = re.compile(r"\\[{}]|[()\[\]{}]|,|;| and | or |\\cup(?![A-Za-z])|\\.")
THOUSANDS = re.compile(r",\d{3}(?!\d)")


def _cut(text: str, *, thousands: bool) -> list[str] | None:
    """The parts between top-level separators; None where brackets close that were never opened."""
    parts, start, depth = [], 0, 0
    for match in SEPARATOR.finditer(text):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and (token in (",", ";", " and ", " or ") or token == r"\cup"):
            at = match.start()
            if thousands and at and text[at - 1].isdigit() and THOUSANDS.match(text, at):
                continue
            parts.append(text[start:at].strip())
            start = match.end()
    return [part for part in (*parts, text[start:].strip()) if part]
