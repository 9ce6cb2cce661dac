"""Model families as data: what is known, and tested, about an architecture. Adding a family is adding its file."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from kitae.plugins import names_in


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What kitae knows of a group of architectures; every other fact is read from the model itself."""

    name: str
    model_types: tuple[str, ...]
    """`model_type` values of config.json that belong to it."""
    is_tested: bool = True
    """The test suite proves its seams equal to the plain module; other families are compared when loaded."""


GENERIC = Family(name="generic", model_types=(), is_tested=False)
"""Any causal language model that transformers knows and no family names."""


def find_family(model_type: str) -> Family:
    """The family whose file lists `model_type`, or GENERIC."""
    for name in names_in(__name__):
        family: Family = importlib.import_module(f"{__name__}.{name}").FAMILY
        if model_type in family.model_types:
            return family
    return GENERIC
