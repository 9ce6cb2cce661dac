"""Train a model: kitae train sft|dpo|grpo|... [run.toml] [--flags]; kitae train --help lists all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kitae.cli import _help
from kitae.cli._imports import read_all
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean, names_in
from kitae.settings import Notes, fit_to_device, resolve, settings_class


def main(argv: list[str]) -> int:
    """Resolve settings and run the recipe."""
    recipes = names_in("kitae.recipes")
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview(recipes))
        return 0
    recipe, words = argv[0], argv[1:]
    if recipe not in recipes:
        raise ConfigError(f"{recipe!r} is no recipe; {did_you_mean(recipe, recipes)}")
    if _help.is_asked(words):
        _help.show(settings_class(recipe), prog=f"kitae train {recipe} [run.toml]", after=_AFTER)
        return 0
    start(recipe, words, prepare=read_all)
    return 0


def start(
    recipe: str,
    given: Sequence[str] | Mapping[str, Any],
    *,
    file: str | Path | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Path:
    """Train, and return the run's folder. Wrong settings are refused before `prepare`, and before torch is imported."""
    settings, notes = resolve(recipe, given, file=file)
    prepare()
    settings, notes = _fitted(settings, notes)

    from kitae.recipes._run import run_recipe

    return run_recipe(recipe, settings, notes=notes.warnings)


def _fitted(settings: Any, notes: Notes) -> tuple[Any, Notes]:
    """Settings of any recipe, with a precision that was wished for where the device is good at it."""
    if notes.dtype_wish is None:
        return settings, notes
    from kitae.backends import pick

    dtype = notes.dtype_wish[1]
    backend = pick(settings.model.device)
    if backend.name != "cpu":
        backend.prepare()  # as in start_world, which comes after this
    is_good_at, reason = backend.supports("bfloat16" if dtype == "bfloat16" else "float16")
    return fit_to_device(settings, notes, is_good_at=is_good_at, reason=reason)


_AFTER = (
    "A settings file holds the same names as tables. Flags and YAML files of transformers, TRL, "
    "Colossal-AI and LLaMA-Factory are understood too: docs/flags.md."
)


def _overview(recipes: list[str]) -> str:
    width = max(map(len, recipes))
    lines = [f"  {name:<{width}}  {(settings_class(name).__doc__ or '').strip()}" for name in recipes]
    return "\n".join(
        [
            "usage: kitae train RECIPE [run.toml] [--section.name VALUE ...]",
            "",
            *lines,
            "",
            "kitae train RECIPE --help lists every setting. " + _AFTER,
        ]
    )
