"""The 0 / 1 / 10 rule, case by case. Answers here are plain numbers, which are compared without math-verify."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kitae.rewards import format as format_reward
from kitae.rewards.reasoning import reward

TAGS = {"T": "<think>", "t": "</think>", "A": "<answer>", "a": "</answer>"}


def judge(completion, *, answer="13", **settings):
    return reward(completion, prompt="6 + 7 = ?", answer=answer, **settings)


def good(answer="13", think="6 plus 7"):
    return f"<think>\n{think}\n</think>\n<answer>{answer}</answer>"


def test_right_form_and_answer_earn_10():
    assert judge(good()) == (10.0, "right")


def test_right_form_with_a_wrong_answer_earns_1_and_says_both_answers():
    assert judge(good("12")) == (1.0, "wrong: 12, expected 13")


def test_of_all_sequences_of_up_to_five_tags_only_one_is_the_form():
    right = []
    for length in range(6):
        for letters in itertools.product("TtAa", repeat=length):
            # Between any two tags stands the gold answer, so only the form can make a difference.
            text = "13".join(TAGS[letter] for letter in letters)
            for strict in (True, False):
                score = judge(text, strict_form=strict)
                assert score.value in (0.0, 10.0)
                assert (score.reason == "right") == (score.value == 10.0)
                if score.value == 10.0:
                    right.append(("".join(letters), strict))
    # In strict form nothing but white space may stand between the blocks, and here "13" does.
    assert right == [("TtAa", False)]


REASONS = [
    ("", "no <think>"),
    ("13", "no <think>"),
    ("<answer>13</answer>", "no <think>"),
    ("6 plus 7</think><answer>13</answer>", "no <think>"),
    ("<think>6 plus 7<answer>13</answer>", "no </think>"),
    ("<think>6 plus 7</think>13", "no <answer>"),
    ("<think>6 plus 7</think>\\boxed{13}", "no <answer>"),
    ("<think>6 plus 7</think><answer>13", "no </answer>"),
    ("<think><think>6 plus 7</think><answer>13</answer>", "2 <think>"),
    ("<think>6</think><think>7</think><answer>13</answer>", "2 <think>"),
    ("<think>6</think></think><answer>13</answer>", "2 </think>"),
    ("<think>6</think><answer>12</answer><answer>13</answer>", "2 <answer>"),
    ("<think>6</think><answer>13</answer></answer>", "2 </answer>"),
    ("<think>6 <answer>13</answer></think>", "tags out of order"),
    ("<think>6 <answer></think>13</answer>", "tags out of order"),
    ("<answer>13</answer><think>6</think>", "tags out of order"),
    ("</think>6<think><answer>13</answer>", "tags out of order"),
    ("<answer><think>6</think>13</answer>", "tags out of order"),
    ("<think>the <answer> goes here</think><answer>13</answer>", "2 <answer>"),
    ("<think>6 < 7</think><answer>13</answer>", "right"),
    ("<think></think><answer>13</answer>", "right"),
    ("<THINK>6</THINK><ANSWER>13</ANSWER>", "no <think>"),
    ("<think >6</think><answer>13</answer>", "no <think>"),
    ("<think/><answer>13</answer>", "no <think>"),
    ("&lt;think&gt;6&lt;/think&gt;<answer>13</answer>", "no <think>"),
    ("\uff1cthink\uff1e6\uff1c/think\uff1e<answer>13</answer>", "no <think>"),
    ("<think>6</think>\r\n\r\n<answer>13</answer>\r\n", "right"),
    ("\n\t <think>6</think>\u3000<answer>13</answer> \n", "right"),
    ("So: <think>6</think><answer>13</answer>", "text outside the blocks"),
    ("<think>6</think> so <answer>13</answer>", "text outside the blocks"),
    ("<think>6</think><answer>13</answer> done", "text outside the blocks"),
    ("<think>6</think><answer>13</answer>\u200b", "text outside the blocks"),
    ("<think>6</think><answer>13</answer><|im_end|>", "text outside the blocks"),
    ("<think>6</think><answer></answer>", "wrong: , expected 13"),
    ("<think>6</think><answer> \n </answer>", "wrong: , expected 13"),
    ("<think>13</think><answer>no idea</answer>", "wrong: no idea, expected 13"),
    ("<think>6</think><answer>\n13\n</answer>", "right"),
    ("<think>6</think><answer>12 or 13</answer>", "wrong: 12 or 13, expected 13"),
    (
        "<think>6</think><answer>" + "1" * 2001 + "</answer>",
        "wrong: answer of 2001 characters, at most 2000 are read",
    ),
]


@pytest.mark.parametrize(("completion", "reason"), REASONS)
def test_every_score_says_why(completion, reason):
    value = 10.0 if reason == "right" else 1.0 if reason.startswith("wrong") else 0.0
    assert judge(completion) == (value, reason)


@pytest.mark.parametrize("outside", ["So: {}", "{} done"])
def test_text_outside_the_blocks_is_allowed_without_strict_form(outside):
    assert judge(outside.format(good()), strict_form=False).value == 10.0


BOXED = [
    (r"<think>6 plus 7</think>The sum is \boxed{13}.", 10.0, "right"),
    (r"<think>6 plus 7</think>\boxed{12} no, \boxed{13}", 10.0, "right"),
    (r"<think>6 plus 7</think>\boxed{13} no, \boxed{12}", 1.0, "wrong: 12, expected 13"),
    (r"<think>\boxed{13}</think>So it is 13.", 0.0, r"no \boxed{} after </think>"),
    (r"<think>6 plus 7</think>\boxed{13", 0.0, r"no \boxed{} after </think>"),
    (r"<think>6 plus 7 \boxed{13}", 0.0, "no </think>"),
    (r"6 plus 7</think>\boxed{13}", 0.0, "no <think>"),
    (r"<think></think></think>\boxed{13}", 0.0, "2 </think>"),
    (r"</think><think>\boxed{13}", 0.0, "tags out of order"),
    (r"So <think>6</think>\boxed{13}", 0.0, "text before <think>"),
    (r"<think>6</think>\boxed{}", 1.0, "wrong: , expected 13"),
    ("<think>6</think><answer>13</answer>", 0.0, r"no \boxed{} after </think>"),
]


@pytest.mark.parametrize(("completion", "value", "reason"), BOXED)
def test_boxed_form(completion, value, reason):
    assert judge(completion, form="boxed") == (value, reason)


@pytest.mark.parametrize("gold", [None, "", "  \n", "9" * 2001])
def test_without_a_usable_gold_answer_nothing_can_be_scored(gold):
    assert judge(good(), answer=gold) == (None, "no usable gold answer")
    assert judge("bad form", answer=gold) == (None, "no usable gold answer")


def test_format_reward_looks_at_the_form_only():
    assert format_reward.reward(good("12"), prompt="", answer=None) == (1.0, "right form")
    assert format_reward.reward("12", prompt="", answer=None) == (0.0, "no <think>")


PIECES = [*TAGS.values(), "13", "12", " ", "\n", "x", "<", ">", "think", "\\boxed{13}"]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_the_form_is_what_a_slow_regular_expression_says(text):
    strict = re.fullmatch(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", text, re.DOTALL)
    inner = strict and "".join(strict.groups())
    is_form = strict is not None and not any(tag in inner for tag in TAGS.values())
    assert (judge(text).value > 0) == is_form


MEGABYTE = [
    good(think="x" * 1_000_000),
    "<think>" * 150_000,
    "<answer></answer>" * 60_000,
    "<" * 1_000_000,
    "<think>" + "\\boxed{" * 140_000,
    good(think="{" * 1_000_000),
    " " * 1_000_000 + good(),
]


@pytest.mark.parametrize("form", ["answer_tags", "boxed"])
@pytest.mark.parametrize("number", range(len(MEGABYTE)))
def test_a_megabyte_is_read_in_linear_time(number, form, pool):
    from kitae.types import Problem

    # In a worker: were the scan quadratic, this would run into the limit instead of hanging the test.
    (score,) = pool.score(
        [(MEGABYTE[number], Problem(prompt="", token_ids=[], answer="13", columns={"form": form}))]
    )
    expected = 10.0 if MEGABYTE[number].endswith("</answer>") and "<think>" in MEGABYTE[number] else 0.0
    assert score.value == expected and score.reason != "timeout"
