"""Write a model anew: kitae export merge ADAPTER --output DIR, or fp8-to-bf16 and bf16-to-fp8 MODEL --output DIR."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _help
from kitae.cli._open import warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import Section
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean
from kitae.settings import Notes, read

if TYPE_CHECKING:
    from kitae.export.shards import Progress

VERBS = ("merge", "fp8-to-bf16", "bf16-to-fp8")
ONLY = {
    "base": ("merge",),
    "dtype": ("merge",),
    "dequantize": ("merge",),
    "scale_format": ("merge", "bf16-to-fp8"),
}
"""Settings that not every verb has."""
SECONDS_BETWEEN_LINES = 10.0


class Settings(Section):
    """Merge a LoRA adapter into its base, or convert block-scaled FP8 to BF16 and back.

    Runs on the CPU, tensor by tensor. Stopped at any instant, the same command goes on where it was.
    """

    model: str
    """The adapter to merge, or the model to convert: a folder, a run directory, or a hub id."""
    output: str
    """Folder of the new model. Until it is whole, what there is lies in OUTPUT.partial."""
    overwrite: bool = False
    """Replace the model that is in output, once the new one is whole; also begin anew where another export was stopped."""
    base: str | None = None
    """merge: the full-precision model to merge into; default: the one the adapter names."""
    dtype: Literal["auto", "fp8"] = "auto"
    """merge: auto keeps each tensor's type, and makes BF16 of weights in FP8 or 4 bits; fp8 writes what DeepSeek's releases
    have in FP8 in FP8."""
    scale_format: Literal["float32", "ue8m0"] = "float32"
    """Scales of new FP8 blocks: the largest magnitude over 448 in float32, or that rounded up to a power of two."""
    dequantize: bool = False
    """merge: merge into a base that is stored in 4 bits, with the rounding it has, where its original cannot be had."""
    num_workers: int = Field(0, ge=0, le=256)
    """Tensors worked on at the same time, one a core; 0 takes all cores. Memory grows by some tens of MiB with each."""
    json_file: str | None = None
    """Also write the report to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Export, and say what was written."""
    if not argv or (_help.is_asked(argv) and argv[0] not in VERBS):
        print(f"usage: kitae export {'|'.join(VERBS)} MODEL --output DIR    kitae export merge --help")
        return 0
    verb = argv[0]
    _require_verb(verb)
    if _help.is_asked(argv):
        name = "ADAPTER" if verb == "merge" else "MODEL"
        _help.show(Settings, prog=f"kitae export {verb} {name} --output DIR")
        return 0
    use, notes = parse(verb, argv[1:])
    warn_on_stderr(notes.warnings)
    try:
        with _shown(sys.stderr.isatty()) as progress:
            report = _run(verb, use, progress)
    except KeyboardInterrupt:
        print("kitae: what is done is kept; the same command goes on from there", file=sys.stderr)
        raise
    print(text_of(report))
    if use.json_file:
        write_json(use.json_file, report)
    return 0


def parse(verb: str, given: Sequence[str] | Mapping[str, Any]) -> tuple[Settings, Notes]:
    """The settings of one verb; those of another one are refused."""
    use, notes = read("export", Settings, given, positional=("model",))
    for name, verbs in ONLY.items():
        if name in notes.origins and verb not in verbs:
            raise ConfigError(
                f"{name} ({notes.origins[name]}) has no effect on {verb}, only on {' and '.join(verbs)}; leave it out"
            )
    if verb == "merge" and "scale_format" in notes.origins and use.dtype != "fp8":
        raise ConfigError(
            f"scale_format ({notes.origins['scale_format']}) has no effect unless dtype is fp8; leave it out"
        )
    return use, notes


def from_python(verb: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """What kitae.export returns."""
    _require_verb(verb)
    use, notes = parse(verb, given)
    warn_on_stderr(notes.warnings)
    report = _run(verb, use, None)
    if use.json_file:
        write_json(use.json_file, report)
    return report


def text_of(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    gib = f"{report['bytes'] / 2**30:.2f} GiB in {report['shards']} file{'s' if report['shards'] > 1 else ''}"
    if report["command"] == "merge":
        did = f"{report['changed']} of {report['tensors']} tensors changed ({report['adapted']} have an adapter)"
        return f"{did}, {gib}: {report['output']}\nmerged into {report['base']}"
    return f"{report['converted']} of {report['tensors']} tensors converted, {gib}: {report['output']}"


def _require_verb(verb: str) -> None:
    if verb not in VERBS:
        raise ConfigError(f"there is no kitae export {verb}; {did_you_mean(verb, VERBS)}")


def _run(verb: str, use: Settings, progress: Progress | None) -> dict[str, Any]:
    from kitae.export import convert

    output = Path(use.output).expanduser()
    how = convert.How(output=output, overwrite=use.overwrite, num_workers=use.num_workers)
    if verb == "fp8-to-bf16":
        return convert.fp8_to_bf16(use.model, how, progress=progress)
    if verb == "bf16-to-fp8":
        return convert.bf16_to_fp8(use.model, how, scale_format=use.scale_format, progress=progress)
    return convert.merge(
        use.model,
        how,
        base=use.base,
        dtype=use.dtype,
        scale_format=use.scale_format,
        dequantize=use.dequantize,
        progress=progress,
    )


@contextmanager
def _shown(is_terminal: bool) -> Iterator[Progress]:
    """A bar with bytes per second and time left on a terminal, a line now and then elsewhere."""
    from kitae.export.shards import Progress

    if not is_terminal:
        lines = _Lines(lambda text: print(text, file=sys.stderr))
        yield Progress(begin=lines.begin, say=lines.say)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def begin(total: int) -> None:
            bar.update(task, total=total)

        def say(count: int) -> None:
            bar.advance(task, count)

        yield Progress(begin=begin, say=say)


class _Lines:
    """Says how far it is, how fast, and how long it will take, every ten seconds."""

    def __init__(self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock, self._mutex = write, clock, threading.Lock()
        self._total = self._done = 0
        self._started = self._said = clock()

    def begin(self, total: int) -> None:
        self._total = total

    def say(self, count: int) -> None:
        with self._mutex:
            self._done += count
            now = self._clock()
            if now - self._said < SECONDS_BETWEEN_LINES:
                return
            self._said = now
            speed = self._done / max(now - self._started, 1e-9)
            left = max(self._total - self._done, 0) / max(speed, 1.0)
            self._write(
                f"{self._done / 2**30:.1f} of {self._total / 2**30:.1f} GiB, {speed / 2**20:.0f} MiB/s, "
                f"{left / 60:.0f} minutes left"
            )
