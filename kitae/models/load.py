"""From a name to a Policy and its tokenizer.

    folder, hub id, run or adapter --files.py--> safe files --estimate.py--> it fits --> weights --> seams --> adapter

Code that comes with a model is not run unless model.trust_remote_code says so, and pickles are never read.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from kitae import backends
from kitae.config import LoraSettings, ModelSettings, SeamSettings
from kitae.errors import ConfigError, ModelError
from kitae.models import checkpointing, estimate, files, placement, quant, score, seams, torch_compile
from kitae.models import lora as adapters
from kitae.models.bars import bars_for
from kitae.models.families import Family, find_family
from kitae.models.policy import Policy
from kitae.plugins import did_you_mean

log = logging.getLogger(__name__)
P = TypeVar("P", bound=Policy)


def load_tokenizer(model: ModelSettings) -> Any:
    """The tokenizer exactly as tokenizer.json has it, a transformers PreTrainedTokenizerFast.

    transformers would choose a class by the model's type, which changes how some models split text.
    """
    from transformers import PreTrainedTokenizerFast

    if model.tokenizer is not None:
        folder = files.find_folder(model.tokenizer, revision=None)
        config = folder / "config.json"
    else:
        found = files.find_model(model.name_or_path, revision=model.revision)
        has_own = found.adapter is not None and (found.adapter / "tokenizer.json").is_file()
        folder = found.adapter if has_own and found.adapter is not None else found.folder
        config = found.folder / "config.json"
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{folder} has no tokenizer.json; name another with model.tokenizer, or write one there with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        raise ModelError(f"{folder}/tokenizer.json cannot be read: {error}") from error
    if config.is_file():
        size = files.read_config(config.parent).get("vocab_size")
        largest = max(tokenizer.get_vocab().values(), default=-1)
        if isinstance(size, int) and largest >= size:
            raise ModelError(
                f"{folder}/tokenizer.json has token ids up to {largest:,}, but {config} has vocab_size {size:,}; "
                "they do not belong together"
            )
    return tokenizer


def load_policy(
    model: ModelSettings,
    *,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    optimizer: str = "adamw",
    ranks: int = 1,
    packed_types: Collection[str] = (),
    tokens_per_pass: int = 2048,
    may_spread: bool = False,
) -> Policy:
    """Load a model with its seams, and with its adapter where it has one or `lora` asks for one.

    `trainable` False freezes everything: for sampling, evaluation, or a reference. `optimizer` (optim.name), the number
    of ranks that share the work, and the model types whose weights a sampler on a CPU will hold a second time only matter
    to the memory estimate; `tokens_per_pass`, the most of a forward pass, to gradient_checkpointing auto. With
    `may_spread`, a frozen model that one device cannot hold lies on all of the machine's (placement.py).
    """
    return load_as(
        Policy,
        model,
        lora=lora,
        trainable=trainable,
        optimizer=optimizer,
        ranks=ranks,
        packed_types=packed_types,
        tokens_per_pass=tokens_per_pass,
        may_spread=may_spread,
    )


def load_as(
    kind: type[P],
    model: ModelSettings,
    *,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    optimizer: str = "adamw",
    ranks: int = 1,
    packed_types: Collection[str] = (),
    tokens_per_pass: int = 2048,
    may_spread: bool = False,
) -> P:
    """What load_policy and load_critic have in common; `kind` says which transformers class holds the weights."""
    rank = lora.rank if lora is not None and trainable else 0
    found = files.find_model(model.name_or_path, revision=model.revision, with_code=model.trust_remote_code)
    _check_adapter(found, (lora or LoraSettings()) if trainable else None)
    config = _load_config(found.folder, kind=kind, trust_remote_code=model.trust_remote_code)
    stored = _stored_quantization(config)
    _check_stored(stored, model, trains_all=trainable and not rank)
    weights = files.weight_files(found.folder)
    score.check(found.folder, weights, config, is_wanted=kind.gives_scores)

    device = backends.pick_device(model.device)
    backends.of(device).prepare()
    dtype = _choose_dtype(model, device)
    plan = estimate.Plan(
        dtype=dtype,
        lora_rank=rank,
        target_modules=lora.target_modules if lora is not None else "all-linear",
        nf4=model.quantization == "nf4" or stored == "bitsandbytes",
        trainable=trainable,
        optimizer=optimizer,
        ranks=ranks,
        packed_copy=device.type == "cpu" and config.model_type in packed_types,
    )
    meta = None
    room: int | None = None
    places: Mapping[str, torch.device] = {"": device}
    if not model.trust_remote_code:
        meta = estimate.build_on_meta(config, scores=kind.gives_scores)
        places, room = _places_and_room(meta, plan, model, device=device, may_spread=may_spread)
    way: checkpointing.Way = "keep"
    if trainable:
        way = checkpointing.choose(
            model, config, dtype=dtype, device=device, tokens=tokens_per_pass, room=room
        )

    causal_lm = _load_weights(
        model, found, config, weights, kind=kind, stored=stored, dtype=dtype, places=places, meta=meta
    )
    if kind.gives_scores:
        score.prepare(causal_lm, weights)
    family = find_family(causal_lm.config.model_type)
    used = _install_seams(causal_lm, model, family, device=device, dtype=dtype, trainable=trainable)
    peft: Any = None
    reference: str | None = None
    if found.adapter is not None:
        load_adapter = score.load_adapter if kind.gives_scores else adapters.load_adapter
        peft, reference = load_adapter(causal_lm, found.adapter, trainable=trainable, dtype=dtype)
    elif lora is not None and rank:
        causal_lm.requires_grad_(False)
        peft = adapters.add_adapter(causal_lm, lora, dtype=dtype, scores=kind.gives_scores)
    else:
        causal_lm.requires_grad_(trainable)
    if not trainable:
        causal_lm.requires_grad_(False)
    checkpointing.apply(causal_lm, way)
    policy = kind(
        causal_lm,
        dtype=dtype,
        seams=used,
        family=family,
        peft=peft,
        reference_adapter=reference,
        base_name=found.name,
    )
    if model.torch_compile:
        torch_compile.compile_layers(policy.layers, device=device)
    return policy.train(trainable)


def _places_and_room(
    meta: Any, plan: estimate.Plan, model: ModelSettings, *, device: torch.device, may_spread: bool
) -> tuple[Mapping[str, torch.device], int | None]:
    """Where each module goes, and the bytes left for activations (None: the estimate was not tested for its family).

    PlanError where the model does not fit.
    """
    places: Mapping[str, torch.device] = {"": device}
    free, total = backends.of(device).memory(device)
    if device.type == "cpu":  # ranks of one machine share it
        free, total = free // plan.ranks, total // plan.ranks
    if may_spread and not plan.trainable and ":" not in model.device:
        places = placement.spread(meta, plan, device=device, name=model.name_or_path) or places
    if len(places) > 1:
        memory = [backends.of(d).memory(d) for d in sorted(set(places.values()), key=str)]
        free, total = (sum(sizes) for sizes in zip(*memory, strict=True))
    need = estimate.require_fit(meta, plan, name=model.name_or_path, free=free, total=total)
    log.info("memory: %.2f GiB needed, activations aside; %.2f free", need.total_bytes / 2**30, free / 2**30)
    is_tested = find_family(meta.config.model_type).is_tested
    return places, free - need.total_bytes - int(estimate.RESERVE * total) if is_tested else None


def _install_seams(
    causal_lm: Any,
    model: ModelSettings,
    family: Family,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trainable: bool,
) -> SeamSettings:
    """Put the seams in, and say which ones hold."""
    wanted = model.seams.model_copy(update={"kernels": model.seams.kernels and not model.torch_compile})
    used = seams.install(causal_lm, wanted, family)
    uses_flex = False
    if trainable and used.attention and wanted.flex and backends.of(device).supports("flex_attention")[0]:
        from kitae.models import flex  # imports torch's compiler

        uses_flex = flex.install(causal_lm, device=device, dtype=dtype)
    return used.model_copy(update={"flex": uses_flex})


def _check_stored(stored: str | None, model: ModelSettings, *, trains_all: bool) -> None:
    """Refuse what weights in fewer bits cannot do; `trains_all`: the weights themselves are to train."""
    if model.quantization == "nf4" and trains_all:
        raise ConfigError("model.quantization nf4 freezes the weights; set lora.rank, for example to 16")
    if stored == "fp8" and model.quantization == "nf4":
        raise ConfigError(
            f"model.quantization is nf4, but the weights of {model.name_or_path} are stored in FP8 and load as bfloat16; "
            "set it to none, or save them once as bfloat16"
        )
    if stored == "fp8" and model.trust_remote_code:
        raise ConfigError(
            "FP8 weights load into transformers' own classes only; set model.trust_remote_code to false"
        )
    if stored == "bitsandbytes" and trains_all:
        raise ConfigError(
            f"{model.name_or_path} is stored in 4 bits, which cannot train; set lora.rank, such as 16"
        )


def _check_adapter(found: files.ModelFiles, wanted: LoraSettings | None) -> None:
    """An adapter that goes on training stays what it is: another rank is refused, other settings are named."""
    if found.adapter is None or wanted is None:
        return
    own = files.read_json(found.adapter / "adapter_config.json")
    if wanted.rank != own.get("r"):
        raise ConfigError(
            f"lora.rank is {wanted.rank}, but the adapter in {found.adapter} has rank {own.get('r')}; set lora.rank = "
            f"{own.get('r')} to go on training it"
        )
    ours = {"alpha": "lora_alpha", "dropout": "lora_dropout", "bias": "bias", "use_rslora": "use_rslora"}
    kept = [f"{name} {own[k]}" for name, k in ours.items() if k in own and own[k] != getattr(wanted, name)]
    if kept:
        log.warning("the adapter in %s goes on as it was made, with %s", found.adapter, ", ".join(kept))


def _load_config(folder: Path, *, kind: type[Policy] = Policy, trust_remote_code: bool) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto import CONFIG_MAPPING, modeling_auto

    raw = files.read_config(folder)
    if trust_remote_code:
        names = sorted(file.name for file in folder.glob("*.py"))
        log.warning("running code that comes with the model: %s in %s", ", ".join(names) or "no file", folder)
        return AutoConfig.from_pretrained(folder, trust_remote_code=True)
    name = raw["model_type"]
    # A critic is a causal model too: it reads a score at every position.
    known = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if kind.gives_scores:
        known &= set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    if name not in known:
        raise ModelError(
            f"{folder}/config.json has model_type {name!r}, which the installed transformers has no causal language "
            f"model for{' with scores' if kind.gives_scores else ''}; "
            f"{did_you_mean(name, ['llama', 'qwen2', 'qwen3', 'deepseek_v3'])}"
        )
    try:
        return CONFIG_MAPPING[name].from_dict(raw)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise ModelError(f"{folder}/config.json is not a valid {name} configuration: {error}") from error


def _stored_quantization(config: Any) -> str | None:
    """How the checkpoint's weights are stored: None plain, "fp8" in blocks, "bitsandbytes"; others are refused."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method is None and isinstance(stored, dict) and stored.get("load_in_4bit"):
        method = "bitsandbytes"
    if method == "bitsandbytes" and not stored.get("load_in_4bit"):
        method = "bitsandbytes 8-bit"
    if method not in ("fp8", "bitsandbytes"):
        raise ModelError(
            f"its weights are stored as {method!r}; kitae reads plain, FP8 block-scaled and bitsandbytes 4-bit weights, "
            "so take the model's original weights"
        )
    return str(method)


