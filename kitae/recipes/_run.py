"""One run from resolved settings to the final model: the frame around a recipe's `train`.

settings -> ranks -> run directory -> tokenizer, template -> recipe: data, model, loop -> final model
"""

from __future__ import annotations

import importlib
import logging
import os
import random
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from kitae.config import Section, as_json
from kitae.data.chat import Template
from kitae.data.instructions import form_instruction
from kitae.data.sources import first_questions
from kitae.models.load import load_tokenizer
from kitae.parallel.world import World, start_world
from kitae.recipes._losses import fingerprint
from kitae.recipes._setup import Setup
from kitae.train.run import Run

log = logging.getLogger(__name__)


def run_recipe(name: str, settings: Section, *, notes: Sequence[str] = ()) -> Path:
    """Run the recipe and return its output directory, the final model at its top.

    `notes` are things to tell the user once, such as flags without effect here. Every rank calls this.
    """
    # Any: the settings class belongs to the recipe; the sections read here are in every one of them.
    cfg: Any = settings
    recipe = importlib.import_module(f"kitae.recipes.{name}")
    torch.set_num_threads(cfg.train.num_threads or own_cores())
    world = start_world(device=cfg.model.device)
    try:
        with Run.open(
            cfg.output_dir,
            config=as_json(settings),
            recipe=name,
            world=world,
            save=cfg.save,
            evaluation=cfg.eval,
            log=cfg.log,
            early_stopping_patience=cfg.train.early_stopping_patience,
            resume=cfg.resume,
            overwrite=cfg.overwrite,
            allow_inexact=cfg.allow_inexact,
        ) as run:
            for note in notes:
                log.warning("%s", note)
            if run.is_finished:
                log.info(
                    "%s is finished already; to train on, start a new run from it (model.name_or_path), or add "
                    "--allow_inexact with more steps",
                    run.output_dir,
                )
                return run.output_dir
            _train(recipe, cfg, run=run, world=world)
            return run.output_dir
    finally:
        world.close()


def _train(recipe: ModuleType, cfg: Any, *, run: Run, world: World) -> None:
    seed_everything(cfg.train.seed)
    template = Template.load(
        load_tokenizer(cfg.model), data=cfg.data, default_system_prompt=default_system_prompt(cfg)
    )
    run.identify(template=template.fingerprint)
    if cfg.loss:
        run.identify(loss=fingerprint(cfg.loss))
    log.info("system prompt: %s", repr(template.system_prompt) if template.system_prompt else "none")
    setup = Setup(cfg, world=world, run=run, template=template)
    try:
        recipe.train(cfg, setup)
        run.finish(setup.save_final)
    finally:
        setup.close()


def default_system_prompt(cfg: Any) -> str | None:
    """The form instruction, for recipes whose reward looks at the form; in the language of the data."""
    reward = getattr(cfg, "reward", None)
    if reward is None or reward.function != "reasoning" or cfg.data.system_prompt is not None:
        return None
    return form_instruction(first_questions(cfg.data.train, data=cfg.data, count=200), form=reward.form)


def seed_everything(seed: int) -> None:
    """Seed the generators that dropout and new weights draw from; data order and sampling have their own."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def own_cores() -> int:
    """Cores this process may use: OMP_NUM_THREADS where it is set for a single process, else a fair share of them.

    torchrun sets OMP_NUM_THREADS to 1 for every rank, whatever the machine has; with several ranks it is not asked.
    """
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    wished = os.environ.get("OMP_NUM_THREADS", "")
    if ranks_here == 1 and wished.isdigit() and int(wished) > 0:
        return int(wished)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // ranks_here)
