"""Accuracy from real rollouts of a tiny model, and from a scripted engine where the answers must be known."""

from dataclasses import replace

import pytest

from kitae.algos.intervals import wilson
from kitae.config import DataSettings, ModelSettings, RewardSettings, SamplingSettings
from kitae.errors import DataError
from kitae.evaluate.accuracy import answer, judge, summarise
from kitae.evaluate.compare import compare
from kitae.evaluate.groups import Gap, by_column, gap
from kitae.evaluate.records import read_records, write_records
from kitae.evaluate.stats import pass_at_k
from kitae.rewards.pool import RewardPool
from kitae.types import Problem, Rollout


@pytest.fixture(scope="module")
def pool():
    with RewardPool(RewardSettings(timeout_s=20)) as pool:
        yield pool


def problem(index, *, gold="13", **columns):
    return Problem(prompt=f"Question {index}", token_ids=[1], answer=gold, columns=columns, index=index)


def right_form(answer):
    return f"<think>hm</think><answer>{answer}</answer>"


class Scripted:
    """A RolloutEngine whose completions are written in the problem's column `says`."""

    def generate(self, problems, *, n, sampling, seed, on_tokens=None):
        return [[self.rollout(p, p.columns["says"][i]) for i in range(n)] for p in problems]

    def rollout(self, problem, text):
        reason = "length" if text.endswith("...") else "stop"
        return Rollout(
            problem=problem, text=text, token_ids=[5] * len(text), logprobs=[], finish_reason=reason
        )

    def sync(self):
        pass


def records_of(problems, pool, *, n=1, **options):
    chunks = answer(Scripted(), problems, pool=pool, sampling=SamplingSettings(), n=n, **options)
    return [record for chunk in chunks for record in chunk]


def test_every_completion_gets_a_record_that_says_what_was_found_and_how(pool):
    records = records_of([problem(4, says=[right_form(13)], level=2), problem(9, says=["It is 12."])], pool)
    assert records[0] == {
        "problem": 4,
        "sample": 0,
        "prompt": "Question 4",
        "completion": right_form(13),
        "answer": "13",
        "found": "13",
        "how": "answer tag",
        "correct": True,
        "right_form": True,
        "reward": 10.0,
        "reason": "right",
        "num_tokens": 36,
        "finish_reason": "stop",
        "columns": {"says": [right_form(13)], "level": 2},
    }
    expected = {"found": "12", "how": "last number", "correct": False, "right_form": False, "reward": 0.0}
    assert records[1] | expected == records[1]


def test_the_summary_counts_what_a_reader_counts_by_hand(pool):
    says = [right_form(13), right_form(12), "It is 13.", "<think>it is 13...", right_form("around 13")]
    problems = [problem(i, says=[text]) for i, text in enumerate(says)]
    problems.append(problem(5, gold=None, says=[right_form(13)]))
    summary = summarise(records_of(problems, pool))
    low, high = wilson(2, 5)
    assert summary == {
        "problems": 6,
        "completions": 6,
        "accuracy": 2 / 5,
        "low": low,
        "high": high,
        "mean_reward": pytest.approx((10 + 1 + 0 + 0 + 1) / 5),
        "format_rate": 4 / 6,
        "mean_length": pytest.approx(sum(len(p.columns["says"][0]) for p in problems) / 6),
        "truncated": 1 / 6,
        "unscored": 1 / 6,
    }


def test_pass_at_k_comes_with_several_samples_and_the_interval_counts_problems(pool):
    says = [["13", "12", "13", "1"], ["1", "2", "3", "4"], ["13"] * 4]
    records = records_of([problem(i, says=s) for i, s in enumerate(says)], pool, n=4)
    summary = summarise(records)
    for k in (1, 2, 4):
        assert summary[f"pass@{k}"] == pytest.approx(sum(pass_at_k(4, c, k) for c in (2, 0, 4)) / 3)
    assert summary["accuracy"] == 0.5 == summary["pass@1"]
    assert (summary["low"], summary["high"]) == wilson(1.5, 3)


def test_the_summary_depends_neither_on_chunks_nor_on_the_order_of_records(pool):
    problems = [problem(i, says=["13" if i % 3 else "12", "13"]) for i in range(10)]
    whole = records_of(problems, pool, n=2)
    assert records_of(problems, pool, n=2, problems_at_once=3) == whole
    assert summarise(reversed(whole)) == summarise(whole)


def test_no_records_and_no_gold_answers_have_no_accuracy(pool):
    assert summarise([]) == {"problems": 0, "completions": 0}
    assert "accuracy" not in summarise(records_of([problem(0, gold=None, says=["13"])], pool))


