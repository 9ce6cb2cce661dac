"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft, so that an adapter folder is peft's own.

Fused experts are adapted too. peft 0.21 turns gate_proj, up_proj and down_proj of such a model into the routed
experts' parameters and drops the dense layers of those names, so here every weight is named: linears that peft would
misread become `target_parameters` "<parent>.<name>.weight". The coverage table says what was really adapted.
"""

from __future__ import annotations

import hashlib
import math
import types
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kitae.config import LoraSettings
from kitae.errors import ConfigError, ModelError
from kitae.models import adapted, experts, seams
from kitae.models.files import header, weight_files
from kitae.plugins import did_you_mean

if TYPE_CHECKING:
    from rich.table import Table

ADAPTER, REFERENCE = "default", "reference"
"""peft's names of the adapter that trains, and of the frozen copy of the one a run started from."""
SHOWN = 3
LONGEST_REASON = 500
MISREAD = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
"""Names of linears that peft takes for routed experts in a model that has fused ones."""
FUSED_FROM = {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "w1": "gate_up_proj",
    "w3": "gate_up_proj",
    "w2": "down_proj",
}
"""Names of single experts' weights, and the fused parameter that holds them."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The weights an adapter is put on, by their full names in the model."""

    linears: list[str]
    fused: list[str]
    """Parameters [E, out, in] of routed experts."""


def find_targets(causal_lm: Any, wanted: list[str] | str) -> Targets:
    """Resolve lora.target_modules: all-linear, or names of modules; every name must adapt something."""
    head = _head_modules(causal_lm)
    linears = [name for name, m in causal_lm.named_modules() if isinstance(m, nn.Linear) and m not in head]
    fused = [
        f"{name}.{parameter}"
        for name, m in causal_lm.named_modules()
        if experts.is_plain(m)
        for parameter in ("gate_up_proj", "down_proj")
    ]
    if not linears and not fused:
        raise ModelError(
            f"this {causal_lm.config.model_type} model has no linear layers, which adapters and 4-bit weights need; set "
            "lora.rank to 0 and model.quantization to none"
        )
    if isinstance(wanted, str):
        return Targets(linears, fused)
    chosen: set[str] = set()
    for target in wanted:
        found = [n for n in linears if f".{n}".endswith(f".{target}")]
        inside = FUSED_FROM.get(target, target)
        found += [
            n for n in fused if f".{n}".endswith(f".{inside}") or n.rpartition(".")[0].endswith(f".{target}")
        ]
        if not found:
            known = sorted({n.rpartition(".")[2] for n in linears + fused})
            raise ModelError(
                f"lora.target_modules: {target!r} adapts nothing in this {causal_lm.config.model_type} model; "
                f"{did_you_mean(target, known)}"
            )
        chosen.update(found)
    half = {"gate_proj", "up_proj"} & set(wanted)
    if len(half) == 1 and any(n.endswith("gate_up_proj") for n in chosen):
        raise ModelError(
            f"lora.target_modules has {half.pop()!r} alone, but this model's experts hold gate_proj and up_proj as "
            "one tensor; name both, or give the full path of a dense layer"
        )
    return Targets([n for n in linears if n in chosen], [n for n in fused if n in chosen])


def unquantized(causal_lm: Any) -> list[str]:
    """Modules that 4-bit storage must leave alone: the head, and linears that peft adapts as parameters."""
    head = _head_modules(causal_lm)
    everything = find_targets(causal_lm, "all-linear")
    misread = [n for n in everything.linears if everything.fused and n.rpartition(".")[2] in MISREAD]
    return [*(name for name, module in causal_lm.named_modules() if module in head), *misread]


def _head_modules(causal_lm: Any) -> set[nn.Module]:
    """The output layer, or a critic's score, with what peft may have put inside it."""
    head = causal_lm.get_output_embeddings()
    head = getattr(causal_lm, "score", None) if head is None else head
    return set() if head is None else set(head.modules())


