"""Real tokenizers, loaded once, and a helper that shows which tokens a row teaches."""

from __future__ import annotations

from functools import cache

import pytest

REAL = ["DeepSeek-R1-Distill-Qwen", "DeepSeek-V3-R1", "minimind"]


@pytest.fixture(scope="session")
def load_real(shared_data):
    """A function name -> that real tokenizer, loaded once a session."""
    from transformers import PreTrainedTokenizerFast

    @cache
    def load(name: str):
        folder = shared_data / ("models" if name == "stories260K" else "tokenizers") / name
        return PreTrainedTokenizerFast.from_pretrained(folder)

    return load


@pytest.fixture(scope="session")
def r1(load_real):
    return load_real("DeepSeek-R1-Distill-Qwen")


@pytest.fixture(scope="session", params=[*REAL, "stories260K"])
def real_tokenizer(request, load_real):
    return load_real(request.param)


@pytest.fixture(scope="session")
def shown():
    """A function (template, row) -> its text, taught spans in double brackets."""

    def show(template, row) -> str:
        text, was_taught = "", False
        for token, is_taught in zip(row.token_ids, row.loss_mask, strict=True):
            text += {(False, True): "[[", (True, False): "]]"}.get((was_taught, is_taught), "")
            text += template.tokenizer.decode([token], skip_special_tokens=False)
            was_taught = is_taught
        return text + ("]]" if was_taught else "")

    return show
