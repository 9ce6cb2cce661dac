"""The memory estimate against bytes really held, and its advice."""

from __future__ import annotations

import pytest
import torch

from kitae.config import LoraSettings
from kitae.errors import PlanError
from kitae.models.estimate import Plan, build_on_meta, estimate, require_fit
from kitae.models.toy import make_config
from kitae.rollout.packed import PackedModel


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
@pytest.mark.parametrize("rank", [0, 4])
def test_the_estimate_counts_what_a_loaded_policy_holds(family, rank, policy_of):
    policy = policy_of(family, lora=LoraSettings(rank=rank) if rank else None)
    meta = build_on_meta(make_config(family, vocab_size=policy.config.vocab_size))
    found = estimate(meta, Plan(dtype=torch.float32, lora_rank=rank))
    trained = sum(p.numel() for _, p in policy.named_trainable())
    assert found.weight_bytes == sum(p.numel() * p.element_size() for p in policy.parameters())
    assert found.trainable == trained
    assert found.training_bytes == 12 * trained


def test_ranks_share_what_training_takes_and_optimizers_differ():
    meta = build_on_meta(make_config("qwen3", vocab_size=112))
    n = sum(p.numel() for p in meta.parameters())

    def bytes_of(**plan) -> tuple[int, int]:
        found = estimate(meta, Plan(dtype=torch.bfloat16, **plan))
        return found.weight_bytes, found.training_bytes

    assert bytes_of() == (2 * n, 16 * n)
    assert bytes_of(optimizer="adamw_8bit") == (2 * n, 10 * n)
    assert bytes_of(optimizer="adafactor") == (2 * n, 8 * n)
    # Shards are float32 masters; before it is cut, every rank holds the whole model as such.
    assert bytes_of(ranks=4) == (4 * n, 12 * n // 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_native_engines_copy_counts_what_it_packs(family, dtype, policy_of):
    policy = policy_of(family).to(dtype)
    policy.dtype = dtype
    packed = PackedModel(policy)
    packed.take(policy)
    shared = {p.data_ptr() for p in policy.parameters()}
    held = sum(t.nbytes for t in packed._tensors.values() if t.data_ptr() not in shared)
    meta = build_on_meta(make_config(family, vocab_size=policy.config.vocab_size))
    found = estimate(meta, Plan(dtype=dtype, packed_copy=True))
    assert found.sampler_bytes == pytest.approx(held, rel=0.2)  # blocks of 64 columns are padded
    assert found.total_bytes == found.weight_bytes + found.training_bytes + found.sampler_bytes
    assert (
        estimate(meta, Plan(dtype=torch.float32, packed_copy=True, nf4=True, lora_rank=2)).sampler_bytes == 0
    )


def advice(free: int, **plan) -> str:
    meta = build_on_meta(make_config("qwen3", vocab_size=112, hidden_size=512, intermediate_size=1024))
    with pytest.raises(PlanError) as error:
        require_fit(meta, Plan(**plan), name="toy", free=free, total=free)
    return str(error.value).rpartition("; ")[2]


def test_the_cheapest_change_that_fits_is_named():
    full = {"dtype": torch.float32}
    assert advice(50_000_000, **full) == "lora.rank = 16 needs 16.3 MiB"
    assert advice(15_000_000, **full) == "lora.rank = 16 and model.dtype = bfloat16 needs 10.3 MiB"
    nf4 = "lora.rank = 16 and model.dtype = bfloat16 and model.quantization = nf4 needs 5.5 MiB"
    assert advice(8_000_000, **full) == nf4
    frozen = {"dtype": torch.bfloat16, "trainable": False}
    assert advice(7_000_000, **frozen) == "model.quantization = nf4 needs 1.8 MiB"
    sampled = {"dtype": torch.bfloat16, "trainable": False, "packed_copy": True}
    assert advice(11_000_000, **sampled) == "rollout.engine = generic needs 6.5 MiB"
    assert advice(1_000, **full) == "take a smaller model or a machine with more memory"