def add_adapter(causal_lm: Any, settings: LoraSettings, *, dtype: torch.dtype, scores: bool = False) -> Any:
    """Inject a fresh adapter into the model and return peft's wrapper around it.

    `scores`: the model is a sequence classifier, whose score head trains whole and is saved with the adapter. Start
    values depend on lora.init_seed and on each parameter's name only, so every layout starts alike.
    """
    from peft import LoraConfig, get_peft_model

    targets = find_targets(causal_lm, settings.target_modules)
    modules, parameters = _peft_targets(causal_lm, targets)
    if parameters and settings.dropout:
        raise ConfigError(
            f"lora.dropout is {settings.dropout}, which adapters on the MLPs of a model with fused experts cannot "
            "have; set it to 0, or name only attention layers in lora.target_modules"
        )
    packed = [n for n, p in causal_lm.named_parameters() if not p.is_floating_point()]
    packed = [n for n in packed if any(n.endswith(f".{target}") for target in parameters)]
    if packed:
        raise ModelError(
            f"lora.target_modules: {packed[0]} is stored in 4 bits, where a model with fused experts cannot adapt it; "
            "name only attention layers"
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft multiplies by it; a float is as good
        lora_dropout=settings.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        bias=settings.bias,
        use_rslora=settings.use_rslora,
        task_type="SEQ_CLS" if scores else "CAUSAL_LM",
    )
    with without_peft_chatter():
        wrapper = get_peft_model(causal_lm, config, autocast_adapter_dtype=False)
    finish(causal_lm, dtype)
    for name, parameter in adapter_parameters(causal_lm):
        _initialise_(name, parameter, settings.init_seed)
    missing = _count(targets) - Counter(_adapted_kind(name) for name, _ in _adapted(causal_lm))
    if missing:
        raise ModelError(
            f"peft left these layers without an adapter: {dict(missing)}; report it with the model's name"
        )
    return wrapper


def load_adapter(
    causal_lm: Any, folder: Path, *, trainable: bool, dtype: torch.dtype
) -> tuple[Any, str | None]:
    """Put an adapter folder on the model; to go on training it, a frozen copy stays as the run's reference.

    Returned are peft's wrapper and the name of that copy, None where the adapter does not train. An adapter that has
    tensors without a place in the model, or lacks some, is refused.
    """
    from peft import PeftModel

    again = REFERENCE if trainable else ADAPTER
    try:
        with without_peft_chatter():
            wrapper = PeftModel.from_pretrained(
                causal_lm, folder, adapter_name=ADAPTER, is_trainable=trainable, autocast_adapter_dtype=False
            )
            # Without a reference it is loaded once more all the same: only this tells what found no place.
            loaded: Any = wrapper.load_adapter(
                folder, again, is_trainable=False, autocast_adapter_dtype=False
            )
            if trainable:
                wrapper.set_adapter(ADAPTER)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"the adapter {folder} does not fit this model: {reason[:LONGEST_REASON]}"
        ) from error
    _require_all_in_place(folder, loaded, again)
    finish(causal_lm, dtype)
    return wrapper, REFERENCE if trainable else None


def _require_all_in_place(folder: Path, loaded: Any, adapter: str) -> None:
    """Refuse an adapter of which peft loaded but a part; `loaded` is what peft says of that."""
    shapes = {
        name: shape
        for file in set(weight_files(folder).values())
        for name, (_, shape) in header(file).items()
    }

    def named(keys: list[str]) -> str:
        names = sorted(key.replace(f".{adapter}.", ".") for key in keys)
        shown = ", ".join(f"{name} {shapes.get(name, '')}".rstrip() for name in names[:SHOWN])
        return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    for keys, what in (
        (loaded.unexpected_keys, "without a place there"),
        (loaded.missing_keys, "missing in it"),
    ):
        if keys:
            raise ModelError(
                f"the adapter {folder} does not fit this model; {what}: {named(keys)}; use it with the model it was "
                "trained on"
            )


