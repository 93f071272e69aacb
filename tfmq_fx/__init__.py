"""tfmq_fx: quantize diffusion models as a PyTorch FX pass, with the temporal block found by dataflow.

q = tfmq_fx.quantize(pipe, "w4a8")
q.save_pretrained("folder");  q = tfmq_fx.load("folder")
pipe.unet = q
"""

from tfmq_fx import observers, passes
from tfmq_fx.bit_widths import mixed_precision, sensitivity
from tfmq_fx.calibration import CalibrationSet, calibrate
from tfmq_fx.capture import capture
from tfmq_fx.errors import TFMQError
from tfmq_fx.lowering import LoweredModel
from tfmq_fx.maintenance import maintain
from tfmq_fx.model import QuantizedModel
from tfmq_fx.passes import convert, prepare
from tfmq_fx.pipeline import quantize
from tfmq_fx.recipe import Recipe, Reconstruction, Rule
from tfmq_fx.reconstruction import reconstruct
from tfmq_fx.saving import load

__version__ = "0.1.0"
__all__ = [
    "CalibrationSet",
    "LoweredModel",
    "QuantizedModel",
    "Recipe",
    "Reconstruction",
    "Rule",
    "TFMQError",
    "calibrate",
    "capture",
    "convert",
    "load",
    "maintain",
    "mixed_precision",
    "observers",
    "passes",
    "prepare",
    "quantize",
    "reconstruct",
    "sensitivity",
]
