"""Hostile answers, failing functions and dying processes: the pool goes on, and says which of three outcomes it was.

Nothing hostile runs in this process: only in the pool's workers, which have limits of time and memory.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitae.config import RewardSettings
from kitae.errors import ConfigError, RewardError
from kitae.rewards.loading import builtin_names
from kitae.rewards.pool import TIMEOUT, RewardPool
from kitae.types import Problem


def problem(answer="1/3", **columns):
    return Problem(prompt="What?", token_ids=[], answer=answer, columns=columns, index=7)


def right_form(answer):
    return f"<think>\nhm\n</think>\n<answer>{answer}</answer>"


HOSTILE = {
    "tower": "9**9**9",
    "latex tower": r"9^{9^{9^{9}}}",
    "big power": r"7^{100000000}",
    "sum of powers": r"7^{100000000}+3^{100000000}",
    "times zero": r"\frac{1}{3}+0\cdot 7^{7^{7^{7}}}",
    "factorial": "99999999!",
    "factorial of factorial": "((100!)!)!",
    "product": r"\prod_{k=1}^{100000000} k",
    "sum": r"\sum_{k=1}^{10^{9}} \frac{1}{k^{2}+\sin k}",
    "integral": r"\int_0^{\infty} \frac{\sin(x^{x})}{x^{7}+\cos x} dx",
    "limit": r"\lim_{x\to 0} \frac{\sin(\tan x)-\tan(\sin x)}{x^{7}+x^{9}\cos(x^{11})}",
    "binomial": r"\binom{10^{9}}{5\cdot 10^{8}}",
    "root": r"\sqrt[10^{9}]{10^{10^{9}}}",
    "gcd": r"\gcd(7^{30000000}, 11^{30000000})",
    "floor": r"\left\lfloor \pi^{10000000} \right\rfloor",
    "semiprime": r"\sqrt{" + str((2**127 - 1) * (2**89 - 1)) + "}",
    "decimal power": "1.0000001^{10^{12}}",
    "polynomial": r"(x+1)^{3000} - x^{3000}",
    "expansion": r"(a+b+c+d+e+f)^{200}",
    "percent": r"7^{100000000}\%",
    "interval": r"[-10^{10^{10}},10^{10^{10}}]",
    "nested parentheses": "(" * 2000 + "1" + ")" * 2000,
    "fewer nested parentheses": "(" * 990 + "1" + ")" * 990,
    "nested braces": "{" * 990 + "1" + "}" * 990,
    "nested fractions": r"\frac{1}{1+" * 120 + "x" + "}" * 120,
    "nested text": r"\text{" * 300 + "1" + "}" * 300,
    "nested boxes": r"\boxed{" * 250 + "1" + "}" * 250,
    "determinant": r"\det\begin{pmatrix}" + r"\\".join("&".join(f"x^{i + j}" for j in range(9)) for i in range(9))
    + r"\end{pmatrix}",
    "long list": ",".join(map(str, range(500))),
    "commas": "1," * 999,
    "dollars": "$" * 1999,
    "equals": "=" * 1999,
    "digits": "7" * 2000,
    "spaces": "1" + " " * 1998 + "x",
    "dots": "1.1." * 499,
    "plus": "1+" * 999 + "1",
    "and": "1 and " * 333,
    "megabyte": "1" * 1_000_000,
    "megabyte of braces": "{" * 1_000_000,
    "megabyte of boxes": r"\boxed{" * 140_000,
    "code": "__import__('os').system('touch pwned')",
    "code in text": r"\text{__import__('os').system('touch pwned')}",
    "null": "1\x002",
    "surrogate": "\ud800",
    "unicode": "{1,1-3-10\u9f13\u52b1);5\u4e2a_GENERAL2\u5168\u6821\u3002 _HEADERS1}",
}  # fmt: skip


def test_hostile_answers_are_wrong_within_their_budget_and_the_next_one_is_judged_right():
    with RewardPool(RewardSettings(timeout_s=0.3)) as pool:
        for name, answer in HOSTILE.items():
            began = time.monotonic()
            (score,) = pool.score([(right_form(answer), problem())])
            seconds = time.monotonic() - began
            assert score.value == 1.0, (name, score)
            assert seconds < 20, (name, seconds)  # 0.3 s of CPU time, or 1.5 s in all
        assert pool.score([(right_form(r"\frac{2}{6}"), problem())] * 2) == [(10.0, "right")] * 2
    assert not Path("pwned").exists()


def test_a_batch_of_hostile_completions_takes_its_share_of_the_time_limit_per_worker():
    with RewardPool(RewardSettings(timeout_s=0.25, num_workers=2)) as pool:
        began = time.monotonic()
        scores = pool.score([(right_form("99999999!"), problem())] * 16)
        seconds = time.monotonic() - began
    assert scores == [(1.0, TIMEOUT)] * 16
    assert 16 / 2 * 0.25 <= seconds < 16 / 2 * 0.25 * 5 + 10  # on a busy machine


def test_hostile_answers_to_the_math_reward_earn_0():
    with RewardPool(RewardSettings(function="math", timeout_s=0.25)) as pool:
        assert pool.score([("so \\boxed{99999999!}", problem())]) == [(0.0, TIMEOUT)]
        assert pool.compare([("99999999!", "5"), ("5", "5")]) == [(0.0, TIMEOUT), (1.0, "")]


WITH_TWO = [r"\frac{%s}{%s}", "%s^{%s}", "%s+%s", r"\sqrt[%s]{%s}", "%s,%s", "%s=%s", r"\binom{%s}{%s}"]
WITH_ONE = [r"\text{%s}", "(%s)", "%s!", r"\boxed{%s}", r"\{%s\}", r"\sin %s", "|%s|", r"\left(%s\right)"]
LATEX = st.recursive(
    st.sampled_from(["x", "2", "10", "99", r"\pi", "", "{", "}", "(", r"\}", r"\infty", "=", ","]),
    lambda inner: st.one_of(
        st.builds(lambda form, a, b: form % (a, b), st.sampled_from(WITH_TWO), inner, inner),
        st.builds(lambda form, a: form % a, st.sampled_from(WITH_ONE), inner),
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def brief_pool():
    with RewardPool(RewardSettings(timeout_s=0.5)) as pool:
        yield pool


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LATEX)
def test_any_latex_gets_a_score_twice_the_same_unless_it_times_out(brief_pool, latex):
    first, second = brief_pool.score([(right_form(latex), problem("x^{2}"))] * 2)
    assert first.value in (1.0, 10.0)
    assert first == second or TIMEOUT in (first.reason, second.reason)


def test_scores_depend_neither_on_order_nor_on_hostile_neighbours_nor_on_restarts():
    benign = [(right_form(str(n)), problem(str(n - n % 3))) for n in range(60)]
    benign += [(right_form(rf"\sqrt{{{n}}}x+1"), problem(rf"1+x\sqrt{{{n - n % 2}}}")) for n in range(2, 22)]
    hostile = [(right_form("99999999!"), problem())] * 3
    with RewardPool(RewardSettings(timeout_s=0.6)) as pool:
        alone = {text: pool.score([(text, p)])[0] for text, p in benign}
        mixed = benign + hostile
        for seed in range(2):
            random.Random(seed).shuffle(mixed)
            for (text, _), score in zip(mixed, pool.score(mixed), strict=True):
                assert score == alone.get(text, (1.0, TIMEOUT))
    with RewardPool(RewardSettings(timeout_s=0.6, num_workers=1)) as fresh:
        assert fresh.score(benign) == [alone[text] for text, _ in benign]
    assert {score.value for score in alone.values()} == {1.0, 10.0}


# A user's own function -----------------------------------------------------------------------------------------


def pool_with(function, **options):
    return RewardPool(
        RewardSettings(function=function, num_workers=1, timeout_s=options.pop("timeout_s", 5), **options)
    )


def test_a_users_function_gets_the_completion_the_answer_and_its_columns(reward_file):
    function = reward_file("return len(completion) + level + len(prompt) * 100 if answer == 'a' else -1",
                           signature="completion, *, prompt, answer, level, **columns")  # fmt: skip
    with pool_with(function) as pool:
        assert pool.score([("xy", problem("a", level=10, other=[1])), ("xy", problem("b", level=1))]) == [
            (512.0, ""),
            (-1.0, ""),
        ]


def test_a_function_without_columns_is_given_none(reward_file):
    with pool_with(reward_file("return 2", signature="completion, *, prompt, answer")) as pool:
        assert pool.score([("x", problem("a", level=10))]) == [(2.0, "")]


def test_settings_reach_a_function_that_names_them(reward_file):
    function = reward_file("return Score(int(strict_form), form)", before="from kitae.types import Score",
                           signature="completion, *, prompt, answer, form, strict_form, **columns")  # fmt: skip
    with pool_with(function, form="boxed", strict_form=False) as pool:
        assert pool.score([("x", problem())]) == [(0.0, "boxed")]


def test_columns_cannot_replace_the_completion_the_prompt_or_the_answer(reward_file):
    function = reward_file("assert (completion, prompt, columns) == ('x', 'What?', {})\nreturn float(answer)")
    columns = {"completion": "y", "prompt": "z", "answer": "4"}
    with pool_with(function) as pool:
        assert pool.score([("x", Problem(prompt="What?", token_ids=[], answer="3", columns=columns))]) == [
            (3.0, "")
        ]


def test_what_a_function_prints_does_not_disturb_the_scores(reward_file, capfd):
    with pool_with(reward_file("print('{\"value\": 5}')\nreturn 1")) as pool:
        assert pool.score([("x", problem())]) == [(1.0, "")]


@pytest.mark.parametrize(("value", "reason"), [("None", ""), ("Score(None, 'no tests')", "no tests")])
def test_none_means_that_a_completion_could_not_be_scored_and_never_stops_the_run(reward_file, value, reason):
    with pool_with(reward_file(f"return {value}", before="from kitae.types import Score")) as pool:
        assert pool.score([("x", problem())]) == [(None, reason or "could not be scored")]


FAILURES = {
    "divides by zero": "raised ZeroDivisionError: division by zero",
    "misses a key": "raised KeyError: 'level'",
    "returns nan": "returned float nan; it must return a finite number",
    "returns -inf": "returned float -inf; it must return a finite number",
    "returns text": "returned str '5'; it must return a finite number",
    "returns a list": "returned list [1.0]; it must return a finite number",
    "leaves": "ended its worker process (exit code 3)",
    "crashes": "ended its worker process (exit code -11)",
    "never ends": "took more than reward.timeout_s = 0.5 s of CPU time, or 2.5 s in all",
    "sleeps": "took more than reward.timeout_s = 0.5 s of CPU time, or 2.5 s in all",
    "takes memory": "ran into its limit: out of memory",
    "calls itself": "ran into its limit: nested too deep",
}
FAILING = f"{Path(__file__).with_name('failing_reward.py')}:reward"


@pytest.fixture(scope="module")
def stopping_pool():
    with pool_with(FAILING, timeout_s=0.5) as pool:
        yield pool


@pytest.fixture(scope="module")
def masking_pool():
    with pool_with(FAILING, timeout_s=0.5, on_error="mask") as pool:
        yield pool


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_function_stops_the_run_and_names_itself_and_the_sample(stopping_pool, case):
    with pytest.raises(RewardError) as error:
        stopping_pool.score([("some text", problem("42", case=case))])
    for part in (FAILING, FAILURES[case], "row 7", "'What?'", "'42'", "'some text'", "reward.on_error"):
        assert part in str(error.value)


@pytest.mark.parametrize("case", FAILURES)
def test_a_failing_function_can_be_left_out_and_counted(masking_pool, case):
    failed, fine = masking_pool.score([("some text", problem(case=case)), ("fine", problem(case="works"))])
    assert failed.value is None and FAILURES[case] in failed.reason
    assert fine == (1.0, "")


def test_a_file_may_say_what_exhausting_the_time_is_worth(reward_file):
    function = reward_file("while True: pass", before="OUT_OF_BUDGET = -2.0")
    with pool_with(function, timeout_s=0.2) as pool:
        assert pool.score([("x", problem())]) == [(-2.0, TIMEOUT)]


def test_waiting_for_longer_than_the_limit_of_cpu_time_is_no_failure(reward_file):
    body = "began = time.monotonic()\ntime.sleep(1.2)\nreturn time.monotonic() - began"
    with pool_with(reward_file(body, before="import time"), timeout_s=1.0) as pool:
        (score,) = pool.score([("x", problem())])
    assert score.value >= 1.2


def test_the_threads_of_a_function_add_up(reward_file):
    before = (
        "import hashlib, threading\ndata = bytes(1 << 20)\ndef spin():\n    while True: hashlib.sha256(data)"
    )
    body = "threads = [threading.Thread(target=spin) for _ in range(3)]\nfor t in threads: t.start()\nspin()"
    with pool_with(reward_file(body, before=before), timeout_s=0.5, on_error="mask") as pool:
        (score,) = pool.score([("x", problem())])
    assert score.value is None and "of CPU time" in score.reason


SIGNATURES = [
    ("completions, **columns", "its first parameter must be the text of one completion"),
    ("*, completion, prompt, answer", "its first parameter must be the text of one completion"),
    ("completion", "not answer and prompt"),
    ("completion, prompt", "not answer"),
]


@pytest.mark.parametrize(("signature", "what"), SIGNATURES)
def test_a_wrong_signature_is_refused_at_the_start_with_the_right_one(reward_file, signature, what):
    function = reward_file("return 1", signature=signature)
    with pytest.raises(ConfigError) as error:
        pool_with(function)
    assert what in str(error.value) and "reward(completion, *, prompt, answer, **columns)" in str(error.value)


def test_an_async_function_and_what_is_no_function_are_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("async def later(completion, *, prompt, answer): return 1\nnumber = 5\n")
    for name, what in [
        ("later", "is async"),
        ("number", "is a int, not a function"),
        ("other", "has no 'other'"),
    ]:
        with pytest.raises(ConfigError, match=what):
            pool_with(f"{path}:{name}")


def test_a_file_that_fails_or_is_missing_is_refused_at_the_start(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import not_installed_here\n")
    for function, what in [
        (f"{path}:reward", "not_installed_here"),
        (f"{tmp_path}/none.py:reward", "no such file"),
    ]:
        with pytest.raises(ConfigError, match=what):
            pool_with(function)


def test_a_function_that_ends_the_process_while_it_is_loaded_is_reported(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("raise SystemExit(4)\n")
    with pytest.raises(RewardError, match="ended with code 4"):
        pool_with(f"{path}:reward")


def test_an_unknown_name_gets_a_suggestion_among_the_built_in_rewards():
    assert builtin_names() == ["format", "math", "reasoning", "repetition"]
    with pytest.raises(ConfigError, match="did you mean 'reasoning'"):
        pool_with("reasonning")


# Processes -----------------------------------------------------------------------------------------------------


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(pids, *, seconds=60):
    deadline = time.monotonic() + seconds
    while not all(map(is_gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return [pid for pid in pids if not is_gone(pid)]


def test_killed_workers_leave_no_zombies_and_closing_leaves_no_process():
    before = set(children(os.getpid()))
    with RewardPool(RewardSettings(timeout_s=0.1, num_workers=3)) as pool:
        (nursery,) = set(children(os.getpid())) - before
        assert pool.score([(right_form("99999999!"), problem())] * 9) == [(1.0, TIMEOUT)] * 9
        workers = children(nursery)
        assert len(workers) == 3
        assert not [pid for pid in workers if is_gone(pid)]
    assert set(children(os.getpid())) <= before
    assert wait_until_gone([nursery, *workers]) == []


def test_a_worker_that_is_killed_from_outside_is_replaced(brief_pool):
    nursery = brief_pool._nursery._process.pid
    for pid in children(nursery):
        os.kill(pid, signal.SIGKILL)
    first = brief_pool.score([(right_form("1/3"), problem())] * 2)
    assert {score.value for score in first} <= {None, 10.0}
    assert brief_pool.score([(right_form("1/3"), problem())] * 2) == [(10.0, "right")] * 2


def test_losing_the_nursery_is_an_error_that_says_so():
    with RewardPool(RewardSettings(timeout_s=1, num_workers=1)) as pool:
        workers = children(pool._nursery._process.pid)
        pool._nursery._process.kill()
        assert wait_until_gone(workers) == []
        with pytest.raises(RewardError, match="ended from outside"):
            pool.score([(right_form("1/3"), problem())])


TRAINER = """
import sys, threading, time
from kitae.config import RewardSettings
from kitae.rewards.pool import RewardPool
from kitae.types import Problem
pool = RewardPool(RewardSettings(timeout_s=600))
hostile = ("<think></think><answer>99999999!</answer>", Problem(prompt="", token_ids=[], answer="5"))
threading.Thread(target=pool.score, args=([hostile] * 2,), daemon=True).start()
print(pool._nursery._process.pid, flush=True)
time.sleep(600)
"""


def test_workers_die_with_a_trainer_that_is_killed():
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True)
    try:
        nursery = int(trainer.stdout.readline())
        started = time.monotonic()
        while len(workers := children(nursery)) < 2 and time.monotonic() < started + 60:
            time.sleep(0.02)
        assert len(workers) == 2
    finally:
        trainer.kill()
        trainer.communicate()
    assert wait_until_gone([nursery, *workers]) == []


def test_the_pool_works_from_a_script_without_a_main_guard_and_needs_no_torch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\n"
        "from kitae.config import RewardSettings\n"
        "from kitae.rewards.pool import RewardPool\n"
        "from kitae.types import Problem\n"
        "pool = RewardPool(RewardSettings(function='script.py:reward'.replace('script', 'judge')))\n"
        "print(json.dumps([*pool.score([('x', Problem(prompt='', token_ids=[]))])[0], 'torch' in sys.modules]))\n"
    )
    (tmp_path / "judge.py").write_text(
        "import sys\ndef reward(completion, *, prompt, answer, **columns):\n    return 'torch' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout and json.loads(done.stdout) == [0.0, "", False], done.stderr
