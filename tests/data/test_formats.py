import re
from pathlib import Path

import pytest

from kitae.config import DataSettings
from kitae.data.formats import RowError, extract_answer, to_example
from kitae.data.readers import strict_json

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data-formats.md"
U, A = "user", "assistant"


def example(record, *, purpose="sft", need_answer=False, **settings):
    return to_example(record, data=DataSettings(**settings), purpose=purpose, need_answer=need_answer)


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


@pytest.mark.parametrize(
    ("record", "messages", "answer"),
    [
        ([{"role": U, "content": "q"}, {"role": A, "content": "a"}], [(U, "q"), (A, "a")], None),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    {"role": U, "content": "q"},
                    {"role": A, "content": "a"},
                ]
            },
            [("system", "s"), (U, "q"), (A, "a")],
            None,
        ),
        (
            {"messages": [{"from": U, "content": "q"}, {"from": A, "content": "a"}]},
            [(U, "q"), (A, "a")],
            None,
        ),
        (
            {
                "system": "s",
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            },
            [("system", "s"), (U, "q"), (A, "a")],
            None,
        ),
        ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")], None),
        ({"instruction": "q", "input": "", "output": "a"}, [(U, "q"), (A, "a")], None),
        ({"instruction": "q", "input": "more", "output": "a"}, [(U, "q\nmore"), (A, "a")], None),
        (
            {"instruction": "q2", "output": "a2", "system": "", "history": [["q1", "a1"]]},
            [(U, "q1"), (A, "a1"), (U, "q2"), (A, "a2")],
            None,
        ),
        (
            {"prompt": "2x+3=7", "solution": "<think>r</think><answer>2</answer>"},
            [(U, "2x+3=7"), (A, "<think>r</think><answer>2</answer>")],
            "2",
        ),
        (
            {"problem": "q", "level": "Level 5", "type": "Algebra", "solution": "so $\\boxed{16}$."},
            [(U, "q"), (A, "<think>so $\\boxed{16}$.</think><answer>16</answer>")],
            "16",
        ),
        ({"problem": "q", "answer": "16"}, [(U, "q"), (A, "16")], "16"),
        (
            {"problem": "q", "solution": "r", "answer": 16},
            [(U, "q"), (A, "<think>r</think><answer>16</answer>")],
            "16",
        ),
        (
            {"question": "q", "answer": "3 * 4 = 12\n#### 12"},
            [(U, "q"), (A, "<think>3 * 4 = 12</think><answer>12</answer>")],
            "12",
        ),
        ({"question": "q", "answer": "#### 12"}, [(U, "q"), (A, "#### 12")], "12"),
        (  # a heading of Markdown is no final answer
            {"question": "q", "answer": "So:\n#### Steps\nfirst\nthen"},
            [(U, "q"), (A, "So:\n#### Steps\nfirst\nthen")],
            "So:\n#### Steps\nfirst\nthen",
        ),
        ({"prompt": "q", "solution": "#### a\nb"}, [(U, "q"), (A, "#### a\nb")], None),
        (
            {"prompt": [{"role": U, "content": "q"}], "completion": [{"role": A, "content": "a"}]},
            [(U, "q"), (A, "a")],
            None,
        ),
        (
            {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
            [(U, "q"), (A, "a")],
            None,
        ),
        (
            {
                "messages": [
                    {"role": U, "content": [{"type": "text", "text": "q"}]},
                    {"role": A, "content": "a", "reasoning_content": "r"},
                ]
            },
            [(U, "q"), (A, "<think>\nr\n</think>\n\na")],
            None,
        ),
        (
            [
                {"role": "system", "content": " "},
                {"role": U, "content": "q"},
                {"role": A, "content": "a"},
                {"role": "tool", "content": "t"},
                {"role": A, "content": "b"},
            ],
            [(U, "q"), (A, "a"), ("tool", "t"), (A, "b")],
            None,
        ),
        ({"prompt": "q", "completion": "a", "answer": None, "system": None}, [(U, "q"), (A, "a")], None),
    ],
)
def test_every_shape_becomes_turns_and_an_answer(record, messages, answer):
    found = example(record)
    assert (found.messages, found.answer) == (turns(*messages), answer)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, "no column named messages, conversations, instruction, prompt, problem or question; found none"),
        ({"frage": "q"}, "found frage (see data.columns)"),
        ([], "no user turn"),
        ({"messages": None}, "no column named"),
        ({"messages": {}}, "expected a list of turns, found an object (messages)"),
        ({"messages": "[{"}, "not a list of turns"),
        ({"messages": ["x"]}, "expected a turn with role and content, found text (messages[0])"),
        ({"messages": [{"content": "q"}]}, "a turn without role (messages[0])"),
        ({"messages": [{"role": "robot", "content": "q"}]}, "unknown role 'robot'"),
        ({"messages": [{"role": 3, "content": "q"}]}, "unknown role 3"),
        ({"messages": [{"role": U}]}, "content must be text, found null (messages[0])"),
        ({"messages": [{"role": U, "content": 5}]}, "content must be text, found a number (messages[0])"),
        ({"messages": [{"role": U, "content": " \n"}]}, "empty content (messages[0])"),
        (
            {"messages": [{"role": U, "content": [{"type": "image", "url": "x"}]}]},
            "only have parts of type text",
        ),
        ({"messages": turns((U, "q"), (A, ""))}, "empty content (messages[1])"),
        (
            {"messages": turns(("system", "s"), ("system", "s"), (U, "q"))},
            "a system turn may only come first",
        ),
        (
            {"messages": turns((U, "q"), ("system", "s"))},
            "a system turn may only come first, and once (messages[1])",
        ),
        ({"messages": turns((A, "a"), (U, "q"))}, "must be the user's, not assistant (messages[0])"),
        ({"messages": turns(("system", "s"), ("tool", "t"))}, "must be the user's, not tool (messages[1])"),
        ({"messages": turns((U, "q"), (U, "q"))}, "two user turns in a row (messages[1])"),
        ({"messages": turns((U, "q"), (A, "a"), (A, "a"))}, "two assistant turns in a row (messages[2])"),
        ({"messages": turns(("system", "s"))}, "no user turn"),
        ({"messages": turns((U, "q"))}, "nothing to teach"),
        (
            {"messages": [*turns((U, "q")), {"role": A, "content": "a", "tool_calls": [{}]}]},
            "tool calls cannot be taught",
        ),
        (
            {"messages": [*turns((U, "q")), {"role": A, "content": "a", "weight": 0.5}]},
            "weight must be 0 or 1, not 0.5",
        ),
        ({"messages": [*turns((U, "q")), {"role": A, "content": "a", "weight": 0}]}, "nothing to teach"),
        ({"prompt": "q"}, "nothing to teach"),
        ({"prompt": "", "completion": "a"}, "empty content (prompt)"),
        ({"prompt": 3, "completion": "a"}, "content must be text, found a number (prompt)"),
        ({"prompt": "q", "completion": ""}, "empty content (completion)"),
        ({"prompt": "q", "answer": ["x"]}, "the answer must be text or a number, found a list (answer)"),
        ({"prompt": "q", "answer": True}, "the answer must be text or a number, found true/false (answer)"),
        ({"instruction": "q", "output": None}, "nothing to teach"),
        ({"instruction": ["q"], "output": "a"}, "content must be text, found a list (instruction)"),
        (
            {"instruction": "q", "output": "a", "history": [["x"]]},
            "expected a list of pairs of instruction and output (history)",
        ),
        (
            {"instruction": "q", "output": "a", "history": "x"},
            "expected a list of pairs of instruction and output (history)",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "a preference row"),
        ({"prompt": "q", "completion": "a", "label": False}, "a preference row"),
    ],
)
def test_a_row_that_cannot_be_used_says_why(record, reason):
    with pytest.raises(RowError) as error:
        example(record)
    assert reason in str(error.value)