@contextmanager
def without_peft_chatter() -> Iterator[None]:
    """Inside it peft's use of a name that transformers renamed is not told to the user, who cannot change it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        yield


def adapter_parameters(causal_lm: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The matrices of the adapter that trains, by their names in the model."""
    for name, parameter in causal_lm.named_parameters():
        if ".lora_" in name and f".{ADAPTER}." in name:
            yield name, parameter


@dataclass(frozen=True, slots=True, kw_only=True)
class CoverageRow:
    """One kind of layer: in how many layers it occurs, and in how many it was adapted."""

    target: str
    layers: int
    adapted: int
    parameters: int
    """Of its adapters, in all layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What a run trains, shown before its first step."""

    rows: list[CoverageRow]
    trainable: int
    total: int
    expert_bytes: int
    """Bytes of routed experts, which quantization leaves as they are."""


def coverage(causal_lm: Any) -> Coverage:
    """Count targets, layers and trainable parameters of a model with or without adapters."""
    candidates = Counter(_kind(name) for name in _candidates(causal_lm))
    adapted = Counter(_adapted_kind(name) for name, _ in _adapted(causal_lm))
    sizes: Counter[str] = Counter()
    for name, module in _adapted(causal_lm):
        matrices = [*module.lora_A.values(), *module.lora_B.values()]
        sizes[_adapted_kind(name)] += sum(
            p.numel() for m in matrices for p in m.parameters() if p.requires_grad
        )
    rows = [
        CoverageRow(target=kind, layers=n, adapted=adapted[kind], parameters=sizes[kind])
        for kind, n in sorted(candidates.items())
    ]
    parameters = [p for name, p in causal_lm.named_parameters() if f".{REFERENCE}." not in name]
    return Coverage(
        rows=rows,
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        total=sum(logical_size(p) for p in parameters),
        expert_bytes=sum(p.numel() * p.element_size() for p in parameters if p.dim() == 3),
    )


def coverage_table(found: Coverage) -> Table:
    """The coverage as a table for the terminal and the log."""
    from rich.table import Table

    share = f"{found.trainable:,} of {found.total:,} parameters train ({found.trainable / found.total:.2%})"
    experts_gib = (
        f"; routed experts stay unquantized, {found.expert_bytes / 2**30:.2f} GiB"
        if found.expert_bytes
        else ""
    )
    table = Table("target", "layers", "adapted", "parameters", caption=share + experts_gib)
    for row in found.rows:
        table.add_row(row.target, str(row.layers), str(row.adapted), f"{row.parameters:,}")
    return table


def zero_gradient_adapters(causal_lm: nn.Module, gradients: Mapping[str, Tensor] | None = None) -> list[str]:
    """Adapted layers whose A and B both have no or zero gradient; call it after the first backward.

    At the first step A's gradient is zero because B is, so a layer counts only when neither moves. Gradients are
    the parameters' `main_grad` or `.grad`, or those given by parameter name.
    """
    moves: dict[str, bool] = {}
    for name, parameter in adapter_parameters(causal_lm):
        layer = name.partition(".lora_")[0]
        grad = (gradients or {}).get(name)
        if grad is None:
            grad = getattr(parameter, "main_grad", None)
        if grad is None:
            grad = parameter.grad
        moves[layer] = moves.get(layer, False) or (grad is not None and bool(grad.count_nonzero()))
    return [layer for layer, does in moves.items() if not does]


def logical_size(parameter: nn.Parameter) -> int:
    """Number of weights a parameter stands for; bitsandbytes packs two into a byte."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else parameter.numel()


def _peft_targets(causal_lm: Any, targets: Targets) -> tuple[list[str], list[str]]:
    """peft's target_modules and target_parameters for exactly these weights, by short names where they suffice."""
    everything = find_targets(causal_lm, "all-linear")
    is_misread = {n: bool(everything.fused) and n.rpartition(".")[2] in MISREAD for n in everything.linears}
    modules = _shortest([n for n in targets.linears if not is_misread[n]], everything.linears, parts=1)
    parameters = _shortest([n for n in targets.linears if is_misread[n]], everything.linears, parts=2)
    fused = _shortest(targets.fused, everything.fused, parts=2)
    return modules, fused + [f"{n}.weight" for n in parameters]


