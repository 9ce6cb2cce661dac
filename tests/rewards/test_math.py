"""What counts as the same answer. The table is the policy of docs/rewards.md; nothing in it is hostile."""

import itertools
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.rewards.math import equivalent, final_answer, last_boxed, reward

SAME = [
    # decoration
    ("5", "$5$"), ("5", r"\boxed{5}"), ("5", r"$\boxed{5}$"), ("5", "**5**"), ("5", r"\(5\)"), ("5", "5."),
    ("5", " 5\n"), (r"\text{Sunday}", "sunday"), (r"\text{(C)}", "C"), ("(C)", "C"), ("no solution", "No solution"),
    # numbers
    ("5.0", "5"), (".5", "0.5"), ("007", "7"), ("-0", "0"), ("+5", "5"), ("1,234", "1234"), ("10{,}000", "10000"),
    ("1 000 000", "1000000"), ("1.5e3", "1500"), (r"1.5\times10^3", "1500"), (r"2.998 \cdot 10^{8}", "299800000"),
    ("1/2", "0.5"), (r"\frac12", "0.5"), (r"\dfrac{1}{2}", "1/2"), (r"-\frac{5}{3}", r"\frac{-5}{3}"),
    (r"3\frac{1}{2}", "3.5"), ("3 1/2", "7/2"), ("3\u00bd", "3.5"),
    # characters
    ("\uff11\uff12", "12"), ("\u0663", "3"), ("\u22125", "-5"), ("\u202e12\u202c", "12"), ("x\u00b2", "x^2"),
    ("10\u207b\u00b2", "0.01"), ("\u221a2", r"\sqrt{2}"), ("2\u03c0", r"2\pi"),
    # units and percent
    ("12 apples", "12"), ("12", r"12\text{ cm}"), ("12 cm", "12 centimeters"), ("$1,234.50", "1234.5"), (r"\$5", "5"),
    ("5 dollars", "$5"), ("8 miles per hour", "8"), ("36 cm^2", "36"), ("90^\\circ", "90"), ("90\u00b0", "90 degrees"),
    ("13th", "13"), (r"13^{\text{th}}", "13"), ("12\u5186", "12"), ("12\u500b", "12"), ("50%", "50"), (r"50\%", "0.5"),
    ("0.5", "50%"), ("50", "50%"), ("50 percent", "50%"),
    # names
    ("x = 5", "5"), ("5", "x=5"), ("f(x) = 2x", "2x"), (r"x \in (1,2)", "(1,2)"), ("x=1, y=2", "y=2, x=1"),
    # lists
    ("(1,2)", "(1, 2)"), ("2,1", "1,2"), (r"\{1,2\}", "1 and 2"), ("x=1 or x=2", "1, 2"), (r"\pm 2", "2,-2"),
    ("[1,2)", "[1,2)"), (r"(-\infty,3]\cup[5,\infty)", r"[5,\infty)\cup(-\infty,3]"), ("(1/2, 0.5)", "(0.5, 1/2)"),
    # expressions
    ("x^2+2x+1", "(x+1)^2"), ("1+2x", "2x+1"), ("x**2", "x^{2}"), ("x^10", "x^{10}"), ("sqrt(2)/2", r"\frac{1}{\sqrt2}"),
    ("2*pi", r"2\pi"), ("2^{10}", "1024"), (r"\binom{5}{2}", "10"), ("5!", "120"), (r"\log_2 8", "3"), ("3+4i", "4i+3"),
    ("y = 3+2x", "y=2x+3"), ("2x-y+3=0", "y=2x+3"), ("3>x", "x<3"),
    (r"\begin{pmatrix}1/2\\2\end{pmatrix}", r"\begin{pmatrix} 0.5 \\ 2 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    # statements are no answers
    ("6=5", "5"), ("6=5", "6"), ("5=5", "5"), ("2+3=5", "5"), ("x=5", "y=5"), ("0=0", "y=2x+3"), ("x=x", "y=2x+3"),
    ("x=2, y=1", "x=1, y=2"), ("x<5", "5"), ("5<6", "5"), (r"\approx 5", "5"),
    # hedging
    ("12 or 13", "12"), ("12, 13", "12"), ("12 and 12", "12"), ("12", "12, 13"), (r"\{12,13\}", "12"),
    ("0,1,2,3,4,5,6,7,8,9", "5"), ("maybe 5", "5"), ("not 5", "5"), ("5 or so", "5"), ("5, I think", "5"),
    (r"\pm 5", "5"), ("0 1 2 3 4 5", "5"), ("1 2 3", "123"),
    # values
    ("0.33", "1/3"), ("0.333333", "1/3"), ("5.99", "6"), ("-5", "5"), ("1/0", "5"), ("nan", "5"), ("inf", "5"),
    ("1e999", "5"), ("0x10", "16"), ("", "5"), ("\\boxed{}", "5"), ("5x", "5"), ("5 x", "5"), ("5t", "5"),
    ("12 million", "12"), ("12\u4e07", "12"), ("12 minus 3", "12"), ("18 and a half", "18"), ("50%", "5000"),
    ("12 m", "12 cm"), ("5 euros", "$5"), ("50%", "50 cm"), ("B", "C"), ("seat", "east"), (r"\text{east}", "seat"),
    ("gold answer", "5"), ("the answer", "5"),
    # order and brackets
    ("(2,1)", "(1,2)"), ("(1,2)", "[1,2]"), ("1, 2", "(1,2)"), ("(1,2,3)", "(1,2)"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "gold"), SAME)
def test_these_are_the_same_answer(answer, gold):
    assert equivalent(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_these_are_different_answers(answer, gold):
    assert not equivalent(answer, gold)


FINITE = st.fractions(min_value=-10_000, max_value=10_000, max_denominator=1000)
SPELLINGS = [
    lambda x: f"{x.numerator}/{x.denominator}",
    lambda x: f"\\frac{{{x.numerator}}}{{{x.denominator}}}",
    lambda x: f"${'-' if x < 0 else ''}\\dfrac{{{abs(x.numerator)}}}{{{x.denominator}}}$",
    lambda x: f"\\boxed{{{x.numerator}/{x.denominator}\\text{{ apples}}}}.",
    lambda x: f"x = {x.numerator}/{x.denominator}",
]


@settings(deadline=None)  # the first one that needs symbols imports them
@given(FINITE, FINITE, st.sampled_from(SPELLINGS), st.sampled_from(SPELLINGS))
def test_spellings_of_numbers_are_equal_exactly_if_the_numbers_are(x, y, spell_x, spell_y):
    assert equivalent(spell_x(x), spell_y(x))
    assert equivalent(spell_x(x), spell_y(y)) == (x == y)


@given(st.integers(-(10**12), 10**12))
def test_thousands_separators_do_not_change_a_number(n):
    assert (
        equivalent(f"{n:,}", str(n))
        and equivalent(f"${n:,}.00", str(n))
        and not equivalent(f"{n:,}", str(n + 1))
    )


@settings(deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=5), st.randoms())
def test_only_unbracketed_lists_may_be_shuffled(values, random):
    shuffled = random.sample(values, len(values))

    def spell(numbers: list[Fraction]) -> str:
        return ", ".join(map(str, numbers))

    assert equivalent(spell(shuffled), spell(values))
    assert equivalent(f"({spell(shuffled)})", f"({spell(values)})") == (shuffled == values)


FOUND = [
    ("<think>5</think><answer> 6 </answer>", "6", "answer tag"),
    ("<answer>5</answer> and <answer>6</answer>", "6", "answer tag"),
    ("<answer>5</answer> and <answer>6", "5", "answer tag"),
    (r"<think><answer>5</answer></think>so \boxed{6}", "6", "boxed"),
    (r"\boxed{5} then \boxed{\frac{1}{2}} then 7", r"\frac{1}{2}", "boxed"),
    (r"\boxed{x = \boxed{5}}", r"x = \boxed{5}", "boxed"),
    (r"\boxed{5} and \boxed{6", "5", "boxed"),
    (r"\fbox{5} \} {", "5", "boxed"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}", "boxed"),
    ("2 + 3 = 5\n#### 5\n", "5", "####"),
    ("#### 4\n#### 5 apples\nbye 6", "5 apples", "####"),
    ("So 2 + 3 = 6.\nA: 5", "5", "A:"),
    ("A: 4\nA: 5 dollars\nQ: next?", "5 dollars", "A:"),
    ("ALPHA: 4, then 1,234.5", "1,234.5", "last number"),
    ("It costs $-3/4.", "-3/4", "last number"),
    ("The year 2024, in March.", "2024", "last number"),
    ("<think>so far 5", None, "unclosed think"),
    ("<think>5</think>I do not know.", None, "nothing found"),
    ("", None, "nothing found"),
]


@pytest.mark.parametrize(("text", "answer", "how"), FOUND)
def test_the_final_answer_is_found_and_where(text, answer, how):
    assert final_answer(text) == (answer, how)


@given(
    st.lists(st.sampled_from([r"\boxed{", "{", "}", r"\{", r"\}", "\\", "1", " "]), max_size=20).map("".join)
)
def test_last_boxed_agrees_with_counting_braces(text):
    assert last_boxed(text) == slow_last_boxed(text)


def slow_last_boxed(text):
    """The last outermost box, by trying every start and walking to its closing brace."""
    boxes = []
    opened_at = [i for i in range(len(text)) if text.startswith("\\boxed{", i) and not is_escaped(text, i)]
    for start in opened_at:
        depth, i = 1, start + len("\\boxed{")
        while i < len(text) and depth:
            if not is_escaped(text, i):
                depth += (text[i] == "{") - (text[i] == "}")
            i += 1
        if depth == 0:
            boxes.append((i, -start, text[start + len("\\boxed{") : i - 1]))
    return max(boxes)[2] if boxes else None


def is_escaped(text, i):
    """Whether an odd number of backslashes stands before position i."""
    return (i - len(text[:i].rstrip("\\"))) % 2 == 1


def test_math_reward_is_1_or_0_and_says_where_the_answer_was():
    def judge(text):
        return reward(text, prompt="", answer="5")

    assert judge("so \\boxed{5}") == (1.0, "right (boxed)")
    assert judge("so 6") == (0.0, "wrong: 6 (last number), expected 5")
    assert judge("no idea") == (0.0, "no answer (nothing found)")
    assert reward("5", prompt="", answer=None) == (None, "no usable gold answer")


def test_graded_model_outputs_are_judged_as_their_labels_say(shared_data, pool):
    lines = (shared_data / "math" / "graded_pairs_dev.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = [final_answer(row["response"]).answer or "" for row in rows]
    verdicts = pool.compare([(answer, row["gold"]) for answer, row in zip(found, rows, strict=True)])
    agree = sum((v.value == 1.0) == row["label"] for v, row in zip(verdicts, rows, strict=True))
    assert agree / len(rows) >= 0.995, agree


def test_gold_answers_of_math_equal_their_own_spellings_and_no_neighbours(shared_data, pool):
    golds = json.loads((shared_data / "math" / "math_train_answers.json").read_text())
    distinct = sorted({row["answer"] for row in golds if row["answer"]})[::24]
    respelled = [(f"$\\boxed{{{gold}}}$.".replace("\\frac", "\\dfrac"), gold) for gold in distinct]
    wrong = [
        pair for pair, verdict in zip(respelled, pool.compare(respelled), strict=True) if verdict.value != 1.0
    ]
    assert not wrong
    neighbours = list(itertools.pairwise(distinct))
    equal = [
        pair for pair, verdict in zip(neighbours, pool.compare(neighbours), strict=True) if verdict.value
    ]
    assert len(equal) <= 3, equal  # such as "20" and "20 \%", which are the same by our rules