def _choose_dtype(model: ModelSettings, device: torch.device) -> torch.dtype:
    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        reason = f"model.dtype is {model.dtype}"
    else:
        backend = backends.of(device)
        is_fast, reason = backend.supports("bfloat16")
        second = torch.float16 if backend.supports("float16")[0] else torch.float32
        dtype = torch.bfloat16 if is_fast else second
    where = "model.device is auto" if model.device == "auto" else f"model.device is {model.device}"
    log.info("dtype %s (%s), device %s (%s)", str(dtype).removeprefix("torch."), reason, device, where)
    return dtype


def _load_weights(
    model: ModelSettings,
    found: files.ModelFiles,
    config: Any,
    weights: dict[str, Path],
    *,
    kind: type[Policy],
    stored: str | None,
    dtype: torch.dtype,
    places: Mapping[str, torch.device],
    meta: Any,
) -> Any:
    """The transformers model on its device; every parameter but a new score head must come from the checkpoint."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GenerationConfig

    source: Path | None = found.folder
    options: dict[str, Any] = {}
    if stored == "fp8":
        rows, columns = config.quantization_config.get("weight_block_size") or (128, 128)
        options["state_dict"] = quant.fp8_state(weights, block=(rows, columns), dtype=dtype)
        del config.quantization_config
        source = None
    elif stored == "bitsandbytes":
        quant.require_bitsandbytes(f"{model.name_or_path}, stored in 4 bits,")
    elif model.quantization == "nf4":
        keep = adapters.unquantized(meta) if meta is not None else ["lm_head"]
        options["quantization_config"] = quant.nf4_config(dtype=dtype, keep=keep)
    if source is not None:
        options |= {"use_safetensors": True, "local_files_only": True}
    architecture: Any = AutoModelForSequenceClassification if kind.gives_scores else AutoModelForCausalLM
    if source is None:
        architecture = type(meta)
    elif model.trust_remote_code:
        options["trust_remote_code"] = True
    num_bytes = sum(file.stat().st_size for file in set(weights.values()))
    try:
        with bars_for(num_bytes), score.without_load_report() if kind.gives_scores else nullcontext():
            causal_lm, report = architecture.from_pretrained(
                source,
                config=config,
                dtype=dtype,
                device_map=None if all(d.type == "cpu" for d in places.values()) else dict(places),
                output_loading_info=True,
                **options,
            )
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(f"{model.name_or_path} cannot be loaded: {str(error).splitlines()[0]}") from error
    missing = sorted(set(report["missing_keys"]) - {score.WEIGHT})
    if missing or report["mismatched_keys"]:
        raise ModelError(
            f"{model.name_or_path}: {len(missing)} weights are missing and {len(report['mismatched_keys'])} have "
            f"another shape than config.json says, such as {(missing or sorted(report['mismatched_keys']))[0]}"
        )
    quant.keep_training_layout(causal_lm)
    if (found.folder / "generation_config.json").is_file() and source is None:
        causal_lm.generation_config = GenerationConfig.from_pretrained(found.folder)
    return causal_lm
