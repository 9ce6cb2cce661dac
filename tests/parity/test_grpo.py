"""The objective of GRPO and its variants against TRL's, on the same log-probs and advantages; advantages against TRL's too.

Run with TRL installed: pip install 'kitae[parity]'.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from kitae.algos import averaging, baselines, surrogates
from kitae.algos.advantages import group_relative
from kitae.types import Row, TokenOutputs

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'kitae[parity]'")

LENGTHS = [3, 7, 1, 5, 9, 4]
LONGEST = 9
CASES = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "dapo": {},
    "cispo": {"epsilon_high": 1.3},
    "clip-higher with dual clip and KL": {"loss_type": "grpo", "epsilon_high": 0.28, "delta": 1.5, "beta": 0.1},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    "gspo as tokens": {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.06},
    "entropy bonus": {"loss_type": "dapo", "entropy_coef": 0.05},
}  # fmt: skip
AVERAGES = {"grpo": "sequence", "bnpo": "token", "dr_grpo": "constant", "dapo": "token", "cispo": "token"}


def streams(seed=0):
    """Padded [B, T] numbers, as TRL has them, and the mask of real tokens."""
    g = torch.Generator().manual_seed(seed)
    shape = (len(LENGTHS), LONGEST)
    logprobs = (torch.randn(shape, generator=g) * 0.3 - 1.5).requires_grad_()
    entropy = (torch.rand(shape, generator=g) + 0.5).requires_grad_()
    mask = torch.arange(LONGEST)[None] < torch.tensor(LENGTHS)[:, None]
    old = logprobs.detach() + torch.randn(shape, generator=g) * 0.4
    ref = logprobs.detach() + torch.randn(shape, generator=g) * 0.4
    advantages = torch.randn(len(LENGTHS), generator=g) * 2
    return logprobs, entropy, mask, old, ref, advantages


def theirs(how, made):
    """GRPOTrainer._compute_loss on a stand-in for the trainer that only holds settings."""
    logprobs, entropy, mask, old, ref, advantages = made
    loss_type = how["loss_type"]
    args = SimpleNamespace(
        delta=how.get("delta"), use_bias_correction_kl=False, steps_per_generation=1, entropy_coef=0.0
    )
    accelerator = SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, process_index=0, sync_gradients=True
    )  # fmt: skip
    epsilon = how.get("epsilon", 0.2)
    trainer = SimpleNamespace(
        args=args, accelerator=accelerator, model=SimpleNamespace(training=True), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=how.get("beta", 0.0), loss_type=loss_type,
        importance_sampling_level=how.get("importance_sampling_level", "token"), use_vllm=False,
        vllm_importance_sampling_correction=False, epsilon_low=epsilon, epsilon_high=how.get("epsilon_high", epsilon),
        current_gradient_accumulation_steps=1, max_completion_length=LONGEST,
        _entropy_bonus_enabled=bool(how.get("entropy_coef")), use_adaptive_entropy=False,
        entropy_coef=how.get("entropy_coef", 0.0), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, entropy, None),
    )  # fmt: skip
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 2, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 2, dtype=torch.long),
        "completion_ids": torch.zeros(mask.shape, dtype=torch.long),
        "completion_mask": mask.float(), "advantages": advantages, "old_per_token_logps": old,
        "ref_per_token_logps": ref, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trl.GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def ours(how, made):
    logprobs, entropy, mask, old, ref, advantages = made
    loss_type = how["loss_type"]
    rows = [Row(token_ids=[0] * (n + 1), loss_mask=[False] + [True] * n) for n in LENGTHS]
    weighed, denominator = averaging.weigh(rows, AVERAGES[loss_type], max_tokens=LONGEST)
    row_N = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    weights_N = torch.tensor([row.weight for row in weighed])[row_N]
    out = TokenOutputs(logprobs_N=logprobs[mask], entropy_N=entropy[mask], row_N=row_N, num_rows=len(LENGTHS))
    epsilon = how.get("epsilon", 0.2)
    high = how.get("epsilon_high", epsilon)
    is_cispo = loss_type == "cispo"
    loss, _ = surrogates.policy_gradient(
        out, weights_N, advantages=advantages[row_N], old_logprobs=old[mask],
        ref_logprobs=ref[mask] if how.get("beta") else None, kl_coef=how.get("beta", 0.0),
        objective="cispo" if is_cispo else "clip", ratio=how.get("importance_sampling_level", "token"),
        clip_low=epsilon, clip_high=high - 1 if is_cispo else high, dual_clip=how.get("delta", 0.0),
        entropy_coef=how.get("entropy_coef", 0.0),
    )  # fmt: skip
    return loss / denominator


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name, seed):
    how = {"loss_type": name} | CASES[name]
    made = streams(seed)
    expected, found = theirs(how, made), ours(how, made)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for leaf in made[:2]:
        wanted, got = (
            torch.autograd.grad(loss, leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
            for loss in (expected, found)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)


REWARDS = torch.tensor([[0.0, 1.0, 10.0, 1.0], [1.0, 0.0, 0.0, 5.0], [0.3, 0.9, 0.1, 0.2]])


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_trls(scale):
    """As in GRPOTrainer: rewards less the group's mean, over the deviation + 1e-4."""
    from trl.trainer.utils import nanstd

    mean = REWARDS.nanmean(1, keepdim=True)
    deviation = {"group": nanstd(REWARDS, dim=1)[:, None], "batch": nanstd(REWARDS), "none": None}[scale]
    expected = REWARDS - mean
    expected = expected if deviation is None else expected / (deviation + 1e-4)
    torch.testing.assert_close(baselines.estimate(REWARDS, baseline="group", scale=scale), expected)
    if scale == "group":
        torch.testing.assert_close(group_relative(REWARDS), expected)
