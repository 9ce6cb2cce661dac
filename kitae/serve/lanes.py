"""The models one server offers: a base, and adapters on it that stay unmerged and are chosen by name.

Adapters share the base's weights in memory. Requests of one adapter run side by side; between steps of different ones
the adapter is switched, which touches no weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kitae.errors import ConfigError, ModelError
from kitae.models import files
from kitae.models.lora import finish, without_peft_chatter
from kitae.rollout.session import Session
from kitae.types import Packing, Segment

if TYPE_CHECKING:
    from kitae.models.policy import Policy
    from kitae.rollout.choose import LocalEngine

SCORED_TOKENS = 4096
"""Prompt tokens scored in one pass, unless one prompt alone is longer."""
POSITIONS_PER_HEAD = 128
"""Positions whose logits exist at the same time."""


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One model that requests may name."""

    name: str
    policy: Policy
    open_session: Callable[[], Session]
    activate: Callable[[], None] = lambda: None
    """From here on the policy computes as this model."""
    parent: str | None = None
    """For an adapter, the name of its base."""


class TokenScore:
    """What the model says of one token of a text."""

    __slots__ = ("logprob", "top")

    def __init__(self, logprob: float, top: dict[int, float]) -> None:
        self.logprob, self.top = logprob, top


def make_lanes(
    policy: Policy,
    engine: LocalEngine,
    *,
    name: str,
    adapters: Mapping[str, Path],
    generic: Callable[[], LocalEngine],
) -> list[Lane]:
    """The base, which `engine` samples from, and its adapters, which need the policy itself: `generic` makes its engine."""
    if name in adapters:
        raise ConfigError(
            f"--adapter {name}: the model itself has this name; choose another, or set --served_model_name"
        )
    if not adapters:
        return [Lane(name=name, policy=policy, open_session=engine.open_session)]
    if policy.peft is not None:
        raise ConfigError(
            "--adapter: the model is an adapter itself; serve its base, and name both as --adapter"
        )
    engine.sync()  # an engine with weights of its own takes the base's before any adapter lies on it
    wrapper = _put_on(policy, adapters)
    plain = generic()
    switch = _Switch(wrapper, next(iter(adapters)))
    base = Lane(name=name, policy=policy, open_session=engine.open_session, activate=partial(switch.to, None))
    lanes = [
        Lane(
            name=adapter,
            policy=policy,
            open_session=plain.open_session,
            activate=partial(switch.to, adapter),
            parent=name,
        )
        for adapter in adapters
    ]
    return [base, *lanes]


def _put_on(policy: Policy, adapters: Mapping[str, Path]) -> Any:
    """peft's wrapper with all adapters on it; a typed Any because peft is untyped."""
    from peft import PeftModel

    wrapper: Any = None
    for name, folder in adapters.items():
        _check(name, folder)
        try:
            with without_peft_chatter():
                if wrapper is None:
                    wrapper = PeftModel.from_pretrained(
                        policy.causal_lm, folder, adapter_name=name, autocast_adapter_dtype=False
                    )
                # For the first adapter too: only this tells what found no place.
                loaded = wrapper.load_adapter(folder, name, is_trainable=False, autocast_adapter_dtype=False)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"--adapter {name}: {folder} does not fit this model: {reason[:500]}") from error
        _require_all_in_place(name, folder, loaded)
    finish(policy.causal_lm, policy.dtype)
    policy.causal_lm.requires_grad_(False)
    policy.causal_lm.eval()
    return wrapper


def _require_all_in_place(name: str, folder: Path, loaded: Any) -> None:
    """Refuse an adapter of a deeper or shallower model, which peft loads in part; `loaded` is what it says of that."""
    own = re.compile(rf"\.lora_\w+\.{re.escape(name)}(\.|$)")
    left_over = list(loaded.unexpected_keys)
    missing = [key for key in loaded.missing_keys if own.search(key)]
    if left_over or missing:
        raise ModelError(
            f"--adapter {name}: {folder} does not fit this model: {len(left_over)} of its tensors have no place there and "
            f"{len(missing)} are missing, such as {(left_over or missing)[0]}"
        )


def _check(name: str, folder: Path) -> None:
    if "." in name or "/" in name:
        raise ConfigError(f"--adapter {name}: a name cannot hold a dot or a slash")
    if hasattr(torch.nn.ModuleDict(), name):  # peft keeps adapters in one, by name
        raise ConfigError(f"--adapter {name}: torch has this word for itself; choose another name")
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"--adapter {name}: {folder} has no adapter_config.json, so it is no adapter")
    own = files.read_json(folder / "adapter_config.json")
    if own.get("bias", "none") != "none":
        raise ModelError(
            f"--adapter {name}: it was trained with lora.bias {own['bias']}, which changes the base; merge it with kitae "
            "export merge and serve the result"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"--adapter {name}: {folder} has no adapter_model.safetensors")


class _Switch:
    """Which adapter the policy computes with; None is the base."""

    def __init__(self, wrapper: Any, active: str) -> None:
        self._wrapper = wrapper
        self._active: str | None = active

    def to(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        if adapter is None:
            self._wrapper.base_model.disable_adapter_layers()
        else:
            if self._active is None:
                self._wrapper.base_model.enable_adapter_layers()
            self._wrapper.set_adapter(adapter, inference_mode=True)
        self._active = adapter


def score(
    policy: Policy, texts: Sequence[Sequence[int]], *, num_top: int
) -> Iterator[list[list[TokenScore | None]]]:
    """How likely each token of each text is after those before it, and its `num_top` likeliest rivals; None for the first.

    Texts come in their order, some with each pass. The numbers are the model's own, at temperature 1.
    """
    start = 0
    while start < len(texts):
        end, size = start + 1, len(texts[start])
        while end < len(texts) and size + len(texts[end]) <= SCORED_TOKENS:
            size += len(texts[end])
            end += 1
        yield _score_pass(policy, texts[start:end], num_top)
        start = end


@torch.no_grad()
def _score_pass(
    policy: Policy, texts: Sequence[Sequence[int]], num_top: int
) -> list[list[TokenScore | None]]:
    device = policy.device
    starts = [sum(map(len, texts[:i])) for i in range(len(texts))]
    packing = Packing(
        segments=[Segment(start, len(text)) for start, text in zip(starts, texts, strict=True)],
        num_tokens=sum(map(len, texts)),
    )
    ids_T = torch.tensor([token for text in texts for token in text], device=device)
    positions_T = torch.cat([torch.arange(len(text), device=device) for text in texts])
    hidden_TH = policy.hidden(ids_T, positions_T, packing)
    scores: list[TokenScore] = []
    for first in range(0, len(ids_T) - 1, POSITIONS_PER_HEAD):
        here = slice(first, min(first + POSITIONS_PER_HEAD, len(ids_T) - 1))
        logprobs_NV = policy.logits(hidden_TH[here]).log_softmax(-1)
        next_N = ids_T[here.start + 1 : here.stop + 1]
        chosen = logprobs_NV.gather(1, next_N[:, None])[:, 0].tolist()
        top = logprobs_NV.topk(min(num_top, logprobs_NV.shape[1]))
        rows = zip(chosen, top.indices.tolist(), top.values.tolist(), strict=True)
        scores += [TokenScore(value, dict(zip(ids, values, strict=True))) for value, ids, values in rows]
    return [[None, *scores[start : start + len(text) - 1]] for start, text in zip(starts, texts, strict=True)]
