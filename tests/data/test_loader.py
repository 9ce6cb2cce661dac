import json
from collections import Counter
from itertools import chain

import pytest

from kitae.config import DataSettings
from kitae.data.loader import Loader
from kitae.data.mixing import Mixture, Subset, hold_out
from kitae.data.problems import RenderedProblems
from kitae.data.rendered import RenderedRows
from kitae.data.sources import open_dataset
from kitae.errors import CheckpointError, ConfigError, DataError
from kitae.models.toy import make_tokenizer


def loader(n=10, *, items_per_step=4, seed=1, **options) -> Loader:
    return Loader(range(n), items_per_step=items_per_step, seed=seed, **options)


def dataset_of(tmp_path, records, **settings):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    return open_dataset([str(path)], data=DataSettings(**settings), purpose="rl")


# order and position -------------------------------------------------------------------------------------------


def test_every_epoch_takes_each_item_once_in_an_order_of_its_own():
    one = loader()
    assert one.steps_per_epoch == 3
    epochs = [[one.take() for _ in range(3)] for _ in range(3)]
    assert [[len(step) for step in epoch] for epoch in epochs] == [[4, 4, 2]] * 3
    orders = [list(chain(*epoch)) for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(10))] * 3
    assert len({tuple(order) for order in orders}) == 3
    assert one.epoch == 3


def test_the_order_depends_on_seed_and_epoch_only():
    def first(**options):
        return loader(**options).take()

    assert first() == first()
    assert first() != first(seed=2)
    assert first(shuffle=False) == [0, 1, 2, 3]


def test_resuming_anywhere_continues_exactly():
    one = loader()
    states, taken = [], []
    for _ in range(9):
        states.append(json.loads(json.dumps(one.state())))
        taken.append(one.take())
    for start, state in enumerate(states):
        again = loader()
        again.load_state(state)
        assert [again.take() for _ in range(9 - start)] == taken[start:]


