"""What a peft LoRA adapter (arXiv:2106.09685) does to each tensor of its base: W + scale B A, or a tensor in its place.

Names are matched with the base's own, for single linears and experts; a fused adapter of experts, A (E R, in) and
B (out, R E) with the expert fastest, also serves a base whose experts lie one by one.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from kitae.errors import ModelError
from kitae.export.fp8 import require_finite
from kitae.export.weights import Stored, entries, read_stored
from kitae.models import files

PREFIX = "base_model.model."
OTHER_MEANING = (
    "use_dora", "use_qalora", "use_bdlora", "layer_replication", "alora_invocation_tokens", "trainable_token_indices",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
"""Settings of peft under which B A is not the whole change."""
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""init_lora_weights that leave the base as it was."""
FUSED_FROM = {
    "gate_up_proj": ((".mlp.", ("gate_proj", "up_proj")), (".block_sparse_moe.", ("w1", "w3"))),
    "down_proj": ((".mlp.", ("down_proj",)), (".block_sparse_moe.", ("w2",))),
}
"""Fused parameters, and what files call the single experts that they are made of."""
HEAD = "lm_head.weight"
SHOWN = 3
CACHED = 4
"""Matrices of fused experts kept at a time: those of the layer at hand."""

Matrices = Callable[[int], tuple[Tensor, Tensor]]
"""A [R, in] and B [out, R] in float32 of an expert; what is not fused has expert 0 only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """One product to be added to a tensor of the base."""

    matrices: Matrices
    scale: float
    expert: int | None = None
    """Which of a fused adapter's experts a tensor of one expert is; None where the tensor holds all of them."""
    first_row: int = 0
    """Row of B that belongs to the tensor's first: up_proj follows gate_proj."""
    is_transposed: bool = False

    def open(self, *, is_fused: bool) -> Callable[[Tensor, int], None]:
        """A function that adds to rows in float32, of which the first is row `start` of the tensor.

        A row of an `is_fused` tensor is an expert.
        """
        if is_fused:

            def add_to_experts(x: Tensor, start: int) -> None:
                for i in range(len(x)):
                    a, b = self.matrices(start + i)
                    x[i].addmm_(b, a, alpha=self.scale)

            return add_to_experts
        a, b = self.matrices(self.expert or 0)
        if self.is_transposed:  # (B A)^T = A^T B^T
            a, b = b.t(), a.t()

        def add(x: Tensor, start: int) -> None:
            first = self.first_row + start
            x.addmm_(b[first : first + len(x)], a, alpha=self.scale)

        return add


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """All that an adapter does to one tensor of the base."""

    low_rank: list[LowRank] = field(default_factory=list)
    bias: list[tuple[Stored, float]] = field(default_factory=list)
    """Vectors to be added, each with its scale: biases of B."""
    instead: Stored | None = None
    """A tensor that takes its place."""

    def open(self, *, is_fused: bool) -> Callable[[Tensor, int], Tensor]:
        """What becomes of float32 rows, of which the first is row `start` of the tensor."""
        adders = [low.open(is_fused=is_fused) for low in self.low_rank]

        def changed(before: Tensor, start: int) -> Tensor:
            stop = start + len(before)
            if self.instead is not None:
                x = require_finite(read_stored(self.instead, start, stop).float(), name=self.instead.name)
            else:
                x = before.clone()
            for add in adders:
                add(x, start)
            for bias, scale in self.bias:
                x.add_(read_stored(bias, start, stop).float(), alpha=scale)
            return x

        return changed


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter folder, matched with its base."""

    folder: Path
    config: dict[str, Any]
    changes: dict[str, Change]
    """By the base's names."""
    is_trained: bool
    """Whether some B is not zero, or a tensor is replaced."""
    is_head_tied: bool
    """Whether a head that shares the embeddings' weights follows them."""


