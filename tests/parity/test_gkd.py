"""The divergences of distillation against TRL's generalised JSD, value and gradient, on the same two heads."""

import pytest
import torch

from kitae.algos.distillation import Divergence, distillation
from kitae.models.divergence import FromStates, chunked_divergence
from kitae.types import TokenOutputs

trl = pytest.importorskip("trl", reason="TRL is not installed: pip install 'kitae[parity]'")

from trl.experimental.gkd import GKDTrainer  # noqa: E402

N, H, V = 300, 16, 70


def both(seed=0):
    """Hidden states and heads of a student, which wants a gradient, and of a teacher; and which tokens are taught."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=g).requires_grad_()
    head = (torch.randn(V, H, generator=g) / 3).requires_grad_()
    teacher_hidden = torch.randn(N, 2 * H, generator=g)
    teacher_head = torch.randn(V, 2 * H, generator=g) / 3
    labels = torch.where(torch.rand(N, generator=g) < 0.7, torch.arange(N) % V, -100)
    return hidden, head, teacher_hidden, teacher_head, labels


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize(
    ("beta", "kind"), [(0, "forward_kl"), (1, "reverse_kl"), (0.5, "jsd"), (0.1, "jsd"), (0.9, "jsd")]
)
def test_loss_and_gradient_equal_trls(beta, kind, temperature):
    hidden, head, teacher_hidden, teacher_head, labels = both()
    theirs = GKDTrainer.generalized_jsd_loss(
        (hidden @ head.t())[None],
        (teacher_hidden @ teacher_head.t())[None],
        labels=labels[None],
        beta=beta,
        temperature=temperature,
    )
    theirs.backward()
    expected = [theirs.item(), hidden.grad.clone(), head.grad.clone()]

    hidden, head, teacher_hidden, teacher_head, labels = both()
    how = Divergence(kind=kind, temperature=temperature, **({"beta": beta} if kind == "jsd" else {}))
    is_taught = labels != -100
    soft = FromStates(
        hidden_NH=teacher_hidden[is_taught], logits_of=lambda h: h @ teacher_head.t(), how=how, num_columns=V
    )
    count = int(is_taught.sum())
    ahead = (torch.zeros(count), torch.ones(count))
    logprobs, divergence, _ = chunked_divergence(
        hidden[is_taught],
        head,
        None,
        labels[is_taught],
        soft=soft,
        how=how,
        coefficients=ahead,
        budget_bytes=1,
    )
    total, _ = distillation(TokenOutputs(logprobs, divergence_N=divergence), torch.ones(count))
    loss = total / count
    loss.backward()
    assert loss.item() == pytest.approx(expected[0], rel=2e-5)
    torch.testing.assert_close(hidden.grad, expected[1], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(head.grad, expected[2], rtol=1e-4, atol=1e-7)
