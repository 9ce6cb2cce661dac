"""Write a model anew and check it: kitae export merge|gguf|fp8-to-bf16|bf16-to-fp8 MODEL, export verify MODEL EXPORT."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from kitae.cli import _gate, _help
from kitae.cli._open import read_prompts, warn_on_stderr
from kitae.cli._output import write_json
from kitae.config import Section
from kitae.errors import ConfigError
from kitae.plugins import did_you_mean
from kitae.settings import Notes, read

if TYPE_CHECKING:
    import torch

    from kitae.export.gate import Check
    from kitae.export.shards import Progress

VERBS = ("merge", "gguf", "fp8-to-bf16", "bf16-to-fp8", "verify")
WRITING = VERBS[:-1]
ONLY = {
    "base": ("merge", "gguf", "verify"),
    "dtype": ("merge",),
    "dequantize": ("merge", "gguf", "verify"),
    "scale_format": ("merge", "bf16-to-fp8"),
    "type": ("gguf",),
    "adapter_only": ("gguf",),
    "device": ("fp8-to-bf16", "bf16-to-fp8"),
    "pre_tokenizer": ("gguf",),
    "output": WRITING,
    "overwrite": WRITING,
    "no_verify": WRITING,
    "candidates": ("verify",),
    "prompts_file": ("verify",),
}
"""Settings that not every verb has."""
SECONDS_BETWEEN_LINES = 10.0
_OVERVIEW = """usage: kitae export VERB MODEL ...    kitae export VERB --help

  merge ADAPTER --output DIR       LoRA into its base: one model in BF16, or in FP8.
  gguf MODEL [--type q4_k_m]       One file for llama.cpp, of a model or of an adapter on its base.
  fp8-to-bf16 MODEL --output DIR   DeepSeek-V3's block-scaled FP8 as BF16.
  bf16-to-fp8 MODEL --output DIR   And back.
  verify MODEL EXPORT ...          Compare exports with what they were made of, as is done after every export.

MODEL is a folder, a run directory, or a hub id."""


class Settings(Section):
    """Merge a LoRA adapter into its base, write GGUF, convert block-scaled FP8 to BF16 and back, and check the result.

    Runs on the CPU, tensor by tensor. Stopped at any instant, the same command goes on where it was.
    """

    model: str
    """What is exported: an adapter to merge, or a model; a folder, a run directory, or a hub id. verify: what the exports
    were made of."""
    candidates: list[str] = Field(default_factory=list)
    """verify: folders and GGUF files to compare with the model; words after the model are candidates too."""
    output: str | None = None
    """Folder of the new model; gguf: a file, by default NAME-GGUF/NAME-TYPE.gguf. Until it is whole, what there is lies in
    OUTPUT.partial."""
    overwrite: bool = False
    """Replace the model that is in output, once the new one is whole; also begin anew where another export was stopped."""
    no_verify: bool = False
    """Do not run the gate on what was written. It loads the model, the export after it, and reads all tensors of both."""
    type: str = "q4_k_m"
    """gguf: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_0, q4_k_m or q4_0, in any case; more bits make a larger and truer file.
    Other types of llama.cpp are written by llama-quantize, where that is on the PATH."""
    adapter_only: bool = False
    """gguf: write the adapter itself, which llama.cpp loads beside the base, instead of merging it."""
    pre_tokenizer: str | None = None
    """gguf: llama.cpp's name for how the tokenizer cuts text; default: the one that cuts probing strings the same way."""
    prompts_file: str | None = None
    """verify: a text file with one prompt a line, in place of the built-in six; more prompts take longer."""
    base: str | None = None
    """The full-precision model to merge the adapter into; default: the one the adapter names."""
    dtype: Literal["auto", "fp8"] = "auto"
    """merge: auto keeps each tensor's type, and makes BF16 of weights in FP8 or 4 bits; fp8 writes what DeepSeek's releases
    have in FP8 in FP8."""
    scale_format: Literal["float32", "ue8m0"] = "float32"
    """Scales of new FP8 blocks: the largest magnitude over 448 in float32, or that rounded up to a power of two."""
    device: str = "auto"
    """fp8-to-bf16 and bf16-to-fp8: where blocks are computed; auto takes a GPU where there is one, and cpu never does. The
    bits are the same."""
    dequantize: bool = False
    """merge and gguf: take a base that is stored in 4 bits, with the rounding it has, where its original cannot be had."""
    num_workers: int = Field(0, ge=0, le=256)
    """Tensors worked on at the same time, one a core; 0 takes all cores. Memory grows by some tens of MiB with each."""
    json_file: str | None = None
    """Also write the report to this file as JSON (--json FILE)."""


def main(argv: list[str]) -> int:
    """Export, and say what was written."""
    if not argv or (_help.is_asked(argv) and argv[0] not in VERBS):
        print(_OVERVIEW)
        return 0
    verb = argv[0]
    _require_verb(verb)
    if _help.is_asked(argv):
        name = "ADAPTER" if verb == "merge" else "MODEL"
        rest = "EXPORT ..." if verb == "verify" else "--output FILE" if verb == "gguf" else "--output DIR"
        _help.show(Settings, prog=f"kitae export {verb} {name} {rest}")
        return 0
    use, notes = parse(verb, argv[1:])
    warn_on_stderr(notes.warnings)
    if verb == "verify":
        report = _run(verb, use, None)
    else:
        try:
            with _shown(sys.stderr.isatty()) as (progress, hide):
                report = _run(verb, use, progress, hide=hide)
        except KeyboardInterrupt:
            print("kitae: what is done is kept; the same command goes on from there", file=sys.stderr)
            raise
    print(text_of(report))
    if use.json_file:
        write_json(use.json_file, report)
    if verb == "verify":
        _gate.require_passed(report)
    return 0