def test_a_position_from_other_data_or_settings_is_refused():
    state = loader().state()
    for other in (loader(11), loader(items_per_step=5), loader(seed=2), loader(shuffle=False)):
        with pytest.raises(CheckpointError, match="belongs to another run"):
            other.load_state(state)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_each_step_and_together_take_what_one_would(world_size):
    alone = loader()
    ranks = [loader(rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(6):
        shares = [rank.take() for rank in ranks]
        assert sorted(chain(*shares)) == sorted(alone.take())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_run_may_resume_on_another_number_of_ranks():
    alone = loader()
    alone.take()
    two = [loader(rank=rank, world_size=2) for rank in range(2)]
    for rank in two:
        rank.load_state(alone.state())
    assert sorted(two[0].take() + two[1].take()) == sorted(alone.take())


def test_a_step_larger_than_the_data_takes_an_epoch():
    one = loader(3, items_per_step=8)
    assert (one.steps_per_epoch, len(one.take()), one.epoch) == (1, 3, 1)


def test_no_items_are_an_error():
    with pytest.raises(DataError, match="no rows to train on"):
        loader(0)


# mixing and holding out ---------------------------------------------------------------------------------------


def test_weights_say_how_often_each_source_is_drawn():
    sources = [[("a", i) for i in range(300)], [("b", i) for i in range(20)], [("c", i) for i in range(80)]]
    mixture = Mixture(sources, weights=[1, 2, 1], seed=3)
    items = Loader(mixture, items_per_step=400, seed=3, order=mixture.order).take()
    drawn = Counter(name for name, _ in items)
    assert len(items) == 400
    assert abs(drawn["b"] - 200) < 40 and abs(drawn["a"] - 100) < 35
    uses = Counter(i for name, i in items if name == "b")
    assert set(uses) == set(range(20)) and max(uses.values()) - min(uses.values()) <= 1
    assert max(Counter(i for name, i in items if name == "a").values()) == 1


def test_each_draw_depends_on_seed_epoch_and_position_only():
    def order(seed, epoch):
        return list(Mixture([range(50), range(9)], weights=[1, 1], seed=seed).order(epoch))

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


def test_a_mixture_resumes_by_position():
    mixture = Mixture([range(50), range(100, 109)], weights=[1, 3], seed=1)

    def fresh() -> Loader:
        return Loader(mixture, items_per_step=7, seed=1, order=mixture.order)

    one = fresh()
    for _ in range(11):
        one.take()
    again = fresh()
    again.load_state(one.state())
    assert [one.take() for _ in range(20)] == [again.take() for _ in range(20)]


def test_weights_that_make_no_sense_are_refused():
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(ConfigError, match=r"data\.weights"):
            Mixture([range(3), range(3)], weights=weights, seed=0)
    with pytest.raises(DataError, match=r"entry 1 of data\.train has a weight but no rows"):
        Mixture([range(3), range(0)], weights=[1, 1], seed=0)
    assert set(Mixture([range(3), range(0)], weights=[1, 0], seed=0).order(0)) == {0, 1, 2}


def questions(n: int) -> list[dict]:
    return [{"prompt": f"question {i}", "answer": str(i)} for i in range(n)]


def test_held_out_rows_are_chosen_by_seed_and_never_trained_on(tmp_path):
    dataset = dataset_of(tmp_path, questions(100))
    train, held = hold_out(dataset, share=0.05, seed=7)
    assert (len(train), len(held)) == (95, 5)
    assert not {e.answer for e in train} & {e.answer for e in held}
    assert [e.answer for e in hold_out(dataset, share=0.05, seed=7)[1]] == [e.answer for e in held]
    assert [e.answer for e in hold_out(dataset, share=0.05, seed=8)[1]] != [e.answer for e in held]


def test_the_hold_out_has_at_least_one_and_at_most_500_rows(tmp_path):
    sizes = {}
    for n, share in ((10, 0.05), (1, 0.05), (10, 0.0), (20_000, 0.05)):
        dataset = dataset_of(tmp_path, questions(n))
        sizes[n, share] = len(hold_out(dataset, share=share, seed=0)[1])
    assert list(sizes.values()) == [1, 0, 0, 500]


def test_rows_equal_to_a_held_out_row_leave_the_training_rows(tmp_path):
    dataset = dataset_of(tmp_path, questions(10) * 3)
    train, held = hold_out(dataset, share=0.1, seed=0)
    assert not {e.answer for e in train} & {e.answer for e in held}
    with pytest.raises(DataError, match="all 5 rows are equal"):
        hold_out(dataset_of(tmp_path, questions(1) * 5), share=0.5, seed=0)


def test_a_subset_can_be_cut_again():
    subset = Subset("abcdef", [5, 3, 1])
    assert (list(subset), subset[-1], list(subset[1:])) == (["f", "d", "b"], "b", ["d", "b"])


# rendered data ------------------------------------------------------------------------------------------------


@pytest.fixture
def template():
    from kitae.data.chat import Template

    return Template.load(make_tokenizer(prefill="<think>\n", strip_thinking=True), data=DataSettings())


def test_rendered_rows_are_the_templates_rows(tmp_path, template, caplog):
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    dataset = dataset_of(tmp_path, [{"prompt": "hi", "completion": "yo"}, turns])
    seen: list[int] = []
    caplog.set_level("INFO")
    rendered = RenderedRows(dataset, template=template, max_length=1000, on_progress=seen.append)
    expected = [template.rows(example, max_length=1000) for example in dataset]
    assert list(rendered) == expected
    assert rendered[0:1] == expected[:1]
    assert [len(rows) for rows in rendered] == [1, 2]
    assert rendered.counts["taught_tokens"] == sum(row.num_taught for rows in expected for row in rows)
    assert seen == [0, 2]
    assert "3 training rows from 2 examples" in caplog.text
    RenderedRows(dataset, template=template, max_length=1000, use="evaluation")
    assert "3 evaluation rows from 2 examples" in caplog.text


def test_rows_without_room_for_a_target_are_left_out_and_counted(tmp_path, template, caplog):
    records = [{"prompt": "q" * n, "completion": "<answer>4</answer>"} for n in (1, 5, 40)]
    dataset = dataset_of(tmp_path, records)
    length = len(template.rows(dataset[0], max_length=1000)[0].token_ids)
    rendered = RenderedRows(dataset, template=template, max_length=length)
    assert len(rendered) == 2
    assert rendered.counts["rows_cut"] == 2 and rendered.counts["rows_dropped"] == 1
    assert "2 rows were longer than data.max_length" in caplog.text
    with pytest.raises(DataError, match="none of 3 rows has anything left to teach"):
        RenderedRows(dataset, template=template, max_length=3)


def test_thinking_that_ends_without_having_begun_is_counted_and_named_once(tmp_path, template, caplog):
    closed = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so</think>yo"}]
    records = [{"prompt": "hi", "completion": "<think>so</think>yo"}, closed, closed + closed]
    dataset = dataset_of(tmp_path, records)
    assert "unopened_thinks" not in RenderedRows(dataset, template=template, max_length=1000).counts
    caplog.clear()
    without_prefill = template.load(make_tokenizer(), data=DataSettings())
    rendered = RenderedRows(dataset, template=without_prefill, max_length=1000)
    assert rendered.counts["unopened_thinks"] == 2 and len(rendered) == 3
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith("2 training examples have a </think> that no <think> comes before")
    assert "rows.jsonl:2" in warning


def test_rows_the_template_refuses_are_listed_together_or_skipped(tmp_path, template):
    records = [{"prompt": "a", "completion": c} for c in ("<think>x", "ok", "<think>y")]
    dataset = dataset_of(tmp_path, records)
    with pytest.raises(DataError, match=r"2 of 3 rows(?s:.*)rows\.jsonl:1: (?s:.*)rows\.jsonl:3: "):
        RenderedRows(dataset, template=template, max_length=99)
    assert len(RenderedRows(dataset, template=template, max_length=99, skip_bad=True)) == 1


def test_rendered_problems_keep_their_numbers_where_long_ones_are_dropped(tmp_path, template, caplog):
    records = [{"prompt": "q" * n, "answer": str(n), "level": n} for n in (3, 90, 5)]
    dataset = dataset_of(tmp_path, records)
    problems = RenderedProblems(dataset, template=template, max_prompt_length=40)
    assert [(p.index, p.answer, p.columns) for p in problems] == [
        (0, "3", {"level": 3}),
        (2, "5", {"level": 5}),
    ]
    assert problems[1] == template.problem(dataset[2], index=2, max_length=None)
    assert problems.num_dropped == 1
    assert "1 of 3 prompts are longer than" in caplog.text
    with pytest.raises(DataError, match="all 3 prompts are longer"):
        RenderedProblems(dataset, template=template, max_prompt_length=2)


@pytest.mark.parametrize("steps", [1, 3, 4, 9])
def test_visited_are_the_items_that_so_many_steps_of_all_ranks_take(steps):
    def loader(rank=0):
        return Loader(list(range(11)), items_per_step=3, seed=5, rank=rank, world_size=2)

    taken = {item for rank in (0, 1) for own in [loader(rank)] for _ in range(steps) for item in own.take()}
    assert loader().visited(steps) == sorted(taken)
