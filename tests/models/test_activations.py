"""What a forward pass keeps for its backward: the estimate against the tensors autograd really saved."""

from __future__ import annotations

import pytest
import torch

from kitae.config import LoraSettings
from kitae.models import native
from kitae.models.activations import activation_bytes
from tests.models.conftest import batch_of, random_row

ROWS = [random_row(n) for n in (200, 150, 90, 60)]
SIZES = {"hidden_size": 128, "intermediate_size": 384}


def saved_bytes(policy) -> tuple[int, int]:
    """Bytes of the different tensors saved by a forward pass, parameters aside, and its tokens."""
    batch = batch_of(ROWS)
    parameters = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = -(policy(batch).logprobs_N * batch.weights_N).sum()
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values()), batch.packing.num_tokens


def both(policy, *, recompute=False) -> tuple[int, int]:
    """Estimated and saved."""
    saved, num_tokens = saved_bytes(policy)
    element = policy.dtype.itemsize
    return activation_bytes(policy.config, num_tokens=num_tokens, element=element, recompute=recompute), saved


@pytest.mark.skipif(native.library() is None, reason="without a compiler torch's operations keep more")
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama", "deepseek_v3"])
def test_a_pass_keeps_about_what_is_estimated(family, rank, tiny, policy_of):
    folder = tiny(family, num_hidden_layers=4, **SIZES)
    lora = LoraSettings(rank=rank) if rank else None
    estimated, saved = both(policy_of(family, path=folder, lora=lora))
    assert estimated == pytest.approx(saved, rel=0.2)


def test_recomputing_keeps_one_input_per_layer(tiny, policy_of):
    small, large = (
        both(
            policy_of("qwen3", path=tiny("qwen3", num_hidden_layers=n, **SIZES), gradient_checkpointing=True),
            recompute=True,
        )
        for n in (2, 6)
    )
    assert large[0] - small[0] == pytest.approx(large[1] - small[1], rel=0.05)
    assert small[0] > small[1]  # and one whole layer while it is recomputed
    assert large[0] < both(policy_of("qwen3", path=tiny("qwen3", num_hidden_layers=6, **SIZES)))[0] / 3
