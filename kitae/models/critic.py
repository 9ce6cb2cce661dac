"""A critic: a transformers sequence classifier of one label, called on packed batches like the policy.

Batch --backbone (attention seam)--> hidden_TH --source_N--> score head, float32 --> values_N

PPO's value function reads it before every token of a completion, a reward model after the last one.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from kitae.config import LoraSettings, ModelSettings
from kitae.models.load import load_as
from kitae.models.policy import Policy
from kitae.types import Batch, TokenOutputs


class Critic(Policy):
    """A model that gives a number at each prediction; `causal_lm` is the sequence classifier.

    The number at a prediction is read from hidden state source_N, which has seen the tokens before the target and not
    the target: the value of the state in which that token was chosen. `reward_model` reads the score of a whole row by
    a row with one more token at its end (see recipes/_reward_model.py).
    """

    gives_scores: ClassVar[bool] = True

    def forward(
        self, batch: Batch, *, with_entropy: bool = False, coefficients_N: Tensor | None = None
    ) -> TokenOutputs:
        """values_N of the batch in float32; logprobs_N is empty, since a critic has no vocabulary."""
        assert not with_entropy and coefficients_N is None, "a critic has no log-probs"
        device = self.device
        hidden_TH = self.hidden(batch.input_ids_T.to(device), batch.positions_T.to(device), batch.packing)
        hidden_NH = hidden_TH.index_select(0, batch.source_N.to(device))
        values_N: Tensor = self.causal_lm.score(hidden_NH.float()).squeeze(-1)
        return TokenOutputs(
            values_N.new_zeros(0),
            values_N=values_N,
            row_N=batch.row_N.to(device),
            num_rows=batch.num_rows,
        )


def load_critic(
    model: ModelSettings,
    *,
    lora: LoraSettings | None = None,
    trainable: bool = True,
    optimizer: str = "adamw",
    ranks: int = 1,
    tokens_per_pass: int = 2048,
) -> Critic:
    """Load a reward model, or a language model whose layers a critic takes over with a new head of zeros.

    `model` may be a folder, run, adapter folder or hub id of either kind. Under LoRA the head trains whole, beside the
    adapters. The other arguments are load_policy's.
    """
    return load_as(
        Critic,
        model,
        lora=lora,
        trainable=trainable,
        optimizer=optimizer,
        ranks=ranks,
        tokens_per_pass=tokens_per_pass,
    )
