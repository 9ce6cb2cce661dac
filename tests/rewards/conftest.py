"""Real worker pools, shared by a test file where their settings are the defaults."""

from __future__ import annotations

import pytest

from kitae.config import RewardSettings
from kitae.rewards.pool import RewardPool


@pytest.fixture(scope="module")
def pool():
    """The reasoning reward in two workers with a generous limit, for answers that are not hostile."""
    with RewardPool(RewardSettings(timeout_s=20)) as pool:
        yield pool


@pytest.fixture
def reward_file(tmp_path):
    """A function body of a user's reward -> its setting, file.py:reward."""

    def write(
        body: str, *, signature: str = "completion, *, prompt, answer, **columns", before: str = ""
    ) -> str:
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path = tmp_path / "my_reward.py"
        path.write_text(f"{before}\ndef reward({signature}):\n{lines}\n")
        return f"{path}:reward"

    return write
