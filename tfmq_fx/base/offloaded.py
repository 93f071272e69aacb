"""Compute on one device with weights that lie on another: the operator that reads a weight copies it there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from tfmq_fx.base.errors import TFMQError, first_line
from tfmq_fx.base.mapped import on_disk


class Offloaded(Tensor):
    """A tensor that says it is on `device`, while its values lie in `home`.

    An operator that reads it gets a copy on the device, which is freed after it. Views are offloaded, too, and what is written
    in place is written to `home`.
    """

    home: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, home: Tensor, device: torch.device) -> Offloaded:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, home.size(), strides=home.stride(), storage_offset=home.storage_offset(), dtype=home.dtype, device=device
        )  # fmt: skip

    def __init__(self, home: Tensor, device: torch.device) -> None:  # noqa: ARG002
        self.home = home

    def copied(self) -> Tensor:
        """Return a copy on the device."""
        return self.home.to(self.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = Offloaded(self.home.detach().clone(), self.device)
        if isinstance(self, nn.Parameter):
            made = nn.Parameter(made, requires_grad=self.requires_grad)
        memo[id(self)] = made
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Offloaded({tuple(self.shape)}, {self.dtype}, on {self.home.device}, for {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0] if args else None
        if isinstance(first, Offloaded):
            if func.is_view:
                views = func(first.home, *args[1:], **kwargs)
                return pytree.tree_map_only(Tensor, lambda x: Offloaded(x, first.device), views)
            if func is torch.ops.aten._to_copy.default and kwargs.get("device") == first.home.device:
                return func(first.home, **kwargs)
        copies: dict[int, Tensor] = {}

        def copied(x: Offloaded) -> Tensor:
            return copies.setdefault(id(x), x.copied())

        given, named = pytree.tree_map_only(Offloaded, copied, (args, kwargs))
        result = func(*given, **named)
        written = [x for x in _written(func, args, kwargs) if isinstance(x, Offloaded)]
        for x in written:
            x.home.copy_(copies[id(x)])
        same = {id(copies[id(x)]): x for x in written}  # what an operator in place returns
        return pytree.tree_map_only(Tensor, lambda y: same.get(id(y), y), result) if same else result


def _written(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operator writes to."""
    for i, spec in enumerate(func._schema.arguments):
        if spec.alias_info is not None and spec.alias_info.is_write:
            yield from pytree.tree_leaves(args[i] if i < len(args) else kwargs.get(spec.name))


def home_of(x: Tensor) -> torch.device:
    """Return the device on which a tensor's values lie."""
    return x.home.device if isinstance(x, Offloaded) else x.device


def loaded(x: Tensor) -> Tensor:
    """Return a tensor on its device, for several operators that read it: an offloaded one is copied there once."""
    return x.copied() if isinstance(x, Offloaded) else x


def lying_as(like: Tensor, x: Tensor, *, mapped: bool) -> Tensor:
    """Return `x`, offloaded if `like` is. mapped: values on the CPU lie in a file that is mapped to memory."""
    if isinstance(like, Offloaded):
        return Offloaded(lying_as(like.home, x.to(like.home.device), mapped=mapped), like.device)
    return on_disk(x) if mapped and x.device.type == "cpu" else x


def offload(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Let a module's parameters and buffers be on `device`, in place: matrices offloaded, vectors moved. Return what undoes it."""
    return _replaced(module, lambda x: Offloaded(x, device) if x.dim() > 1 else x.to(device))


def bring_back(module: nn.Module, device: torch.device) -> None:
    """Let a module's parameters and buffers lie on `device`, in place: offloaded ones where they lie there already."""
    _replaced(module, lambda x: (x.home if isinstance(x, Offloaded) else x).to(device))


def _replaced(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replace a module's parameters and buffers, those that are one tensor by one. Return what puts them back."""
    changed: dict[int, Tensor] = {}
    before: list[tuple[dict[str, Any], str, Tensor]] = []
    held: dict[str, Any]
    for m in module.modules():
        for held in (m._parameters, m._buffers):
            before += [(held, name, x) for name, x in held.items() if x is not None]
    for tensors, name, x in before:
        if id(x) not in changed:
            y = change(x.detach())
            is_parameter = isinstance(x, nn.Parameter)
            changed[id(x)] = nn.Parameter(y, requires_grad=x.requires_grad) if is_parameter else y
        tensors[name] = changed[id(x)]

    def undo() -> None:
        for tensors, name, x in before:
            tensors[name] = x

    return undo


@contextmanager
def executing_on(modules: Iterable[nn.Module], device: torch.device | None) -> Iterator[None]:
    """Let modules compute on `device` until exit, with their weights where they lie. None: where they lie.

    Inputs may be on any device, and outputs are on that of the first.
    """
    with ExitStack() as stack:
        for module in modules:
            own = next((x.device for x in (*module.parameters(), *module.buffers())), device)
            if device is None or own == device:
                continue
            stack.callback(offload(module, device))
            calls = _Moved(device)
            stack.callback(module.register_forward_pre_hook(calls.there, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(calls.back).remove)
        yield


class _Moved:
    """The calls of a module, moved to a device and back."""

    def __init__(self, device: torch.device) -> None:
        self.device = self.before = device

    def there(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        tensors = (x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        self.before = next((x.device for x in tensors), self.device)
        return pytree.tree_map_only(Tensor, lambda x: x.to(self.device), (args, kwargs))

    def back(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda x: x.to(self.before), output)


def usable_device(device: str | torch.device | None, argument: str) -> torch.device | None:
    """Return the device, with its index, after a trial; None for None.

    Raises TFMQError, naming the argument, if there is no such device.
    """
    if device is None:
        return None
    try:
        made = torch.empty(1, device=device)
        made.cpu()
    except (AssertionError, RuntimeError, TypeError) as error:  # torch raises any of them
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise TFMQError(
            f"{argument} {device}: cannot be used here ({first_line(error)}); use one of {', '.join(there)}."
        ) from error
    return made.device
