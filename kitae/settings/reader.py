"""Reads words, dicts, TOML and YAML files into one settings class, whatever vocabulary they are written in."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kitae.config import Section
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean
from kitae.settings import aliases, rules, words
from kitae.settings.aliases import Alias
from kitae.settings.conversions import Unset
from kitae.settings.draft import Draft, Origin, as_bool
from kitae.settings.fields import Setting, flat_names, sections_of, settings_of

YAML = (".yaml", ".yml")


class Reader:
    """Gathers what is given for one command or recipe into a Draft."""

    def __init__(self, command: str, root: type[Section], *, world_size: int) -> None:
        """`command` chooses the aliases; `root` has the settings."""
        self.root = root
        self.known = settings_of(root)
        self.sections = sections_of(root)
        self.flat = flat_names(self.known)
        self.aliases = aliases.for_command(command)
        self.draft = Draft(command=command, world_size=world_size, known=self.known)

    # reading ---------------------------------------------------------------------------------------------------

    def from_words(self, given: Sequence[str]) -> tuple[list[str], list[tuple[str, Any, Origin]]]:
        alone, flags = words.split(given, switch_words=lambda flag: self._switch_words(flag.name))
        items: list[tuple[str, Any, Origin]] = []
        for flag in flags:
            setting, alias = self._find(flag.name)
            if setting is None and alias is None:
                raise self._unknown(flag.spelling, flag.name)
            origin = Origin(where=flag.spelling, rank=1, is_foreign=alias is not None)
            if not flag.values and self._switch_words(flag.name) is None:
                raise ConfigError(f"{flag.spelling} needs a value")
            value: Any = flag.values if len(flag.values) > 1 else (flag.values or ["true"])[0]
            items.append((flag.name, value, origin))
        return alone, items

    def from_mapping(
        self, table: Mapping[str, Any], *, rank: int, place_of: Callable[[str], str], prefix: str = ""
    ) -> Iterator[tuple[str, Any, Origin]]:
        """Leaves of nested or flat tables. `place_of` says where a name is written."""
        for key, value in table.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and name in self.sections:
                yield from self.from_mapping(value, rank=rank, place_of=place_of, prefix=f"{name}.")
                continue
            setting, alias = self._find(name)
            if setting is None and alias is None:
                raise self._unknown(place_of(name), name)
            yield name, value, Origin(where=place_of(name), rank=rank, is_foreign=alias is not None)

    def read_file(self, path: Path) -> None:
        read_table = read_yaml if path.suffix in YAML else read_toml
        table, text = read_table(path, what="settings")
        lines = _line_numbers(text)

        def place_of(name: str) -> str:
            return f"{path} line {lines[name]}" if name in lines else str(path)

        for name, value, origin in self.from_mapping(table, rank=0, place_of=place_of):
            self.place(name, value, origin)

    # naming ----------------------------------------------------------------------------------------------------

    def _find(self, name: str) -> tuple[Setting | None, Alias | None]:
        """Our setting (dotted, or flat where one section has it), or an alias of another program."""
        if name in self.known:
            return self.known[name], None
        if name in self.aliases:
            return None, self.aliases[name]
        if name in self.flat:
            return self.known[self.flat[name]], None
        table = self.known.get(name.rpartition(".")[0])
        return (table if table is not None and table.is_table else None), None

    def _switch_words(self, name: str) -> frozenset[str] | None:
        """What a switch takes beside true and false; None for what is no switch."""
        setting, alias = self._find(name)
        if alias is not None:
            if not alias.is_switch:
                return None
            setting = self.known.get(alias.to)
            return setting.words if setting is not None and setting.is_switch else frozenset()
        return setting.words if setting is not None and setting.is_switch else None

    def _unknown(self, where: str, name: str) -> ConfigError:
        """An error with the nearest known name, written as the user wrote: with or without dashes."""
        shown = where if where in (name, f"--{name}") or where.startswith("-") else f"{name} ({where})"
        leaves = [n for n in self.known if n.rpartition(".")[2] == name]
        if leaves:
            return ConfigError(f"{shown}: several sections have {name!r}; write one of {', '.join(leaves)}")
        dashes = "--" if where.startswith("-") else ""
        names = [*self.known, *self.flat, *(n for n in self.aliases if not n.startswith("-"))]
        hint = did_you_mean(dashes + name.lstrip("-"), [dashes + n for n in names])
        if not hint.startswith("did you mean"):
            hint = "--help lists all"
        return ConfigError(f"unknown setting {shown}; {hint}")

    # placing ---------------------------------------------------------------------------------------------------

    def place(self, name: str, value: Any, origin: Origin) -> None:
        setting, alias = self._find(name)
        if alias is not None:
            self._place_alias(alias, value, origin)
        elif setting is None:
            raise self._unknown(origin.where, name)
        elif setting.is_table and name != setting.name:
            before = self.draft.value(setting.name)
            self.draft.values.pop(setting.name, None)
            self.draft.put(setting.name, {**before, name.rpartition(".")[2]: value}, origin)
        else:
            self.draft.put(setting.name, _shaped(setting, value, origin), origin)

    def place_word(self, name: str, value: Any) -> None:
        """A word that stands for a setting by its place."""
        self.place(name, value, Origin(where=f"the word {value!r}", rank=1))

    def _place_alias(self, alias: Alias, value: Any, origin: Origin) -> None:
        if alias.effect == "together":
            self.draft.put_together(alias.key, value, origin)
        elif alias.effect == "warns":
            self.draft.warn(f"{origin.where} has no effect: {alias.note}")
        elif alias.effect == "limited":
            _refuse_beyond_one(alias, value, origin)
        else:
            try:
                converted = alias.convert(value) if alias.convert else value
            except ValueError as error:
                raise ConfigError(f"{origin.where} is {value!r}; {error}") from error
            if not isinstance(converted, Unset):
                self.draft.put(alias.to, _shaped(self.known[alias.to], converted, origin), origin)

    # finishing -------------------------------------------------------------------------------------------------

    def validate(self) -> Any:
        """The settings object, once everything is placed."""
        draft = self.draft
        rules.apply(draft)
        for name, setting in self.known.items():
            if setting.is_required and name not in draft.values:
                raise ConfigError(f"{name} is required; {_how_to_give(name)}")
        nested: dict[str, Any] = {}
        for name, setting in self.known.items():
            _put_nested(nested, name, draft.values[name].value if name in draft.values else setting.default)
        try:
            return self.root.model_validate(nested)
        except ValidationError as error:
            raise ConfigError("; ".join(self._explain(error))) from None

    def with_places(self, problem: str) -> str:
        """The problem, with where the settings it names were set."""
        named = [n for n in self.draft.values if re.search(rf"(?<![\w.]){re.escape(n)}(?![\w.])", problem)]
        places = ", ".join(f"{n} by {self.draft.values[n].origin.where}" for n in named)
        return f"{problem} (set: {places})" if places else problem

    def _explain(self, error: ValidationError) -> Iterator[str]:
        """One clause per wrong setting; a union's many complaints about one value count once."""
        told: dict[str, list[str]] = {}
        for item in error.errors(include_url=False, include_context=False):
            parts = [str(part) for part in item["loc"]]
            name = next(
                (n for i in range(len(parts), 0, -1) if (n := ".".join(parts[:i])) in self.known),
                ".".join(parts),
            )
            told.setdefault(name, []).append(item["msg"][:1].lower() + item["msg"][1:])
        for name, reasons in told.items():
            given = self.draft.values.get(name)
            value = f" is {given.value!r} ({given.origin.where})" if given else ""
            yield f"{name}{value}: {' or '.join(dict.fromkeys(reasons))}"


