"""What kitae serve hands to an external engine: base and adapters, template, devices, context."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kitae.config import DataSettings, require
from kitae.errors import ConfigError

if TYPE_CHECKING:
    from kitae.cli.serve import Settings
    from kitae.serve.external import Wanted

log = logging.getLogger(__name__)
LLAMA_CPP_ONLY = ("n_gpu_layers", "cache_type_k", "cache_type_v", "threads")
OWN_ONLY = ("quantization", "kv_cache_tokens", "device", "tokenizer", "raw", "max_queue", "max_request_mib",
            "max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "no_repeat_ngram_size",
            "seed", "stop")  # fmt: skip
"""Settings of kitae's own engines, which another engine would not follow."""


def check(use: Settings) -> None:
    """Refuse settings that the engine would not follow."""
    for setting in OWN_ONLY:
        given = getattr(use, setting, None)
        default = type(use).model_fields[setting].get_default(call_default_factory=True)
        require(
            given == default,
            f"--{setting} has no effect with --engine {use.engine}; leave it out, or use engine_args",
        )
    if use.engine == "llama.cpp":
        require(
            use.system_prompt is None,
            "--system_prompt has no effect with --engine llama.cpp; requests may carry one",
        )
        return
    for setting in LLAMA_CPP_ONLY:
        require(
            getattr(use, setting) is None,
            f"--{setting} has no effect with --engine {use.engine}; leave it out",
        )


def wanted(
    use: Settings, *, name: str, adapters: dict[str, Path], port: int, key: str, folder: Path
) -> Wanted:
    """The settings in words that do not depend on the engine."""
    from kitae.serve.external import Wanted

    common: dict[str, Any] = {
        "host": use.host,
        "port": port,
        "key": key,
        "folder": folder,
        "split_thinking": use.reasoning_format == "split",
        "max_rows": use.batch_size,
        "context": use.max_model_len,
        "extra": use.engine_args,
    }
    if use.engine == "llama.cpp":
        own = {setting: getattr(use, setting) for setting in LLAMA_CPP_ONLY}
        text = _file_text(use.template) if use.template else None
        return Wanted(model=use.model, name=name, adapters=adapters, template=text, **common, **own)
    return _for_gpus(use, name, adapters, common)


def _for_gpus(use: Settings, name: str, adapters: dict[str, Path], common: dict[str, Any]) -> Wanted:
    from kitae import backends
    from kitae.data.chat import Template
    from kitae.models import files
    from kitae.models.load import load_tokenizer
    from kitae.serve.external import Wanted, template_with_system, tensor_parallel

    found = files.find_model(use.model, revision=use.revision, with_code=use.trust_remote_code)
    # An adapter folder or a LoRA run: its base, and the adapter by the model's own name.
    if found.adapter is not None:
        adapters = {name: found.adapter, **adapters}
        name = f"{name}-base"
    template = Template.load(
        load_tokenizer(use.model_settings()),
        data=DataSettings(system_prompt=use.system_prompt, template=use.template),
        must_chat=False,
    )
    require(
        template.can_chat or not use.system_prompt,
        f"--system_prompt has no effect: {use.model} has no chat template; leave it out, or name one with --template",
    )
    config = files.read_config(found.folder)
    unknown = sorted(
        set(template.stop_ids) - _stops_it_reads(found.folder, config, template.tokenizer.eos_token_id)
    )
    if unknown:
        log.warning(
            "%s reads where to stop from generation_config.json, which lacks %s; add them to its eos_token_id",
            use.engine,
            unknown,
        )
    return Wanted(
        model=str(found.folder),
        name=name,
        adapters={adapter: path.resolve() for adapter, path in adapters.items()},
        template=template_with_system(template.text, template.system_prompt) if template.can_chat else None,
        devices=tensor_parallel(backends.pick().count(), config.get("num_attention_heads") or 1),
        is_moe=any(config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts")),
        dtype=use.dtype,
        trust_remote_code=use.trust_remote_code,
        **common,
    )


def _stops_it_reads(folder: Path, config: dict[str, Any], eos: int | None) -> set[int]:
    """Ids that an engine stops at by itself: those of generation_config.json, config.json and the tokenizer."""
    generation: dict[str, Any] = {}
    path = folder / "generation_config.json"
    if path.is_file():
        generation = json.loads(path.read_text(encoding="utf-8"))
    values = (generation.get("eos_token_id"), config.get("eos_token_id"), eos)
    return {i for value in values for i in (value if isinstance(value, list) else [value]) if i is not None}


def _file_text(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template: cannot read {path}: {error}") from error
