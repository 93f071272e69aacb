"""Let `from_pretrained` of the float network's class in diffusers load what tfmq_fx has saved.

diffusers has no registry for third-party quantizers. So importing this module adds ours to its two mappings,
and `import tfmq_fx` makes sure that this module is imported as soon as diffusers has them.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from tfmq_fx.base.errors import TFMQError, nearest_names

if TYPE_CHECKING:
    from tfmq_fx.recipe import Recipe

METHOD = "tfmq"


class QuantizationMethod(str, enum.Enum):  # noqa: UP042  # diffusers compares it with str, and reads its value
    TFMQ = METHOD


class TFMQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """A quantization config of diffusers that holds a recipe.

    Use it as `tfmq_fx.quantize(pipe, config.to_recipe(pipe.unet))`.

    recipe: a preset's name, or `Recipe.to_json()` as an artefact has it.
    modules_to_not_convert: paths of modules that stay in float, matched as in diffusers: by name, with all
        modules under it.

    Raises TFMQError for an unknown preset.

    `from_pretrained(.., quantization_config=TFMQConfig(..))` of a float network raises TFMQError: there is
    nothing to calibrate with.
    """

    def __init__(
        self,
        recipe: str | Mapping[str, Any] = "w4a8",
        modules_to_not_convert: list[str] | None = None,
        **artefact: Any,  # the rest of a saved quantization_config, which `tfmq_fx.load` reads by itself
    ) -> None:
        from tfmq_fx.recipe import Recipe

        if not isinstance(recipe, Mapping):  # of an artefact, `load` reads it
            Recipe.preset(recipe)
        artefact.pop("quant_method", None)
        self.quant_method = QuantizationMethod.TFMQ
        self.recipe = recipe
        self.modules_to_not_convert = modules_to_not_convert or []
        self.format_version = artefact.get("format_version")

    def to_recipe(self, network: nn.Module) -> Recipe:
        """Return the recipe, with rules for the modules that stay in float.

        network: the network that has the modules of `modules_to_not_convert`. Raises TFMQError for an unknown
        preset or module.
        """
        from tfmq_fx.base.arithmetic import FLOAT_BITS
        from tfmq_fx.recipe import Recipe, Rule

        recipe = Recipe.preset(self.recipe) if isinstance(self.recipe, str) else Recipe.from_json(self.recipe)
        paths = [path for path, _ in network.named_modules() if path]
        chosen: list[str] = []
        for name in self.modules_to_not_convert:
            found = [p for p in paths if p == name or p.endswith(f".{name}")]
            if not found:
                raise TFMQError(
                    f"modules_to_not_convert: no module {name!r}; nearest are {nearest_names(name, paths)}."
                )
            chosen += found
        outer = [p for p in dict.fromkeys(chosen) if not any(p.startswith(f"{other}.") for other in chosen)]
        floats = [Rule(pattern=f"{p}.*", weight_bits=FLOAT_BITS, activation_bits=FLOAT_BITS) for p in outer]
        return dataclasses.replace(recipe, rules=(*floats, *recipe.rules))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "quant_method": METHOD}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class TFMQQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """A diffusers quantizer that makes `from_pretrained` return a QuantizedModel for a tfmq artefact."""

    def __init__(self, quantization_config: TFMQConfig, *, pre_quantized: bool = True, **_: Any) -> None:
        if not pre_quantized:
            raise TFMQError(
                "quantization_config: tfmq needs calibration, which from_pretrained cannot do. Load the float pipeline, then "
                "pipe.unet = tfmq_fx.quantize(pipe, config.to_recipe(pipe.unet)); save it with pipe.save_pretrained(folder)."
            )
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self.folder: Path | None = None
        self.dtype: torch.dtype | None = None

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        if device_map not in (None, "cpu", {"": "cpu"}, {"": torch.device("cpu")}):
            raise TFMQError(
                f"device_map={device_map}: a quantized network loads on the CPU; move it afterwards with .to(device)."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        self.dtype = torch_dtype
        return torch_dtype

    def maybe_update_loaded_keys(self, _keys: list[str], checkpoint_files: list[str]) -> list[str]:
        self.folder = Path(checkpoint_files[0]).parent
        return []  # diffusers must load none of them: `load` reads and checks them

    def maybe_update_state_dict(self, _: dict[str, Any]) -> dict[str, Any]:
        return {}

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        for name in [n for n, _ in model.named_children()]:
            delattr(model, name)
        model._parameters.clear()
        model._buffers.clear()

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        from tfmq_fx.model import QuantizedModel

        if self.folder is None:
            raise TFMQError(
                "from_pretrained: this version of diffusers does not say where it loads from; use tfmq_fx.load(folder)."
            )
        quantized = QuantizedModel.from_pretrained(self.folder, torch_dtype=self.dtype)
        # diffusers continues with the object that it made, so that object becomes the quantized model.
        model.__class__ = type(quantized)
        model.__dict__ = quantized.__dict__

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


auto.AUTO_QUANTIZER_MAPPING[METHOD] = TFMQQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = TFMQConfig
