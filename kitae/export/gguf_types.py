"""Which type each tensor of a GGUF file gets: llama.cpp's mixes, its fallbacks, and what they weigh.

A name such as Q4_K_M stands for a mix: most matrices in q4_K, those that matter more in q6_K.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kitae.errors import ConfigError
from kitae.export.blocks import KINDS
from kitae.export.gguf_tensors import Target
from kitae.plugins import did_you_mean

PLAIN = {"F32": 4, "F16": 2, "BF16": 2}
"""Types of one number after the other, with its bytes."""
OWN = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_0", "Q4_K_M", "Q4_0")
"""Written by kitae itself."""
OTHERS = (
    "Q4_1", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q5_K_S", "IQ1_S", "IQ1_M", "IQ2_XXS",
    "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
)  # fmt: skip
"""Written by llama-quantize, from a file in BF16."""
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32
}  # fmt: skip
"""general.file_type."""
FALLBACK = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""For rows that are not a whole number of 256."""


@dataclass(frozen=True, slots=True)
class Typed:
    """A tensor with its type."""

    target: Target
    kind: str
    wanted: str
    """What the mix says; `kind` differs where rows do not fit into its blocks."""

    @property
    def num_bytes(self) -> int:
        count = math.prod(self.target.shape)
        if self.kind in PLAIN:
            return count * PLAIN[self.kind]
        values, size, _ = KINDS[self.kind]
        return count // values * size


def find_type(name: str) -> str:
    """A type's name in llama.cpp's spelling, given in any case."""
    found = name.upper().replace("-", "_")
    if found not in OWN and found not in OTHERS:
        raise ConfigError(f"there is no GGUF type {name!r}; {did_you_mean(found, [*OWN, *OTHERS])}")
    return found


def choose(
    targets: Sequence[Target], mix: str, *, num_layers: int, num_experts: int, is_70b: bool
) -> list[Typed]:
    """Each tensor's type under a mix of OWN. Vectors, norms and routers stay float32."""
    has_head = any(target.name == "output.weight" for target in targets)
    with_values = [t.name for t in targets if t.name.endswith("attn_v.weight")]
    found = []
    for target in targets:
        wanted = _wanted(
            target,
            mix,
            is_head=target.name == ("output.weight" if has_head else "token_embd.weight"),
            value=(with_values.index(target.name), len(with_values)) if target.name in with_values else None,
            num_layers=num_layers,
            num_experts=num_experts,
            is_70b=is_70b,
        )
        found.append(Typed(target, _fitting(wanted, target.shape[-1]), wanted))
    return found


def _wanted(
    target: Target,
    mix: str,
    *,
    is_head: bool,
    value: tuple[int, int] | None,
    num_layers: int,
    num_experts: int,
    is_70b: bool,
) -> str:
    name = target.name
    is_matrix = len(target.shape) > 1 and name.endswith(".weight")
    if not is_matrix or "_norm." in name or "ffn_gate_inp." in name or name == "rope_freqs.weight":
        return "F32"
    if mix in PLAIN or mix == "Q8_0":
        return mix
    is_k_mix = mix in ("Q4_K_M", "Q5_K_M")
    kind = mix.removesuffix("_M")
    if is_head:
        return "Q6_K" if target.shape[-1] % KINDS[kind][0] == 0 else "Q8_0"
    if not is_k_mix:
        return kind
    if value is not None:
        if num_experts == 8:
            return "Q8_0"
        if _gets_more_bits(*value):
            return "Q6_K"
        return "Q5_K" if is_70b else kind
    if name.endswith("attn_k.weight") and num_experts == 8:
        return "Q8_0"
    if name.endswith("attn_output.weight") and num_experts == 8 and mix == "Q4_K_M":
        return "Q5_K"
    layer = re.match(r"blk\.(\d+)\.ffn_down", name)
    return "Q6_K" if layer and _gets_more_bits(int(layer[1]), num_layers) else kind


def _gets_more_bits(number: int, count: int) -> bool:
    """The first and last eighth of the layers, and every third between."""
    return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def _fitting(kind: str, columns: int) -> str:
    for candidate in (kind, FALLBACK.get(kind, "F16")):
        if candidate in PLAIN or columns % KINDS[candidate][0] == 0:
            return candidate
    return "F16"
