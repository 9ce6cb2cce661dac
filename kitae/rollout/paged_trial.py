"""Which policies the paged engine samples from: what it needs of device and model, and a trial of its kernels there."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from kitae import backends
from kitae.models import attention, compared
from kitae.models.policy import Policy
from kitae.rollout.page_cache import Attend, PageCache, Step, attend_slowly
from kitae.rollout.pages import PAGE
from kitae.rollout.plain import eval_mode
from kitae.types import Packing, Segment


def why_not_paged(policy: Policy) -> str | None:
    """Why this policy is not sampled from so, or None where it can be; the kernels are tried on its device."""
    backend = backends.of(policy.device)
    for feature in ("triton", "recording"):
        has_it, reason = backend.supports(feature)
        if not has_it:
            return f"it runs on {policy.device.type}, without {feature} ({reason})"
    if len({p.device for p in policy.parameters()}) > 1:
        return "its layers lie on several devices"
    if hasattr(policy, "unshard"):
        return "its weights are sharded over ranks"
    if not policy.seams.attention:
        return "model.seams.attention is off"
    why_not = _why_not_right(policy)
    if why_not is None and not policy.family.is_tested:
        why_not = why_not_the_same(policy, attend=fast_attend())
    return why_not


def waits_for_device(policy: Policy) -> bool:
    """Whether its steps cannot be recorded, since something is read from the device within them.

    It is how many tokens each routed expert has, or how far a dynamic rotary embedding has come.
    """
    return any(
        hasattr(module, "num_experts") or getattr(module, "rope_type", None) == "dynamic"
        for module in policy.modules()
    )


def fast_attend() -> Attend:
    """The steps' attention where why_not_paged has nothing against it."""
    from kitae.rollout.triton_attention import attend

    return attend


def _why_not_right(policy: Policy) -> str | None:
    """Try the kernels on random numbers in the policy's shapes, against attend_slowly."""
    queries, heads, size, value_size = attention.head_sizes(policy.causal_lm.config)
    generator = torch.Generator().manual_seed(0)
    lengths, pages = [1, 16, 17, 300, 700], 64

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(policy.device, policy.dtype)

    q_BQD = drawn(len(lengths), queries, size)
    keys, values = drawn(pages, PAGE, heads, size), drawn(pages, PAGE, heads, value_size)
    tables = torch.stack([torch.randperm(pages, generator=generator) for _ in lengths]).int()
    positions = torch.tensor(lengths) - 1
    given = (q_BQD, keys, values, tables.to(policy.device), positions.to(policy.device), size**-0.5)
    try:
        found = fast_attend()(*given).float()
    except Exception as error:  # compilers raise anything
        return f"its attention kernels do not run here: {_first_line(error)}"
    expected = attend_slowly(*given).float()
    off = float((found - expected).norm() / expected.norm())
    if not off < (1e-4 if policy.dtype == torch.float32 else 0.02):
        return f"its attention kernels give other numbers here: {off:.1e} off"
    return None


@torch.no_grad()
def why_not_the_same(policy: Policy, *, attend: Attend) -> str | None:
    """Try a step of two rows, whose last tokens must come out as they do with the whole rows.

    So is a model found out whose layers are not all as its configuration says.
    """
    device, lengths = policy.device, (6, 21)  # the last token lies in a row's first page, and in its second
    cache = PageCache(policy.causal_lm.config, device=device, dtype=policy.dtype, attend=attend)
    cache.resize(4)
    ids_T = torch.cat([torch.arange(n) for n in lengths]) + 1
    positions_T = torch.cat([torch.arange(n) for n in lengths])
    last_B = torch.tensor(lengths).cumsum(0) - 1
    places_T = torch.cat((torch.arange(6), PAGE + torch.arange(21)))
    places_T[last_B] = 3 * PAGE  # not in the rows' pages: the step itself puts them there
    tables_BP = torch.tensor([[0, 0], [1, 2]], dtype=torch.int32, device=device)

    def hidden(of: Tensor, counts: tuple[int, ...], coming: Step | Tensor) -> Tensor:
        cache.coming = coming
        starts = accumulate(counts, initial=0)
        segments = [Segment(start, n) for start, n in zip(starts, counts, strict=False)]
        packing = Packing(segments=segments, num_tokens=sum(counts))
        return policy.hidden(ids_T[of].to(device), positions_T[of].to(device), packing, cache=cache)

    try:
        with eval_mode(policy):
            whole_TH = hidden(torch.arange(sum(lengths)), lengths, places_T.to(device))
            step = Step.of(tables_BP, positions_T[last_B].to(device))
            step_BH = hidden(last_B, (1, 1), step)
    except Exception as error:  # a model's own code raises anything
        return f"its steps do not run: {_first_line(error)}"
    if not compared.is_close(step_BH, whole_TH[last_B.to(device)], policy.dtype):
        return "its steps do not give what whole rows give"
    return None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
