"""Preference rows in every shape people keep them in, what is refused, and how pairs become rows."""

import csv
import json
import random
import re
from pathlib import Path

import pytest

from kitae.config import DataSettings
from kitae.data.chat import Template
from kitae.data.collate import collate
from kitae.data.formats import RowError, to_example
from kitae.data.pairs import RenderedPairs, WithMismatched
from kitae.data.preferences import to_preference
from kitae.data.readers import strict_json
from kitae.data.sources import open_dataset
from kitae.errors import DataError, PlanError
from kitae.models.toy import make_tokenizer

U, A = "user", "assistant"


def preference(record, *, purpose="pairs", **settings):
    return to_preference(record, data=DataSettings(**settings), purpose=purpose, source="f:1")


def said(example):
    return [(turn["role"], turn["content"]) for turn in example.messages]


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def whole(*pairs, last):
    return turns(*pairs, (A, last))


QUESTION = [(U, "q"), (A, "good")]
PAIRS = [
    ({"prompt": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"question": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"problem": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    ({"instruction": "q", "chosen": "good", "rejected": "bad"}, QUESTION),
    (
        {"instruction": "q", "input": "more", "chosen": "good", "rejected": "bad"},
        [(U, "q\nmore"), (A, "good")],
    ),
    (
        {"instruction": "q2", "history": [["q1", "a1"]], "system": "s", "chosen": "good", "rejected": "bad"},
        [("system", "s"), (U, "q1"), (A, "a1"), (U, "q2"), (A, "good")],
    ),
    ({"prompt": turns((U, "q")), "chosen": whole(last="good"), "rejected": whole(last="bad")}, QUESTION),
    ({"prompt": "q", "chosen": whole(last="good"), "rejected": whole(last="bad")}, QUESTION),
    (  # Colossal-AI's
        {
            "context": [{"from": U, "content": "q"}],
            "chosen": whole(last="good"),
            "rejected": whole(last="bad"),
        },
        QUESTION,
    ),
    ({"chosen": whole((U, "q"), last="good"), "rejected": whole((U, "q"), last="bad")}, QUESTION),
    (  # the whole conversation beside its prompt
        {"prompt": "q", "chosen": whole((U, "q"), last="good"), "rejected": whole((U, "q"), last="bad")},
        QUESTION,
    ),
    (
        {
            "system": "s",
            "prompt": "q",
            "chosen": whole((U, "q"), last="good"),
            "rejected": whole((U, "q"), last="bad"),
        },
        [("system", "s"), *QUESTION],
    ),
    (
        {
            "chosen": whole((U, "1"), (A, "2"), (U, "q"), last="good"),
            "rejected": whole((U, "1"), (A, "2"), (U, "q"), last="bad"),
        },
        [(U, "1"), (A, "2"), *QUESTION],
    ),
    (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        QUESTION,
    ),
    (
        {
            "system": "s",
            "messages": turns((U, "q")),
            "chosen": {"role": A, "content": "good"},
            "rejected": {"role": A, "content": "bad"},
        },
        [("system", "s"), *QUESTION],
    ),
    (
        {
            "chosen": "\n\nHuman: q\n\nAssistant: good",
            "rejected": "\n\nHuman: q\n\nAssistant: bad",
        },
        QUESTION,
    ),
    ({"prompt": "q", "chosen": "[1, 2]", "rejected": "{bad"}, [(U, "q"), (A, "[1, 2]")]),
    (
        {
            "prompt": json.dumps(turns((U, "q"))),
            "chosen": json.dumps(whole(last="good")),
            "rejected": json.dumps(whole(last="bad")[0]),
        },
        QUESTION,
    ),
    (
        {"prompt": "q", "chosen": "<think>r</think>good", "rejected": "<think>r</think>bad"},
        [(U, "q"), (A, "<think>r</think>good")],
    ),
]


@pytest.mark.parametrize(("record", "messages"), PAIRS)
def test_a_pair_is_recognised_by_its_columns(record, messages):
    example = preference(record)
    assert said(example) == messages
    assert example.rejected == messages[-1][1].replace("good", "bad").replace("[1, 2]", "{bad")
    assert example.label is None


def test_columns_may_have_other_names_and_others_are_kept():
    record = {"frage": "q", "win": "good", "lose": "bad", "margin": 2}
    example = preference(record, columns={"prompt": "frage", "chosen": "win", "rejected": "lose"})
    assert said(example) == QUESTION and example.rejected == "bad" and example.columns == {"margin": 2}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": "same", "rejected": "same"}, "identical"),
        ({"prompt": "q", "chosen": "", "rejected": "bad"}, r"empty content \(chosen\)"),
        ({"prompt": "q", "chosen": "good", "rejected": "  "}, r"empty content \(rejected\)"),
        ({"prompt": "", "chosen": "good", "rejected": "bad"}, r"empty content \(prompt\)"),
        ({"prompt": "q", "chosen": "good"}, "needs the columns chosen and rejected; found prompt, chosen"),
        ({"prompt": "q", "chosen": "good", "rejected": None}, "needs the columns chosen and rejected"),
        ({"chosen": "good", "rejected": "bad"}, r"no prompt: neither a column named .* nor turns"),
        ({"prompt": "q", "chosen": 1, "rejected": "bad"}, r"content must be text, found a number \(chosen\)"),
        (
            {"prompt": 1, "chosen": "good", "rejected": "bad"},
            r"content must be text, found a number \(prompt\)",
        ),
        ({"prompt": "q", "chosen": [], "rejected": "bad"}, r"no turns \(chosen\)"),
        (
            {"chosen": whole((U, "q1"), last="good"), "rejected": whole((U, "q2"), last="bad")},
            "differ before their last turn",
        ),
        (
            {"chosen": whole((U, "1"), (A, "x"), (U, "q"), last="g"), "rejected": whole((U, "1"), last="b")},
            "differ before their last turn",
        ),
        (
            {"prompt": "p", "chosen": whole((U, "q"), last="good"), "rejected": whole((U, "q"), last="bad")},
            r"the prompt column and the turns before the last one differ \(chosen\)",
        ),
        ({"chosen": turns((U, "q")), "rejected": turns((U, "r"))}, r"must be the assistant's \(chosen\)"),
        ({"prompt": "q", "completion": "good", "label": True}, "rows with a label are for kto"),
        (["q"], "expected an object, found a list"),
    ],
)
def test_a_bad_pair_says_what_is_wrong_with_it(record, reason):
    with pytest.raises(RowError, match=reason):
        preference(record)


