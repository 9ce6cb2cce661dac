"""The consumer-GPU notebook, cell by cell, on a tiny model that was saved in 4 bits."""

from pathlib import Path

import nbformat
import pytest

from kitae.config import ModelSettings
from kitae.models.load import load_policy, load_tokenizer

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "consumer-gpu.ipynb"


@pytest.fixture
def four_bit_model(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = ModelSettings(
        name_or_path=str(tiny("llama", hidden_size=128)), quantization="nf4", device="cpu"
    )
    folder = tmp_path / "tiny-bnb-4bit"
    load_policy(settings, trainable=False).causal_lm.save_pretrained(folder)
    load_tokenizer(settings).save_pretrained(folder)
    return folder


def read_notebook():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_the_notebook_is_stored_without_outputs():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1


def test_every_cell_of_the_notebook_runs(four_bit_model, workspace, capsys):
    names = {}
    for cell in read_notebook().cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "consumer-gpu.ipynb", "exec"), names)
        if "parameters" in cell.metadata.get("tags", []):
            small = {
                "MODEL": str(four_bit_model),
                "DATA": "examples/data/identity-en.jsonl",
                "EPOCHS": 2,
                "MAX_NEW_TOKENS": 4,
            }
            assert set(small) <= set(names)
            names |= small
    out = capsys.readouterr().out
    assert f"Perplexity: {names['eval_results']['perplexity']:.2f}\n" in out
    assert names["eval_results"]["rows"] == 2
    assert "adapter_model.safetensors\n" in out
    assert out.endswith(f"{four_bit_model}\n")
    config = names["model"].peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert config.target_modules == {"q_proj", "v_proj"}
