import json
import random

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kitae.config import DataSettings
from kitae.data import readers, sources
from kitae.data.files import expand, select_split
from kitae.data.sources import open_dataset
from kitae.errors import DataError, MissingExtraError, PlanError

ROW = {"prompt": "2+2?", "completion": "4"}
LINE = json.dumps(ROW).encode()
SKIP = DataSettings(on_bad_row="skip")


def opened(path, data=DataSettings(), **options):  # noqa: B008 - settings are immutable here
    return open_dataset(str(path), data=data, **options)


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def problems_of(path, **options) -> list[str]:
    """The reasons in the error, without the folder."""
    with pytest.raises(DataError) as error:
        opened(path, **options)
    return [line.strip().replace(f"{path.parent}/", "") for line in str(error.value).splitlines()]


# what the strict reader refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "\xff", "completion": "4"}', "not UTF-8 at byte 13"),
        (b'{"prompt": "\xed\xa0\x80", "completion": "4"}', "not UTF-8 at byte 13"),
        (
            b'{"prompt": "\\ud800", "completion": "4"}',
            "half a surrogate pair in text, which is no valid Unicode",
        ),
        ('{"prompt": "é"}'.encode("utf-16-le"), "NUL byte at byte 2"),
        (b'{"prompt": "a\0", "completion": "4"}', "NUL byte at byte 14"),
        (b'{"prompt": "a\\u0000", "completion": "4"}', "NUL character in text"),
        (
            b'{"prompt": "a", "prompt": "b", "completion": "4"}',
            "the name 'prompt' occurs twice in one object (prompt)",
        ),
        (b'{"prompt": "a", "completion": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "answer": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"prompt": "a", "answer": 1e999}', "the number 1e999 is too large"),
        (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}", "a whole number of 5000 digits"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deep"),
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b'{"prompt": "a\tb"}', "not JSON: Invalid control character at at column 14"),
        (LINE + b" extra", "not JSON: Extra data at column 39"),
        (b"null", "expected an object or a list of turns, found null"),
        (b'"text"', "expected an object or a list of turns, found text"),
        (b"17", "expected an object or a list of turns, found a number"),
    ],
)
def test_a_bad_line_is_named_with_file_line_and_reason(tmp_path, line, reason):
    path = written(tmp_path / "a.jsonl", LINE + b"\n" + line + b"\n" + LINE)
    found = problems_of(path)
    assert found[0].startswith("1 of 3 rows cannot be used")
    assert found[1].startswith("a.jsonl:2: ")
    assert found[1] == f"a.jsonl:2: {reason}"
    dataset = opened(path, SKIP)
    assert [dataset[i].source for i in range(2)] == [f"{path}:1", f"{path}:3"]
    assert dataset.num_skipped == 1


def test_a_line_beyond_the_limit_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 100)
    path = written(tmp_path / "a.jsonl", LINE + b"\n" + b"x" * 1000 + b"\n" + LINE + b"\n")
    assert problems_of(path)[1].startswith("a.jsonl:2: line longer than")
    assert opened(path, SKIP)[1].source.endswith(":3")


