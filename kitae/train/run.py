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

import json
import logging
import math
import os
import shutil
import signal
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
from safetensors import SafetensorError

import kitae
from kitae import errors
from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.errors import CheckpointError, ConfigError, KitaeError, RunDirError, StoppedError
from kitae.parallel.world import World
from kitae.train import checkpoint, folder
from kitae.train.files import JsonLines, disk_errors, read_json, sync_folder, sync_tree, write_json
from kitae.train.logs import FILE_ONLY, RunLog
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
        is_better = self.value is None or self._sign * (value - self.value) > 0
        if is_better and not math.isnan(value):
            self.value, self.step, self.evaluations_since = value, step, 0
            return True
        self.evaluations_since += 1
        return False

    def state(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "value": self.value,
            "step": self.step,
            "evaluations_since": self.evaluations_since,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on comparing; values of another metric than now mean nothing and are forgotten."""
        if state["metric"] == self.metric:
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
        self._metrics: Metrics | None = None
        self._resources: ResourceMonitor | None = None
        self._events: JsonLines | None = None
        self._samples: JsonLines | None = None
        self._inexact_before: list[str] = []

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
        self._inexact_before = list(described.get("inexact", [])) if self._resume else []
        self._name = self._log.run_name or where.name
        self._started_at = described.get("started") if self._resume else None
        self._started_at = self._started_at or round(time.time(), 3)
        self._events = JsonLines(where / "events.jsonl")
        self._samples = JsonLines(where / "samples.jsonl")
        if self.is_finished:
            self.step = self.total = int(before.get("step", 0))
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
            raise ConfigError(
                "save.final is best, but the run has no evaluation data; give data.eval, or final = last"
            )
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
            self._progress = ProgressView(total=total, title=title, done=self.step, console=self._console)
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
            if self._metrics is not None:
                self._metrics.write(step, line)
            logger.info("step %d/%d  %s", step, self.total, summary(line), extra=FILE_ONLY)
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

    def _agreed_signal(self) -> signal.Signals | None:
        """The signal any rank received, the same on all ranks; None if there was none."""
        flags = torch.zeros(len(SIGNALS), device=self.world.device)
        if self._signals.received is not None:
            flags[SIGNALS.index(signal.Signals(self._signals.received))] = 1
        flags = self.world.sum(flags)
        return SIGNALS[int(flags.argmax())] if flags.any() else None

    def _show(self, step: int, metrics: Mapping[str, float]) -> None:
        done_here = step - self._first_step
        spent = time.monotonic() - self._started
        left = spent / done_here * (self.total - step) if done_here > 0 else None
        if self._progress is not None:
            self._progress.update(step, metrics, left_s=left)
        if time.monotonic() >= self._status_due:
            self._status_due = time.monotonic() + STATUS_INTERVAL_S
            self._write_status("running", eta_s=left)

    # ------------------------------------------------------------------------------------------ writing

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the step that is running. A line is written every log.steps, with means since the last one."""
        assert step == self.step + 1, f"metrics of step {step} were logged while step {self.step + 1} runs"
        self._current |= {name: float(value) for name, value in metrics.items()}

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records such as completions with their rewards to samples.jsonl; called on all ranks together."""
        gathered = self.world.gather_json([dict(record) for record in records])
        if self._samples is not None:
            self._samples.append(*({"step": step, **record} for part in gathered for record in part))

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl: what happened, at which step, and when. Fields are JSON values."""
        if self._events is not None:
            self._events.append({"time": round(time.time(), 3), "event": kind, "step": self.step, **fields})

    def _write_status(self, state: str, *, eta_s: float | None = None) -> None:
        self._state = state
        if not self.world.is_main:
            return
        best = {"metric": self._best.metric, "value": self._best.value, "step": self._best.step}
        with disk_errors(self.output_dir):
            write_json(
                self.output_dir / "status.json",
                {
                    "state": state,
                    "step": self.step,
                    "total": self.total,
                    "eta_s": None if eta_s is None else round(eta_s, 1),
                    "elapsed_s": round(self._elapsed(), 1),
                    "updated": round(time.time(), 3),
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "checkpoint": self._last_checkpoint,
                    "best": best if self._best.value is not None else None,
                    "inexact": bool(self._inexact_before or self._inexact),
                },
                is_durable=state not in ("starting", "running"),
            )

    def _elapsed(self) -> float:
        """Seconds of training, earlier lives of this run included."""
        return self._elapsed_s + time.monotonic() - self._started

    # ------------------------------------------------------------------------------------------ checkpoints

    @property
    def _checkpoints(self) -> Path:
        return self.output_dir / "checkpoints"

    def _identity(self) -> dict[str, Any]:
        settings = {name: value for name, value in self._config.items() if name not in UNCOMPARED}
        return {"settings": settings, "machine": self._machine(), "facts": self._facts}

    def _snapshot(self, step: int) -> checkpoint.State:
        """Everything the run goes on from: the parts, the random generators, and what this class counts."""
        return {
            "parts": {name: part.state() for name, part in self._parts.items()},
            "random": checkpoint.random_state(self.world.device),
            "run": {
                "step": step,
                "best": self._best.state(),
                "window": self._window.state(),
                "elapsed_s": self._elapsed(),
                "metrics_bytes": self._metrics.sync() if self._metrics is not None else 0,
                "samples_bytes": self._samples.sync() if self._samples is not None else 0,
            },
        }

    def _save_checkpoint(self, step: int) -> None:
        began = time.monotonic()
        path = checkpoint.save(
            self._checkpoints,
            step=step,
            state=self._snapshot(step),
            identity=self._identity(),
            world=self.world,
        )
        self._last_checkpoint = step
        if not self.world.is_main:
            return
        self._write_status(self._state)
        self.event("checkpoint", step=step, seconds=round(time.monotonic() - began, 3))
        logger.info("checkpoint %s", path, extra=FILE_ONLY)
        pinned = [self._best.step] if self._save.final == "best" and self._best.value is not None else []
        with disk_errors(self._checkpoints):
            checkpoint.prune(self._checkpoints, keep=self._save.keep, pinned=pinned)

    def _restore(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none to go on from."""
        self._first_step = 0
        if not self._resume:
            return False
        if self.world.is_main:
            with disk_errors(self._checkpoints):
                checkpoint.sweep(self._checkpoints)
        loaded, skipped = checkpoint.load_newest(self._checkpoints, world=self.world)
        for line in skipped:
            logger.warning("skipped a damaged checkpoint: %s", line)
        if loaded is None:
            self._start_over()
            return False
        self._compare(loaded)
        self._load_parts(loaded)
        counted = loaded.state["run"]
        self.step = self._first_step = self._last_checkpoint = loaded.step
        self._best.load_state(counted["best"])
        self._window.load_state(counted["window"])
        self._elapsed_s = counted["elapsed_s"]
        checkpoint.restore_random_state(loaded.state["random"], device=self.world.device)
        if self.world.is_main:
            with disk_errors(self._checkpoints):
                checkpoint.set_aside(self._checkpoints, newer_than=loaded.step)
            self._cut(loaded.step, metrics=counted["metrics_bytes"], samples=counted["samples_bytes"])
        self.event("restored", checkpoint=loaded.path.name, skipped=skipped)
        logger.info("resumed at step %d of %d from %s", loaded.step, self.total, loaded.path)
        return True

    def _start_over(self) -> None:
        if self._checkpoint_before is not None:
            raise CheckpointError(
                f"status.json says that step {self._checkpoint_before} was saved, but {self._checkpoints} holds no "
                "checkpoint; restore one from a backup, or start anew with --overwrite"
            )
        logger.warning("nothing was saved in %s yet: starting from the beginning", self.output_dir)
        self._cut(0, metrics=0, samples=0)

    def _cut(self, step: int, *, metrics: int, samples: int) -> None:
        if self._metrics is not None and self._samples is not None:
            self._metrics.resume(step, size=metrics)
            self._samples.cut(samples)

    def _load_parts(self, loaded: checkpoint.Loaded) -> None:
        saved = loaded.state["parts"]
        if set(saved) != set(self._parts):
            raise CheckpointError(
                f"{loaded.path} holds {', '.join(sorted(saved))}, but this run consists of "
                f"{', '.join(sorted(self._parts))}; resume it with the recipe that wrote it"
            )
        for name, part in self._parts.items():
            part.load_state(saved[name])

    def _compare(self, loaded: checkpoint.Loaded) -> None:
        """Refuse to resume with other settings, data or machine, unless the user said it may be inexact."""
        differing = differences(loaded.identity, self._identity())
        if not differing:
            return
        text = "; ".join(differing)
        if loaded.identity["machine"]["world_size"] != self.world.world_size:
            raise CheckpointError(
                f"{loaded.path} was written by {loaded.identity['machine']['world_size']} processes and can only be "
                f"resumed by as many, not {self.world.world_size} (differing: {text})"
            )
        if not self._allow_inexact:
            raise CheckpointError(
                f"{loaded.path} belongs to another run than this one (then -> now): {text}; undo these changes, "
                "or add --allow_inexact to go on all the same (the run is then marked)"
            )
        self._inexact = [f"step {loaded.step}: {line}" for line in differing]
        logger.warning("resuming inexactly at step %d: %s", loaded.step, text)
        self.event("inexact", differing=differing)
        if self.world.is_main:
            with disk_errors(self.output_dir):
                self._describe()

    # ------------------------------------------------------------------------------------------ ending

    def finish(self, save: Callable[[Path], object]) -> None:
        """Put the final model at the top of the directory; then the run is finished.

        `save(folder)` writes Hugging Face files into an empty folder and is called on all ranks together. They are
        moved up when all are on the disk; a kill in between leaves a run whose resume does it again.
        """
        if self.is_finished:
            return
        self._signals.is_deferring = True
        if self._save.final == "best":
            self._load_best()
        aside = self.output_dir / ".tmp-final"
        with disk_errors(self.output_dir):
            if self.world.is_main:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
            self.world.barrier()
            try:
                save(aside)
            except SafetensorError as error:
                raise RunDirError(f"the final model could not be written to {aside}: {error}") from error
            self.world.barrier()
            if self.world.is_main:
                self._move_up(aside)
        self._write_status("finished")
        self.event("finished", source=self._save.final, seconds=round(self._elapsed(), 1))
        logger.info("finished after %s: the model is in %s", duration(self._elapsed()), self.output_dir)

    def _load_best(self) -> None:
        if self._best.value is None or self._best.step == self.step:
            return
        path = self._checkpoints / checkpoint.name_of(self._best.step)
        self._load_parts(checkpoint.read(path, rank=self.world.rank))
        logger.info("the final model is that of step %d, the best by %s", self._best.step, self._best.metric)

    def _move_up(self, aside: Path) -> None:
        sync_tree(aside)
        names = sorted(os.listdir(aside), key=lambda name: (name == "config.json", name))  # config.json last
        clashing = sorted(set(names) & set(folder.OURS))
        assert not clashing, f"the final model has files that belong to the run: {clashing}"
        final = self.output_dir / "final.json"
        earlier = (read_json(final) or {}).get("files", [])
        step = self._best.step if self._save.final == "best" else self.step
        write_json(final, {"step": step, "source": self._save.final, "files": sorted({*names, *earlier})})
        for name in {*names, *earlier}:
            target = self.output_dir / Path(name).name
            if target.is_dir():
                shutil.rmtree(target)
            elif name not in names:
                target.unlink(missing_ok=True)
        for name in names:
            os.rename(aside / name, self.output_dir / name)
        aside.rmdir()
        sync_folder(self.output_dir)
        write_json(final, {"step": step, "source": self._save.final, "files": sorted(names)})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say in exit.json, status.json and train.log how the run ended, and give everything back."""
        try:
            self._close_progress()
            if not self.is_finished:
                self._record_end(error)
        except RunDirError as problem:  # the disk is full: the run's own error is worth more than this one
            logger.error("how the run ended could not be recorded: %s", problem)
        finally:
            for thing in (self._resources, self._metrics, self._events, self._samples):
                if thing is not None:
                    thing.close()
            self._signals.restore()
            self._logs.close()
            if self._lock is not None:
                self._lock.release()

    def _record_end(self, error: BaseException | None) -> None:
        code, reason = exit_code(error), "finished" if self._state == "finished" else "ended"
        if error is not None:
            reason = f"{type(error).__name__}: {error}"
            logger.error("%s", reason, exc_info=error, extra=FILE_ONLY)
            self._write_status("stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed")
            self.event(self._state, code=code, reason=reason)
        elif self._state != "finished":
            self._write_status("ended")
        self._write_exit(code, reason)

    def _write_exit(self, code: int, reason: str) -> None:
        if self.world.is_main:
            path = self.output_dir / "exit.json"
            with disk_errors(path):
                write_json(
                    path, {"code": code, "reason": reason, "step": self.step, "time": round(time.time(), 3)}
                )

    def _leave_at_once(self, code: int) -> None:
        """Called by the second stop signal, just before the process leaves."""
        try:
            self._write_exit(code, "stopped at once by a second signal")
        except RunDirError as problem:
            os.write(2, f"{problem}\n".encode())

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def exit_code(error: BaseException | None) -> int:
    """The process exit code an error stands for."""
    if error is None:
        return 0
    if isinstance(error, KitaeError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Fields in which two identities differ: ["settings.train.seed 1 -> 2", ...]."""
    before, after = _flat(json.loads(json.dumps(then))), _flat(json.loads(json.dumps(now)))
    names = sorted(before.keys() | after.keys())
    absent = "(absent)"
    return [
        f"{name.removeprefix('settings.')} {before.get(name, absent)} -> {after.get(name, absent)}"
        for name in names
        if before.get(name, absent) != after.get(name, absent)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        name: leaf
        for key, item in value.items()
        for name, leaf in _flat(item, f"{prefix}.{key}" if prefix else key).items()
    }


def _versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    return {package: installed(package) for package in PACKAGES}
