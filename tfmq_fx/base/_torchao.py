"""The names of torch.ao and torchao that are private or likely to move, imported in one place.

torchao.quantization.pt2e is the successor of torch.ao.quantization. Observers and fake quantizers must
subclass torchao's classes, because its prepare and convert assert on them. Importing it registers the
`quantized_decomposed` operators.
"""

from __future__ import annotations

import logging
import warnings

import torch  # noqa: F401  (configures the logger that is quieted below)
from torch.fx import GraphModule

# torchao 0.18 on torch 2.15 emits import warnings about itself, which our users cannot act on.
_pytree_log = logging.getLogger("torch.utils._pytree")
_level = _pytree_log.level
_pytree_log.setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers torch.ops.quantized_decomposed)
    from torch.ao.quantization.fx import utils as ao_utils
    from torchao import utils as torchao_utils
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.fake_quantize import FakeQuantize, FakeQuantizeBase
    from torchao.quantization.pt2e.observer import HistogramObserver, MinMaxObserver, ObserverBase
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine_with_min_max
_pytree_log.setLevel(_level)


def prepare_pt2e(gm: GraphModule, quantizer: Quantizer) -> GraphModule:
    """Call torchao's function of this name, and let it forget the graph afterwards."""
    try:
        return quantize_pt2e.prepare_pt2e(gm, quantizer)  # type: ignore[no-any-return]
    finally:
        _forget()


def convert_pt2e(gm: GraphModule) -> GraphModule:
    """Call torchao's function of this name, and let it forget the graph afterwards."""
    try:
        return quantize_pt2e.convert_pt2e(gm)  # type: ignore[no-any-return]
    finally:
        _forget()


def _forget() -> None:
    """Empty the caches in which torchao (0.18) and torch (2.15) keep each module whose device they asked for, with its weights."""
    for module, name in (
        (torchao_utils, "_assert_and_get_unique_device"),
        (ao_utils, "assert_and_get_unique_device"),
    ):
        # Both names are private, and may be gone or without a cache in another version.
        getattr(getattr(module, name, None), "cache_clear", lambda: None)()


def register_x86_patterns() -> None:
    """Register torchao's Inductor patterns in this process: they turn quantized graphs into int8 kernels."""
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  (registers them)


__all__ = [
    "Q_ANNOTATION_KEY",
    "FakeQuantize",
    "FakeQuantizeBase",
    "HistogramObserver",
    "MappingType",
    "MinMaxObserver",
    "ObserverBase",
    "QuantizationAnnotation",
    "QuantizationSpec",
    "Quantizer",
    "choose_qparams_affine_with_min_max",
    "convert_pt2e",
    "prepare_pt2e",
    "register_x86_patterns",
]
