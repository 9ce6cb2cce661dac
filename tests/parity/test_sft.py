"""SFT against TRL's trainer: the loss it logs and the step it takes, over micro-batches of uneven length."""

import random

import pytest
import torch

trl = pytest.importorskip("trl", reason="pip install 'kitae[parity]'")

from datasets import Dataset  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from kitae.algos import averaging  # noqa: E402
from kitae.algos.losses import cross_entropy  # noqa: E402
from kitae.config import ModelSettings, OptimSettings  # noqa: E402
from kitae.data.collate import collate  # noqa: E402
from kitae.models.load import load_policy  # noqa: E402
from kitae.parallel.world import World  # noqa: E402
from kitae.train.learner import Learner  # noqa: E402
from kitae.types import Row  # noqa: E402

PROMPT_LENGTHS, COMPLETION_LENGTHS = (3, 7, 2, 5), (40, 2, 9, 1)


def ragged_rows():
    """(prompt ids, completion ids) of four rows: token averaging and the mean of means differ on them."""
    rng = random.Random(0)
    return [
        ([rng.randrange(8, 90) for _ in range(p)], [rng.randrange(8, 90) for _ in range(c)])
        for p, c in zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)
    ]


def trl_step(folder, output_dir, *, rows_per_pass):
    """One SGD step with learning rate 1 in TRL: the loss it logs, and each weight's step downhill, its gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in ragged_rows()]
    args = trl.SFTConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=rows_per_pass,
        gradient_accumulation_steps=len(rows) // rows_per_pass,
        max_steps=1,
        completion_only_loss=True,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer_of(folder),
        optimizers=(torch.optim.SGD(model.parameters(), lr=1.0), None),
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, {name: before[name] - p.detach() for name, p in model.named_parameters()}


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def our_step(folder, *, rows_per_forward):
    """The same step's loss and gradient in kitae."""
    rows = [
        Row(token_ids=p + c, loss_mask=[False] * len(p) + [True] * len(c), prompt_length=len(p))
        for p, c in ragged_rows()
    ]
    policy = load_policy(ModelSettings(name_or_path=str(folder), dtype="float32", device="cpu"))
    learner = Learner(policy, optim=OptimSettings(), total_steps=1, world=World())
    weighed, denominator = averaging.weigh(rows, "token")
    batches = collate(weighed, rows_per_forward=rows_per_forward)
    metrics = learner.forward_backward(batches, cross_entropy, denominator=denominator)
    return metrics["loss"], {name: p.grad.clone() for name, p in policy.named_trainable()}


@pytest.mark.parametrize("rows_per_pass", [4, 1])
def test_a_step_of_sft_equals_trls_whatever_the_micro_batches(rows_per_pass, tiny, tmp_path):
    folder = tiny("qwen3")
    theirs, their_step = trl_step(folder, tmp_path / "trl", rows_per_pass=rows_per_pass)
    ours, our_gradient = our_step(folder, rows_per_forward=2)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert set(our_gradient) == set(their_step)
    for name, step in their_step.items():
        torch.testing.assert_close(our_gradient[name], step, rtol=1e-4, atol=1e-6, msg=name)
