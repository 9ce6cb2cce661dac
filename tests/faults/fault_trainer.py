"""A small trainer on the real Run and checkpoint code, for faults of every kind to strike.

Dropout, accumulation over two micro-batches, random augmentation from Python's and NumPy's generators, and an order
of rows that depends on seed and epoch: everything a resume can get wrong shows in its losses.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from kitae.config import EvalSettings, LogSettings, SaveSettings
from kitae.train.run import Run

NUM_ROWS, WIDTH, CLASSES, ROWS_PER_PASS, PASSES = 52, 24, 7, 4, 2


class Order:
    """Rows in an order that depends on the seed and the epoch; its state is a position."""

    def __init__(self) -> None:
        self.epoch = self.position = 0

    def take(self) -> torch.Tensor:
        if self.position + ROWS_PER_PASS > NUM_ROWS:
            self.epoch, self.position = self.epoch + 1, 0
        order = np.random.Generator(np.random.PCG64([5, self.epoch])).permutation(NUM_ROWS)
        self.position += ROWS_PER_PASS
        return torch.from_numpy(order[self.position - ROWS_PER_PASS : self.position].copy())

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state(self, state: dict[str, Any]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class Trainer:
    """Model, optimizer and schedule; its state is tensors and numbers."""

    def __init__(self, *, width: int) -> None:
        self.model = nn.Sequential(
            nn.Linear(WIDTH, width), nn.GELU(), nn.Dropout(0.1), nn.Linear(width, CLASSES)
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.rows = torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(7))
        self.labels = (self.rows.sum(dim=1).abs() * 3).long() % CLASSES

    def step(self, order: Order) -> dict[str, float]:
        self.optimizer.zero_grad()
        total = 0.0
        for _ in range(PASSES):
            taken = order.take()
            rows = self.rows[taken].clone()
            if np.random.rand() < 0.5:
                rows[:, random.randrange(WIDTH)] *= 0.5
            loss = nn.functional.cross_entropy(self.model(rows), self.labels[taken]) / PASSES
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.schedule.step()
        return {"train/loss": total, "train/grad_norm": norm}

    def evaluate(self) -> dict[str, float]:
        self.model.eval()
        with torch.no_grad():
            loss = nn.functional.cross_entropy(self.model(self.rows), self.labels).item()
        self.model.train()
        return {"eval/loss": loss}

    def state(self) -> dict[str, Any]:
        moments = {
            str(index): {name: torch.as_tensor(value) for name, value in entry.items()}
            for index, entry in self.optimizer.state_dict()["state"].items()
        }
        return {
            "model": dict(self.model.state_dict()),
            "moments": moments,
            "schedule": {"last_epoch": self.schedule.last_epoch, "lr": self.optimizer.param_groups[0]["lr"]},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        optimizer = self.optimizer.state_dict()
        # Copied: what the checkpoint's file backs would keep its space after it is removed.
        optimizer["state"] = {
            int(index): {name: value.clone() for name, value in entry.items()}
            for index, entry in state["moments"].items()
        }
        self.optimizer.load_state_dict(optimizer)
        self.schedule.last_epoch = state["schedule"]["last_epoch"]
        self.optimizer.param_groups[0]["lr"] = state["schedule"]["lr"]


def train(
    output_dir: str | Path,
    *,
    total: int = 12,
    width: int = 48,
    save: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    log: dict[str, Any] | None = None,
    seed: int = 0,
    patience: int = 0,
    seconds_per_step: float = 0.0,
    hold: tuple[str, int, str] | None = None,
    raise_at: int = 0,
    threads: int = 1,
    facts: dict[str, Any] | None = None,
    grows_by: int = 0,
    config: dict[str, Any] | None = None,
    **opening: Any,
) -> Trainer:
    """Train to the end, or go on with resume=True; `hold` is that of `Hold`."""
    torch.set_num_threads(threads)
    settings = {"train": {"seed": seed, "max_steps": total}, "width": width, **(config or {})}
    with Run.open(
        output_dir,
        config=settings,
        recipe="sft",
        save=SaveSettings(**(save or {"steps": 3})),
        evaluation=EvalSettings(**(evaluation or {})),
        log=LogSettings(**(log or {})),
        early_stopping_patience=patience,
        **opening,
    ) as run:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        trainer, order = Trainer(width=width), Order()
        run.identify(**(facts or {"data_hash": "abc"}))
        held = Hold(trainer, *(hold or ("nowhere", 0, "")))
        run.track("trainer", held, grows_by=grows_by)
        run.track("order", order)
        for step in run.steps(total, evaluate=trainer.evaluate if evaluation else None):
            held.step = step
            metrics = trainer.step(order)
            if step == raise_at:
                raise ArithmeticError(f"planned at step {step}")
            held.wait_in("step")
            time.sleep(seconds_per_step)
            run.log(step, metrics)
            run.samples(step, [{"completion": f"text of step {step}", "reward": metrics["train/loss"]}])
        run.finish(lambda folder: save_model(trainer, folder))
    return trainer


def save_model(trainer: Trainer, folder: Path) -> None:
    save_file(trainer.model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "extra").mkdir()
    (folder / "extra" / "tokens.json").write_text("[]")


class Hold:
    """The trainer, and one place where it waits once, so that a fault can strike there: in a step, or in its save.

    Step 0 is before the first one, when its state is looked at. It makes a file, and waits until that is removed.
    """

    def __init__(self, trainer: Trainer, place: str, at_step: int, file: str) -> None:
        self.trainer, self.place, self.at_step, self.file = trainer, place, at_step, Path(file)
        self.step, self.has_waited = 0, False

    def wait_in(self, place: str) -> None:
        if (place, self.step) != (self.place, self.at_step) or self.has_waited:
            return
        self.has_waited = True
        self.file.touch()
        while self.file.exists():
            time.sleep(0.002)

    def state(self) -> dict[str, Any]:
        self.wait_in("save")
        return self.trainer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.trainer.load_state(state)
