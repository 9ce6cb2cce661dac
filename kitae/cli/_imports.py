"""What training imports, read in one go: some 2,500 modules, most of the time from the command to the first step."""

from __future__ import annotations

import gc
import importlib
import sys

READ = (
    "transformers.generation.utils",
    "transformers.modeling_layers",
    "transformers.tokenization_utils_tokenizers",
    "kitae.recipes._run",
)
"""What brings nearly everything else with it; a model family's own file is small."""


def read_all() -> None:
    """Import torch, transformers and the recipes' frame, without garbage collections in between.

    A collection walks over all objects there are; while modules pile up it finds next to nothing and takes a fifth of
    the time. What is there afterwards stays until the process ends, and no later collection looks at it. That is right
    for a command's own process, so nothing is done where somebody has imported torch before.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        for name in READ:
            importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()
