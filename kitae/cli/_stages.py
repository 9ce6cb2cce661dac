"""A pipeline file: stages with their settings resolved and their references followed, before anything runs.

    TOML --lines--> tables --@references--> tables with paths --defaults--> given --resolve--> Stage

Nothing here imports torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.cli import evaluate, sample
from kitae.config import Section, as_json
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean, names_in
from kitae.settings import read, resolve, settings_class, without_effect
from kitae.settings.aliases import for_command
from kitae.settings.fields import flat_names, sections_of, settings_of
from kitae.settings.reader import read_toml

COMMANDS: dict[str, type[Section]] = {"sample": sample.Settings, "evaluate": evaluate.Settings}
"""What a stage can run besides recipes."""
OURS = ("output_dir", "resume", "overwrite", "allow_inexact", "output", "results", "json_file", "json")
"""Settings of a stage that the pipeline decides."""
SHARED = (
    "model.dtype", "model.device", "model.quantization", "model.trust_remote_code", "data.template", "data.columns",
    "data.system_prompt", "train.seed", "reward.form", "reward.strict_form", "rollout.max_new_tokens",
)  # fmt: skip
"""Defaults of recipes that hold for sample and evaluate too, under their last word."""
SAMPLES, RESULTS, SUMMARY = "rows.jsonl", "results.jsonl", "summary.json"
_NAME = re.compile(r"[A-Za-z0-9][\w-]*")
_REFERENCE = re.compile(r"@([A-Za-z0-9][\w-]*)(?:/(.+))?")
_MODEL_SETTINGS = ("name_or_path", "model_name_or_path", "model", "baseline", "tokenizer", "pretrained")
_DATA_SETTINGS = ("train", "eval", "dataset_name", "dataset")

PlaceOf = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline, ready to run."""

    number: int
    name: str
    run: str
    """A recipe, sample, or evaluate."""
    folder: Path
    given: dict[str, Any]
    """What its settings file holds: JSON values by the names the user wrote, defaults included."""
    settings: dict[str, Any]
    """All settings it resolves to, as JSON values."""
    uses: list[str]
    """Earlier stages whose output it reads."""
    warnings: list[str]
    nproc_per_node: int = 1

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def is_recipe(self) -> bool:
        return self.run not in COMMANDS

    @property
    def output(self) -> Path:
        """What a reference to the stage stands for: a model's folder, or a file of rows."""
        return self.folder / SAMPLES if self.run == "sample" else self.folder


def read_pipeline(path: Path, *, output_dir: str | None = None) -> tuple[Path, list[Stage]]:
    """The pipeline's folder and its stages; every mistake in any of them is an error with its place in the file."""
    table, text = read_toml(path, what="pipeline")
    lines = _Lines(path, text)
    _refuse_unknown(table, ("output_dir", "defaults", "stage"), lines.place_of)
    folder = Path(output_dir or table.get("output_dir") or f"runs/{path.stem}").expanduser()
    tables = table.get("stage", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
        raise ConfigError(f"{path} has no stages; each begins with a line [[stage]]")
    defaults = table.get("defaults", {})
    if not isinstance(defaults, dict):
        raise ConfigError(
            f"defaults ({lines.place_of('defaults')}) is no table; begin it with a line [defaults]"
        )
    flat_defaults = dict(_flatten(defaults, _all_sections()))
    stages: list[Stage] = []
    taken: set[str] = set()
    for number, own in enumerate(tables, 1):
        stage, used = _stage(
            number,
            own,
            before=stages,
            later=[str(t.get("name")) for t in tables[number:]],
            defaults=flat_defaults,
            folder=folder,
            place_of=lines.of_stage(number - 1),
            default_place=lines.place_of,
        )
        stages.append(stage)
        taken |= used
    for name in flat_defaults:
        if name not in taken and not any(_canonical(name, stage.run, is_default=True) for stage in stages):
            known = sorted({n for stage in stages for n in settings_of(root_of(stage.run))})
            raise ConfigError(
                f"no stage has the default {name} ({lines.place_of(f'defaults.{name}')}); {did_you_mean(name, known)}"
            )
    return folder, stages


def settings_file(stage: Stage) -> str:
    """The stage's settings as TOML, which `kitae train`, `kitae sample` and `kitae evaluate` read."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in stage.given.items())


# reading ------------------------------------------------------------------------------------------------------


class _Lines:
    """Where each name of a pipeline file is written."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._top: dict[str, int] = {}
        self._stages: list[dict[str, int]] = []
        here, prefix = self._top, ""
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"\s*\[\[\s*stage\s*\]\]", line):
                here, prefix = {"": number}, ""
                self._stages.append(here)
            elif header := re.match(r"\s*\[\s*([\w.\-]+)\s*\]", line):
                first, _, rest = header[1].partition(".")
                is_stage = first == "stage" and self._stages
                here, prefix = (self._stages[-1], f"{rest}.") if is_stage else (self._top, f"{header[1]}.")
            elif key := re.match(r"\s*([\w.\-]+)\s*=", line):
                here.setdefault(prefix + key[1], number)

    def place_of(self, name: str) -> str:
        return self._place(self._top, name)

    def of_stage(self, index: int) -> PlaceOf:
        own = self._stages[index] if index < len(self._stages) else {}
        return lambda name: self._place(own, name)

    def _place(self, found: Mapping[str, int], name: str) -> str:
        """The line of a name, else of the table it is in."""
        while name not in found and name:
            name = name.rpartition(".")[0]
        return f"{self._path} line {found[name]}" if name in found else str(self._path)


