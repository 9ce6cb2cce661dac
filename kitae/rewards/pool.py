"""RewardPool: completions are judged in worker processes that can be killed, so no answer can hang or crash a run.

    (completion, Problem) --JSON line--> worker (forked by kitae/rewards/worker.py) --> Score

Three outcomes: scored; wrong, because judging exhausted its own time or memory; could not be scored (value None),
which is no 0: the recipe takes such a completion out of the loss and counts it.
"""

from __future__ import annotations

import json
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from kitae.config import RewardSettings
from kitae.errors import ConfigError, RewardError
from kitae.rewards.worker import OUT_OF_DEPTH, OUT_OF_MEMORY, SLOT_BYTES
from kitae.types import Problem, Score

TIMEOUT = "timeout"
EXHAUSTED = (TIMEOUT, OUT_OF_MEMORY, OUT_OF_DEPTH)
"""Reasons of scores whose judging ran into a limit of its own."""
WALL_PER_CPU_SECOND = 5.0
"""Judging is limited in CPU time, so that a busy machine changes no verdict; in wall time, for what waits, by this."""
START_NURSERY = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[3]); "
    "from kitae.rewards.worker import main; main(int(sys.argv[1]), sys.argv[2])"
)


class RewardPool:
    """Judges completions with one reward function in `num_workers` processes.

    The same completion has the same score alone, in a batch, after a hostile neighbour and after a restart, and
    the result's order is the input's. Use it as a context manager, or call `close`.
    """

    def __init__(self, settings: RewardSettings) -> None:
        """Start the processes. A function that is missing or has the wrong signature is a ConfigError here."""
        self.settings = settings
        self._nursery = _Nursery(settings)
        self._wall_s = settings.timeout_s * WALL_PER_CPU_SECOND
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers = [_Worker(self._nursery, slot) for slot in range(settings.num_workers)]
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(settings.num_workers, thread_name_prefix="kitae-reward")

    def score(self, items: Sequence[tuple[str, Problem]]) -> list[Score]:
        """The scores of `items`, each a completion (with its prefill) and the problem it answers."""
        return list(self.score_iter(items))

    def score_iter(self, items: Sequence[tuple[str, Problem]]) -> Iterator[Score]:
        """The same one by one, in order, as they become known."""
        return self._threads.map(self._score, items)

    def begin(self, item: tuple[str, Problem]) -> Future[Score]:
        """Let the processes judge an item as soon as one of them is free; `finish` waits for it."""
        return self._threads.submit(self._score, item)

    def finish(self, items: Sequence[tuple[str, Problem]], begun: Sequence[Future[Score]]) -> list[Score]:
        """The scores of `items`, which were begun one by one in any order: what `score` gives, errors included."""
        assert len(items) == len(begun), (len(items), len(begun))
        try:
            return [future.result() for future in begun]
        finally:  # after an error the others are of no use
            for future in begun:
                future.cancel()

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Score]:
        """Whether each answer is mathematically its gold answer, 1 or 0, by the rules of the reward `math`."""
        return list(self._threads.map(self._compare, pairs))

    def close(self) -> None:
        """End all processes; what is being judged ends within its time limit."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._nursery.close()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _score(self, item: tuple[str, Problem]) -> Score:
        text, problem = item
        fields = {"completion": text, "prompt": problem.prompt, "answer": problem.answer}
        reply = self._ask({**fields, "columns": problem.columns})
        if "value" in reply:
            return Score(reply["value"], reply["reason"])
        if "exhausted" in reply and self._nursery.out_of_budget is not None:
            return Score(self._nursery.out_of_budget, reply["exhausted"])
        what, remedy = reply.get("error") or f"ran into its limit: {reply['exhausted']}", "mend the function"
        if reply.get("exhausted") == TIMEOUT:
            limit = self.settings.timeout_s
            what = f"took more than reward.timeout_s = {limit:g} s of CPU time, or {self._wall_s:g} s in all"
            remedy = "make the function faster, raise reward.timeout_s"
        return self._unscored(what, text, problem, remedy=remedy)

    def _compare(self, pair: tuple[str, str]) -> Score:
        answer, gold = pair
        reply = self._ask({"answer": answer, "gold": gold})
        if "value" in reply:
            return Score(reply["value"])
        if "exhausted" in reply:
            return Score(0.0, reply["exhausted"])
        return Score(None, f"comparing {reply['error']}")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have the next idle worker answer a request."""
        line = json.dumps(request, default=str).encode() + b"\n"
        worker = self._idle.get()
        try:
            return worker.ask(line, timeout_s=self._wall_s)
        finally:
            self._idle.put(worker)

    def _unscored(self, what: str, text: str, problem: Problem, *, remedy: str) -> Score:
        name = self.settings.function
        if self.settings.on_error == "mask" or self._nursery.is_builtin:
            return Score(None, f"{name} {what}")
        raise RewardError(
            f"the reward function {name} {what}, for row {problem.index} (prompt {_excerpt(problem.prompt)}, "
            f"answer {_excerpt(problem.answer)}) and completion {_excerpt(text)}; {remedy}, or set "
            f"reward.on_error = mask to leave such completions out and count them"
        )


