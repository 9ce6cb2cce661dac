"""The alias table itself, and the pages made from it."""

from pathlib import Path

import pytest

from kitae.cli._pages import pages
from kitae.plugins import load, names_in
from kitae.settings import resolve, settings_class
from kitae.settings.aliases import for_command
from kitae.settings.fields import flat_names, settings_of

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPES = names_in("kitae.recipes")
COMMANDS = [*RECIPES, "evaluate", "generate", "chat", "compare", "sample"]


def known_to(command):
    root = (
        settings_class(command)
        if command in RECIPES
        else load(command, package="kitae.cli", attribute="Settings")
    )
    return settings_of(root)


@pytest.mark.parametrize("name", ["settings.md", "flags.md"])
def test_the_generated_pages_are_current(name):
    assert (DOCS / name).read_text(encoding="utf-8") == pages()[name], "run python -m kitae.cli._pages"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_alias_leads_to_a_setting_and_hides_none_of_ours(command):
    known = known_to(command)
    for name, alias in for_command(command).items():
        if alias.effect == "maps":
            assert alias.to in known, name
        assert name not in known, f"{name} is a setting of {command} itself"


@pytest.mark.parametrize("recipe", RECIPES)
def test_flags_with_a_reason_to_warn_stop_no_run(recipe):
    given = {"model_name_or_path": "m", "dataset_name": "d"}
    if recipe == "distill":
        given["teacher.name_or_path"] = "t"
    warning = {name: True for name, alias in for_command(recipe).items() if alias.effect == "warns"}
    plain, _ = resolve(recipe, given, world_size=1)
    same, notes = resolve(recipe, given | warning, world_size=1)
    assert same == plain
    assert len(notes.warnings) == len(warning) > 20


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_flat_name_is_never_ambiguous(recipe):
    known = settings_of(settings_class(recipe))
    for flat, dotted in flat_names(known).items():
        assert flat not in known and dotted.endswith(f".{flat}")


def test_every_setting_has_a_docstring():
    undocumented = [f"{c}: {s.name}" for c in COMMANDS for s in known_to(c).values() if not s.doc]
    assert undocumented == []