@pytest.mark.parametrize(
    ("record", "label"),
    [
        ({"prompt": "q", "completion": "good", "label": True}, True),
        ({"prompt": "q", "completion": "good", "label": 0}, False),
        ({"prompt": "q", "completion": "good", "label": "True"}, True),
        ({"prompt": "q", "completion": "good", "label": "0"}, False),
        ({"prompt": "q", "completion": "good", "label": 1.0}, True),
        ({"prompt": turns((U, "q")), "completion": whole(last="good"), "label": False}, False),
        ({"instruction": "q", "output": "good", "kto_tag": True}, True),
        ({"messages": whole((U, "q"), last="good"), "label": False}, False),
    ],
)
def test_a_labelled_completion_is_recognised_by_its_columns(record, label):
    example = preference(record, purpose="labels")
    assert said(example) == QUESTION and example.label is label and example.rejected is None


@pytest.mark.parametrize("label", ["maybe", 2, 0.5, [True], ""])
def test_a_label_that_is_not_true_or_false_is_refused(label):
    with pytest.raises(RowError, match=r"a label must be true or false, not .* \(label\)"):
        preference({"prompt": "q", "completion": "good", "label": label}, purpose="labels")


def test_a_label_needs_a_completion():
    with pytest.raises(RowError, match="a label without a completion"):
        preference({"prompt": "q", "label": True}, purpose="labels")
    with pytest.raises(RowError, match="chosen and rejected, or a completion and its label"):
        preference({"prompt": "q", "completion": "good"}, purpose="labels")


def test_sft_and_rl_still_refuse_preferences():
    for record in (PAIRS[0][0], {"prompt": "q", "completion": "good", "label": True}):
        for purpose in ("sft", "rl"):
            with pytest.raises(RowError, match="a preference row"):
                to_example(record, data=DataSettings(), purpose=purpose)


# files --------------------------------------------------------------------------------------------------------


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def opened(path, *, purpose="pairs", **settings):
    return open_dataset(str(path), data=DataSettings(**settings), purpose=purpose)


def test_bad_rows_are_listed_together_with_their_lines_or_skipped(tmp_path):
    bad = {"prompt": "q", "chosen": "same", "rejected": "same"}
    path = write(tmp_path / "rows.jsonl", [PAIRS[0][0], *[bad] * 120, {"prompt": "q"}])
    with pytest.raises(DataError) as error:
        opened(path)
    text = str(error.value)
    assert "121 of 122 rows cannot be used" in text and "and 21 more" in text
    assert f"{path}:2: chosen and rejected are identical" in text and f"{path}:101:" in text
    assert len(opened(path, on_bad_row="skip")) == 1


