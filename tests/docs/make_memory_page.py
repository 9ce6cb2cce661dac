"""Writes docs/memory.md from the estimates that a run makes before it loads: python -m tests.docs.make_memory_page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kitae.models.activations import activation_bytes
from kitae.models.estimate import Plan, build_on_meta, estimate

PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
TOKENS = 2048
RANK = 16
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of the DeepSeek-R1 distillations, from its published config.json."""

    name: str
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vocab_size: int
    parameters: int

    @property
    def config(self) -> Any:
        from transformers import CONFIG_MAPPING

        names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        sizes = {name: getattr(self, name) for name in (*names, "intermediate_size", "vocab_size")}
        return CONFIG_MAPPING[self.model_type](**sizes, tie_word_embeddings=False)


SHAPES = [
    Shape("R1-Distill-Qwen-1.5B", "qwen2", 1536, 28, 12, 2, 8960, 151936, 1_777_088_000),
    Shape("R1-Distill-Qwen-7B", "qwen2", 3584, 28, 28, 4, 18944, 152064, 7_615_616_512),
    Shape("R1-Distill-Llama-8B", "llama", 4096, 32, 32, 8, 14336, 128256, 8_030_261_248),
    Shape("R1-Distill-Qwen-14B", "qwen2", 5120, 48, 40, 8, 13824, 152064, 14_770_033_664),
    Shape("R1-Distill-Qwen-32B", "qwen2", 5120, 64, 40, 8, 27648, 152064, 32_763_876_352),
    Shape("R1-Distill-Llama-70B", "llama", 8192, 80, 64, 8, 28672, 128256, 70_553_706_496),
]
WAYS = {"full": {}, "LoRA": {"lora_rank": RANK}, "QLoRA": {"lora_rank": RANK, "nf4": True}}

HEAD = f"""# Memory

What a run needs is estimated from the model's configuration before any weight is read; a model that cannot fit is refused
with the numbers and the least change that would fit. The log says both parts (here R1-Distill-Qwen-1.5B with LoRA):

    memory: 3.62 GiB needed, activations aside; 21.40 free
    activations: about 2008.0 MiB per 1,024 tokens of a forward pass (161.5 with model.gradient_checkpointing true, ...)

## What is counted

With *P* all weights, *t* those that train (all of them, or adapters of *rank* x (in + out) each), *b* the bytes of a number
(2 in bfloat16, 4 in float32):

| part | bytes |
|---|---|
| weights | *b P*; in nf4 0.52 for each weight of a linear layer, *b* for embeddings, head, norms and routed experts |
| adapters | *b t* |
| masters and gradients | 8 *t* in bfloat16 (float32 both); 4 *t* in float32, where the weights are the masters |
| moments | `adamw` 8 *t*, `adamw_8bit` 2 *t*, `adafactor` almost none |
| native sampling on a CPU | *b P*, less an embedding that is no head; int8 uses half; none in generic or nf4 |
| activations of a pass of *T* tokens | *b T* x layers x (4 hidden + 2 (queries + keys) + 3 intermediate) |
| the same with `gradient_checkpointing` | *b T* x layers x hidden, and one layer as above; about a third more time |
| ... set to `offload`, on a GPU | one layer as above; *b T* x layers x hidden in the host's memory, copied twice |

*Queries* and *keys* are heads x head size; models that norm them (Qwen3) keep them a third time. Latent attention and routed
experts have their own sums in `kitae/models/activations.py`. Where no compiler makes the kernels, a CPU keeps up to twice as
much. Beside these there are keys and values while sampling (`rollout.kv_cache_tokens`; the paged engine
keeps their memory from the first round on), the process itself (0.4 GiB of
Python and torch), what the matrix products' library keeps prepared, the logits of one chunk (256 MiB on a GPU; on a CPU
192 rows, 56 MiB in bfloat16 where the vocabulary has 152,000 tokens), and what an allocator cannot use again.

`model.gradient_checkpointing = "auto"` takes the first of false, true and offload whose largest pass fits into what is free
once the weights are loaded, and logs the prices it compared. A second model that a run loads later (a reference, a critic)
is not in that sum. On a CPU offload does the same as true, and the log says so.

A pass has the rows of `train.per_device_train_batch_size`, in parts of at most 2,048 tokens on a CPU unless one row alone
is longer. If a pass does not fit after all, a single process halves it, with the same result
([troubleshooting](troubleshooting.md)).

## DeepSeek-R1's distillations

GiB on one device in bfloat16 with AdamW; LoRA and QLoRA adapt all linear layers at rank {RANK}; a pass of {TOKENS:,} tokens
(one row as long as `data.max_length`). *Kept* and *recomputed* are activations without and with
`model.gradient_checkpointing`. Estimates, not measurements.

"""


def page() -> str:
    """The whole page."""
    lines = [
        "| model | | weights | training | kept | recomputed | total, kept | total, recomputed |",
        "|---" * 8 + "|",
    ]
    for shape in SHAPES:
        lines += rows(shape)
    shapes = [
        "| model | type | hidden | layers | heads | key-value heads | intermediate | vocabulary | parameters |"
    ]
    shapes += ["|---" * 9 + "|"]
    shapes += [
        f"| {s.name} | {s.model_type} | {s.hidden_size} | {s.num_hidden_layers} | {s.num_attention_heads} | "
        f"{s.num_key_value_heads} | {s.intermediate_size} | {s.vocab_size} | {s.parameters:,} |"
        for s in SHAPES
    ]
    table, shapes_table = "\n".join(lines), "\n".join(shapes)
    return f"{HEAD}{table}\n\nThe shapes, from the models' `config.json`:\n\n{shapes_table}\n"


def rows(shape: Shape) -> list[str]:
    """The lines of one model."""
    config = shape.config
    meta = build_on_meta(config)
    kept, recomputed = (
        activation_bytes(config, num_tokens=TOKENS, element=2, recompute=choice) for choice in (False, True)
    )
    lines = []
    for way, how in WAYS.items():
        need = estimate(meta, Plan(dtype=torch.bfloat16, **how))
        parts = [need.weight_bytes, need.training_bytes, kept, recomputed]
        parts += [need.total_bytes + kept, need.total_bytes + recomputed]
        cells = " | ".join(f"{part / GIB:.1f}" for part in parts)
        lines.append(f"| {shape.name} | {way} | {cells} |")
    return lines


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
