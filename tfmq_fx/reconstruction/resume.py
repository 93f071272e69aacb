"""What reconstruction has finished, block by block on disk, so that a run that was stopped goes on where it was.

    state.json              the fingerprint of the run: recipe, seed, calibration data and weights
    0000.safetensors ...    one block: the integers and scales of its weights by path, the scales of its static
                            activations, its result and the run's fingerprint as metadata; 0000 is the temporal block,
                            the last one the whole network

Each file is written under a temporary name of its own and renamed: it is absent or whole. Two processes that do the same
run at once share what either has finished; of two that do different runs, one is refused, and should both have begun at
the same moment, neither takes the other's blocks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.fx import GraphModule, Node

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_files, update_with_tensors
from tfmq_fx.base.parallel import Ranks
from tfmq_fx.observers.static import StaticFakeQuantize
from tfmq_fx.observers.weight import PerChannelWeightFakeQuantize
from tfmq_fx.passes.quantize.observed import observers
from tfmq_fx.passes.quantize.results import BlockResult
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.recipe import Reconstruction

STATE = "state.json"


class Finished:
    """The finished blocks in a folder, or nowhere. Raises TFMQError for a folder of another run and one that cannot be written.

    Rank 0 reads and writes; what it has found every process gets, so that all hold the same integers.
    """

    def __init__(self, folder: Path | None, fingerprint: str, ranks: Ranks) -> None:
        self.folder, self.ranks, self.fingerprint = folder, ranks, fingerprint
        error = None
        if folder is not None and ranks.rank == 0:
            try:
                _open(folder, fingerprint)
            except TFMQError as e:
                error = str(e)
        if error := ranks.first(error):
            raise TFMQError(error)

    def restore(self, index: int, block: GraphModule) -> BlockResult | None:
        """Give the block the integers and scales that were kept; None when it was not finished."""
        found = None
        if self.folder is not None and self.ranks.rank == 0:
            found = self._read(index)
        found = self.ranks.first(found)
        if found is None:
            return None
        result, kept = found
        learned = _learned(block)
        if kept.keys() != learned.keys():
            raise TFMQError(
                f"{self.folder}: block {index} holds {', '.join(kept)}, the network {', '.join(learned)}."
            )
        for name, x in learned.items():
            x.copy_(kept[name])
        return BlockResult(**result)

    def _read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        try:
            with safe_open(f"{self.folder}/{index:04d}.safetensors", framework="pt") as file:
                metadata = file.metadata()
                if metadata.get("fingerprint") != self.fingerprint:
                    return None
                result = json.loads(metadata["result"])
                return result, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):  # absent; or cut short, as by a power failure: done again
            return None

    def keep(self, index: int, block: GraphModule, result: BlockResult) -> None:
        """Write a finished block. Raises TFMQError when that fails; what was kept before stays."""
        learned = _learned(block)
        error = None
        if self.folder is not None and self.ranks.rank == 0:
            try:
                replace_files(
                    self.folder / f"{index:04d}.safetensors",
                    lambda path: save_file(
                        {name: x.contiguous().cpu() for name, x in learned.items()},
                        path,
                        metadata={
                            "result": json.dumps(dataclasses.asdict(result)),
                            "fingerprint": self.fingerprint,
                        },
                    ),
                )
            except TFMQError as e:
                error = (
                    f"{self.folder}: block {result.name} cannot be kept ({e}); the {index} before it are. Make room and run "
                    "the same command again."
                )
        if error := self.ranks.first(error):
            raise TFMQError(error)
        # Machines of another kind may have rounded a tie otherwise.
        first = self.ranks.first(
            {name: x.cpu() for name, x in learned.items()} if self.ranks.size > 1 else learned
        )
        for name, x in learned.items():
            x.copy_(first[name])


def _open(folder: Path, fingerprint: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).is_file():
            found = json.loads((folder / STATE).read_text()).get("fingerprint")
            if found != fingerprint:
                raise TFMQError(
                    f"{folder}: holds the unfinished reconstruction of another run (other recipe, seed, data or weights); "
                    "remove it, or name another folder."
                )
        elif any(
            not f.name.startswith(".") for f in folder.iterdir()
        ):  # another process may be just before this
            raise TFMQError(f"{folder}: is not empty and holds no {STATE}; name another folder.")
        else:
            text = json.dumps({"fingerprint": fingerprint})
            replace_files(folder / STATE, lambda path: path.write_text(text))
    except (OSError, ValueError) as error:
        if isinstance(error, TFMQError):
            raise
        raise TFMQError(f"{folder}: cannot keep the state of reconstruction ({error}).") from error


def _learned(block: GraphModule) -> dict[str, Tensor]:
    """The integers and scales of the block's weights by path, and the scales of its static activations by observer."""
    found = {}
    for node, observer in observers(block):
        source = node.args[0]
        if isinstance(observer, PerChannelWeightFakeQuantize) and isinstance(source, Node):
            found[str(source.target)] = observer.q
            found[f"{source.target}_scale"] = observer.scale
        elif isinstance(observer, StaticFakeQuantize):
            found[f"{node.target}.scale"] = observer.scale
    return found


def fingerprint(gm: GraphModule, tensors: Mapping[str, Tensor], settings: Reconstruction, seed: int) -> str:
    """A hash of all that decides the integers: network, data, recipe, seed."""
    digest = hashlib.sha256()
    for text in (state_of(gm).recipe.to_json(), dataclasses.asdict(settings), seed):
        digest.update(json.dumps(text, sort_keys=True).encode())
    digest.update(str(gm.graph).encode())
    update_with_tensors(digest, sorted(tensors.items()))
    update_with_tensors(digest, sorted(gm.state_dict().items()))
    return digest.hexdigest()
