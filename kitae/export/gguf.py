"""A model, or an adapter on its base, as a GGUF file for llama.cpp.

model --source.py--> float32 rows --gguf_tensors.py--> llama.cpp's tensors --gguf_types.py, blocks.py--> bytes --> file

The adapter is merged as the rows pass, from the full-precision base; no merged model is written first.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kitae.config import ModelSettings
from kitae.errors import ConfigError, ModelError, RunDirError
from kitae.export import folders, gguf_file, shards
from kitae.export.convert import How
from kitae.export.disk import os_errors
from kitae.export.gguf_metadata import model_metadata, num_experts
from kitae.export.gguf_tensors import architecture, targets_of
from kitae.export.gguf_types import FILE_TYPES, OWN, Typed, choose, find_type
from kitae.export.gguf_vocab import load_template, tokenizer_metadata
from kitae.export.shards import Progress
from kitae.export.source import Source, open_source
from kitae.models.load import load_tokenizer
from kitae.train.files import free_bytes, human

log = logging.getLogger(__name__)

QUANTIZER = "llama-quantize"
LARGE = 80
"""Layers from which llama.cpp takes a Llama or Qwen2 for one of 70B."""
SHOWN = 3


def default_output(model: str, kind: str) -> Path:
    """NAME-GGUF/NAME-Q4_K_M.gguf, in the present folder."""
    name = (
        Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model.split("/")[-1]
    )
    return Path(f"{name}-GGUF") / f"{name}-{kind}.gguf"


def write_gguf(
    model: str,
    how: How,
    *,
    kind: str = "Q4_K_M",
    base: str | None = None,
    dequantize: bool = False,
    pre_tokenizer: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write one file of the type `kind`; the report lists the tensors whose rows did not fit their type's blocks."""
    kind = find_type(kind)
    gguf_file.require_gguf()
    quantizer = None if kind in OWN else _find_quantizer(kind)
    source = open_source(model, base=base, dequantize=dequantize)
    own = kind if quantizer is None else "BF16"
    name = how.output.name if quantizer is None else f"bf16-for-{how.output.name}"
    typed, file = plan_file(source, own, name=name, title=how.output.stem, pre=pre_tokenizer)
    log.info("%s of %s: %s", own, model, human(file.num_bytes))
    identity = {
        "command": "gguf",
        "options": {"type": kind, "pre_tokenizer": pre_tokenizer, "dequantize": dequantize},
        "source": [folders.stamp(path) for path in source.weights.files],
        "adapter": []
        if source.adapter is None
        else [folders.stamp(source.adapter / name) for name in folders.ADAPTER_FILES],
    }
    with os_errors(how.output.parent):
        how.output.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {
        "identity": identity, "num_workers": how.threads, "progress": progress or Progress()
    }  # fmt: skip
    size = file.num_bytes
    if quantizer is None:
        checked = gguf_file.write(file, how.output, overwrite=how.overwrite, check=how.check, **options)
    else:
        checked, size = _through_quantizer(quantizer, kind, file, how, options)
    fallbacks = [f"{t.target.name} ({t.wanted} to {t.kind})" for t in typed if t.kind != t.wanted]
    if fallbacks:
        more = f" and {len(fallbacks) - SHOWN} more" if len(fallbacks) > SHOWN else ""
        log.warning("rows that do not fit their type: %s%s", ", ".join(fallbacks[:SHOWN]), more)
    report = {
        "command": "gguf",
        "model": str(source.adapter or source.weights.folder),
        "base": str(source.weights.folder),
        "output": str(how.output),
        "type": kind,
        "tensors": len(typed),
        "bytes": size,
        "fallbacks": fallbacks,
    }
    return report if checked is None else {**report, "verify": checked}


def plan_file(
    source: Source, kind: str, *, name: str, title: str, pre: str | None = None
) -> tuple[list[Typed], gguf_file.File]:
    """The typed tensors, and the file they make up."""
    config = source.config
    arch = architecture(config)
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(source.folder), tokenizer=str(source.folder)))
    template = load_template(tokenizer)
    targets = targets_of(source)
    vocab_size = next(t.shape[0] for t in targets if t.name == "token_embd.weight")
    if (largest := max(tokenizer.get_vocab().values())) >= vocab_size:
        raise ModelError(
            f"{source.folder}/tokenizer.json has token ids up to {largest:,}, but the model has {vocab_size:,}; they do "
            "not belong together"
        )
    num_layers = int(config["num_hidden_layers"])
    typed = choose(
        targets,
        kind,
        num_layers=num_layers,
        num_experts=num_experts(config),
        is_70b=arch in ("llama", "qwen2")
        and num_layers == LARGE
        and config.get("num_key_value_heads") != config["num_attention_heads"],
    )

    def describe(writer: Any) -> None:
        writer.add_type("model")
        writer.add_name(title)
        writer.add_file_type(FILE_TYPES[kind])
        writer.add_quantization_version(2)
        model_metadata(writer, config, vocab_size=vocab_size)
        tokenizer_metadata(writer, tokenizer, template, size=vocab_size, pre=pre)

    return typed, gguf_file.plan(name, arch, typed, describe)


# other types -----------------------------------------------------------------------------------------------------


def _find_quantizer(kind: str) -> str:
    found = shutil.which(QUANTIZER)
    if found is None:
        raise ConfigError(
            f"type {kind} is written by llama.cpp's {QUANTIZER}, which is not on the PATH; install llama.cpp, or take one "
            f"of {', '.join(OWN)}"
        )
    return found


def _through_quantizer(
    quantizer: str, kind: str, file: gguf_file.File, how: How, options: dict[str, Any]
) -> tuple[dict[str, Any] | None, int]:
    """Write BF16 aside, let llama-quantize read it, and remove it; the check's report, and the bytes of the file."""
    identity = options["identity"]
    with gguf_file.prepare(how.output, identity=identity, overwrite=how.overwrite) as folder:
        between, written = folder / file.name, folder / how.output.name
        if not shards.is_finished(written, identity=identity):
            _require_space(kind, file, folder)
            shards.write(folder, [file], **options)
            aside = folder / f".tmp-{how.output.name}"
            _run([quantizer, str(between), str(aside), kind, str(how.threads)])
            shards.finish(aside, written, identity=identity)
        between.unlink(missing_ok=True)
        size = written.stat().st_size
        return gguf_file.publish(folder, written, how.output, check=how.check), size


def _require_space(kind: str, file: gguf_file.File, folder: Path) -> None:
    there = folder / file.name
    needed = 2 * file.num_bytes - (there.stat().st_size if there.exists() else 0)
    free = free_bytes(folder)
    if free is not None and free < needed:
        raise RunDirError(
            f"disk too small: {kind} takes up to {human(needed)} while it is made, have {human(free)} at {folder}; "
            "make space, or choose another --output"
        )


def _run(command: Sequence[str]) -> None:
    with os_errors(Path(command[2])):
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ModelError(f"{command[0]} failed ({done.returncode}): {' '.join(last)}")
