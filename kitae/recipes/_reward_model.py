"""What surrounds a reward model: rows that end in a score, evaluation on held-out pairs, and its token for padding.

row --with_end--> the same tokens and one more --critic--> values_N, one per row: the score after its last own token
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from kitae.algos.intervals import wilson
from kitae.algos.losses import LossFn
from kitae.algos.reward_model import calibration
from kitae.data.chat import Template
from kitae.models.policy import Policy
from kitae.train.files import write_json
from kitae.train.learner import Learner
from kitae.types import Row, TokenOutputs

if TYPE_CHECKING:
    from kitae.recipes._setup import Evaluate, Setup

log = logging.getLogger(__name__)
CALIBRATION = "calibration.json"
"""File in the run's folder: the newest evaluation's table."""


def with_end(row: Row) -> Row:
    """The row with its last token once more, as the only target.

    A prediction is read from the hidden state before its target (data/collate.py), so the one prediction of this row
    is read at the last token of the given one, mostly the end token. The token that is added is seen by nothing.
    """
    n = len(row.token_ids)
    return replace(row, token_ids=[*row.token_ids, row.token_ids[-1]], loss_mask=[False] * n + [True])


def choose_padding(policy: Policy, template: Template) -> None:
    """Name a token for padding, in tokenizer and configuration, that ends no row.

    transformers reads a classifier's score at the last token that is not padding; where padding is the end token, as in
    many tokenizers, it would read before it. Without a token that is free for it, only single rows can be scored there.
    """
    tokenizer = template.tokenizer
    named = [token for token in tokenizer.all_special_tokens if "pad" in token.lower()]
    candidates = [tokenizer.pad_token, *named, tokenizer.bos_token]
    free = [t for t in candidates if t and tokenizer.convert_tokens_to_ids(t) not in template.stop_ids]
    if free:
        if free[0] != tokenizer.pad_token:
            log.info("padding token %s: %s ends completions", free[0], tokenizer.pad_token)
            tokenizer.pad_token = free[0]
        policy.causal_lm.config.pad_token_id = tokenizer.pad_token_id
    else:
        log.warning("no token is free for padding: transformers can score one row at a time with this model")
        policy.causal_lm.config.pad_token_id = None


def pair_evaluator(
    setup: Setup, learner: Learner, pairs: Sequence[list[Row]] | None, loss_fn: LossFn
) -> Evaluate | None:
    """Loss, accuracy, margin, mean reward and calibration error of held-out pairs under eval/; None where there are none.

    The calibration table goes to calibration.json in the run's folder, and a line with the accuracy's 95 % interval to
    the log.
    """
    if pairs is None:
        return None
    world = setup.world
    mine = [with_end(row) for pair in pairs[world.rank :: world.world_size] for row in pair]

    def evaluate() -> dict[str, float]:
        batches = setup.collate(mine, rows_per_forward=2 * setup.cfg.eval.batch_size, rows_per_unit=2)
        sums: dict[str, float] = {}
        differences: list[float] = []
        for batch, values_N in zip(batches, learner.values(batches), strict=True):
            scores_N = values_N.cpu()
            out = TokenOutputs(
                scores_N.new_zeros(0), values_N=scores_N, row_N=batch.row_N, num_rows=batch.num_rows
            )
            loss, metrics = loss_fn(out, batch.weights_N, **batch.streams, **batch.numbers)
            for name, value in {"loss": loss, **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            differences += (scores_N[0::2] - scores_N[1::2]).tolist()
        total: dict[str, float] = {}
        everywhere: list[float] = []
        for theirs, their_differences in world.gather_json([sums, differences]):
            everywhere += their_differences
            for name, value in theirs.items():
                total[name] = total.get(name, 0.0) + value
        means = {name: value / len(everywhere) for name, value in total.items()}
        means["calibration_error"] = _report(setup, everywhere, accuracy=means["accuracy"])
        shown = ("loss", "accuracy", "margin", "reward", "calibration_error")
        return {f"eval/{name}": means[name] for name in shown}

    return evaluate


def _report(setup: Setup, differences: Sequence[float], *, accuracy: float) -> float:
    """Write the calibration table and tell what it comes to; returns the calibration error."""
    found = calibration(differences)
    low, high = wilson(accuracy * len(differences), len(differences))
    report: dict[str, Any] = {
        "step": setup.run.step,
        "pairs": len(differences),
        "accuracy": accuracy,
        "accuracy_95": [low, high],
        **asdict(found),
    }
    if setup.world.is_main:
        write_json(setup.run.output_dir / CALIBRATION, report)
    log.info(
        "%d held-out pairs: %.1f %% right (95 %% interval %.1f to %.1f), calibration error %.3f; table in %s",
        len(differences), 100 * accuracy, 100 * low, 100 * high, found.error, CALIBRATION,
    )  # fmt: skip
    return found.error