def test_rl_needs_a_question_and_for_the_built_in_rewards_an_answer():
    assert example({"prompt": "q"}, purpose="rl").answer is None
    with pytest.raises(RowError, match="no answer"):
        example({"prompt": "q"}, purpose="rl", need_answer=True)
    found = example(turns((U, "q"), (A, "<answer>7</answer>")), purpose="rl", need_answer=True)
    assert (found.answer, found.question) == ("7", turns((U, "q")))


def test_other_columns_are_kept_for_the_reward():
    found = example({"prompt": "q", "answer": "1", "level": 3, "meta": {"a": [1]}, "completion": "c"})
    assert found.columns == {"level": 3, "meta": {"a": [1]}}


def test_columns_are_mapped_to_our_names():
    record = {"frage": "q", "lösung": "a", "prompt": "not this", "deep": {"truth": 7}}
    columns = {"prompt": "frage", "completion": "lösung", "answer": "deep.truth"}
    found = example(record, columns=columns)
    assert (found.messages, found.answer) == (turns((U, "q"), (A, "a")), "7")
    with pytest.raises(RowError, match=r"no column 'frag', which data\.columns\.prompt names"):
        example(record, columns={"prompt": "frag"})


def test_a_turn_with_weight_zero_is_context_only():
    record = [*turns((U, "q")), {"role": A, "content": "a", "weight": 0}, *turns((U, "q2"), (A, "b"))]
    assert [turn.get("taught", True) for turn in example(record).messages] == [True, False, True, True]


