"""Which tensors a GGUF file has, and how each is made of the model's own: Llama, Qwen2, Qwen3, DeepSeek-V2 and V3.

    model.layers.3.self_attn.q_proj.weight --table--> blk.3.attn_q.weight --Target.pieces--> float32 rows

Every tensor of the model is used, or refused by name. Shapes are in torch's order; GGUF writes them the other way round.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kitae.errors import ModelError
from kitae.export.adapter import HEAD
from kitae.export.gguf_metadata import llama3_factors, num_experts
from kitae.export.source import Source

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}  # fmt: skip
"""config.json's model_type, and llama.cpp's name for it."""
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    HEAD: "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "self_attn.q_a_proj": "attn_q_a", "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa", "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
}  # fmt: skip
"""Parts of a layer that become one tensor of another name."""
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"
KV_B = "self_attn.kv_b_proj.weight"
EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight")
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NOT_WEIGHTS = ("rotary_emb.inv_freq",)
CHUNK = 1 << 18
"""Elements worked on at a time: few enough for a core's cache."""

Pieces = Callable[[], Iterator[Tensor]]
"""A tensor's rows in float32, piece by piece, as [rows, columns]."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    pieces: Pieces
    sources: tuple[str, ...]
    """The model's tensors it is made of."""


def architecture(config: dict[str, Any]) -> str:
    """llama.cpp's name of a model's architecture; others than kitae maps are refused."""
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ModelError(
            f"kitae writes no GGUF of model_type {model_type!r}, only of {', '.join(sorted(ARCHITECTURES))}; "
            "llama.cpp's convert_hf_to_gguf.py may know it"
        )
    return ARCHITECTURES[model_type]


def targets_of(source: Source) -> list[Target]:
    """All tensors of the file, in its order."""
    config, names = source.config, set(source.names)
    architecture(config)
    is_tied = bool(config.get("tie_word_embeddings"))
    used: set[str] = {HEAD} if is_tied else set()
    used |= {name for name in names if name.endswith(NOT_WEIGHTS)}
    found = []
    for name, target in OUTSIDE.items():
        if name in names and not (name == HEAD and is_tied):
            found.append(_plain(source, name, target))
    num_layers = int(config["num_hidden_layers"])
    layers: dict[int, list[str]] = {}
    for name in source.names:
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), []).append(match[2])
    extra = [number for number in layers if number >= num_layers]
    if extra:
        log.warning("layers %s (multi-token prediction) are left out: llama.cpp does not run them", extra)
        used |= {f"model.layers.{number}.{part}" for number in extra for part in layers[number]}
    for number in range(num_layers):
        found += _layer(source, number, layers.get(number, []))
    if (factors := llama3_factors(config)) is not None:
        found.append(Target("rope_freqs.weight", tuple(factors.shape), lambda: iter([factors[None]]), ()))
    used |= {name for target in found for name in target.sources}
    if left := sorted(names - used):
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        raise ModelError(
            f"{source.weights.folder}: {left[0]}{more} has no place in a GGUF file of {config['model_type']}"
        )
    return found


def _layer(source: Source, number: int, parts: list[str]) -> list[Target]:
    config, start, into = source.config, f"model.layers.{number}.", f"blk.{number}."
    is_rotated_in_pairs = config["model_type"] == "llama"
    found: list[Target] = []
    experts: dict[str, list[str]] = {"gate": [], "up": [], "down": []}
    for part in parts:
        name = start + part
        module, _, suffix = part.rpartition(".")
        if module in INSIDE and suffix in ("weight", "bias"):
            target = f"{into}{INSIDE[module]}.{suffix}"
            if is_rotated_in_pairs and module in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = int(config["num_attention_heads"])
                if module == "self_attn.k_proj":
                    heads = int(config.get("num_key_value_heads") or heads)
                found.append(_interleaved(source, name, target, heads))
            else:
                found.append(_plain(source, name, target))
        elif part == ROUTER_BIAS:
            found.append(_plain(source, name, f"{into}exp_probs_b.bias"))
        elif part == KV_B:
            found += _latent_keys_and_values(source, name, into)
        elif match := EXPERT.fullmatch(part):
            experts[match[2]].append(name)
        elif part == "mlp.experts.gate_up_proj":
            half = source.shape(name)[1] // 2
            found.append(_fused(source, name, f"{into}ffn_gate_exps.weight", 0, half))
            found.append(_fused(source, name, f"{into}ffn_up_exps.weight", half, half))
        elif part == "mlp.experts.down_proj":
            found.append(_fused(source, name, f"{into}ffn_down_exps.weight", 0, source.shape(name)[1]))
    for kind, names in experts.items():
        if names:
            found.append(_stacked(source, names, f"{into}ffn_{kind}_exps.weight"))
    return found


