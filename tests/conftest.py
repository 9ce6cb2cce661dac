"""Fixtures shared by all tests: tiny models made on the fly, and the real data where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: more threads would only wait for each other

ROOT = Path(__file__).resolve().parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
FAMILIES = ["qwen3", "llama", "deepseek_v3"]


@pytest.fixture(autouse=True, scope="session")
def own_home(tmp_path_factory: pytest.TempPathFactory):
    """Pointers to runs go to a folder of this session, not to the user's ~/.kitae."""
    before = os.environ.get("KITAE_HOME")
    os.environ["KITAE_HOME"] = str(tmp_path_factory.mktemp("kitae-home"))
    yield
    if before is None:
        del os.environ["KITAE_HOME"]
    else:
        os.environ["KITAE_HOME"] = before


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data; tests that need it are skipped elsewhere, but must run in CI."""
    if not SHARED_DATA.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SHARED_DATA} must be present in CI")
        pytest.skip(f"real data not present at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory):
    """A function family -> folder of a tiny random model with the character tokenizer (made once a session)."""
    from kitae.models.toy import make_model, make_tokenizer

    made: dict[tuple, Path] = {}

    def make(family: str = "qwen3", *, prefill: str = "", strip_thinking: bool = False, **sizes) -> Path:
        key = (family, prefill, strip_thinking, *sorted(sizes.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            tokenizer = make_tokenizer(prefill=prefill, strip_thinking=strip_thinking)
            made[key] = make_model(folder, family, tokenizer=tokenizer, **sizes)
        return made[key]

    return make