def test_byte_order_mark_crlf_blank_lines_and_a_missing_last_feed_are_fine(tmp_path):
    path = written(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\r\n\n  \n" + LINE)
    dataset = opened(path)
    assert [example.source.rpartition(":")[2] for example in dataset] == ["1", "5"]


def test_only_line_feeds_end_a_line(tmp_path):
    text = "a\u2028b\u0085c\x0bd\x0ce"
    row = json.dumps({"prompt": text, "completion": "x"}, ensure_ascii=False).replace("\\u000b", "\x0b")
    path = written(tmp_path / "a.jsonl", row.replace("\x0b", "\\u000b"))
    assert opened(path)[0].messages[0]["content"] == text


def test_a_hundred_bad_rows_are_listed_and_all_are_counted(tmp_path):
    path = written(tmp_path / "a.jsonl", b"\n".join([LINE, *[b"{"] * 250]))
    found = problems_of(path)
    assert found[0].startswith("250 of 251 rows")
    assert len(found) == 102
    assert found[-1] == "... and 150 more"


def test_skipping_everything_is_still_an_error(tmp_path):
    path = written(tmp_path / "a.jsonl", b"{\n{")
    with pytest.raises(DataError, match="no rows in"):
        opened(path, SKIP)


SEEDS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "a", "completion": "b"},
    {"instruction": "a", "input": "", "output": "b"},
    {"prompt": "a", "solution": "<think>b</think><answer>c</answer>"},
    {"problem": "a", "level": "1", "solution": "\\boxed{b}"},
    {"question": "a", "answer": "b #### 3"},
    {"instruction": "a", "output": "b", "system": "s", "history": [["c", "d"]]},
    [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b", "weight": 1},
    ],
]
VALUES = [None, True, 0, 1.5, "", "x", [], {}, [None], {"role": "user"}, [[]], "\ud800", "\0"]


def mutated(rng: random.Random) -> bytes:
    """One line that is nearly a row: bytes flipped, cut, spliced, or a value of another type put in."""
    row = json.loads(json.dumps(rng.choice(SEEDS)))
    if rng.random() < 0.5:
        place = row
        while isinstance(place, dict | list) and place and rng.random() < 0.8:
            key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
            if not isinstance(place[key], dict | list) or rng.random() < 0.4:
                place[key] = rng.choice(VALUES)
                break
            place = place[key]
    line = bytearray(json.dumps(row).encode())
    kind = rng.randrange(4)
    if kind == 1:
        for _ in range(rng.randint(1, 3)):
            line[rng.randrange(len(line))] = rng.randrange(256)
    elif kind == 2:
        line = line[: rng.randrange(len(line))]
    elif kind == 3:
        other = json.dumps(rng.choice(SEEDS)).encode()
        line = line[: rng.randrange(len(line))] + other[rng.randrange(len(other)) :]
    return bytes(line).replace(b"\n", b" ") or b"{"


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_mutated_line_is_accepted_or_reported(tmp_path_factory, seed):
    rng = random.Random(seed)
    lines = [mutated(rng) for _ in range(500)]
    path = written(tmp_path_factory.mktemp("fuzz") / "a.jsonl", b"\n".join([LINE, *lines]))
    dataset = opened(path, SKIP)
    num_lines = 1 + sum(bool(line.strip()) for line in lines)
    assert len(dataset) + dataset.num_skipped == num_lines
    assert all(turn["content"].strip() for example in dataset for turn in example.messages)


# kinds of files -----------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"{i}+1?", "completion": f"{i + 1}", "level": i} for i in range(5)]


def parquet(path, rows):
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    text_rows = [{**row, "level": str(row["level"])} for row in ROWS]
    lines = "\n".join(map(json.dumps, text_rows))
    table = "prompt,completion,level\n" + "".join(f'"{i}+1?",{i + 1},{i}\r\n' for i in range(5))
    paths = [
        written(tmp_path / "a.jsonl", lines),
        written(tmp_path / "b.json", json.dumps(text_rows, indent=2)),
        written(tmp_path / "c.csv", table),
        parquet(tmp_path / "d.parquet", text_rows),
    ]
    datasets = [opened(path) for path in paths]
    for dataset in datasets:
        assert [(e.messages, e.answer, e.columns) for e in dataset] == [
            (e.messages, e.answer, e.columns) for e in datasets[0]
        ]
    assert len({dataset.fingerprint for dataset in datasets}) == 1


def test_a_json_array_names_the_line_of_each_record(tmp_path):
    path = written(
        tmp_path / "a.json", '[\n{"prompt": "a", "completion": "b"},\n{"prompt": "",\n "completion": "b"}\n]'
    )
    assert problems_of(path)[1] == "a.json:3: empty content (prompt)"