def read_adapter(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> Adapter:
    """Match every tensor of an adapter with one of the base, by name and shape; those without a place are refused.

    `shapes` are those of the base's tensors, a tied head's too.
    """
    config = files.read_json(folder / "adapter_config.json")
    _check_config(folder, config)
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"{folder} has no adapter_model.safetensors; save the adapter with peft's save_pretrained"
        )
    stored = {entry.name: entry for entry in entries(weights)}
    matcher = _Matcher(config, stored, dict(shapes))
    changes = matcher.match()
    if matcher.misfits:
        shown = "; ".join(matcher.misfits[:SHOWN])
        more = f"; and {len(matcher.misfits) - SHOWN} more" if len(matcher.misfits) > SHOWN else ""
        raise ModelError(
            f"the adapter {folder} does not fit this base; without a place there: {shown}{more}; name the model it was "
            "trained on with --base"
        )
    is_tied = bool(config.get("ensure_weight_tying")) and HEAD not in changes
    is_trained = any(
        _parts(name)[1] in ("", "lora_B", "lora_embedding_B") and bool(read_stored(entry).count_nonzero())
        for name, entry in stored.items()
    )
    return Adapter(folder=folder, config=config, changes=changes, is_trained=is_trained, is_head_tied=is_tied)


def _check_config(folder: Path, config: dict[str, Any]) -> None:
    where = f"{folder}/adapter_config.json"
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{where} has peft_type {config.get('peft_type')!r}; kitae merges LORA adapters")
    if config.get("task_type") == "SEQ_CLS":
        raise ModelError(f"{where} is of a model that gives scores (SEQ_CLS); kitae merges language models")
    other = [name for name in OTHER_MEANING if config.get(name)]
    if other:
        raise ModelError(f"{where} has {other[0]}, which kitae does not merge; use peft's merge_and_unload")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ModelError(
            f"{where} has init_lora_weights {start!r}, which changes the base's weights; save it as a plain LoRA "
            "first, with peft's path_initial_model_for_weight_conversion"
        )


