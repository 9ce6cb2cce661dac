"""Two steps of a critic, run by the test itself as one process, and by two ranks as a script."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from ranks import make_rows
from safetensors.torch import save_file
from torch import Tensor

from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.models.critic import load_critic
from kitae.parallel.fsdp import shard
from kitae.parallel.world import World, start_world
from kitae.train.learner import Learner

CASES: dict[str, dict[str, Any]] = {
    "full": {"model": "qwen3"},
    "idle_rank": {"model": "llama", "first_rank": 9},
    "moe_bfloat16": {"model": "deepseek_v3", "dtype": "bfloat16"},
    "lora": {"model": "qwen3", "rank": 4},
    "lora_bfloat16": {"model": "qwen3", "rank": 4, "dtype": "bfloat16"},
    "qlora": {"model": "llama", "rank": 4, "quantization": "nf4"},
}
"""first_rank: how many of the nine rows rank 0 has."""


def squared_error(out, weights_N, *, advantages, **_):
    return ((out.values_N - advantages).square() * weights_N).sum(), {}


def train(case: dict[str, Any], models: dict[str, str], world: World) -> tuple[list[dict], dict[str, Tensor]]:
    """Three steps on this rank's rows: the metrics, the values after them, and the weights."""
    rank = case.get("rank", 0)
    model = ModelSettings(
        name_or_path=models[case["model"]],
        dtype=case.get("dtype", "float32"),
        device="cpu",
        quantization=case.get("quantization", "none"),
    )
    critic = load_critic(model, lora=LoraSettings(rank=rank) if rank else None)
    shard(critic, world)
    optim = OptimSettings(learning_rate=1e-2, epsilon=1e-4)
    learner = Learner(critic, optim=optim, total_steps=4, world=world)
    rows = make_rows()
    first = case.get("first_rank", 6)
    mine = rows if world.world_size == 1 else [rows[:first], rows[first:]][world.rank]
    batches = collate(mine, rows_per_forward=2)
    metrics = []
    for _ in range(3):
        taught = float(sum(row.num_taught for row in mine))
        told = learner.forward_backward(batches, squared_error, denominator=taught)
        metrics.append(told | learner.optim_step())
    values = learner.values(collate(rows[: 3 + world.rank], rows_per_forward=2))
    found = {"values": torch.cat(values)[: sum(row.num_taught for row in rows[:3])]}
    tensors = learner.full_tensors()
    if tensors is None:
        tensors = {name: p.detach() for name, p in critic.named_trainable()}
    return metrics, found | {f"weight.{name}": tensor for name, tensor in tensors.items()}


def main(models: dict[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    world = start_world(device="cpu", timeout_s=60)
    report = {}
    for name, case in CASES.items():
        report[name], tensors = train(case, models, world)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.{world.rank}"
        )
    (folder / f"report.{world.rank}").write_text(json.dumps(report))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