def _stage(
    number: int,
    table: Mapping[str, Any],
    *,
    before: Sequence[Stage],
    later: Sequence[str],
    defaults: Mapping[str, Any],
    folder: Path,
    place_of: PlaceOf,
    default_place: PlaceOf,
) -> tuple[Stage, set[str]]:
    """One stage, and which defaults it took."""
    name, run, nproc = _head(number, table, before=before, place_of=place_of)
    rest = {key: value for key, value in table.items() if key not in ("name", "run", "nproc_per_node")}
    root = root_of(run)
    given = dict(_flatten(rest, sections_of(root)))
    for setting in given:
        if setting in OURS:
            raise ConfigError(
                f"stage {name!r} sets {setting} ({place_of(setting)}), which the pipeline decides; leave it out"
            )
    uses: list[str] = []
    follow = _Follower(name, before=before, later=later, uses=uses, place_of=place_of)
    given = {setting: follow(setting, value) for setting, value in given.items()}
    own_folder = folder / f"{number:02d}-{name}"
    given |= _outputs(run, given, own_folder)
    taken = _defaults(run, given, defaults, world_size=nproc)
    written = {ours: default_place(f"defaults.{name}") for name, (ours, _) in taken.items()}
    given |= {setting: follow(setting, value) for setting, value in taken.values()}
    try:
        settings, warnings = _resolved(
            run, given, world_size=nproc, place_of=lambda setting: written.get(setting) or place_of(setting)
        )
    except ConfigError as error:
        raise ConfigError(f"stage {name!r}: {error}") from error
    stage = Stage(
        number=number,
        name=name,
        run=run,
        folder=own_folder,
        given=given,
        settings=settings,
        uses=list(dict.fromkeys(uses)),
        warnings=warnings,
        nproc_per_node=nproc,
    )
    return stage, set(taken)


def _head(
    number: int, table: Mapping[str, Any], *, before: Sequence[Stage], place_of: PlaceOf
) -> tuple[str, str, int]:
    """A stage's name, what it runs, and in how many processes."""
    name, run = table.get("name"), table.get("run")
    where = place_of("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f'stage {number} ({where}) needs a name of letters, digits, - and _, such as name = "sft"'
        )
    if name in [stage.name for stage in before]:
        raise ConfigError(f"two stages are called {name!r} ({where}); give each a name of its own")
    runs = [*names_in("kitae.recipes"), *COMMANDS]
    if run not in runs:
        raise ConfigError(
            f"stage {name!r} has run = {run!r} ({place_of('run')}); {did_you_mean(str(run), runs)}"
        )
    nproc = table.get("nproc_per_node", 1)
    if not isinstance(nproc, int) or isinstance(nproc, bool) or nproc < 1 or (nproc > 1 and run in COMMANDS):
        raise ConfigError(
            f"stage {name!r} has nproc_per_node = {nproc!r} ({place_of('nproc_per_node')}); it is a number of processes, "
            "1 or more, for recipes only"
        )
    return name, run, nproc


