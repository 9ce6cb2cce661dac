"""How large the forward passes of a run's updates may become, from its settings alone."""

from __future__ import annotations

from typing import Any

from kitae.config import BatchTrainSettings, PairTrainSettings


def most_tokens(cfg: Any, *, per_forward: int | None) -> int:
    """The tokens of the largest pass: as many rows as may share one, each as long as any may be.

    `per_forward` is what the device profits from at most; one row or pair alone may be longer. Any: each recipe has its
    own Settings.
    """
    rollout: Any = getattr(cfg, "rollout", None)
    longest = 0 if rollout is None else rollout.max_prompt_length + rollout.max_new_tokens
    train = cfg.train
    if isinstance(train, BatchTrainSettings | PairTrainSettings):
        longest, units = max(longest, cfg.data.max_length), train.per_device_train_batch_size
        if isinstance(train, PairTrainSettings) and not hasattr(cfg, "kto"):  # whose completions are no pairs
            longest *= 2
    else:
        units = rollout.rows_per_forward
    tokens = units * longest
    return tokens if per_forward is None else max(longest, min(tokens, per_forward))
