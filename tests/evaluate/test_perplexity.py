"""Loss per token against the plain model's own cross-entropy, and against a published value."""

import math

import pytest
import torch

from kitae.config import ModelSettings
from kitae.evaluate.groups import by_column, gap
from kitae.evaluate.perplexity import score, scorer, summarise
from kitae.models.load import load_policy, load_tokenizer
from kitae.types import Row


@pytest.fixture(scope="module")
def policy(tiny):
    model = ModelSettings(name_or_path=str(tiny("llama")), device="cpu", dtype="float32")
    return load_policy(model, trainable=False)


@pytest.fixture(scope="module")
def plain(tiny):
    """The same model as transformers has it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def rows_of_many_lengths():
    rows = []
    for length in (3, 9, 4, 17, 2):
        ids = [(7 * length + 3 * i) % 90 + 3 for i in range(length)]
        rows.append(Row(token_ids=ids, loss_mask=[False, *[i % 3 != 1 for i in range(length - 1)]]))
    return rows


def records_of(rows, policy, **options):
    return [record for chunk in score(rows, logprobs=scorer(policy), **options) for record in chunk]


def plain_loss(plain, row):
    """The row's summed loss by the transformers module and torch's cross-entropy, without packing."""
    ids = torch.tensor([row.token_ids])
    with torch.no_grad():
        logits = plain(input_ids=ids).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    return losses[torch.tensor(row.loss_mask[1:])].sum().item()


@pytest.mark.parametrize("rows_per_forward", [1, 2, 8])
def test_losses_are_the_plain_models_whatever_the_batch(policy, plain, rows_per_forward):
    rows = rows_of_many_lengths()
    records = records_of(rows, policy, rows_per_forward=rows_per_forward)
    assert [record["row"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["num_tokens"] for record in records] == [row.num_taught for row in rows]
    assert [record["loss_sum"] for record in records] == pytest.approx(
        [plain_loss(plain, row) for row in rows], rel=1e-5
    )


def test_perplexity_is_over_all_tokens_and_no_mean_of_means(policy):
    records = records_of(rows_of_many_lengths(), policy)
    summary = summarise(records)
    loss = sum(r["loss_sum"] for r in records) / sum(r["num_tokens"] for r in records)
    assert summary == {
        "rows": 5,
        "tokens": 20,
        "loss": pytest.approx(loss),
        "perplexity": pytest.approx(math.exp(loss)),
    }
    assert loss != pytest.approx(sum(r["loss_sum"] / r["num_tokens"] for r in records) / 5, rel=1e-4)


def test_perplexity_by_column(policy):
    rows = rows_of_many_lengths()
    columns = [{"language": "ja" if i % 2 else "en"} for i in range(len(rows))]
    groups = by_column(records_of(rows, policy, columns=columns), "language", summarise=summarise)
    alone = summarise(records_of(rows[1::2], policy))
    assert groups["ja"]["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert groups["en"]["rows"] == 3
    found = gap(groups, "perplexity")
    assert found.gap == pytest.approx(abs(groups["en"]["perplexity"] - groups["ja"]["perplexity"]))


def test_no_rows_have_no_loss():
    assert summarise([]) == {"rows": 0, "tokens": 0}


def test_a_real_model_has_its_published_loss(shared_data):
    folder = shared_data / "models" / "stories260K"
    model = ModelSettings(name_or_path=str(folder), device="cpu", dtype="float32")
    text = (shared_data / "models" / "stories260K_expected_greedy_200.txt").read_text().strip("\n")
    ids = load_tokenizer(model).encode(text, add_special_tokens=False)
    row = Row(token_ids=[1, *ids], loss_mask=[False] + [True] * len(ids))
    records = records_of([row], load_policy(model, trainable=False))
    assert summarise(records)["loss"] == pytest.approx(0.473418, abs=1e-5)
