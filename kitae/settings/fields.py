"""The dotted names of a recipe's settings, with type, default and docstring; no values of a run."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from kitae.config import Section

_FLAT_SECTIONS = ("data", "train", "optim", "rollout", "grpo", "dpo", "simpo", "kto", "orpo", "ppo", "model")
_NEVER_FLAT = ("name",)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One leaf of the settings tree."""

    name: str
    """Dotted name, such as optim.learning_rate."""
    annotation: Any
    """The field's type, as pydantic has it (a typing object, hence Any)."""
    default: Any
    """What it is when nobody sets it (any value a field can have); None for required settings too."""
    is_required: bool
    doc: str

    @property
    def alternatives(self) -> tuple[Any, ...]:
        """The members of a union, or the type alone."""
        is_union = get_origin(self.annotation) in (Union, types.UnionType)
        return get_args(self.annotation) if is_union else (self.annotation,)

    @property
    def is_switch(self) -> bool:
        """Whether its flag may stand alone, which is true."""
        return bool in self.alternatives

    @property
    def words(self) -> frozenset[str]:
        """The words it takes, beside numbers, texts, true and false."""
        return frozenset(str(w) for t in self.alternatives if get_origin(t) is Literal for w in get_args(t))

    @property
    def is_list(self) -> bool:
        return any(get_origin(t) is list for t in self.alternatives)

    @property
    def is_table(self) -> bool:
        return get_origin(self.annotation) is dict

    @property
    def type_text(self) -> str:
        """The type as a reader wants it: `adamw | adafactor`, `whole number`, `list of text`."""
        return " | ".join(_describe(t) for t in self.alternatives)


def settings_of(root: type[Section]) -> dict[str, Setting]:
    """Every leaf of a settings class by dotted name, in the order of the source."""
    found: dict[str, Setting] = {}
    _collect(root, prefix="", defaults=None, into=found)
    return found


def sections_of(root: type[Section], *, prefix: str = "") -> dict[str, type[Section]]:
    """Every section below a settings class by dotted name."""
    found: dict[str, type[Section]] = {}
    for name, field in root.model_fields.items():
        section = _as_section(field.annotation)
        if section is not None:
            found[prefix + name] = section
            found |= sections_of(section, prefix=f"{prefix}{name}.")
    return found


def flat_names(known: Mapping[str, Setting]) -> dict[str, str]:
    """Field names that may be written without their section, because only one section has them."""
    owners: dict[str, list[str]] = {}
    for dotted in known:
        section, _, leaf = dotted.rpartition(".")
        if section in _FLAT_SECTIONS and leaf not in _NEVER_FLAT:
            owners.setdefault(leaf, []).append(dotted)
    sections = {dotted.split(".")[0] for dotted in known if "." in dotted}
    return {
        leaf: dotted[0]
        for leaf, dotted in owners.items()
        if len(dotted) == 1 and leaf not in sections and leaf not in known
    }


def _collect(root: type[Section], *, prefix: str, defaults: Section | None, into: dict[str, Setting]) -> None:
    for name, field in root.model_fields.items():
        default = (
            getattr(defaults, name)
            if defaults is not None
            else field.get_default(call_default_factory=True, validated_data={})
        )
        section = _as_section(field.annotation)
        if section is not None:
            inner = default if isinstance(default, Section) else None
            _collect(section, prefix=f"{prefix}{name}.", defaults=inner, into=into)
            continue
        is_missing = default is PydanticUndefined
        into[prefix + name] = Setting(
            name=prefix + name,
            annotation=field.annotation,
            default=None if is_missing else default,
            is_required=is_missing,
            doc=field.description or "",
        )


def _as_section(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is list:
        return f"list of {_describe(args[0])}"
    if origin is dict:
        return f"table of {_describe(args[1])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true | false", type(None): "none"}
    return names.get(annotation, str(annotation))
