"""The training kernels of kernels/training.cpp as autograd functions: what a decoder layer does beside its matrix products.

Each is the float32 result of its torch formula, rounded once, and takes CPU tensors in float32 or bfloat16; `fits` says
whether it takes these. Attention in bfloat16 rounds its weights too, before their product with the values, as
FlashAttention does. The bits do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kitae.compiler import BuildError, Source, load_library, status_of
from kitae.errors import ModelError

log = logging.getLogger(__name__)

KERNELS = Path(__file__).parent / "kernels"
SOURCE = Source(
    main=KERNELS / "training.cpp",
    folders=[KERNELS, KERNELS.parents[1] / "rollout" / "kernels"],
    functions=["kitae_rms_norm", "kitae_attend_backward", "kitae_target_logprobs"],
    purpose="training",
)
KINDS = {torch.float32: 0, torch.bfloat16: 1}
LARGEST_HEAD = 1024
"""As in kernels/rotary.h."""
ARGUMENTS = {
    "kitae_rms_norm": [c_int, *[c_void_p] * 2, *[c_int64] * 2, c_float, *[c_void_p] * 2],
    "kitae_rms_norm_backward": [c_int, *[c_void_p] * 4, *[c_int64] * 2, *[c_void_p] * 2],
    "kitae_rotary": [c_int, *[c_void_p] * 4, *[c_int64] * 3, c_float, *[c_void_p] * 2],
    "kitae_rotary_backward": [c_int, *[c_void_p] * 6, *[c_int64] * 3, *[c_void_p] * 2],
    "kitae_swiglu": [c_int, *[c_void_p] * 2, c_int64, c_void_p],
    "kitae_swiglu_backward": [c_int, *[c_void_p] * 3, c_int64, *[c_void_p] * 2],
    "kitae_add": [c_int, c_void_p, c_int64, c_void_p],
    "kitae_adamw": [c_int, *[c_void_p] * 5, c_int64, c_void_p],
    "kitae_grouped_product": [
        c_int,
        *[c_void_p] * 3,
        c_int64,
        c_void_p,
        c_int,
        *[c_int64] * 2,
        c_int,
        c_void_p,
    ],
    "kitae_grouped_outer": [c_int, *[c_void_p] * 5, *[c_int64] * 3, c_void_p],
    "kitae_gated": [c_int, c_void_p, *[c_int64] * 2, c_void_p],
    "kitae_gated_backward": [c_int, *[c_void_p] * 3, *[c_int64] * 2, *[c_void_p] * 3],
    "kitae_sum_slots": [c_int, *[c_void_p] * 3, *[c_int64] * 3, c_void_p],
    "kitae_target_logprobs": [c_int, *[c_void_p] * 2, *[c_int64] * 2, c_float, *[c_void_p] * 4],
    "kitae_attend": [c_int, *[c_void_p] * 5, c_int64, *[c_void_p] * 2],
    "kitae_attend_backward": [c_int, *[c_void_p] * 9, c_int64, *[c_void_p] * 3],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The kernels, compiled at the first call on this machine; None, said once, where they cannot be."""
    try:
        loaded = load_library(SOURCE)
    except BuildError as error:
        log.info("training with torch's own operations instead of kernels: %s", error)
        return None
    for name, types in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype, function.errcheck = types, c_int64, status_of
    return loaded


def fits(*tensors: Tensor | None) -> bool:
    """Whether kernels are there for tensors such as these: whole ones on a CPU, of one dtype that they know."""
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    known = all(x.device.type == "cpu" and x.dtype == dtype and _is_plain(x) for x in given)
    return known and dtype in KINDS and library() is not None


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is torch.nn.Parameter


def _call(name: str, like: Tensor, *arguments: Any) -> None:
    """Call a kernel on tensors without gaps and numbers, which are alive until it returns.

    MemoryError where it finds none to work in.
    """
    kernel = getattr(library(), name)
    kernel(KINDS[like.dtype], *(_pointer(x) if isinstance(x, Tensor) else x for x in arguments))


