"""Routed experts against a loop over tokens, gradients included."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from kitae.models import grouped, native
from kitae.models.experts import ROUND_TO, ExpertAdapter, experts_forward
from kitae.models.grouped import Groups, Rows
from tests.models.test_adapted import Products

SIZES = [(2, 2), (6, 16), (34, 66), (256, 150)]
E, H, I, K, R = 6, 16, 8, 2, 3  # noqa: E741  # I is the inner size, as in experts.py


def gate(gate_up):
    a, b = gate_up.chunk(2, -1)
    return F.silu(a) * b


class Module(SimpleNamespace):
    """What the experts function reads of transformers' modules, whose gate has this name."""

    def _default_apply_gate(self, gate_up):
        return gate(gate_up)

    _apply_gate = _default_apply_gate


def make(num_tokens, *, dtype=torch.float32, adapted=False, rank=R, computed_in=None):
    """A module, an input, a routing in which expert 4 is never chosen, and adapters: numbers of `dtype`."""
    g = torch.Generator().manual_seed(num_tokens)

    def leaf(*shape):
        return (torch.randn(shape, generator=g) * 0.5).to(dtype).to(computed_in or dtype).requires_grad_()

    module = Module(
        num_experts=E, act_fn=torch.nn.SiLU(), gate_up_proj=leaf(E, 2 * I, H), down_proj=leaf(E, H, I)
    )
    scores = torch.rand(num_tokens, E, generator=g)
    scores[:, 4], scores[:, 0] = -1, scores[:, 0] + 0.5  # expert 0 is busy
    index = scores.topk(K, -1).indices
    weights = torch.rand(num_tokens, K, generator=g).requires_grad_()
    adapters = {}
    if adapted:
        adapters = {
            "gate_up_proj": [ExpertAdapter(leaf(E, rank, H), leaf(E, 2 * I, rank), 0.7)],
            "down_proj": [ExpertAdapter(leaf(E, rank, I), leaf(E, H, rank), 1.5)],
        }
    return module, leaf(num_tokens, H), index, weights, adapters


def leaves_of(module, hidden, index, weights, adapters):
    low = [tensor for own in adapters.values() for a in own for tensor in (a.a_ERI, a.b_EOR)]
    return [hidden, weights, module.gate_up_proj, module.down_proj, *low]


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


needs_kernels = pytest.mark.skipif(native.library() is None, reason="no kernels on this machine")
either = pytest.mark.parametrize("kernels", [False, pytest.param(True, marks=needs_kernels)])


@either
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize("num_tokens", [1, 9, 70])
def test_values_and_gradients_equal_a_loop_over_tokens(num_tokens, dtype, tolerance, adapted, kernels):
    rank = 4 if kernels else R
    module, hidden, index, weights, adapters = made = make(
        num_tokens, dtype=dtype, adapted=adapted, rank=rank
    )
    with Products() as products:
        found = experts_forward(module, hidden, index, weights, adapters=adapters, kernels=kernels)
    assert (products.count == 0) == kernels
    exact = make(num_tokens, dtype=dtype, adapted=adapted, rank=rank, computed_in=torch.float32)
    expected = slow(*exact)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, leaves_of(*made), direction.to(dtype))
    theirs = torch.autograd.grad(expected, leaves_of(*exact), direction)
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


@needs_kernels
def test_gates_and_sizes_the_kernels_do_not_know_go_by_torchs_products():
    module, hidden, index, weights, adapters = make(9, dtype=torch.bfloat16, adapted=True, rank=3)
    with Products() as odd_rank, torch.no_grad():
        experts_forward(module, hidden, index, weights, adapters=adapters, kernels=True)
    module.act_fn = torch.nn.GELU()
    with Products() as other_gate, torch.no_grad():
        experts_forward(module, hidden, index, weights, kernels=True)
    assert odd_rank.count
    assert other_gate.count


@needs_kernels
@pytest.mark.parametrize(
    ("depth", "columns", "dtype"),
    [
        *((1, 1, torch.float32), (5, 65, torch.float32)),
        *((*sizes, dtype) for sizes in SIZES for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_grouped_products_equal_one_product_for_each_group(depth, columns, dtype):
    """Groups of none, one and many rows, whose number is odd; rows by index; panels that are not full."""
    sizes = [7, 0, 1, 40, 0]
    generator = torch.Generator().manual_seed(depth)
    tolerance = 2e-6 if dtype == torch.float32 else 2**-8

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    x, dy, weights = drawn(11, depth), drawn(11, columns), drawn(len(sizes), columns, depth)
    groups = Groups(torch.tensor(sizes), sizes, kernels=True)
    index_S, other_S = (torch.randint(11, (sum(sizes),), generator=generator) for _ in range(2))
    picked, dpicked = (t.float()[index].split(sizes) for t, index in ((x, index_S), (dy, other_S)))
    before = drawn(sum(sizes), columns), drawn(sum(sizes), depth), drawn(len(sizes), columns, depth).float()
    expected = [
        torch.cat([own @ w.t() for own, w in zip(picked, weights.float(), strict=True)]),
        torch.cat([own @ w for own, w in zip(dpicked, weights.float(), strict=True)]),
        torch.stack([own_dy.t() @ own for own_dy, own in zip(dpicked, picked, strict=True)]),
    ]
    found = [
        grouped.product(Rows(x, index_S), weights, groups),
        grouped.back_product(Rows(dy, other_S), weights, groups),
        grouped.weight_gradient(Rows(dy, other_S), Rows(x, index_S), groups),
    ]
    added = [
        grouped.product(Rows(x, index_S), weights, groups, add_to=before[0].clone()),
        grouped.back_product(Rows(dy, other_S), weights, groups, add_to=before[1].clone()),
        grouped.weight_gradient(Rows(dy, other_S), Rows(x, index_S), groups, add_to=before[2].clone()),
    ]
    for a, b in zip(
        [*found, *added],
        [*expected, *(x + y.float() for x, y in zip(expected, before, strict=True))],
        strict=True,
    ):
        assert (a.float() - b).abs().max() <= tolerance * b.abs().max()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_row_has_the_same_bits_alone_among_others_and_with_other_threads(dtype):
    module, hidden, index, weights, _ = make(70, dtype=dtype)
    threads = torch.get_num_threads()
    with torch.no_grad():
        together = experts_forward(module, hidden, index, weights, kernels=True)
        torch.set_num_threads(3)
        try:
            assert torch.equal(experts_forward(module, hidden, index, weights, kernels=True), together)
        finally:
            torch.set_num_threads(threads)
        for t in (0, 13, 69):
            alone = experts_forward(
                module, hidden[t : t + 1], index[t : t + 1], weights[t : t + 1], kernels=True
            )
            assert torch.equal(alone[0], together[t])
