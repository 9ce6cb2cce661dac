"""Baselines and scales against plain Python, alone and over ranks."""

import math
import statistics

import pytest
import torch

from kitae.algos.baselines import estimate, leave_one_out

NAN = math.nan
REWARDS = [
    [0.0, 1.0, 10.0, 1.0],
    [1.0, 1.0, 1.0, 1.0],
    [0.0, NAN, 10.0, 10.0],
    [5.0, 0.0, 1.0, NAN],
    [NAN] * 4,
]


def slow(rewards, how, scale):
    """[P, G] advantages; a completion that could not be scored is not there at all."""

    def scored(group):
        return [r for r in group if not math.isnan(r)]

    def one(group, r):
        own = scored(group)
        if math.isnan(r) or len(own) < 2 or min(own) == max(own):
            return 0.0
        if how == "rloo":
            others = list(own)
            others.remove(r)
            return r - statistics.fmean(others)
        return r - statistics.fmean(own)

    found = [[one(group, r) for r in group] for group in rewards]
    if how == "group" and scale == "batch":
        std = statistics.stdev([r for group in rewards for r in scored(group)])
        return [[a / (std + 1e-4) for a in group] for group in found]
    if how == "group" and scale == "group":
        stds = [statistics.stdev(scored(g)) if len(scored(g)) > 1 else 0.0 for g in rewards]
        return [[a / (std + 1e-4) for a in group] for group, std in zip(found, stds, strict=True)]
    if how == "reinforce++":
        everything = [
            a
            for g, own in zip(rewards, found, strict=True)
            for r, a in zip(g, own, strict=True)
            if not math.isnan(r)
        ]
        mean, std = statistics.fmean(everything), statistics.stdev(everything)
        return [[(a - mean) / (std + 1e-4) if a else 0.0 for a in group] for group in found]
    return found


CASES = [
    ("group", "group"), ("group", "batch"), ("group", "none"), ("rloo", "group"), ("reinforce++", "group")
]  # fmt: skip


@pytest.mark.parametrize(("how", "scale"), CASES)
def test_every_baseline_equals_plain_python(how, scale):
    found = estimate(torch.tensor(REWARDS), baseline=how, scale=scale)
    for own, expected in zip(found.tolist(), slow(REWARDS, how, scale), strict=True):
        assert own == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("how", "scale"), CASES)
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_the_round_is_all_ranks_together(how, scale, cut):
    """Each rank's sums are added to those the other rank has at the same call."""
    whole = torch.tensor(REWARDS)
    parts, sums = [whole[:cut], whole[cut:]], [[], []]

    def run(rank, others):
        calls = iter(others)

        def add(values):
            sums[rank].append(values.clone())
            theirs = next(calls, None)
            return values if theirs is None else values + theirs

        return estimate(parts[rank], baseline=how, scale=scale, sum_over_ranks=add)

    known = []
    for _ in range(2):  # the second sum depends on the first one's result
        sums[0].clear(), sums[1].clear()
        run(0, known[1] if known else [])
        run(1, known[0] if known else [])
        known = [list(sums[0]), list(sums[1])]
    found = torch.cat([run(0, known[1]), run(1, known[0])])
    torch.testing.assert_close(found, estimate(whole, baseline=how, scale=scale))


def test_the_docstring_example():
    assert leave_one_out(torch.tensor([[0.0, 1.0, 11.0]])).tolist() == [[-6.0, -4.5, 10.5]]


@pytest.mark.parametrize(("how", "scale"), CASES)
def test_dead_groups_get_exact_zeros_and_no_prompts_give_none(how, scale):
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0.0, 1.0, 0.3], [NAN, NAN, 2.0]])
    found = estimate(rewards, baseline=how, scale=scale)
    assert found[0].tolist() == found[2].tolist() == [0.0] * 3
    assert found[1].abs().min() > 0
    assert estimate(torch.zeros(0, 4), baseline=how, scale=scale).shape == (0, 4)
