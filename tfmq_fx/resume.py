"""What reconstruction has finished, block by block on disk, so that a run that was stopped goes on where it was.

    state.json              the fingerprint of the run: recipe, seed, calibration data and weights
    0000.safetensors ...    the integers of one block's weights by path, its result as metadata; 0000 is the temporal block

Each file is written under a temporary name and renamed: it is absent or whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.errors import TFMQError
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.prepare import observers
from tfmq_fx.recipe import Reconstruction
from tfmq_fx.rounding import BlockResult

STATE = "state.json"


class Finished:
    """The finished blocks in a folder. Raises TFMQError for a folder of another run and one that cannot be written."""

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / STATE).is_file():
                found = json.loads((folder / STATE).read_text()).get("fingerprint")
                if found != fingerprint:
                    raise TFMQError(
                        f"{folder}: holds the unfinished reconstruction of another run (other recipe, seed, data, weights or "
                        "thread count); remove it, or name another folder."
                    )
            elif any(folder.iterdir()):
                raise TFMQError(f"{folder}: is not empty and holds no {STATE}; name another folder.")
            else:
                temporary = folder / f".{STATE}.tmp"
                temporary.write_text(json.dumps({"fingerprint": fingerprint}))
                os.replace(temporary, folder / STATE)
        except (OSError, ValueError) as error:
            if isinstance(error, TFMQError):
                raise
            raise TFMQError(f"{folder}: cannot keep the state of reconstruction ({error}).") from error

    def restore(self, index: int, block: GraphModule) -> BlockResult | None:
        """Give the block's weights the integers that were kept; None when the block was not finished."""
        try:
            with safe_open(self.folder / f"{index:04d}.safetensors", framework="pt") as file:
                result = BlockResult(**json.loads(file.metadata()["result"]))
                kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):  # absent; or cut short, as by a power failure: done again
            return None
        weights = _weights(block)
        if kept.keys() != weights.keys():
            raise TFMQError(
                f"{self.folder}: block {index} holds {', '.join(kept)}, the network {', '.join(weights)}."
            )
        for name, observer in weights.items():
            observer.q = kept[name].to(observer.q.device)
        return result

    def keep(self, index: int, block: GraphModule, result: BlockResult) -> None:
        """Write a finished block. Raises TFMQError when that fails; what was kept before stays."""
        integers = {name: observer.q.contiguous().cpu() for name, observer in _weights(block).items()}
        temporary = self.folder / f".{index:04d}.tmp"
        try:
            save_file(integers, temporary, metadata={"result": json.dumps(dataclasses.asdict(result))})
            os.replace(temporary, self.folder / f"{index:04d}.safetensors")
        except (OSError, SafetensorError) as error:
            raise TFMQError(
                f"{self.folder}: block {result.name} cannot be kept ({error}); the {index} before it are. Make room and run "
                "the same command again."
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def _weights(block: GraphModule) -> dict[str, PerChannelWeightFakeQuantize]:
    found = {}
    for node, observer in observers(block):
        source = node.args[0]
        if isinstance(observer, PerChannelWeightFakeQuantize) and isinstance(source, Node):
            found[str(source.target)] = observer
    return found


def fingerprint(gm: GraphModule, tensors: Mapping[str, Tensor], settings: Reconstruction, seed: int) -> str:
    """A hash of all that decides the integers: network, data, recipe, seed; and threads, which order float sums."""
    digest = hashlib.sha256()
    for text in (gm.meta["recipe"].to_json(), dataclasses.asdict(settings), seed, torch.get_num_threads()):
        digest.update(json.dumps(text, sort_keys=True).encode())
    digest.update(str(gm.graph).encode())
    _update(digest, sorted(tensors.items()))
    _update(digest, sorted(gm.state_dict().items()))
    return digest.hexdigest()


def _update(digest: hashlib._Hash, tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, x in tensors:
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
