"""Refuse to cast observers: their scales are float32, and the graph around them has the dtype that it was captured in."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from tfmq_fx.base.errors import TFMQError


class KeptDtype(nn.Module):
    """A module that can be moved, but not cast by .to(), .half(), .bfloat16(), .float() or .double().

    dtypes: those that a cast must leave as they are.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        for dtype in self.dtypes:
            if (found := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise TFMQError(
                    f"to({found}): a prepared graph has the dtype that it was captured in, and float32 scales; cast the network, "
                    "then capture and prepare it again, or cast the quantized network afterwards."
                )
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self
