"""Blocks of few bits: bit for bit the gguf package's where it has them, and as near to the values as llama.cpp's."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from kitae.export import native
from kitae.export.blocks import KINDS, quantize, scales_and_offsets, symmetric_scales

gguf = pytest.importorskip("gguf")

ROWS = {
    "normal": torch.randn(32, 512, generator=torch.Generator().manual_seed(0)) * 0.02,
    "heavy": torch.randn(32, 512, generator=torch.Generator().manual_seed(1)) ** 3,
    "positive": torch.rand(8, 512, generator=torch.Generator().manual_seed(2)),
    "constant": torch.full((2, 256), 0.3),
    "negative": torch.full((2, 256), -0.3),
    "zero": torch.zeros(2, 256),
    "tiny": torch.full((2, 256), 1e-20),
}


def back(kind: str, data: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.array(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])))


def error(kind: str, x: torch.Tensor) -> float:
    """Relative root mean square."""
    return float((back(kind, quantize(kind, x)) - x).norm() / x.norm().clamp_min(1e-30))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("rows", ROWS)
def test_blocks_of_32_are_those_of_the_gguf_package(kind, rows):
    wanted = gguf.quantize(ROWS[rows].numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(quantize(kind, ROWS[rows]).numpy(), wanted)


def plain_scales(x: np.ndarray, *, levels: int, first: float, steps: int) -> tuple[float, float]:
    """ggml's search for one part, value by value: make_qkx2_quants with weights |x| + rms."""
    w = np.sqrt((x * x).mean()) + np.abs(x)
    low, high = min(x.min(), 0), x.max()
    if high == low:
        return 0.0, -low
    best_scale, best_low = (high - low) / levels, low

    def mad(scale, offset, q):
        return (w * (scale * q + offset - x) ** 2).sum()

    best = mad(best_scale, best_low, np.rint((x - low) / best_scale).clip(0, levels))
    for i in range(steps):
        q = np.rint((levels + first + 0.1 * i) / (high - low) * (x - low)).clip(0, levels)
        sw, sx, sl, sl2, sxl = w.sum(), (w * x).sum(), (w * q).sum(), (w * q * q).sum(), (w * q * x).sum()
        d = sw * sl2 - sl * sl
        if d <= 0:
            continue
        scale, offset = (sw * sxl - sx * sl) / d, (sl2 * sx - sl * sxl) / d
        if offset > 0:
            scale, offset = sxl / sl2, 0.0
        if mad(scale, offset, q) < best:
            best, best_scale, best_low = mad(scale, offset, q), scale, offset
    return best_scale, -best_low


def weighted_error(x: np.ndarray, found: tuple[float, float], levels: int) -> float:
    scale, offset = found
    q = np.rint((x + offset) / scale).clip(0, levels)
    return (((scale * q - offset - x) ** 2) * (np.sqrt((x * x).mean()) + np.abs(x))).sum()


@pytest.mark.parametrize(
    ("kind", "levels", "first", "steps"), [("Q4_K", 15, -1.0, 21), ("Q5_K", 31, -0.5, 16)]
)
@pytest.mark.parametrize("rows", ["normal", "heavy", "positive"])
def test_scales_are_those_that_a_slow_search_finds(rows, kind, levels, first, steps):
    x = ROWS[rows][:4].view(-1, 8, 32)
    scale, offset = scales_and_offsets(x, levels=levels, first=first, steps=steps)
    own = theirs = 0.0
    for i in range(len(x)):
        for part in range(8):
            values = x[i, part].double().numpy()
            wanted = plain_scales(values, levels=levels, first=first, steps=steps)
            own += weighted_error(values, (scale[i, part].item(), offset[i, part].item()), levels)
            theirs += weighted_error(values, wanted, levels)
    assert own == pytest.approx(theirs, rel=0.01)  # single parts may take another of two nearly equal scales


def of_ggml(kind: str, x: torch.Tensor) -> torch.Tensor:
    """The same rows by ggml's C code, which lies in xllamacpp's library."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    values, size, _ = KINDS[kind]
    data = np.ascontiguousarray(x.numpy())
    out = np.zeros(data.size // values * size, np.uint8)
    pointers = data.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
    getattr(library, f"quantize_row_{kind.lower().replace('_k', '_K')}_ref")(
        *pointers, ctypes.c_int64(data.size)
    )
    return torch.from_numpy(out.reshape(len(x), -1))


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K"])
@pytest.mark.parametrize("rows", ["normal", "heavy", "positive"])
def test_k_quants_are_as_near_as_those_of_ggml(kind, rows):
    x = ROWS[rows]
    own, theirs = quantize(kind, x), of_ggml(kind, x)
    other = float((back(kind, theirs) - x).norm() / x.norm())
    assert error(kind, x) <= 1.03 * other
    assert (own == theirs).float().mean() > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_constants_are_kept(kind):
    assert torch.equal(back(kind, quantize(kind, ROWS["zero"])), ROWS["zero"])
    for rows in ("constant", "negative"):
        torch.testing.assert_close(back(kind, quantize(kind, ROWS[rows])), ROWS[rows], rtol=4e-3, atol=0)
    assert back(kind, quantize(kind, ROWS["tiny"])).isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours():
    for kind in KINDS:
        assert torch.equal(quantize(kind, ROWS["heavy"])[3:4], quantize(kind, ROWS["heavy"][3:4]))


@pytest.fixture
def kernels():
    found = native.library()
    if found is None:
        pytest.skip("there is no compiler")
    return found


@pytest.mark.parametrize("rows", ROWS)
def test_compiled_searches_find_what_torch_finds(rows, kernels):
    x = ROWS[rows]
    found, wanted = native.symmetric_scales(kernels, x.view(-1, 16, 16)), symmetric_scales(x.view(-1, 16, 16))
    nearly = (found - wanted).abs() <= 1e-5 * wanted.abs()
    assert nearly.float().mean() > 0.95  # elsewhere two candidates are nearly equal
    for how in ({"levels": 15, "first": -1.0, "steps": 21}, {"levels": 31, "first": -0.5, "steps": 16}):
        parts = x.view(-1, 8, 32)
        scale, offset = native.scales_and_offsets(kernels, parts, **how)
        wanted_scale, wanted_offset = scales_and_offsets(parts, **how)
        nearly = (scale - wanted_scale).abs() <= 1e-4 * wanted_scale.abs()
        nearly &= (offset - wanted_offset).abs() <= 1e-4 * (wanted_offset.abs() + wanted_scale.abs())
        assert nearly.float().mean() > 0.99


@pytest.mark.parametrize("kind", ["Q6_K", "Q5_K", "Q4_K"])
@pytest.mark.parametrize("rows", ["normal", "heavy", "positive"])
def test_without_a_compiler_blocks_are_as_good(rows, kind, kernels, monkeypatch):
    x = ROWS[rows]
    compiled, off = quantize(kind, x), error(kind, x)
    monkeypatch.setattr(native, "library", lambda: None)
    assert (quantize(kind, x) == compiled).float().mean() > 0.99
    assert error(kind, x) == pytest.approx(off, rel=1e-3)


def test_parts_beyond_a_whole_number_of_lanes_are_searched_too(kernels):
    x = ROWS["heavy"].view(-1, 8, 32)[:3]  # 24 parts
    whole = native.scales_and_offsets(kernels, ROWS["heavy"].view(-1, 8, 32), levels=15, first=-1.0, steps=21)
    for part, all_ in zip(
        native.scales_and_offsets(kernels, x, levels=15, first=-1.0, steps=21), whole, strict=True
    ):
        assert torch.equal(part, all_[:3])
