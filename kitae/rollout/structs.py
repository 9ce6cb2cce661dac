"""The structs of kernels/model.h, field by field, and calls of the compiled functions with torch tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p

from torch import Tensor

from kitae.compiler import status_of


class Matrix(Structure):
    _fields_ = (
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("columns", c_int64),
        ("depth", c_int64),
    )


class Latent(Structure):
    _fields_ = (
        ("down", Matrix),
        ("queries", Matrix),
        ("key_up", Matrix),
        ("value_up", Matrix),
        ("query_norm", c_void_p),
        ("norm", c_void_p),
    )


class Experts(Structure):
    _fields_ = (("router", c_void_p), ("bias", c_void_p), ("gate_up", Matrix), ("down", Matrix))


class Layer(Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("latent", Latent),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("experts", Experts),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("pages", c_void_p),
    )


class LatentSizes(Structure):
    _fields_ = (
        ("query_latent", c_int64),
        ("latent", c_int64),
        ("rotated", c_int64),
        ("plain", c_int64),
        ("value", c_int64),
        ("row", c_int64),
        ("norm_epsilon", c_float),
    )


class Routing(Structure):
    _fields_ = (
        ("num_experts", c_int64),
        ("num_chosen", c_int64),
        ("num_groups", c_int64),
        ("num_open_groups", c_int64),
        ("best_of_group", c_int64),
        ("is_sigmoid", c_int),
        ("is_normalised", c_int),
        ("scale", c_float),
    )


class Model(Structure):
    _fields_ = (
        ("layers", POINTER(Layer)),
        ("num_layers", c_int64),
        ("head", Matrix),
        ("embedding", c_void_p),
        ("embedding_stride", c_int64),
        ("final_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("hidden_size", c_int64),
        ("query_heads", c_int64),
        ("key_heads", c_int64),
        ("head_size", c_int64),
        ("vocabulary", c_int64),
        ("norm_epsilon", c_float),
        ("attention_scale", c_float),
        ("latent", LatentSizes),
        ("routing", Routing),
    )


class Scratch(Structure):
    _fields_ = (
        ("hidden", c_void_p),
        ("normed", c_void_p),
        ("qkv", c_void_p),
        ("attended", c_void_p),
        ("activated", c_void_p),
        ("logits", c_void_p),
        ("hidden_stride", c_int64),
        ("qkv_stride", c_int64),
        ("attended_stride", c_int64),
        ("activated_stride", c_int64),
        ("logits_stride", c_int64),
        ("query_latents", c_void_p),
        ("queries", c_void_p),
        ("absorbed", c_void_p),
        ("mixed", c_void_p),
        ("query_latents_stride", c_int64),
        ("queries_stride", c_int64),
        ("absorbed_stride", c_int64),
        ("mixed_stride", c_int64),
        ("shares", c_void_p),
        ("chosen", c_void_p),
        ("place", c_void_p),
        ("first_row", c_void_p),
        ("expert_rows", c_void_p),
        ("expert_activated", c_void_p),
        ("expert_out", c_void_p),
        ("expert_activated_stride", c_int64),
        ("integers", c_void_p),
        ("row_scales", c_void_p),
    )


class Tokens(Structure):
    _fields_ = (
        ("count", c_int64),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("tables", c_void_p),
        ("table_stride", c_int64),
        ("table_of", c_void_p),
    )


class Sampling(Structure):
    _fields_ = (
        ("steps", c_int64),
        ("uniforms", c_void_p),
        ("temperatures", c_void_p),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("stop_ids", c_void_p),
        ("num_stop_ids", c_int64),
        ("top_ks", c_void_p),
        ("top_ps", c_void_p),
        ("log_min_ps", c_void_p),
        ("kept", c_void_p),
        ("kept_stride", c_int64),
    )


def declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions' types; they raise MemoryError where they find too little."""
    model, scratch, tokens, sampling = (POINTER(s) for s in (Model, Scratch, Tokens, Sampling))
    kernels.kitae_decode.argtypes = (model, scratch, tokens, sampling, c_int, c_int)
    kernels.kitae_forward.argtypes = (model, scratch, tokens, c_void_p, c_int64, c_int64, c_int, c_int)
    kernels.kitae_sample.argtypes = (model, scratch, c_void_p, c_int64, sampling)
    for name in ("kitae_decode", "kitae_forward", "kitae_sample"):
        function = getattr(kernels, name)
        function.restype, function.errcheck = c_int64, status_of
    return kernels


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; it must outlive the struct."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()
