"""kitae sample: what is asked, what is kept, and that nothing is asked twice, on tiny models and a fake server."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kitae.data.formats import to_example
from kitae.evaluate.answers import read_asked
from kitae.evaluate.rejection import Filter, select

LENGTHS = """
import os, time


def by_length(completion, *, prompt, answer, **columns):
    if "HOLD_AT" in os.environ and prompt.startswith(os.environ["HOLD_AT"]):
        time.sleep(300)
    return float(len(completion) % 3 == 0)
"""
RIGHT = "<think>x</think><answer>{}</answer>"


@pytest.fixture
def local(kitae, files, tiny):
    """Ask a tiny local model, judged by the length of what it says; returns code, printed and errors."""
    (files / "lengths.py").write_text(LENGTHS)

    def run(*flags, output="rows.jsonl", **more):
        settings = {
            "reward": "lengths.py:by_length", "n": 3, "keep": 3, "temperature": 2.0, "max_new_tokens": 60,
            "dtype": "float32",
        } | more  # fmt: skip
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return kitae("sample", tiny(), "rl.jsonl", "--output", output, *words, *flags)

    return run


@pytest.fixture
def remote(kitae, files, endpoint, monkeypatch):
    """Ask the fake server."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def run(*flags, **more):
        settings = {
            "n": 2,
            "keep": 2,
            "output": "rows.jsonl",
            "retry_wait_s": 0.001,
            "max_attempts": 2,
        } | more
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        return kitae("sample", "teacher", "rl.jsonl", "--base_url", endpoint.url, *words, *flags)

    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_time(rows):
    return [{**row, "source": {k: v for k, v in row["source"].items() if k != "time"}} for row in rows]


def solve(number, body):
    """Right on the first answer that is asked to a problem, wrong on the second."""
    total = 2 * int(body["messages"][-1]["content"].partition("+")[0])
    with solve.lock:
        first = total not in solve.asked
        solve.asked.add(total)
    return RIGHT.format(total if first else total + 1)


@pytest.fixture(autouse=True)
def forget():
    solve.asked, solve.lock = set(), threading.Lock()


# a local model ----------------------------------------------------------------------------------------------


def test_rows_are_right_answers_with_their_provenance_and_sft_reads_them(local, kitae, files, tiny):
    code, out, err = local("--json", "summary.json")
    assert code == 0, err
    rows, asked = lines(files / "rows.jsonl"), lines(files / "rows.jsonl.asked.jsonl")
    summary = json.loads((files / "summary.json").read_text())
    assert len(asked) == 36 == summary["answers"] and summary["kept"] == len(rows) > 0
    right = {
        (a["problem"], a["completion"].strip())
        for a in asked
        if a["reward"] == 1 and a["finish_reason"] == "stop"
    }
    assert {(r["source"]["problem"], r["messages"][-1]["content"].strip()) for r in rows} <= right
    assert len(rows) + sum(summary["dropped"].values()) == 36
    assert f"{len(rows)} rows" in out and "answers" in err
    source = rows[0]["source"]
    assert source["teacher"]["model"] == str(tiny().resolve()) and len(source["teacher"]["fingerprint"]) == 32
    assert source["row"] == f"rl.jsonl:{source['problem'] + 1}" and source["reward"] == 1.0
    assert source["sampling"]["temperature"] == 2.0 and abs(source["time"] - time.time()) < 600
    assert [t["role"] for t in rows[0]["messages"]] == ["user", "assistant"]
    code, _, err = kitae(
        "train", "sft", "--model_name_or_path", tiny(), "--dataset_name", "rows.jsonl", "--output_dir", "student",
        "--max_steps", 1, "--report_to", "none", "--num_threads", 1,
    )  # fmt: skip
    assert code == 0, err


