"""Lines people bring along, run from their first flag to the final model: names as published, sizes of a tiny model."""

import json
import os
import random
import shlex
import subprocess
import sys

import pytest
import torch

from kitae.cli.main import main
from kitae.models.toy import CHAT_TEMPLATE

FAKE_WANDB = """
class api:
    api_key = None
class _Run:
    def log(self, metrics, step): open("wandb.txt", "a").write(f"{step}\\n")
    def finish(self): open("wandb.txt", "a").write("finished\\n")
def init(**options):
    assert options["mode"] == "offline"
    return _Run()
"""
TRAIN_GRPO = """--pretrain MODEL --tokenizer_dir MODEL --prompt_dataset DATA.jsonl
    --conversation_template_config Qwen_Qwen2.5-3B.json --reward_functions math_competition_reward_fn
    --plugin zero2_cpu --num_episodes 2 --num_collect_steps 2 --num_update_steps 1 --num_generations 4
    --experience_batch_size 1 --train_batch_size 2 --inference_batch_size 8 --logits_forward_batch_size 2
    --accumulation_steps 2 --lr 1e-3 --kl_coef 0.01 --initial_temperature 1.0 --final_temperature 0.9 --grad_clip 0.1
    --weight_decay 0.01 --warmup_steps 1 --max_length 12 --max_seq_len 200 --save_path OUT --log_dir LOGS
    --use_wandb"""
SFT_GUIDE = """--model_name_or_path MODEL --dataset_name DATA.jsonl --output_dir ./output/sft
    --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --learning_rate 2e-3
    --warmup_steps 1 --logging_steps 1 --save_steps 2 --evaluation_strategy steps --eval_steps 2 --report_to wandb"""


@pytest.fixture
def place(tmp_path, monkeypatch, tiny):
    """A working folder with MODEL, rows of competition_math in DATA.jsonl, and a wandb that nobody is logged in to."""
    rng = random.Random(0)
    with (tmp_path / "DATA.jsonl").open("w") as file:
        for _ in range(20):
            a, b = rng.randint(1, 9), rng.randint(1, 9)
            row = {"problem": f"{a}+{b}?", "level": "Level 1", "type": "Algebra"}
            file.write(json.dumps({**row, "solution": f"It is $\\boxed{{{a + b}}}$."}) + "\n")
    (tmp_path / "MODEL").symlink_to(tiny("qwen3"))
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(FAKE_WANDB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return tmp_path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def assert_moved(trained, start):
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (trained, start)]
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_colossals_grpo_line_trains(place, monkeypatch, capfd):
    monkeypatch.syspath_prepend(place / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    config = {
        "chat_template": CHAT_TEMPLATE.replace("strip_thinking", "false").replace("prefill", "''"),
        "system_message": "Write <think>...</think><answer>...</answer>.",
        "stop_ids": [2],
        "response_format_tags": {
            "think_start": {"text": "<think>", "num_occur": 1}, "think_end": {"text": "</think>", "num_occur": 1},
            "answer_start": {"text": "<answer>", "num_occur": 1}, "answer_end": {"text": "</answer>", "num_occur": 1},
        },
    }  # fmt: skip
    (place / "Qwen_Qwen2.5-3B.json").write_text(json.dumps(config))
    code = main(["train", "grpo", *shlex.split(TRAIN_GRPO)])
    shown = capfd.readouterr().err
    assert code == 0, shown
    assert "--plugin zero2_cpu has no effect" in shown
    # 2 episodes of 2 x 4 completions, which are 2 updates of 2 x 2 completions each.
    steps = lines_of(place / "OUT" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["rollout/temperature"] for line in steps if "rollout/temperature" in line] == [1.0, 0.9]
    assert "train/kl" in steps[0]
    samples = lines_of(place / "OUT" / "samples.jsonl")
    assert len(samples) == 16 and {sample["reward"] for sample in samples} <= {0.0, 1.0, 10.0}
    saved = json.loads((place / "OUT" / "run.json").read_text())["settings"]
    assert (saved["optim"]["max_grad_norm"], saved["grpo"]["kl_coef"]) == (0.1, 0.01)
    assert list((place / "LOGS").glob("events.out.tfevents.*"))
    assert (place / "wandb.txt").read_text().split() == ["1", "2", "3", "4", "finished"]
    assert_moved("OUT", "MODEL")


def test_the_guides_torchrun_line_trains_on_two_ranks(place):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(place / "packages"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [*torchrun, "-m", "kitae", "train", "sft", *shlex.split(SFT_GUIDE)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A row of 20 is held out for evaluation; the others are 3 steps of 2 ranks x 2 x 2 rows, the last of 3.
    steps = lines_of(place / "output" / "sft" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert [step["step"] for step in steps if "eval/loss" in step] == [2, 3]
    log = (place / "output" / "sft" / "train.log").read_text()
    assert "19 training rows" in log and "1 evaluation rows" in log
    assert (place / "wandb.txt").read_text().split() == ["1", "2", "3", "finished"], (
        "only the first rank reports"
    )
    assert_moved("output/sft", "MODEL")
