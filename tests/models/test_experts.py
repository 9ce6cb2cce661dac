"""Routed experts against a loop over tokens, gradients included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kitae.models.experts import ROUND_TO, ExpertAdapter, experts_forward
from tests.models.test_adapted import Products

E, H, I, K, R = 6, 16, 8, 2, 3  # noqa: E741  # I is the inner size, as in experts.py


def gate(gate_up):
    a, b = gate_up.chunk(2, -1)
    return F.silu(a) * b


def make(num_tokens, *, dtype=torch.float32, adapted=False):
    """A module, an input, a routing in which expert 4 is never chosen, and adapters."""
    g = torch.Generator().manual_seed(num_tokens)

    def leaf(*shape):
        return (torch.randn(shape, generator=g) * 0.5).to(dtype).requires_grad_()

    module = SimpleNamespace(
        num_experts=E, _apply_gate=gate, gate_up_proj=leaf(E, 2 * I, H), down_proj=leaf(E, H, I)
    )
    scores = torch.rand(num_tokens, E, generator=g)
    scores[:, 4], scores[:, 0] = -1, scores[:, 0] + 0.5  # expert 0 is busy
    index = scores.topk(K, -1).indices
    weights = torch.rand(num_tokens, K, generator=g).requires_grad_()
    adapters = {}
    if adapted:
        adapters = {
            "gate_up_proj": [ExpertAdapter(leaf(E, R, H), leaf(E, 2 * I, R), 0.7)],
            "down_proj": [ExpertAdapter(leaf(E, R, I), leaf(E, H, R), 1.5)],
        }
    return module, leaf(num_tokens, H), index, weights, adapters


def slow(module, hidden, index, weights, adapters):
    """Token by token, expert by expert, with W + scale B A as one matrix."""

    def weight(name, e):
        own = getattr(module, name)[e].float()
        return own + sum(a.scale * (a.b_EOR[e].float() @ a.a_ERI[e].float()) for a in adapters.get(name, ()))

    rows = []
    for t, x in enumerate(hidden.float()):
        row = torch.zeros(H)
        for j, e in enumerate(index[t].tolist()):
            row = row + weights[t, j] * (weight("down_proj", e) @ gate(weight("gate_up_proj", e) @ x))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_values_and_gradients_equal_a_loop_over_tokens(num_tokens, dtype, tolerance, adapted):
    module, hidden, index, weights, adapters = made = make(num_tokens, dtype=dtype, adapted=adapted)
    leaves = [hidden, weights, module.gate_up_proj, module.down_proj]
    leaves += [tensor for own in adapters.values() for a in own for tensor in (a.a_ERI, a.b_EOR)]
    found, expected = experts_forward(module, hidden, index, weights, adapters=adapters), slow(*made)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, leaves, direction.to(dtype))
    theirs = torch.autograd.grad(expected, leaves, direction)
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        assert (a.float() - b.float()).abs().max() <= tolerance * b.abs().max()
    assert not ours[2][4].any()


def test_frozen_experts_cost_no_weight_gradient():
    module, hidden, index, weights, _ = make(70)
    counts = []
    for frozen in (False, True):
        module.gate_up_proj.requires_grad_(not frozen)
        module.down_proj.requires_grad_(not frozen)
        out = experts_forward(module, hidden, index, weights)
        with Products() as products:
            out.sum().backward()
        counts.append(products.count)
    assert counts[1] * 2 == counts[0]  # the gradient of the input alone


def test_the_rows_of_products_are_few_or_a_multiple_so_that_shapes_repeat():
    module, hidden, index, weights, _ = make(70)
    counts = torch.bincount(index.flatten(), minlength=E).tolist()
    assert max(counts) > ROUND_TO
    assert any(count % ROUND_TO for count in counts if count > ROUND_TO)
    rows = [-(-n // ROUND_TO) * ROUND_TO if n > ROUND_TO else n for n in counts]
    with Products() as products, torch.no_grad():
        experts_forward(module, hidden, index, weights)
    assert products.count == sum(rows) * 3 * H * I


def test_only_the_gates_input_is_kept_beside_the_arguments():
    module, hidden, index, weights, _ = make(70)
    arguments = {t.data_ptr() for t in (hidden, weights, module.gate_up_proj, module.down_proj)}
    kept = []

    def keep(tensor):
        if tensor.data_ptr() not in arguments:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts_forward(module, hidden, index, weights)
    [(slots, size)] = kept
    assert size == 2 * I
    assert 70 * K <= slots < 70 * K + E * ROUND_TO
