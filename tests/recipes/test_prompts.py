"""Refilling dead groups and the curriculum, on a made-up sampler; the same for any number of ranks."""

import json
import threading

import pytest

from kitae.data.loader import Loader
from kitae.recipes._prompts import Prompts
from kitae.train.difficulty import Difficulty
from kitae.types import Problem, Rollout, Score

PER_ROUND, GROUP = 6, 4


class Ranks:
    """Worlds of threads that gather JSON values as processes do."""

    def __init__(self, count):
        self.count, self.values, self.barrier = count, [None] * count, threading.Barrier(count, timeout=20)

    def world(self, rank):
        ranks = self

        class World:
            world_size = ranks.count

            def gather_json(self, value):
                ranks.values[rank] = json.dumps(value)
                ranks.barrier.wait()
                found = [json.loads(v) for v in ranks.values]
                ranks.barrier.wait()
                return found

        World.rank = rank
        return World()


def attempt(problems, hard=lambda index: index % 3 == 0):
    """Groups whose rewards are all 0 for every third problem, and mixed for the others."""
    groups = [
        [Rollout(problem=p, text=f"{p.index}.{g}", token_ids=[g], logprobs=[-1.0]) for g in range(GROUP)]
        for p in problems
    ]
    scores = [[Score(0.0 if hard(p.index) else float(g % 2)) for g in range(GROUP)] for p in problems]
    return groups, scores


