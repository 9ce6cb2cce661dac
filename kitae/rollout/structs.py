"""The structs of kernels/model.h, field by field, and calls of the compiled functions with torch tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p

from torch import Tensor


class Matrix(Structure):
    _fields_ = (("weights", c_void_p), ("bias", c_void_p), ("columns", c_int64), ("depth", c_int64))


class Layer(Structure):
    _fields_ = (
        ("qkv", Matrix),
        ("out", Matrix),
        ("gate_up", Matrix),
        ("down", Matrix),
        ("attention_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("pages", c_void_p),
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
        ("temperature", c_float),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("stop_ids", c_void_p),
        ("num_stop_ids", c_int64),
    )


def declare(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the functions' types."""
    model, scratch, tokens, sampling = (POINTER(s) for s in (Model, Scratch, Tokens, Sampling))
    kernels.kitae_decode.argtypes = (model, scratch, tokens, sampling, c_int, c_int)
    kernels.kitae_decode.restype = c_int64
    kernels.kitae_forward.argtypes = (model, scratch, tokens, c_void_p, c_int64, c_int64, c_int, c_int)
    kernels.kitae_forward.restype = None
    kernels.kitae_sample.argtypes = (model, scratch, c_void_p, c_int64, sampling)
    kernels.kitae_sample.restype = None
    return kernels


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers begin; it must outlive the struct."""
    if tensor is None:
        return None
    assert tensor.is_contiguous(), tensor.shape
    return tensor.data_ptr()
