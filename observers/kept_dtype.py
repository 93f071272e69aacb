"""Refuse to cast observers: their scales are float32, and the graph around them has the dtype that it was captured in."""

from __future__ import annotations

from typing import Any

import torch

from tfmq_fx.base.errors import TFMQError


class KeptDtype:
    """Beside a class of modules: they can be moved, but not cast by .to(), .half(), .bfloat16(), .float() or .double().

    dtypes: those that a cast must leave as they are.
    """

    dtypes: tuple[torch.dtype, ...] = (torch.float32,)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for dtype in self.dtypes:
            if (found := fn(torch.empty(0, dtype=dtype)).dtype) != dtype:
                raise TFMQError(
                    f"to({found}): a prepared graph has the dtype that it was captured in, and float32 scales; cast the network, "
                    "then capture and prepare it again, or cast the quantized network afterwards."
                )
        return super()._apply(fn, recurse)  # type: ignore[misc]
