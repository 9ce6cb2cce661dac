"""The checkpoints of one run: what belongs to them, and the one a resumed run goes on from.

checkpoint.py knows how one lies on the disk; here stands which, when there is room for it, and whether it is this run's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from kitae.errors import CheckpointError
from kitae.parallel.world import World
from kitae.train import checkpoint
from kitae.train.files import disk_errors
from kitae.train.identity import differences, identity

logger = logging.getLogger(__name__)

Counted = Callable[[], checkpoint.State]


class Part(Protocol):
    """Something whose state belongs to a checkpoint: nested dicts and lists of tensors and JSON values."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class Checkpointer:
    """Saves a run's parts with what the run itself counts, and gives them back. All ranks call it together."""

    def __init__(self, output_dir: Path, *, settings: Mapping[str, Any], world: World) -> None:
        """`settings` are the run's resolved settings as JSON values."""
        self.folder = output_dir / "checkpoints"
        self.facts: dict[str, Any] = {}
        """What must be equal when the run is resumed, beside settings and machine."""
        self.last: int | None = None
        """The step of the newest checkpoint."""
        self._output_dir, self._settings, self._world = output_dir, settings, world
        self._parts: dict[str, Part] = {}
        self._grows_by = 0

    def track(self, name: str, part: Part, *, grows_by: int) -> None:
        """See Run.track."""
        assert name not in self._parts, f"two parts are called {name}"
        self._parts[name] = part
        self._grows_by += grows_by

    # saving ------------------------------------------------------------------------------------------------------

    def require_space(self, counted: Counted, *, is_grown: bool) -> None:
        """Refuse a disk too small for checkpoints; `is_grown`: the parts are as large as they will be."""
        checkpoint.require_space(
            self._output_dir,
            self._snapshot(counted),
            world=self._world,
            grows_by=0 if is_grown else self._grows_by,
            is_one_kept=self.last is not None,
        )

    def save(self, step: int, counted: Counted) -> Path:
        """Write a checkpoint; `counted` gives the run's own state."""
        path = checkpoint.save(
            self.folder,
            step=step,
            state=self._snapshot(counted),
            identity=self._identity(),
            world=self._world,
        )
        self.last = step
        return path

    def prune(self, *, keep: int, pinned: list[int]) -> None:
        """Remove all but the newest `keep`, and those of the steps `pinned`."""
        if self._world.is_main:
            with disk_errors(self.folder):
                checkpoint.prune(self.folder, keep=keep, pinned=pinned)

    def _identity(self) -> dict[str, Any]:
        return identity(settings=self._settings, facts=self.facts, world=self._world)

    def _snapshot(self, counted: Counted) -> checkpoint.State:
        """Everything the run goes on from: the parts, the random generators, and what the run counts."""
        return {
            "parts": {name: part.state() for name, part in self._parts.items()},
            "random": checkpoint.random_state(self._world.device),
            "run": counted(),
        }

    # restoring ---------------------------------------------------------------------------------------------------

    def newest(self) -> tuple[checkpoint.Loaded | None, list[str]]:
        """The newest whole checkpoint, None where nothing was ever saved; and what is wrong with newer ones."""
        if self._world.is_main:
            with disk_errors(self.folder):
                checkpoint.sweep(self.folder)
        loaded, skipped = checkpoint.load_newest(self.folder, world=self._world)
        for line in skipped:
            logger.warning("skipped a damaged checkpoint: %s", line)
        if loaded is None and self.last is not None:
            raise CheckpointError(
                f"status.json says that step {self.last} was saved, but {self.folder} holds no "
                "checkpoint; restore one from a backup, or start anew with --overwrite"
            )
        return loaded, skipped

    def compare(self, loaded: checkpoint.Loaded, *, allow_inexact: bool) -> list[str]:
        """How the run that wrote it differs: settings, data, machine. An error, unless the user said it may."""
        differing = differences(loaded.identity, self._identity())
        if not differing:
            return []
        text = "; ".join(differing)
        ranks = loaded.identity["machine"]["world_size"]
        if ranks != self._world.world_size:
            raise CheckpointError(
                f"{loaded.path} was written by {ranks} processes, one file each, and can only be resumed by as many, "
                f"not by {self._world.world_size} (then -> now: {text})"
            )
        if not allow_inexact:
            raise CheckpointError(
                f"{loaded.path} belongs to another run than this one (then -> now: {text}); undo these changes, "
                "or add --allow_inexact to go on all the same (the run is then marked)"
            )
        logger.warning("resuming inexactly at step %d (then -> now: %s)", loaded.step, text)
        return differing

    def restore(self, loaded: checkpoint.Loaded) -> checkpoint.State:
        """Put the parts and the random generators into its state, and return what the run counted."""
        self._load_parts(loaded)
        checkpoint.restore_random_state(loaded.state["random"], device=self._world.device)
        self.last = loaded.step
        counted: checkpoint.State = loaded.state["run"]
        return counted

    def load_parts_of(self, step: int) -> None:
        """Put the parts into the state of an earlier step."""
        self._load_parts(checkpoint.read(self.folder / checkpoint.name_of(step), rank=self._world.rank))

    def set_aside(self, *, newer_than: int) -> None:
        """Move checkpoints out of the way that were skipped."""
        if self._world.is_main:
            with disk_errors(self.folder):
                checkpoint.set_aside(self.folder, newer_than=newer_than)

    def _load_parts(self, loaded: checkpoint.Loaded) -> None:
        saved = loaded.state["parts"]
        if set(saved) != set(self._parts):
            raise CheckpointError(
                f"{loaded.path} holds {', '.join(sorted(saved))}, but this run consists of "
                f"{', '.join(sorted(self._parts))}; resume it with the recipe that wrote it"
            )
        for name, part in self._parts.items():
            part.load_state(saved[name])