def test_the_answers_are_those_of_evaluate_and_do_not_depend_on_the_batch(local, kitae, files, tiny):
    assert local(batch_size=2)[0] == 0
    assert local(output="other.jsonl", batch_size=64)[0] == 0
    assert without_time(lines(files / "rows.jsonl")) == without_time(lines(files / "other.jsonl"))
    kitae(
        "evaluate", tiny(), "--dataset_name", "rl.jsonl", "--n", 3, "--temperature", 2.0, "--top_p", 0.95,
        "--max_new_tokens", 60, "--dtype", "float32", "--results", "found.jsonl",
    )  # fmt: skip
    found = {(r["problem"], r["sample"]): r["completion"] for r in lines(files / "found.jsonl")}
    asked = lines(files / "rows.jsonl.asked.jsonl")
    assert {(a["problem"], a["sample"]): a["completion"] for a in asked} == found


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_file(local, files, tiny):
    command = [
        sys.executable, "-m", "kitae", "sample", str(tiny()), "rl.jsonl", "--output", "rows.jsonl", "--reward",
        "lengths.py:by_length", "--n", "3", "--keep", "3", "--temperature", "2.0", "--max_new_tokens", "60", "--dtype",
        "float32", "--batch_size", "1",
    ]  # fmt: skip
    asked = files / "rows.jsonl.asked.jsonl"
    environment = {**os.environ, "HOLD_AT": "5+5"}  # to judge it takes too long for the run to end
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while process.poll() is None and (not asked.exists() or asked.read_bytes().count(b"\n") < 4):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = asked.read_bytes()
    assert before.count(b"\n") >= 4 and not (files / "rows.jsonl").exists()
    # And in the middle of a line.
    asked.write_bytes(before[: before.rindex(b"\n") + 1] + b'{"problem": 3, "sam')
    code, _, err = local(batch_size=1)
    assert code == 0 and "answers are there already" in err
    assert asked.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    places = [(a["problem"], a["sample"]) for a in lines(asked)]
    assert len(places) == len(set(places)) == 36
    assert local(output="whole.jsonl")[0] == 0
    assert without_time(lines(files / "rows.jsonl")) == without_time(lines(files / "whole.jsonl"))


def test_half_a_group_is_completed_without_repeating_its_lines(local, files):
    assert local()[0] == 0
    asked, rows = files / "rows.jsonl.asked.jsonl", lines(files / "rows.jsonl")
    kept = asked.read_text().splitlines(keepends=True)[:4]
    asked.write_text("".join(kept))
    assert local()[0] == 0
    places = [(a["problem"], a["sample"]) for a in lines(asked)]
    assert len(places) == len(set(places)) == 36 and asked.read_text().startswith("".join(kept))
    assert without_time(lines(files / "rows.jsonl")) == without_time(rows)


def test_other_settings_are_refused_by_name_and_other_filters_ask_nothing(local, files, tiny, monkeypatch):
    assert local(keep=1)[0] == 0
    few = len(lines(files / "rows.jsonl"))
    asked = (files / "rows.jsonl.asked.jsonl").read_bytes()
    code, _, err = local(keep=1, temperature=1.5, seed=4)
    assert (
        code == 2
        and "sampling.temperature 2.0 -> 1.5" in err
        and "seed 0 -> 4" in err
        and "--overwrite" in err
    )
    (files / "lengths.py").write_text(LENGTHS + "# edited\n")
    assert "reward.code" in local(keep=1)[2]
    (files / "lengths.py").write_text(LENGTHS)
    monkeypatch.setattr(
        "kitae.cli._teachers.open_model", lambda *_, **__: pytest.fail("the model was loaded again")
    )
    assert local(keep=3)[0] == 0
    assert len(lines(files / "rows.jsonl")) > few
    assert (files / "rows.jsonl.asked.jsonl").read_bytes() == asked
    monkeypatch.undo()
    os.chdir(files)
    assert local("--overwrite", keep=1, temperature=1.5)[0] == 0
    assert (files / "rows.jsonl.asked.jsonl").read_bytes() != asked


def test_files_of_others_are_not_written_over(local, files):
    (files / "rows.jsonl").write_text("mine\n")
    code, _, err = local()
    assert code == 2 and "rows.jsonl exists and was not written by kitae sample" in err
    assert (files / "rows.jsonl").read_text() == "mine\n"