def _pointer(x: Tensor) -> int:
    assert x.is_contiguous(), (x.shape, x.stride())  # the kernel would write beyond its memory
    return x.data_ptr()


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """RMSNorm over the last dimension, arXiv:1910.07467."""
    y: Tensor = _RmsNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        factors = torch.empty(rows)
        _call("kitae_rms_norm", x, x, weight, rows, size, epsilon, y, factors)
        ctx.save_for_backward(x, weight, factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, factors = ctx.saved_tensors
        dx, dweight = torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        size = x.shape[-1]
        _call(
            "kitae_rms_norm_backward", x, x, weight, factors, dy.contiguous(), len(factors), size, dx, dweight
        )
        return dx, dweight, None


def rotary(x_TQD: Tensor, weight_D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, epsilon: float) -> Tensor:
    """Rotary embedding (arXiv:2104.09864) of heads, after an RMSNorm of each where there is a weight."""
    y: Tensor = _Rotary.apply(x_TQD, weight_D, cos_TD, sin_TD, epsilon)  # type: ignore[no-untyped-call]
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TQD: Tensor, weight_D: Tensor | None, cos_TD: Tensor, sin_TD: Tensor, epsilon: float
    ) -> Tensor:
        x, cos, sin = x_TQD.contiguous(), cos_TD.contiguous(), sin_TD.contiguous()
        y, factors = torch.empty_like(x), None if weight_D is None else torch.empty(x.shape[:2])
        _call("kitae_rotary", x, x, weight_D, cos, sin, *x.shape, epsilon, y, factors)
        ctx.save_for_backward(None if weight_D is None else x, weight_D, cos, sin, factors)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, cos, sin, factors = ctx.saved_tensors
        dy, dweight = dy.contiguous(), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        dx = torch.empty_like(dy)
        _call("kitae_rotary_backward", dy, x, weight, cos, sin, factors, dy, *dy.shape, dx, dweight)
        return dx, dweight, None, None, None


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) x up, arXiv:2002.05202."""
    y: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        _call("kitae_swiglu", gate, gate, up, gate.numel(), y)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _call("kitae_swiglu_backward", gate, gate, up, dy.contiguous(), gate.numel(), dgate, dup)
        return dgate, dup


class _Attended(ctypes.Structure):
    """As in kernels/training.cpp."""

    _fields_ = (
        ("queries", c_int64),
        ("keys", c_int64),
        ("size", c_int64),
        ("value_size", c_int64),
        ("scaling", c_float),
        ("strides", c_int64 * 8),
    )

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, scaling: float) -> _Attended:
        strides = [step for x in (q, k, v, dout) for step in x.stride()[:2]]
        return cls(q.shape[1], k.shape[1], q.shape[2], v.shape[2], scaling, (c_int64 * 8)(*strides))


def attend(
    q_TQD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    *,
    segments: Tensor,
    groups: Tensor,
    padding: Sequence[int],
    scaling: float,
) -> Tensor:
    """Causal attention of packed rows, [T, Q, D of v], blockwise as in arXiv:2205.14135.

    `segments` [n, 4] are types.Segment's numbers, `groups` where each run of those that share a prompt begins (and the
    end); both int64. Tokens from padding[0] up to padding[1] lie in none: they get zeros and give no gradient.
    """
    y: Tensor = _Attend.apply(q_TQD, k_TKD, v_TKD, segments, groups, padding, scaling)  # type: ignore[no-untyped-call]
    return y


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_TQD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        segments: Tensor,
        groups: Tensor,
        padding: Sequence[int],
        scaling: float,
    ) -> Tensor:
        q, k, v = (_whole_heads(x) for x in (q_TQD, k_TKD, v_TKD))
        out, lse = q.new_empty(*q.shape[:2], v.shape[2]), torch.empty(q.shape[:2])
        shapes = ctypes.byref(_Attended.of(q, k, v, out, scaling))
        heads = (x.data_ptr() for x in (q, k, v))
        _call("kitae_attend", q, *heads, shapes, segments, len(segments), out, lse)
        out[padding[0] : padding[1]] = 0.0
        ctx.save_for_backward(q, k, v, out, lse, segments, groups)
        ctx.scaling, ctx.padding = scaling, padding
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        q, k, v, out, lse, segments, groups = ctx.saved_tensors
        dout = _whole_heads(dout)
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        shapes = ctypes.byref(_Attended.of(q, k, v, dout, ctx.scaling))
        heads = (x.data_ptr() for x in (q, k, v))
        given = (*heads, out, lse, dout.data_ptr(), shapes, segments, groups, len(groups) - 1)
        _call("kitae_attend_backward", q, *given, *grads)
        for grad in grads:
            grad[ctx.padding[0] : ctx.padding[1]] = 0.0
        return *grads, None, None, None, None


def _whole_heads(x_THD: Tensor) -> Tensor:
    """The tensor with each head's numbers beside each other, copied where they are not."""
    return x_THD if x_THD.stride(-1) == 1 else x_THD.contiguous()


