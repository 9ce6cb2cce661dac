"""What docs/rewards.md promises: its example runs, and its table of answers holds."""

import re
from pathlib import Path

import pytest

from kitae.config import RewardSettings
from kitae.rewards.loading import builtin_names
from kitae.rewards.math import equivalent
from kitae.rewards.pool import RewardPool
from kitae.types import Problem

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_the_example_reward_runs_as_written(tmp_path):
    (code,) = re.findall(r"```python\n# short_reward.py\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "short_reward.py").write_text(code)

    def problem(**columns):
        return Problem(prompt="6 + 7?", token_ids=[], answer="13", columns=columns)

    long = "x" * 994 + " is 13"
    with RewardPool(RewardSettings(function=f"{tmp_path}/short_reward.py:reward", timeout_s=20)) as pool:
        assert pool.score(
            [("It is 13", problem()), (long, problem()), (long, problem(level="hard")), ("", problem())]
        ) == [
            (1.0, "right, 8 characters"),
            (0.5, "right, 1000 characters"),
            (1.0, "right, 1000 characters"),
            (0.0, "wrong: None (nothing found)"),
        ]


def test_every_built_in_reward_is_on_the_page():
    for name in builtin_names():
        assert f"| `{name}`" in PAGE


SECTION = PAGE.split("## When two answers are the same")[1].split("\n## ")[0]
CELLS = [row.split(" | ") for row in re.findall(r"^\| (\w+ \| .*) \|$", SECTION, re.MULTILINE)]
PAIRS = [
    (left, answers[-1], is_same)
    for _, *cells in CELLS
    for cell, is_same in zip(cells, (True, False), strict=False)
    for group in cell.split(";")
    if len(answers := re.findall(r"`([^`]+)`", group)) >= 2
    for left in answers[:-1]
]


@pytest.mark.parametrize(("left", "right", "is_same"), PAIRS)
def test_the_table_of_answers_holds(left, right, is_same):
    assert equivalent(left, right) == is_same


def test_the_table_was_read():
    assert sum(is_same for *_, is_same in PAIRS) >= 25
    assert sum(not is_same for *_, is_same in PAIRS) >= 10