def test_a_damaged_line_is_named(local, files):
    assert local()[0] == 0
    asked = files / "rows.jsonl.asked.jsonl"
    text = asked.read_text().splitlines(keepends=True)
    asked.write_text("".join([text[0], '{"problem": 1}\n', *text[2:]]))
    code, _, err = local()
    assert code == 2 and "rows.jsonl.asked.jsonl:2 is damaged" in err and err.count("\n") == 1
    assert local("--overwrite")[0] == 0
    assert len(lines(asked)) == 36


def test_a_kill_before_the_description_is_no_obstacle(local, files):
    (files / "rows.jsonl.asked.jsonl").touch()
    assert local()[0] == 0


def test_an_adapter_on_a_quantised_model_is_a_teacher_too(local, kitae, files, tiny):
    pytest.importorskip("bitsandbytes")
    code, _, err = kitae(
        "train", "sft", "--model_name_or_path", tiny(), "--dataset_name", "sft.jsonl", "--output_dir", "adapter",
        "--lora.rank", 4, "--max_steps", 1, "--report_to", "none", "--num_threads", 1,
    )  # fmt: skip
    assert code == 0, err
    (files / "lengths.py").write_text(LENGTHS)
    flags = [
        "rl.jsonl",
        "--reward",
        "lengths.py:by_length",
        "--max_rows",
        4,
        "--max_new_tokens",
        60,
        "--temperature",
        2.0,
    ]
    code, _, err = kitae("sample", "adapter", *flags, "--output", "rows.jsonl", "--quantization", "nf4")
    assert code == 0, err
    assert lines(files / "rows.jsonl")[0]["source"]["teacher"]["model"] == str(files / "adapter")
    assert len(lines(files / "rows.jsonl.asked.jsonl")) == 16
    code, _, err = kitae("sample", tiny(), *flags, "--output", "rows.jsonl", "--quantization", "nf4")
    assert code == 2 and "teacher.fingerprint" in err