def _shaped(setting: Setting, value: Any, origin: Origin) -> Any:
    """One value for a single setting, a list for a list; `none` where nothing is a possible value."""
    if setting.is_list:
        is_word = isinstance(value, str) and any(
            value in getattr(t, "__args__", ()) for t in setting.alternatives
        )
        return value if is_word or isinstance(value, list) else [value]
    if setting.is_table:
        return _table(value, origin)
    if isinstance(value, list):
        raise ConfigError(
            f"{origin.where} takes one value, and got {len(value)}: {' '.join(map(str, value))}"
        )
    takes_none = type(None) in setting.alternatives and str not in setting.alternatives
    return None if takes_none and str(value).lower() == "none" else value


def _table(value: Any, origin: Origin) -> Any:
    """A table as it is, or from words name=value."""
    if isinstance(value, Mapping):
        return value
    pairs = [str(word).partition("=") for word in (value if isinstance(value, list) else [value])]
    if wrong := [name for name, sign, _ in pairs if not sign]:
        raise ConfigError(f"{origin.where} takes name=value, one or more; {wrong[0]!r} has no =")
    return {name: own for name, _, own in pairs}


def _refuse_beyond_one(alias: Alias, value: Any, origin: Origin) -> None:
    if alias.is_switch:
        is_asked = as_bool(value, origin.where)
    else:
        is_asked = str(value) not in ("0", "1")
    if is_asked:
        shown = "" if alias.is_switch else f" {value}"
        raise ConfigError(f"{origin.where}{shown}: {alias.note} is not there yet; leave the flag out")


def _how_to_give(name: str) -> str:
    if name == "model.name_or_path":
        return 'give --model_name_or_path MODEL, or name_or_path = "MODEL" under [model] in the settings file'
    return f"give --{name}"


def _put_nested(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[leaf] = value


def read_toml(path: Path, *, what: str) -> tuple[dict[str, Any], str]:
    """A TOML file's table, and its text; `what` it holds, for messages."""
    text = _read_text(path, what=what)
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def read_yaml(path: Path, *, what: str) -> tuple[dict[str, Any], str]:
    """The same of a YAML file, as TRL and LLaMA-Factory have them; what is null there counts as not given."""
    import yaml  # type: ignore[import-untyped]  # transformers brings it

    text = _read_text(path, what=what)
    try:
        table = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path} holds no settings; write one `name: value` a line")
    return {str(name): value for name, value in table.items() if value is not None}, text


def _read_text(path: Path, *, what: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"cannot read the {what} file {path}: {why}") from error


def _line_numbers(text: str) -> dict[str, int]:
    """Where each dotted name of a TOML text, or top one of a YAML text, is set, for messages; some may be hidden."""
    found: dict[str, int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[([\w.\-]+)\]", line):
            section = header[1] + "."
        elif key := re.match(r"\s*([\w.\-]+)\s*[=:]", line):
            found.setdefault(section + key[1], number)
    return found
