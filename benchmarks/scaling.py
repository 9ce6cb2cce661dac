"""How cost grows with length, group, vocabulary, queue and model: `python benchmarks/scaling.py --peer-python PATH`.

    one process per point (training) or curve (sampling) --JSON--> docs/benchmarks/scaling.json --> one SVG per curve,
    which docs/benchmarks.md shows

TRL, without recomputing activations, stands beside kitae in training. Points are measured once: the curves show shapes,
run_all.py measures ratios. `--draw` draws anew what was measured before.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness
import sft
import tables
from harness import Contender

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "docs" / "benchmarks"
NUMBERS = FOLDER / "scaling.json"
LENGTHS = [128, 256, 512, 1024, 2048, 4096]
TOKENS = 4096
"""Tokens of a step, whatever their rows' length."""
VOCABULARIES = [8192, 16384, 32768, 65536, 151936]
MODELS = ["5m", "30m", "100m"]
STEPS, WARMUP = 3, 1
PICTURES = re.compile(r"(<!-- curves: begin -->\n).*?(<!-- curves: end -->)", re.DOTALL)
"""Where docs/benchmarks.md shows them."""
TRL, PACKED = "TRL", "TRL, packed"


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture: titles of its axes, and how its points are measured."""

    title: str
    x: str
    y: str
    measure: Callable[[argparse.Namespace], dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--threads", type=int, default=harness.cores(), help="CPU threads of every contender")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has trl")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where numbers and pictures go")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    numbers = options.folder / NUMBERS.name
    found = json.loads(numbers.read_text()) if numbers.exists() else {}
    for name in () if options.draw else options.only:
        print(f"{name}: {CURVES[name].title}", file=sys.stderr, flush=True)
        found[name] = CURVES[name].measure(options) | {"machine": harness.machine()}
        numbers.write_text(json.dumps(found, indent=1) + "\n")
    for name, points in found.items():
        draw(CURVES[name], points, options.folder / f"{name}.svg")
    if options.folder == FOLDER:
        page = tables.DOCS.read_text(encoding="utf-8")
        tables.DOCS.write_text(with_pictures(page, found), encoding="utf-8")


def with_pictures(page: str, found: dict[str, Any]) -> str:
    """The page with all pictures that were drawn, in order."""
    drawn = [(name, what) for name, what in CURVES.items() if name in found]
    lines = [f"![{what.title}: {what.y} against {what.x}](benchmarks/{name}.svg)\n" for name, what in drawn]
    return PICTURES.sub(lambda block: f"{block[1]}{chr(10).join(lines)}{block[2]}", page)


def by_length(options: argparse.Namespace) -> dict[str, Any]:
    points = [
        training_us(options, TRL, size="5m", rows=TOKENS // length, length=length) for length in LENGTHS
    ]
    return joined(LENGTHS, points)


def by_vocabulary(options: argparse.Namespace) -> dict[str, Any]:
    points = [training_us(options, PACKED, size="5m", rows=8, vocab_size=size) for size in VOCABULARIES]
    return joined(VOCABULARIES, points)


def by_model(options: argparse.Namespace) -> dict[str, Any]:
    points = [training_us(options, PACKED, size=size, rows=8) for size in MODELS]
    return joined([point.pop("millions") for point in points], points)


def by_group(options: argparse.Namespace) -> dict[str, Any]:
    return sampling(options, "group", size="30m")


def by_queue(options: argparse.Namespace) -> dict[str, Any]:
    return sampling(options, "queue", size="5m")


def joined(x: list[Any], points: list[dict[str, float]]) -> dict[str, Any]:
    """Points of several contenders as one line each."""
    lines = {name: [point[name] for point in points] for name in points[0] if name != "millions"}
    return {"x": x, "lines": lines}


def training_us(
    options: argparse.Namespace,
    peer: str,
    *,
    size: str,
    rows: int,
    length: int | None = None,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """Microseconds of an SFT step per real token, by kitae and a peer in turn; and the model's million parameters."""
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        make = [sys.executable, str(HERE / "chat_workload.py"), folder, "--size", size]
        make += ["--rows", str(rows * STEPS)]
        make += ["--length", str(length)] if length else []
        make += ["--vocab-size", str(vocab_size)] if vocab_size else []
        made = harness.measure(Contender("workload", make)).values
        point = {"millions": made["parameters"] / 1e6}
        precision = "bfloat16" if made["fast_bfloat16"] else "float32"
        shared = ["--folder", folder, "--precision", precision, "--batch-size", str(rows), "--lora-rank", "0"]
        shared += ["--steps", str(STEPS), "--warmup", str(WARMUP)]
        shared += sft.device_flags(max_length=max(LENGTHS) if peer == TRL else 1024)
        trl = [options.peer_python, str(HERE / "sft_trl.py"), "--gradient-checkpointing", "off"]
        trl += ["--variant", "packed" if peer == PACKED else "default"]
        for name, command in {"kitae": [sys.executable, str(HERE / "sft_kitae.py")], peer: trl}.items():
            contender = Contender(name, [*command, *shared], harness.thread_env(options.threads))
            point[name] = 1e6 / float(harness.measure(contender).values["tokens_per_s"])
    print(f"  {size} {length or vocab_size or ''}: {point}", file=sys.stderr, flush=True)
    return point


def sampling(options: argparse.Namespace, name: str, *, size: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="kitae-bench-") as folder:
        make = [sys.executable, str(HERE / "chat_workload.py"), folder, "--size", size, "--rows", "1"]
        harness.measure(Contender("workload", make))
        command = [sys.executable, str(HERE / "scaling_rollouts.py"), "--curve", name]
        command += ["--model", f"{folder}/model", "--threads", str(options.threads)]
        return harness.measure(Contender(name, command, harness.thread_env(options.threads))).values


CURVES = {
    "length": Curve(
        f"SFT of a 5 M model, {TOKENS:,} tokens a step in rows of one length",
        "tokens of a row",
        "microseconds per token",
        by_length,
    ),
    "group": Curve(
        "Sampling of a 30 M model, prompts of 512 tokens, 32 new tokens each",
        "completions",
        "seconds",
        by_group,
    ),
    "vocabulary": Curve(
        "SFT of a model with 4 layers of 256", "vocabulary", "microseconds per token", by_vocabulary
    ),
    "queue": Curve(
        "Sampling of a 5 M model, 128 rows at a time",
        "completions queued",
        "milliseconds per token",
        by_queue,
    ),
    "model": Curve("SFT of models of three sizes", "million parameters", "microseconds per token", by_model),
}


def draw(what: Curve, points: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kitae"  # the same numbers give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    for (name, values), marker in zip(points["lines"].items(), "os", strict=False):
        axes.plot(points["x"], values, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    shown = [f"{value:,.0f}" for value in points["x"]]
    axes.set_xticks(points["x"], shown)
    axes.minorticks_off()
    axes.set_ylim(0, 1.15 * max(max(values) for values in points["lines"].values()))
    axes.set_title(what.title, fontsize=10)
    axes.set_xlabel(what.x)
    axes.set_ylabel(what.y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
