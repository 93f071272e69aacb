"""tfmq_fx: quantize diffusion models as a PyTorch FX pass, with the temporal block found by dataflow.

q = tfmq_fx.quantize(pipe, "w4a8")
q.save_pretrained("folder");  q = tfmq_fx.load("folder")
pipe.unet = q

After `import tfmq_fx`, diffusers can load what was saved, by `from_pretrained` of DiffusionPipeline and of
the network's class.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from tfmq_fx import observers, passes
    from tfmq_fx.base.errors import TFMQError
    from tfmq_fx.bit_widths import mixed_precision, sensitivity
    from tfmq_fx.calibration.data import CalibrationSet
    from tfmq_fx.calibration.pipelines import coco_captions
    from tfmq_fx.calibration.presets import CalibrationPreset
    from tfmq_fx.calibration.stage import calibrate
    from tfmq_fx.capturing.network import capture
    from tfmq_fx.diffusers_quantizer import TFMQConfig
    from tfmq_fx.maintenance.stage import maintain
    from tfmq_fx.model import PrecomputedModel, QuantizedModel, load
    from tfmq_fx.passes import convert, prepare
    from tfmq_fx.pipeline import quantize
    from tfmq_fx.precomputing import precompute
    from tfmq_fx.recipe import Recipe, Reconstruction, Rule
    from tfmq_fx.reconstruction.stage import reconstruct
    from tfmq_fx.runtimes.lowering import LoweredModel

__version__ = "0.1.0"
__all__ = [
    "CalibrationPreset",
    "CalibrationSet",
    "LoweredModel",
    "PrecomputedModel",
    "QuantizedModel",
    "Recipe",
    "Reconstruction",
    "Rule",
    "TFMQConfig",
    "TFMQError",
    "calibrate",
    "capture",
    "coco_captions",
    "convert",
    "load",
    "maintain",
    "mixed_precision",
    "observers",
    "passes",
    "precompute",
    "prepare",
    "quantize",
    "reconstruct",
    "sensitivity",
]

# Each name is loaded on first use: torchao alone takes three seconds, and `import tfmq_fx` should not.
_HOMES = {
    "CalibrationPreset": "calibration.presets",
    "CalibrationSet": "calibration.data",
    "LoweredModel": "runtimes.lowering",
    "PrecomputedModel": "model",
    "QuantizedModel": "model",
    "Recipe": "recipe",
    "Reconstruction": "recipe",
    "Rule": "recipe",
    "TFMQConfig": "diffusers_quantizer",
    "TFMQError": "base.errors",
    "calibrate": "calibration.stage",
    "capture": "capturing.network",
    "coco_captions": "calibration.pipelines",
    "convert": "passes",
    "load": "model",
    "maintain": "maintenance.stage",
    "mixed_precision": "bit_widths",
    "precompute": "precomputing",
    "prepare": "passes",
    "quantize": "pipeline",
    "reconstruct": "reconstruction.stage",
    "sensitivity": "bit_widths",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"tfmq_fx.{_HOMES[name]}"), name)
    elif not name.startswith("_"):
        try:
            value = importlib.import_module(f"tfmq_fx.{name}")  # tfmq_fx.passes, tfmq_fx.recording
        except ModuleNotFoundError as error:
            if error.name != f"tfmq_fx.{name}":
                raise
            raise AttributeError(f"module 'tfmq_fx' has no attribute {name!r}") from None
    else:
        raise AttributeError(f"module 'tfmq_fx' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_quantizer(_: ModuleType) -> None:
    importlib.import_module("tfmq_fx.diffusers_quantizer")  # importing it registers it


def _register_model(loading: ModuleType) -> None:
    """Let a pipeline's model_index.json name our model: ["tfmq_fx", "QuantizedModel"]."""
    # A lowered network has a save_pretrained that refuses, so that diffusers does not leave it out in silence.
    names = ("QuantizedModel", "PrecomputedModel", "LoweredModel")
    classes = {name: ["save_pretrained", "from_pretrained"] for name in names}
    loading.LOADABLE_CLASSES["tfmq_fx"] = classes
    loading.ALL_IMPORTABLE_CLASSES.update(classes)


# Register when diffusers is imported, now or later. Importing it here would cost a second.
wrapt.register_post_import_hook(_register_quantizer, "diffusers.quantizers.auto")
wrapt.register_post_import_hook(_register_model, "diffusers.pipelines.pipeline_loading_utils")
