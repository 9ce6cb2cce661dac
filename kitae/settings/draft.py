"""Settings while they are gathered: what was given, by whom, and what is to be said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kitae.errors import ConfigError
from kitae.settings.fields import Setting


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value was given."""

    where: str
    """As the user wrote it: `--lr`, `run.toml line 3`, or the key of a dict."""
    rank: int
    """Higher wins: 0 the file, 1 flags or a dict."""
    is_foreign: bool = False
    """Given in another program's vocabulary: without effect it warns instead of stopping."""


@dataclass(frozen=True, kw_only=True)
class Given:
    value: Any  # whatever a flag, TOML or a dict can hold
    origin: Origin


@dataclass(kw_only=True)
class Draft:
    """Values by dotted name, foreign flags that only mean something together, and warnings."""

    command: str
    """A recipe, or a command such as evaluate."""
    world_size: int
    known: Mapping[str, Setting]
    values: dict[str, Given] = field(default_factory=dict)
    together: dict[str, Given] = field(default_factory=dict)
    """Foreign flags by their alias, for rules.py and rl_rules.py."""
    warnings: list[str] = field(default_factory=list)
    dtype_wish: tuple[str, str] | None = None
    """(flag, dtype): a precision asked for in another vocabulary, taken where the device is good at it."""

    def put(self, name: str, value: Any, origin: Origin) -> None:
        """Set one of our settings; two different values of the same rank contradict each other."""
        before = self.values.get(name)
        if before is not None and before.origin.rank > origin.rank:
            return
        if before is not None and before.origin.rank == origin.rank and _text(before.value) != _text(value):
            raise ConfigError(
                f"{name} is given twice: {before.origin.where} {_text(before.value)} and "
                f"{origin.where} {_text(value)}; keep one of them"
            )
        self.values[name] = Given(value=value, origin=origin)

    def put_together(self, name: str, value: Any, origin: Origin) -> None:
        """The same for a foreign flag whose meaning depends on others."""
        before = self.together.get(name)
        if before is None or before.origin.rank <= origin.rank:
            self.together[name] = Given(value=value, origin=origin)

    def put_default(self, name: str, value: Any, origin: Origin) -> None:
        """Set one of our settings to a derived value, which gives way to one that is given."""
        if not self.has(name):
            self.put(name, value, origin)

    def has(self, name: str) -> bool:
        return name in self.values

    def value(self, name: str) -> Any:
        """What is given for one of our settings, or its default."""
        return self.values[name].value if name in self.values else self.known[name].default

    def taken(self, *names: str) -> list[Given]:
        """Those of these foreign flags of `together` that are given."""
        return [self.together[name] for name in names if name in self.together]

    def number(self, name: str, default: int) -> int:
        """A foreign flag of `together` as a whole number."""
        if name not in self.together:
            return default
        given = self.together[name]
        return as_int(given.value, given.origin.where)

    def warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def origin_of(*given: Given) -> Origin:
    """The origin of a value derived from several flags."""
    where = " with ".join(dict.fromkeys(g.origin.where for g in given))
    return Origin(where=where, rank=max(g.origin.rank for g in given), is_foreign=True)


def as_int(value: Any, where: str) -> int:
    """A whole number of at least 1 from a flag or a dict."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{where} is {value!r}, which is not a whole number") from None
    if number < 1:
        raise ConfigError(f"{where} is {number}; it must be at least 1")
    return number


def as_bool(value: Any, where: str) -> bool:
    """True or false as people write it."""
    text = str(value).lower()
    if text in ("true", "yes", "on", "1", "t", "y"):
        return True
    if text in ("false", "no", "off", "0", "f", "n", "none"):
        return False
    raise ConfigError(f"{where} is {value!r}; it takes true or false")


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
