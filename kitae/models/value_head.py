"""A value head beside a policy's own: one linear layer on the last hidden state, for a critic that shares its layers.

It is a part of the transformers model, so that optimizer, ranks and checkpoints see it, but of no exported one: it is
written as critic/value_head.safetensors, where programs that read every *.safetensors of a model folder do not look.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kitae.errors import ModelError
from kitae.models.policy import VALUE_HEAD, Policy

FILE = Path("critic") / "value_head.safetensors"
"""Below the folder of the model or adapter it belongs to."""


def attach(policy: Policy, *, start: Path) -> Path | None:
    """Put a float32 value head on the policy, before it is spread over ranks; its values are in TokenOutputs from then on.

    It starts as the one that lies with the model in the folder `start`, whose file is returned, else at zero: the first
    gradient then moves the head alone.
    """
    size = policy.causal_lm.config.get_text_config().hidden_size
    head = nn.Linear(size, 1, device=policy.device, dtype=torch.float32)
    file = start / FILE
    if file.is_file():
        try:
            head.load_state_dict(load_file(file))
        except (RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"{file} does not fit a model of hidden size {size} ({str(error).splitlines()[0]}); remove it to start "
                "with a new value head"
            ) from error
    else:
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
    policy.causal_lm.add_module(VALUE_HEAD, head)
    policy.float32_names |= {f"{VALUE_HEAD}.{name}" for name, _ in head.named_parameters()}
    return file if file.is_file() else None


def whole_tensors(policy: Policy) -> dict[str, Tensor]:
    """The head's parameters, whole; where they are sharded every rank must call it."""
    head = policy.value_head
    assert head is not None, "the policy has no value head"
    named = {name: parameter.detach() for name, parameter in head.named_parameters()}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()
        for name, tensor in named.items()
    }


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write the head's whole tensors beside the model in `folder`."""
    (folder / FILE).parent.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
