"""Which engine samples from a policy: on a GPU the paged one, on a CPU the native one where it can run and is worth
compiling, else the generic one.

The choice depends on settings, model and machine, never on what lies in a cache: the same command gives the same numbers
before and after its kernels were compiled.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch

from kitae.errors import ConfigError
from kitae.models.policy import Policy
from kitae.rollout.build import BuildError, load_kernels
from kitae.rollout.generic import GenericEngine
from kitae.rollout.int8 import is_fast_here
from kitae.rollout.native import NativeEngine
from kitae.rollout.paged import PagedEngine
from kitae.rollout.paged_trial import fast_attend, waits_for_device, why_not_paged
from kitae.rollout.shapes import compute_dtype, why_not_int8, why_not_native

log = logging.getLogger(__name__)

LocalEngine = GenericEngine | NativeEngine | PagedEngine
"""An engine that holds the policy in this process."""
SAVED_S = 1e-5
"""What the native engine saves per token of the smallest model, in seconds; found on two CPU cores."""
SAVED_S_PER_PARAMETER = 2.5e-11
COMPILE_S = 8.0
"""Saving less than this is not worth the compiling; expected tokens are an upper bound, and reached by half."""


class Chosen(NamedTuple):
    """An engine, and what the settings call it."""

    engine: LocalEngine
    name: Literal["generic", "native", "paged"]


def open_engine(
    policy: Policy,
    *,
    wanted: Literal["auto", "generic", "native", "paged"],
    setting: str,
    expected_tokens: float,
    stop_ids: Sequence[int],
    decode: Callable[[list[int]], str],
    max_rows: int,
    load_copy: Callable[[], Policy] | None = None,
    quantization: Literal["none", "int8"] = "none",
    kv_cache_tokens: int | None = None,
) -> Chosen:
    """The engine for about this many sampled tokens; `setting` is the name of the user's setting that holds `wanted`, beside
    which are those of `quantization`, which only the native engine has, and `kv_cache_tokens`, see budget.py.

    With `load_copy`, it can sample while the policy's weights change (background.py): a native engine keeps a copy of all
    of them, a generic one gets a second policy.
    """
    own_names = setting.removesuffix("engine")
    is_int8 = quantization == "int8"
    _check_together(
        wanted, setting=setting, own_names=own_names, is_int8=is_int8, kv_cache_tokens=kv_cache_tokens
    )
    own: Callable[[], Policy] = load_copy or (lambda: policy)
    how: dict[str, Any] = {"stop_ids": stop_ids, "decode": decode, "max_rows": max_rows}
    budget: dict[str, Any] = {"kv_cache_tokens": kv_cache_tokens, "kv_setting": f"{own_names}kv_cache_tokens"}
    if wanted in ("auto", "paged") and not is_int8:
        reason = why_not_paged(policy)
        if reason is None:
            log.info("rollouts: paged engine, %d rows at a time", max_rows)
            # While another thread uses the device, nothing can be recorded.
            records = load_copy is None and not waits_for_device(policy)
            return Chosen(PagedEngine(own(), attend=fast_attend(), records=records, **how, **budget), "paged")
        if wanted == "paged":
            raise ConfigError(
                f"{setting} is paged, but that engine cannot sample from this model: {reason}; set it to auto or generic"
            )
        if policy.device.type != "cpu":
            log.info("rollouts: not the paged engine: %s", reason)
    if wanted != "generic":
        insists = wanted == "native" or is_int8
        kernels, reason = _native_kernels(policy, insists=insists, is_int8=is_int8, tokens=expected_tokens)
        if kernels is not None:
            _tell_native(policy, max_rows=max_rows, is_int8=is_int8)
            shares = load_copy is None
            native = NativeEngine(
                policy, kernels=kernels, shares_embedding=shares, quantization=quantization, **how, **budget
            )
            return Chosen(native, "native")
        if is_int8:
            raise ConfigError(
                f"{own_names}quantization is int8, which needs the native engine, and that cannot sample from this model: "
                f"{reason}; set it to none"
            )
        if wanted == "native":
            raise ConfigError(
                f"{setting} is native, but the native engine cannot sample from this model: {reason}; set it to auto or "
                "generic"
            )
        log.info("rollouts: not the native engine: %s", reason)
    if kv_cache_tokens is not None:
        log.warning(
            "rollouts: %skv_cache_tokens has no effect: the generic engine keeps a place as long as the longest row for "
            "each of %d rows; fewer of them need less memory",
            own_names,
            max_rows,
        )
    return Chosen(GenericEngine(own(), **how), "generic")


def _check_together(
    wanted: str, *, setting: str, own_names: str, is_int8: bool, kv_cache_tokens: int | None
) -> None:
    """Refuse settings that the wanted engine does not have."""
    if is_int8 and wanted in ("generic", "paged"):
        raise ConfigError(
            f"{own_names}quantization is int8 and {setting} {wanted}, but only the native engine has 8-bit weights; set one "
            "of them otherwise"
        )
    if kv_cache_tokens is not None and wanted == "generic":
        raise ConfigError(
            f"{own_names}kv_cache_tokens is {kv_cache_tokens:,} and {setting} generic, but that engine does not count "
            "tokens; leave one of them out"
        )


def _native_kernels(
    policy: Policy, *, insists: bool, is_int8: bool, tokens: float
) -> tuple[ctypes.CDLL | None, str]:
    """The native engine's kernels, or why it does not sample here."""
    reason = why_not_native(policy)
    if reason is None and not insists and not pays(policy, tokens=tokens):
        reason = f"compiling it takes longer than sampling {tokens:,.0f} tokens from a model of this size"
    if reason is None and is_int8:
        reason = why_not_int8(policy)
    if reason is not None:
        return None, reason
    try:
        return load_kernels(), ""
    except BuildError as error:
        return None, f"its kernels could not be compiled: {error}"


def _tell_native(policy: Policy, *, max_rows: int, is_int8: bool) -> None:
    log.info(
        "rollouts: native engine, %d rows at a time, %d threads (%s in %s%s)",
        max_rows,
        torch.get_num_threads(),
        policy.causal_lm.config.model_type,
        str(compute_dtype(policy)).removeprefix("torch."),
        ", linear weights in int8" if is_int8 else "",
    )
    if is_int8 and not is_fast_here():
        log.warning("rollouts: this CPU has no avx512_vnni; sampling in int8 saves memory there, and no time")


def pays(policy: Policy, *, tokens: float) -> bool:
    """Whether sampling this many tokens saves more time than compiling takes."""
    parameters = sum(p.numel() for p in policy.parameters())
    return tokens * (SAVED_S + SAVED_S_PER_PARAMETER * parameters) > COMPILE_S
