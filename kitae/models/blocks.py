"""Parts of a decoder layer that compute the same faster, put in the place of a module's `forward`: norm, attention, MLP.

    x --norm--> q, k, v --rotary, attention--> + --norm--> gate, up --SwiGLU, down--> +

Modules, their names and their parameters stay transformers' own, and so do the linears they call: adapters and sharding
work as they do without. Kernels are native.py's on a CPU and triton_blocks.py's on a GPU; what they do not take goes the
module's own way.
"""

from __future__ import annotations

import functools
import logging
import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kitae import backends
from kitae.models import native
from kitae.models.attention import head_sizes

log = logging.getLogger(__name__)

ATTENTIONS = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention", "Qwen3MoeAttention"}
"""transformers' classes that project, normalise heads where they have q_norm and k_norm, rotate, and attend."""
MLPS = {"DeepseekV3MLP", "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "Qwen3MoeMLP"}
"""transformers' classes that compute down(act(gate(x)) up(x))."""


def fuse_rmsnorms(model: nn.Module, *, kernels: bool = False) -> int:
    """Let every plain RMSNorm of the model compute in one operation; return how many there are.

    Whether a norm is plain is tried on random numbers: a norm that adds 1 to its weight, for one, stays as it is.
    """
    is_plain: dict[type, bool] = {}
    count = 0
    for module in model.modules():
        kind = type(module)
        if not kind.__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
            continue
        if kind not in is_plain:
            is_plain[kind] = _is_plain_rmsnorm(kind)
        if is_plain[kind]:
            # On the instance: the class, its name and its parameters stay transformers' own.
            module.forward = types.MethodType(_native_rmsnorm if kernels else _fused_rmsnorm, module)
            count += 1
    return count


def fuse_layers(model: nn.Module, *, attention_name: str, kernels: Any = native) -> None:
    """Let attention and MLP modules of the known classes compute with kernels, attention through that interface.

    `kernels` is a module with `fits`, `rotary`, `swiglu` and LARGEST_HEAD.
    """
    modules: Any = model.modules()  # whose attributes are dynamic
    for module in modules:
        kind = type(module).__name__
        if not type(module).__module__.startswith("transformers.models."):
            continue
        if kind in ATTENTIONS and module.config._attn_implementation == attention_name:
            module.forward = types.MethodType(functools.partial(_attention, kernels), module)
        elif kind in MLPS and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            module.forward = types.MethodType(functools.partial(_mlp, kernels), module)


def triton_kernels(causal_lm: Any) -> Any:
    """triton_blocks as `kernels`, where the model's device has Triton and they were tried on it; else None."""
    device = next(causal_lm.parameters()).device
    if not backends.of(device).supports("triton")[0]:
        return None
    from kitae.models import triton_blocks

    _, _, size, _ = head_sizes(causal_lm.config)
    reason = triton_blocks.why_not(head_size=size, dtype=causal_lm.dtype, device=device)
    if reason is None:
        return triton_blocks
    log.info("torch's own operations instead of Triton's kernels: %s", reason)
    return None


def _fused_rmsnorm(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _native_rmsnorm(self: Any, hidden_states: Tensor) -> Tensor:
    if not native.fits(hidden_states, self.weight):
        return _fused_rmsnorm(self, hidden_states)
    return native.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _is_plain_rmsnorm(kind: type) -> bool:
    try:
        norm = kind(48, eps=1e-5)
    except TypeError:  # a norm with other arguments is not a plain one
        return False
    if [name for name, _ in norm.named_parameters()] != ["weight"]:
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 48, generator=generator)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=generator))
        return bool(torch.allclose(norm(x), _fused_rmsnorm(norm, x), rtol=1e-5, atol=1e-6))


def _attention(
    kernels: Any,
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    cache: Any = None,
    **kwargs: Any,  # what a decoder layer passes on to the attention interface
) -> tuple[Tensor, None]:
    """The module's forward over one packed row, heads normalised and rotated by one kernel; without a cache of its own."""
    cos, sin = (x[0] for x in position_embeddings)
    norms = [getattr(self, name).weight if hasattr(self, name) else None for name in ("q_norm", "k_norm")]
    is_whole_head = cos.shape[-1] == self.head_dim <= kernels.LARGEST_HEAD
    packed = hidden_states.shape[0] == 1 and cache is None and is_whole_head
    if not packed or not kernels.fits(hidden_states, cos, sin, *norms):
        own: tuple[Tensor, None] = type(self).forward(
            self,
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        return own
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q_TQD, k_TKD, v_TKD = (
        project(hidden_states)[0].unflatten(-1, (-1, self.head_dim))
        for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    epsilon = self.q_norm.variance_epsilon if hasattr(self, "q_norm") else 0.0
    q_TQD, k_TKD = (
        kernels.rotary(x, norm, cos, sin, epsilon) for x, norm in zip((q_TQD, k_TKD), norms, strict=True)
    )
    attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
    out_1TQD, _ = attend(
        self,
        *(x.transpose(0, 1)[None] for x in (q_TQD, k_TKD, v_TKD)),
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", None),
        **kwargs,
    )
    return self.o_proj(out_1TQD.flatten(2)), None


def _mlp(kernels: Any, self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    gated = kernels.swiglu(gate, up) if kernels.fits(gate, up) else self.act_fn(gate) * up
    y: Tensor = self.down_proj(gated)
    return y
