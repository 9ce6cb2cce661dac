"""The processes behind RewardPool: a nursery that has everything imported, and the workers it forks.

    pool --slot number and a socket--> nursery --fork--> worker <--one JSON line each way--> pool

Forking from a warm process makes a killed worker's successor ready in milliseconds. The nursery leaves when its
pool's end of the control socket closes, and workers are killed with the nursery, so nothing outlives the trainer.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import signal
import socket
import sys
from typing import Any, NoReturn

from kitae.config import RewardSettings
from kitae.errors import KitaeError
from kitae.rewards.loading import Reward, load_reward
from kitae.rewards.math import equivalent
from kitae.types import Score

MEMORY_BYTES = 2 << 30
"""Address space a worker may take on top of what it was forked with."""

SLOT_BYTES = 4
REASON_LENGTH = 500
OUT_OF_MEMORY, OUT_OF_DEPTH = "out of memory", "nested too deep"


def main(control_fd: int, settings_json: str) -> None:
    """Run the nursery: load and warm up the reward, report, then fork a worker for every slot asked for."""
    _print_to_stderr()
    control = socket.socket(fileno=control_fd)
    settings = RewardSettings.model_validate_json(settings_json)
    try:
        reward = load_reward(settings)
    except KitaeError as error:
        control.sendall(json.dumps({"error": str(error)}).encode() + b"\n")
        return
    _warm_up()
    ready = {"is_builtin": reward.is_builtin, "out_of_budget": reward.out_of_budget}
    control.sendall(json.dumps(ready).encode() + b"\n")
    _fork_on_request(control, reward, timeout_s=settings.timeout_s)


def _fork_on_request(control: socket.socket, reward: Reward, *, timeout_s: float) -> None:
    """Keep one worker per slot until the pool closes its end; answer each request with the last one's exit code."""
    nursery = os.getpid()
    workers: dict[int, int] = {}
    try:
        while True:
            message, fds, _, _ = socket.recv_fds(control, SLOT_BYTES, 1)
            if not message:
                return
            slot = int.from_bytes(message, "big")
            exit_code = _end(workers.pop(slot)) if slot in workers else 0
            pid = os.fork()
            if pid == 0:
                connection = socket.socket(fileno=fds[0])
                _work(control, connection, reward, timeout_s=timeout_s, parent=nursery)
            workers[slot] = pid
            os.close(fds[0])
            control.sendall(f"{exit_code}\n".encode())
    finally:
        for pid in workers.values():
            _end(pid)


def _end(pid: int) -> int:
    """Kill a worker unless it has ended by itself, and return its exit code: minus the signal, if there was one."""
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _work(
    control: socket.socket, connection: socket.socket, reward: Reward, *, timeout_s: float, parent: int
) -> NoReturn:
    """In a forked worker: judge one request after another until the pool hangs up, then leave at once."""
    try:
        control.close()
        _die_with(parent)
        _limit_resources()
        with connection.makefile("rb") as requests:
            for line in requests:
                request = json.loads(line)
                # CPU time of all threads, so that a busy machine changes no verdict; waiting is for the pool's clock.
                signal.setitimer(signal.ITIMER_PROF, timeout_s)  # ends this process by SIGPROF
                reply = _answer(reward, request)
                signal.setitimer(signal.ITIMER_PROF, 0)
                connection.sendall(json.dumps(reply).encode() + b"\n")
    finally:
        os._exit(0)  # never return into the nursery's code, whatever happened


def _answer(reward: Reward, request: dict[str, Any]) -> dict[str, Any]:
    """One request to one reply: a value and a reason, or what kept us from them."""
    try:
        if "gold" in request:
            return {"value": float(equivalent(request["answer"], request["gold"])), "reason": ""}
        return _judge(reward, **request)
    except MemoryError:
        return {"exhausted": OUT_OF_MEMORY}
    except RecursionError:
        return {"exhausted": OUT_OF_DEPTH}
    except Exception as error:  # a user's function may raise anything; the pool stops the run or counts it
        return {"error": f"raised {type(error).__name__}: {error}"[:REASON_LENGTH]}


def _judge(
    reward: Reward, *, completion: str, prompt: str, answer: str | None, columns: dict[str, Any]
) -> dict[str, Any]:
    others = {name: value for name, value in columns.items() if name not in ("prompt", "answer")}
    result = reward(completion, prompt=prompt, answer=answer, **others)
    value, reason = (result.value, result.reason) if isinstance(result, Score) else (result, "")
    if value is None:
        return {"value": None, "reason": str(reason or "could not be scored")[:REASON_LENGTH]}
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        what = f"returned {type(value).__name__} {value!r}"[:REASON_LENGTH]
        return {"error": f"{what}; it must return a finite number, a Score, or None if it cannot tell"}
    return {"value": number, "reason": str(reason)[:REASON_LENGTH]}


def _warm_up() -> None:
    """Pay for math-verify's imports and parser tables once, before any worker is forked."""
    equivalent(r"\sqrt{2}x + 1", r"1 + x\sqrt{2}")


def _print_to_stderr() -> None:
    """What a user's function prints belongs in the log, and standard output to the trainer."""
    os.dup2(2, 1)


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _limit_resources() -> None:
    """Allow MEMORY_BYTES beyond what is mapped now, and no core files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        with open("/proc/self/statm", encoding="ascii") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
