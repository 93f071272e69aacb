"""The quantized network as people hold it: called like the float one, saved, loaded, exported."""

from __future__ import annotations

from pathlib import Path

import torch

from tfmq_fx.artefact.drop_in import QuantizedGraph
from tfmq_fx.artefact.saving import read, save
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.clean.move_to_device import move_to_device
from tfmq_fx.runtimes.exported import Exported
from tfmq_fx.runtimes.exporting import export
from tfmq_fx.runtimes.lowering import LoweredModel, lower


class QuantizedModel(QuantizedGraph):
    """A converted graph behind the float network's calling convention: it can be saved, exported and lowered."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> QuantizedModel:
        """`tfmq_fx.load`, as `DiffusionPipeline.from_pretrained` calls it."""
        model = load(folder)
        if torch_dtype not in (None, model.dtype):
            raise TFMQError(
                f"{folder}: torch_dtype={torch_dtype}, but the network was captured in {model.dtype}; load without torch_dtype."
            )
        return model

    def _move_code(self, device: torch.device) -> None:
        """Move the graph's code to a device; a compiled network cannot be moved."""
        move_to_device(self.network, device=device)

    def record_command(self, command: str) -> None:
        """Keep in the report what made this network, for whoever wants to make it again."""
        self._report["command"] = command

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artefact; see `tfmq_fx.artefact.saving.save`."""
        save(self, Path(folder))

    def export(self, file: str | Path, *, format: str | None = None, strict: bool = False) -> Exported:
        """Write the network for another runtime, by suffix or `format`; see `tfmq_fx.runtimes.exporting.export`."""
        return export(self, file, format=format, strict=strict)

    def lower(
        self,
        target: str = "cpu",
        *,
        engine: str | None = None,
        precision: str | None = None,
        batch: int = 1,
        strict: bool = False,
        cache: str | Path | None = None,
        compile: bool | None = None,
        pack: str | None = None,
    ) -> LoweredModel:
        """The same network on int8 kernels; see `tfmq_fx.runtimes.lowering.lower`."""
        return lower(
            self,
            target,
            engine=engine,
            precision=precision,
            batch=batch,
            strict=strict,
            cache=cache,
            compile=compile,
            pack=pack,
        )


def load(folder: str | Path) -> QuantizedModel:
    """Read an artefact written by `save_pretrained`: the same integers, the same outputs, bit for bit.

    Nothing in the folder is executed; the network's own code is not needed. Raises TFMQError saying which
    file is missing, truncated, altered, of another version, or not ours; and when another process replaced the folder
    meanwhile.
    """
    return read(folder, QuantizedModel)
