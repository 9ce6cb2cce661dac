"""The repetition penalty, counted by hand."""

import pytest

from kitae.rewards.repetition import reward


def judge(text):
    return reward(text, prompt="", answer=None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d", 0.0),
        ("a b c d a b c d", -1 / 5),
        ("A b C d, a B c D", -1 / 6),
        ("A b C d a B c D", -1 / 5),
        ("so so so so so so so", -3 / 4),
        ("1000000 and 1000000", 0.0),  # a number is one word
        ("したがってしたがって", -2 / 7),  # five characters twice
    ],
)
def test_the_penalty_is_the_share_of_runs_that_occurred_before(text, value):
    found = judge(text)
    assert found.value == pytest.approx(value)
    assert -1.0 < found.value <= 0.0
