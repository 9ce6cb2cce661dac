"""What a completion is held to while it is sampled: the form that its text must have, token by token."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Constraint(Protocol):
    """The form of one completion, at the place its tokens have reached."""

    failure: Exception | None
    """Why the form cannot be kept any further; from then on the tokens are worth nothing, and whoever runs it gives up."""

    def mask_(self, logits_V: Tensor) -> None:
        """Set the logits of the tokens that cannot come next to -inf; an end token can come where the form is complete.

        At least one token is left. Log-probabilities are then those of the distribution without the others.
        """
        ...

    def accept(self, token: int) -> bool:
        """Take note of the token that came, no end token; True where nothing can follow it."""
        ...