def _shortest(chosen: list[str], everything: list[str], *, parts: int) -> list[str]:
    """Names cut to their last `parts` parts where that names nothing that was not chosen."""
    own, short = set(chosen), {n: ".".join(n.split(".")[-parts:]) for n in everything}
    too_wide = {short[n] for n in everything if n not in own}
    return sorted({n if short[n] in too_wide else short[n] for n in chosen})


def finish(causal_lm: nn.Module, dtype: torch.dtype) -> None:
    """Compute adapters in the policy's precision, and each of them as two thin products."""
    from peft.tuners.lora.layer import ParamWrapper

    for name, parameter in causal_lm.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    wrappers: list[Any] = [module for module in causal_lm.modules() if isinstance(module, ParamWrapper)]
    for wrapper in wrappers:
        base = wrapper.get_base_layer()
        if not isinstance(base, nn.Linear) and base.config._experts_implementation in (
            seams.NAME,
            seams.NATIVE_NAME,
        ):
            wrapper.forward = types.MethodType(_experts_forward, wrapper)
    adapted.install(causal_lm)


def _experts_forward(self: Any, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Fused experts under peft's nested wrappers, one per adapted parameter, through experts.py."""
    adapters: dict[str, list[experts.ExpertAdapter]] = {}
    wrapper = self
    while hasattr(wrapper, "parameter_name"):
        for name in adapted.active_adapters(wrapper):
            a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
            # peft lays A out as (E R, in) and B as (out, R E) with the expert fastest.
            a_ERI = a.view(wrapper.num_experts, -1, a.shape[1])
            b_EOR = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous()
            adapter = experts.ExpertAdapter(a_ERI, b_EOR, wrapper.scaling[name])
            adapters.setdefault(wrapper.parameter_name, []).append(adapter)
        wrapper = wrapper.base_layer
    kernels = wrapper.config._experts_implementation == seams.NATIVE_NAME
    return experts.experts_forward(
        wrapper, hidden_TH, top_k_index, top_k_weights, adapters=adapters, kernels=kernels
    )


def _initialise_(name: str, parameter: nn.Parameter, seed: int) -> None:
    """A uniform within 1 / sqrt(in) as peft's, B zero; drawn in float32 from the parameter's own generator."""
    if ".lora_B." in name:
        nn.init.zeros_(parameter)
    elif ".lora_A." in name:
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(parameter.shape[1])
        values = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
        with torch.no_grad():
            parameter.copy_(values)


def _adapted(causal_lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """peft's adapter layers by name."""
    for name, module in causal_lm.named_modules():
        if hasattr(module, "lora_A") and ADAPTER in module.lora_A:
            yield name + (f".{module.parameter_name}" if hasattr(module, "parameter_name") else ""), module


def _candidates(causal_lm: Any) -> Iterator[str]:
    """Names of everything an adapter could be put on, adapted or not."""
    head = _head_modules(causal_lm)
    for name, module in causal_lm.named_modules():
        if isinstance(module, nn.Linear) and module not in head and ".lora_" not in name:
            yield name
        elif experts.is_plain(module):
            yield f"{name}.gate_up_proj"
            yield f"{name}.down_proj"


def _count(targets: Targets) -> Counter[str]:
    return Counter(_kind(name) for name in targets.linears + targets.fused)


def _kind(name: str) -> str:
    """A weight's name without its layer number, for counting: model.layers.3.self_attn.q_proj -> self_attn.q_proj."""
    parts = [part for part in name.split(".") if part != "base_layer"]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :] if numbers else parts)


def _adapted_kind(name: str) -> str:
    return _kind(name.removesuffix(".weight"))
