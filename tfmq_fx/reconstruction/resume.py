"""Save every finished block of a reconstruction to disk, so that a stopped run can resume.

    state.json              the fingerprint of the run: recipe, seed, calibration data and weights
    0000.safetensors ...    one block: the integers and scales of its weights by path, the scales of its static
                            activations, its result and the run's fingerprint as metadata; 0000 is the temporal block,
                            the last one the whole network

Each file is written under a unique temporary name and then renamed, so it is either absent or complete. Two processes
that do the same run at once share their finished blocks. Of two that do different runs, one is refused. If both start
at the same moment, neither uses the other's blocks.
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
    """The finished blocks of a run, in a folder.

    Rank 0 reads and writes. Every process gets what it reads, so that all have the same integers.

    folder: None keeps nothing.
    fingerprint: of this run, see `fingerprint`.

    Raises TFMQError if the folder belongs to another run or cannot be written.
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
        """Set the block's integers and scales to the saved ones and return its result; None if it was not finished."""
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
                f"{self.folder}: block {index} has {', '.join(kept)}, but the network has {', '.join(learned)}; remove the folder, "
                "or name another one."
            )
        _set_learned(block, kept)
        return BlockResult(**result)

    def _read(self, index: int) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        try:
            with safe_open(f"{self.folder}/{index:04d}.safetensors", framework="pt") as file:
                metadata = file.metadata()
                if metadata.get("fingerprint") != self.fingerprint:
                    return None
                result = json.loads(metadata["result"])
                return result, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (OSError, SafetensorError):  # absent, or truncated by e.g. a power failure: redo the block
            return None

    def keep(self, index: int, block: GraphModule, result: BlockResult) -> None:
        """Save a finished block. Raises TFMQError if that fails; blocks saved earlier stay."""
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
                    f"{self.folder}: block {result.name} cannot be saved ({e}); the {index} before it are saved. Free some disk "
                    "space and run the same command again."
                )
        if error := self.ranks.first(error):
            raise TFMQError(error)
        # On different machines, processes may round ties differently, so all take those of rank 0.
        if self.ranks.size > 1:
            _set_learned(block, self.ranks.first({name: x.cpu() for name, x in learned.items()}))


def _open(folder: Path, fingerprint: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Looked at once: another process may write the state at any moment. Its hidden files are those it is about to rename.
        there = {f.name for f in folder.iterdir() if not f.name.startswith(".")}
        if STATE in there:
            found = json.loads((folder / STATE).read_text()).get("fingerprint")
            if found != fingerprint:
                raise TFMQError(
                    f"{folder}: belongs to another run, with a different recipe, seed, data or weights; remove it, or name another "
                    "folder."
                )
        elif there:
            raise TFMQError(f"{folder}: is not empty and has no {STATE}; name another folder.")
        else:
            text = json.dumps({"fingerprint": fingerprint})
            replace_files(folder / STATE, lambda path: path.write_text(text))
    except (OSError, ValueError) as error:
        if isinstance(error, TFMQError):
            raise
        raise TFMQError(
            f"{folder}: the state of reconstruction cannot be saved ({error}); name another folder."
        ) from error


def _learned(block: GraphModule) -> dict[str, Tensor]:
    """Return the integers and scales of the block's weights by path, and its static activations' scales by observer."""
    found = {}
    for node, observer in observers(block):
        source = node.args[0]
        if isinstance(observer, PerChannelWeightFakeQuantize) and isinstance(source, Node):
            found[str(source.target)] = observer.q
            found[f"{source.target}_scale"] = observer.scale
        elif isinstance(observer, StaticFakeQuantize):
            found[f"{node.target}.scale"] = observer.scale
    return found


def _set_learned(block: GraphModule, values: Mapping[str, Tensor]) -> None:
    """Set what `_learned` returns."""
    for node, observer in observers(block):
        source = node.args[0]
        if isinstance(observer, PerChannelWeightFakeQuantize) and isinstance(source, Node):
            observer.hold(values[str(source.target)].to(observer.q.device))
            observer.scale.copy_(values[f"{source.target}_scale"])
        elif isinstance(observer, StaticFakeQuantize):
            observer.scale.copy_(values[f"{node.target}.scale"])


def fingerprint(gm: GraphModule, tensors: Mapping[str, Tensor], settings: Reconstruction, seed: int) -> str:
    """Return a hash of everything that determines the integers: network, data, recipe, seed."""
    digest = hashlib.sha256()
    for text in (state_of(gm).recipe.to_json(), dataclasses.asdict(settings), seed):
        digest.update(json.dumps(text, sort_keys=True).encode())
    digest.update(str(gm.graph).encode())
    update_with_tensors(digest, sorted(tensors.items()))
    update_with_tensors(digest, sorted(gm.state_dict().items()))
    return digest.hexdigest()
