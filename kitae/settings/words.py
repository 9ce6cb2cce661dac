"""From the words of a command line to (flag, values), and the marks that pasting from a web page leaves."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from kitae.errors import ConfigError

_TRUTH = {"true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"}
_DASHES = "\u2014\u2013\u2212\u2012\u2015"
_DOUBLE = "\u201c\u201d\u201e\u00ab\u00bb"
_SINGLE = "\u2018\u2019\u201a"
_NUMBER = re.compile(r"-\d*\.?\d+(e[-+]?\d+)?$", re.IGNORECASE)


@dataclass
class Flag:
    """A flag as it was typed, with the words that follow it."""

    spelling: str
    values: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """`--learning-rate` and `--learning_rate` are learning_rate; a short flag keeps its dash: `-g`."""
        if self.spelling.startswith("--"):
            return self.spelling[2:].replace("-", "_")
        return self.spelling


def split(
    words: Sequence[str], *, switch_words: Callable[[Flag], Collection[str] | None]
) -> tuple[list[str], list[Flag]]:
    """Words that stand alone, and flags with their values.

    `switch_words` is None for a flag that needs a value. A switch takes a following word only if it is true, false or one of
    these, so that `--resume run.toml` works.
    """
    refuse_pasted_marks(words)
    alone: list[str] = []
    flags: list[Flag] = []
    for word in words:
        if word.startswith("-") and word != "-" and not _NUMBER.match(word):
            spelling, equals, value = word.partition("=")
            flags.append(Flag(spelling, [value] if equals else []))
            is_closed = bool(equals)
        elif not flags or is_closed or not _takes(flags[-1], word, switch_words(flags[-1])):
            alone.append(word)
        else:
            flags[-1].values.append(word)
    return alone, flags


def _takes(flag: Flag, word: str, switch_words: Collection[str] | None) -> bool:
    return switch_words is None or (not flag.values and word.lower() in {*_TRUTH, *switch_words})


def refuse_pasted_marks(words: Sequence[str]) -> None:
    """Text pasted from a page: an em dash for `--`, `\\_` for `_`, curly quotes. Shows the corrected line."""
    faults: list[str] = []
    corrected: list[str] = []
    for word in words:
        fixed = word
        if len(word) > 1 and word[0] in _DASHES and (word[1].isalpha() or word[1] in _DASHES + "-"):
            fixed = "--" + fixed.lstrip(_DASHES + "-")
            faults.append(f"{word[0]!r} (U+{ord(word[0]):04X}) for '--' in {word!r}")
        is_text = any(c.isspace() for c in word)
        if "\\_" in word and not is_text:
            fixed = fixed.replace("\\_", "_")
            faults.append(f"'\\_' for '_' in {word!r}")
        if not is_text and any(mark in (word[0], word[-1]) for mark in _DOUBLE + _SINGLE if word):
            fixed = re.sub(f"[{_DOUBLE}]", '"', re.sub(f"[{_SINGLE}]", "'", fixed))
            faults.append(f"a curly quote in {word!r}")
            corrected.append(fixed)
        else:
            corrected.append(shlex.quote(fixed))
    if faults:
        raise ConfigError(
            f"the command line was pasted from formatted text: {'; '.join(faults)}; "
            f"corrected: {' '.join(corrected)}"
        )