def parse(verb: str, given: Sequence[str] | Mapping[str, Any]) -> tuple[Settings, Notes]:
    """The settings of one verb; those of another one are refused."""
    if not given:
        raise ConfigError(f"nothing is named; kitae export {verb} --help says how")
    use, notes = read("export", Settings, given, positional=("model", "candidates"))
    if use.output is not None and not Path(use.output).expanduser().name.strip("."):  # ".", ".." or "/"
        raise ConfigError(
            f"output is {use.output!r}, which names no new {'file' if verb == 'gguf' else 'folder'}; give it a name"
        )
    for name, verbs in ONLY.items():
        if name in notes.origins and verb not in verbs:
            raise ConfigError(
                f"{name} ({notes.origins[name]}) has no effect on {verb}, only on {' and '.join(verbs)}; leave it out"
            )
    if verb in ("merge", "fp8-to-bf16", "bf16-to-fp8") and use.output is None:
        raise ConfigError("output is required; name the folder of the new model with --output")
    if verb == "verify" and not use.candidates:
        raise ConfigError("there is nothing to compare; name exports after the model")
    if use.adapter_only and "type" in notes.origins and use.type.lower() not in ("f16", "f32"):
        raise ConfigError(
            f"type is {use.type!r}, but an adapter alone is written as f16 or f32; name one of them"
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
    if verb == "verify":
        _gate.require_passed(report)
    return report


def text_of(report: Mapping[str, Any]) -> str:
    """The report for a reader."""
    if report["command"] == "verify":
        return _gate.text_of(report)
    checked = f"\n{_gate.text_of(report['verify'])}" if report.get("verify") else ""
    return _written(report) + checked


def _written(report: Mapping[str, Any]) -> str:
    from kitae.train.files import human

    size = human(report["bytes"])
    if report["command"] == "gguf":
        what = f"{report['type']}, {report['tensors']} tensors, {size}: {report['output']}"
        fallbacks = report["fallbacks"]
        return what + (f"\nin other types, as rows need: {', '.join(fallbacks)}" if fallbacks else "")
    files = f"{size} in {report['shards']} file{'s' if report['shards'] > 1 else ''}"
    if report["command"] == "merge":
        did = f"{report['changed']} of {report['tensors']} tensors changed ({report['adapted']} have an adapter)"
        return f"{did}, {files}: {report['output']}\nmerged into {report['base']}"
    return f"{report['converted']} of {report['tensors']} tensors converted, {files}: {report['output']}"


def _require_verb(verb: str) -> None:
    if verb not in VERBS:
        raise ConfigError(f"there is no kitae export {verb}; {did_you_mean(verb, VERBS)}")


def _run(
    verb: str, use: Settings, progress: Progress | None, *, hide: Callable[[], None] | None = None
) -> dict[str, Any]:
    """What a verb does; `hide` takes the progress away before an export is checked."""
    from kitae.export import convert

    if verb == "verify":
        prompts = read_prompts(use.prompts_file) if use.prompts_file else None
        return _gate.compare(
            use.model,
            use.candidates,
            base=use.base,
            dequantize=use.dequantize,
            threads=use.num_workers,
            prompts=prompts,
        )
    check = None
    if not use.no_verify:
        check = _gate.checker(
            use.model, base=use.base, dequantize=use.dequantize, threads=use.num_workers, before=hide
        )
    if verb == "gguf":
        return _run_gguf(use, progress, check)
    output = Path(str(use.output)).expanduser()
    how = convert.How(output=output, overwrite=use.overwrite, num_workers=use.num_workers, check=check)
    if verb != "merge":
        how = replace(how, device=_device_of_blocks(use.device))
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


def _device_of_blocks(name: str) -> torch.device:
    """Where FP8 blocks are computed: a GPU that casts to and from it, else the CPU."""
    from kitae import backends

    device = backends.pick_device(name, setting="device")
    is_fit, reason = backends.of(device).supports("float8")
    if is_fit:
        return device
    if name != "auto":
        raise ConfigError(f"device is {name!r}, but FP8 blocks are not computed there ({reason}); use cpu")
    return backends.pick_device("cpu")


def _run_gguf(use: Settings, progress: Progress | None, check: Check | None) -> dict[str, Any]:
    from kitae.export import gguf, gguf_lora
    from kitae.export.convert import How
    from kitae.export.gguf_types import find_type

    kind = find_type(use.type)
    if use.adapter_only:
        kind = "F32" if kind == "F32" else "F16"  # where no type was given
        output = gguf.default_output(use.model, f"LoRA-{kind}")
    else:
        output = gguf.default_output(use.model, kind)
    output = Path(use.output).expanduser() if use.output else output
    how = How(output=output, overwrite=use.overwrite, num_workers=use.num_workers, check=check)
    if use.adapter_only:
        return gguf_lora.write_lora(use.model, how, kind=kind, base=use.base, progress=progress)
    return gguf.write_gguf(
        use.model,
        how,
        kind=kind,
        base=use.base,
        dequantize=use.dequantize,
        pre_tokenizer=use.pre_tokenizer,
        progress=progress,
    )


@contextmanager
def _shown(is_terminal: bool) -> Iterator[tuple[Progress, Callable[[], None]]]:
    """A bar with bytes per second and time left on a terminal, a line now and then elsewhere; and what ends the bar."""
    from kitae.export.shards import Progress

    if not is_terminal:
        lines = _Lines(lambda text: print(text, file=sys.stderr))
        yield Progress(begin=lines.begin, say=lines.say), lambda: None
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

        def hide() -> None:
            bar.stop()
            print("written; now compared with what it was made of", file=sys.stderr)

        yield Progress(begin=begin, say=say), hide


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
