"""`kitae reward test`: what is scored, what is said of it, where rewards disagree, and what would fool them."""

import json

import numpy as np
import pytest

from kitae.cli import _cases, _lab

RIGHT = "<think>{a}+{a}</think><answer>{b}</answer>"


@pytest.fixture
def lab(kitae, tmp_path, monkeypatch):
    """Run the command in a folder of its own: exit code, output, errors, and the report if it wrote one."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        report = tmp_path / "report.json"
        report.unlink(missing_ok=True)
        code, out, err = kitae("reward", "test", *words, "--json", str(report))
        return code, out, err, json.loads(report.read_text()) if report.exists() else None

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(count=6, *, wrong=()):
    return [
        {
            "prompt": f"What is twice {a}?",
            "answer": str(2 * a),
            "completion": RIGHT.format(a=a, b=2 * a + (1 if a in wrong else 0)),
        }
        for a in range(1, count + 1)
    ]


def test_scores_reasons_and_shapes_of_the_reasoning_reward(lab, tmp_path):
    write(
        tmp_path / "rows.jsonl", [*sums(6, wrong=(2, 4)), {"prompt": "?", "answer": "1", "completion": "1"}]
    )
    code, out, err, report = lab("reasoning", "rows.jsonl")
    assert (code, err) == (0, "")
    found = report["rewards"]["reasoning"]
    assert (found["completions"], found["scored"]) == (7, 7)
    assert found["mean"] == pytest.approx((4 * 10 + 2 * 1 + 0) / 7)
    assert found["histogram"] == [["0", 1], ["1", 2], ["10", 4]]
    assert found["reasons"] == [["right", 4], ["wrong", 2], ["no <think>", 1]]
    assert found["shapes"] == {
        "honest right answer (answer tags)": 10.0,
        "honest wrong answer": 1.0,
        "right answer, empty think block": 10.0,
        "right answer 20 times over": 0.0,
        "right answer inside think only": 0.0,
        "right answer after long padding": 10.0,
        "wrong answer after long padding": 1.0,
        "list of candidates with the right one": 1.0,
        "prompt repeated 5 times": 1.0,
        "tags with nothing in them": 1.0,
        "nothing at all": 0.0,
    }
    assert [note["kind"] for note in found["notes"]] == ["note", "note"]
    assert "note: reasoning pays right answer, empty think block like an honest answer (10 and 10)" in out
    assert [row["scores"]["reasoning"] for row in report["rows"]] == [10, 1, 10, 1, 10, 10, 0]
    assert report["rows"][1]["where"] == "rows.jsonl:2"
    assert f"  10  {'#' * 30} 4 (57.1%)\n" in out


def test_a_reward_that_looks_for_the_answer_anywhere_is_warned_of(lab, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def occurs(completion, *, prompt, answer, **columns):\n"
        "    return float(answer in completion) + 0.001 * len(completion)\n"
    )
    write(tmp_path / "rows.jsonl", sums())
    code, out, _, report = lab("mine.py:occurs", "rows.jsonl")
    assert code == 0
    warned = [note["text"].split(" like an honest")[0] for note in report["rewards"]["occurs"]["notes"]]
    assert "pays wrong answer after long padding" in warned
    assert "pays list of candidates with the right one" in warned
    assert "pays nothing at all" not in warned
    assert "warning: occurs pays list of candidates with the right one" in out


def test_a_sum_as_prompt_is_its_own_answer_for_rewards_that_compare_as_mathematics(lab, tmp_path):
    write(
        tmp_path / "rows.jsonl",
        [{"prompt": f"{a}+{a}", "answer": str(2 * a), "completion": "x"} for a in (3, 4)],
    )
    _, out, _, report = lab("reasoning", "rows.jsonl")
    assert report["rewards"]["reasoning"]["shapes"]["prompt repeated 5 times"] == 10.0
    assert "warning: reasoning pays prompt repeated 5 times" in out


def test_the_format_reward_is_said_to_pay_wrong_answers(lab, tmp_path):
    write(tmp_path / "rows.jsonl", sums(3))
    *_, report = lab("format", "rows.jsonl")
    kinds = {note["text"].split(" like")[0]: note["kind"] for note in report["rewards"]["format"]["notes"]}
    assert kinds["pays a wrong answer"] == "note"
    assert kinds["pays tags with nothing in them"] == "warning"
    assert "pays nothing at all" not in kinds


def test_what_fails_is_reported_with_its_rows_and_stops_nothing(lab, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def picky(completion, *, prompt, answer, level=0, **columns):\n"
        "    if level == 1: raise KeyError('level')\n"
        "    if level == 2: time.sleep(60)\n"
        "    return None if level == 3 else 1\n"
    )
    rows = [{"prompt": "p", "completion": "c", "level": level} for level in (0, 1, 2, 3, 1)]
    write(tmp_path / "rows.jsonl", rows)
    code, out, err, report = lab("mine.py:picky", "rows.jsonl", "--timeout_s", "0.3")
    assert (code, err) == (0, "")
    found = report["rewards"]["picky"]
    assert found["scored"] == 1
    assert found["unscored"] == {
        "mine.py:picky raised KeyError: 'level'": ["rows.jsonl:2", "rows.jsonl:5"],
        "mine.py:picky took more than reward.timeout_s = 0.3 s of CPU time, or 1.5 s in all": [
            "rows.jsonl:3"
        ],
        "could not be scored": ["rows.jsonl:4"],
    }
    assert "2 x mine.py:picky raised KeyError: 'level' (rows.jsonl:2, rows.jsonl:5)" in out
    assert found["seconds"]["slowest"][0][0] == "rows.jsonl:3", "the row that ran out of time took longest"
    assert found["seconds"]["longest"] >= 0.3
    assert "no row has a gold answer" in out


def test_two_rewards_are_compared_row_by_row(lab, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def longest(completion, *, prompt, answer, **columns):\n    return len(completion)\n"
    )
    rows = [
        {"prompt": "p", "answer": "7", "completion": "x" * n + ("\\boxed{7}" if n < 3 else "")}
        for n in (1, 2, 30, 40)
    ]
    write(tmp_path / "rows.jsonl", rows)
    _, out, _, report = lab("math", "mine.py:longest", "rows.jsonl", "--top", "2")
    [pair] = report["disagreements"]
    assert (pair["first"], pair["second"], pair["completions"]) == ("math", "longest", 4)
    # Ranks: math 3.5 3.5 1.5 1.5, lengths 1 2 3 4.
    assert pair["spearman"] == pytest.approx(np.corrcoef([3.5, 3.5, 1.5, 1.5], [1, 2, 3, 4])[0, 1])
    assert pair["opposite"] == 1.0
    assert [worst["where"] for worst in pair["worst"]] == ["rows.jsonl:1", "rows.jsonl:4"]
    assert pair["worst"][0]["scores"] == [1.0, 10.0]
    assert "math and longest, 4 completions: rank correlation -0.894; on 100.0%" in out


def test_ranks_share_ties():
    assert _lab.ranks(np.array([5.0, 7.0, 5.0])).tolist() == [1.5, 3.0, 1.5]


def test_many_values_are_shown_in_ranges():
    counts = _lab.histogram([i / 10 for i in range(100)])
    assert [count for _, count in counts] == [10] * 10
    assert counts[0][0] == "0 to 0.99"


@pytest.mark.parametrize(
    ("row", "texts"),
    [
        ({"prompt": "p", "answer": "1", "completions": ["a", ""]}, ["a", ""]),
        ({"problem": "p", "answer": "1", "response": "a"}, ["a"]),
        ({"prompt": [{"role": "user", "content": "p"}], "completion": [{"role": "assistant", "content": "a"}]}, ["a"]),
        ({"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]}, ["a"]),
        ([{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}], ["a"]),
        ({"frage": "p", "text": "a"}, ["a"]),
    ],
)  # fmt: skip
def test_completions_are_found_where_people_keep_them(row, texts):
    columns = {"prompt": "frage", "completion": "text"} if "frage" in row else {}
    cases = _cases.cases_of(row, columns=columns, where="f:1", index=0)
    assert [case.completion for case in cases] == texts
    assert {case.problem.prompt for case in cases} == {"p"}


def test_the_samples_of_a_run_are_rows_and_their_record_is_no_column():
    record = {
        "step": 3, "problem": 7, "sample": 0, "prompt": "1+1", "completion": "2", "answer": "2", "reward": 0.0,
        "reason": "no <think>", "tokens": 2, "finish_reason": "stop",
    }  # fmt: skip
    [case] = _cases.cases_of(record, columns={}, where="samples.jsonl:1", index=0)
    assert (case.completion, case.problem.prompt, case.problem.answer) == ("2", "1+1", "2")
    assert case.problem.columns == {}


def test_rows_without_anything_to_score_are_listed_with_their_lines(lab, tmp_path):
    write(
        tmp_path / "rows.jsonl",
        [*sums(1), {"prompt": "p", "answer": "1"}, {"completion": "c"}, {"prompt": "p", "completion": 3}],
    )
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{not json\n")
    code, out, err, report = lab("math", "rows.jsonl")
    assert (code, out, report) == (2, "", None)
    assert err.count("\n") == 1
    assert err.startswith("kitae: error: 4 of 5 rows have nothing to score:")
    for where in (
        "rows.jsonl:2: no completion",
        "rows.jsonl:3: ",
        "rows.jsonl:4: a completion must be text",
        "rows.jsonl:5: not JSON",
    ):
        assert where in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mathh", "rows.jsonl"], "'mathh' is unknown; did you mean 'math'?"),
        (["rows.jsonl"], "no reward is named; usage: kitae reward test"),
        (["math"], "no file of rows is named"),
        (["math", "math", "rows.jsonl"], "math is named twice"),
        (["math", "missing.jsonl"], "missing.jsonl: No such file"),
        (["math", "empty.jsonl"], "empty.jsonl: no rows"),
        (["mine.py:f", "rows.jsonl"], "no such file"),
        (["math", "rows.jsonl", "--tiemout_s", "1"], "did you mean '--timeout_s'?"),
    ],
)
def test_what_cannot_be_meant_is_one_line(words, message, lab, tmp_path):
    write(tmp_path / "rows.jsonl", sums(2))
    (tmp_path / "empty.jsonl").write_text("")
    code, out, err, _ = lab(*words)
    assert (code, out) == (2, "")
    assert err.startswith("kitae: error: ") and err.count("\n") == 1 and message in err


def test_help_and_unknown_verbs(kitae):
    assert kitae("reward")[1].startswith("usage: kitae reward test")
    code, out, _ = kitae("reward", "test", "--help")
    assert code == 0 and "--timeout_s" in " ".join(out.split())
    assert kitae("reward", "tset")[2] == "kitae: error: there is no kitae reward tset; did you mean 'test'?\n"


def test_a_reward_model_by_its_folder_is_compared_with_a_function(lab, tmp_path):
    """Its scores are those the run gives; a row it cannot read is one that could not be scored."""
    import torch

    from kitae.config import DataSettings, ModelSettings
    from kitae.data.chat import Template
    from kitae.models.critic import load_critic
    from kitae.models.load import load_tokenizer
    from kitae.models.save import save_policy
    from kitae.models.toy import make_model
    from kitae.recipes._rewards import RewardModel

    model = ModelSettings(name_or_path=str(make_model(tmp_path / "base")), device="cpu", dtype="float32")
    critic = load_critic(model)
    with torch.no_grad():
        critic.causal_lm.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    (tmp_path / "rm").mkdir()
    save_policy(critic, tmp_path / "rm")
    Template.load(load_tokenizer(model), data=DataSettings()).save(tmp_path / "rm")

    rows = [*sums(4), {"prompt": "p", "answer": "1", "completion": "x" * 5000}]
    write(tmp_path / "rows.jsonl", rows)
    code, out, _, report = lab("rm", "math", "rows.jsonl")
    assert code == 0
    cases = _cases.read_cases(["rows.jsonl"], columns={}, max_rows=None)
    expected = RewardModel.load("rm").score([(case.completion, case.problem) for case in cases])
    assert [row["scores"]["rm"] for row in report["rows"]] == pytest.approx([s.value for s in expected])
    assert report["rewards"]["rm"]["unscored"] == {expected[4].reason: ["rows.jsonl:5"]}
    assert report["disagreements"][0]["completions"] == 4
    assert "in batches" in out
