"""kitae's server against llama.cpp's, many chats at a time: `python benchmarks/serve.py`.

A Qwen3-like model of 30 M parameters with random weights, in bfloat16. Each chat has the same system prompt and a question
of its own, and an answer of log-normal length (median 100 tokens, at most 256); 1, 16 or 64 of them run at a time, the next
one is asked when one has ended. One client process, on the same cores, asks both servers over HTTP and reads streams.
Printed are the medians of sampled tokens per second, times to the first token, the servers' peak memory, and for one stream
what a request costs beyond the engine. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import llama_cpp
import rollout
import serve_client
from harness import Contender, Measurement

CONTENDERS = ("kitae", "llama.cpp")
TARGETS = {1: 1.5, 16: 2.0, 64: 3.0}
"""Streams -> times as many tokens per second as llama.cpp's server."""
CHATS = {1: 32, 16: 64, 64: 160}
"""Streams -> chats of one measurement."""
SAMPLING: dict[str, dict[str, float]] = {
    "llama.cpp": {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
    "kitae": {"temperature": 0.6, "top_k": 0, "top_p": 0.95, "min_p": 0.0},
    "whole": {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "greedy": {"temperature": 0.0},
}
"""What both servers are asked for: the defaults of one of them, the whole distribution, or the likeliest token."""
SYSTEM_CHARACTERS, MEDIAN, LONGEST = 160, 100, 256
"""A character is a token of this model."""
CONTEXT = 640
"""Most tokens of a chat."""
KEY = "the-benchmarks-own-key"
START_S = 60.0
PAIRS = 40
"""Requests over HTTP and to the engine itself, in turns, whose times are compared."""
OVERHEAD_TOKENS = (1, 32)
"""Tokens of their answers: the request alone, and with what sending tokens takes from the engine's cores."""


class Server(NamedTuple):
    """A server that answers."""

    port: int
    pid: int


def chats(count: int, *, sampling: str, seed: int = 0) -> list[dict[str, Any]]:
    """Bodies of requests; the same for every server."""
    numbers = random.Random(seed)

    def text(length: int) -> str:
        return "".join(numbers.choices(string.ascii_lowercase + "    ", k=length))

    system = text(SYSTEM_CHARACTERS)
    return [
        {
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": text(numbers.randint(64, 128))},
            ],
            "max_tokens": int(min(max(numbers.lognormvariate(math.log(MEDIAN), 0.6), 8), LONGEST)),
            "seed": number,
            **SAMPLING[sampling],
        }
        for number in range(count)
    ]


@contextlib.contextmanager
def kitae_server(folder: Path, *, threads: int) -> Iterator[Server]:
    """kitae serve with its defaults, in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as state:
        key_file, ready_file = Path(state) / "key", Path(state) / "ready.json"
        key_file.touch(mode=0o600)
        key_file.write_text(KEY)
        command = [sys.executable, "-m", "kitae", "serve", str(folder), "--port", "0"]
        command += ["--api_key_file", str(key_file), "--ready_file", str(ready_file)]
        command += ["--dtype", "bfloat16", "--device", "cpu", "--threads", str(threads)]
        with (Path(state) / "log").open("w+") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                started = time.monotonic()
                while not ready_file.exists() or not ready_file.read_text():
                    if process.poll() is not None or time.monotonic() - started > START_S:
                        log.seek(0)
                        raise RuntimeError("kitae serve does not start:\n" + log.read()[-2000:])
                    time.sleep(0.05)
                url = json.loads(ready_file.read_text())["url"]
                yield Server(int(url.rsplit(":", 1)[1]), process.pid)
            finally:
                process.terminate()
                process.wait()


@contextlib.contextmanager
def llama_server(folder: Path, *, streams: int, threads: int) -> Iterator[Server]:
    """llama.cpp's server with a slot per stream; it goes on from the system prompt that a slot has seen before."""
    model = rollout.gguf_of(folder, dtype="bfloat16")
    with llama_cpp.Server(
        llama_cpp.build(), model, slots=streams, context=CONTEXT, threads=threads
    ) as server:
        yield Server(server.port, server.process.pid)


def measure_load(server: Server, *, streams: int, sampling: str) -> dict[str, float]:
    """All chats, after a few that warm the server up."""
    count = CHATS[streams]
    asked = chats(count + min(streams, 8), sampling=sampling)
    warm = [chat | {"max_tokens": 8} for chat in asked[count:]]
    serve_client.talk(server.port, KEY, warm, streams=len(warm))
    load = serve_client.talk(server.port, KEY, asked[:count], streams=streams)
    waited = sorted(1e3 * answer.first_token_s for answer in load.answers)
    return {
        "tokens_per_s": load.tokens_per_s,
        "first_token_ms": statistics.median(waited),
        "first_token_p95_ms": waited[math.ceil(0.95 * len(waited)) - 1],
        "prompt_tokens": sum(answer.prompt_tokens for answer in load.answers),
        "completion_tokens": sum(answer.completion_tokens for answer in load.answers),
        "peak_rss_mib": llama_cpp.peak_rss_mib(server.pid),
    }


def overhead_ms(server: Server, folder: Path, *, sampling: str) -> dict[int, float]:
    """Milliseconds a request takes longer over HTTP than by the engine itself, in this process, in turns."""
    from kitae.cli._open import UseSettings, open_model
    from kitae.config import SamplingSettings
    from kitae.serve.engine import STEP_S
    from kitae.types import Problem

    opened = open_model(UseSettings(model=str(folder), engine="native", dtype="bfloat16", device="cpu"))
    session = opened.engine.open_session()
    how = SamplingSettings(**SAMPLING[sampling])

    def by_engine(chat: dict[str, Any]) -> float:
        token_ids, _ = opened.template.prompt(chat["messages"])
        problem = Problem(prompt="", token_ids=token_ids, index=0)
        started = time.perf_counter()
        session.add(problem, limits=[chat["max_tokens"]], sampling=how, seed=chat["seed"], wants_text=True)
        while not session.is_idle:
            session.step(within_s=STEP_S)
        return time.perf_counter() - started

    found = {}
    for tokens in OVERHEAD_TOKENS:
        asked = [chat | {"max_tokens": tokens} for chat in chats(PAIRS, sampling=sampling, seed=tokens)]
        taken = serve_client.alternate(server.port, KEY, asked, by_engine)
        found[tokens] = statistics.median(1e3 * (over_http - alone) for over_http, alone in taken)
    return found


def worker(args: argparse.Namespace) -> None:
    """Run one contender; prints one line of JSON."""
    streams = args.streams[0]
    if args.worker == "llama.cpp":
        with llama_server(args.model, streams=streams, threads=args.threads) as server:
            print(json.dumps(measure_load(server, streams=streams, sampling=args.sampling)))
        return
    with kitae_server(args.model, threads=args.threads) as server:
        measured = measure_load(server, streams=streams, sampling=args.sampling)
        if streams == 1:
            spent = overhead_ms(server, args.model, sampling=args.sampling)
            measured |= {f"overhead_{tokens}_ms": ms for tokens, ms in spent.items()}
    print(json.dumps(measured))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    harness.add_options(parser)
    parser.add_argument("--streams", nargs="+", type=int, choices=list(CHATS), default=list(CHATS))
    parser.add_argument("--sampling", choices=SAMPLING, default="llama.cpp", help="whose defaults both use")
    parser.add_argument("--size", choices=["30m", "tiny"], default="30m")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        make = [sys.executable, rollout.__file__, "--worker", "model", "--model", folder, "--size", args.size]
        harness.measure(Contender("model", [*make, "--gguf", "bfloat16"]))
        for streams in args.streams:
            command = [sys.executable, __file__, "--model", folder, "--streams", str(streams)]
            command += ["--sampling", args.sampling, "--threads", str(args.threads), "--worker"]
            env = harness.thread_env(args.threads) | {"HF_HUB_OFFLINE": "1"}
            contenders = [Contender(name, [*command, name], env) for name in CONTENDERS]
            report(harness.run_rounds(contenders, rounds=args.rounds), args, streams=streams)


def report(measured: dict[str, list[Measurement]], args: argparse.Namespace, *, streams: int) -> None:
    print(
        f"{streams} chats at a time of {CHATS[streams]}, {args.size} model in bfloat16, sampling as {args.sampling}, "
        f"{args.threads} threads, {args.rounds} rounds"
    )
    harness.print_machine(measured)
    read = {name: {run.values["prompt_tokens"] for run in runs} for name, runs in measured.items()}
    if read["kitae"] != read["llama.cpp"]:
        sys.exit(f"the servers did not read the same prompts: {read} tokens")
    comparisons = harness.compare(
        measured, key="tokens_per_s", targets={"llama.cpp": (TARGETS[streams], None)}
    )
    harness.print_comparisons(comparisons, unit="tokens/s")
    notes = [first_token_note(measured)]
    if streams == 1:
        spent = " and ".join(
            f"{harness.show(harness.spread(measured['kitae'], f'overhead_{tokens}_ms'), digits=2)} for {tokens}"
            for tokens in OVERHEAD_TOKENS
        )
        notes.append(
            f"Milliseconds beyond the engine that an answer takes, by its tokens: {spent}; the aim is below 3."
        )
    print("\n".join(notes))
    if args.json:
        path = args.json if len(args.streams) == 1 else args.json.with_stem(f"{args.json.stem}-{streams}")
        harness.write_json(path, measured=measured, comparisons=comparisons, unit="tokens/s", notes=notes)


def first_token_note(measured: dict[str, list[Measurement]]) -> str:
    """Times to the first token in words."""
    said = []
    for name, runs in measured.items():
        median, late = (harness.spread(runs, key) for key in ("first_token_ms", "first_token_p95_ms"))
        said.append(f"{name} {harness.show(median)} and {harness.show(late)}")
    return f"Milliseconds to the first token, median and 95th percentile of the chats: {'; '.join(said)}."


if __name__ == "__main__":
    main()
