"""Lives of the fault trainer: torch is imported once, and every life is a fork of that process.

As a script it is the server: it reads one JSON command a line and answers each with a line. `Server` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Life:
    """One process of the trainer: to be killed, signalled, or waited for."""

    def __init__(self, server: Server, pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), None while it lives."""
        if self.code is None:
            self.code = self.server.ask(command="poll", pid=self.pid)
        return self.code

    def wait(self, seconds: float = 300.0) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.signal(signal.SIGKILL)
                raise TimeoutError(f"the trainer did not end in {seconds} s: {self.text()}")
            time.sleep(0.002)
        return code

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Until it comes true while the trainer lives."""
        deadline = time.monotonic() + 300.0
        while not condition():
            assert self.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.002)

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def text(self) -> str:
        """What it printed."""
        return self.output.read_text()


class Server:
    """Starts lives of the trainer; close it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, output_dir: Path, *, is_stopped: bool = False, is_unheard: bool = False, **options: Any
    ) -> Life:
        """A new life; is_stopped: it waits for SIGCONT before its first line, so that a tracer can attach.

        is_unheard: its terminal is gone, and what it prints is an error.
        """
        self.count += 1
        output = self.folder / f"life_{self.count}.txt"
        output.touch()
        pid = self.ask(
            command="start",
            output=str(output),
            is_stopped=is_stopped,
            is_unheard=is_unheard,
            options={"output_dir": str(output_dir), **options},
        )
        return Life(self, pid, output)

    def run(self, output_dir: Path, **options: Any) -> Life:
        """A life lived to its end."""
        life = self.start(output_dir, **options)
        life.wait()
        return life

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=120)


def serve() -> None:
    import importlib

    import fault_trainer
    import torch

    torch.set_num_threads(1)
    torch.optim.AdamW(fault_trainer.Trainer(width=2).model.parameters())  # imports what torch imports late
    for module in ("event_pb2", "summary_pb2"):
        importlib.import_module(f"tensorboard.compat.proto.{module}")
    importlib.import_module("tensorboard.summary.writer.record_writer")
    for line in sys.stdin:
        command = json.loads(line)
        if command["command"] == "start":
            pid = os.fork()
            if pid == 0:
                live(command)
            if command["is_stopped"]:
                os.waitpid(pid, os.WUNTRACED)
            answer: int | None = pid
        else:
            pid, status = os.waitpid(command["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


def live(command: dict[str, Any]) -> None:
    """In the fork: train and leave with the exit code the command line would give."""
    import fault_trainer

    from kitae.errors import KitaeError
    from kitae.train.stop import exit_code

    descriptor = os.open(command["output"], os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if command["is_unheard"]:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
    if command["is_stopped"]:
        os.kill(os.getpid(), signal.SIGSTOP)
    code = 0
    try:
        fault_trainer.train(**command["options"])
    except KitaeError as error:
        os.write(descriptor, f"kitae: error: {error}\n".encode())
        code = exit_code(error)
    except BaseException as error:
        os.write(descriptor, traceback.format_exc().encode())
        code = exit_code(error)
    os._exit(code)


if __name__ == "__main__":
    serve()