def test_csv_files_hold_turns_as_json_text(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen", "rejected"])
        writer.writerow(
            ["q", json.dumps(whole((U, "q"), last="good")), json.dumps(whole((U, "q"), last="bad"))]
        )
        writer.writerow(["q", "good", "bad"])
    first, second = opened(path)
    assert said(first) == said(second) == QUESTION and first.rejected == second.rejected == "bad"


def test_the_fingerprint_covers_what_was_rejected(tmp_path):
    one = opened(write(tmp_path / "one.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]))
    two = opened(write(tmp_path / "two.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "c"}]))
    assert one.fingerprint != two.fingerprint and one.hashes != two.hashes


# rows ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def template():
    return Template.load(make_tokenizer(), data=DataSettings())


def rendered(tmp_path, records, template, **how):
    purpose = "labels" if how.get("as_labels") else "pairs"
    dataset = opened(write(tmp_path / "rows.jsonl", records), purpose=purpose)
    return RenderedPairs(dataset, **{"template": template, "max_length": 1000, **how})


def texts(template, rows):
    """Prompt and completion of each row as text, special tokens included."""
    show = template.tokenizer.decode
    return [
        (show(row.token_ids[: row.prompt_length]), show(row.token_ids[row.prompt_length :])) for row in rows
    ]


def test_the_rows_of_a_pair_are_those_of_sft_with_only_the_last_turn_taught(tmp_path, template):
    context = [(U, "1+1"), (A, "2"), (U, "2+2")]
    record = {"chosen": whole(*context, last="4"), "rejected": whole(*context, last="five")}
    [pair] = rendered(tmp_path, [record], template)
    for row, content in zip(pair, ("4", "five"), strict=True):
        data = {"messages": whole(*context, last=content)}
        [own] = template.rows(to_example(data, data=DataSettings()), max_length=1000)
        assert row.token_ids == own.token_ids
        assert row.loss_mask == [i >= row.prompt_length for i in range(len(row.token_ids))]
    assert pair[0].prompt_length == pair[1].prompt_length > 0
    assert pair[0].token_ids[: pair[0].prompt_length] == pair[1].token_ids[: pair[1].prompt_length]


def test_thinking_is_kept_and_a_prefilled_tag_belongs_to_the_shared_prompt(tmp_path):
    template = Template.load(make_tokenizer(prefill="<think>\n"), data=DataSettings())
    record = {"prompt": "q", "chosen": "<think>\nhm</think>good", "rejected": "bad"}
    [pair] = rendered(tmp_path, [record], template)
    (prompt, chosen), (same, rejected) = texts(template, pair)
    assert prompt == same and prompt.endswith("<think>\n")
    assert chosen.startswith("hm</think>good") and rejected.startswith("\n</think>\n\nbad")
    assert chosen != "hm</think>good", "the end token is part of the completion"


def test_a_pairs_prompt_is_laid_once(tmp_path, template):
    records = [
        {"prompt": "a long prompt " * 5, "chosen": "good", "rejected": "bad"},
        {"prompt": "another one " * 5, "chosen": "yes", "rejected": "no"},
    ]
    pairs = rendered(tmp_path, records, template)
    rows = [row for pair in pairs for row in pair]
    [batch] = collate(rows, rows_per_forward=4, rows_per_unit=2)
    completions = sum(row.num_taught for row in rows)
    assert batch.packing.num_real_tokens == completions + sum(pair[0].prompt_length for pair in pairs)
    assert [s.prefix_length for s in batch.packing.segments] == [
        length for pair in pairs for length in (0, pair[0].prompt_length, pair[0].prompt_length)
    ]


def test_long_completions_lose_their_end_and_what_is_emptied_or_equal_is_dropped(tmp_path, template, caplog):
    [[row, _]] = rendered(tmp_path, [{"prompt": "q", "chosen": "x", "rejected": "y"}], template)
    room = row.prompt_length + 4
    records = [
        {"prompt": "q", "chosen": "abcdefgh", "rejected": "b"},
        {"prompt": "q", "chosen": "abcd-one", "rejected": "abcd-two"},  # differ only beyond the limit
        {"prompt": "q" * 100, "chosen": "good", "rejected": "bad"},  # no room for a completion
    ]
    with caplog.at_level("WARNING"):
        pairs = rendered(tmp_path, records, template, max_length=room)
    [[chosen, rejected]] = pairs
    assert len(chosen.token_ids) == room and len(rejected.token_ids) < room
    assert pairs.counts["rows_cut"] == 1 and pairs.counts["equalled"] == pairs.counts["emptied"] == 1
    assert "1 completions went beyond data.max_length" in caplog.text
    assert "1 have nothing left of a completion" in caplog.text and "1 have equal completions" in caplog.text


def test_long_prompts_are_dropped_and_counted(tmp_path, template, caplog):
    records = [{"prompt": "q" * n, "chosen": "good", "rejected": "bad"} for n in (1, 50)]
    with caplog.at_level("WARNING"):
        assert len(rendered(tmp_path, records, template, max_prompt_length=20)) == 1
    assert "1 have a prompt longer than data.max_prompt_length = 20" in caplog.text
    with pytest.raises(DataError, match="none of 2 preference rows fits: 2 have a prompt longer"):
        rendered(tmp_path, records, template, max_prompt_length=2)


def test_rows_that_the_template_refuses_are_listed_together(tmp_path, template):
    records = [
        {"prompt": "q", "chosen": "<think>never closed", "rejected": "bad"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used.*\n.*rows.jsonl:1: .*never closes"):
        rendered(tmp_path, records, template)
    assert len(rendered(tmp_path, records, template, skip_bad=True)) == 1


def test_a_full_disk_is_no_bad_row(tmp_path, template, monkeypatch):
    def full(self, record):
        raise self._full(OSError(28, "No space left on device"))

    dataset = opened(
        write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}]), purpose="pairs"
    )
    monkeypatch.setattr("kitae.data.store.RecordStore.append", full)
    with pytest.raises(PlanError, match="No space left on device"):
        RenderedPairs(dataset, template=template, max_length=1000, skip_bad=True)


def test_kto_takes_labels_and_unpairs_pairs(tmp_path, template):
    records = [
        {"prompt": "q1", "chosen": "good", "rejected": "bad"},
        {"prompt": "q2", "completion": "so", "label": False},
    ]
    items = rendered(tmp_path, records, template, as_labels=True)
    shown = [(texts(template, item)[0][1][:2], item[0].numbers) for item in items]
    assert shown == [("go", {"label": 1.0}), ("ba", {"label": 0.0}), ("so", {"label": 0.0})]


def test_the_mismatched_completion_is_of_the_next_other_prompt(tmp_path, template):
    records = [
        {"prompt": "q1", "chosen": "a1", "rejected": "a2"},
        {"prompt": "q2", "completion": "b1", "label": True},
        {"prompt": "q3", "completion": "c1", "label": True},
    ]
    items = rendered(tmp_path, records, template, as_labels=True)
    both = WithMismatched(items, max_length=1000)
    others = []
    for i in range(len(both)):
        own, other = both[i]
        assert own == items[i][0]
        assert other.token_ids[: other.prompt_length] == own.token_ids[: own.prompt_length]
        others.append(texts(template, [other])[0][1][:2])
    assert others == ["b1", "b1", "c1", "a1"]
    short = WithMismatched(items, max_length=items[0][0].prompt_length + 1)
    assert len(short[0][1].token_ids) == items[0][0].prompt_length + 1


def test_kto_needs_two_different_prompts(tmp_path, template):
    records = [{"prompt": "q", "completion": text, "label": True} for text in "ab"]
    items = rendered(tmp_path, records, template, as_labels=True)
    with pytest.raises(DataError, match="all 2 training rows have the same prompt"):
        WithMismatched(items, max_length=100)


def test_the_rows_of_the_documentation_are_what_it_says():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(jsonl pairs|jsonl labels|json bad pairs)\n(.*?)```", page, re.DOTALL)
    assert [kind for kind, _ in blocks] == ["jsonl pairs", "jsonl labels", "json bad pairs"]
    for kind, block in blocks:
        for line in block.splitlines():
            for purpose in ("pairs", "labels"):
                if kind == "json bad pairs" or (kind == "jsonl labels" and purpose == "pairs"):
                    with pytest.raises(RowError):
                        preference(strict_json(line), purpose=purpose)
                else:
                    assert preference(strict_json(line), purpose=purpose).messages


def test_random_junk_gives_an_example_or_a_row_error():
    rng = random.Random(0)
    values = [
        "q",
        "",
        1,
        None,
        True,
        [],
        {},
        [1],
        [{"role": U}],
        turns((U, "q")),
        whole((U, "q"), last="a"),
        "[{",
    ]
    names = [
        "prompt",
        "chosen",
        "rejected",
        "label",
        "completion",
        "messages",
        "system",
        "instruction",
        "history",
    ]
    for _ in range(3000):
        record = {name: rng.choice(values) for name in rng.sample(names, rng.randint(0, 6))}
        for purpose in ("pairs", "labels"):
            try:
                example = preference(record, purpose=purpose)
            except RowError:
                continue
            assert example.messages[-1]["role"] == A and (example.rejected is None) != (example.label is None)
