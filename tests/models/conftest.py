"""Rows, and the slow obvious way to score them: one row at a time through transformers' own module."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kitae.config import ModelSettings, SeamSettings
from kitae.data.collate import collate
from kitae.models.load import load_policy
from kitae.types import Row

ALL_FAMILIES = ["qwen3", "qwen2", "llama", "deepseek_v3"]


def random_row(length: int, *, seed: int = 0, prompt: list[int] | None = None) -> Row:
    """A row of random tokens; everything after the prompt (or after the first token) is taught."""
    generator = torch.Generator().manual_seed(1000 * length + seed)
    own = torch.randint(3, 100, (length,), generator=generator).tolist()
    tokens = [*(prompt or []), *own]
    first = len(prompt) if prompt else 1
    return Row(
        token_ids=tokens,
        loss_mask=[i >= first for i in range(len(tokens))],
        prompt_length=len(prompt or []),
    )


def batch_of(rows, **options):
    [batch] = collate(rows, rows_per_forward=len(rows), **options)
    return batch


@pytest.fixture
def policy_of(tiny):
    """A function family -> Policy of the tiny model, with any model settings."""

    def make(
        family: str = "qwen3", *, lora=None, trainable: bool = True, path: Path | None = None, **settings
    ):
        seams = settings.pop("seams", SeamSettings())
        where = str(path or tiny(family))
        model = ModelSettings(name_or_path=where, device="cpu", dtype="float32", seams=seams, **settings)
        return load_policy(model, lora=lora, trainable=trainable)

    return make


@pytest.fixture
def plain_model(tiny):
    """A function family -> transformers' own module, with its own attention and expert loop."""
    from transformers import AutoModelForCausalLM

    def make(family: str = "qwen3", *, path: Path | None = None):
        return AutoModelForCausalLM.from_pretrained(
            path or tiny(family),
            attn_implementation="eager",
            experts_implementation="eager",
            dtype=torch.float32,
        )

    return make


def plain_nll(model, rows) -> torch.Tensor:
    """Sum over taught tokens of -log p, with transformers' logits and torch's cross-entropy, row by row."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.token_ids])
        labels = ids[0].masked_fill(~torch.tensor(row.loss_mask), -100)
        logits = model(input_ids=ids).logits[0]
        total = total + F.cross_entropy(logits[:-1].float(), labels[1:], reduction="sum")
    return total


def assert_same_gradients(policy, model, *, tolerance: float = 5e-6) -> None:
    """Every parameter's gradient equals the plain module's, relative to that parameter's largest."""
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found = dict(policy.named_trainable())
    assert expected.keys() == {n for n, p in found.items() if p.grad is not None}
    for name, grad in expected.items():
        error = (found[name].grad - grad).abs().max() / grad.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: {error:.2e}"
