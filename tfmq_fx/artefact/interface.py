"""The float network's calling convention."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from tfmq_fx.artefact.float_network import Facts, facts_of
from tfmq_fx.artefact.outputs import describe_output
from tfmq_fx.artefact.plain import is_json
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.arithmetic import dtype_name
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.masked_rows import lists_of_json
from tfmq_fx.base.row_lists import RowLists, known_row_lists
from tfmq_fx.base.signatures import parameters_of
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.nodes import fixed_size
from tfmq_fx.graph.sizes import Size, sizes_of
from tfmq_fx.graph.state import captured_of

# The input that says which rows are computed with what a pipeline sets while it samples.
PERTURBED = "perturbed_rows"
# The input that says which of the constants of `Interface.others` each row is computed with: 0 for none of them.
VARIANT = "variant_rows"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The float network's calling convention, as the plain JSON values that a loaded model needs."""

    arguments: dict[str, Any]  # forward's parameters in order -> default; "required" is marked in `required`
    required: tuple[str, ...]  # parameters without a default
    inputs: dict[
        str, dict[str, Any]
    ]  # graph inputs -> {"dtype": .., "shape": [None or int, ..], "path": [..], "moves": [[dimension, size at capture], ..], "each": k};
    # None: any size, that of the batch or one that moves; each: how many entries of its first dimension a row has, if any
    constants: dict[str, Any] = field(default_factory=dict)  # arguments fixed at capture, by flat name
    # The class of the outputs, as `describe_output` gives it; None: a tensor, tuple, list or dict.
    output_type: str | None = None
    output_fields: tuple[str, ...] = ()
    timestep: str = "timestep"
    conditions: tuple[Any, ...] = ()  # what holds where a size differs from the capture's; see `graph.sizes`
    nonzero: tuple[
        str, ...
    ] = ()  # inputs that must not be 0 everywhere: the network would compute something else
    # Constant arguments with an equal entry for each row -> their length at capture: of any length in a call.
    lists: dict[str, int] = field(default_factory=dict)
    # Inputs and outputs that the float network has as lists with one entry for each row; see `base.row_lists`.
    row_lists: dict[str, Any] | None = None
    rest: str | None = None  # the name of forward's *args
    # Module path -> class and plain attributes of that module of the float network. Pipelines read some of
    # them, such as a layer's in_features.
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    # What a pipeline sets while it samples: {"pattern": [..], "objects": facts by path}. Then the parts of a call's rows
    # where the pattern is true are computed in another way (perturbed-attention guidance).
    perturbed: dict[str, Any] | None = None
    # Constants of further kinds of calls that are others than in `constants`, by flat name; None: left out (skip-layer guidance).
    others: tuple[dict[str, Any], ...] = ()
    # What stands for a tensor that a call leaves out, by flat name: see `base.stand_ins`.
    stand_ins: dict[str, list[Any]] = field(default_factory=dict)
    idle: tuple[str, ...] = ()  # arguments that are ignored: objects without tensors

    def cast(self, now: str, new: str, *, precise: Collection[str]) -> Interface:
        """Return the interface of the network in another precision: its inputs of dtype `now` are of dtype `new`.

        precise: inputs that become or stay float32.
        """
        inputs = {
            n: {**spec, "dtype": "float32" if n in precise else new} if spec["dtype"] == now else spec
            for n, spec in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs)

    @staticmethod
    def of(
        network: nn.Module,
        gm: GraphModule,
        example: dict[str, Any],
        output: Any = None,
        *,
        perturbed: dict[str, Any] | None = None,
        others: Sequence[Mapping[str, Any]] = (),
    ) -> Interface:
        """Return the interface of `network`, which was captured as `gm`.

        example: the arguments of the capture. They show which arguments were constant and where each input
            belongs.
        output: what the network returns by default. Its class is remembered.
        """
        output_type, output_fields = describe_output(output)
        parameters = parameters_of(network)
        rest = next((n for n, p in parameters.items() if p.kind is p.VAR_POSITIONAL), None)
        inputs = {}
        found = leaves(example)
        timestep = str(timestep_input(gm, None).target)
        batch = next(n.meta["val"].shape[0] for name, n in placeholders(gm).items() if name != timestep)
        sizes = sizes_of(gm, batch)
        for name, node in placeholders(gm).items():
            value = node.meta["val"]
            moves = {i: size for (n, i), size in sizes.moving.items() if n == name}
            inputs[name] = {
                "dtype": dtype_name(value.dtype),
                "shape": [None if i in moves else _size(d, batch) for i, d in enumerate(value.shape)],
                "path": list(found[name][0]),
                **({"moves": [list(move) for move in moves.items()]} if moves else {}),
                **({"each": each} if (each := _entries_of_rows(value, batch)) else {}),
            }
        weights = {str(n.target) for n in gm.graph.find_nodes(op="get_attr")}
        weights |= {path for paths in captured_of(gm).folded.values() for path in paths}
        # The example has more than forward names if forward takes **kwargs.
        arguments = {n: _plain(p.default) for n, p in parameters.items()}
        arguments |= {n: None for n in example if n not in parameters}
        # The network's defaults that the example replaces: by None, or by a dict or list without them.
        replaced = {n for n, (path, _) in leaves(arguments).items() if path[0] in example and n not in found}
        lists = known_row_lists(network)
        left_out = [n for kind in ("masks", "zeros") for n in (lists or {}).get(kind, ())]
        return Interface(
            arguments=arguments,
            required=tuple(
                n for n, p in parameters.items() if p.default is p.empty and n not in (rest, *left_out)
            ),
            inputs=inputs,
            constants={k: v for k, (_, v) in found.items() if k not in inputs and is_json(v)}
            | dict.fromkeys(sorted(replaced)),
            output_type=output_type,
            output_fields=output_fields,
            row_lists=lists,
            rest=rest,
            timestep=timestep,
            conditions=sizes.conditions,
            nonzero=captured_of(gm).nonzero,
            attributes=facts_of(network, weights),
            perturbed=perturbed,
            others=tuple(map(dict, others)),
        )

    def moves(self) -> dict[Size, int]:
        """Return the sizes that may differ from the capture's, apart from the batch's, and what they were."""
        return {(n, i): size for n, spec in self.inputs.items() for i, size in spec.get("moves", ())}

    def of_rows(self, name: str, value: Tensor, rows: int) -> Tensor:
        """Return an input with an entry, or several, for each row of a call; one alone is that of all rows, as in calibration.

        Raises TFMQError for another number of them: the graph would give rows the entries of others.
        """
        expected = self.inputs[name].get("each", 0) * rows
        if not expected or not value.dim() or value.shape[0] == expected:
            return value
        if value.shape[0] == 1 and expected == rows:
            return value.repeat(rows, *[1] * (value.dim() - 1))
        raise TFMQError(
            f"forward: {name!r} has {value.shape[0]} entries in its first dimension for a batch of {rows}; it must have {expected}."
        )

    def fixed(self) -> Interface:
        """Return the interface of a network that takes no sizes but those of the capture, apart from the batch."""
        moves = self.moves()
        inputs = {
            n: {
                "dtype": spec["dtype"],
                "shape": [moves.get((n, i), s) for i, s in enumerate(spec["shape"])],
                "path": spec["path"],
            }
            for n, spec in self.inputs.items()
        }
        return dataclasses.replace(self, inputs=inputs, conditions=())

    def sizes(self) -> dict[str, list[int | str]]:
        """Return what each input's dimensions may be, for people: "N" for the batch, "any (64)" for one that was 64."""
        moves = self.moves()
        return {
            n: [
                f"any ({moves[n, i]})" if (n, i) in moves else "N" if s is None else s
                for i, s in enumerate(spec["shape"])
            ]
            for n, spec in self.inputs.items()
        }

    def constants_of(self, kind: int) -> dict[str, Any]:
        """Return the arguments that are constant in the graph for a kind of calls, by flat name."""
        constants = {n: v for n, (_, v) in leaves(self.arguments).items()} | self.constants
        return constants | (self.others[kind - 1] if kind else {})

    def kind_of(self, given: Mapping[str, Any]) -> int:
        """Return the kind of a call: 0, or i if it has the constants `others[i - 1]`. 0 for one that has those of no kind."""
        found = {n: v for n, (_, v) in leaves(given).items()}
        names = [n for other in self.others for n in other]
        for kind in range(len(self.others) + 1):
            constants = self.constants_of(kind)
            if not any(isinstance(found.get(n), Tensor) or found.get(n) != constants.get(n) for n in names):
                return kind
        return 0

    def given_lists(self, given: Mapping[str, Any], *, rows: int) -> dict[str, Any]:
        """Return the arguments that have an equal entry for each row, as long as they were at capture."""
        found = {n: given[n] for n in self.lists if isinstance(given.get(n), (list, tuple))}
        return {
            n: [x[0]] * self.lists[n]
            for n, x in found.items()
            if len(x) == rows and all(entry == x[0] for entry in x)
        }

    @cached_property
    def listed(self) -> RowLists | None:
        """Return which inputs and outputs are lists of rows; None if there are none."""
        return None if self.row_lists is None else lists_of_json(self.row_lists)

    @cached_property
    def facts(self) -> Facts:
        """Return what is kept of the float network's modules."""
        return Facts(self.attributes, (self.perturbed or {}).get("objects"))


def _size(size: int | torch.SymInt, batch: int | torch.SymInt) -> int | None:
    """Return a dimension's size, or None if it varies with the batch. That of position ids is their number."""
    if (fixed := fixed_size(size)) is not None or not isinstance(batch, torch.SymInt):
        return fixed
    own, of_batch = size.node, batch.node  # type: ignore[union-attr]
    apart = own.hint != of_batch.hint and not own.expr.free_symbols & of_batch.expr.free_symbols
    return int(own.hint) if apart else None  # type: ignore[arg-type]


def _entries_of_rows(x: Tensor, batch: int | torch.SymInt) -> int:
    """Return how many entries of a tensor's first dimension each row has; 0 if that is not a multiple of the batch."""
    if not x.dim() or not isinstance(size := x.shape[0], torch.SymInt) or not isinstance(batch, torch.SymInt):
        return 0
    each = size.node.expr / batch.node.expr
    return int(each) if each.is_Integer else 0


def _plain(value: Any) -> Any:
    """Return an argument's default if JSON can hold it, and None otherwise."""
    return value if all(is_json(leaf) for _, leaf in leaves({"": value}).values()) else None
