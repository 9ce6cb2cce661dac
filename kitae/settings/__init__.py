"""Settings from a TOML file, flags on top, or a dict: checked and explained before any weights are read.

    words or dict --aliases--> dotted names --rules--> one value each --pydantic--> Settings --checks--> (Settings, Notes)

Whatever vocabulary the user brings (docs/flags.md), a recipe sees only its own Settings.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from kitae.config import Section
from kitae.errors import ConfigError
from kitae.plugins import load
from kitae.settings import checks, idle
from kitae.settings.reader import YAML, Reader

__all__ = ["Notes", "fit_to_device", "read", "resolve", "settings_class", "without_effect"]

S = TypeVar("S", bound=Section)
PlaceOf = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What is to be said about how settings came to be."""

    warnings: list[str] = field(default_factory=list)
    """One line each, about flags of other programs that have no effect here."""
    origins: dict[str, str] = field(default_factory=dict)
    """Where each given setting was set: `--lr`, `run.toml line 3`, or a dict's key."""
    dtype_wish: tuple[str, str] | None = None
    """(flag, dtype) of --bf16 and its like: taken by fit_to_device where the device is good at it."""


def settings_class(recipe: str) -> type[Section]:
    """The Settings of kitae/recipes/<recipe>.py."""
    found: type[Section] = load(recipe, package="kitae.recipes", attribute="Settings")
    return found


def resolve(
    recipe: str,
    given: Sequence[str] | Mapping[str, Any],
    *,
    file: str | Path | None = None,
    world_size: int | None = None,
    place_of: PlaceOf = str,
) -> tuple[Any, Notes]:
    """The recipe's Settings (hence Any) from flags or a dict laid over a TOML file.

    `given` may hold one bare word ending in .toml or .yaml instead of `file`. `world_size` counts ranks, by default those
    that torchrun or kitae launch tell: other programs count batches per rank. `place_of` says where a dict's name is
    written, for messages.
    """
    root = settings_class(recipe)
    reader, alone = _gather(recipe, root, given, file=file, world_size=world_size, place_of=place_of)
    if alone:
        raise ConfigError(
            f"{alone[0]!r} belongs to no flag; a settings file ends in .toml or .yaml, and there is one at most"
        )
    settings = reader.validate()
    for problem in checks.contradictions(recipe, settings):
        raise ConfigError(reader.with_places(problem))
    draft = reader.draft
    for name, reason in idle.without_effect(draft, settings):
        origin = draft.values[name].origin
        if not origin.is_foreign:
            raise ConfigError(f"{name} ({origin.where}) would have no effect: {reason}; leave it out")
        draft.warn(f"{origin.where} has no effect: {reason}")
    return settings, _notes(reader)


def without_effect(recipe: str, given: Mapping[str, Any], *, world_size: int = 1) -> set[str]:
    """Those of our own settings in a dict, by dotted name, that the recipe would refuse because they change nothing."""
    root = settings_class(recipe)
    reader, _ = _gather(recipe, root, given, file=None, world_size=world_size)
    settings = reader.validate()
    return {name for name, _ in idle.without_effect(reader.draft, settings)}


def read(
    command: str,
    root: type[S],
    given: Sequence[str] | Mapping[str, Any],
    *,
    positional: Sequence[str] = (),
    place_of: PlaceOf = str,
) -> tuple[S, Notes]:
    """Settings of a command that is no recipe; bare words fill the `positional` settings in order.

    A list setting takes all words that are left. `place_of` is as in `resolve`.
    """
    reader, alone = _gather(command, root, given, file=None, world_size=1, place_of=place_of)
    for name in positional:
        if not alone:
            break
        value: Any = alone.pop(0)
        if reader.known[name].is_list:
            value, alone = [value, *alone], []
        reader.place_word(name, value)
    if alone:
        raise ConfigError(f"{alone[0]!r} belongs to no flag of kitae {command}; --help lists all")
    for name in positional:
        if reader.known[name].is_required and not reader.draft.has(name):
            usage = " ".join(word.upper() for word in positional)
            raise ConfigError(f"{name} is missing; usage: kitae {command} {usage} ...")
    settings: S = reader.validate()
    return settings, _notes(reader)


def fit_to_device(settings: Any, notes: Notes, *, is_good_at: bool, reason: str) -> tuple[Any, Notes]:
    """Grant a wish for a precision (notes.dtype_wish), or say by name that it has no effect on this device.

    `settings` is any recipe's (hence Any).
    """
    if notes.dtype_wish is None:
        return settings, notes
    flag, dtype = notes.dtype_wish
    if is_good_at:
        model = settings.model.model_copy(update={"dtype": dtype})
        return settings.model_copy(update={"model": model}), notes
    return settings, replace(
        notes, warnings=[*notes.warnings, f"{flag} has no effect: {reason}"], dtype_wish=None
    )


def _gather(
    command: str,
    root: type[Section],
    given: Sequence[str] | Mapping[str, Any],
    *,
    file: str | Path | None,
    world_size: int | None,
    place_of: PlaceOf = str,
) -> tuple[Reader, list[str]]:
    """A reader with everything placed, and the words that belong to no flag."""
    told = os.environ.get("WORLD_SIZE", "1")
    ranks = world_size if world_size is not None else int(told) if told.isdigit() else 1
    reader = Reader(command, root, world_size=ranks)
    alone: list[str] = []
    if isinstance(given, Mapping):
        items = list(reader.from_mapping(given, rank=1, place_of=place_of))
    else:
        words, named = _without_config(given)
        alone, items = reader.from_words(words)
        if alone and file is None and named is None and alone[0].endswith((".toml", *YAML)):
            named = alone.pop(0)
        file = named if file is None else file
    if file is not None:
        reader.read_file(Path(file))
    for name, value, origin in items:
        reader.place(name, value, origin)
    return reader, alone


def _without_config(given: Sequence[str]) -> tuple[list[str], str | None]:
    """The words without TRL's `--config FILE`, and the file."""
    for i, word in enumerate(given):
        if word == "--config" and i + 1 < len(given):
            return [*given[:i], *given[i + 2 :]], given[i + 1]
        if word.startswith("--config="):
            return [*given[:i], *given[i + 1 :]], word.partition("=")[2]
    return list(given), None


def _notes(reader: Reader) -> Notes:
    draft = reader.draft
    origins = {name: given.origin.where for name, given in draft.values.items()}
    return Notes(warnings=draft.warnings, origins=origins, dtype_wish=draft.dtype_wish)
