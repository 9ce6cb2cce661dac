"""Standings of problems: counted from the records of samples.jsonl, kept over a checkpoint."""

import json

import pytest

from kitae.train.difficulty import PASSED_OVER, Difficulty


def records(problem, rewards):
    return [{"problem": problem, "reward": reward} for reward in rewards]


def test_standings_are_counted_over_rounds(tmp_path):
    found = Difficulty(right_from=10.0)
    found.see(1, records(7, [0.0, 1.0, 10.0, None]) + records(3, [1.0, 1.0]))
    found.see(4, records(7, [10.0, 10.0]))
    found.write(tmp_path / "difficulty.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "difficulty.jsonl").read_text().splitlines()]
    assert lines == [
        {"problem": 3, "attempts": 2, "scored": 2, "right": 0, "last_step": 1, "reward": 1.0, "pass_rate": 0.0},
        {"problem": 7, "attempts": 6, "scored": 5, "right": 3, "last_step": 4, "reward": 31 / 5, "pass_rate": 3 / 5},
    ]  # fmt: skip


def test_a_problem_that_could_never_be_scored_has_no_rate_and_is_not_settled(tmp_path):
    found = Difficulty(right_from=1.0)
    found.see(1, records(0, [None, None]))
    assert found.of(0).pass_rate is None
    assert not found.of(0).is_settled
    found.write(tmp_path / "x")
    assert json.loads((tmp_path / "x").read_text())["reward"] is None


@pytest.mark.parametrize(("right", "is_settled"), [(0, True), (1, False), (9, False), (10, True)])
def test_a_problem_is_settled_when_nearly_all_or_nearly_none_is_right(right, is_settled):
    found = Difficulty(right_from=1.0)
    found.see(1, records(5, [1.0] * right + [0.0] * (10 - right)))
    assert found.of(5).is_settled == is_settled
    assert found.is_passed_over(5) == is_settled


def test_a_settled_problem_is_passed_over_three_times_and_then_tried():
    found = Difficulty(right_from=1.0)
    found.see(1, records(5, [1.0] * 4))
    for _ in range(PASSED_OVER):
        assert found.is_passed_over(5)
        found.pass_over(5)
    assert not found.is_passed_over(5)
    found.see(9, records(5, [1.0] * 4))
    assert found.is_passed_over(5)


def test_a_problem_never_seen_is_not_passed_over():
    assert not Difficulty(right_from=1.0).is_passed_over(3)


def test_state_survives_json():
    found, other = Difficulty(right_from=1.0), Difficulty(right_from=1.0)
    found.see(1, records(5, [1.0] * 4) + records(2, [0.1, 0.7]))
    found.pass_over(5)
    other.load_state(json.loads(json.dumps(found.state())))
    assert other.state() == found.state()
    assert other.of(5).passed_over == 1
