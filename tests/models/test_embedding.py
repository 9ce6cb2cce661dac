"""The embedding that adds its gradient to main_grad, against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kitae.models.embedding import fuse_embedding

V, H = 50, 24


class Holder(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding


@pytest.mark.parametrize("padding_idx", [None, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_goes_to_the_rows_that_were_read(padding_idx, dtype):
    embedding = nn.Embedding(V, H, padding_idx=padding_idx, dtype=dtype)
    ids = torch.tensor([[3, 7, 3, 49, 0, 7, 3]])
    grads = torch.randn(1, 7, H).to(dtype)
    weight = embedding.weight.detach().double().requires_grad_()
    F.embedding(ids, weight, padding_idx).backward(grads.double())

    fuse_embedding(Holder(embedding))
    embedding.weight.main_grad = torch.full((V, H), 2.0)
    found = embedding(ids)
    assert torch.equal(found, F.embedding(ids, embedding.weight))
    found.backward(grads)

    assert embedding.weight.grad is None
    torch.testing.assert_close(embedding.weight.main_grad.double(), weight.grad + 2, rtol=1e-6, atol=1e-6)


def test_without_main_grad_it_is_torchs_own():
    embedding = nn.Embedding(V, H)
    fuse_embedding(Holder(embedding))
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    assert embedding.weight.grad.sum() == 3 * H


def test_an_embedding_that_scales_what_it_reads_is_left_alone():
    class Scaled(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    embedding = Scaled(V, H)
    fuse_embedding(Holder(embedding))
    assert torch.equal(embedding(torch.tensor([5]))[0], embedding.weight[5] * 2)
