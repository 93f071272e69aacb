"""Modes that follow what a network computes, function by function, while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What reads how a tensor lies in memory, 30 times for each operator: torch's own bookkeeping, in which no mode has a part.
_LAYOUT = {
    "__get__", "stride", "storage_offset", "untyped_storage", "_is_view", "is_inference", "is_conj", "is_neg",
}  # fmt: skip


class FunctionMode(TorchFunctionMode):
    """A mode that gets each function with its name. The branches of torch.cond, which dynamo traces, it does not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in _LAYOUT or torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        return self.call(func, name, args, kwargs)

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function is to return, in the mode's own way."""
        raise NotImplementedError
