"""Modes that follow what a network computes, function by function, while it is traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class FunctionMode(TorchFunctionMode):
    """A mode that gets each function with its name. The branches of torch.cond, which dynamo traces, it does not see."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            return func(*args, **kwargs)
        return self.call(func, getattr(func, "__name__", ""), args, kwargs)

    def call(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function is to return, in the mode's own way."""
        raise NotImplementedError
