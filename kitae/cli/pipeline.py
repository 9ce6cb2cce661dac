"""Run the stages of one file in order, each an ordinary run: kitae pipeline r1.toml [--from STAGE] [--dry_run]."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any

from kitae.cli._stages import RESULTS, SUMMARY, Stage, read_pipeline, root_of, settings_file
from kitae.errors import ConfigError, KitaeError, ModelError, RunDirError, StoppedError
from kitae.plugins import did_you_mean
from kitae.settings.compare import differences, flat
from kitae.settings.fields import settings_of
from kitae.train.files import content_hash, disk_errors, read_json, write_atomic, write_json

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGHUP)
UNCOMPARED = ("log", "json_file", "save.steps", "save.keep", "batch_size", "concurrency", "max_attempts")
"""Settings that may change under a stage that has begun: they change no result."""
FILTERS = ("min_reward", "keep", "choose", "min_pass_rate", "max_pass_rate", "with_system_prompt")
"""Settings by which a sample stage keeps others of the same answers: it then filters anew and asks nothing."""
_READS = re.compile(
    r"(name_or_path|model|baseline|tokenizer|train|eval|dataset_name|template|functions?|rewards?|loss|teacher\w*|\w*path|\w*file)"
)
"""Last words of settings that may name something on the disk."""
_SHOWN = ("eval/accuracy", "rollout/accuracy", "eval/reward", "rollout/reward", "eval/loss", "train/loss")
"""What of a run's metrics the last table shows, the first there is."""


