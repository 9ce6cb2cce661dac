"""What a benchmark passes to its contenders' scripts is what these take; nothing is trained or sampled here."""

import argparse
import json
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import grpo  # noqa: E402
import harness  # noqa: E402
import run_all  # noqa: E402
import scaling  # noqa: E402
import sft  # noqa: E402

PEER_PYTHON = "/peer/python"
NUMBERS = [
    "parameters", "rows", "median_tokens", "mean_tokens", "mean_seen", "longest", "taught_share", "tokens_per_s",
    "tokens_per_step", "loss", "pairs_per_s", "gflop_per_s", "completion_length", "first_step_s", "peak_gpu_mib",
    "logprob_gap", "ms_per_token", "weights_mib", "read_floor_ms", "mib_per_s", "prompt_tokens", "first_token_ms",
    "first_token_p95_ms", "overhead_1_ms", "overhead_32_ms",
]  # fmt: skip
PRINTED = {**dict.fromkeys(NUMBERS, 1.0), "fast_bfloat16": False, "precision": "float32", "versions": {}}
"""What every script is taken to have printed."""
WITH_PEER_PYTHON = {b.arguments[0] for b in run_all.ALL if b.has_peer_python}
EVERY_PEER = [
    ["sft.py", "--lora-rank", "4", "--length", "64", "--peers", *sft.PEERS],
    ["grpo.py", "--peers", *grpo.PEERS],
]


def gpu_commands():
    """The programs that gpu/run.sh starts for training, with their arguments."""
    lines = (BENCHMARKS / "gpu" / "run.sh").read_text().replace("\\\n", " ").splitlines()
    shared = next(line.split('"')[1] for line in lines if line.startswith("lora="))
    for line in lines:
        if line.startswith("$python ") and "$lora" in line:
            program, *arguments = shlex.split(line.replace("$lora", shared).replace("$rounds", "3"))[1:]
            yield [Path(program).name, *arguments]


DRIVEN = [*(b.arguments for b in run_all.ALL), *EVERY_PEER, *gpu_commands()]


@pytest.fixture
def started(monkeypatch):
    """The contenders that were to be measured."""
    found = []

    def measure(contender):
        found.append(contender)
        return harness.Measurement(PRINTED, peak_rss_mib=1, wall_s=1, other_cores=0)

    monkeypatch.setattr(harness, "measure", measure)
    monkeypatch.setattr(harness.signal, "signal", lambda *_: None)
    return found


@pytest.fixture
def run(monkeypatch):
    def as_program(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")

    return as_program


class ParsedError(Exception):
    """A contender has read its options; what it measures stays unimported."""


def assert_all_parse(started, run, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments):
        parse(self, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for contender in started:
        python, script, *arguments = contender.command
        is_peer = any(word in Path(script).name for word in ("trl", "transformers", "peers"))
        assert python == (PEER_PYTHON if is_peer else sys.executable), contender.name
        with pytest.raises(ParsedError):
            run(script, *arguments)


@pytest.mark.parametrize("arguments", DRIVEN, ids=" ".join)
def test_contenders_take_what_a_benchmark_passes_and_its_file_has_what_the_tables_show(
    arguments, started, run, monkeypatch, tmp_path
):
    script, *others = arguments
    peer_python = ["--peer-python", PEER_PYTHON] if script in WITH_PEER_PYTHON else []
    run(BENCHMARKS / script, *others, "--rounds", "1", *peer_python, "--json", str(tmp_path / "result.json"))
    report = json.loads((tmp_path / "result.json").read_text())
    assert report["unit"] and {"floor", "machine", "versions", "other_cores"} <= report.keys()
    assert all(
        c["ratio"]["median"] == c["memory_ratio"]["median"] == 1 for c in report["comparisons"].values()
    )
    assert report["comparisons"] and len(started) >= 3
    assert_all_parse(started, run, monkeypatch)


@pytest.mark.parametrize("curve", scaling.CURVES)
def test_contenders_take_what_a_curve_passes(curve, started, run, monkeypatch):
    scaling.CURVES[curve].measure(argparse.Namespace(threads=1, peer_python=PEER_PYTHON))
    assert started
    assert_all_parse(started, run, monkeypatch)


def test_a_benchmark_itself_is_small_so_that_its_contenders_peaks_are_theirs():
    drivers = sorted({Path(b.arguments[0]).stem for b in run_all.ALL} | {"run_all", "scaling"})
    code = f"import sys; import {', '.join(drivers)}; print(sorted({{'torch', 'transformers', 'numpy'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr
