"""What each of two ranks does in test_run_ranks.py: four runs in one process group; prints what came of them."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kitae.config import LogSettings, SaveSettings
from kitae.errors import KitaeError
from kitae.parallel.world import World, start_world
from kitae.train.run import Run


class Shard:
    """A part of which every rank has its own; its generator differs per rank too."""

    def __init__(self, world: World) -> None:
        self.values = torch.zeros(3)
        random.seed(world.rank)
        torch.manual_seed(world.rank)

    def state(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])


def train(folder: Path, world: World, *, signal_in: int = 0, **opening: Any) -> str:
    """A run of six steps; what ended it."""
    try:
        with Run.open(
            folder,
            config={"train": {"seed": 0}},
            world=world,
            save=SaveSettings(steps=2),
            log=LogSettings(report_to=["none"]),
            **opening,
        ) as run:
            shard = Shard(world)
            run.track("shard", shard)
            for step in run.steps(6, evaluate=lambda: {"eval/loss": 1.0}):
                shard.values += torch.rand(3) * random.random()
                if step == signal_in and world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                run.log(step, {"train/loss": world.sum(shard.values.sum()).item()})
                run.samples(step, [{"rank": world.rank}])

            def save(into: Path) -> None:
                whole = world.gather_json(shard.values.tolist())
                if world.is_main:
                    save_file({"values": torch.tensor(whole)}, into / "model.safetensors")

            run.finish(save)
    except KitaeError as error:
        return f"{error.exit_code} {error}"
    return "finished"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    world = start_world(timeout_s=60)
    ends = [
        train(folder / "whole", world),
        train(folder / "cut", world, signal_in=3),
        train(folder / "cut", world, resume=True),
        train(folder / "whole", world),
    ]
    print(json.dumps(ends))
    world.close()
