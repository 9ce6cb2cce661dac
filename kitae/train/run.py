"""A run: its directory, lock, log, metrics, progress, signals, evaluations and checkpoints.

    with Run.open(output_dir, config=..., ...) as run:      # refuses what cannot work, before any weights are read
        run.identify(data_hash=...)                         # facts that must be equal when the run is resumed
        run.track("learner", learner)                       # parts with state() and load_state()
        for step in run.steps(total, evaluate=...):         # resumes, evaluates, saves, stops
            ...
            run.log(step, metrics)
        run.finish(save)                                    # the final model, at the top of the directory

What happens after the body of a step, in this order: metrics, evaluation, line, checkpoint, stop.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from rich.console import Console

import kitae
from kitae import errors
from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.errors import CheckpointError, ConfigError, KitaeError, RunDirError, StoppedError
from kitae.parallel.world import World
from kitae.train import checkpoint, folder
from kitae.train.files import JsonLines, disk_errors, read_json, sync_folder, sync_tree, write_json
from kitae.train.logs import RunLog
from kitae.train.metrics import Metrics, Window, open_metrics, require_writers
from kitae.train.progress import ProgressView, duration, summary
from kitae.train.resources import ResourceMonitor
from kitae.train.stop import SIGNALS, StopSignals

logger = logging.getLogger(__name__)

UNCOMPARED = ("output_dir", "resume", "overwrite", "allow_inexact", "save", "log", "eval")
"""Settings that may differ on resume: they change where and what is written, not the numbers."""
PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors")
STATUS_INTERVAL_S = 1.0


class Part(Protocol):
    """Something whose state belongs to a checkpoint: nested dicts and lists of tensors and JSON values."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class Best:
    """The best evaluation so far, and how many came after it."""

    def __init__(self, *, metric: str, mode: str) -> None:
        self.metric = metric
        if mode == "auto":
            mode = "max" if metric.endswith(("accuracy", "reward", "format_rate")) else "min"
        self._sign = 1.0 if mode == "max" else -1.0
        self.value: float | None = None
        self.step = 0
        self.evaluations_since = 0

    def see(self, step: int, results: Mapping[str, float]) -> bool:
        """Whether this evaluation is the best; NaN never is."""
        value = results[self.metric]
        if self.value is None and value == value or self.value is not None and self._sign * (value - self.value) > 0:
            self.value, self.step, self.evaluations_since = value, step, 0
            return True
        self.evaluations_since += 1
        return False

    def state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "evaluations_since": self.evaluations_since}

    def load_state(self, state: dict[str, Any]) -> None:
        self.value, self.step = state["value"], state["step"]
        self.evaluations_since = state["evaluations_since"]