def test_a_reward_model_judges_where_its_folder_is_named(local, files, tiny):
    from kitae.config import ModelSettings
    from kitae.models.critic import load_critic
    from kitae.models.save import save_policy

    folder = files / "rm"
    critic = load_critic(ModelSettings(name_or_path=str(tiny()), dtype="float32", device="cpu"))
    save_policy(critic, folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((tiny() / file).read_bytes())
    code, _, err = local(reward=folder)
    assert code == 2 and "say with --min_reward what is good enough" in err
    code, _, err = local(reward=folder, min_reward=-5)
    assert code == 0, err
    asked = lines(files / "rows.jsonl.asked.jsonl")
    assert {row["reward"] for row in asked} == {0.0}  # a new head scores everything 0


def test_a_rewards_reasons_are_shown_as_they_are(local, files):
    text = "from kitae.types import Score\ndef odd(completion, **columns):\n    return Score(1.0, '[/red] [bold]x')\n"
    (files / "odd.py").write_text(text)
    code, out, err = local(reward="odd.py:odd")
    assert code == 0 and "judged: [/red] [bold]x" in out, err


def test_rewards_without_reasons_are_counted_one_by_one_only_where_they_are_few(local, files):
    text = """def graded(completion, *, prompt, **columns):
    return None if "0" in prompt else 1 + hash(completion) % 1000 / 1000


def pass_or_fail(completion, **columns):
    return float(len(completion) % 2)
"""
    (files / "own.py").write_text(text)
    code, out, err = local(reward="own.py:graded", min_reward=0)
    assert code == 0 and "judged: rewards from 1" in out and "could not be scored: could" not in out, err
    code, out, err = local("--overwrite", reward="own.py:pass_or_fail", min_reward=0)
    assert code == 0 and "judged: reward 0 " in out and "judged: reward 1 " in out, err


def test_a_line_written_twice_counts_once(files):
    asked = answers_file(files, [[1, 0]])
    asked.write_text(asked.read_text() * 2)
    assert kept(files, asked)[1]["answers"] == 2


# an endpoint ------------------------------------------------------------------------------------------------


def test_an_endpoints_right_answers_become_rows(remote, files, endpoint):
    endpoint.reply = solve
    code, out, err = remote()
    assert code == 0, err
    rows = lines(files / "rows.jsonl")
    assert [r["messages"][-1]["content"] for r in rows] == [RIGHT.format(2 * i) for i in range(12)]
    assert rows[3]["source"]["teacher"] == {"model": "teacher", "base_url": endpoint.url}
    assert rows[3]["answer"] == "6" and rows[3]["source"]["row"] == "rl.jsonl:4"
    assert "right" in out and "12 (50.0%)" in out and "12 reward too low" not in out
    sent = endpoint.bodies[0]["messages"]
    assert [t["role"] for t in sent] == ["system", "user"] and "<answer>" in sent[0]["content"]
    assert {t["role"] for r in rows for t in r["messages"]} == {"user", "assistant"}
    remote("--with_system_prompt")
    assert lines(files / "rows.jsonl")[0]["messages"][0] == sent[0]
    assert len(endpoint.bodies) == 24


def test_an_endpoint_that_fails_stops_the_sampling_and_the_same_command_goes_on(remote, files, endpoint):
    def fail_later(number, body):
        return solve(number, body) if number < 7 else (500, {}, b'{"error": {"message": "out of memory"}}')

    endpoint.reply = fail_later
    code, _, err = remote(concurrency=1)
    assert code == 2
    last = err.splitlines()[-1]
    assert "failed 2 times" in last and "HTTP 500" in last and "out of memory" in last
    assert "all 7 answers so far are kept in rows.jsonl.asked.jsonl; the same command again goes on" in last
    assert len(endpoint.bodies) == 9 and not (files / "rows.jsonl").exists()
    first = (files / "rows.jsonl.asked.jsonl").read_bytes()
    endpoint.reply = solve
    code, _, err = remote(concurrency=8)
    assert code == 0 and "7 of 24 answers are there already" in err
    assert len(endpoint.bodies) == 9 + 17
    assert (files / "rows.jsonl.asked.jsonl").read_bytes().startswith(first)
    assert len(lines(files / "rows.jsonl")) == 12


def test_a_wrong_key_is_one_line_and_the_key_is_written_nowhere(remote, files, endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    endpoint.reply = lambda number, body: (
        401,
        {},
        b'{"error": {"message": "Incorrect API key: sk-very-secret"}}',
    )
    code, out, err = remote(api_key_env="MY_KEY")
    assert code == 2 and "HTTP 401" in err and "sk-very-secret" not in out + err
    endpoint.reply = solve
    assert remote(api_key_env="MY_KEY")[0] == 0
    assert endpoint.headers[-1]["Authorization"] == "Bearer sk-very-secret"
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files.rglob("*") if path.is_file())
    assert "there is no such environment variable" in remote(api_key_env="OTHER_KEY")[2]


def test_separate_reasoning_is_judged_and_taught_as_one_text(remote, files, endpoint):
    def reason(number, body):
        total = 2 * int(body["messages"][-1]["content"].partition("+")[0])
        message = {"reasoning_content": "I add.", "content": f"It is \\boxed{{{total}}}."}
        return {"choices": [{"message": message, "finish_reason": "stop"}]}

    endpoint.reply = reason
    code, _, err = remote(form="boxed")
    assert code == 0, err
    [first, *_] = rows = lines(files / "rows.jsonl")
    assert len(rows) == 12, "the second answer to each problem is the same as the first"
    assert first["messages"][-1]["content"] == "<think>\nI add.\n</think>\n\nIt is \\boxed{0}."


def test_answers_that_were_cut_are_counted_and_never_kept(remote, files, endpoint):
    def cut(number, body):
        total = 2 * int(body["messages"][-1]["content"].partition("+")[0])
        return {"choices": [{"message": {"content": RIGHT.format(total)}, "finish_reason": "length"}]}

    endpoint.reply = cut
    code, _, err = remote()
    assert code == 2
    assert "no answer was kept, so rows.jsonl is empty: of 24 answers 24 cut at max_new_tokens" in err
    assert (files / "rows.jsonl").read_text() == ""


def test_a_problem_the_server_does_not_take_stops_it_or_is_skipped(remote, files, endpoint):
    def too_long(number, body):
        if body["messages"][-1]["content"] == "3+3":
            return 400, {}, b'{"error": {"message": "maximum context length is 4096 tokens"}}'
        return solve(number, body)

    endpoint.reply = too_long
    code, _, err = remote(concurrency=1)
    assert code == 2 and "refused problem 3, answer 0: HTTP 400" in err and "maximum context length" in err
    assert "all 6 answers so far are kept" in err
    code, out, err = remote("--on_bad_row", "skip")
    assert code == 0, err
    assert len(lines(files / "rows.jsonl")) == 11 and "could not be scored: refused" in out


def test_a_signal_stops_it_and_says_how_to_go_on(files, endpoint):
    def slow(number, body):
        if number >= 3:
            time.sleep(20)
        return solve(number, body)

    endpoint.reply = slow
    command = [
        sys.executable, "-m", "kitae", "sample", "teacher", "rl.jsonl", "--base_url", endpoint.url,
        "--output", "rows.jsonl", "--concurrency", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while len(endpoint.bodies) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM; all 3 answers so far are kept" in err.splitlines()[-1]


def test_one_sampling_at_a_time_writes_a_file(remote, files, endpoint):
    from kitae.evaluate.answers import Asked

    endpoint.reply = solve
    assert remote()[0] == 0
    held = Asked(files / "rows.jsonl.asked.jsonl")
    code, _, err = remote()
    assert code == 75 and "is being written by another process" in err
    held.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", 0], "set --temperature"),
        ({"keep": 3}, "keep is 3, but each problem has only n = 2 answers"),
        (["--min_pass_rate", 0.9, "--max_pass_rate", 0.1], "no problem can be kept"),
        (["--batch_size", 3], "batch_size would have no effect: the model is asked at http"),
        (["--extra_body", "{"], "extra_body is '{', which is no JSON"),
        (["--extra_body", "[1]"], "it is a JSON object"),
        (["--reward", "math", "--form", "boxed"], "form and strict_form would have no effect"),
        (["--num_samples", 3], "unknown setting --num_samples"),
        (["--reward", "matth"], "'matth' is unknown; did you mean 'math'?"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_asked(remote, endpoint, flags, message):
    code, _, err = remote(**flags) if isinstance(flags, dict) else remote(*flags)
    assert code == 2 and message in err and err.count("\n") == 1
    assert not endpoint.bodies


def test_several_ranks_are_refused(remote, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = remote()
    assert code == 2 and "was started as 2 (WORLD_SIZE)" in err


def test_settings_of_endpoints_and_missing_data_are_refused_before_a_model_is_loaded(kitae, files, tiny):
    flags = ["--output", "rows.jsonl"]
    assert (
        "concurrency would have no effect: there is no base_url"
        in kitae("sample", tiny(), "rl.jsonl", *flags, "--concurrency", 2)[2]
    )
    assert "absent.jsonl" in kitae("sample", tiny(), "absent.jsonl", *flags)[2]
    assert "absent/model" in kitae("sample", "absent/model", "rl.jsonl", *flags)[2]
    assert "dataset_name is missing" in kitae("sample", tiny(), *flags)[2]
    assert "rows.jsonl" not in {path.name for path in files.iterdir()}


# what is kept -----------------------------------------------------------------------------------------------


def answers_file(files, rewards, texts=None, *, cut=()):
    """An asked.jsonl of one problem per row of rewards."""
    path = files / "asked.jsonl"
    with path.open("w") as file:
        for problem, group in enumerate(rewards):
            for sample, reward in enumerate(group):
                text = texts[problem][sample] if texts else RIGHT.format(f"{problem}.{sample}")
                line = {
                    "problem": problem, "sample": sample, "prompt": "p", "completion": text, "answer": "1", "reward": reward,
                    "reason": "", "label": None, "num_tokens": 5, "time": 0.0,
                    "finish_reason": "length" if (problem, sample) in cut else "stop",
                }  # fmt: skip
                file.write(json.dumps(line) + "\n")
    return path


def kept(files, asked, **by):
    """(problem, sample) of the kept answers, and the summary."""
    filters = {
        "min_reward": 1.0,
        "keep": 9,
        "choose": "first",
        "min_pass_rate": 0,
        "max_pass_rate": 1,
        "seed": 0,
    }
    data = [to_example({"prompt": f"q{i}", "answer": "1"}, data=_data(), purpose="rl") for i in range(9)]
    summary = select(
        asked, data, by=Filter(**filters | by), source={}, system_prompt=None, output=files / "kept.jsonl"
    )
    return [(r["source"]["problem"], r["source"]["sample"]) for r in lines(files / "kept.jsonl")], summary


def _data():
    from kitae.config import DataSettings

    return DataSettings()


def test_keep_and_its_rules(files):
    texts = [[RIGHT.format("a" * k) for k in (5, 1, 3, 4)]]
    asked = answers_file(files, [[1, 1, 0, 1]], texts)
    assert kept(files, asked, keep=2)[0] == [(0, 0), (0, 1)]
    assert kept(files, asked, keep=2, choose="shortest")[0] == [(0, 1), (0, 3)]
    drawn = {tuple(kept(files, asked, keep=1, choose="random", seed=seed)[0]) for seed in range(20)}
    assert drawn == {((0, 0),), ((0, 1),), ((0, 3),)}
    assert kept(files, asked, keep=2)[1]["dropped"] == {"reward too low": 1, "more than keep": 1}


def test_pass_rates_duplicates_and_what_could_not_be_scored(files):
    rewards = [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, None], [2, 1, 0.5]]
    asked = answers_file(files, rewards)
    places, summary = kept(files, asked, keep=1)
    assert places == [(0, 0), (2, 0), (3, 0), (4, 0)]
    assert (summary["answers"], summary["right"], summary["solved"], summary["tokens"]) == (15, 8, 4, 75)
    assert kept(files, asked, keep=1, max_pass_rate=0.9)[0] == [(2, 0), (3, 0), (4, 0)]
    assert kept(files, asked, keep=1, min_pass_rate=0.5)[0] == [(0, 0), (3, 0), (4, 0)]
    assert kept(files, asked, min_reward=2)[0] == [(4, 0)]
    same = answers_file(files, [[1, 1, 1], [1]], [["a", " a\n", "b"], ["a"]])
    places, summary = kept(files, same)
    assert places == [(0, 0), (0, 2), (1, 0)] and summary["dropped"] == {"duplicate": 1}


def test_text_that_sft_would_refuse_is_left_out_and_counted(files):
    texts = [["<think>never closed", "a\0b", "   ", "fine"]]
    places, summary = kept(files, answers_file(files, [[1, 1, 1, 1]], texts))
    assert places == [(0, 3)]
    assert (
        sum(count for reason, count in summary["dropped"].items() if reason.startswith("not teachable")) == 3
    )


def test_equal_problems_do_not_give_equal_rows(files):
    data = [to_example({"prompt": "q", "answer": "1"}, data=_data(), purpose="rl") for _ in range(2)]
    asked = answers_file(files, [[1], [1]], [["a"], ["a"]])
    by = Filter(min_reward=1, keep=1, choose="first", min_pass_rate=0, max_pass_rate=1, seed=0)
    summary = select(asked, data, by=by, source={}, system_prompt=None, output=files / "kept.jsonl")
    assert summary["kept"] == 1 and summary["dropped"] == {"duplicate": 1}


def test_the_asked_file_is_refused_as_sft_rows(remote, kitae, files, endpoint, tiny):
    """Its wrong answers must not be taught because somebody names the folder."""
    endpoint.reply = solve
    remote()
    assert len(list(read_asked(files / "rows.jsonl.asked.jsonl"))) == 24
    code, _, err = kitae(
        "train", "sft", "--model_name_or_path", tiny(), "--dataset_name", "rows.jsonl.asked.jsonl"
    )
    assert code == 2 and "true/false label" in err