def _rows(source: Source, name: str, *, multiple: int = 1) -> Iterator[Tensor]:
    """A tensor's rows in pieces of a whole number of `multiple`."""
    shape, read = source.shape(name), source.open(name)
    if len(shape) == 1:
        yield read(0, shape[0])[None]
        return
    step = multiple * max(1, CHUNK // (multiple * shape[1]))
    for start in range(0, shape[0], step):
        yield read(start, min(start + step, shape[0]))


def _plain(source: Source, name: str, target: str) -> Target:
    return Target(target, source.shape(name), lambda: _rows(source, name), (name,))


def _interleaved(source: Source, name: str, target: str, heads: int) -> Target:
    """Rows of each head as ggml's rope turns them, pairs side by side: 0, d/2, 1, d/2 + 1, ..."""
    shape = source.shape(name)
    size = shape[0] // heads

    def pieces() -> Iterator[Tensor]:
        if len(shape) == 1:
            yield source.open(name)(0, shape[0]).view(heads, 2, size // 2).transpose(1, 2).reshape(1, -1)
            return
        for x in _rows(source, name, multiple=size):
            yield x.view(-1, 2, size // 2, shape[1]).transpose(1, 2).reshape(x.shape)

    return Target(target, shape, pieces, (name,))


def _stacked(source: Source, names: list[str], target: str) -> Target:
    """Experts one after the other."""
    ordered = sorted(names, key=lambda name: int(name.split(".experts.")[1].split(".")[0]))
    shapes = {source.shape(name) for name in ordered}
    count = num_experts(source.config)
    if len(shapes) != 1 or len(ordered) != count:
        raise ModelError(
            f"{source.weights.folder}: {ordered[0]} and its siblings are {len(ordered)} of {count} experts, in "
            f"{len(shapes)} shapes; the model is not whole"
        )

    def pieces() -> Iterator[Tensor]:
        for name in ordered:
            yield from _rows(source, name)

    return Target(target, (count, *shapes.pop()), pieces, tuple(ordered))


def _fused(source: Source, name: str, target: str, first: int, rows: int) -> Target:
    """Rows of each expert of a parameter that holds all of them."""
    count, _, columns = source.shape(name)

    def pieces() -> Iterator[Tensor]:
        read = source.open(name)
        for expert in range(count):
            yield read(expert, expert + 1)[0, first : first + rows]

    return Target(target, (count, rows, columns), pieces, (name,))


def _latent_keys_and_values(source: Source, name: str, into: str) -> list[Target]:
    """MLA's kv_b, head by head: what llama.cpp multiplies queries with (transposed), and what it makes values with."""
    config = source.config
    heads, rank = int(config["num_attention_heads"]), int(config["kv_lora_rank"])
    nope, value = int(config["qk_nope_head_dim"]), int(config["v_head_dim"])
    if source.shape(name) != (heads * (nope + value), rank):
        raise ModelError(f"{name} is {list(source.shape(name))}, not {[heads * (nope + value), rank]}")

    def keys() -> Iterator[Tensor]:
        read = source.open(name)
        for start in range(0, heads * (nope + value), nope + value):
            yield read(start, start + nope).t().contiguous()

    def values() -> Iterator[Tensor]:
        read = source.open(name)
        for start in range(nope, heads * (nope + value), nope + value):
            yield read(start, start + value)

    return [
        Target(f"{into}attn_k_b.weight", (heads, rank, nope), keys, (name,)),
        Target(f"{into}attn_v_b.weight", (heads, value, rank), values, (name,)),
    ]
