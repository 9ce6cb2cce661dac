"""kitae train from words and from Python, on tiny models; what training itself does is tested elsewhere."""

import json

import pytest

import kitae as package


def test_a_guides_lines_run_in_sequence(kitae, files, tiny):
    code, _, err = kitae(
        "train", "sft", "--model_name_or_path", tiny(), "--dataset_name", "sft.jsonl", "--output_dir", "output/sft",
        "--num_train_epochs", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 1,
        "--learning_rate", "2e-5", "--warmup_steps", 100, "--logging_steps", 1, "--save_steps", 500,
        "--evaluation_strategy", "steps", "--eval_steps", 500, "--report_to", "none", "--tf32", "True",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = kitae(
        "train", "grpo", "--model_name_or_path", "./output/sft", "--dataset_name", "rl.jsonl", "--output_dir", "output/grpo",
        "--max_steps", 2, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 4, "--num_generations", 4,
        "--max_completion_length", 6, "--report_to", "none",
    )  # fmt: skip
    assert code == 0, err
    metrics = [json.loads(line) for line in (files / "output/grpo/metrics.jsonl").read_text().splitlines()]
    assert any("rollout/reward" in record for record in metrics)
    assert (files / "output/grpo/model.safetensors").is_file()


def test_grpo_after_sft_on_worked_solutions_starts_in_the_right_form(kitae, files, tiny):
    rows = [
        {"problem": f"{i}+{i}?", "level": "Level 1", "solution": f"it is \\boxed{{{2 * i}}}"}
        for i in range(12)
    ]
    (files / "math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = kitae(
        "train", "sft", "--model_name_or_path", tiny(), "--dataset_name", "math.jsonl", "--output_dir", "./output/sft",
        "--max_steps", 120, "--per_device_train_batch_size", 6, "--gradient_accumulation_steps", 2, "--learning_rate",
        "5e-3", "--warmup_steps", 10, "--logging_steps", 10, "--save_steps", 500, "--report_to", "none",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = kitae(
        "train", "grpo", "--model_name_or_path", "./output/sft", "--dataset_name", "math.jsonl", "--output_dir",
        "./output/grpo", "--max_steps", 1, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 8,
        "--num_generations", 8, "--inference_batch_size", 4, "--logits_forward_batch_size", 1,
        "--initial_temperature", "1.0", "--final_temperature", "0.1", "--learning_rate", "1e-6",
        "--max_completion_length", 40, "--report_to", "none",
    )  # fmt: skip
    assert code == 0, err
    [first] = [json.loads(line) for line in (files / "output/grpo/metrics.jsonl").read_text().splitlines()]
    assert first["rollout/format_rate"] > 0.5


def test_python_trains_with_flat_names_and_returns_the_folder(files, tiny):
    folder = package.train(
        "sft",
        {
            "model_name_or_path": str(tiny()),
            "dataset_name": "sft.jsonl",
            "output_dir": "run",
            "max_steps": 1,
            "report_to": "none",
        },
    )
    assert (folder / "model.safetensors").is_file()
    assert json.loads((folder / "run.json").read_text())


def test_a_precision_the_device_is_not_good_at_warns(kitae, files, tiny, monkeypatch):
    from kitae.backends import cpu
    from kitae.cli.train import _fitted
    from kitae.settings import resolve

    cfg, notes = resolve(
        "sft", {"model_name_or_path": "m", "dataset_name": "d", "bf16": True, "model.device": "cpu"}
    )
    monkeypatch.setattr(cpu, "_cpu_flags", set)
    assert _fitted(cfg, notes)[1].warnings == ["bf16 has no effect: this CPU has no bfloat16 instructions"]
    monkeypatch.setattr(cpu, "_cpu_flags", lambda: {"amx_bf16"})
    assert _fitted(cfg, notes)[0].model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_name_or_path", "absent/model"], "absent/model"),
        (["--dataset_name", "absent.jsonl"], "absent.jsonl"),
        (["--learning_rate", "fast"], "optim.learning_rate is 'fast'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(kitae, files, tiny, flags, message):
    given = {"--model_name_or_path": tiny(), "--dataset_name": "sft.jsonl", "--output_dir": "run"}
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    code, out, err = kitae("train", "sft", *[word for pair in given.items() for word in pair])
    assert code == 2
    assert message in err.splitlines()[-1] and "Traceback" not in out + err
