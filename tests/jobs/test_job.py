"""Jobs outlive who started them, and the folder tells how they are and how they ended, whoever is killed."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kitae.errors import LockedError
from kitae.jobs import supervisor
from kitae.jobs.job import Job

TICKS = "import time\nfor i in range(30): print('tick', i, flush=True); time.sleep(0.05)\n"
POLITE = """
import signal, sys, time
def leave(*_): print('saved', flush=True); sys.exit(0)
signal.signal(signal.SIGTERM, leave)
print('ready', flush=True)
while True: time.sleep(0.05)
"""
DEAF = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1: subprocess.Popen([sys.executable, __file__, 'child'], close_fds=False)
print('ready', flush=True)
time.sleep(60)
"""


@pytest.fixture
def start(tmp_path):
    jobs = []

    def start(code: str, *, grace_s: float = 60.0) -> Job:
        folder = tmp_path / f"job{len(jobs)}"
        folder.mkdir()
        (folder / "code.py").write_text(code)
        jobs.append(Job.start(folder, [sys.executable, "-u", str(folder / "code.py")], grace_s=grace_s))
        return jobs[-1]

    yield start
    for job in jobs:
        process = job.process()
        if job.is_alive() and process:
            os.killpg(process["pid"], signal.SIGKILL)


def wait_for(found, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


def test_a_job_runs_to_its_end_and_is_stopped_then(start):
    job = start(TICKS)
    assert job.state() in ("creating", "running")
    wait_for(lambda: job.state() == "stopped")
    assert job.end()["code"] == 0 and not job.end()["stopped"]
    assert (job.folder / "output.log").read_text().count("tick") == 30


def test_it_outlives_a_killed_starter(tmp_path):
    folder = tmp_path / "job"
    folder.mkdir()
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom kitae.jobs.job import Job\n"
        f"Job.start(Path({str(folder)!r}), [sys.executable, '-c', {TICKS!r}], grace_s=1)\n"
        "print('started', flush=True)\ntime.sleep(60)\n"
    )
    starter = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert starter.stdout.readline() == "started\n"
    starter.kill()
    starter.wait()
    job = Job(folder)
    wait_for(lambda: job.end() is not None)
    assert job.state() == "stopped" and (folder / "output.log").read_text().count("tick") == 30


def test_an_exit_code_and_a_signal_are_failures(start):
    job = start("raise SystemExit(3)")
    wait_for(lambda: job.state() == "failed")
    assert job.end()["code"] == 3
    job = start("import os; os.kill(os.getpid(), 9)")
    wait_for(lambda: job.state() == "failed")
    assert job.end()["code"] == -9


def test_a_command_that_is_not_there_is_a_failure_that_says_so(tmp_path):
    job = Job.start(tmp_path, ["/no/such/program"], grace_s=1)
    wait_for(lambda: job.state() == "failed")
    assert "/no/such/program cannot be started" in job.log_tail()[0]


def test_stop_lets_a_polite_job_save(start):
    job = start(POLITE)
    wait_for(lambda: job.log_tail() == ["ready"])
    assert job.stop() == "stopped" and not job.is_alive()
    assert job.log_tail() == ["ready", "saved"] and job.end()["code"] == 0 and job.end()["stopped"]


def test_stop_ends_a_deaf_tree_when_its_time_is_up(start):
    job = start(DEAF, grace_s=0.5)
    wait_for(lambda: job.log_tail() == ["ready"] * 2)
    before = time.monotonic()
    assert job.stop() == "stopped" and not job.is_alive()
    assert job.end()["code"] == -9 and time.monotonic() - before < 40


def test_while_it_is_given_time_to_end_others_see_it_stopping(start):
    job = start(DEAF)
    wait_for(lambda: job.log_tail() == ["ready"] * 2)
    states = []
    stopping = threading.Thread(target=lambda: states.append(job.stop()))
    stopping.start()
    wait_for(lambda: Job(job.folder).state() == "stopping")
    assert Job(job.folder).is_alive() and not states
    os.killpg(job.process()["pid"], signal.SIGKILL)
    stopping.join()
    assert states == ["stopped"]


@pytest.mark.parametrize("code", [POLITE, DEAF])
def test_a_killed_supervisor_loses_neither_the_job_nor_the_stop(start, code):
    job = start(code, grace_s=0.5)
    wait_for(lambda: "ready" in job.log_tail())
    kill_supervisor(job)
    assert job.state() == "running"
    assert job.stop() == "stopped" and not job.is_alive()


def test_a_job_that_is_gone_without_a_word_is_lost(start):
    job = start(POLITE)
    wait_for(lambda: job.log_tail() == ["ready"])
    kill_supervisor(job)
    os.killpg(job.process()["pid"], signal.SIGKILL)
    wait_for(lambda: job.state() == "lost")
    assert job.stop() == "lost"


def test_a_process_id_that_was_used_again_is_not_signalled(start):
    job = start(POLITE)
    wait_for(lambda: job.log_tail() == ["ready"])
    process = job.process()
    kill_supervisor(job)
    supervisor.put(job.folder / "supervisor.json", process | {"began": "another"})
    job._signal(signal.SIGKILL)
    time.sleep(0.2)
    assert job.is_alive()
    supervisor.put(job.folder / "supervisor.json", process)
    assert job.stop() == "stopped"


def test_a_folder_holds_one_job_at_a_time(start):
    job = start(POLITE)
    with pytest.raises(LockedError, match="stop it first"):
        Job.start(job.folder, ["true"], grace_s=1)
    wait_for(lambda: job.log_tail() == ["ready"])
    assert job.stop() == "stopped"


def test_a_folder_is_used_again_without_what_the_last_job_left(start):
    job = start(POLITE)
    wait_for(lambda: job.log_tail() == ["ready"])
    assert job.stop() == "stopped"
    Job.start(job.folder, job.facts()["command"], grace_s=60)
    wait_for(lambda: job.log_tail()[-1] == "ready" and job.state() == "running")
    assert job.stop() == "stopped"


def test_to_ask_whether_a_job_lives_is_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "ASKING_S", 20.0)  # a busy machine is late to unlock
    path = tmp_path / "alive"
    assert not supervisor.is_locked(path) and not path.exists()
    path.touch()
    with path.open() as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # somebody else is just asking
        assert not supervisor.is_locked(path)
        threading.Timer(0.05, fcntl.flock, (another, fcntl.LOCK_UN)).start()
        held = supervisor.lock_file(path)
    assert supervisor.is_locked(path)
    os.close(held)
    assert not supervisor.is_locked(path)


def test_a_long_log_is_shortened_and_goes_on(start, monkeypatch, tmp_path):
    log = tmp_path / "output.log"
    monkeypatch.setattr(supervisor, "LOG_LIMIT", 1000)
    with log.open("ab", buffering=0) as file:
        file.write(b"a" * 1500)
        supervisor._shorten(log)
        file.write(b"b")
    assert log.read_bytes() == b"b" and (tmp_path / "output.log.1").read_bytes() == b"a" * 1000


def kill_supervisor(job: Job) -> None:
    """The process whose command line names the folder."""
    found = subprocess.run(
        ["pgrep", "-f", f"kitae.jobs.supervisor {job.folder} "], capture_output=True, text=True, check=True
    )
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: not supervisor.is_locked(job.folder / "watching"))
    assert json.loads((job.folder / "job.json").read_text())["command"]
