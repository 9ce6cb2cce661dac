"""A user's own loss in place of a recipe's: loaded from file.py:function, checked before the run and at its first step.

    loss(out, weights_N, *, <streams and numbers it needs>, <settings with defaults>) -> (sum, {metric: sum})

The contract with worked examples is docs/recipes/custom-losses.md.
"""

from __future__ import annotations

import hashlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae import backends, plugins
from kitae.algos.losses import LossFn, LossOutput
from kitae.errors import ConfigError, KitaeError
from kitae.types import TokenOutputs

ENTROPY = "entropy"
"""A loss that takes this keyword gets the entropies [N], which are computed for it."""

RESERVED = {"loss", "entropy", "grad_norm", "learning_rate", "skipped", "loss_scale"}
"""Metrics of a step that the Learner reports by itself."""


def chosen_loss(name: str, *, default: LossFn, produces: Sequence[str]) -> LossFn:
    """The loss that the setting `loss` names; the recipe's own (`default`) where it is empty.

    `produces` are the streams and numbers this run has. A function that needs another one is refused.
    """
    if not name:
        return default
    if ":" not in name:
        raise ConfigError(f"loss is {name!r}; name your own function as file.py:function")
    function = plugins.load(name, package="", attribute="")
    if not callable(function):
        raise ConfigError(f"loss is {name}, which is a {type(function).__name__} and no function")
    asked = _asked(name, function, known=[*produces, ENTROPY])
    return _Own(name, function, asked=asked)


def fingerprint(name: str) -> str | None:
    """A hash of the file of `file.py:function`, None for anything else: a run is only resumed with the same text."""
    path = Path(name.rpartition(":")[0]).expanduser()
    is_file = path.suffix == ".py" and path.is_file()
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if is_file else None


class _Own:
    """A user's function that gets only what it asks for, and whose first result is checked."""

    def __init__(self, name: str, function: Callable[..., Any], *, asked: Sequence[str]) -> None:
        self._name, self._function = name, function
        self._streams = [stream for stream in asked if stream != ENTROPY]
        self.needs_entropy = ENTROPY in asked
        """Read by the Learner: whether out.entropy_N is to be computed."""
        self._is_checked = False

    def __call__(self, out: TokenOutputs, weights_N: Tensor, **given: Tensor) -> LossOutput:
        streams = {stream: given[stream] for stream in self._streams if stream in given}
        if not self._is_checked:
            self._require_sum(out, weights_N, streams)
            self._is_checked = True
        return self._call(out, weights_N, streams)

    def _call(self, out: TokenOutputs, weights_N: Tensor, streams: Mapping[str, Tensor]) -> LossOutput:
        entropy = {ENTROPY: out.entropy_N} if self.needs_entropy else {}
        try:
            result = self._function(out, weights_N, **streams, **entropy)
        except Exception as error:
            if isinstance(error, KitaeError) or backends.is_out_of_memory(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            own_file = getattr(getattr(self._function, "__code__", None), "co_filename", "")
            line = [*frames[-1:], *(frame for frame in frames if frame.filename == own_file)][-1]
            raise ConfigError(
                f"loss {self._name} failed at {line.filename}:{line.lineno}: {type(error).__name__}: {error}"
            ) from error
        self._require_contract(result)
        loss, metrics = result
        return loss, {key: value.detach() for key, value in metrics.items()}

    def _require_contract(self, result: Any) -> None:
        def refuse(what: str) -> None:
            raise ConfigError(f"loss {self._name} {what}; return (sum, {{metric: sum}}), as in its page")

        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
            refuse(f"returned {_described(result)}")
        loss, metrics = result
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            refuse(f"returned {_described(loss)} as its sum, which must be one number in a tensor")
        if not loss.requires_grad:
            refuse("returned a sum without a gradient: it must depend on out, undetached")
        if taken := sorted(RESERVED & set(metrics)):
            refuse(f"returned a metric {taken[0]!r}, a name the learner has already")
        for key, value in metrics.items():
            if not isinstance(value, Tensor) or value.dim() != 0:
                refuse(
                    f"returned {_described(value)} as metric {key!r}, which must be one number in a tensor"
                )

    def _require_sum(self, out: TokenOutputs, weights_N: Tensor, streams: Mapping[str, Tensor]) -> None:
        """Every row twice must give every prediction the gradient it had: so does a sum, but no mean."""
        size = len(weights_N)
        once, gradients = self._gradients(out, weights_N, streams)
        doubled = {name: torch.cat((value, value)) for name, value in streams.items()}
        twice, their_gradients = self._gradients(_doubled(out), torch.cat((weights_N, weights_N)), doubled)
        for own, theirs in zip(gradients, their_gradients, strict=True):
            largest = float(own.abs().max()) if len(own) else 0.0
            if not torch.allclose(own, theirs[:size], rtol=1e-3, atol=1e-4 * largest, equal_nan=True):
                raise ConfigError(
                    f"loss {self._name} is not a sum: with every row twice it is {twice:.4g} and with every row once "
                    f"{once:.4g}, and a token's gradient changes; return the sum over tokens times weights_N (or over "
                    "rows), the recipe divides"
                )

    def _gradients(
        self, out: TokenOutputs, weights_N: Tensor, streams: Mapping[str, Tensor]
    ) -> tuple[float, list[Tensor]]:
        """The loss, and its derivatives by what the model said."""
        said = ("logprobs_N", "entropy_N", "values_N", "divergence_N")
        leaves = {
            name: value.detach().requires_grad_()
            for name in said
            if (value := getattr(out, name)) is not None and len(value)
        }
        with torch.enable_grad():
            loss, _ = self._call(out._replace(**leaves), weights_N, streams)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        zeros = (torch.zeros_like(value) for value in leaves.values())
        return float(loss.detach()), [zero if g is None else g for g, zero in zip(found, zeros, strict=True)]


def _asked(name: str, function: Callable[..., Any], *, known: Sequence[str]) -> list[str]:
    """The streams and numbers a function takes by keyword; one that cannot be called is refused."""
    parameters = list(inspect.signature(function).parameters.values())
    first, rest = parameters[:2], parameters[2:]
    if len(first) < 2 or any(p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in first):
        raise ConfigError(
            f"loss {name} must take (out, weights_N, *, ...), not {inspect.signature(function)}"
        )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in rest)
    for parameter in rest:
        is_keyword = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if is_keyword and parameter.default is parameter.empty and parameter.name not in known:
            raise ConfigError(
                f"loss {name} needs {parameter.name!r}, which this run does not produce; it produces "
                f"{', '.join(known)} ({plugins.did_you_mean(parameter.name, known)})"
            )
    names = [p.name for p in rest]
    return [stream for stream in known if stream in names or (takes_all and stream != ENTROPY)]


def _doubled(out: TokenOutputs) -> TokenOutputs:
    """The same rows twice."""
    # Any: _replace takes tensors and one number.
    twice: dict[str, Any] = {
        name: torch.cat((value, value)) for name, value in out._asdict().items() if isinstance(value, Tensor)
    }
    row_N = None if out.row_N is None else torch.cat((out.row_N, out.row_N + out.num_rows))
    return out._replace(**twice | {"row_N": row_N, "num_rows": 2 * out.num_rows})


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, tuple) else "")
