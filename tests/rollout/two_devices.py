"""Devices that are not there: CPU tensors with a label, and an error where an operation mixes labels.

What holds on a machine with several GPUs is checked with it: who moves what where. Their speed and kernels are not.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

HOST = torch.device("cpu")
GET_DEVICE = torch.Tensor.device.__get__
INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class Devices(TorchFunctionMode):
    """Inside it `tensor.to("cuda:1")` gives a CPU tensor that says it is on cuda:1."""

    def __init__(self):
        super().__init__()
        self.computed = set()
        """Where matrix products were computed."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == GET_DEVICE:
            return label(args[0])
        if func is torch.Tensor.to:
            return self._to(*args, **kwargs)
        wanted = kwargs.pop("device", None)
        places = {label(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.dim()}
        if func in INDEXING:  # an index may lie in the host's memory
            places = places - {HOST} or places
        if len(places) > 1:
            raise RuntimeError(f"{func} on tensors of {sorted(map(str, places))}")
        place = torch.device(wanted) if wanted is not None else next(iter(places), HOST)
        if func in (torch.nn.functional.linear, torch.bmm, torch.matmul):
            self.computed.add(str(place))
        return put(func(*args, **kwargs), HOST if func is torch.Tensor.cpu else place)

    def _to(self, tensor, *args, **kwargs):
        named = [a for a in args if isinstance(a, str | int | torch.device)]
        others = [a for a in args if not isinstance(a, str | int | torch.device)]
        device = kwargs.pop("device", None) or next(iter(named), None) or label(tensor)
        if isinstance(next(iter(others), None), torch.Tensor):
            device = label(others[0])
        kwargs.pop("non_blocking", None)
        moved = tensor.to(*others, **kwargs) if others or kwargs else tensor
        is_new = torch.device(device) != label(tensor) and moved is tensor
        return put(moved.clone() if is_new else moved, torch.device(device))


def label(tensor):
    """Where a tensor says it is."""
    return getattr(tensor, "_place", HOST)


def put(found, place):
    """Label what an operation returned."""
    for tensor in tree_leaves(found):
        if isinstance(tensor, torch.Tensor):
            tensor._place = torch.device(place)
    return found
