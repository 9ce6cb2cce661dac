"""Start several ranks on this machine, show the first error, and leave with its exit code.

The ranks meet through a file and talk over the loopback interface only: no port is open to the network. A job over
several machines starts with torchrun instead.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from kitae.errors import ConfigError

STORE_VARIABLE = "KITAE_STORE"
"""Environment variable with the path of the file where the ranks meet."""
GRACE_S = 10.0
"""How long ranks may take to end once another has failed, before they are killed."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPED = tuple(128 + number for number in PASSED_ON)
"""Exit codes of a rank that saved and stopped because it was asked to."""
SHOWN_BYTES = 4000
"""How much of a failed rank's last output is shown."""
KILL_AT = 3
"""So many signals to stop, and the ranks are killed."""


def launch(argv: Sequence[str], *, nproc_per_node: int, program: Sequence[str] = ()) -> int:
    """Run `program` (default: python -m kitae) with argv as nproc_per_node ranks; return the exit code.

    It is 0 if every rank left with 0, else that of the rank that failed first, 128 + n if signal n ended it.
    Rank 0 has the terminal; what other ranks print is shown only when one of them fails first. SIGTERM, SIGINT and
    SIGHUP (a closed terminal) are passed on, once each, so that all ranks can save and stop together; one that was
    ignored when the launcher started (nohup) stays ignored. The KILL_AT-th signal kills: a rank that waits for another
    one inside a collective hears no signal at all.
    """
    if nproc_per_node < 1:
        raise ConfigError(
            f"--nproc_per_node is {nproc_per_node}; it is the number of processes to start, 1 or more"
        )
    command = [*(program or (sys.executable, "-m", "kitae")), *argv]
    with tempfile.TemporaryDirectory(prefix="kitae-launch-") as folder:
        logs = [Path(folder) / f"rank{rank}.log" for rank in range(nproc_per_node)]
        ranks: list[subprocess.Popen[bytes]] = []
        with _passing_signals_on(ranks) as asked:
            try:
                for rank, log in enumerate(logs):
                    environment = _environment(rank, nproc_per_node, store=Path(folder) / "store")
                    ranks.append(_start(command, environment, log=log if rank else None))
                failed = _wait(ranks)
            finally:
                for process in ranks:
                    process.kill()
        if failed is None:
            return 0
        rank, code = failed
        if code in STOPPED or -code in asked:  # asked to stop: after saving, or while still starting
            return code if code >= 0 else 128 - code
        if nproc_per_node > 1:
            print(
                f"kitae launch: rank {rank} of {nproc_per_node} failed first, {_how(code)}", file=sys.stderr
            )
        if rank:
            sys.stderr.write(logs[rank].read_bytes()[-SHOWN_BYTES:].decode(errors="replace"))
        return code if code >= 0 else 128 - code


def _environment(rank: int, nproc: int, *, store: Path) -> dict[str, str]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // nproc)) if hasattr(os, "sched_getaffinity") else "1"
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        STORE_VARIABLE: str(store),
    }


def _start(
    command: Sequence[str], environment: dict[str, str], *, log: Path | None
) -> subprocess.Popen[bytes]:
    """A rank in a process group of its own, so that Ctrl-C reaches it through us, and only once."""
    output = open(log, "wb") if log else None  # noqa: SIM115  (the child keeps it open)
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,
            preexec_fn=_die_with(os.getpid()),
        )
    finally:
        if output:
            output.close()


def _die_with(parent: int) -> Callable[[], None] | None:
    """On Linux: what makes a child die by SIGKILL when its parent does, however that ends."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG

    def set_up() -> None:
        libc.prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return set_up


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait until all ranks have ended; (rank, return code) of the one that failed first."""
    ended: queue.Queue[tuple[int, int]] = queue.Queue()
    for rank, process in enumerate(ranks):
        threading.Thread(target=lambda r=rank, p=process: ended.put((r, p.wait())), daemon=True).start()
    failed: tuple[int, int] | None = None
    deadline = None
    for _ in ranks:
        while True:
            try:
                rank, code = ended.get(timeout=0.2)
                break
            except queue.Empty:
                if deadline and time.monotonic() > deadline:
                    _signal_all(ranks, signal.SIGKILL)
        if code and failed is None:
            failed = (rank, code)
            deadline = time.monotonic() + GRACE_S
            _signal_all(ranks, signal.SIGTERM)
    return failed


@contextmanager
def _passing_signals_on(ranks: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Inside it signals reach every rank; those that came are in the list."""
    asked: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) == KILL_AT - 1:
            print("kitae launch: one more signal kills the ranks as they are", file=sys.stderr)
        if len(asked) >= KILL_AT:
            number = signal.SIGKILL
            asked.append(number)
        _signal_all(ranks, signal.Signals(number))

    before = {
        number: signal.signal(number, pass_on)
        for number in PASSED_ON
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _signal_all(ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in ranks:
        process.send_signal(number)


def _how(code: int) -> str:
    return f"with exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
