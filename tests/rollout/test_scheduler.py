"""The scheduler by itself: rows, slots and groups without a model."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.config import SamplingSettings
from kitae.rollout.base import Request, make_requests, request_seed
from kitae.rollout.scheduler import Scheduler, round_up_rows
from kitae.types import Problem


def groups_of(sizes: list[int], *, prompt_length: int = 5, lengths: random.Random | None = None):
    problem = Problem(prompt="", token_ids=[1] * prompt_length)
    return [
        make_requests(
            problem,
            [lengths.randint(1, 12) if lengths else 3 for _ in range(size)],
            number=number,
            sampling=SamplingSettings(),
            seed=0,
        )
        for number, size in enumerate(sizes)
    ]


def scheduler_of(groups: list[list[Request]], **how: int) -> Scheduler:
    scheduler = Scheduler(**how)
    for group in groups:
        scheduler.add(group)
    return scheduler


def step(scheduler: Scheduler) -> None:
    """What an engine does with a token per row."""
    for request in scheduler.running:
        request.token_ids.append(0)
        if len(request.token_ids) == request.max_new_tokens:
            request.finish_reason = "length"


def test_a_group_enters_whole_or_waits():
    scheduler = scheduler_of(groups_of([3, 3, 3]), max_rows=7)
    assert [[r.problem_number for r in g] for g in scheduler.admit()] == [[0, 0, 0], [1, 1, 1]]
    assert scheduler.admit() == []
    scheduler.running[0].finish_reason = "stop"
    assert [r.sample_number for r in scheduler.retire()] == [0]
    assert scheduler.admit() == []
    scheduler.running[0].finish_reason = scheduler.running[2].finish_reason = "stop"
    scheduler.retire()
    assert [[r.problem_number for r in g] for g in scheduler.admit()] == [[2, 2, 2]]
    assert [r.problem_number for r in scheduler.running] == [0, 1, 1, 2, 2, 2]


def test_prompts_wait_for_one_another_until_an_eighth_of_the_rows_is_free():
    scheduler = scheduler_of(groups_of([1] * 100), max_rows=32)
    assert len(scheduler.admit()) == 32
    entered = []
    for request in scheduler.running[:8]:
        request.finish_reason = "stop"
        scheduler.retire()
        entered.append(len(scheduler.admit()))
    assert entered == [0, 0, 0, 4, 0, 0, 0, 4]


def test_prompts_that_somebody_waits_for_enter_at_once_and_few_at_a_time():
    scheduler = scheduler_of(groups_of([1] * 100, prompt_length=40), max_rows=32, max_prefill_tokens=400)
    assert [len(scheduler.admit(at_once=True)) for _ in range(3)] == [2, 2, 2]
    while scheduler.admit(at_once=True):
        pass
    assert len(scheduler.running) == 32
    scheduler.running[5].finish_reason = "stop"
    scheduler.retire()
    assert scheduler.admit() == []
    assert len(scheduler.admit(at_once=True)) == 1


def test_prompts_admitted_together_stay_below_the_prefill_limit_but_a_long_one_enters_alone():
    scheduler = scheduler_of(groups_of([1] * 5, prompt_length=40), max_rows=8, max_prefill_tokens=100)
    assert [len(scheduler.admit()) for _ in range(4)] == [2, 2, 1, 0]
    scheduler = scheduler_of(groups_of([1, 1], prompt_length=400), max_rows=8, max_prefill_tokens=100)
    assert [len(scheduler.admit()) for _ in range(3)] == [1, 1, 0]


def test_a_group_waits_for_memory_or_enters_in_part_where_nothing_runs():
    room = 2

    def fits(group: Sequence[Request], running: Sequence[Request]) -> int:
        count = min(len(group), room - len(running))
        return count if count == len(group) or not running else 0

    scheduler = Scheduler(max_rows=8, room=fits)
    for group in groups_of([3, 1]):
        scheduler.add(group)
    numbers = [[r.sample_number for r in group] for group in scheduler.admit()]
    assert (numbers, scheduler.num_waiting) == ([[0, 1]], 2)
    assert scheduler.admit() == []
    room = 4
    assert [[(r.problem_number, r.sample_number) for r in g] for g in scheduler.admit()] == [
        [(0, 2)],
        [(1, 0)],
    ]


def test_the_row_that_entered_last_is_put_back_before_all_that_wait():
    scheduler = scheduler_of(groups_of([2, 2, 1]), max_rows=4)
    scheduler.admit()
    step(scheduler)
    back = [scheduler.put_back() for _ in range(3)]
    assert [(r.problem_number, r.sample_number) for r in back] == [(1, 1), (1, 0), (0, 1)]
    assert (len(scheduler.running), scheduler.num_waiting, scheduler.is_done) == (1, 4, False)
    entered = scheduler.admit()
    assert [[(r.problem_number, r.sample_number) for r in g] for g in entered] == [
        [(0, 1)],
        [(1, 0)],
        [(1, 1)],
    ]
    assert [len(r.token_ids) for g in entered for r in g] == [1, 1, 1]
    assert sorted(r.slot for r in scheduler.running) == [0, 1, 2, 3]


def test_a_group_larger_than_all_slots_enters_in_parts():
    scheduler = scheduler_of(groups_of([30]), max_rows=8)
    seen = []
    while not scheduler.is_done:
        seen += [r for group in scheduler.admit() for r in group]
        assert len(scheduler.running) <= 8
        step(scheduler)
        scheduler.retire()
    assert [r.sample_number for r in seen] == list(range(30))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 40), st.integers(0, 10**6))
def test_every_request_runs_once_in_a_slot_of_its_own_and_moves_are_safe(
    sizes: list[int], max_rows: int, seed: int
):
    groups = groups_of(sizes, lengths=random.Random(seed))
    scheduler = scheduler_of(groups, max_rows=max_rows)
    content: dict[int, Request] = {}  # what a cache would hold
    while not scheduler.is_done:
        for group in scheduler.admit():
            for request in group:
                assert content.get(request.slot) is None
                content[request.slot] = request
        for source, target in scheduler.compact():
            assert content.get(target) is None
            content[target] = content.pop(source)
        assert len(scheduler.running) <= max_rows
        for request in scheduler.running:
            assert content[request.slot] is request
            assert request.slot < scheduler.width <= scheduler.num_slots
        order = [(r.problem_number, r.sample_number) for r in scheduler.running]
        assert order == sorted(order)
        step(scheduler)
        for request in scheduler.retire():
            del content[request.slot]
    assert all(len(r.token_ids) == r.max_new_tokens for group in groups for r in group)


def test_row_counts_are_rounded_to_few_sizes():
    assert [round_up_rows(n) for n in (1, 2, 3, 5, 8, 9, 17, 128, 129)] == [1, 2, 4, 8, 8, 16, 24, 128, 136]
    assert len({round_up_rows(n) for n in range(1, 129)}) == 19


def test_the_cost_of_a_queue_grows_with_its_length_and_no_faster():
    def seconds(count: int) -> float:
        scheduler = scheduler_of(groups_of([4] * count), max_rows=16)
        start = time.process_time()
        while not scheduler.is_done:
            scheduler.admit()
            scheduler.compact()
            step(scheduler)
            scheduler.retire()
        return time.process_time() - start

    seconds(100)
    small, large = (min(seconds(count) for _ in range(3)) for count in (200, 2000))
    assert large < 10 * small * 3


def test_a_request_is_seeded_by_what_it_is():
    seeds = {request_seed(s, i, n) for s in range(5) for i in range(20) for n in range(8)}
    assert len(seeds) == 5 * 20 * 8
    assert request_seed(1, 23, 4) != request_seed(12, 3, 4)
    assert request_seed(42, 0, 0) == request_seed(42, 0, 0)
