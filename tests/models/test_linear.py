"""Linears by kernels against torch's own: values, gradients, and where each is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kitae.models import grouped, linear, native


@pytest.fixture(autouse=True)
def kernels_fit():
    if native.library() is None or not grouped.fits(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("no kernels for bfloat16 on this machine")


def made(*, outputs=192, inputs=128, bias=False) -> nn.Linear:
    torch.manual_seed(0)
    module = nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    linear.fuse_linears(nn.ModuleList([module]))
    return module


def calls(monkeypatch) -> list[str]:
    found: list[str] = []
    call = native._call
    monkeypatch.setattr(native, "_call", lambda name, *a: (found.append(name), call(name, *a)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return found


@pytest.mark.parametrize("has_main_grad", [False, True])
def test_values_and_gradients_are_those_of_float32_rounded_once(has_main_grad, monkeypatch):
    found = calls(monkeypatch)
    module = made()
    x = torch.randn(3, 47, 128).to(torch.bfloat16).requires_grad_()
    grad = torch.randn(3, 47, 192).to(torch.bfloat16)
    weight = module.weight.detach().float().requires_grad_()
    exact_x = x.detach().float().requires_grad_()
    exact = F.linear(exact_x, weight)
    exact.backward(grad.float())
    if has_main_grad:
        module.weight.main_grad = torch.ones(192, 128)
    y = module(x)
    y.backward(grad)
    assert found.count("kitae_grouped_product") == 2
    assert found.count("kitae_grouped_outer") == 1
    torch.testing.assert_close(y.float(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(x.grad.float(), exact_x.grad, rtol=2**-8, atol=1e-4)
    if has_main_grad:
        assert module.weight.grad is None
        torch.testing.assert_close(module.weight.main_grad, weight.grad + 1, rtol=1e-5, atol=1e-4)
    else:
        torch.testing.assert_close(module.weight.grad.float(), weight.grad, rtol=2**-8, atol=1e-4)


def test_a_frozen_weight_gets_no_gradient(monkeypatch):
    found = calls(monkeypatch)
    module = made().requires_grad_(False)
    x = torch.randn(80, 128).to(torch.bfloat16).requires_grad_()
    module(x).sum().backward()
    assert "kitae_grouped_outer" not in found
    assert module.weight.grad is None and x.grad is not None


@pytest.mark.parametrize(
    ("rows", "dtype", "how"),
    [
        (20, torch.bfloat16, {}),
        (80, torch.float32, {}),
        (80, torch.bfloat16, {"bias": True}),
        (80, torch.bfloat16, {"outputs": 32}),
    ],
    ids=["few rows", "float32", "bias", "narrow"],
)
def test_what_the_kernels_are_not_for_is_torchs(rows, dtype, how, monkeypatch):
    found = calls(monkeypatch)
    module = made(**how).to(dtype)
    x = torch.randn(rows, 128).to(dtype)
    assert torch.equal(module(x), F.linear(x, module.weight, module.bias))
    assert not found
