"""The nouns that cross a layer boundary: Problem, Rollout, Row, Packing, Batch, TokenOutputs, Score.

Dimension key, used in every name suffix of the project:
    T packed tokens of one forward pass   N predictions that count   V vocabulary   H hidden size
    P prompts (or pairs)   G rollouts per prompt   B rows   E experts   D size of one attention head
Names ending _T are aligned to input tokens, names ending _N to predictions: hidden state source_N
predicts token targets_N.

    Problem --sample--> Rollout --judge--> Row --collate--> Batch --model--> TokenOutputs --loss--> gradient
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One question, rendered for sampling, with whatever a reward needs to judge a completion."""

    prompt: str
    """The user's question as the data has it (for a conversation: its last user turn)."""
    token_ids: list[int]
    """The rendered prompt, ready for the model; it ends with the prefill."""
    answer: str | None = None
    """The gold answer, or None where the data has none."""
    columns: dict[str, Any] = field(default_factory=dict)
    """The data row's other columns; handed to the reward by name."""
    messages: list[dict[str, Any]] = field(default_factory=list)
    """The turns that were rendered, for a reward model, which has a template of its own; empty: `prompt` is all."""
    prefill: str = ""
    """The end of the rendered prompt that belongs to the completion, such as `<think>` and a line feed."""
    index: int = 0
    """Stable number of the row in its data; with the run's seed it seeds the row's sampler."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sampled completion with the log-probabilities of the distribution it was drawn from."""

    problem: Problem
    text: str
    """Prefill plus decoded completion, without the end token: what rewards and people read."""
    token_ids: list[int]
    """The sampled tokens, end token included where one was sampled; the prefill is not among them."""
    logprobs: list[float]
    """One per token, under the distribution really sampled from (temperature, top-p, top-k, min-p)."""
    kept_ids: list[list[int]] | None = None
    """Per token, the ids that top-p, top-k or min-p left to choose from; None where none was on."""
    finish_reason: FinishReason = "stop"
    reported_tokens: int | None = None
    """How many tokens an endpoint says it sampled; it does not send them."""

    @property
    def num_tokens(self) -> int:
        """Sampled tokens, end token included; 0 where an endpoint does not say."""
        return len(self.token_ids) or self.reported_tokens or 0


class Score(NamedTuple):
    """What a reward says of one completion; value None means it could not be scored."""

    value: float | None
    reason: str = ""

    @property
    def main(self) -> float | None:
        """What the main reward itself says: reward.function's, without its weight."""
        return self.value


class WeighedScore(Score):
    """A weighted sum of several rewards."""

    parts: dict[str, float | None]
    """What each reward itself says, the main one first."""

    def __new__(cls, value: float | None, reason: str, parts: dict[str, float | None]) -> Self:
        score = super().__new__(cls, value, reason)
        score.parts = parts
        return score

    @property
    def main(self) -> float | None:
        return next(iter(self.parts.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training sequence, still Python lists: prompt and completion, and which tokens teach."""

    token_ids: list[int]
    loss_mask: list[bool]
    """True where the token is a target: it is predicted from the tokens before it."""
    prompt_length: int = 0
    """Tokens at the front that consecutive rows may share; a shared prompt is computed once."""
    weight: float = 1.0
    """Factor of every taught token of this row (see algos/averaging.py)."""
    streams: dict[str, list[float]] = field(default_factory=dict)
    """Per-token numbers a loss asks for by name, aligned to token_ids as targets."""
    numbers: dict[str, float] = field(default_factory=dict)
    """Numbers of the whole row a loss asks for by name, such as a reference's log-prob of the completion."""
    kept_ids: list[list[int]] | None = None
    """Per token of token_ids, the ids the sampler chose from (empty list: all of them)."""

    @property
    def num_taught(self) -> int:
        return sum(self.loss_mask)


class Segment(NamedTuple):
    """A run of packed tokens that see each other causally, and before that a shared prompt."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(slots=True, kw_only=True)
class Packing:
    """Which packed tokens see which: segments in order, then padding up to num_tokens.

    A token of a segment sees the segment's prefix (if any) and the segment's tokens up to itself.
    `plans` is where the attention seam keeps the index maps it derives, one per device.
    """

    segments: list[Segment]
    num_tokens: int
    plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_real_tokens(self) -> int:
        return sum(s.length for s in self.segments)


@dataclass(slots=True, kw_only=True)
class Batch:
    """The rows of one forward pass laid end to end, and the N predictions that count in it."""

    input_ids_T: Tensor
    positions_T: Tensor
    packing: Packing
    source_N: Tensor
    targets_N: Tensor
    weights_N: Tensor
    row_N: Tensor
    """Which row of this batch each prediction belongs to."""
    num_rows: int
    streams: dict[str, Tensor] = field(default_factory=dict)
    """Per prediction, [N] each."""
    numbers: dict[str, Tensor] = field(default_factory=dict)
    """Per row, [B] each."""
    kept_ids_N: list[list[int]] | None = None
    """Per prediction, the ids the sampler chose from; log-probs are renormalised over them."""
    temperature: float = 1.0
    """Logits are divided by it before log-probs are taken, for policy and reference alike."""
    rows: list[Row] = field(default_factory=list)
    """The rows this batch was made of, so that it can be cut in halves when memory runs out."""
    rows_per_unit: int = 1
    """So many consecutive rows belong together and are never cut apart: 2 for preference pairs."""
    teacher: Teacher | None = None
    """Whom the model is compared with when this batch's forward pass comes."""


class Teacher(Protocol):
    """Compares a model with a teacher, one batch at a time, so that the soft targets of only one batch exist."""

    def compare(self, student: Any, batch: Batch, hidden_NH: Tensor) -> TokenOutputs:
        """The student's outputs with divergence_N, from its hidden states; `student` is a models.policy.Policy."""
        ...


class TokenOutputs(NamedTuple):
    """What a model says about each prediction that counts, in float32; fields it was not asked for are None."""

    logprobs_N: Tensor
    """Log-probability of each target; empty for a model that only gives values."""
    entropy_N: Tensor | None = None
    """Entropy of the distribution each target was predicted from."""
    values_N: Tensor | None = None
    """A critic's or reward model's number at each prediction."""
    divergence_N: Tensor | None = None
    """Divergence between the teacher's distribution and the model's at each prediction."""
    row_N: Tensor | None = None
    """Which row of the batch each prediction belongs to."""
    num_rows: int = 0
    teacher_logprobs_N: Tensor | None = None
    """The teacher's log-probability of each target."""

    def per_row(self, numbers_N: Tensor) -> Tensor:
        """Sums [B] over each row's predictions."""
        assert self.row_N is not None, "these outputs do not know their rows"
        return numbers_N.new_zeros(self.num_rows).index_add(0, self.row_N, numbers_N)
