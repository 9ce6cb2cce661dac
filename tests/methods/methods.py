"""What is known about each method: its file <recipe>.toml here, how its toy run is made, and the page of them all.

<recipe>.toml --Method--> settings of the full, LoRA or QLoRA toy run --run_recipe--> metrics.jsonl --> did it learn
"""

from __future__ import annotations

import json
import math
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.config import SeamSettings
from kitae.plugins import names_in
from kitae.recipes._run import run_recipe
from kitae.settings import resolve, settings_class

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "recipes" / "README.md"
KINDS = ("full", "lora", "qlora")
OF_KIND: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": {"rank": 8, "alpha": 16}},
    "qlora": {"lora": {"rank": 8, "alpha": 16}, "model": {"quantization": "nf4"}},
}
GOLDEN_STEPS = 20
COMPARED = ("train/", "rollout/", "eval/")
"""A golden trace keeps these; speed and seconds are those of a machine."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One <recipe>.toml."""

    recipe: str
    choose: str
    """When to choose the method, for the page."""
    metric: str
    rises_by: float
    """At least so much; negative: falls by at least so much."""
    window: int
    """Means are taken over so many lines at both ends."""
    settings: dict[str, Any]
    of_kind: dict[str, dict[str, Any]]
    """What LoRA and QLoRA runs change, such as the learning rate."""
    golden: dict[str, Any]
    """What the golden trace changes, such as a shorter completion."""

    @property
    def trace(self) -> Path:
        return HERE / f"{self.recipe}.json"


def read_method(recipe: str) -> Method:
    found = tomllib.loads((HERE / f"{recipe}.toml").read_text())
    learns = found["learns"]
    assert set(found) <= {"choose", "learns", "settings", "lora", "qlora", "golden"}, recipe
    assert set(learns) <= {"metric", "rises_by", "falls_by", "window"}, recipe
    lora = found.get("lora", {})
    return Method(
        recipe=recipe,
        choose=found["choose"],
        metric=learns["metric"],
        rises_by=learns["rises_by"] if "rises_by" in learns else -learns["falls_by"],
        window=learns.get("window", 5),
        settings=found["settings"],
        of_kind={"full": {}, "lora": lora, "qlora": merged(lora, found.get("qlora", {}))},
        golden=found.get("golden", {}),
    )


def methods() -> list[str]:
    """Recipes that have a file here."""
    return sorted(path.stem for path in HERE.glob("*.toml"))


def recipes() -> list[str]:
    return names_in("kitae.recipes")


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested tables of settings, `above` laid over `below`."""
    out = dict(below)
    for name, value in above.items():
        out[name] = merged(out.get(name, {}), value) if isinstance(value, dict) else value
    return out


def train(
    method: Method,
    *,
    files: Path,
    output_dir: Path,
    kind: str = "full",
    is_golden: bool = False,
    changes: dict[str, Any] | None = None,
):
    """Run the method on the toy task, with `changes` of its settings; the lines of its metrics.jsonl."""
    common = {
        "output_dir": str(output_dir),
        "model": {"dtype": "float32", "device": "cpu"},
        "train": {"num_threads": 1},
        "log": {"report_to": ["none"]},
        "save": {"steps": 0},
    }
    given = merged(merged(merged(common, method.settings), OF_KIND[kind]), method.of_kind[kind])
    if is_golden:
        seams = dict.fromkeys(SeamSettings.model_fields, False)
        exact = {"model": {"seams": seams}, "train": {"max_steps": GOLDEN_STEPS}, "log": {"steps": 1}}
        given = merged(merged(given, exact), method.golden)
    given = merged(given, changes or {})
    with working_in(files):
        settings, notes = resolve(method.recipe, given)
        assert not notes.warnings, notes.warnings
        folder = run_recipe(method.recipe, settings)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def movement(lines: list[dict[str, Any]], *, metric: str, window: int) -> tuple[float, float]:
    """Means of a metric over its first and its last `window` lines."""
    values = [line[metric] for line in lines if metric in line]
    assert len(values) >= 2 * window, f"{metric} is in {len(values)} lines, which is less than 2 x {window}"
    return math.fsum(values[:window]) / window, math.fsum(values[-window:]) / window


def golden_trace(method: Method, *, files: Path, output_dir: Path) -> list[dict[str, float]]:
    """The first steps in fp32, one thread, every seam off: their numbers without those of speed."""
    lines = train(method, files=files, output_dir=output_dir, is_golden=True)
    assert [line["step"] for line in lines] == list(range(1, GOLDEN_STEPS + 1)), "one line a step"
    return [
        {name: value for name, value in line.items() if name == "step" or name.startswith(COMPARED)}
        for line in lines
    ]


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The folder of the toy task as the working folder: settings name its files as a user would."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


HEAD = """# Methods

Generated from `tests/methods/` by `python tests/methods/make_page.py`. *Tested* means that the test suite trains a small
model with the method in this way and checks that it learns: that the number in the last column moves by that much.

| method | what it is | full | LoRA | QLoRA | learns in the test |
|---|---|---|---|---|---|
"""


def page() -> str:
    """docs/recipes/README.md."""
    known = [read_method(name) for name in recipes() if name in methods()]
    rows = "".join(
        f"| {_link(m.recipe)} | {_what(m.recipe)} | tested | tested | tested | {_learns(m)} |\n"
        for m in known
    )
    when = "".join(f"- {_link(m.recipe)}: {' '.join(m.choose.split())}\n" for m in known)
    return f"{HEAD}{rows}\n## When to choose which\n\n{when}"


def _link(recipe: str) -> str:
    assert (PAGE.parent / f"{recipe}.md").is_file(), f"docs/recipes/{recipe}.md is missing"
    return f"[`{recipe}`]({recipe}.md)"


def _what(recipe: str) -> str:
    return " ".join((settings_class(recipe).__doc__ or "").strip().partition("\n")[0].split())


def _learns(method: Method) -> str:
    verb = "rises" if method.rises_by > 0 else "falls"
    return f"`{method.metric}` {verb} by {abs(method.rises_by):g}"