def play(ranks, *, rounds, passes, num_problems=40, curriculum=False, start=None, shuffle=True):
    """What every rank saw, round by round: [rounds][ranks] of Round; and the state at the end."""
    together, seen, states, errors = Ranks(ranks), [[None] * ranks for _ in range(rounds)], [None] * ranks, []
    problems = [Problem(prompt=str(i), token_ids=[i], index=100 + i) for i in range(num_problems)]

    def live(rank):
        try:
            world = together.world(rank)
            loader = Loader(
                problems, items_per_step=PER_ROUND, seed=3, rank=rank, world_size=ranks, shuffle=shuffle
            )
            spares, difficulty = (
                Loader(range(num_problems), items_per_step=1, seed=4),
                Difficulty(right_from=1.0),
            )
            if start is not None:
                for part, state in zip((loader, spares, difficulty), json.loads(start), strict=True):
                    part.load_state(state)
            prompts = Prompts(
                problems, loader=loader, spares=spares, world=world, curriculum=difficulty if curriculum else None,
                refill_passes=passes,
            )  # fmt: skip
            for number in range(rounds):
                seen[number][rank] = found = prompts.round(attempt)
                records = [
                    {"problem": r.problem.index, "reward": s.value}
                    for group, own in zip(*found.everything, strict=True)
                    for r, s in zip(group, own, strict=True)
                ]
                difficulty.see(number + 1, [r for own in world.gather_json(records) for r in own])
            states[rank] = json.dumps([loader.state(), spares.state(), difficulty.state()])
        except BaseException as error:
            errors.append(error)
            together.barrier.abort()

    threads = [threading.Thread(target=live, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    return seen, states


def places(of_ranks):
    """The problems of a round by place: place i of rank r is the round's i * ranks + r."""
    width = len(of_ranks)
    found = {
        i * width + rank: group[0].problem.index
        for rank, one in enumerate(of_ranks)
        for i, group in enumerate(one.groups)
    }
    return [found[place] for place in sorted(found)]


def test_without_passes_a_round_is_what_the_loader_gives():
    seen, _ = play(1, rounds=2, passes=0, shuffle=False)
    assert [places(r) for r in seen] == [[100 + i for i in range(6)], [100 + i for i in range(6, 12)]]
    assert seen[0][0].metrics == {}
    assert seen[0][0].everything == (seen[0][0].groups, seen[0][0].scores)


def test_dead_groups_are_replaced_by_prompts_the_round_has_not_seen():
    seen, _ = play(1, rounds=5, passes=10)
    for (found,) in seen:
        own = places([found])
        everything = [group[0].problem.index for group in found.everything[0]]
        assert len(own) == PER_ROUND
        assert all(index % 3 for index in own), "a dead group stayed"
        assert len(set(everything)) == len(everything)
        left = [group[0].problem.index for group in found.left_groups]
        assert all(index % 3 == 0 for index in left)
        assert found.metrics == {
            "rollout/refilled_groups": len(everything) - PER_ROUND, "rollout/dead_after_refill": 0.0
        }  # fmt: skip
    assert sum(found.metrics["rollout/refilled_groups"] for (found,) in seen) > 0


def test_the_budget_of_passes_is_kept_and_what_stays_dead_is_counted():
    calls = []

    def hopeless(problems):
        calls.append([p.index for p in problems])
        return attempt(problems, hard=lambda index: True)

    problems = [Problem(prompt=str(i), token_ids=[i], index=i) for i in range(40)]
    prompts = Prompts(
        problems, loader=Loader(problems, items_per_step=PER_ROUND, seed=0), curriculum=None, refill_passes=2,
        spares=Loader(range(40), items_per_step=1, seed=1), world=Ranks(1).world(0),
    )  # fmt: skip
    found = prompts.round(hopeless)
    assert [len(call) for call in calls] == [PER_ROUND] * 3
    assert len({index for call in calls for index in call}) == 3 * PER_ROUND
    assert found.metrics == {"rollout/refilled_groups": 12.0, "rollout/dead_after_refill": 1.0}
    assert len(found.groups) == PER_ROUND
    assert len(found.left_groups) == 2 * PER_ROUND


def test_data_without_other_prompts_leaves_the_round_as_it_is():
    seen, _ = play(1, rounds=3, passes=3, num_problems=PER_ROUND)
    for (found,) in seen:
        assert sorted(places([found])) == [100 + i for i in range(PER_ROUND)]
        assert found.metrics["rollout/refilled_groups"] == 0
        assert found.metrics["rollout/dead_after_refill"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("curriculum", [False, True])
@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_rounds_are_the_same_on_any_number_of_ranks(ranks, curriculum):
    """More ranks than a short round has prompts, too: 40 problems end in a round of 4."""
    alone, alone_states = play(1, rounds=9, passes=2, curriculum=curriculum)
    seen, states = play(ranks, rounds=9, passes=2, curriculum=curriculum)
    assert [places(r) for r in seen] == [places(r) for r in alone]
    for one, (other,) in zip(seen, alone, strict=True):
        assert all(rank.metrics == other.metrics for rank in one)
    spares_and_difficulty = [json.loads(s)[1:] for s in states]
    for spares, difficulty in spares_and_difficulty:
        assert spares == json.loads(alone_states[0])[1]
        assert sorted(difficulty["standings"]) == sorted(json.loads(alone_states[0])[2]["standings"])


def test_a_resumed_run_draws_what_a_continuous_one_does():
    whole, _ = play(1, rounds=8, passes=2, curriculum=True)
    first, (state,) = play(1, rounds=3, passes=2, curriculum=True)
    second, _ = play(1, rounds=5, passes=2, curriculum=True, start=state)
    assert [places(r) for r in first + second] == [places(r) for r in whole]


def test_the_curriculum_samples_settled_problems_less_often_but_not_never():
    plain, _ = play(1, rounds=70, passes=0)
    chosen, _ = play(1, rounds=70, passes=0, curriculum=True)

    def count(seen, is_settled):
        indices = [index for found in seen for index in places(found)]
        return sum((index % 3 == 0) == is_settled for index in indices)

    assert count(chosen, True) < count(plain, True) / 2
    assert count(chosen, True) + count(chosen, False) == count(plain, True) + count(plain, False)
    last = [index for found in chosen[-30:] for index in places(found)]
    assert any(index % 3 == 0 for index in last), "settled problems never come back"
    assert len(set(last)) > 30