def _outputs(run: str, given: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where a stage writes."""
    if run == "sample":
        return {"output": str(folder / SAMPLES), "json_file": str(folder / SUMMARY)}
    if run == "evaluate":
        results = {} if given.get("perplexity") else {"results": str(folder / RESULTS)}
        return results | {"json_file": str(folder / SUMMARY)}
    return {"output_dir": str(folder)}


def _resolved(
    run: str, given: Mapping[str, Any], *, world_size: int, place_of: PlaceOf
) -> tuple[dict[str, Any], list[str]]:
    """All settings as JSON values, and what is to be said about them."""
    if run in COMMANDS:
        use, notes = read(run, COMMANDS[run], given, place_of=place_of)
        module: Any = {"sample": sample, "evaluate": evaluate}[run]
        module.require_sense(use)
        return as_json(use), notes.warnings
    cfg, notes = resolve(run, given, world_size=world_size, place_of=place_of)
    wish = {} if notes.dtype_wish is None else {"dtype_wish": notes.dtype_wish[1]}
    return as_json(cfg) | wish, notes.warnings


# references ---------------------------------------------------------------------------------------------------


class _Follower:
    """Replaces @stage and @stage/file by paths; notes which stages are used."""

    def __init__(
        self, name: str, *, before: Sequence[Stage], later: Sequence[str], uses: list[str], place_of: PlaceOf
    ) -> None:
        self._name, self._later, self._uses, self._place_of = name, later, uses, place_of
        self._before = {stage.name: stage for stage in before}

    def __call__(self, setting: str, value: Any) -> Any:
        if isinstance(value, list):
            return [self(setting, item) for item in value]
        if isinstance(value, Mapping):
            return {key: self(setting, item) for key, item in value.items()}
        found = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        return value if found is None else self._path(setting, value, found[1], found[2])

    def _path(self, setting: str, value: str, name: str, file: str | None) -> str:
        where = f"{setting} = {value!r} ({self._place_of(setting)})"
        stage = self._before.get(name)
        if stage is None:
            if name in self._later or name == self._name:
                raise ConfigError(
                    f"stage {self._name!r}: {where} refers to a stage that has not run before it; stages run in the order "
                    "of the file"
                )
            known = (
                f"; {did_you_mean(name, list(self._before))}"
                if self._before
                else ", and none comes before it"
            )
            raise ConfigError(f"stage {self._name!r}: {where} refers to no stage{known}")
        leaf = setting.rpartition(".")[2]
        if file is not None:
            self._uses.append(name)
            return str(stage.folder / file)
        is_wrong = (
            stage.run == "evaluate"
            or (leaf in _MODEL_SETTINGS and not stage.is_recipe)
            or (leaf in _DATA_SETTINGS and stage.is_recipe)
        )
        if is_wrong:
            has = {"sample": "rows", "evaluate": "no output but its files"}.get(stage.run, "a model")
            raise ConfigError(
                f"stage {self._name!r}: {where} cannot be used there: a stage that runs {stage.run} gives {has}; name "
                f"another stage, or a file in its folder as @{name}/file"
            )
        self._uses.append(name)
        return str(stage.output)


# defaults -----------------------------------------------------------------------------------------------------


def _defaults(
    run: str, given: Mapping[str, Any], defaults: Mapping[str, Any], *, world_size: int
) -> dict[str, tuple[str, Any]]:
    """Default by its own name -> (name in this stage, value), of those the stage has, does not set, and profits from."""
    set_here = {_canonical(name, run) for name in given}
    found = {
        name: (ours, value)
        for name, value in defaults.items()
        if (ours := _canonical(name, run, is_default=True)) is not None and ours not in set_here
    }
    if run == "sample":
        idle = set(sample.LOCAL_ONLY if given.get("base_url") else ())
        idle |= {"form", "strict_form"} if given.get("reward", "reasoning") != "reasoning" else set()
    elif run == "evaluate":
        idle = {"form", "strict_form"} if given.get("perplexity") else set()
    else:
        trial = {**given, **dict(found.values())}
        try:
            idle = without_effect(run, trial, world_size=world_size)
        except ConfigError:
            idle = set()  # the stage's own mistake, which is said with its place when it is resolved
    return {name: (ours, value) for name, (ours, value) in found.items() if ours not in idle}


def root_of(run: str) -> type[Section]:
    """The settings class of what a stage runs."""
    return COMMANDS[run] if run in COMMANDS else settings_class(run)


def _canonical(name: str, run: str, *, is_default: bool = False) -> str | None:
    """The setting of `run` that a name stands for, whatever vocabulary it is in; None if it has no such."""
    known = settings_of(root_of(run))
    if name in known:
        return name
    if is_default and run in COMMANDS:
        leaf = name.rpartition(".")[2]
        return leaf if leaf in known and name in SHARED else None
    if not is_default and name in (aliases := for_command(run)):
        return aliases[name].to or None
    flat = flat_names(known)
    return flat.get(name)


def _all_sections() -> set[str]:
    return {name for recipe in names_in("kitae.recipes") for name in sections_of(settings_class(recipe))}


# small things -------------------------------------------------------------------------------------------------


def _flatten(
    table: Mapping[str, Any], sections: Mapping[str, Any] | set[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Leaves by dotted name; tables that are values, such as data.columns, stay whole."""
    for key, value in table.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name in sections:
            yield from _flatten(value, sections, f"{name}.")
        else:
            yield name, value


def _refuse_unknown(table: Mapping[str, Any], known: Sequence[str], place_of: PlaceOf) -> None:
    for name in table:
        if name not in known:
            raise ConfigError(f"unknown name {name} ({place_of(name)}); {did_you_mean(name, known)}")


def _toml(value: Any) -> str:
    """A JSON value as TOML has it; None is the word none, which settings read as nothing."""
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)
