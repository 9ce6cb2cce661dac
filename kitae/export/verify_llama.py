"""What llama.cpp (xllamacpp) makes of a GGUF file, run in a process of its own that may die or hang without harm.

job --JSON--> _llama_worker.py --a line for each answer, at the end JSON--> answers
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from kitae import backends
from kitae.errors import ModelError, PlanError
from kitae.export.verify_answers import Answers, Exam, Question
from kitae.export.verify_metadata import apart, short

RETURNED = 4096
"""Tokens that llama.cpp is asked for at each position."""
SILENT_S = 300.0
"""How long llama.cpp may be without an answer, and as long again as SLOWEST_READ takes for the file."""
SLOWEST_READ = 50e6
"""Bytes a second: where a file does not fit into memory, every answer may read all of it."""
SPARE_TOKENS = 8
TOKENS_OF_LARGE = 2
"""A file that does not fit into memory says so many, after the first prompt only."""
KEPT_OUTPUT = 1 << 16


def has_llama_cpp() -> bool:
    """Whether xllamacpp is installed."""
    return importlib.util.find_spec("xllamacpp") is not None


def answers_of_llama_cpp(
    path: Path, exam: Exam, *, reference: Any, stop_ids: list[int], template: str | None, threads: int
) -> Answers:
    """What a file says in llama.cpp; `reference` is the tokenizer of what it was made of."""
    vocab = len(reference)
    said = run_llama_cpp({
        **_job(path, exam.questions, exam.forced, stop_ids=stop_ids, threads=threads, tokens=exam.max_new_tokens),
        "top": max(vocab, 1) + 1024 if vocab <= RETURNED else RETURNED,
    })  # fmt: skip
    return Answers(
        how="llama.cpp",
        logprobs_QPV=[_dense(row) for row in said["positions"]],
        greedy=[entry["ids"] for entry in said["greedy"]],
        texts=[entry["text"] for entry in said["greedy"]],
        stop_ids=[number for number in stop_ids if said["stops"][str(number)]],
        template=template,
        differences=_differences(said, exam.questions),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Alone:
    """What a file says where the model it was made of cannot be asked."""

    stop_ids: list[int]
    failures: list[str]


def answers_alone(path: Path, questions: list[Question], *, stop_ids: list[int], threads: int) -> Alone:
    """Whether llama.cpp reads the prompts as the original does, says something finite after them, and stops."""
    is_large = path.stat().st_size > backends.pick("cpu").memory(torch.device("cpu"))[1]
    asked, tokens = (questions[:1], TOKENS_OF_LARGE) if is_large else (questions, 2 * SPARE_TOKENS)
    job = _job(path, asked, [[0] for _ in asked], stop_ids=stop_ids, threads=threads, tokens=tokens)
    job["texts"] = [q.text for q in questions if not q.messages]
    job["conversations"] = [q.messages for q in questions if q.messages]
    said = run_llama_cpp({**job, "top": TOKENS_OF_LARGE})
    failures = _differences(said, questions)
    stops = [number for number in stop_ids if said["stops"][str(number)]]
    if missing := sorted(set(stop_ids) - set(stops)):
        failures.append(f"it does not stop at ids {missing}, at which the original stops")
    odd = sum(not _is_finite(row) for row in said["positions"])
    if odd:
        failures.append(f"after {odd} of {len(asked)} prompts its log-probabilities are not finite")
    return Alone(stop_ids=stops, failures=failures)


def _job(
    path: Path,
    questions: Sequence[Question],
    forced: Sequence[list[int]],
    *,
    stop_ids: list[int],
    threads: int,
    tokens: int,
) -> dict[str, Any]:
    longest = max(len(q.ids) + max(len(f), tokens) for q, f in zip(questions, forced, strict=True))
    return {
        "path": str(path.resolve()),
        "context": longest + SPARE_TOKENS,
        "threads": threads,
        "sequences": [[q.ids, f] for q, f in zip(questions, forced, strict=True)],
        "max_tokens": tokens,
        "stop_ids": stop_ids,
        "texts": [q.text for q in questions if not q.messages],
        "add_special": True,
        "conversations": [q.messages for q in questions if q.messages],
    }


def _differences(said: dict[str, Any], questions: Sequence[Question]) -> list[str]:
    """How llama.cpp reads text otherwise, or renders conversations, which it then reads as its server does.

    It leaves out a BOS that the template writes where it puts one there itself: ids are compared, texts only say why.
    """
    plain, asked = [q for q in questions if not q.messages], [q for q in questions if q.messages]
    unlike = sum(ids != q.ids for ids, q in zip(said["tokens"], plain, strict=True))
    unlike_rendered: list[tuple[str, str]] = []
    for text, ids, q in zip(said["rendered"], said["rendered_tokens"], asked, strict=True):
        if ids != q.ids:
            if q.text.endswith(text):
                unlike += 1
            else:
                unlike_rendered.append((text, q.text))
    found = []
    if unlike:
        found.append(f"{unlike} of {len(questions)} prompts become other token ids in llama.cpp")
    if unlike_rendered:
        is_, wanted = apart(*unlike_rendered[0])
        found.append(
            f"{len(unlike_rendered)} of {len(asked)} conversations are rendered otherwise by llama.cpp: "
            f"{short(is_)}, not {short(wanted)}"
        )
    return found


def _dense(row: list[list[list[Any]]]) -> Tensor:
    """Log-probabilities as JSON has them, in which NaN is null, by position and token."""
    size = 1 + max(max(ids) for ids, _ in row)
    found = torch.full((len(row), size), -torch.inf)
    for position, (ids, logprobs) in enumerate(row):
        known = [math.nan if value is None else value for value in logprobs]
        found[position, torch.tensor(ids)] = torch.tensor(known, dtype=torch.float32)
    return found


def _is_finite(row: list[list[list[Any]]]) -> bool:
    """Of log-probabilities as JSON has them."""
    return all(value is not None and math.isfinite(value) for _, logprobs in row for value in logprobs)


# the process -----------------------------------------------------------------------------------------------------


def run_llama_cpp(job: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer to a job; that it dies is a ModelError, that it hangs a PlanError."""
    with TemporaryDirectory(prefix="kitae-llama-") as name:
        asked, result = Path(name) / "job.json", Path(name) / "result.json"
        asked.write_text(json.dumps(job), encoding="utf-8")
        command = [sys.executable, "-m", "kitae.export._llama_worker", str(asked), str(result)]
        file = Path(job["path"])
        size = file.stat().st_size if file.exists() else 0
        try:
            code, output = watch(command, silent_s=SILENT_S + size / SLOWEST_READ)
        except TimeoutError as error:
            raise PlanError(
                f"llama.cpp hangs with {file}: {error}; it was stopped. Try again on an idle machine, or leave the check "
                "out with --no_verify"
            ) from error
        if code or not result.is_file():
            lines = [line.strip() for line in output.splitlines() if line.strip()]
            told = [line for line in lines if "error" in line.lower()] or lines
            raise ModelError(f"llama.cpp cannot run {file}: {' / '.join(told[-3:])}")
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found


def watch(command: Sequence[str], *, silent_s: float) -> tuple[int, str]:
    """Run a program: its exit code, and the last it said. After `silent_s` without output it is killed: TimeoutError."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            output, began = b"", time.monotonic()
            assert process.stdout is not None
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(silent_s):
                        spent = time.monotonic() - began
                        raise TimeoutError(f"nothing came from it for {silent_s:.0f} of {spent:.0f} seconds")
                    part = os.read(process.stdout.fileno(), KEPT_OUTPUT)
                    if not part:
                        break
                    output = (output + part)[-KEPT_OUTPUT:]
            try:
                code = process.wait(silent_s)
            except subprocess.TimeoutExpired as error:
                raise TimeoutError(
                    f"it did not end within {silent_s:.0f} seconds of its last output"
                ) from error
        except BaseException:
            process.kill()
            raise
    return code, output.decode(errors="replace")
