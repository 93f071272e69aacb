"""A device that every machine has: tensors with real values that say they are on it, and refuse those that are not.

A wrapper around a CPU tensor. Operators compute on the CPU, so control flow that reads values works, and what is computed
can be compared with the CPU bit for bit. As on a GPU, a tensor on the CPU may only be copied there, be an index, or be a
number, shape ().
"""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tfmq_fx.base.offloaded import Offloaded

DEVICE = torch.device("meta")  # torch needs nothing for it
aten = torch.ops.aten
# CUDA takes sources of copies from the CPU, and indices, but no indices to what is there.
INDEXES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MIXES = {*INDEXES, aten.copy_.default, aten._to_copy.default}


class Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, x, requires_grad=False):
        return Tensor._make_wrapper_subclass(
            cls, x.size(), strides=x.stride(), storage_offset=x.storage_offset(), dtype=x.dtype, device=DEVICE,
            requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, x, requires_grad=False):  # noqa: ARG002
        self.x = x

    def tolist(self):  # torch refuses it for subclasses
        return self.x.tolist()

    def __repr__(self):
        return f"Elsewhere({self.x})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class MixedDevices(RuntimeError):
    pass


def dispatch(func, args, kwargs):
    flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(isinstance(x, Offloaded) for x in flat):
        return NotImplemented  # it copies itself here first
    there = [x for x in flat if isinstance(x, Elsewhere)]
    here = [x for x in flat if not isinstance(x, Elsewhere) and x.dim()]
    of_here = func in INDEXES and here and here[0] is flat[0]
    if there and here and (func not in MIXES or of_here):
        raise MixedDevices(f"{func}: {[(tuple(x.shape), str(x.device)) for x in flat]}")
    if any(x.is_meta for x in flat if not isinstance(x, Elsewhere)):
        raise MixedDevices(f"{func}: a tensor without values; index with a tensor instead of a list")
    device = kwargs.get("device")
    to_there = device is not None and torch.device(device).type == DEVICE.type
    stays = (bool(there) if device is None else to_there) and not (
        func in MIXES and args and not isinstance(args[0], Elsewhere) and device is None
    )
    plain_args, plain = pytree.tree_map_only(Elsewhere, lambda x: x.x, (args, kwargs))
    if to_there:
        plain["device"] = torch.device("cpu")
    out = func(*plain_args, **plain)
    if not stays:
        return out
    known = {id(x.x): x for x in there}  # written in place: the same tensor
    return pytree.tree_map_only(Tensor, lambda y: known[id(y)] if id(y) in known else Elsewhere(y), out)


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class _Literals(TorchFunctionMode):
    """torch.tensor([1, 2], device=..) calls no operator that a dispatch mode could see."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            x = args[0] if isinstance(args[0], Tensor) else func(*args, **{**kwargs, "device": "cpu"})
            return x.to(DEVICE, kwargs.get("dtype"))
        return func(*args, **kwargs)


@contextmanager
def device():
    """Let tensors be made on the device, and moved to it."""
    # torchao turns modes off while it looks for constants.
    with _Operators(), _Literals(), patch.object(Offloaded, "copied", lambda x: Elsewhere(x.home.clone())):
        yield


def moved(module):
    """Put a module's tensors on the device, in place."""
    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = nn.Parameter(
                    Elsewhere(p.detach().clone()), requires_grad=p.requires_grad
                )
        for name, b in m._buffers.items():
            if b is not None:
                m._buffers[name] = Elsewhere(b.clone())
    return module
