"""What an export says beside its weights, against what it was made of: where completions end, tokens, template, sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kitae.errors import ModelError
from kitae.export.gguf_file import require_gguf
from kitae.export.gguf_metadata import model_metadata
from kitae.export.gguf_read import Opened
from kitae.export.gguf_tensors import architecture
from kitae.export.gguf_vocab import load_template, tokenizer_metadata
from kitae.export.pretokenizers import EXPRESSIONS, find_pretokenizer, unlike_probes
from kitae.export.source import Source
from kitae.export.verify_answers import tokenizer_of
from kitae.models.files import read_json

GENERATION = "generation_config.json"
SHOWN = 40
"""Characters of a value that a message shows."""


def end_differences(folder: Path, source: Source) -> list[str]:
    """Where a folder tells other programs to end completions otherwise than what it was made of."""
    told = source.weights.folder
    if source.adapter is not None and (source.adapter / GENERATION).is_file():
        told = source.adapter
    wanted, found = _ends(told), _ends(folder)
    if not wanted or wanted == found:
        return []
    return [f"{GENERATION} and config.json end completions at ids {sorted(found)}, not {sorted(wanted)}"]


def _ends(folder: Path) -> set[int]:
    """eos_token_id as transformers and engines read it: of generation_config.json, else of config.json."""
    for name in (GENERATION, "config.json"):
        content = read_json(folder / name) if (folder / name).is_file() else {}
        ids = content.get("eos_token_id")
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {ids}
    return set()


def metadata_differences(opened: Opened, source: Source) -> list[str]:
    """What a file says otherwise than it would if it were written now: tokens, ids, template, sizes."""
    gguf = require_gguf()
    writer = gguf.GGUFWriter(None, architecture(source.config))
    tokenizer = tokenizer_of(source.folder)
    vocab_size = opened.shape("token_embd.weight")[0] if "token_embd.weight" in opened.tensors else 0
    is_byte_level = opened.metadata.get("tokenizer.ggml.model") == "gpt2"
    pre = opened.metadata.get("tokenizer.ggml.pre") if is_byte_level else None  # others have but one
    model_metadata(writer, source.config, vocab_size=vocab_size)
    tokenizer_metadata(writer, tokenizer, load_template(tokenizer), size=vocab_size, pre=pre)
    found = []
    for key, value in writer.kv_data[0].items():
        if key not in opened.metadata:
            found.append(f"{key} is missing")
        elif not _is_same(value.value, opened.metadata[key]):
            is_, wanted = apart(opened.metadata[key], value.value)
            found.append(f"{key} is {short(is_)}, not {short(wanted)}")
    if is_byte_level:
        found += _pretokenizer_differences(pre, tokenizer.backend_tokenizer)
    return found


def _pretokenizer_differences(pre: Any, core: Any) -> list[str]:
    """How a file's pre-tokenizer cuts text otherwise than the tokenizer, where one is known that does not."""
    try:
        known = find_pretokenizer(core)
    except ModelError:  # single characters, or one that was named by hand: the prompts' ids tell
        return []
    if pre == known or pre not in EXPRESSIONS or not (unlike := unlike_probes(core, pre)):
        return []
    return [f"tokenizer.ggml.pre is {pre}, which cuts {short(unlike[0])} otherwise than {known}"]


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        return abs(a - float(b)) <= 1e-6 * max(1.0, abs(a))
    if isinstance(a, list | tuple):
        return list(a) == list(b)
    return bool(a == b)


def apart(a: Any, b: Any) -> tuple[Any, Any]:
    """Two values that differ; of long texts, such as templates, only what comes from the first difference on."""
    if not (isinstance(a, str) and isinstance(b, str)) or max(len(a), len(b)) <= SHOWN:
        return a, b
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return (f"...{a[same:]}", f"...{b[same:]}") if same else (a, b)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
