import statistics

import pytest
import torch

from kitae.algos.advantages import group_relative, is_dead

NAN = float("nan")


def test_the_docstring_example():
    assert group_relative(torch.tensor([[0.0, 1.0, 10.0]]))[0].tolist() == pytest.approx(
        [-0.666, -0.484, 1.150], abs=1e-3
    )


def test_advantages_equal_a_plain_python_version():
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 3, (20, 6), generator=generator).float() * 5
    found = group_relative(rewards)
    for row, group in zip(found.tolist(), rewards.tolist(), strict=True):
        mean, deviation = statistics.fmean(group), statistics.stdev(group)
        expected = [0.0] * 6 if deviation == 0 else [(r - mean) / (deviation + 1e-4) for r in group]
        assert row == pytest.approx(expected, abs=1e-5)


def test_an_unscored_completion_gets_zero_and_leaves_its_group_alone():
    with_hole = group_relative(torch.tensor([[0.0, NAN, 1.0, 10.0]]))[0]
    without = group_relative(torch.tensor([[0.0, 1.0, 10.0]]))[0]
    assert with_hole[[0, 2, 3]].tolist() == pytest.approx(without.tolist())
    assert with_hole[1] == 0


@pytest.mark.parametrize(
    "group", [[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [NAN, NAN, NAN], [10.0, NAN, NAN], [10.0, NAN, 10.0]]
)
def test_a_dead_group_gets_exact_zeros(group):
    assert is_dead(torch.tensor([group])).item()
    assert group_relative(torch.tensor([group]))[0].tolist() == [0.0] * 3
    assert group_relative(torch.tensor([group]), scale_by_std=False)[0].tolist() == [0.0] * 3


def test_without_the_deviation_advantages_are_differences_to_the_mean():
    assert group_relative(torch.tensor([[0.0, 1.0, 11.0]]), scale_by_std=False).tolist() == [
        [-4.0, -3.0, 7.0]
    ]


def test_no_prompts_give_no_advantages():
    assert group_relative(torch.zeros(0, 4)).shape == (0, 4)
