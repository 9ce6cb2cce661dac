"""Settings of GRPO's variants that contradict each other or would have no effect."""

import pytest

from kitae.errors import ConfigError
from kitae.settings import resolve

BASE = {"model.name_or_path": "m", "data.train": "some/hub-name"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"grpo.dual_clip": 1.1}, r"not above 1 \+ grpo.clip_high"),
        ({"rollout.overlong_buffer": 600}, "more than rollout.max_new_tokens 512"),
        ({"grpo.objective": "cispo", "grpo.clip_low": 0.1}, r"grpo.clip_low.*cispo"),
        ({"grpo.objective": "cispo", "grpo.dual_clip": 3}, r"grpo.dual_clip.*cispo"),
        ({"grpo.advantage": "rloo", "grpo.scale_by_std": "none"}, r"grpo.scale_by_std.*rloo"),
        ({"grpo.ref_refresh_rounds": 4}, "there is no reference"),
        ({"rollout.overlong_factor": 2}, "rollout.overlong_buffer is 0"),
        ({"rollout.curriculum": "pass_rate", "reward.function": "runs/rm"}, "do not say what is right"),
        ({"grpo.ratio": "sequence", "loss": "own.py:loss"}, "the loss is your own"),
        ({"grpo.scale_by_std": "false"}, "grpo.scale_by_std"),
        ({"rollout.rounds_ahead": 1}, "completions of older weights need a correction; set grpo.is_cap"),
        (
            {"rollout.rounds_ahead": 1, "grpo.is_cap": 2, "rollout.refill": 1},
            "the next one is sampled already",
        ),
        ({"rollout.rounds_ahead": 2}, "rollout.rounds_ahead"),
        ({"rollout.quantization": "int8"}, "need a correction; set grpo.is_cap too, such as 2"),
        (
            {"rollout.quantization": "int8", "grpo.is_cap": 2, "rollout.engine": "generic"},
            "only the native engine has 8-bit weights",
        ),
        (
            {"rollout.quantization": "int8", "grpo.is_cap": 2, "rollout.engine": "paged"},
            "rollout.engine paged, but only the native engine has 8-bit weights",
        ),
        ({"rollout.engine": "generic", "rollout.kv_cache_tokens": 4096}, "which keeps rows, not tokens"),
        ({"rollout.kv_cache_tokens": 15}, "rollout.kv_cache_tokens"),
    ],
)
def test_what_cannot_be_meant_is_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        resolve("grpo", BASE | given)


def test_the_variants_together_are_accepted():
    given = {
        "grpo.objective": "cispo", "grpo.ratio": "sequence", "grpo.entropy_coef": 0.01, "grpo.is_cap": 2,
        "grpo.advantage": "reinforce++", "grpo.kl_coef": 0.01, "grpo.ref_refresh_rounds": 2, "rollout.refill": 2,
        "rollout.curriculum": "pass_rate", "rollout.overlong_buffer": 64, "rollout.overlong_factor": 2,
    }  # fmt: skip
    cfg, notes = resolve("grpo", BASE | given)
    assert notes.warnings == []
    assert cfg.grpo.ref_refresh_rounds == 2


def test_int8_sampling_needs_a_recipe_that_corrects_for_it():
    cfg, _ = resolve("grpo", BASE | {"rollout.quantization": "int8", "grpo.is_cap": 2})
    assert cfg.rollout.quantization == "int8"
    with pytest.raises(ConfigError, match="ppo takes the sampler's log-probs for the policy's own"):
        resolve("ppo", BASE | {"rollout.quantization": "int8"})