def main(argv: list[str]) -> int:
    """Check all stages, then run those that are not done."""
    parser = argparse.ArgumentParser(
        prog="kitae pipeline", description=(__doc__ or "").partition(":")[0] + "."
    )
    parser.add_argument(
        "file", metavar="PIPELINE.toml", help="stages and their settings; see docs/pipeline.md"
    )
    parser.add_argument("--output_dir", help="folder of all stages, instead of the file's output_dir")
    parser.add_argument(
        "--from",
        dest="start",
        metavar="STAGE",
        help="do this stage and all after it anew; what they wrote is moved aside",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything and show what would be run")
    args = parser.parse_args(argv)
    folder, stages = read_pipeline(Path(args.file), output_dir=args.output_dir)
    names = [stage.name for stage in stages]
    if args.start is not None and args.start not in names:
        raise ConfigError(f"--from {args.start}: there is no such stage; {did_you_mean(args.start, names)}")
    for stage in stages:
        for warning in stage.warnings:
            print(f"kitae: stage {stage.name}: {warning}", file=sys.stderr)
    pipeline = Pipeline(folder, stages, file=args.file)
    anew = set(names[names.index(args.start) :]) if args.start is not None else set()
    if args.dry_run:
        pipeline.show_plan(anew=anew)
        return 0
    return pipeline.run(anew=anew)


class Pipeline:
    """The stages of one folder, and in its pipeline.json what is known of each."""

    def __init__(self, folder: Path, stages: Sequence[Stage], *, file: str) -> None:
        self._folder, self._stages, self._file = folder, stages, file
        self._records: dict[str, dict[str, Any]] = (read_json(folder / "pipeline.json") or {}).get(
            "stages", {}
        )
        """By the stage's label, such as 02-grpo (JSON values)."""
        self._states = {stage.label: "not run" for stage in stages}

    # what is to do ------------------------------------------------------------------------------------------

    def show_plan(self, *, anew: set[str]) -> None:
        """Print what `run` would do; a stage that changed is an error after the table."""
        refused: KitaeError | None = None
        done: set[str] = set()
        rows = []
        for stage in self._stages:
            try:
                state = "to do anew" if stage.name in anew else self._state(stage, done=done)
            except KitaeError as error:
                state, refused = "changed", refused or error
            if state == "done":
                done.add(stage.name)
            reads = ", ".join(f"@{name}" for name in stage.uses)
            ranks = f" x {stage.nproc_per_node}" if stage.nproc_per_node > 1 else ""
            rows.append((stage.label, f"{stage.run}{ranks}", reads or "-", state))
        _table(f"{self._file} in {self._folder}", ("stage", "runs", "reads", "state"), rows)
        if refused is not None:
            raise refused

    def _state(self, stage: Stage, *, done: set[str]) -> str:
        """done, to go on, or to do; a stage that has begun under other settings or inputs is refused."""
        record = self._records.get(stage.label)
        if record is None:
            if stage.folder.exists() and any(stage.folder.iterdir()):
                raise RunDirError(
                    f"{stage.folder} is there, but {self._folder / 'pipeline.json'} knows nothing of it; add --from "
                    f"{stage.name} to move it aside, or choose another output_dir"
                )
            return "to do"
        redone = [name for name in stage.uses if name not in done]
        if redone:
            raise ConfigError(
                f"stage {stage.name} was made from an earlier {redone[0]}, which is to be done; add --from {stage.name} to "
                "do it anew (what it wrote is moved aside)"
            )
        then, now = self._described(record), self._described(self._record(stage))
        differing = {
            name: text
            for name, text in differences(then, now).items()
            if not is_other_version(stage, name, then, now)
        }
        may_differ = {f"settings.{name}" for name in FILTERS} if stage.run == "sample" else set()
        if differing.keys() - may_differ:
            raise ConfigError(
                f"stage {stage.name} has {'finished' if record['state'] == 'done' else 'begun'} with other settings or "
                f"inputs (then -> now: {'; '.join(differing.values())}); undo these changes, or add --from {stage.name} to "
                "do it and what follows anew (what they wrote is moved aside)"
            )
        return "done" if not differing and record["state"] == "done" and has_output(stage) else "to go on"

    def _record(self, stage: Stage) -> dict[str, Any]:
        return {
            "name": stage.name,
            "run": stage.run,
            "folder": str(self._folder),
            "state": "running",
            "nproc_per_node": stage.nproc_per_node,
            "settings": stage.settings,
            "inputs": inputs_of(stage, inside=self._folder),
            "made_from": {name: self._id_of(name) for name in stage.uses},
        }

    def _id_of(self, name: str) -> str | None:
        label = next(stage.label for stage in self._stages if stage.name == name)
        return self._records.get(label, {}).get("id")

    def _described(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What must stay equal. Paths inside the pipeline's folder may move with it."""
        kept = {key: record.get(key) for key in ("run", "nproc_per_node", "settings", "inputs", "made_from")}
        inside = json.dumps(str(record["folder"]))[1:-1]
        described = flat(json.loads(json.dumps(kept).replace(f'"{inside}/', '"')))
        names = [f"settings.{name}" for name in UNCOMPARED]
        return {
            name: value
            for name, value in described.items()
            if not any(name == n or name.startswith(f"{n}.") for n in names)
        }

    # doing it -----------------------------------------------------------------------------------------------

    def run(self, *, anew: set[str]) -> int:
        """Run what is not done, stop at the first stage that fails, and show the table either way."""
        from kitae.train.folder import Lock

        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = Lock(self._folder / "pipeline.lock")
        try:
            if anew:
                self._set_aside(anew)
            plan = self._plan()
            try:
                for stage, state in plan:
                    if state == "done":
                        self._states[stage.label] = "done before"
                    else:
                        self._do(stage)
            finally:
                self._show()
        finally:
            lock.release()
        return 0

    def _plan(self) -> list[tuple[Stage, str]]:
        """Every stage with its state, so that a stage that is refused is refused before the first one starts."""
        done: set[str] = set()
        plan = []
        for stage in self._stages:
            state = self._state(stage, done=done)
            if state == "done":
                done.add(stage.name)
            plan.append((stage, state))
        return plan

    def _do(self, stage: Stage) -> None:
        from kitae.parallel.launch import launch

        settings = self._folder / "settings" / f"{stage.label}.toml"
        began = time.monotonic()
        before = self._record(stage) | {"seconds": self._records.get(stage.label, {}).get("seconds", 0.0)}
        with disk_errors(settings):
            settings.parent.mkdir(exist_ok=True)
            write_atomic(settings, settings_file(stage).encode())
            # It cannot go on from half: whatever is there, it wrote before it was stopped.
            if stage.run == "evaluate":
                stage.folder.mkdir(exist_ok=True)
                for name in (RESULTS, RESULTS.replace(".jsonl", "-baseline.jsonl")):
                    (stage.folder / name).unlink(missing_ok=True)
        self._write(stage, before)
        print(
            f"kitae: stage {stage.label}: {' '.join(_command(stage, settings))}", file=sys.stderr, flush=True
        )
        self._states[stage.label] = "failed"
        code = launch(_command(stage, settings), nproc_per_node=stage.nproc_per_node)
        record = before | {"seconds": round(before["seconds"] + time.monotonic() - began, 1)}
        if code in STOPPED:
            self._states[stage.label] = "stopped"
            self._write(stage, record)
            raise StoppedError(
                f"stopped in stage {stage.name}; the same command again goes on from there",
                signal_number=code - 128,
            )
        if code == 0 and not has_output(stage):
            raise RunDirError(
                f"stage {stage.name} ended without {stage.output}; add --from {stage.name} to do it anew"
            )
        if code:
            self._write(stage, record)
            failure = KitaeError(
                f"stage {stage.name} failed with exit code {code}, its error is above; when that is mended, the same "
                "command again goes on from there"
            )
            failure.exit_code = code
            raise failure
        self._states[stage.label] = "done"
        self._write(stage, record | {"state": "done", "id": uuid.uuid4().hex, "result": result_of(stage)})

    def _write(self, stage: Stage, record: Mapping[str, Any]) -> None:
        self._records[stage.label] = dict(record)
        self._save()

    def _save(self) -> None:
        with disk_errors(self._folder):
            write_json(self._folder / "pipeline.json", {"file": self._file, "stages": self._records})

    def _set_aside(self, anew: set[str]) -> None:
        """Move the stages' folders to earlier/<time>/, and those of stages that the file no longer has after them."""
        first = min(stage.number for stage in self._stages if stage.name in anew)
        aside = self._folder / "earlier" / time.strftime("%Y%m%d-%H%M%S")
        found = [
            path
            for path in sorted(self._folder.iterdir())
            if re.match(r"\d\d-", path.name) and int(path.name[:2]) >= first and path.is_dir()
        ]
        with disk_errors(aside):
            for path in found:
                aside.mkdir(parents=True, exist_ok=True)
                path.rename(aside / path.name)
                print(f"kitae: moved {path} to {aside / path.name}", file=sys.stderr)
        self._records = {label: r for label, r in self._records.items() if int(label[:2]) < first}
        self._save()

    def _show(self) -> None:
        rows = []
        for stage in self._stages:
            record = self._records.get(stage.label, {})
            seconds = record.get("seconds")
            took = "" if seconds is None else f"{seconds:,.0f} s"
            rows.append(
                (stage.label, stage.run, self._states[stage.label], took, str(record.get("result") or ""))
            )
        _table(str(self._folder), ("stage", "ran", "state", "time", "result"), rows)


def has_output(stage: Stage) -> bool:
    """Whether the stage left what it is there for."""
    if stage.run == "evaluate":
        return (stage.folder / SUMMARY).is_file()
    if stage.run == "sample":
        return stage.output.is_file()
    is_model = any((stage.folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return is_model and (read_json(stage.folder / "exit.json") or {}).get("code") == 0


def _command(stage: Stage, settings: Path) -> list[str]:
    """The words after `kitae` that do the stage, or go on with it."""
    from kitae.train.folder import is_run

    if stage.is_recipe:
        resume = ["--resume"] if is_run(stage.folder) else []
        return ["train", stage.run, str(settings), *resume]
    return [stage.run, str(settings)]


def result_of(stage: Stage) -> str:
    """The main result of a finished stage in a few words."""
    if stage.run == "sample":
        found = read_json(stage.folder / SUMMARY) or {}
        share = f"{found.get('right_share', 0):.1%}"
        return f"{found.get('kept', 0):,} rows of {found.get('answers', 0):,} answers, {share} right"
    if stage.run == "evaluate":
        found = read_json(stage.folder / SUMMARY) or {}
        if "accuracy" not in found:
            return f"perplexity {found.get('perplexity', 0):.4g}"
        after = f"accuracy {found['accuracy']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"
        before = found.get("baseline")
        return after if before is None else f"{after}, baseline {before['accuracy']:.1%}"
    lines = [
        json.loads(line) for line in (stage.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    name = next((name for name in _SHOWN if any(name in line for line in lines)), None)
    if name is None:
        return f"{len(lines)} steps"
    values = [line[name] for line in lines if line.get(name) is not None]
    return f"{name} {values[0]:.4g} -> {values[-1]:.4g}" if len(values) > 1 else f"{name} {values[0]:.4g}"


# inputs -------------------------------------------------------------------------------------------------------


def inputs_of(stage: Stage, *, inside: Path) -> dict[str, str]:
    """Hash of everything from outside the pipeline that the stage's settings name: files, model folders, globs."""
    found: dict[str, str] = {}
    for name, value in flat(stage.settings).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and text and _READS.fullmatch(name.rpartition(".")[2]):
                for path in _paths(text):
                    if not path.resolve().is_relative_to(inside.resolve()):
                        found[str(path)] = _hash(path)
    return found


def _paths(text: str) -> list[Path]:
    """The paths on this machine that a setting's value names; none for a hub name."""
    file = re.fullmatch(r"(.+\.py):\w+", text)
    path = Path(file[1] if file else text).expanduser()
    try:
        if path.exists():
            return [path]
        return [Path(name) for name in sorted(glob(str(path), recursive=True))] if has_magic(text) else []
    except OSError:  # a name that no file can have
        return []


def _hash(path: Path) -> str:
    from kitae.models.files import find_model
    from kitae.models.fingerprint import model_fingerprint

    with disk_errors(path):
        if path.is_file():
            return content_hash(path)
        try:
            return model_fingerprint(find_model(str(path)))
        except ModelError:  # a folder of data, then
            files = [p for p in sorted(path.rglob("*")) if p.is_file()]
            return " ".join(content_hash(p) for p in files)


def is_other_version(stage: Stage, name: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether a setting only differs because another version of kitae had it, or had it not."""
    known = settings_of(root_of(stage.run))
    setting = name.removeprefix("settings.")
    if setting == name:
        return False
    if name not in now:
        return not any(setting == own or setting.startswith(f"{own}.") for own in known)
    return name not in then and setting in known and now[name] == known[setting].default


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))  # text as it is: no markup in names and results
    Console().print(table, highlight=False)
