"""Whether the seams give what the plain module gives: the comparison at load, for architectures that no test knows.

a few short rows --plain module--> hidden states;  packed, with a seam --> hidden states;  equal up to rounding?
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kitae.errors import ModelError
from kitae.types import Packing, Segment

ROWS = (11, 6, 9)
"""Lengths of the rows that seam and plain module are compared on; the last two share the first as their prompt."""


def has_plain_head(causal_lm: Any) -> bool:
    """Whether logits are the head's linear map of the hidden states and nothing else."""
    head = causal_lm.get_output_embeddings()
    return type(head) is nn.Linear and scaled_logits(torch.ones(1), causal_lm.config).item() == 1.0


def scaled_logits(logits_NV: Tensor, config: Any) -> Tensor:
    """Logits as the architecture means them: Granite's and Cohere's scales, Gemma's soft-cap."""
    if divisor := getattr(config, "logits_scaling", None):
        logits_NV = logits_NV / divisor
    if factor := getattr(config, "logit_scale", None):
        logits_NV = logits_NV * factor
    if cap := getattr(config, "final_logit_softcapping", None):
        logits_NV = (logits_NV / cap).tanh() * cap
    return logits_NV


def why_own_attention(config: Any) -> str | None:
    """What in the configuration rules packed attention out; short rows would not show a window or a soft-cap."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}"
    if getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None):
        return "it attends in a sliding window"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention scores"
    return None


def plain_hidden(causal_lm: Any) -> Tensor:
    """Hidden states of the compared rows, each by itself through the module as transformers made it."""
    ids = _compared_ids(causal_lm)
    prompt, *others = torch.split(ids, list(ROWS))
    with torch.no_grad():
        whole = [_decode(causal_lm, prompt), *(_decode(causal_lm, torch.cat((prompt, o))) for o in others)]
    return torch.cat([whole[0], *(h[len(prompt) :] for h in whole[1:])])


def packed_hidden(causal_lm: Any) -> Tensor:
    a, b, c = ROWS
    segments = [Segment(0, a), Segment(a, b, 0, a), Segment(a + b, c, 0, a)]
    positions = torch.cat([torch.arange(n) + start for n, start in ((a, 0), (b, a), (c, a))])
    packing = Packing(segments=segments, num_tokens=a + b + c)
    with torch.no_grad():
        return _decode(causal_lm, _compared_ids(causal_lm), positions=positions, packing=packing)


def require_known_logits(causal_lm: Any) -> None:
    """Refuse an architecture whose own logits are not those that kitae makes of its hidden states."""
    ids = _compared_ids(causal_lm)[None].to(next(causal_lm.parameters()).device)
    with torch.no_grad():
        own_TV = causal_lm(input_ids=ids, use_cache=False).logits[0].float()
        hidden_TH = causal_lm.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits_TV = scaled_logits(causal_lm.get_output_embeddings()(hidden_TH).float(), causal_lm.config)
    if not is_close(logits_TV, own_TV, causal_lm.dtype):
        raise ModelError(
            f"{causal_lm.config.model_type} models make their logits of hidden states in a way that kitae does not "
            "know, so its log-probs would be wrong; this architecture cannot be used"
        )


def _compared_ids(causal_lm: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, causal_lm.config.vocab_size, (sum(ROWS),), generator=generator)


def _decode(causal_lm: Any, ids: Tensor, *, positions: Tensor | None = None, **passed: Any) -> Tensor:
    device = next(causal_lm.parameters()).device
    positions = torch.arange(len(ids)) if positions is None else positions
    out = causal_lm.get_decoder()(
        input_ids=ids[None].to(device),
        position_ids=positions[None].to(device),
        attention_mask=None,
        use_cache=False,
        **passed,
    )
    hidden: Tensor = out.last_hidden_state[0].float()
    return hidden


def is_close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    """Equal up to rounding in every row."""
    error = ((a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-6)).max()
    return bool(error < (1e-4 if dtype == torch.float32 else 0.05))
