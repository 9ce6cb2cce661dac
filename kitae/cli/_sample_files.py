"""What kitae sample keeps beside its rows: the plan that its answers belong to, and the answers themselves.

OUTPUT                 the rows
OUTPUT.asked.jsonl     every answer (kitae.evaluate.answers.Asked)
OUTPUT.sampling.json   what was asked: the same plan goes on from there, another one is refused
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitae.cli._output import write_json
from kitae.errors import ConfigError, RunDirError

if TYPE_CHECKING:
    from kitae.evaluate.answers import Asked


def description_of(output: Path) -> Path:
    """Where it is written what was asked."""
    return output.with_name(f"{output.name}.sampling.json")


def asked_of(output: Path) -> Path:
    """Where every answer is."""
    return output.with_name(f"{output.name}.asked.jsonl")


def require_place(output: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written to, and files that are not ours."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(f"cannot make {output.parent} for the rows: {error.strerror or error}") from error
    if not os.access(output.parent, os.W_OK):
        raise RunDirError(f"{output.parent} cannot be written to; name another file with --output")
    if overwrite or description_of(output).exists():
        return
    asked = asked_of(output)
    for path in (output, asked):
        # An empty asked.jsonl is what a kill before the description leaves.
        if path.exists() and (path == output or path.stat().st_size > 0):
            raise RunDirError(
                f"{path} exists and was not written by kitae sample; name another file with --output, or add --overwrite"
            )


def begin(output: Path, plan: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Make sure that what is there belongs to this plan; returns what the description says."""
    import kitae
    from kitae.train.files import read_json
    from kitae.train.identity import differences

    description = description_of(output)
    if overwrite:  # the answers have gone already: they must not be found under another plan
        output.unlink(missing_ok=True)
        description.unlink(missing_ok=True)
    before = read_json(description)
    if before is None:
        started = {"kitae_version": kitae.__version__, "started": round(time.time(), 3), "plan": plan}
        write_json(description, {**started, "state": "asking"})
        return started
    differing = differences(before.get("plan", {}), plan)
    if differing:
        raise ConfigError(
            f"{description} belongs to another sampling than this one (then -> now: {'; '.join(differing)}); undo "
            "these changes, name another file with --output, or add --overwrite to begin anew"
        )
    return {name: before[name] for name in ("kitae_version", "started", "plan", "opened") if name in before}


def kept(asked: Asked) -> str:
    """What to say of the answers when the asking ends early."""
    return f"all {len(asked.places):,} answers so far are kept in {asked.path}; the same command again goes on from there"