def test_a_metric_by_column_and_the_gap(pool):
    rows = [("easy", "13"), ("easy", "13"), ("hard", "12"), ("hard", "13"), (None, "13")]
    problems = [
        problem(i, says=[text], **({"level": level} if level else {})) for i, (level, text) in enumerate(rows)
    ]
    records = records_of(problems, pool)
    groups = by_column(records, "level", summarise=summarise)
    assert {name: group["accuracy"] for name, group in groups.items()} == {
        "(none)": 1.0,
        "easy": 1.0,
        "hard": 0.5,
    }
    assert gap(groups, "accuracy") == Gap("accuracy", "hard", "(none)", 0.5)
    assert gap(groups, "no such metric") is None
    with pytest.raises(DataError, match="no row has a column 'levle' to report by; did you mean 'level'"):
        by_column(records, "levle", summarise=summarise)


def test_records_survive_the_file_and_a_bad_line_is_named(pool, tmp_path):
    records = records_of([problem(0, says=["\ud800 \u00e4\u2028\n13"]), problem(1, says=["12"])], pool)
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    assert read_records(path) == records
    assert [p.name for p in tmp_path.iterdir()] == ["records.jsonl"]
    path.write_text('{"problem": 3}\n')
    with pytest.raises(
        DataError, match=r"records.jsonl:1 is not a record of kitae evaluate; it lacks answer, "
    ):
        read_records(path)
    path.write_text("[]\n")
    with pytest.raises(DataError, match=r"records.jsonl:1 is not a record"):
        read_records(path)
    path.write_text("{\n")
    with pytest.raises(DataError, match=r"records.jsonl:1 is not JSON"):
        read_records(path)
    with pytest.raises(DataError, match="cannot read"):
        read_records(tmp_path / "none.jsonl")


def test_two_models_are_compared_on_the_problems_they_share(pool):
    first = records_of([problem(i, says=["13" if i < 5 else "12"]) for i in range(12)], pool)
    second = records_of([problem(i, says=["12" if i == 0 else "13"]) for i in range(2, 14)], pool)
    result = compare(first, second)
    assert (result.problems, result.unpaired) == (10, 4)
    assert (result.first, result.second, result.difference) == (0.3, 1.0, 0.7)
    assert (result.first_better, result.second_better, result.p_value) == (0, 7, 2 / 2**7)
    assert 0.3 < result.low < 0.7 < result.high <= 1.0
    reverse = compare(second, first)
    assert (reverse.difference, reverse.p_value) == (-0.7, result.p_value)


def test_several_samples_of_a_problem_are_one_observation(pool):
    first = records_of([problem(i, says=["13", "12"]) for i in range(4)], pool, n=2)
    second = records_of([problem(i, says=["13", "13"]) for i in range(4)], pool, n=2)
    result = compare(first, second)
    assert (result.problems, result.first, result.second, result.second_better) == (4, 0.5, 1.0, 4)


def test_evaluations_of_different_data_are_not_compared(pool):
    first = records_of([problem(0, says=["13"])], pool)
    other = records_of([replace(problem(0, says=["13"]), prompt="Another question")], pool)
    with pytest.raises(DataError, match="no problem in common"):
        compare(first, other)


def test_a_real_model_is_evaluated_end_to_end_with_its_prefill(tiny, pool):
    from kitae.data.chat import Template
    from kitae.data.formats import Example
    from kitae.models.load import load_policy, load_tokenizer
    from kitae.rollout.generic import GenericEngine

    model = ModelSettings(name_or_path=str(tiny("qwen3", prefill="<think>\n")), device="cpu", dtype="float32")
    template = Template.load(load_tokenizer(model), data=DataSettings())
    engine = GenericEngine(
        load_policy(model, trainable=False), stop_ids=template.stop_ids, decode=template.decode, max_rows=4
    )
    asked = [Example(messages=[{"role": "user", "content": f"{n}+1?"}], answer=str(n + 1)) for n in range(5)]
    problems = [template.problem(example, index=i, max_length=None) for i, example in enumerate(asked)]
    sampling = SamplingSettings(temperature=0.0, max_new_tokens=8)
    runs = [
        [record for chunk in answer(engine, problems, pool=pool, sampling=sampling, problems_at_once=size)
         for record in chunk]
        for size in (2, 5)
    ]  # fmt: skip
    assert runs[0] == runs[1] == judge(engine.generate(problems, n=1, sampling=sampling, seed=0), pool=pool)
    assert all(record["completion"].startswith("<think>\n") for record in runs[0])
    assert summarise(runs[0])["problems"] == 5
