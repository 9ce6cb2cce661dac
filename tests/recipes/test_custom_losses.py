"""A user's own loss: the contract is checked, and it is what the recipe then trains with."""

import json
import re
from pathlib import Path

import pytest
import torch

from kitae.algos import losses
from kitae.config import ModelSettings, OptimSettings
from kitae.data.collate import collate
from kitae.errors import CheckpointError, ConfigError
from kitae.models.load import load_policy
from kitae.parallel.world import World
from kitae.recipes import grpo, sft, simpo
from kitae.recipes._losses import chosen_loss
from kitae.recipes._run import run_recipe
from kitae.settings import resolve
from kitae.train.learner import Learner
from kitae.types import Row, TokenOutputs

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes" / "custom-losses.md"
STREAMS = ["advantages", "old_logprobs"]
EXAMPLES = {
    "confident": ("sft", {}),
    "focal": ("sft", {}),
    "reinforce": ("grpo", {}),
    "squared_kl": ("grpo", {"kl_coef": 0.01}),
    "by_completion": ("grpo", {}),
    "hinge": ("simpo", {}),
}


@pytest.fixture
def write(tmp_path):
    def make(text, name="loss"):
        path = tmp_path / "own.py"
        path.write_text(text)
        return f"{path}:{name}"

    return make


def outputs(n=6):
    logprobs = torch.linspace(-2, -0.5, n).requires_grad_()
    return TokenOutputs(logprobs_N=logprobs, row_N=torch.tensor([0, 0, 1, 1, 1, 2]), num_rows=3)


def call(name, **streams):
    loss_fn = chosen_loss(name, default=losses.cross_entropy, produces=STREAMS)
    given = {"advantages": torch.arange(6.0) - 2, "old_logprobs": torch.zeros(6)} | streams
    return loss_fn(outputs(), torch.ones(6), **given)


def test_no_name_is_the_recipes_own_loss():
    assert chosen_loss("", default=losses.cross_entropy, produces=[]) is losses.cross_entropy


def test_only_what_is_asked_for_is_passed(write):
    name = write(
        "def loss(out, weights_N, *, advantages, coef=2.0):\n"
        "    return -(coef * advantages * out.logprobs_N * weights_N).sum(), {'seen': advantages.sum()}\n"
    )
    loss, metrics = call(name)
    assert loss.item() == pytest.approx(
        -2 * sum((i - 2) * x for i, x in enumerate(torch.linspace(-2, -0.5, 6)))
    )
    assert metrics["seen"].item() == 3


def test_a_loss_that_takes_everything_gets_every_stream(write):
    name = write(
        "def loss(out, weights_N, **given):\n    return (out.logprobs_N.sum(), {k: v.sum() for k, v in given.items()})\n"
    )
    assert set(call(name)[1]) == set(STREAMS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def loss(out, weights_N, *, advantage): ...", "did you mean 'advantages'?"),
        ("def loss(out, weights_N, *, ref_logprobs): ...", "it produces advantages, old_logprobs, entropy"),
        ("def loss(out, weights_N, *, advantage, **rest): ...", "needs 'advantage'"),
        ("def loss(out): ...", r"must take \(out, weights_N"),
        ("def loss(*, out, weights_N): ...", r"must take \(out, weights_N"),
        ("loss = 3", "a int and no function"),
        ("def lost(out, weights_N): ...", "did you mean 'lost'"),
        ("import no_such_thing", "failed while it was loaded"),
    ],
)
def test_what_cannot_be_called_is_refused_before_the_run(write, text, said):
    with pytest.raises(ConfigError, match=said):
        chosen_loss(write(text), default=losses.cross_entropy, produces=STREAMS)


def test_a_name_without_a_function_and_a_missing_file_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"name your own function as file\.py:function"):
        chosen_loss("dpo", default=losses.cross_entropy, produces=[])
    with pytest.raises(ConfigError, match="no such file"):
        chosen_loss(f"{tmp_path}/none.py:loss", default=losses.cross_entropy, produces=[])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return out.logprobs_N.sum()", "returned a tensor of shape"),
        ("return out.logprobs_N * weights_N, {}", r"shape \(6,\) as its sum"),
        ("return 1.0, {}", "a float as its sum"),
        ("return out.logprobs_N.detach().sum(), {}", "without a gradient"),
        ("return out.logprobs_N.sum(), {'x': weights_N}", "as metric 'x'"),
        ("return out.logprobs_N.sum(), None", "returned a tuple of 2"),
        ("return out.logprobs_N.sum(), {'loss': weights_N.sum()}", "a metric 'loss', a name the learner has"),
        ("return torch.cat((out.logprobs_N, 3)).sum(), {}", r"failed at .*own.py:2: NameError"),
        ("return out.logprobs_N.view(-1, 5).sum(), {}", r"failed at .*own.py:2: RuntimeError"),
        ("return out.nothing.sum(), {}", r"failed at .*own.py:2: AttributeError"),
        ("return out.logprobs_N.mean(), {}", "is not a sum"),
        ("return (out.logprobs_N * weights_N).sum() / weights_N.sum(), {}", "is not a sum"),
        ("return (out.logprobs_N.sum() / out.num_rows), {}", "is not a sum"),
        ("return out.per_row(out.logprobs_N).exp().mean(), {}", "is not a sum"),
        ("return (out.logprobs_N - out.logprobs_N.detach()).mean(), {}", "is not a sum"),
    ],
)
def test_a_wrong_result_is_refused_at_the_first_step(write, body, said):
    name = write(f"def loss(out, weights_N):\n    {body}\n")
    with pytest.raises(ConfigError, match=said):
        call(name)


