"""Optimizers and schedules against torch's and transformers' own."""

import sys

import pytest
import torch
import transformers
from torch import nn

from kitae.config import OptimSettings
from kitae.errors import MissingExtraError
from kitae.models import native
from kitae.parallel.world import World
from kitae.train.flat import FlatParameters
from kitae.train.optim import LossScale, learning_rate, make_optimizer, update

SHAPES = {"matrix": (96, 80), "bias": (80,), "experts": (3, 40, 50), "tiny": (2, 2)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def per_parameter(
    name: str, params: dict[str, nn.Parameter], settings: OptimSettings
) -> torch.optim.Optimizer:
    """The library's optimizer on ordinary parameters, decay on matrices only."""
    groups = [
        {"params": [p], "weight_decay": settings.weight_decay if p.ndim >= 2 else 0.0}
        for p in params.values()
    ]
    betas = (settings.beta1, settings.beta2)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon)
    if name == "adamw_8bit":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        return bitsandbytes.optim.AdamW8bit(
            groups, lr=settings.learning_rate, betas=betas, eps=settings.epsilon
        )
    return transformers.optimization.Adafactor(
        groups, lr=settings.learning_rate, scale_parameter=False, relative_step=False
    )


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "adafactor"])
def test_an_optimizer_on_flat_storage_equals_the_librarys_per_parameter(name):
    settings = OptimSettings(name=name, learning_rate=1e-2, weight_decay=0.1, beta2=0.95)
    theirs, ours = parameters(), parameters()
    reference = per_parameter(name, theirs, settings)
    flat = FlatParameters(list(ours.items()))
    optimizer = make_optimizer(settings, [slot.master for slot in flat.slots], world=World())
    for step in range(4):
        for key, gradient in parameters(seed=step + 1).items():
            theirs[key].grad = gradient.detach().clone()
            ours[key].grad.copy_(gradient.detach())
        reference.step()
        optimizer.step()
    for key in SHAPES:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(native.library() is None, reason="no kernels on this machine")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_by_the_kernel_equals_torchs_own(dtype):
    settings = OptimSettings(weight_decay=0.1, beta2=0.95, epsilon=1e-6)
    sides = []
    for kernels in (True, False):
        flat = FlatParameters(
            [(n, nn.Parameter(p.detach().to(dtype))) for n, p in parameters().items()], kernels=kernels
        )
        optimizer = make_optimizer(settings, [slot.master for slot in flat.slots], world=World())
        for step in range(4):
            for slot, gradient in zip(flat.slots, parameters(seed=step + 1).values(), strict=True):
                slot.grad.copy_(gradient.detach())
            update(optimizer, flat, learning_rate=1e-2 / (step + 1), scale=0.5)
            assert not flat.grad.any()
        sides.append((flat, optimizer))
    (ours, our_optimizer), (theirs, their_optimizer) = sides
    for a, b in zip(ours.slots, theirs.slots, strict=True):
        torch.testing.assert_close(a.master, b.master, rtol=1e-6, atol=1e-7)
        assert torch.equal(a.parameter, a.master.to(dtype))
        state, expected = our_optimizer.state[a.master], their_optimizer.state[b.master]
        assert state.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(state[key], expected[key], rtol=2e-6, atol=1e-7)


def test_a_weight_with_gaps_gets_its_own_master():
    weight = nn.Parameter(torch.arange(24.0).view(6, 4).bfloat16().t())
    before = weight.detach().clone()
    flat = FlatParameters([("weight", weight)], kernels=True)
    optimizer = make_optimizer(OptimSettings(), [slot.master for slot in flat.slots], world=World())
    flat.grad.fill_(1.0)
    update(optimizer, flat, learning_rate=0.0, scale=1.0)
    assert torch.equal(weight.detach(), before)


def test_weight_decay_leaves_vectors_alone():
    params = parameters()
    before = {key: p.detach().clone() for key, p in params.items()}
    flat = FlatParameters(list(params.items()))
    settings = OptimSettings(learning_rate=0.1, weight_decay=0.5)
    # All gradients are zero.
    make_optimizer(settings, [slot.master for slot in flat.slots], world=World()).step()
    torch.testing.assert_close(params["bias"], nn.Parameter(before["bias"]))
    torch.testing.assert_close(params["matrix"], nn.Parameter(before["matrix"] * 0.95))


def test_without_bitsandbytes_the_8_bit_optimizer_names_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'kitae\[qlora\]'"):
        make_optimizer(OptimSettings(name="adamw_8bit"), [nn.Parameter(torch.zeros(2))], world=World())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler": "constant"}, [1, 1, 1, 1, 1, 1]),
        ({"lr_scheduler": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ({"lr_scheduler": "linear", "warmup_steps": 2}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "linear", "warmup_ratio": 0.3}, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ({"lr_scheduler": "linear", "warmup_steps": 2, "min_lr_ratio": 0.2}, [0.5, 1, 1, 0.8, 0.6, 0.4]),
        ({"lr_scheduler": "cosine", "warmup_steps": 2}, [0.5, 1, 1, 0.853553, 0.5, 0.146447]),
        ({"lr_scheduler": "cosine", "warmup_steps": 6}, [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]),
    ],
)
def test_the_schedule_has_these_values(settings, expected):
    section = OptimSettings(learning_rate=1.0, **settings)
    rates = [learning_rate(section, step=step, total_steps=6) for step in range(1, 7)]
    assert rates == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_without_warm_up_the_schedule_is_that_of_transformers(name):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-5)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=9)
    for step in range(1, 10):
        ours = learning_rate(OptimSettings(lr_scheduler=name), step=step, total_steps=9)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_the_loss_scale_halves_on_overflow_and_doubles_after_good_steps():
    scale = LossScale(start=8.0, steps_to_double=3)
    assert scale.overflowed() and scale.value == 4.0
    for _ in range(3):
        scale.went_well()
    assert scale.value == 8.0
    other = LossScale()
    other.load_state(scale.state())
    assert other.state() == scale.state() == {"value": 8.0, "good_steps": 0}


def test_an_overflow_at_loss_scale_one_is_a_bad_gradient():
    scale = LossScale(start=2.0)
    assert scale.overflowed()
    assert not scale.overflowed()
