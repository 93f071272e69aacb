"""Call a quantized or precomputed network like the float one, and save, load, export and lower it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tfmq_fx.artefact.quantized_graph import QuantizedGraph
from tfmq_fx.artefact.saving import MAX_MEMORY, read, save
from tfmq_fx.base.ambient import neutral
from tfmq_fx.passes.clean.move_to_device import move_to_device
from tfmq_fx.runtimes.exported import Exported
from tfmq_fx.runtimes.exporting import export
from tfmq_fx.runtimes.lowering import LoweredModel, lower


class SavedModel(QuantizedGraph):
    """A graph behind the float network's calling convention, to be saved and exported."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> SavedModel:
        """Load an artefact by `tfmq_fx.load`, for `DiffusionPipeline.from_pretrained`.

        torch_dtype: of everything but the integers and scales; None takes the dtype it was saved in.
        """
        model: SavedModel = load(folder)
        return model if torch_dtype is None else model.to(torch_dtype)

    def _move_code(self, device: torch.device) -> None:
        """Move the graph's code to a device. Only a compiled network cannot be moved."""
        move_to_device(self.network, device=device)

    def record_command(self, command: str) -> None:
        """Record in the report the command that made this network, so that it can be made again."""
        self._report["command"] = command

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the artefact; see `tfmq_fx.artefact.saving.save`."""
        with neutral():
            save(self, Path(folder))

    def export(self, file: str | Path, *, format: str | None = None, strict: bool = False) -> Exported:
        """Write the network for another runtime; see `tfmq_fx.runtimes.exporting.export`."""
        return export(self, file, format=format, strict=strict)


class PrecomputedModel(SavedModel):
    """A float network whose temporal features come from tables; see `tfmq_fx.precompute`."""

    kind, is_float = "precomputed", True
    verb, source = "precompute", "an example"
    seen = "Precompute with it, or with unseen='float'"


class QuantizedModel(SavedModel):
    """A quantized network, to be saved, exported and lowered."""

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
        """Return the same network on int8 kernels; see `tfmq_fx.runtimes.lowering.lower`."""
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


@neutral()
def load(folder: str | Path, *, max_memory: float = MAX_MEMORY) -> Any:
    """Read an artefact written by `save_pretrained`. Integers and outputs are the same, bit for bit.

    Returns a QuantizedModel, or the PrecomputedModel that was saved.

    max_memory: the GiB of integers that may lie in memory. If they take more, unpacked, they lie in temporary files
        (in TMPDIR), of which only what a call needs is read, and the kernel can drop that again.

    Nothing in the folder is executed, and the network's own code is not needed. Raises TFMQError saying which
    file is missing, truncated, altered, of another version or not from a tfmq artefact. Raises it too when
    another process replaces the folder meanwhile.
    """
    models = {cls.kind: cls for cls in (QuantizedModel, PrecomputedModel)}
    return read(folder, models, max_memory=max_memory)
