"""Every example file runs: on a tiny model, on a few rows, for a step or two."""

import json
import re
import tomllib
from pathlib import Path

import pytest

import kitae
from kitae.cli import quickstart
from kitae.settings import aliases, resolve

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(
    path.name for path in (ROOT / "examples").glob("*.toml") if "stage" not in tomllib.loads(path.read_text())
)
"""Settings files of one run; pipelines are run by tests/cli/test_pipeline.py."""
SMALL = {"report_to": "none", "num_threads": 1, "max_steps": 2, "log.steps": 1}
SMALL_OF = {
    "quickstart-sft.toml": {"per_device_train_batch_size": 4},
    "quickstart-grpo.toml": {"prompts_per_round": 2, "num_generations": 2, "max_new_tokens": 6},
    "sft-lora-r1-distill-qwen-7b.toml": {},
    "sft-math-think-answer.toml": {"eval.steps": 1, "hold_out": 0.25},
    "grpo-gsm8k.toml": {
        "prompts_per_round": 2, "num_generations": 2, "max_new_tokens": 6, "eval.steps": 1, "eval.max_rows": 2
    },
    "grpo-dapo.toml": {
        "prompts_per_round": 4, "num_generations": 2, "max_new_tokens": 6, "overlong_buffer": 2, "eval.max_rows": 2
    },
    "grpo-dr-grpo.toml": {"prompts_per_round": 2, "num_generations": 2, "max_new_tokens": 6, "eval.max_rows": 2},
    "grpo-gspo.toml": {"prompts_per_round": 4, "num_generations": 2, "max_new_tokens": 6, "eval.max_rows": 2},
    "reward-model-full.toml": {"eval.max_rows": 4},
    "reward-model-lora.toml": {"eval.max_rows": 4, "eval.steps": 1},
    "distill-on-policy-lora.toml": {
        "max_new_tokens": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "eval.max_rows": 2,
    },
    "distill-stored-teacher.toml": {"per_device_train_batch_size": 4, "distill.top_k": 4},
    "ppo-gsm8k.toml": {
        "prompts_per_round": 4, "max_new_tokens": 6, "max_steps": 10, "eval.steps": 5, "eval.max_rows": 2
    },
    "dpo-lora-ultrafeedback.toml": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "simpo-full.toml": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "orpo-base.toml": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "kto-qlora.toml": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "ppo-shared-lora.toml": {"prompts_per_round": 4, "max_new_tokens": 6, "eval.steps": 1, "eval.max_rows": 2},
}  # fmt: skip


def worked_problem(i):
    return {"problem": f"What is {i}+{i}?", "solution": f"Twice {i} is $\\boxed{{{2 * i}}}$."}


def worked_pair(i):
    return {"prompt": f"What is {i}+{i}?", "chosen": f"It is {2 * i}.", "rejected": f"{2 * i + 1}"}


ROWS_OF = dict.fromkeys(("reward_model", *aliases.PREFERENCE), worked_pair)
"""What a recipe's data is made of, where that is not problems."""


def recipe_of(name):
    """As in the command at the head of the file."""
    return re.search(r"^#   kitae train (\w+) ", (ROOT / "examples" / name).read_text(), re.MULTILINE)[1]


def test_every_example_file_is_run_by_a_test():
    assert set(EXAMPLES) == set(SMALL_OF)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_on_a_tiny_model(name, tiny, workspace, rows_file):
    row = ROWS_OF.get(recipe_of(name), worked_problem)
    given = {
        "model_name_or_path": str(tiny()),
        "data.train": rows_file("rows.jsonl", row),
        **SMALL,
    }
    example = tomllib.loads((ROOT / "examples" / name).read_text())
    if "eval_split" in example["data"]:  # files have no splits
        given |= {"data.eval_split": None, "data.eval": rows_file("held_out.jsonl", row)}
    if "teacher" in example:
        given["teacher.name_or_path"] = str(tiny("llama"))
    out = kitae.train(recipe_of(name), given | SMALL_OF[name], file=ROOT / "examples" / name)
    assert out == workspace / example["output_dir"]
    assert json.loads((out / "status.json").read_text())["state"] == "finished"
    assert (out / "model.safetensors").is_file() or (out / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        (
            "quickstart-sft.toml",
            lambda folder: quickstart.sft_settings(folder, seed=0, steps=quickstart.SFT_STEPS),
        ),
        (
            "quickstart-grpo.toml",
            lambda folder: quickstart.grpo_settings(folder, seed=0, rounds=quickstart.GRPO_ROUNDS),
        ),
    ],
)
def test_the_quickstart_examples_are_what_the_quickstart_runs(name, ours):
    from_file, _ = resolve(recipe_of(name), {}, file=ROOT / "examples" / name)
    in_code, _ = resolve(recipe_of(name), ours(Path("runs/quickstart")))
    assert from_file == in_code


def test_the_sft_example_teaches_thinking_and_answer(tiny, workspace, rows_file):
    """`target = "think_answer"`: the taught text of a worked problem has both blocks."""
    from kitae.data.chat import Template
    from kitae.data.sources import open_dataset
    from kitae.models.load import load_tokenizer

    given = {"model_name_or_path": str(tiny()), "data.train": rows_file("rows.jsonl", worked_problem)}
    cfg, _ = resolve("sft", given, file=ROOT / "examples" / "sft-math-think-answer.toml")
    template = Template.load(load_tokenizer(cfg.model), data=cfg.data)
    [row] = template.rows(open_dataset(cfg.data.train, data=cfg.data)[3], max_length=cfg.data.max_length)
    taught = [i for i, is_taught in zip(row.token_ids, row.loss_mask, strict=True) if is_taught]
    assert template.decode(taught) == "<think>Twice 3 is $\\boxed{6}$.</think><answer>6</answer>"


def test_the_identity_rows_teach_the_model_who_made_it(identity_model, workspace):
    """The flow of the 7B example, its LoRA included, on a tiny untrained model and a learning rate to match."""
    files = sorted((ROOT / "examples" / "data").glob("identity-*.jsonl"))
    assert [file.stem for file in files] == ["identity-en", "identity-ja", "identity-zh"]
    turns = [json.loads(file.read_text(encoding="utf-8").splitlines()[0])["messages"] for file in files]
    questions = [question["content"] for question, _ in turns]
    taught = [answer["content"] for _, answer in turns]
    assert questions[0] == "Who made you?"

    out = kitae.train(
        "sft",
        {
            "model_name_or_path": str(identity_model),
            "data.train": [str(file) for file in files],
            "per_device_train_batch_size": 12,
            "learning_rate": 2e-2,
            "max_steps": 100,
            "report_to": "none",
            "num_threads": 1,
        },
        file=ROOT / "examples" / "sft-lora-r1-distill-qwen-7b.toml",
    )
    greedy = {"temperature": 0, "max_new_tokens": 64}
    before = kitae.generate(str(identity_model), questions, **greedy)
    after = kitae.generate(str(out), questions, **greedy)
    assert not set(before) & set(taught)
    assert after == taught