def test_all_bad_records_of_a_json_array_are_listed_and_can_be_skipped(tmp_path):
    good = json.dumps(ROW)
    bad = ['{"prompt": 1e999}', '{"prompt": "a", "prompt": "b"}', f'{{"prompt": {"9" * 5000}}}']
    path = written(tmp_path / "a.json", "[" + ",\n".join([bad[0], good, bad[1], bad[2], good]) + "]")
    assert [line.partition(": ")[0] for line in problems_of(path)[1:]] == ["a.json:1", "a.json:3", "a.json:4"]
    assert len(opened(path, SKIP)) == 2


def test_a_json_file_with_one_record_a_line_is_read_as_such(tmp_path):
    bare = json.dumps(SEEDS[1])
    assert len(opened(written(tmp_path / "a.json", f"{bare}\n{bare}\n"))) == 2
    assert len(opened(written(tmp_path / "b.json", json.dumps([SEEDS[1], SEEDS[1]])))) == 2
    assert len(opened(written(tmp_path / "c.json", json.dumps(ROW)))) == 1


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b'[{"prompt": "a"', "not JSON"),
        ("a.json", b'[{"prompt": "a", "answer": "1"} {"prompt"', "expected , or ]"),
        ("a.json", b'["\xff"]', "not UTF-8"),
        ("a.json", b'[{"answer": 1e999}]', "no rows in"),
        ("a.csv", b'prompt,completion\n"a,b\n' + b"x" * 100, "unexpected end of data"),
        ("a.csv", b"prompt,prompt\na,b\n", "two columns have the same name"),
        ("a.csv", b"prompt,completion\na,\xff\n", "not UTF-8"),
        ("a.parquet", b"PAR1 no table", "not a whole Parquet file"),
        ("a.parquet", b"", "not a whole Parquet file"),
        ("a.txt", b"text", "unknown kind of file '.txt'"),
        ("a.jsonl", b"", "no rows in"),
    ],
)
def test_a_broken_file_is_a_data_error(tmp_path, name, content, reason):
    with pytest.raises(DataError, match=reason):
        opened(written(tmp_path / name, content), SKIP)