class Run:
    """One run in one directory; made by Run.open, used as a context manager. Every rank has one, rank 0 writes."""

    def __init__(
        self,
        output_dir: Path,
        *,
        config: Mapping[str, Any],
        recipe: str,
        world: World,
        save: SaveSettings,
        evaluation: EvalSettings,
        log: LogSettings,
        patience: int,
        resume: bool,
        allow_inexact: bool,
        lock: folder.Lock | None,
    ) -> None:
        """Not for callers: Run.open has checked and locked the directory."""
        self.output_dir = output_dir
        self.world = world
        self.step = 0
        self.total = 0
        self._config, self._recipe = config, recipe
        self._save, self._evaluation, self._log = save, evaluation, log
        self._patience, self._resume, self._allow_inexact = patience, resume, allow_inexact
        self._lock = lock
        self._parts: dict[str, Part] = {}
        self._facts: dict[str, Any] = {}
        self._window, self._current = Window(), dict[str, float]()
        self._best = Best(metric=save.metric, mode=save.metric_mode)
        self._inexact: list[str] = []
        self._last_checkpoint: int | None = None
        self._elapsed_s, self._started = 0.0, time.monotonic()
        self._status_due = 0.0
        self._state = "starting"
        self._progress: ProgressView | None = None

        before = (read_json(output_dir / "status.json") or {}) if world.is_main else None
        before = world.broadcast_json(before)
        self.is_finished: bool = resume and not allow_inexact and before.get("state") == "finished"
        """Resumed, but the run is complete: there is nothing to do. steps() and finish() then do nothing."""
        self._checkpoint_before: int | None = before.get("checkpoint") if resume else None

        self._console = Console(stderr=True, quiet=not world.is_main)
        self._logs = RunLog(output_dir if world.is_main else None, level=log.level, console=self._console)
        self._signals = StopSignals(says=world.is_main, at_once=self._leave_at_once)
        self._signals.install()
        if world.is_main:
            self._open_files(before)

    # ------------------------------------------------------------------------------------------ opening

    @classmethod
    def open(
        cls,
        output_dir: str | Path,
        *,
        config: Mapping[str, Any],
        recipe: str = "",
        world: World | None = None,
        save: SaveSettings | None = None,
        evaluation: EvalSettings | None = None,
        log: LogSettings | None = None,
        early_stopping_patience: int = 0,
        resume: bool = False,
        overwrite: bool = False,
        allow_inexact: bool = False,
        checkpoint_bytes: int = 0,
    ) -> Run:
        """Check the directory, lock it, and start its log. Nothing that existed is overwritten.

        `config` is the resolved settings as JSON values (config.as_json); they go to run.json and are compared on
        resume. `checkpoint_bytes` is the estimated size of one checkpoint: a disk with less than 2.2 times that is
        refused at once; without it the disk is checked before the first step. The same error is raised on all ranks.
        """
        world = world or World()
        log = log or LogSettings()
        path = Path(os.path.abspath(os.path.expanduser(output_dir)))
        require_writers(log)
        lock, problem = None, None
        if world.is_main:
            model = config.get("model")
            try:
                lock = folder.claim(
                    path,
                    resume=resume,
                    overwrite=overwrite,
                    checkpoint_bytes=checkpoint_bytes,
                    model=model.get("name_or_path") if isinstance(model, Mapping) else None,
                )
            except KitaeError as error:
                problem = [type(error).__name__, str(error)]
        problem = world.broadcast_json(problem)
        if problem is not None:
            name, text = problem
            raise getattr(errors, name)(text)
        return cls(
            path,
            config=config,
            recipe=recipe,
            world=world,
            save=save or SaveSettings(),
            evaluation=evaluation or EvalSettings(),
            log=log,
            patience=early_stopping_patience,
            resume=resume,
            allow_inexact=allow_inexact,
            lock=lock,
        )

    def _open_files(self, before: Mapping[str, Any]) -> None:
        where = self.output_dir
        described = read_json(where / "run.json") or {}
        self._run_id = described.get("run_id") or uuid.uuid4().hex[:12]
        self._inexact_before: list[str] = list(described.get("inexact", [])) if self._resume else []
        self._name = self._log.run_name or where.name
        self._started_at = described.get("started") if self._resume else None
        self._started_at = self._started_at or round(time.time(), 3)
        self._events = JsonLines(where / "events.jsonl")
        self._samples = JsonLines(where / "samples.jsonl")
        if self.is_finished:
            self.step = self.total = int(before.get("step", 0))
            self._metrics: Metrics | None = None
            self._resources: ResourceMonitor | None = None
            return
        with disk_errors(where):
            (where / "exit.json").unlink(missing_ok=True)
            self._describe()
        self._metrics = open_metrics(
            where, settings=self._log, name=self._name, run_id=self._run_id, config=dict(self._config)
        )
        self._resources = ResourceMonitor(where / "resources.jsonl")
        folder.leave_pointer(where, recipe=self._recipe)
        self.event("resumed" if self._resume else "started", pid=os.getpid(), host=socket.gethostname())
        self._write_status("starting")

    def _describe(self) -> None:
        """run.json: what this run is, with the settings it finally used."""
        write_json(
            self.output_dir / "run.json",
            {
                "kitae_version": kitae.__version__,
                "run_id": self._run_id,
                "name": self._name,
                "recipe": self._recipe,
                "started": self._started_at,
                "settings": dict(self._config),
                "facts": self._facts,
                "machine": self._machine(),
                "versions": _versions(),
                "inexact": self._inexact_before + self._inexact,
            },
        )

    def _machine(self) -> dict[str, Any]:
        """What the bits of a result depend on besides settings and data."""
        device = self.world.device
        kind = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else device.type
        return {
            "world_size": self.world.world_size,
            "threads": torch.get_num_threads(),
            "device": kind,
            "torch": torch.__version__,
        }

    def identify(self, **facts: str | int | float | None) -> None:
        """Facts that must be equal when the run is resumed, such as data_hash and the template's fingerprint."""
        self._facts |= facts
        if self.world.is_main and not self.is_finished:
            with disk_errors(self.output_dir):
                self._describe()

    def track(self, name: str, part: Part) -> None:
        """Make `part` belong to the run's checkpoints. All parts are tracked before steps() begins."""
        assert self._state == "starting", f"{name} was tracked after the first step"
        assert name not in self._parts, f"two parts are called {name}"
        self._parts[name] = part

    # ------------------------------------------------------------------------------------------ stepping

    def steps(self, total: int, *, evaluate: Callable[[], dict[str, float]] | None = None) -> Iterator[int]:
        """The numbers of the steps to take, from 1 (or behind the checkpoint) to `total`.

        Between two of them the run evaluates, saves, and stops on a signal (StoppedError) or by early stopping.
        `evaluate` returns metrics by name, the same on all ranks; it is called on all ranks together.
        """
        if self._save.final == "best" and evaluate is None:
            raise ConfigError("save.final is best, but the run has no evaluation data; give data.eval, or final = last")
        if self._patience and (evaluate is None or not self._evaluation.steps):
            raise ConfigError(
                f"train.early_stopping_patience is {self._patience}, but the run does not evaluate while it trains; "
                "set eval.steps and evaluation data, or patience 0"
            )
        return self._steps(total, evaluate)

    def _steps(self, total: int, evaluate: Callable[[], dict[str, float]] | None) -> Iterator[int]:
        if self.is_finished:
            logger.info("already finished at step %d: nothing to do in %s", self.step, self.output_dir)
            return
        self.total = total
        is_resumed = self._restore()
        checkpoint.require_space(self.output_dir, self._snapshot(0), world=self.world)
        if self.world.is_main:
            title = self._recipe or "train"
            self._progress = ProgressView(total=total, done=self.step, title=title, console=self._console)
        self._write_status("running")
        self._signals.is_deferring = True
        self._started = time.monotonic()
        if not is_resumed and self._evaluation.at_start and evaluate is not None:
            self._end_of_step(0, evaluate)
        while self.step < total and not self._is_patience_over():
            step = self.step + 1
            began = time.monotonic()
            yield step
            self._current.setdefault("time/step_s", time.monotonic() - began)
            self.step = step
            self._end_of_step(step, evaluate)
        self._close_progress()

    def _end_of_step(self, step: int, evaluate: Callable[[], dict[str, float]] | None) -> None:
        is_last = step == self.total
        self._window.add(self._current)
        shown, self._current = self._current, {}

        results: dict[str, float] = {}
        if evaluate is not None and (step == 0 or is_last or _is_due(step, self._evaluation.steps)):
            results = self.world.broadcast_json(evaluate())
            self._window.add(results)
        is_best = bool(results) and self._judge(step, results)
        is_last = is_last or self._is_patience_over()
        if results or is_last or _is_due(step, self._log.steps):
            line = self._window.take()
            if self._metrics_of_main is not None:
                self._metrics_of_main.write(step, line)
                logger.debug("step %d/%d  %s", step, self.total, summary(line))
        self._show(step, shown | results)

        stop = self._agreed_signal()
        is_pinned = is_best and self._save.final == "best"
        if is_pinned or is_last or stop is not None or (step and _is_due(step, self._save.steps)):
            self._save_checkpoint(step)
        if stop is not None and not is_last:
            raise StoppedError(
                f"stopped by {stop.name} after step {step} of {self.total}; everything is saved in {self.output_dir}; "
                "to go on, run the same command with --resume",
                signal_number=stop,
            )

    def _judge(self, step: int, results: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best so far. A metric nobody reports is only an error if it is needed."""
        metric = self._best.metric
        if metric not in results:
            if self._patience or self._save.final == "best":
                raise ConfigError(
                    f"save.metric is {metric}, which evaluation does not report; use one of {', '.join(results)}"
                )
            return False
        is_best = self._best.see(step, results)
        if is_best:
            self.event("best", step=step, metric=metric, value=results[metric])
        return is_best

    def _is_patience_over(self) -> bool:
        return bool(self._patience) and self._best.evaluations_since >= self._patience

    def _agreed_signal(self) -> Any:
        """The signal any rank received, the same on all ranks; None if there was none."""
        flags = torch.zeros(len(SIGNALS), device=self.world.device)
        if self._signals.received is not None:
            flags[SIGNALS.index(self._signals.received)] = 1  # type: ignore[arg-type]
        flags = self.world.sum(flags)
        return SIGNALS[int(flags.argmax())] if flags.any() else None