class _Nursery:
    """The process that forks workers, and our end of its control socket."""

    def __init__(self, settings: RewardSettings) -> None:
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        with theirs:
            arguments = [str(theirs.fileno()), settings.model_dump_json(), json.dumps(sys.path)]
            self._process = subprocess.Popen(
                [sys.executable, "-c", START_NURSERY, *arguments],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is for the trainer, which saves first
            )
        ready = json.loads(_read_line(self._control) or "{}")
        if "error" in ready:
            self.close()
            raise ConfigError(ready["error"])
        if not ready:
            self.close()
            raise RewardError(
                f"the process for reward.function {settings.function} ended with code {self._process.returncode} "
                f"while it loaded the function; its error is above"
            )
        self.is_builtin: bool = ready["is_builtin"]
        self.out_of_budget: float | None = ready["out_of_budget"]

    def fork(self, slot: int) -> tuple[socket.socket, int]:
        """A fresh worker's connection; what sat in the slot before is killed and reaped, and its exit code returned."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            try:
                socket.send_fds(self._control, [slot.to_bytes(SLOT_BYTES, "big")], [theirs.fileno()])
                exit_code = _read_line(self._control)
            except ConnectionError:
                exit_code = b""
        if not exit_code:
            ours.close()
            raise RewardError(
                "the process that starts reward workers was ended from outside; start the run again"
            )
        return ours, int(exit_code)

    def close(self) -> None:
        self._control.close()
        self._process.wait()


class _Worker:
    """One slot of the pool: a process that judges one completion at a time and is replaced when it fails to."""

    def __init__(self, nursery: _Nursery, slot: int) -> None:
        self._nursery = nursery
        self._slot = slot
        self._connection, _ = nursery.fork(slot)

    def ask(self, request: bytes, *, timeout_s: float) -> dict[str, Any]:
        """The worker's reply, or what became of the worker."""
        self._connection.settimeout(timeout_s)
        try:
            self._connection.sendall(request)
            line = _read_line(self._connection)
        except TimeoutError:
            self._replace()
            return {"exhausted": TIMEOUT}
        except ConnectionError:
            line = b""
        if line:
            reply: dict[str, Any] = json.loads(line)
            return reply
        exit_code = self._replace()
        if exit_code == -signal.SIGPROF:
            return {"exhausted": TIMEOUT}
        return {"error": f"ended its worker process (exit code {exit_code})"}

    def close(self) -> None:
        self._connection.close()

    def _replace(self) -> int:
        self.close()
        self._connection, exit_code = self._nursery.fork(self._slot)
        return exit_code


def _read_line(connection: socket.socket) -> bytes:
    """One line of at most a few KB, or b"" at the end of the stream."""
    received = b""
    while not received.endswith(b"\n"):
        part = connection.recv(65536)
        if not part:
            return b""
        received += part
    return received


def _excerpt(text: str | None, *, length: int = 200) -> str:
    return repr(text) if text is None or len(text) <= length else f"{text[:length]!r}..."
