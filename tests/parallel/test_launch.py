"""Starting ranks: who ends whom, whose error is shown, and with which exit code."""

import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from kitae.errors import ConfigError
from kitae.parallel.launch import launch


def write(tmp_path: Path, code: str) -> list[str]:
    path = tmp_path / "rank.py"
    path.write_text("import os, signal, sys, time\nrank = int(os.environ['RANK'])\n" + textwrap.dedent(code))
    return [sys.executable, str(path)]


def launch_in_process(tmp_path: Path, code: str, *, nproc: int) -> subprocess.Popen:
    program = write(tmp_path, code)
    call = f"launch([], nproc_per_node={nproc}, program={program})"
    script = f"import sys; from kitae.parallel.launch import launch; sys.exit({call})"
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def wait_for(paths: list[Path]) -> None:
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not appear"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its new parent to notice does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_rank_knows_its_place_and_its_arguments(tmp_path):
    program = write(
        tmp_path,
        f"""
        names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
        text = " ".join([os.environ[n] for n in names] + sys.argv[1:] + [str(os.getpid() == os.getpgid(0))])
        open(f"{tmp_path}/told{{rank}}", "w").write(text)
        assert os.path.isdir(os.path.dirname(os.environ["KITAE_STORE"])) and os.environ["OMP_NUM_THREADS"]
        """,
    )
    assert launch(["train", "--optim.name", "adamw"], nproc_per_node=2, program=program) == 0
    told = [(tmp_path / f"told{rank}").read_text() for rank in (0, 1)]
    assert told == [f"{rank} {rank} 2 2 train --optim.name adamw True" for rank in (0, 1)]


def test_the_first_failure_is_shown_ends_the_others_and_gives_the_exit_code(tmp_path, capfd):
    program = write(
        tmp_path,
        """
        if rank == 1:
            print("quiet line"), print("DataError: rows.jsonl:7 has no answer", file=sys.stderr)
            sys.exit(2)
        time.sleep(60)
        """,
    )
    started = time.monotonic()
    assert launch([], nproc_per_node=3, program=program) == 2
    assert time.monotonic() - started < 45
    shown = capfd.readouterr().err
    assert "rank 1 of 3 failed first, with exit code 2" in shown
    assert "DataError: rows.jsonl:7 has no answer" in shown


def test_what_other_ranks_print_stays_quiet(tmp_path, capfd):
    assert launch([], nproc_per_node=2, program=write(tmp_path, "print('from', rank)")) == 0
    assert capfd.readouterr().out == "from 0\n"


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("kitae.parallel.launch.GRACE_S", 0.5)
    program = write(
        tmp_path,
        f"""
        if rank == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open("{tmp_path}/ready", "w").close()
            time.sleep(60)
        while not os.path.exists("{tmp_path}/ready"):
            time.sleep(0.02)
        sys.exit(70)
        """,
    )
    started = time.monotonic()
    assert launch([], nproc_per_node=2, program=program) == 70
    assert time.monotonic() - started < 45


def test_a_rank_ended_by_a_signal_gives_128_plus_its_number(tmp_path, capfd):
    program = write(tmp_path, "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)")
    assert launch([], nproc_per_node=2, program=program) == 137
    assert "rank 1 of 2 failed first, ended by SIGKILL" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_is_passed_on_once_and_its_exit_code_comes_back(tmp_path, number, code):
    process = launch_in_process(
        tmp_path,
        f"""
        received = []
        signal.signal({int(number)}, lambda n, _: received.append(n))
        open(f"{tmp_path}/ready{{rank}}", "w").close()
        while not received:
            time.sleep(0.02)
        time.sleep(0.3)
        sys.exit({code} if len(received) == 1 else 1)
        """,
        nproc=2,
    )
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(number)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == code
    assert "failed" not in shown


def test_the_third_signal_kills_ranks_that_hear_none(tmp_path):
    code = f"""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open(f"{tmp_path}/ready{{rank}}", "w").close()
        time.sleep(60)
        """
    process = launch_in_process(tmp_path, code, nproc=2)
    wait_for([tmp_path / f"ready{rank}" for rank in (0, 1)])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    while not select.select([process.stderr], [], [], 5)[0]:  # two that come together are heard as one
        process.send_signal(signal.SIGTERM)
    assert "one more signal kills the ranks" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL


def test_ranks_stopped_while_they_start_are_no_failure(tmp_path):
    code = f"""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        open(f"{tmp_path}/ready{{rank}}", "w").close()
        time.sleep(60)
        """
    process = launch_in_process(tmp_path, code, nproc=2)
    wait_for([tmp_path / "ready0", tmp_path / "ready1"])
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=120)
    assert (process.returncode, shown) == (130, "")


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux can tie a child's life to its parent's"
)
def test_ranks_die_with_a_killed_launcher(tmp_path):
    process = launch_in_process(
        tmp_path,
        f"""
        with open(f"{tmp_path}/pid{{rank}}.part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(file.name, f"{tmp_path}/pid{{rank}}")
        time.sleep(60)
        """,
        nproc=2,
    )
    paths = [tmp_path / "pid0", tmp_path / "pid1"]
    wait_for(paths)
    pids = [int(path.read_text()) for path in paths]
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in pids)


def test_no_ranks_are_refused():
    with pytest.raises(ConfigError, match="--nproc_per_node is 0"):
        launch([], nproc_per_node=0)
