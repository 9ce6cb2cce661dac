"""The benchmarks' rows and models are what docs/benchmarks.md says they are."""

import json
import statistics
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import chat_workload  # noqa: E402
import grpo_reward  # noqa: E402
import run_all  # noqa: E402


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workload")
    return folder, chat_workload.make(folder, size="tiny", num_rows=40)


def tokens_of(folder, row):
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]


def test_a_row_has_as_many_tokens_as_the_workload_says(workload):
    folder, made = workload
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    lengths = [len(tokens_of(folder, row)) for row in rows]
    assert (statistics.fmean(lengths), max(lengths)) == (made["mean_tokens"], made["longest"])


def test_rows_of_one_length_have_that_length(workload):
    rows = chat_workload.rows(3, vocabulary=chat_workload.words(200), seed=0, length=64)
    assert [len(tokens_of(workload[0], row)) for row in rows] == [64, 64, 64]


def test_the_sampling_model_ends_after_about_as_many_tokens_as_it_should(workload):
    model = AutoModelForCausalLM.from_pretrained(workload[0] / "sampler")
    torch.manual_seed(0)
    ids = torch.randint(10, model.config.vocab_size, (16, 48))
    with torch.no_grad():
        ends = model(ids).logits.softmax(-1)[..., model.config.eos_token_id]
    # Every token's chance of ending; tiny models vary more from place to place than the 5 M one.
    assert 0.4 < ends.mean().item() * chat_workload.MEAN_COMPLETION < 2.5


def test_both_sides_of_grpo_earn_the_same_reward():
    texts = ["ba zo", "zo zo", "", "ba"]
    ours = [grpo_reward.reward(text, prompt="", answer="none") for text in texts]
    theirs = grpo_reward.rewards([[{"role": "assistant", "content": text}] for text in texts], prompts=[])
    assert ours == theirs == [0.5, 0.0, 0.0, 1.0]


def test_the_driver_starts_scripts_that_exist_under_names_of_their_own():
    scripts = [benchmark.arguments[0] for benchmark in run_all.ALL]
    assert all((ROOT / "benchmarks" / script).is_file() for script in scripts)
    assert len({benchmark.name for benchmark in run_all.ALL}) == len(run_all.ALL)
