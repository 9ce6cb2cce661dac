"""One step or two of each way to train, run by the test itself as one process, and by two ranks as a script."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from kitae.algos.losses import clipped_policy_gradient, cross_entropy
from kitae.config import LoraSettings, ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.errors import NonFiniteError
from kitae.models.load import load_policy
from kitae.parallel.fsdp import shard
from kitae.parallel.world import World, start_world
from kitae.train.learner import Learner
from kitae.types import Packing, Row, Segment

CASES: dict[str, dict[str, Any]] = {
    "full": {"model": "qwen3"},
    "moe": {"model": "deepseek_v3", "loss": clipped_policy_gradient, "gradient_checkpointing": True},
    "idle_rank": {"model": "llama", "first_rank": 9},
    "adafactor": {"model": "llama", "optimizer": "adafactor"},
    "bfloat16": {"model": "qwen3", "dtype": "bfloat16"},
    "moe_bfloat16": {"model": "deepseek_v3", "dtype": "bfloat16"},
    "lora": {"model": "qwen3", "rank": 4},
    "lora_moe": {"model": "deepseek_v3", "rank": 4},
    "qlora": {"model": "llama", "rank": 4, "quantization": "nf4"},
    "row_by_row": {"model": "qwen3", "seams": {"attention": False}},
}
"""first_rank: how many of the nine rows rank 0 has; its tokens are not half of all."""


def make_rows() -> list[Row]:
    rng = random.Random(0)
    rows = []
    for n in [2, 30, 9, 3, 61, 17, 5, 40, 12]:
        streams = {
            "advantages": [rng.gauss(0, 1)] * n,
            "old_logprobs": [-4.5 + rng.gauss(0, 0.3) for _ in range(n)],
        }
        ids = [rng.randrange(8, 90) for _ in range(n)]
        rows.append(Row(token_ids=ids, loss_mask=[False] + [True] * (n - 1), streams=streams))
    return rows


def make_learner(case: dict[str, Any], models: dict[str, str], world: World) -> Learner:
    rank = case.get("rank", 0)
    model = ModelSettings(
        name_or_path=models[case["model"]],
        dtype=case.get("dtype", "float32"),
        device="cpu",
        quantization=case.get("quantization", "none"),
        seams=case.get("seams", {}),
        gradient_checkpointing=case.get("gradient_checkpointing", False),
    )
    policy = load_policy(model, lora=LoraSettings(rank=rank) if rank else None)
    shard(policy, world)
    optim = OptimSettings(
        name=case.get("optimizer", "adamw"), learning_rate=1e-3, epsilon=1e-4, weight_decay=0.1
    )
    return Learner(policy, optim=optim, total_steps=4, world=world)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(case: dict[str, Any], models: dict[str, str], world: World) -> tuple[list[dict], dict[str, Tensor]]:
    """Two steps on this rank's rows: the metrics, and gradients, log-probs and weights as one process has them."""
    learner = make_learner(case, models, world)
    first = case.get("first_rank", 6)
    rows = make_rows()
    mine = rows if world.world_size == 1 else [rows[:first], rows[first:]][world.rank]
    batches = collate(mine, rows_per_forward=2)
    found: dict[str, Tensor] = {}
    metrics = []
    for step in range(2):
        taught = float(sum(row.num_taught for row in mine))
        loss_fn = case.get("loss", cross_entropy)
        told = learner.forward_backward(batches, loss_fn, denominator=taught, with_entropy=True)
        if step == 0:
            for slot in learner.flat.slots:
                gradient = slot.parameter.grad if learner.flat.is_sharded else world.sum(slot.grad.clone())
                found[f"gradient.{slot.name}"] = whole(gradient).clone()
        metrics.append(told | learner.optim_step())
    with learner.unsharded(), torch.no_grad():
        for _ in range(1 + world.rank):  # ranks may run different numbers of passes here
            packing = Packing(segments=[Segment(0, 6)], num_tokens=6)
            hidden_TH = learner.policy.hidden(torch.arange(8, 14), torch.arange(6), packing)
            found["logits"] = learner.policy.logits(hidden_TH)
    scores = learner.logprobs(collate(rows[: 3 + world.rank], rows_per_forward=2))
    found["logprobs"] = torch.cat(scores)[: sum(row.num_taught for row in rows[:3])]
    tensors = learner.full_tensors()
    if tensors is None:
        tensors = {name: p.detach() for name, p in learner.policy.named_trainable()}
    return metrics, found | {f"weight.{name}": tensor for name, tensor in tensors.items()}


def check_restored_state(models: dict[str, str], world: World) -> bool:
    """Each rank continues from its own shard to the last bit."""
    batches = collate(make_rows()[world.rank :: 2], rows_per_forward=3)

    def step(learner: Learner) -> dict[str, float]:
        return learner.forward_backward(batches, cross_entropy, denominator=50.0) | learner.optim_step()

    straight = make_learner({"model": "qwen3"}, models, world)
    step(straight)
    saved = {
        **straight.state(),
        "master": {name: tensor.clone() for name, tensor in straight.state()["master"].items()},
        "optimizer": {
            name: {key: value.clone() for key, value in moments.items()}
            for name, moments in straight.state()["optimizer"].items()
        },
    }
    expected = [step(straight), step(straight)]
    resumed = make_learner({"model": "qwen3"}, models, world)
    resumed.load_state(saved)
    return [step(resumed), step(resumed)] == expected


def nonfinite_on_one_rank(models: dict[str, str], world: World) -> str:
    """What each rank says of a NaN that only rank 1 has seen."""
    learner = make_learner({"model": "llama"}, models, world)

    def loss_fn(out, weights_N, **_):
        return out.logprobs_N.sum() * (float("nan") if world.rank == 1 else 1.0), {}

    learner.forward_backward(collate(make_rows()[:3], rows_per_forward=2), loss_fn, denominator=1.0)
    try:
        learner.optim_step()
    except NonFiniteError as error:
        return str(error)
    return "no error"


def main(models: dict[str, str], folder: Path) -> None:
    torch.set_num_threads(1)
    world = start_world(device="cpu", timeout_s=60)
    report: dict[str, Any] = {"metrics": {}}
    for name, case in CASES.items():
        report["metrics"][name], tensors = train(case, models, world)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, folder / f"{name}.{world.rank}"
        )
    report["sum"] = world.sum(torch.tensor([1.0, world.rank])).tolist()
    report["gathered"] = world.gather_json({"rank": world.rank, "text": "é" * (1 + 50 * world.rank)})
    report["broadcast"] = world.broadcast_json([f"from {world.rank}", None, 0.1])
    report["restored"] = check_restored_state(models, world)
    report["nonfinite"] = nonfinite_on_one_rank(models, world)
    (folder / f"report.{world.rank}").write_text(json.dumps(report))
    world.barrier()
    world.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
