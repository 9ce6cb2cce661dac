"""A run: its directory, lock, log, metrics, progress, signals, evaluations and checkpoints.

    with Run.open(output_dir, config=..., ...) as run:      # refuses what cannot work, before any weights are read
        run.identify(data_hash=...)                         # facts that must be equal when the run is resumed
        run.track("learner", learner)                       # parts with state() and load_state()
        for step in run.steps(total, evaluate=...):         # resumes, evaluates, saves, stops
            ...
            run.log(step, metrics)
        run.finish(save)                                    # the final model, at the top of the directory

After the body of a step come, in this order: evaluation, metrics line, checkpoint, stop.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError

from kitae import errors
from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.errors import ConfigError, KitaeError, RunDirError, StoppedError
from kitae.health import Watch
from kitae.parallel.world import World
from kitae.train import checkpoint, folder
from kitae.train.best import Best
from kitae.train.checkpointer import Checkpointer, Part
from kitae.train.files import disk_errors, read_json
from kitae.train.identity import machine
from kitae.train.logs import FILE_ONLY, RunLog
from kitae.train.metrics import Window, require_writers
from kitae.train.progress import ProgressView, duration, make_console, summary
from kitae.train.record import Record, write_exit
from kitae.train.stop import SIGNALS, StopSignals, exit_code

logger = logging.getLogger(__name__)

STATUS_INTERVAL_S = 1.0
Evaluate = Callable[[], dict[str, float]]


class Run:
    """One run in one directory; made by Run.open, used as a context manager. Every rank has one, rank 0 writes."""

    def __init__(
        self,
        output_dir: Path,
        *,
        settings: Mapping[str, Any],
        recipe: str,
        world: World,
        save: SaveSettings,
        evaluation: EvalSettings,
        log: LogSettings,
        patience: int,
        resume: bool,
        allow_inexact: bool,
    ) -> None:
        """Only what Run.open was given; nothing is touched yet."""
        self.output_dir = output_dir
        self.world = world
        self.step = 0
        """The last step that is complete."""
        self.total = 0
        self.is_finished = False
        """Resumed, but the run was complete: steps() yields nothing and finish() does nothing."""
        self._settings, self._recipe = settings, recipe
        self._save, self._evaluation, self._log = save, evaluation, log
        self._patience, self._resume, self._allow_inexact = patience, resume, allow_inexact
        self._checkpoints = Checkpointer(output_dir, settings=settings, world=world)
        self._best = Best(save)
        self._window, self._current = Window(), dict[str, float]()
        self._watch = Watch(settings=settings, recipe=recipe) if log.health and world.is_main else None
        self._said_before: set[tuple[str, int]] = set()
        """Health notes (rule, step) that an earlier life of this run has said behind its checkpoint."""
        self._owes_evaluation = False
        """A signal came when the last step's evaluation was due; resume makes up for it."""
        self._first_step = 0
        self._elapsed_s, self._started, self._status_due = 0.0, time.monotonic(), 0.0
        self._state = "starting"
        self._lock: folder.Lock | None = None
        self._record: Record | None = None
        self._progress: ProgressView | None = None
        self._logs: RunLog | None = None
        self._console = make_console(is_quiet=not world.is_main)
        self._signals = StopSignals(says=world.is_main, at_once=self._leave_at_once)

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
    ) -> Run:
        """Check the directory, lock it, and start its log. Nothing that existed is overwritten.

        `config` is the resolved settings as JSON values (config.as_json); they go to run.json and are compared on
        resume. Every rank raises the same error.
        """
        run = cls(
            Path(os.path.abspath(os.path.expanduser(output_dir))),
            settings=config,
            recipe=recipe,
            world=world or World(),
            save=save or SaveSettings(),
            evaluation=evaluation or EvalSettings(),
            log=log or LogSettings(),
            patience=early_stopping_patience,
            resume=resume,
            allow_inexact=allow_inexact,
        )
        try:
            run._start(overwrite=overwrite)
        except BaseException as error:
            run.__exit__(type(error), error, error.__traceback__)
            raise
        return run

    def _start(self, *, overwrite: bool) -> None:
        self._signals.install()
        before: dict[str, Any] = {}
        failure: KitaeError | None = None
        if self.world.is_main:
            try:
                before = self._claim(overwrite=overwrite)
            except KitaeError as error:
                failure = error
        problem = None if failure is None else [type(failure).__name__, str(failure)]
        before, problem = self.world.broadcast_json([before, problem])
        if failure is not None:
            raise failure
        if problem is not None:
            raise getattr(errors, problem[0])(problem[1])
        self.is_finished = self._is_complete(before)
        if self.is_finished:
            self.step = self.total = int(before["step"])
        if self._resume:
            self._checkpoints.last = before.get("checkpoint")
        if self._logs is None:
            self._logs = RunLog(None, level=self._log.level, console=self._console)
        self.event("resumed" if self._resume else "started")
        self._write_status("starting")

    def _claim(self, *, overwrite: bool) -> dict[str, Any]:
        """Rank 0: take the directory and open the files in it. Returns the status of the run that is resumed."""
        require_writers(self._log)
        model = self._settings.get("model")
        self._lock = folder.claim(
            self.output_dir,
            resume=self._resume,
            overwrite=overwrite,
            model=model.get("name_or_path") if isinstance(model, Mapping) else None,
        )
        before = (read_json(self.output_dir / "status.json") or {}) if self._resume else {}
        self._logs = RunLog(self.output_dir, level=self._log.level, console=self._console)
        if not self._is_complete(before):
            self._record = Record(
                self.output_dir,
                settings=self._settings,
                recipe=self._recipe,
                log=self._log,
                resume=self._resume,
            )
            folder.leave_pointer(self.output_dir, recipe=self._recipe)
        elif not (self.output_dir / "exit.json").exists():
            # Killed, or a full disk, between model and exit.json.
            write_exit(self.output_dir, 0, "finished", step=int(before["step"]))
        return before

    def _is_complete(self, before: Mapping[str, Any]) -> bool:
        """A finished run has nothing to resume, unless its settings may change (more steps, say)."""
        return not self._allow_inexact and before.get("state") == "finished"

    def identify(self, **facts: str | int | float | None) -> None:
        """Facts that must be equal when the run is resumed, such as data_hash and the template's fingerprint."""
        self._checkpoints.facts |= facts
        if not self._resume:  # else after the comparison, see _steps
            self._describe()

    def track(self, name: str, part: Part, *, grows_by: int = 0) -> None:
        """Make `part` belong to the run's checkpoints. All parts are tracked before steps() begins.

        `grows_by` is about how many bytes the first step adds to its state, such as an optimizer's moments: a disk
        too small for checkpoints is then refused before that step.
        """
        assert self._state == "starting", f"{name} was tracked after the first step"
        self._checkpoints.track(name, part, grows_by=grows_by)

    # ------------------------------------------------------------------------------------------ stepping

    def steps(self, total: int, *, evaluate: Evaluate | None = None) -> Iterator[int]:
        """The numbers of the steps to take, from 1 (or behind the checkpoint) to `total`.

        Between two of them the run evaluates, saves, and stops on a signal (StoppedError) or by early stopping.
        `evaluate` returns metrics by name, the same on all ranks; it is called on all ranks together.
        """
        if self._save.final == "best" and evaluate is None:
            raise ConfigError(
                "save.final is best, but the run has no evaluation data; set data.eval, or save.final last"
            )
        if self._patience and (evaluate is None or not self._evaluation.steps):
            raise ConfigError(
                f"train.early_stopping_patience is {self._patience}, but the run does not evaluate while it trains; "
                "set eval.steps and evaluation data, or patience 0"
            )
        return self._steps(total, evaluate)

    def _steps(self, total: int, evaluate: Evaluate | None) -> Iterator[int]:
        if self.is_finished:
            logger.warning("already finished at step %d: nothing to do in %s", self.step, self.output_dir)
            return
        self.total = total
        is_resumed = self._restore()
        self._checkpoints.require_space(self._counted, is_grown=is_resumed)
        if self.world.is_main:
            title = self._recipe or "train"
            self._progress = ProgressView(total=total, done=self.step, title=title, console=self._console)
        self._describe()
        self._write_status("running")
        self._signals.is_deferring = True
        self._started = time.monotonic()
        if self._owes_evaluation or (not is_resumed and self._evaluation.at_start):
            self._end_of_step(evaluate)
        while self.step < total and not self._is_patience_over():
            began = time.monotonic()
            yield self.step + 1
            self._current.setdefault("time/step_s", time.monotonic() - began)
            if self.step == self._first_step:  # only now the optimizer has its moments, and the size is exact
                self._checkpoints.require_space(self._counted, is_grown=True)
            self.step += 1
            self._end_of_step(evaluate)
        self._close_progress()

    def _end_of_step(self, evaluate: Evaluate | None) -> None:
        step, shown, self._current = self.step, self._current, {}
        self._window.add(shown)
        results: dict[str, float] = {}
        is_best = False
        if evaluate is not None and (step in (0, self.total) or _is_due(step, self._evaluation.steps)):
            self._owes_evaluation = True
            self._stop_if_asked()
            results = self.world.broadcast_json(evaluate())
            self._owes_evaluation = False
            self._window.add(results)
            is_best = self._judge(results)

        is_last = step == self.total or self._is_patience_over()
        if results or is_last or _is_due(step, self._log.steps):
            line = self._window.take()
            if self._record is not None:
                self._record.metrics.write(step, line)
                self._say_health(step, line)
            logger.info("step %d/%d  %s", step, self.total, summary(line), extra=FILE_ONLY)
        self._show(shown | results)

        if is_last or (is_best and self._save.final == "best") or (step and _is_due(step, self._save.steps)):
            self._save_checkpoint()
        if not is_last:
            self._stop_if_asked()

    def _say_health(self, step: int, line: Mapping[str, float]) -> None:
        for note in self._watch.see(step, line) if self._watch is not None else ():
            if (note.rule, step) not in self._said_before:
                logger.warning("health at step %d: %s", step, note.sentence)
                self.event("health", rule=note.rule, sentence=note.sentence, setting=note.setting)

    def _judge(self, results: Mapping[str, float]) -> bool:
        """Compare an evaluation with the best so far. A metric nobody reports is only an error if it is needed."""
        metric = self._best.metric
        if metric not in results:
            if self._patience or self._save.final == "best":
                raise ConfigError(
                    f"save.metric is {metric}, which evaluation does not report; use one of {', '.join(results)}"
                )
            return False
        is_best = self._best.see(self.step, results)
        if is_best:
            self.event("best", metric=metric, value=results[metric])
        return is_best

    def _is_patience_over(self) -> bool:
        return bool(self._patience) and self._best.evaluations_since >= self._patience

    def _stop_if_asked(self) -> None:
        """Save and leave if any rank received a signal; all ranks decide alike."""
        flags = torch.zeros(len(SIGNALS), device=self.world.device)
        if self._signals.received is not None:
            flags[SIGNALS.index(signal.Signals(self._signals.received))] = 1
        flags = self.world.sum(flags)
        if not flags.any():
            return
        number = SIGNALS[int(flags.argmax())]
        if self._checkpoints.last != self.step or self._owes_evaluation:
            self._save_checkpoint()
        raise StoppedError(
            f"stopped by {number.name} after step {self.step} of {self.total}; all of it is saved in {self.output_dir}; "
            "to go on, run the same command with --resume",
            signal_number=number,
        )

    def _show(self, metrics: Mapping[str, float]) -> None:
        done_here = self.step - self._first_step
        spent = time.monotonic() - self._started
        left = spent / done_here * (self.total - self.step) if done_here > 0 else None
        if self._progress is not None:
            self._progress.update(self.step, metrics, left_s=left)
        if time.monotonic() >= self._status_due:
            self._status_due = time.monotonic() + STATUS_INTERVAL_S
            self._write_status("running", eta_s=left)

    # ------------------------------------------------------------------------------------------ writing

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the step that is running. A line is written every log.steps, with means since the last one."""
        assert step == self.step + 1, f"metrics of step {step} were logged while step {self.step + 1} runs"
        self._current |= {name: float(value) for name, value in metrics.items()}

    def samples(self, step: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Append records such as completions with their rewards to samples.jsonl.

        Rank 0 writes what it is given; gather the records of other ranks before.
        """
        if self._record is not None:
            self._record.samples({"step": step, **record} for record in records)

    def event(self, kind: str, **fields: Any) -> None:
        """Append a line to events.jsonl: what happened, at which step, and when. Fields are JSON values."""
        if self._record is not None:
            self._record.event(kind, step=self.step, **fields)

    def _write_status(self, state: str, *, eta_s: float | None = None) -> None:
        self._state = state
        if self._record is None:
            return
        best = {"metric": self._best.metric, "value": self._best.value, "step": self._best.step}
        self._record.status(
            state,
            step=self.step,
            total=self.total,
            eta_s=None if eta_s is None else round(eta_s, 1),
            elapsed_s=round(self._elapsed(), 1),
            checkpoint=self._checkpoints.last,
            best=best if self._best.value is not None else None,
        )

    def _elapsed(self) -> float:
        """Seconds of training, earlier lives of this run included."""
        return self._elapsed_s + time.monotonic() - self._started

    # ------------------------------------------------------------------------------------------ checkpoints

    def _counted(self) -> checkpoint.State:
        """What a checkpoint holds of this class."""
        return {
            "best": self._best.state(),
            "window": self._window.state(),
            "owes_evaluation": self._owes_evaluation,
            "health": self._watch.state() if self._watch is not None else None,
            "elapsed_s": self._elapsed(),
            "sizes": self._record.sync() if self._record is not None else {},
        }

    def _save_checkpoint(self) -> None:
        began = time.monotonic()
        path = self._checkpoints.save(self.step, self._counted)
        self._write_status(self._state)
        self.event("checkpoint", seconds=round(time.monotonic() - began, 3))
        logger.info("checkpoint %s", path, extra=FILE_ONLY)
        pinned = [self._best.step] if self._save.final == "best" and self._best.value is not None else []
        self._checkpoints.prune(keep=self._save.keep, pinned=pinned)

    def _restore(self) -> bool:
        """Go on from the newest whole checkpoint; False where there is none to go on from."""
        if not self._resume:
            return False
        loaded, skipped = self._checkpoints.newest()
        if loaded is None:
            logger.warning("nothing was saved in %s yet: starting from the beginning", self.output_dir)
            self._cut_records(0, {"metrics": 0, "samples": 0})
            return False
        if differing := self._checkpoints.compare(loaded, allow_inexact=self._allow_inexact):
            self.event("inexact", checkpoint=loaded.path.name, differing=differing)
            self._describe(inexact=[f"step {loaded.step}: {line}" for line in differing])
        counted = self._checkpoints.restore(loaded)
        self._best.load_state(counted["best"])
        self._window.load_state(counted["window"])
        self._owes_evaluation = counted["owes_evaluation"]
        notes = counted.get("health")  # None: an earlier life had log.health off
        if self._watch is not None and notes is not None:
            self._watch.load_state(notes)
        self._elapsed_s = counted["elapsed_s"]
        self.step = self._first_step = loaded.step
        self._checkpoints.set_aside(newer_than=loaded.step)
        self._cut_records(loaded.step, counted["sizes"])
        self.event("restored", checkpoint=loaded.path.name, skipped=skipped)
        logger.info("resumed at step %d of %d from %s", loaded.step, self.total, loaded.path)
        return True

    def _cut_records(self, step: int, sizes: Mapping[str, int]) -> None:
        """Forget what was written behind the step that the run goes on from, but not which health notes were said."""
        if self._record is not None:
            self._record.cut(step, sizes)
            self._said_before = self._record.health_notes(since=step)

    def _describe(self, **more: Any) -> None:
        """Write to run.json where and on what the run goes on."""
        if self._record is not None:
            self._record.describe(machine=machine(self.world), facts=self._checkpoints.facts, **more)

    # ------------------------------------------------------------------------------------------ ending

    def finish(self, save: Callable[[Path], object]) -> None:
        """Put the final model at the top of the directory; then the run is finished.

        `save(folder)` writes Hugging Face files into an empty folder and is called on all ranks together. They are
        moved up when all are on the disk; a kill in between leaves a run whose resume does it again.
        """
        if self.is_finished:
            return
        self._signals.is_deferring = True
        is_best = self._save.final == "best" and self._best.value is not None
        if is_best and self._best.step != self.step:
            self._checkpoints.load_parts_of(self._best.step)
            logger.info(
                "the final model is that of step %d, the best by %s", self._best.step, self._best.metric
            )
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
                folder.publish(aside, step=self._best.step if is_best else self.step, is_best=is_best)
        self._write_status("finished")
        self.event("finished", is_best=is_best, seconds=round(self._elapsed(), 1))
        logger.info("finished after %s: the model is in %s", duration(self._elapsed()), self.output_dir)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say in exit.json, status.json and train.log how the run ended, and give everything back."""
        self._close_progress()
        try:
            if self._record is not None:
                self._record_end(error)
        except RunDirError as problem:  # a full disk, say
            if error is None:
                raise
            logger.error("how the run ended could not be recorded: %s", problem)
        finally:
            for line in self._record.close() if self._record is not None else ():
                logger.error("%s", line)
            self._record = None
            self._signals.restore()
            if self._logs is not None:
                self._logs.close()
            if self._lock is not None:
                self._lock.release()

    def _record_end(self, error: BaseException | None) -> None:
        if error is None:
            state, reason = (
                ("finished", "finished") if self._state == "finished" else ("ended", "ended unfinished")
            )
        else:
            state = "stopped" if isinstance(error, StoppedError | KeyboardInterrupt) else "failed"
            reason = f"{type(error).__name__}: {error}"
            logger.error("%s", reason, exc_info=error, extra=FILE_ONLY)
        if self._state != "finished":
            self._write_status(state)
            self.event(state, code=exit_code(error), reason=reason)
        write_exit(self.output_dir, exit_code(error), reason, step=self.step)

    def _leave_at_once(self, code: int) -> None:
        """Called by the second stop signal, just before the process leaves."""
        if self._record is not None:
            with contextlib.suppress(RunDirError):  # a full disk: the exit code still says it
                write_exit(self.output_dir, code, "stopped at once by a second signal", step=self.step)

    def _close_progress(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