def test_the_target_setting_decides_what_is_taught():
    worked = {"problem": "q", "solution": "so \\boxed{4}"}
    plain = {"prompt": "q", "completion": "so \\boxed{4}"}
    tagged = {"prompt": "q", "completion": "<think>so</think>\\boxed{4}"}
    formed = "<think>so \\boxed{4}</think><answer>4</answer>"
    taught = {
        (name, target): example(record, target=target).messages[-1]["content"]
        for name, record in {"worked": worked, "plain": plain, "tagged": tagged}.items()
        for target in ("auto", "think_answer", "as_is")
    }
    assert [taught["worked", t] for t in ("auto", "think_answer", "as_is")] == [
        formed,
        formed,
        "so \\boxed{4}",
    ]
    assert [taught["plain", t] for t in ("auto", "think_answer", "as_is")] == [
        "so \\boxed{4}",
        formed,
        "so \\boxed{4}",
    ]
    assert {taught["tagged", t] for t in ("auto", "think_answer", "as_is")} == {"<think>so</think>\\boxed{4}"}
    no_answer = {"problem": "q", "solution": "hard to say"}
    assert example(no_answer).messages[-1]["content"] == "hard to say"
    with pytest.raises(RowError, match=r"data\.target is think_answer, but the row has no answer"):
        example(no_answer, target="think_answer")
    answer_only = {"problem": "q", "answer": 4}
    with pytest.raises(RowError, match="no solution to think with"):
        example(answer_only, target="think_answer")
    assert example(answer_only, target="think_answer", purpose="rl").answer == "4"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1} or \\boxed{2}", "2"),
        ("\\fbox{3}", "3"),
        ("\\boxed {4}", "4"),
        ("\\boxed{a\\}b}", "a\\}b"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{1} then \\boxed{unclosed", "1"),
        ("\\boxed{}", None),
        ("\\boxed", None),
        ("x\n#### 72", "72"),
        ("#### 1\n#### 2", "2"),
        ("####", None),
        ("<answer> 5 </answer> \\boxed{6}", "5"),
        ("<answer>1</answer><answer>2</answer>", "2"),
        ("<answer></answer>", None),
        ("</answer>", None),
        ("no answer", None),
    ],
)
def test_the_answer_is_found_in_a_solution(text, answer):
    assert extract_answer(text) == answer


def test_the_examples_of_the_documentation_are_read():
    blocks = re.findall(r"```(jsonl|json bad)\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    lines = [(kind, line) for kind, block in blocks for line in block.strip().splitlines()]
    assert len(lines) > 20
    for kind, line in lines:
        record = strict_json(line)
        if kind == "jsonl":
            assert example(record, purpose="rl").messages, line
        else:
            with pytest.raises(RowError):
                example(record)
