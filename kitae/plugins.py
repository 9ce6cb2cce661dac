"""From a name a user types to the thing it names: a file of a folder, `file.py:name`, or `package.module:name`.

There is no registry: adding a recipe, a reward or a model family is adding its file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kitae.errors import ConfigError


def names_in(package: str) -> list[str]:
    """Names of a package's public modules, read from its folder without importing them."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"{package!r} is not a package")
    folder = Path(next(iter(spec.submodule_search_locations)))
    return sorted(p.stem for p in folder.glob("*.py") if not p.stem.startswith("_"))


def names_model(name: str) -> bool:
    """Whether a name where functions and models may stand is a model's: a folder, a run, or a hub id."""
    if ":" in name or name.endswith(".py"):
        return False
    own = ("config.json", "adapter_config.json", "run.json")
    return "/" in name or any((Path(name) / file).is_file() for file in own)


def short_names(names: Iterable[str]) -> list[str]:
    """A name for metrics per reward: a function's own, a folder's last part; numbered where two are alike.

    Example: ["math", "mine.py:short", "yours.py:short", "runs/rm"] -> ["math", "short", "short_2", "rm"].
    """
    found: list[str] = []
    for name in names:
        short = Path(name).name if names_model(name) else name.rpartition(":")[2]
        count = 2
        unique = short
        while unique in found:
            unique, count = f"{short}_{count}", count + 1
        found.append(unique)
    return found


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A closing clause for "unknown name" errors: the nearest known name, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}"


def load(name: str, *, package: str, attribute: str, choices: Iterable[str] | None = None) -> Any:
    """Resolve `name` to an attribute: a built-in module of `package`, a file, or a dotted module.

    "math" is `package.math:attribute`; "my_file.py:my_reward" and "my_package.module:my_reward" name anything.
    The caller says what type it expects; this border is typed Any because it meets user code.
    """
    if ":" not in name:
        known = list(choices) if choices is not None else names_in(package)
        if name not in known:
            hint = did_you_mean(name, known)
            raise ConfigError(f"{name!r} is unknown; {hint} (or name your own as file.py:function)")
        return getattr(importlib.import_module(f"{package}.{name}"), attribute)
    where, _, attr = name.rpartition(":")
    module = _load_file(Path(where)) if where.endswith(".py") else _import(where)
    if not hasattr(module, attr):
        public = [n for n in vars(module) if not n.startswith("_")]
        raise ConfigError(f"{where} has no {attr!r}; {did_you_mean(attr, public)}")
    return getattr(module, attr)


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"cannot import {module!r} ({error}); a file is named with its .py: file.py:function"
        ) from error


def _load_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"no such file: {path}")
    name = f"kitae_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} failed while it was loaded: {type(error).__name__}: {error}") from error
    return module
