"""reward_model: its scores are transformers' own at the end token, whatever the layout, and a run can be taken up again."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from kitae.algos.reward_model import bradley_terry
from kitae.config import DataSettings, LoraSettings, ModelSettings, OptimSettings
from kitae.data.chat import Template
from kitae.data.collate import collate
from kitae.errors import ConfigError, DataError
from kitae.models.critic import load_critic
from kitae.models.load import load_tokenizer
from kitae.models.save import save_policy
from kitae.models.toy import make_model, make_tokenizer
from kitae.parallel.world import World
from kitae.recipes import reward_model
from kitae.recipes._reward_model import choose_padding, with_end
from kitae.recipes._run import run_recipe
from kitae.train.learner import Learner
from kitae.types import Row

HERE = Path(__file__).parent


def pairs_file(folder, *, count=24, **more):
    rng = random.Random(3)
    lines = []
    for _ in range(count):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        good, bad = "ab" * rng.randint(1, 3), "xyz" * rng.randint(1, 4)
        row = {"prompt": f"{a}+{b}", "chosen": f"{a + b} {good}", "rejected": f"{a * b} {bad}"}
        lines.append(json.dumps({**row, **{name: make(rng) for name, make in more.items()}}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def settings_for(folder, model, rows, /, **more):
    given = {
        "output_dir": str(folder),
        "model": {"name_or_path": str(model), "dtype": "float32", "device": "cpu"},
        "data": {"train": [str(rows)]},
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "num_threads": 1},
        "optim": {"learning_rate": 3e-3, "warmup_ratio": 0.0},
        "log": {"report_to": ["none"]},
    }
    for section, values in more.items():
        given[section] = {**given[section], **values} if isinstance(given.get(section), dict) else values
    return given


def run(*arguments, **more):
    return run_recipe("reward_model", reward_model.Settings.model_validate(settings_for(*arguments, **more)))


def metrics_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/"))} for line in lines]


def pair_rows(template, path):
    rows = []
    for line in map(json.loads, path.read_text().splitlines()):
        question = [{"role": "user", "content": line["prompt"]}]
        rows += [template.completed(question, line[side]) for side in ("chosen", "rejected")]
    return rows


# the score of a row -------------------------------------------------------------------------------------------------


def test_the_added_token_is_the_only_target_and_what_it_is_does_not_matter(tiny):
    row = Row(token_ids=[5, 6, 7, 8], loss_mask=[False, False, True, True], prompt_length=2)
    ended = with_end(row)
    assert ended.token_ids[:-1] == row.token_ids and ended.loss_mask == [False] * 4 + [True]
    assert ended.prompt_length == 2
    critic = load_critic(ModelSettings(name_or_path=str(tiny()), device="cpu", dtype="float32"))
    with torch.no_grad():
        critic.causal_lm.score.weight.normal_()
    [one] = collate([ended], rows_per_forward=1)
    [other] = collate([Row(token_ids=[5, 6, 7, 8, 50], loss_mask=ended.loss_mask)], rows_per_forward=1)
    assert torch.equal(critic(one).values_N, critic(other).values_N)


@pytest.mark.parametrize("family", ["qwen3", "deepseek_v3"])
def test_neither_packing_nor_shared_prompts_nor_passes_change_loss_and_gradient(family, tiny, tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = ModelSettings(name_or_path=str(tiny(family)), device="cpu", dtype="float32")
    template = Template.load(load_tokenizer(model), data=DataSettings())
    rows = [with_end(row) for row in pair_rows(template, pairs_file(tmp_path, count=6))]
    critic = load_critic(model)
    with torch.no_grad():
        critic.causal_lm.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    save_policy(critic, tmp_path / "saved")
    plain = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    # One row at a time, in transformers' own module, which reads the last token.
    scores = [plain(input_ids=torch.tensor([row.token_ids[:-1]])).logits[0, 0] for row in rows]
    slow = -F.logsigmoid(torch.stack(scores[0::2]) - torch.stack(scores[1::2])).sum() / 6
    slow.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}

    for share_prompts in (True, False):
        for rows_per_forward in (2, 4, 12):
            learner = Learner(critic, optim=OptimSettings(), total_steps=1, world=World())
            batches = collate(
                rows, rows_per_forward=rows_per_forward, rows_per_unit=2, share_prompts=share_prompts
            )
            metrics = learner.forward_backward(batches, bradley_terry, denominator=6)
            assert metrics["loss"] == pytest.approx(slow.item(), rel=1e-5)
            for slot in learner.flat.slots:
                if slot.name in expected:
                    largest = expected[slot.name].abs().max().clamp(min=1e-4)
                    assert (slot.grad - expected[slot.name]).abs().max() < 1e-4 * largest, slot.name


@pytest.mark.parametrize("lora", [0, 4])
def test_the_saved_model_gives_the_same_scores_in_transformers(lora, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    data = pairs_file(tmp_path)
    folder = run(tmp_path / "run", tiny("llama"), data, lora={"rank": lora})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if lora:
        base = AutoModelForSequenceClassification.from_pretrained(tiny("llama"), num_labels=1)
        base.config.pad_token_id = tokenizer.pad_token_id
        plain = PeftModel.from_pretrained(base, folder)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(folder)

    model = ModelSettings(name_or_path=str(folder), device="cpu", dtype="float32")
    critic = load_critic(model, lora=LoraSettings(rank=lora), trainable=False)
    rows = pair_rows(Template.load(load_tokenizer(model), data=DataSettings()), data)[:8]
    [batch] = collate([with_end(row) for row in rows], rows_per_forward=8)
    with torch.no_grad():
        ours = critic(batch).values_N
        padded = tokenizer.pad({"input_ids": [row.token_ids for row in rows]}, return_tensors="pt")
        theirs = plain(**padded).logits[:, 0]
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "3+4"}, {"role": "assistant", "content": "7 ab"}], tokenize=False
    )
    assert template.startswith("<|im_start|>user\n3+4")


def test_padding_is_a_token_that_ends_no_completion(tiny):
    def chosen(**changed):
        tokenizer = make_tokenizer()
        for name, token in changed.items():
            setattr(tokenizer, name, token)
        critic = load_critic(ModelSettings(name_or_path=str(tiny()), device="cpu", dtype="float32"))
        choose_padding(
            critic, template := Template(tokenizer, source=source_of(tokenizer), system_prompt=None)
        )
        assert template.tokenizer.pad_token_id == critic.config.pad_token_id
        return template.tokenizer.pad_token

    assert chosen() == "<|pad|>"
    assert chosen(pad_token="<|im_end|>", bos_token="<|im_start|>") == "<|im_start|>"


def source_of(tokenizer):
    from kitae.data.templates import find_template

    return find_template(tokenizer, data=DataSettings())


def test_a_tokenizer_that_pads_with_its_end_token_still_scores_batches_in_transformers(tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = make_tokenizer()
    tokenizer.pad_token, tokenizer.bos_token = "<|im_end|>", "<|im_start|>"
    model = make_model(tmp_path / "model", "llama", tokenizer=tokenizer)
    folder = run(tmp_path / "run", model, pairs_file(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in ("abc", "x")]
    with torch.no_grad():
        together = plain(**tokenizer.pad({"input_ids": ids}, return_tensors="pt")).logits[:, 0]
        alone = torch.stack([plain(input_ids=torch.tensor([one])).logits[0, 0] for one in ids])
        shorter = plain(input_ids=torch.tensor([ids[1][:-1]])).logits[0, 0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert abs(shorter - alone[1]) > 1e-3


# runs ---------------------------------------------------------------------------------------------------------------


def test_a_run_reports_metrics_accuracy_with_its_interval_and_calibration(tiny, tmp_path, caplog):
    caplog.set_level("INFO")
    folder = run(
        tmp_path / "run", tiny(), pairs_file(tmp_path), eval={"steps": 3}, data={"hold_out": 0.25},
        train={"max_steps": 12},
    )  # fmt: skip
    lines = metrics_of(folder)
    assert lines[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)  # a new head is zero
    assert lines[0]["train/margin"] == 0.0
    assert lines[-1]["train/loss"] < 0.3 and lines[-1]["train/margin"] > 1.0
    last = lines[-1]
    for name in ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "reward"):
        assert f"train/{name}" in last
    report = json.loads((folder / "calibration.json").read_text())
    assert report["step"] == 12 and report["pairs"] == 6
    assert report["accuracy"] == last["eval/accuracy"] and report["error"] == last["eval/calibration_error"]
    low, high = report["accuracy_95"]
    assert low <= report["accuracy"] <= high
    assert sum(row["pairs"] for row in report["bins"]) == 6
    assert "6 held-out pairs: 100.0 % right (95 % interval 61.0 to 100.0)" in caplog.text
    assert {"eval/loss", "eval/margin", "eval/reward"} <= set(last)
    page = (HERE.parents[1] / "docs" / "metrics.md").read_text()
    unexplained = {name for line in lines for name in line if "/" in name and f"`{name}`" not in page}
    assert not unexplained


def test_rows_per_pass_do_not_change_a_run(tiny, tmp_path):
    data = pairs_file(tmp_path)
    one = run(tmp_path / "one", tiny(), data)
    two = run(
        tmp_path / "two", tiny(), data,
        train={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    )  # fmt: skip
    for a, b in zip(metrics_of(one), metrics_of(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


def test_margins_and_centring_have_their_effect(tiny, tmp_path):
    data = pairs_file(tmp_path, margin=lambda rng: 3.0, other=lambda rng: "x")
    plain = metrics_of(run(tmp_path / "plain", tiny(), data))
    wide = metrics_of(run(tmp_path / "wide", tiny(), data, reward_model={"margin_column": "margin"}))
    assert wide[0]["train/loss"] == pytest.approx(3.048587, abs=1e-5)  # log(1 + e^3)
    assert wide[-1]["train/margin"] > plain[-1]["train/margin"]
    centred = metrics_of(run(tmp_path / "centred", tiny(), data, reward_model={"center_coef": 10.0}))
    # The first gradient is at scores of zero, where the term has none: at step 2 the weights are still the same.
    assert centred[1]["train/reward"] == pytest.approx(plain[1]["train/reward"], abs=1e-6)
    added = centred[1]["train/loss"] - plain[1]["train/loss"]
    assert added > 10.0 * (2 * plain[1]["train/reward"]) ** 2 > 1e-4
    for column in ("other", "missing"):
        with pytest.raises(DataError, match=f"column '{column}' must be a number"):
            run(tmp_path / column, tiny(), data, reward_model={"margin_column": column})


def test_a_run_goes_on_from_a_reward_model_and_from_a_language_models_adapter(tiny, tmp_path):
    data = pairs_file(tmp_path)
    first = run(tmp_path / "first", tiny(), data, lora={"rank": 4})
    again = run(tmp_path / "again", first, data, lora={"rank": 4})
    assert metrics_of(again)[0]["train/loss"] < metrics_of(first)[-1]["train/loss"] + 0.05
    names = load_file(again / "adapter_model.safetensors")
    assert "base_model.model.score.weight" in names


def test_an_own_loss_gets_scores_and_margins(tiny, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\n\n"
        "def hinge(out, weights_N, *, margin):\n"
        "    lead = out.values_N[0::2] - out.values_N[1::2]\n"
        "    return (margin[0::2] - lead).clamp(min=0).sum(), {'lead': lead.sum()}\n"
    )
    data = pairs_file(tmp_path, margin=lambda rng: 1.0)
    more = {"loss": f"{tmp_path}/mine.py:hinge", "reward_model": {"margin_column": "margin"}}
    lines = metrics_of(run(tmp_path / "run", tiny(), data, **more))
    assert lines[0]["train/loss"] == pytest.approx(1.0)
    assert lines[-1]["train/lead"] > 0
    with pytest.raises(ConfigError, match="margin"):
        run(tmp_path / "other", tiny(), data, loss=f"{tmp_path}/mine.py:hinge")
    (tmp_path / "unsure.py").write_text(
        "def unsure(out, weights_N, *, entropy):\n    return entropy.sum(), {}\n"
    )
    with pytest.raises(ConfigError, match="asks for entropy, which a reward model has not"):
        run(tmp_path / "third", tiny(), data, loss=f"{tmp_path}/unsure.py:unsure")


def test_killed_and_resumed_equals_continuous(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    data = pairs_file(tmp_path)

    def live(name, kills):
        more = {"save": {"steps": 2}, "eval": {"steps": 3}, "lora": {"rank": 4, "dropout": 0.1}}
        given = json.dumps(settings_for(tmp_path / name, tiny(), data, **more))
        program = [
            sys.executable,
            str(HERE / "killed_lives.py"),
            "reward_model",
            given,
            json.dumps(kills),
        ]
        done = subprocess.run(program, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.count("was killed")

    live("whole", [])
    kills = [
        ["kitae.train.learner", "Learner", "optim_step", 4],
        ["kitae.train.learner", "Learner", "_one_pass", 3],
    ]
    assert live("killed", kills) == 2
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    tables = [json.loads((tmp_path / name / "calibration.json").read_text()) for name in ("whole", "killed")]
    assert tables[0] == tables[1]


def test_two_ranks_equal_one_process(tiny, tmp_path):
    data = pairs_file(tmp_path, count=21)
    common = [
        "train", "reward_model", "--model_name_or_path", str(tiny("llama")), "--data.train", str(data),
        "--max_steps", "4", "--learning_rate", "1e-3", "--eval.steps", "2", "--report_to", "none", "--dtype", "float32",
        "--train.num_threads", "1",
    ]  # fmt: skip
    for name, batch, launch in (("one", "6", []), ("two", "3", ["launch", "--nproc_per_node", "2"])):
        program = [sys.executable, "-m", "kitae", *launch, *common, "--per_device_train_batch_size", batch]
        done = subprocess.run(
            [*program, "--output_dir", str(tmp_path / name)], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=2e-4, abs=2e-5)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all((tensor - weights[1][name]).abs().max() < 2e-5 for name, tensor in weights[0].items())
