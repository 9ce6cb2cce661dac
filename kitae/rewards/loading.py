"""From the reward a user names to a function that can be called for one completion.

A reward takes the completion and, by keyword, the prompt, the gold answer and the data row's other columns.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae import plugins
from kitae.config import RewardSettings
from kitae.errors import ConfigError
from kitae.types import Score

RewardFn = Callable[..., "float | Score | None"]

SIGNATURE = "reward(completion, *, prompt, answer, **columns)"
OPTIONS = ("form", "strict_form")


@dataclass(frozen=True)
class Reward:
    """A reward function, and what the pool must know about it."""

    name: str
    function: RewardFn
    is_builtin: bool
    accepts: frozenset[str] | None
    """Keyword arguments the function takes; None where it takes all (**columns)."""
    options: dict[str, Any]
    """Settings the function asks for by name: form, strict_form."""
    out_of_budget: float | None
    """What a completion earns that exhausts its time or memory; None: it could not be scored."""

    def __call__(
        self, completion: str, /, *, prompt: str, answer: str | None, **columns: Any
    ) -> float | Score | None:
        columns.pop("completion", None)
        given = {**columns, **self.options, "prompt": prompt, "answer": answer}
        if self.accepts is not None:
            given = {name: value for name, value in given.items() if name in self.accepts}
        return self.function(completion, **given)


def builtin_names() -> list[str]:
    """The files of this package that define `reward`, found without importing them."""
    folder = Path(__file__).parent
    return [name for name in plugins.names_in(__package__) if _defines_reward(folder / f"{name}.py")]


def load_reward(settings: RewardSettings) -> Reward:
    """Find the function a setting names and check its signature.

    A file may set OUT_OF_BUDGET beside its reward: what a completion earns whose judging exhausts its time.
    """
    name = settings.function
    function = plugins.load(name, package=__package__, attribute="reward", choices=builtin_names())
    accepts = _check_signature(function, name)
    parameters = inspect.signature(function).parameters
    module = sys.modules.get(getattr(function, "__module__", ""))
    return Reward(
        name=name,
        function=function,
        is_builtin=":" not in name,
        accepts=accepts,
        options={option: getattr(settings, option) for option in OPTIONS if option in parameters},
        out_of_budget=getattr(module, "OUT_OF_BUDGET", None),
    )


def _defines_reward(path: Path) -> bool:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(isinstance(node, ast.FunctionDef) and node.name == "reward" for node in body)


def _check_signature(function: object, name: str) -> frozenset[str] | None:
    """Refuse what cannot be called as SIGNATURE; return the keywords accepted, None for all."""
    where = f"reward.function {name}"
    if not callable(function):
        raise ConfigError(f"{where} is a {type(function).__name__}, not a function; it must be {SIGNATURE}")
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"{where} is async; write it as a plain function {SIGNATURE}")
    parameters = list(inspect.signature(function).parameters.values())
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes_all = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)
    keywords = frozenset(p.name for p in parameters[1:] if p.kind in by_keyword)
    is_positional = bool(parameters) and parameters[0].kind in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    if not is_positional or parameters[0].name != "completion":
        raise ConfigError(
            f"{where} takes {inspect.signature(function)}; its first parameter must be the text of one completion "
            f"and be called completion: {SIGNATURE}"
        )
    missing = {"prompt", "answer"} - keywords
    if missing and not takes_all:
        raise ConfigError(
            f"{where} takes {inspect.signature(function)} but not {' and '.join(sorted(missing))}; "
            f"it must be {SIGNATURE}"
        )
    return None if takes_all else keywords
