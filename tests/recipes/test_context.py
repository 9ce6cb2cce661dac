"""Rows longer than the model's context train, and the log says so once."""

import logging

import pytest

from kitae.models.toy import make_model
from kitae.recipes import sft
from kitae.recipes._run import run_recipe


@pytest.mark.parametrize(("context", "lines"), [(24, 1), (4096, 0)])
def test_a_row_beyond_the_models_context_is_said_once(context, lines, tmp_path, caplog):
    model = make_model(tmp_path / "model", num_hidden_layers=1, max_position_embeddings=context)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{i} + 1 =", "completion": "{"x" * 40}"}}\n' for i in range(4)))
    settings = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(model), "device": "cpu", "dtype": "float32"},
        "data": {"train": [str(rows)], "target": "as_is"},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2},
        "log": {"report_to": ["none"]},
    }
    caplog.set_level(logging.WARNING, logger="kitae")
    run_recipe("sft", sft.Settings.model_validate(settings))
    told = [line for line in caplog.messages if f"the model's context is {context:,} (" in line]
    assert len(told) == lines