def target_logprobs_(
    logits_NV: Tensor, targets_N: Tensor, *, temperature: float, scales_N: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits / temperature: log-probs of the targets, logarithms of the rows' sums of exponentials, and entropies.

    With scales, the logits are overwritten by scale x (onehot - p): times 1 / temperature, the gradient of scale x
    log-prob in the logits.
    """
    rows, vocabulary = logits_NV.shape
    said = torch.empty(rows), torch.empty(rows), torch.empty(rows)
    pointers = (logits_NV, targets_N, rows, vocabulary, temperature, scales_N, *said)
    _call("kitae_target_logprobs", logits_NV, *pointers)
    return said


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse token ids that the model has not: a kernel would read, or write, beyond its memory."""
    smallest, largest = (int(x) for x in ids.aminmax())
    if smallest < 0 or largest >= vocabulary:
        raise ModelError(
            f"token id {smallest if smallest < 0 else largest} is none of the model's {vocabulary}: the tokenizer does "
            "not belong to it; set model.tokenizer to its own"
        )


def add_(total: Tensor, x: Tensor) -> None:
    """total += x, without the float32 copy of x that torch makes; total is float32 and without gaps."""
    _call("kitae_add", x, x.contiguous(), x.numel(), total)


class _AdamW(ctypes.Structure):
    """As in kernels/adamw.h."""

    _fields_ = tuple(
        (name, c_float)
        for name in ("scale", "decay", "beta1", "beta2", "step_size", "root_correction", "epsilon")
    )


def adamw_(
    master: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    weight: Tensor | None,
    *,
    scale: float,
    decay: float,
    betas: tuple[float, float],
    step_size: float,
    root_correction: float,
    epsilon: float,
) -> None:
    """AdamW (arXiv:1711.05101) on tensors without gaps, float32 but for `weight`, which becomes the rounded master.

    The gradient counts `scale` times and is cleared. decay is 1 - rate x weight decay, step_size the rate over
    1 - beta1^t, root_correction the root of 1 - beta2^t.
    """
    sizes = [x.numel() for x in (master, grad, mean, square)]
    assert sizes == [master.numel()] * 4, sizes
    how = _AdamW(scale, decay, *betas, step_size, root_correction, epsilon)
    pointers = (master, grad, mean, square, weight, master.numel(), ctypes.byref(how))
    _call("kitae_adamw", master if weight is None else weight, *pointers)


def grouped_product(
    x: Tensor,
    index_S: Tensor | None,
    sizes_E: Tensor,
    weight_EOI: Tensor,
    *,
    is_transposed: bool,
    adds: bool,
    out: Tensor,
) -> None:
    """Into, or onto, `out`: rows of x, sorted by group, times their group's W^T or W; sizes_E of the groups is int64."""
    depth, columns = weight_EOI.shape[:0:-1] if is_transposed else weight_EOI.shape[1:]
    assert depth * x.itemsize % 4 == 0, f"{depth} numbers of {x.dtype} are no whole words"
    shape = (len(sizes_E), weight_EOI, is_transposed, depth, columns)
    _call("kitae_grouped_product", x, x, index_S, sizes_E, *shape, adds, out)


def add_grouped_outer_(
    total_EOI: Tensor,
    y: Tensor,
    y_index_S: Tensor | None,
    x: Tensor,
    x_index_S: Tensor | None,
    sizes_E: Tensor,
) -> None:
    """total += y^T x of each group's rows; total is float32 and without gaps."""
    pointers = (y, y_index_S, x, x_index_S, sizes_E)
    _call("kitae_grouped_outer", x, *pointers, *total_EOI.shape, total_EOI)


def gated(h_SG: Tensor) -> Tensor:
    """silu(gate) x up of rows that hold gate, then up."""
    a_SI = h_SG.new_empty(len(h_SG), h_SG.shape[1] // 2)
    _call("kitae_gated", h_SG, h_SG, *a_SI.shape, a_SI)
    return a_SI


def gated_backward(h_SG: Tensor, grad_SI: Tensor, weight_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of sums of weight_S gated(h): the gradient of h, weight_S gated(h), and the gradient of weight_S; weights are float32.

    `grad_SI` is the gradient of gated(h) where its weight is 1.
    """
    grad_h_SG, weighted_SI, dots_S = torch.empty_like(h_SG), torch.empty_like(grad_SI), torch.empty(len(h_SG))
    given = (h_SG, grad_SI, weight_S, *grad_SI.shape)
    _call("kitae_gated_backward", h_SG, *given, grad_h_SG, weighted_SI, dots_S)
    return grad_h_SG, weighted_SI, dots_S


def sum_slots(x_SH: Tensor, slot_Tk: Tensor, weight_Tk: Tensor | None) -> Tensor:
    """Sum of each token's rows of x, times their float32 weights where there are some, [T, H]."""
    out_TH = x_SH.new_empty(len(slot_Tk), x_SH.shape[1])
    _call("kitae_sum_slots", x_SH, x_SH, slot_Tk, weight_Tk, *slot_Tk.shape, x_SH.shape[1], out_TH)
    return out_TH