class _Matcher:
    """Takes an adapter's tensors one by one, until none is left or what is left is known not to fit."""

    def __init__(
        self, config: dict[str, Any], stored: dict[str, Stored], known: dict[str, tuple[int, ...]]
    ) -> None:
        self._config, self._stored, self._known = config, stored, known
        self._changes: dict[str, Change] = {}
        self._by_expert = functools.lru_cache(maxsize=CACHED)(_by_expert)
        self.misfits: list[str] = []

    def match(self) -> dict[str, Change]:
        left = dict(self._stored)
        for name in list(left):
            place, kind, _ = _parts(name)
            if kind in ("lora_A", "lora_embedding_A"):
                partner = name.replace(kind, kind[:-1] + "B")
                if partner in left:
                    self._low_rank(place, left.pop(name), left.pop(partner), is_embedding="embedding" in kind)
        for name, stored in left.items():
            place, kind, rest = _parts(name)
            if kind == "lora_B" and rest == "bias":
                self._bias(f"{place}.bias", place, stored)
            elif kind:
                self._misfit(stored, "its partner is missing")
            else:
                self._replace(place, stored)
        return self._changes

    def _low_rank(self, place: str, a: Stored, b: Stored, *, is_embedding: bool) -> None:
        weight = f"{place}.weight"
        if weight in self._known and len(self._known[weight]) == 2:
            rank = a.shape[0]
            out, into = (b.shape[0], a.shape[1])
            is_transposed = is_embedding or bool(self._config.get("fan_in_fan_out"))
            wanted = (into, out) if is_transposed else (out, into)
            if wanted != self._known[weight] or b.shape[1] != rank:
                self._misfit(a, f"B A is {list(wanted)}, {weight} is {list(self._known[weight])}")
                return
            self._change(weight).low_rank.append(
                LowRank(
                    matrices=_Plain(a, b), scale=self._scale(place, weight, rank), is_transposed=is_transposed
                )
            )
            return
        if not self._experts(place, a, b):
            self._misfit(a, f"the base has no {weight}, nor experts of these shapes there")

    def _experts(self, place: str, a: Stored, b: Stored) -> bool:
        """Fused experts under `place`: which parameter it is, is told by the shapes, not by the name."""
        for parameter, layouts in FUSED_FROM.items():
            fused = f"{place}.{parameter}"
            for where, names in layouts:
                found = self._layout(fused, place.replace(".mlp.", where), names)
                if found is None:
                    continue
                count, out, into, pieces = found
                if (a.shape[1], b.shape[0]) != (into, out) or a.shape[0] != b.shape[1] or a.shape[0] % count:
                    continue
                matrices, rank = _Fused(a, b, count, self._by_expert), a.shape[0] // count
                for name, (expert, first) in pieces.items():
                    self._change(name).low_rank.append(
                        LowRank(
                            matrices=matrices,
                            scale=self._scale(place, fused, rank),
                            expert=expert,
                            first_row=first,
                        )
                    )
                return True
        return False

    def _layout(
        self, fused: str, place: str, names: tuple[str, ...]
    ) -> tuple[int, int, int, dict[str, tuple[int | None, int]]] | None:
        """(experts, out, in, {name: (expert, first row)}) of a fused parameter as the base stores it."""
        known = self._known
        if len(known.get(fused, ())) == 3:
            count, out, into = known[fused]
            return count, out, into, {fused: (None, 0)}
        shapes = [known.get(f"{place}.0.{name}.weight", ()) for name in names]
        if not all(len(shape) == 2 for shape in shapes):
            return None
        pieces: dict[str, tuple[int | None, int]] = {}
        count = 0
        while all(known.get(f"{place}.{count}.{n}.weight") == s for n, s in zip(names, shapes, strict=True)):
            first = 0
            for name, shape in zip(names, shapes, strict=True):
                pieces[f"{place}.{count}.{name}.weight"] = (count, first)
                first += shape[0]
            count += 1
        return count, sum(shape[0] for shape in shapes), shapes[0][1], pieces

    def _bias(self, name: str, place: str, stored: Stored) -> None:
        if self._known.get(name) != stored.shape:
            self._misfit(stored, f"the base has no {name} of its shape")
            return
        partner = next(n for n in self._stored if _parts(n)[:2] == (place, "lora_A"))
        scale = self._scale(place, f"{place}.weight", self._stored[partner].shape[0])
        self._change(name).bias.append((stored, scale))

    def _replace(self, name: str, stored: Stored) -> None:
        if self._known.get(name) != stored.shape:
            there = self._known.get(name)
            self._misfit(stored, f"the base has {f'it as {list(there)}' if there else f'no {name}'}")
            return
        self._changes[name] = Change(
            low_rank=self._change(name).low_rank, bias=self._change(name).bias, instead=stored
        )

    def _change(self, name: str) -> Change:
        return self._changes.setdefault(name, Change())

    def _misfit(self, stored: Stored, why: str) -> None:
        self.misfits.append(f"{stored.name} {list(stored.shape)} ({why})")

    def _scale(self, module: str, parameter: str, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv:2312.03732), of the pattern that matches the place."""
        targets = self._config.get("target_parameters") or []
        is_parameter = any(f".{parameter}".endswith(f".{target}") for target in targets)
        patterns = self._config.get("alpha_pattern") or {}
        place = parameter if is_parameter else module
        matching = (key for key in patterns if re.fullmatch(rf"(.*\.)?({key})", place))
        alpha = float(patterns.get(next(matching, ""), self._config.get("lora_alpha", 8)))
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank)


def _parts(name: str) -> tuple[str, str, str]:
    """(place in the base, kind of LoRA tensor or "", rest); peft's wrappers inside each other are taken out.

    Example: base_model.model.model.layers.1.mlp.experts.base_layer.lora_A.weight -> (model.layers.1.mlp.experts,
    lora_A, weight).
    """
    plain = name.removeprefix(PREFIX).replace(".base_layer", "").replace(".modules_to_save", "")
    found = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.(.+))?", plain)
    return (found[1], found[2], found[3] or "") if found else (plain, "", "")


def _matrix(stored: Stored) -> Tensor:
    return require_finite(read_stored(stored).float(), name=stored.name)


class _Plain:
    """A and B of one linear, read when they are needed."""

    def __init__(self, a: Stored, b: Stored) -> None:
        self._a, self._b = a, b

    def __call__(self, expert: int) -> tuple[Tensor, Tensor]:
        return _matrix(self._a), _matrix(self._b)


class _Fused:
    """A and B of one layer's experts, laid out by expert; those last used are kept by `by_expert`."""

    def __init__(
        self,
        a: Stored,
        b: Stored,
        count: int,
        by_expert: Callable[[Stored, Stored, int], tuple[Tensor, Tensor]],
    ) -> None:
        self._a, self._b, self._count, self._by_expert = a, b, count, by_expert

    def __call__(self, expert: int) -> tuple[Tensor, Tensor]:
        a_ERI, b_EOR = self._by_expert(self._a, self._b, self._count)
        return a_ERI[expert], b_EOR[expert]


def _by_expert(a: Stored, b: Stored, count: int) -> tuple[Tensor, Tensor]:
    a_ERI, b_ORE = _matrix(a), _matrix(b)
    b_EOR = b_ORE.view(b.shape[0], -1, count).permute(2, 0, 1).contiguous()
    return a_ERI.view(count, -1, a.shape[1]), b_EOR
