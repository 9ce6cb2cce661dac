"""The policy: an unmodified transformers causal LM, called on packed batches through the seams.

Batch --backbone (attention seam)--> hidden_TH --source_N--> head seam --> logprobs_N, entropy_N
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kitae.config import SeamSettings
from kitae.errors import ConfigError, ModelError
from kitae.models import heads, native, native_head
from kitae.models.compared import scaled_logits
from kitae.models.families import GENERIC, Family
from kitae.models.kept import Kept
from kitae.models.seams import AttentionCache
from kitae.types import Batch, Packing, TokenOutputs

VALUE_HEAD = "value_head"
"""Name inside causal_lm of a shared critic's head (models/value_head.py)."""


class Policy(nn.Module):
    """A causal LM that scores packed rows; `causal_lm` is the transformers model, adapters injected inside it."""

    def __init__(
        self,
        causal_lm: nn.Module,
        *,
        dtype: torch.dtype,
        seams: SeamSettings,
        family: Family = GENERIC,
        peft: Any = None,
        reference_adapter: str | None = None,
        base_name: str = "",
    ) -> None:
        super().__init__()
        self.causal_lm: Any = causal_lm  # a transformers PreTrainedModel, whose attributes are dynamic
        # Not registered as a submodule: it wraps causal_lm, and every parameter would have two names.
        object.__setattr__(self, "peft", peft)
        self.config = self.causal_lm.config
        self.family = family
        self.dtype = dtype
        """What it computes in; the parameters' own dtype may be wider where they are sharded."""
        self.float32_names = {n for n, p in self.causal_lm.named_parameters() if p.dtype == torch.float32}
        """Parameters that stay float32 whatever `dtype` is, as transformers keeps DeepSeek-V3's router."""
        self.seams = seams
        """The seams really in use."""
        self.reference_adapter = reference_adapter
        """Name of the frozen copy of the adapter this run started from, if it did."""
        self.base_name = base_name
        """What an adapter's file says its base model is."""

    gives_scores: ClassVar[bool] = False
    """Whether the transformers model is a sequence classifier, which has a score for a head (models/critic.py)."""
    peft: Any
    """peft's wrapper around causal_lm, or None without an adapter."""

    @property
    def value_head(self) -> nn.Linear | None:
        """The head of a critic that shares the policy's layers, where there is one."""
        head: nn.Linear | None = getattr(self.causal_lm, VALUE_HEAD, None)
        return head

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def layers(self) -> nn.ModuleList:
        """The model's blocks in order, whatever the architecture calls them."""
        decoder: nn.Module = self.causal_lm.get_decoder()
        return next(m for m in decoder.modules() if isinstance(m, nn.ModuleList))

    def forward(
        self, batch: Batch, *, with_entropy: bool = False, coefficients_N: Tensor | None = None
    ) -> TokenOutputs:
        """Log-probs of batch.targets_N, and the entropies of their distributions when asked, in float32.

        Both are of logits over batch.temperature, renormalised over batch.kept_ids_N. `coefficients_N` is
        d loss / d logprob where it is known ahead (a linear loss): the head's gradient is then computed right away.
        A value head adds the values of the states in which the targets were chosen, batch.teacher the divergence from it.
        """
        hidden_NH = self.predicting(batch)
        if batch.teacher is None:
            return self._said(batch, hidden_NH, with_entropy=with_entropy, coefficients_N=coefficients_N)
        out = batch.teacher.compare(self, batch, hidden_NH)
        return out if not with_entropy else out._replace(entropy_N=self._said(batch, hidden_NH).entropy_N)

    def predicting(self, batch: Batch) -> Tensor:
        """Hidden states [N, H] that the batch's predictions are made from."""
        device = self.device
        hidden_TH = self.hidden(batch.input_ids_T.to(device), batch.positions_T.to(device), batch.packing)
        return hidden_TH.index_select(0, batch.source_N.to(device))

    def _said(
        self,
        batch: Batch,
        hidden_NH: Tensor,
        *,
        with_entropy: bool = True,
        coefficients_N: Tensor | None = None,
    ) -> TokenOutputs:
        device = hidden_NH.device
        targets_N = batch.targets_N.to(device)
        values_N = None if self.value_head is None else self.value_head(hidden_NH.float()).squeeze(-1)
        kept = None if batch.kept_ids_N is None else Kept.of(batch.kept_ids_N, targets_N)
        if not self.seams.head:
            logprobs_N, entropy_N = heads.plain_logprobs(
                self.logits(hidden_NH), targets_N, temperature=batch.temperature, kept=kept
            )
            return _outputs(batch, logprobs_N, entropy_N if with_entropy else None, values_N)
        head = self.causal_lm.get_output_embeddings()
        if self.seams.kernels and kept is None and native.fits(hidden_NH, head.weight, head.bias):
            logprobs_N, entropy_N = native_head.chunked_logprobs(
                hidden_NH,
                head.weight,
                head.bias,
                targets_N,
                temperature=batch.temperature,
                coefficients_N=coefficients_N,
            )
            return _outputs(batch, logprobs_N, entropy_N if with_entropy else None, values_N)
        logprobs_N, chunked_entropy_N = heads.chunked_logprobs(
            hidden_NH,
            head.weight,
            head.bias,
            targets_N,
            temperature=batch.temperature,
            kept=kept,
            with_entropy=with_entropy,
            coefficients_N=None if coefficients_N is None else coefficients_N.to(device),
        )
        return _outputs(batch, logprobs_N, chunked_entropy_N, values_N)

    def hidden(
        self,
        input_ids_T: Tensor,
        positions_T: Tensor,
        packing: Packing,
        *,
        cache: AttentionCache | None = None,
    ) -> Tensor:
        """Hidden states [T, H] after the final norm. A sampler's `cache` takes over attention, see AttentionCache."""
        if not self.seams.attention:
            if cache is not None:
                raise ModelError(
                    f"sampling with a cache needs the attention seam, which is off for this {self.family.name} model"
                )
            return self._hidden_row_by_row(input_ids_T, packing)
        out = self._backbone(input_ids_T, positions_T, packing=packing, kv_cache=cache)
        return out[0]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Float32 logits [N, V] of hidden states, with the architecture's own scaling and soft-cap."""
        logits_NV: Tensor = self.causal_lm.get_output_embeddings()(hidden_NH).float()
        return scaled_logits(logits_NV, self.config)

    def named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that train, by the names checkpoints use (those of causal_lm)."""
        return [(name, p) for name, p in self.causal_lm.named_parameters() if p.requires_grad]

    def without_adapter(self) -> AbstractContextManager[None]:
        """Inside it the model computes without its adapter; without one, nothing changes."""
        context: AbstractContextManager[None] = (
            nullcontext() if self.peft is None else self.peft.disable_adapter()
        )
        return context

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it an adapter's run has the model it started from: adapter off, or the frozen start adapter."""
        assert self.peft is not None, "a full model has no reference inside it; load a second policy"
        if self.peft.active_peft_config.bias != "none":
            raise ConfigError(
                "lora.bias trains the model's own biases, so switching the adapter off does not give the reference; "
                "set lora.bias to none, or train without a KL term"
            )
        if self.reference_adapter is None:
            with self.without_adapter():
                yield
            return
        active = self.peft.active_adapter
        self.peft.set_adapter(self.reference_adapter, inference_mode=True)
        try:
            yield
        finally:
            self.peft.set_adapter(active)

    def _backbone(self, input_ids_T: Tensor, positions_T: Tensor, **passed_to_attention: Any) -> Tensor:
        hidden: Tensor = self.causal_lm.get_decoder()(
            input_ids=input_ids_T[None],
            position_ids=positions_T[None],
            attention_mask=None,
            use_cache=False,
            **passed_to_attention,
        ).last_hidden_state
        return hidden.to(input_ids_T.device)  # the last layers may lie on another device (placement.py)

    def _hidden_row_by_row(self, input_ids_T: Tensor, packing: Packing) -> Tensor:
        """Every segment by itself, after its prefix, through the model's own attention; padding gets zeros."""
        hidden = []
        for s in packing.segments:
            prefix_T = input_ids_T[s.prefix_start : s.prefix_start + s.prefix_length]
            row_T = torch.cat((prefix_T, input_ids_T[s.start : s.start + s.length]))
            positions_T = torch.arange(len(row_T), device=row_T.device)
            hidden.append(self._backbone(row_T, positions_T)[0, s.prefix_length :])
        padding = packing.num_tokens - packing.num_real_tokens
        return torch.cat([*hidden, hidden[0].new_zeros(padding, hidden[0].shape[-1])])


def _outputs(
    batch: Batch, logprobs_N: Tensor, entropy_N: Tensor | None, values_N: Tensor | None
) -> TokenOutputs:
    row_N = batch.row_N.to(logprobs_N.device)
    return TokenOutputs(logprobs_N, entropy_N, values_N, row_N=row_N, num_rows=batch.num_rows)
