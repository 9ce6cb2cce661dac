"""Results as JSON files, for every command that prints one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kitae.errors import RunDirError
from kitae.train.files import write_atomic


def write_json(path: str | Path, result: Mapping[str, Any]) -> None:
    """Write a result under its name only when it is complete."""
    target = Path(path)
    text = json.dumps(result, ensure_ascii=False, indent=2)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, text.encode("utf-8") + b"\n")
    except OSError as error:
        raise RunDirError(f"cannot write the result to {target}: {error.strerror or error}") from error