def test_truncated_files_never_crash(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": "x" * 50} for i in range(40)]
    originals = {
        "a.parquet": parquet(tmp_path / "whole.parquet", rows).read_bytes(),
        "a.json": json.dumps(rows).encode(),
        "a.csv": b"prompt,completion\n" + b"".join(b'"q %d","x"\n' % i for i in range(40)),
    }
    for name, content in originals.items():
        for cut in range(0, len(content), max(1, len(content) // 40)):
            try:
                assert len(opened(written(tmp_path / name, content[:cut]), SKIP)) <= 40
            except DataError:
                continue


def test_a_csv_row_with_too_few_fields_is_reported(tmp_path):
    path = written(tmp_path / "a.csv", "prompt,completion\na,b\nc\n")
    assert problems_of(path)[1] == "a.csv:3: 1 fields where the header has 2"


def test_parquet_numbers_and_dates_become_json_values(tmp_path):
    import datetime

    day = datetime.date(2026, 1, 2)
    rows = [{"prompt": "a", "answer": 43.0, "day": day}, {"prompt": "b", "answer": float("nan"), "day": day}]
    path = parquet(tmp_path / "a.parquet", rows)
    assert "a.parquet:2: the number nan" in problems_of(path, purpose="rl")[1]
    example = opened(path, SKIP, purpose="rl")[0]
    assert (example.answer, example.columns) == ("43", {"day": "2026-01-02"})


def test_a_parquet_file_that_unpacks_to_a_hundred_times_its_size_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1000)
    table = pa.table({"prompt": ["a" * 20 + str(i) for i in range(50_000)]})
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(table, path, use_dictionary=False, compression="zstd")
    ratio = 50_000 * 25 / path.stat().st_size
    monkeypatch.setattr(readers, "MAX_PARQUET_RATIO", ratio / 2)
    with pytest.raises(DataError, match="times its size"):
        opened(path, purpose="rl")


def test_a_source_that_changes_after_opening_does_not_matter(tmp_path):
    path = written(tmp_path / "a.jsonl", b"\n".join(json.dumps(row).encode() for row in ROWS))
    dataset = opened(path)
    before = list(dataset)
    for change in (b"", LINE * 3, b"\0" * 10_000):
        written(path, change)
        assert list(dataset) == before
    path.unlink()
    assert list(dataset) == before


def test_rows_live_on_disk_and_only_offsets_in_memory(tmp_path):
    row = json.dumps({"prompt": "x" * 500, "completion": "y"}).encode()
    dataset = opened(written(tmp_path / "a.jsonl", b"\n".join([row] * 4000)))
    in_memory = dataset._store._ends.itemsize * len(dataset._store) + dataset.hashes.itemsize * len(
        dataset.hashes
    )
    assert in_memory == 16 * 4000
    assert dataset[3999].messages[0]["content"] == "x" * 500
    assert dataset[-1].source.endswith(":4000")
    with pytest.raises(IndexError):
        dataset[4000]


def test_a_full_disk_is_an_error_that_says_where(tmp_path, monkeypatch):
    class Full:
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("kitae.data.store.tempfile.TemporaryFile", lambda **_: Full())
    with pytest.raises(PlanError, match="No space left on device; free space there or point TMPDIR"):
        opened(written(tmp_path / "a.jsonl", LINE))


def test_the_fingerprint_depends_on_content_and_order_only(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    first = opened(written(tmp_path / "a.jsonl", b"\n".join(lines)))
    moved = opened(written(tmp_path / "b.jsonl", b"\n\n".join(lines)))
    turned = opened(written(tmp_path / "c.jsonl", b"\n".join(lines[::-1])))
    assert first.fingerprint == moved.fingerprint != turned.fingerprint


def test_max_rows_takes_the_first_rows_and_progress_is_told(tmp_path):
    path = written(tmp_path / "a.jsonl", b"\n".join([LINE] * 2500))
    seen: list[int] = []
    assert len(opened(path, max_rows=7)) == 7
    assert len(opened(path, on_progress=seen.append)) == 2500
    assert seen == [1000, 2000, 2500]


# where files are found ----------------------------------------------------------------------------------------


def test_files_folders_globs_and_lists_of_them_are_found(tmp_path):
    (tmp_path / "sub" / ".cache").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl", "sub/c.json", "sub/.cache/d.jsonl", "notes.txt"):
        written(tmp_path / name, LINE)
    found = {
        path: [f.path.name for f in expand([path], split="train")]
        for path in (
            str(tmp_path / "a.jsonl"),
            str(tmp_path),
            str(tmp_path / "*.jsonl"),
            str(tmp_path / "**/*.json"),
        )
    }
    assert list(found.values()) == [
        ["a.jsonl"],
        ["a.jsonl", "b.jsonl", "c.json"],
        ["a.jsonl", "b.jsonl"],
        ["c.json"],
    ]
    assert len(open_dataset([str(tmp_path / "a.jsonl"), str(tmp_path / "sub")], data=DataSettings())) == 2


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("nothing.jsonl", "nothing.jsonl: no such file or folder"),
        ("no/such/*.jsonl", "no file matches"),
        ("owner/name", "not to be had from the hub"),
        ("/no/such/folder", "no such file or folder"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_data_error(path, reason):
    with pytest.raises(DataError, match=reason):
        opened(path)
    with pytest.raises(DataError, match="no data given"):
        open_dataset([], data=DataSettings())


def test_an_empty_folder_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="in this folder"):
        opened(tmp_path)


def test_a_split_is_chosen_among_a_hub_data_sets_files():
    names = [
        "README.md",
        "data/train-00000-of-00001-7320a6f3aba8ebd2.parquet",
        "data/test-00000-of-00001.parquet",
    ]
    pick = select_split(names, name="o/n", split="train", config=None)
    assert pick == ["data/train-00000-of-00001-7320a6f3aba8ebd2.parquet"]
    assert select_split(["rows.jsonl"], name="o/n", split="train", config=None) == ["rows.jsonl"]
    several = ["main/train-0.parquet", "socratic/train-0.parquet", "main/test-0.parquet"]
    assert select_split(several, name="o/n", split="test", config=None) == ["main/test-0.parquet"]
    assert select_split(several, name="o/n", split="train", config="main") == ["main/train-0.parquet"]
    with pytest.raises(DataError, match="name one of o/n/main, o/n/socratic"):
        select_split(several, name="o/n", split="train", config=None)
    with pytest.raises(DataError, match="no files of the split 'dev'"):
        select_split(several, name="o/n", split="dev", config=None)
    with pytest.raises(DataError, match=r"no \.jsonl"):
        select_split(["script.py"], name="o/n", split="train", config=None)


def test_a_hub_data_set_in_the_local_cache_is_read_offline(tmp_path, monkeypatch):
    import huggingface_hub.constants

    folder = tmp_path / "datasets--owner--name"
    data = folder / "snapshots" / ("0" * 40) / "data"
    data.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    parquet(data / "train-00000-of-00001.parquet", ROWS)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    dataset = opened("owner/name")
    assert len(dataset) == 5
    assert dataset[0].source == "owner/name/data/train-00000-of-00001.parquet:1"


def test_remote_addresses_are_read_through_fsspec():
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe("/bucket/a.jsonl", LINE)
    files.pipe("/bucket/b.jsonl", LINE + b"\n" + LINE)
    assert len(opened("memory://bucket/*.jsonl")) == 3
    with pytest.raises(DataError, match="no file matches"):
        opened("memory://bucket/*.csv")
    with pytest.raises(MissingExtraError, match=r"pip install 'kitae\[remote\]'"):
        opened("oss://bucket/a.jsonl")


def test_reading_yields_real_rows(shared_data):
    gsm8k = opened(shared_data / "math" / "gsm8k_test.jsonl", need_answer=True)
    assert (len(gsm8k), gsm8k[0].answer) == (1319, "18")
    math = opened(shared_data / "math" / "math_test_minus500.jsonl", need_answer=True)
    assert (len(math), math[0].answer) == (4500, "2")
    colossal = opened(shared_data / "sft" / "colossal" / "lora_sft_data.jsonl")
    assert colossal[0].messages[1]["content"] == "能，人本来就只有一个心脏。"
    train = opened(shared_data / "math" / "math_train_answers.json", SKIP, purpose="rl", need_answer=True)
    assert (len(train), train.num_skipped) == (7470, 4)
    for name in ("sft/colossal/test_sft_data.jsonl", "sft/sharegpt_fastchat_dummy.json",
                 "sft/llamafactory/identity.json", "sft/llamafactory/v1_sft_demo.jsonl"):  # fmt: skip
        assert len(opened(shared_data / name)) > 0
    easy = DataSettings(columns={"prompt": "input", "answer": "target"})
    assert (
        opened(shared_data / "math" / "easy_mawps_addsub.jsonl", easy, purpose="rl", need_answer=True)[
            0
        ].answer
        == "43"
    )
    digits = shared_data / "models" / "verl_digit_completion" / "data" / "train.parquet"
    assert opened(digits, purpose="rl")[0].messages == [{"role": "user", "content": "8,3:9,4"}]


def test_preference_rows_are_refused_by_name(shared_data):
    for name in ("test_dpo_data.jsonl", "test_kto_data.jsonl"):
        assert "a preference row" in problems_of(shared_data / "sft" / "colossal" / name)[1]


def test_the_listing_limit_is_the_documented_one():
    assert sources.MAX_LISTED == 100
