"""The memory page has the numbers that the estimate gives, for the shapes that the models really have."""

from __future__ import annotations

import json

import pytest

from kitae.models.estimate import build_on_meta
from tests.docs import make_memory_page as memory

CONFIGS = memory.PAGE.parents[2] / "shared" / "data" / "configs" / "composed"


@pytest.mark.parametrize("shape", memory.SHAPES, ids=lambda shape: shape.name)
def test_each_line_of_the_page_is_the_estimate(shape):
    lines = memory.PAGE.read_text(encoding="utf-8").splitlines()
    missing = [line for line in memory.rows(shape) if line not in lines]
    assert not missing, "write the page anew: python -m tests.docs.make_memory_page"


@pytest.mark.parametrize("shape", memory.SHAPES[:1] + memory.SHAPES[2:3], ids=lambda shape: shape.name)
def test_a_shape_has_the_models_number_of_parameters(shape):
    assert sum(p.numel() for p in build_on_meta(shape.config).parameters()) == shape.parameters


@pytest.mark.parametrize("shape", memory.SHAPES, ids=lambda shape: shape.name)
def test_a_shape_is_that_of_the_published_config(shape):
    file = CONFIGS / f"deepseek-ai--DeepSeek-{shape.name}_config.json"
    if not file.is_file():
        pytest.skip(f"{file} is not there")
    raw = json.loads(file.read_text(encoding="utf-8"))
    for name in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ):
        assert raw[name] == getattr(shape, name)
    assert (raw["intermediate_size"], raw["vocab_size"]) == (shape.intermediate_size, shape.vocab_size)
    assert not raw["tie_word_embeddings"]


def test_the_rest_of_the_page_is_as_it_was_generated():
    text = memory.PAGE.read_text(encoding="utf-8")
    assert text.startswith(memory.HEAD)
    for shape in memory.SHAPES:
        assert f"{shape.parameters:,} |" in text
    example = memory.SHAPES[0].config
    for recompute in (False, True):
        kept = memory.activation_bytes(example, num_tokens=1024, element=2, recompute=recompute)
        assert f"{kept / 2**20:.1f}" in memory.HEAD
