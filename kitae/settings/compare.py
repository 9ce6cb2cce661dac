"""What differs between two tables of settings, name by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; Any: JSON values."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in flat(item, f"{prefix}.{key}" if prefix else key).items()
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two flat tables by name, such as {"settings.train.seed": "train.seed 1 -> 2"}."""
    absent = "(absent)"
    return {
        name: f"{name.removeprefix('settings.')} {then.get(name, absent)} -> {now.get(name, absent)}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name, absent) != now.get(name, absent)
    }