@pytest.mark.parametrize(
    "body",
    [
        "return -(out.logprobs_N * weights_N).sum(), {}",
        "return (out.logprobs_N - out.logprobs_N.detach()).sum(), {}",
        "return out.per_row(out.logprobs_N).exp().sum(), {}",
        "return (out.logprobs_N * 0).sum(), {}",
    ],
)
def test_a_sum_of_any_kind_is_accepted(write, body):
    call(write(f"def loss(out, weights_N):\n    {body}\n"))


def test_a_loss_that_asks_for_entropy_gets_it_and_its_gradient(tiny, write):
    """d(sum of entropies) by hand, through the plain module."""
    from transformers import AutoModelForCausalLM

    folder = tiny("qwen3")
    name = write("def loss(out, weights_N, *, entropy):\n    return (entropy * weights_N).sum(), {}\n")
    loss_fn = chosen_loss(name, default=losses.cross_entropy, produces=[])
    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype="float32"))
    learner = Learner(policy, optim=OptimSettings(), total_steps=1, world=World())
    row = Row(token_ids=[5, 9, 40, 41, 7], loss_mask=[False, True, False, True, True])
    metrics = learner.forward_backward(collate([row], rows_per_forward=1), loss_fn, denominator=3.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    logits = model(torch.tensor([row.token_ids])).logits[0, [0, 2, 3]]
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum() / 3
    entropy.backward()
    assert metrics["loss"] == metrics["entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    slow = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for slot in learner.flat.slots:
        torch.testing.assert_close(slot.grad, slow[slot.name], rtol=1e-3, atol=1e-6)


def rows_file(tmp_path, recipe):
    path = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"{i}+{i}", "completion": f"<think></think><answer>{2 * i}</answer>", "answer": str(2 * i)}
        for i in range(8)
    ]
    if recipe == "simpo":
        lines = [{"prompt": x["prompt"], "chosen": x["completion"], "rejected": x["prompt"]} for x in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def settings(recipe, tmp_path, model, **more):
    module = {"sft": sft, "grpo": grpo, "simpo": simpo}[recipe]
    common = {
        "output_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": [rows_file(tmp_path, recipe)], "system_prompt": ""},
        "optim": {"learning_rate": 1e-3},
        "train": {"max_steps": 2, "num_threads": 1},
        "log": {"report_to": ["none"]},
    }
    if recipe == "grpo":
        (tmp_path / "reward.py").write_text(
            "def reward(completion, *, prompt, answer, **columns):\n    return float(sum(map(ord, completion)) % 7)\n"
        )
        common["reward"] = {"function": f"{tmp_path / 'reward.py'}:reward", "timeout_s": 20, "num_workers": 1}
        common["rollout"] = {"prompts_per_round": 2, "num_generations": 3, "max_new_tokens": 5}
    return module.Settings.model_validate(common | more)


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_page_trains(name, tiny, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    (block,) = [text for text in blocks if text.startswith(f"def {name}(")]
    (tmp_path / "own.py").write_text(block)
    recipe, own = EXAMPLES[name]
    more = {"grpo": own} if recipe == "grpo" else {}
    cfg = settings(recipe, tmp_path, tiny("qwen3"), loss=f"{tmp_path / 'own.py'}:{name}", **more)
    lines = metrics_of(run_recipe(recipe, cfg))
    assert all(line["train/grad_norm"] > 0 for line in lines)


def test_every_example_of_the_page_is_run():
    names = re.findall(r"```python\ndef (\w+)\(", PAGE.read_text())
    assert set(names) - {"my_loss"} == set(EXAMPLES)


def test_the_recipes_own_loss_as_the_users_gives_the_same_run(tiny, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def nll(out, weights_N):\n    return -(out.logprobs_N * weights_N).sum(), {'tokens': weights_N.sum()}\n"
    )
    plain = metrics_of(run_recipe("sft", settings("sft", tmp_path, tiny("qwen3"))))
    cfg = settings("sft", tmp_path, tiny("qwen3"), loss=f"{own}:nll", output_dir=str(tmp_path / "other"))
    for one, other in zip(plain, metrics_of(run_recipe("sft", cfg)), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
        assert other["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-4)
        assert other["train/tokens"] == pytest.approx(1.0)


def test_a_run_is_not_resumed_with_another_text_of_the_loss(tiny, tmp_path):
    own = tmp_path / "own.py"
    text = "def nll(out, weights_N):\n    return -(out.logprobs_N * weights_N).sum(), {}\n"
    failing = text.replace(
        "    return", "    calls.append(1)\n    assert len(calls) < 5, 'enough'\n    return"
    )
    own.write_text("calls = []\n" + failing)
    cfg = settings("sft", tmp_path, tiny("qwen3"), loss=f"{own}:nll", save={"steps": 1})
    with pytest.raises(ConfigError, match="AssertionError: enough"):
        run_recipe("sft", cfg.model_copy(update={"train": cfg.train.model_copy(update={"max_steps": 9})}))
    assert list((tmp_path / "run" / "checkpoints").iterdir()), "nothing was saved"
    own.write_text(text)
    resumed = cfg.model_copy(update={"resume": True, "train": cfg.train.model_copy(update={"max_steps": 9})})
    with pytest.raises(CheckpointError, match=r"loss \w+ -> \w+"):
        run_recipe("sft", resumed)
    run_recipe("sft", resumed.model_copy(update={"allow_inexact": True}))


def test_settings_of_the_loss_that_was_replaced_are_refused(tmp_path):
    (tmp_path / "own.py").write_text("def loss(out, weights_N): ...\n")
    given = {"model.name_or_path": "m", "data.train": "x.jsonl", "loss": f"{tmp_path / 'own.py'}:loss"}
    with pytest.raises(ConfigError, match=r"grpo.clip_high .*loss"):
        resolve("grpo", given | {"grpo.clip_high": 0.3})
