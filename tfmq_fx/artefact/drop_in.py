"""Wrap anything that computes the network in the float network's calling convention."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from tfmq_fx.artefact.float_network import Facts, FloatModule, facts_of, stand_in
from tfmq_fx.artefact.forms import closed_graph, float_graph, opened_graph, without_module
from tfmq_fx.artefact.gradients import wants_gradient, with_gradients
from tfmq_fx.artefact.graph_json import graph_to_json
from tfmq_fx.artefact.known import unknown_values
from tfmq_fx.artefact.nan_rows import with_nan_rows
from tfmq_fx.artefact.outputs import describe_output, output_class
from tfmq_fx.artefact.outside import Outside
from tfmq_fx.artefact.plain import is_json
from tfmq_fx.base.ambient import neutral, traced
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.arithmetic import NETWORK_DTYPES
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.base.masked_rows import lists_of_json
from tfmq_fx.base.row_lists import RowLists, known_row_lists
from tfmq_fx.base.signatures import parameters_of
from tfmq_fx.graph.inputs import placeholders, timestep_input
from tfmq_fx.graph.nodes import fixed_size
from tfmq_fx.graph.sizes import Size, holds, shown, sizes_in, sizes_of
from tfmq_fx.graph.state import captured_of
from tfmq_fx.passes.quantize.cast_glue import cast_glue
from tfmq_fx.passes.temporal.insert_step_index import TIMESTEPS
from tfmq_fx.passes.temporal.partition_temporal import BLOCK_NAME, temporal_block_of

log = logging.getLogger(__name__)

_COUNTED = ContextVar("counted", default=True)
# The input that says which rows are computed with what a pipeline sets while it samples.
PERTURBED = "perturbed_rows"
# The input that says which of the constants of `Interface.others` each row is computed with: 0 for none of them.
VARIANT = "variant_rows"


@contextmanager
def uncounted() -> Iterator[None]:
    """Neither count nor refuse unseen timesteps and values, in this thread, until exit: for short runs that only probe."""
    token = _COUNTED.set(False)
    try:
        yield
    finally:
        _COUNTED.reset(token)


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The float network's calling convention, as the plain JSON values that a loaded model needs."""

    arguments: dict[str, Any]  # forward's parameters in order -> default; "required" is marked in `required`
    required: tuple[str, ...]  # parameters without a default
    inputs: dict[
        str, dict[str, Any]
    ]  # graph inputs -> {"dtype": .., "shape": [None or int, ..], "path": [..], "moves": [[dimension, size at capture], ..]};
    # None: any size, that of the batch or one that moves
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
                "dtype": str(value.dtype).removeprefix("torch."),
                "shape": [None if i in moves else _size(d, batch) for i, d in enumerate(value.shape)],
                "path": list(found[name][0]),
                **({"moves": [list(move) for move in moves.items()]} if moves else {}),
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

    @cached_property
    def listed(self) -> RowLists | None:
        """Return which inputs and outputs are lists of rows; None if there are none."""
        return None if self.row_lists is None else lists_of_json(self.row_lists)

    @cached_property
    def facts(self) -> Facts:
        """Return what is kept of the float network's modules."""
        return Facts(self.attributes, (self.perturbed or {}).get("objects"))


def _item(value: Any, step: str | int) -> Any:
    """Return value[step] of a dict or list, or None if there is no such item."""
    if isinstance(value, Mapping):
        return value.get(step)
    if isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


def _size(size: int | torch.SymInt, batch: int | torch.SymInt) -> int | None:
    """Return a dimension's size, or None if it varies with the batch. That of position ids is their number."""
    if (fixed := fixed_size(size)) is not None or not isinstance(batch, torch.SymInt):
        return fixed
    own, of_batch = size.node, batch.node  # type: ignore[union-attr]
    apart = own.hint != of_batch.hint and not own.expr.free_symbols & of_batch.expr.free_symbols
    return int(own.hint) if apart else None  # type: ignore[arg-type]


def _plain(value: Any) -> Any:
    """Return an argument's default if JSON can hold it, and None otherwise."""
    return value if all(is_json(leaf) for _, leaf in leaves({"": value}).values()) else None


class Tally(Counter[Any]):
    """A counter that several threads add to at once."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self._lock = threading.Lock()

    def add(self, value: Any) -> None:
        with self._lock:
            self[value] += 1

    def in_order(self) -> list[tuple[Any, int]]:
        """Return the values and their counts, by value."""
        with self._lock:
            return sorted(self.items())


class DropIn(nn.Module):
    """A module that computes the network behind the float network's calling convention.

    `pipe.unet = model` is all a diffusers pipeline needs: arguments, outputs, `.config`, `.dtype` and
    `.device` are the same. A timestep may be a number, or a tensor of shape (), (1,), (N,) or (N, 1), and (N, tokens) if it was captured so;
    a batch, and a sample with several, may mix timesteps.

    A timestep outside the table uses the qparams of its nearest neighbour and is counted in
    `report["unseen_timesteps"]`, or raises TFMQError (`Recipe(unseen="error")`). The same holds for values of
    other inputs that were declared finite, which are counted in `report["unseen_values"]`. Only the qparams
    are the neighbour's, and the temporal features if they are cached (`Recipe(maintain="cache")`). Everything
    else is computed with the given value.

    network: computes the outputs from the graph's inputs, in the order of `interface.inputs`.
    timesteps: the table of timesteps (T,).
    finite: input name -> table of its values, for the inputs that were declared finite.
    config: the float network's config. recipe: `Recipe.to_json()`. report: see `report`.
    """

    is_float = False  # True: nothing in it is quantized, so it can be
    # What the user does to get such a network, and what with; what to do about a value that no table has.
    verb, source = "quantize", "calibration data"
    seen = "Calibrate with this schedule, or use Recipe(unseen='nearest')"

    def __init__(
        self,
        network: nn.Module,
        *,
        interface: Interface,
        timesteps: Tensor,
        finite: Mapping[str, Tensor] | None = None,
        config: dict[str, Any],
        recipe: dict[str, Any],
        report: dict[str, Any],
    ) -> None:
        super().__init__()
        self.network = network
        # The weights are buffers, but accelerate's hooks take a module's device from its first parameter.
        device = next((b.device for b in network.buffers()), None)
        self.where = nn.Parameter(torch.empty(0, device=device), requires_grad=False)
        self.timesteps = timesteps.cpu()
        self.finite = {name: values.cpu() for name, values in (finite or {}).items()}
        self.recipe = recipe
        self._internal_dict = dict(
            config
        )  # pipelines replace it by this name, which it has in diffusers' networks
        self._report = report
        self._unseen = {n: Tally() for n in (interface.timestep, *self.finite)}
        self.placed: frozenset[str] = frozenset()  # paths of `interface.perturbed` that the pipeline has set
        # The graph's inputs carry its device and dtype, which were fixed at capture.
        first = next(n for n in interface.inputs if n != interface.timestep)
        self._dtype: torch.dtype = getattr(torch, interface.inputs[first]["dtype"])
        self.first_input = first  # the tensor that the network denoises
        # Make the class here, not in forward, because torch.compile traces forward.
        kind = interface.output_type
        self._output: Any = None if kind is None else output_class(kind, tuple(interface.output_fields))
        self.interface = interface  # last: from here on, the attributes of the float network are fixed

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        """Return a class for which, and for the float network's own class, `isinstance` is True: pipelines ask for it."""
        face = vars(self).get("interface")
        own: Any = type(self)
        return own if face is None else stand_in(own, face.facts.class_of(""))

    def __reduce__(self) -> Any:
        # pickle's own way would compare type(self) with __class__.
        return _blank, (type(self),), dict(vars(self))

    @property
    def _float(self) -> FloatModule:
        return FloatModule(self.interface.facts, self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "interface" not in vars(self):  # __init__ has not set it yet
                raise
            if name in self._internal_dict and not hasattr(self._float, name):
                return self._internal_dict[name]  # as in diffusers, where this is deprecated
            return getattr(self._float, name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = (
            name in self._modules
            or name in self._parameters
            or name in vars(self)
            or hasattr(type(self), name)
        )
        if own or "interface" not in vars(self) or not self.interface.facts.has(name):
            super().__setattr__(name, value)
        else:
            setattr(self._float, name, value)

    @property
    def call_signature(self) -> inspect.Signature:
        """Return the signature of the float network's forward."""
        face, found = self.interface, list[inspect.Parameter]()
        kind: Any = inspect.Parameter.POSITIONAL_OR_KEYWORD
        for name, default in face.arguments.items():
            given = inspect.Parameter.empty if name in face.required else default
            if name == face.rest:
                found.append(inspect.Parameter(name, inspect.Parameter.VAR_POSITIONAL))
                kind = inspect.Parameter.KEYWORD_ONLY
                continue
            if given is inspect.Parameter.empty and any(p.default is not p.empty for p in found):
                kind = inspect.Parameter.KEYWORD_ONLY
            found.append(inspect.Parameter(name, kind, default=given))
        return inspect.Signature(found)

    def parts(self) -> dict[str, Any]:
        """Return the constructor's arguments except `network`, to build another form of the same network."""
        return {
            "interface": self.interface,
            "timesteps": self.timesteps,
            "finite": self.finite,
            "config": dict(self._internal_dict),
            "recipe": self.recipe,
            "report": dict(self._report),
        }

    def reset_unseen(self) -> None:
        """Reset the counts of timesteps and values outside the tables."""
        for found in self._unseen.values():
            found.clear()

    def cache_context(self, *_: Any, **__: Any) -> AbstractContextManager[None]:
        """Return a context that does nothing.

        Pipelines enter it by name, and some with the step and sigma, for caches of a network's inner values. This
        network has no such caches.
        """
        return nullcontext()

    def place(self, path: str, *, other: bool) -> None:
        """Note that an object of the float network is set: the one of `interface.perturbed`, or its own."""
        self.placed = self.placed | {path} if other else self.placed - {path}

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield the modules and their names, and those of the float network that hold attention processors.

        Pipelines look for these to set other ones. torch's own walks, which give all arguments, do not get them.
        """
        yield from super().named_modules(memo, prefix, remove_duplicate is None or remove_duplicate)
        if memo is None and remove_duplicate is None:
            for path in self.interface.facts.holders():
                yield path, functools.reduce(getattr, path.split("."), self._float)

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        return (m for _, m in self.named_modules(remove_duplicate=remove_duplicate))

    def set_attention_slice(self, slice_size: Any) -> None:
        """Change nothing, and log a warning: attention is part of the captured graph.

        `pipe.enable_attention_slicing()` calls this. slice_size: None, which turns slicing off, logs nothing.
        """
        if slice_size is not None:
            log.warning(
                "set_attention_slice(%r): attention is fixed in the captured graph; nothing changes",
                slice_size,
            )

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Move groups of tensors to a device when they are needed, as diffusers does for its networks."""
        from diffusers.hooks import apply_group_offloading

        apply_group_offloading(self, *args, **kwargs)

    def add_adapter(self, *_: Any, **__: Any) -> None:
        """Raise TFMQError: a quantized network's weights are integers, so it takes no adapters."""
        self.load_lora_adapter()

    def unload_lora(self) -> None:
        """Do nothing: there are no adapters."""

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Raise TFMQError: a quantized network's weights are integers, so it takes no adapters."""
        raise TFMQError(
            f"LoRA: a {'precomputed' if self.is_float else 'quantized'} network takes no adapters; load them into the float pipeline, call pipe.fuse_lora() "
            f"and pipe.unload_lora_weights(), and {self.verb} that."
        )

    def register_to_config(self, **values: Any) -> None:
        """Add values to `.config`, as diffusers does. Values that JSON cannot hold are left out."""
        plain = {name: value for name, value in values.items() if is_json(value)}
        self._internal_dict = {**self._internal_dict, **plain}

    @property
    def config(self) -> Any:
        from diffusers.configuration_utils import FrozenDict

        return FrozenDict(self._internal_dict)

    def save_pretrained(self, folder: str | Path) -> None:
        """Raise TFMQError: only the network that this one was made from can be saved."""
        raise TFMQError(
            f"{folder}: a compiled network cannot be saved; save the network that it was lowered from."
        )

    def get_extra_state(self) -> Tensor:
        """Return an entry of the state dict that `set_extra_state` gets when it is loaded."""
        return torch.zeros(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:  # noqa: ARG002
        """Raise TFMQError: a state dict does not hold what is compiled."""
        raise TFMQError(
            "load_state_dict: a compiled network is not in a state dict; save the network that it was lowered from, and "
            "lower that again."
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        # A network without quantized weights may have no buffers.
        return next(chain(self.network.buffers(), self.network.parameters())).device

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Apply `fn` to all tensors: nn.Module's implementation of .to(), .half() and .cuda().

        Another dtype is that of the inputs, the outputs and what is computed between the integers, which stay as they
        are, as do the scales. Raises TFMQError for a dtype other than float32, float16 and bfloat16, and for another
        device if `_move_code` cannot move the network there.
        """
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if like.dtype not in NETWORK_DTYPES:
            raise TFMQError(f"to({like.dtype}): use float32, float16 or bfloat16.")
        if like.dtype != self.dtype:
            self._cast_code(like.dtype)
        if like.device != self.device:
            self._move_code(like.device)

        def moved(x: Tensor) -> Tensor:
            y = fn(x)
            return y if y.dtype == x.dtype else x.to(y.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _cast_code(self, dtype: torch.dtype) -> None:
        """Let the network take and return another dtype."""
        now, new = (str(d).removeprefix("torch.") for d in (self.dtype, dtype))
        self.interface = self.interface.cast(now, new, precise=self._precise())
        self._dtype = dtype

    def _precise(self) -> Collection[str]:
        """Return the inputs that are never cast to half precision: eight bits are not enough for timesteps up to 1000."""
        return {self.interface.timestep, *self.finite}

    def _move_code(self, device: torch.device) -> None:
        raise TFMQError(
            f"to({device}): this network is compiled for {self.device}; move the one it was lowered from."
        )

    @property
    def report(self) -> dict[str, Any]:
        """Return the report as plain JSON values.

        It says what was quantized and how, what stayed float and why, the sizes, the errors by timestep, and
        the timesteps and values outside the tables.
        """
        counts = {
            name: {str(value): n for value, n in found.in_order()} for name, found in self._unseen.items()
        }
        return {
            **self._report,
            "unseen_timesteps": counts.pop(self.interface.timestep),
            "unseen_values": counts,
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.interface.row_lists is not None:  # torch.compile traces no cached properties
            listed: Any = self.interface.listed
            names = list(self.interface.arguments)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            if listed.in_lists(given):
                return listed.by_shape(self._forward, given)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._bind(args, kwargs)
        t = self.interface.timestep
        inputs = {n: self._input(n, given[n]) for n in self.interface.inputs if n != t}
        inputs[t] = self._timestep(given[t], inputs[self.first_input].shape[0])
        if not traced(inputs.values()) and _COUNTED.get():
            for name, table in {t: self.timesteps, **self.finite}.items():
                self._look_up(name, inputs[name], table)
        self._require_sizes(inputs)
        self._require_nonzero(inputs)
        taken = [inputs[n] for n in self.interface.inputs]
        output = with_nan_rows(self._compute(taken), taken, batch=inputs[self.first_input].shape[0])
        wants = given.get("return_dict")
        if self._output is None or (wants is not None and not wants):
            return output
        if isinstance(output, Mapping):
            return self._output(**output)
        return self._output(output) if isinstance(output, Tensor) else self._output(*output)

    def _compute(self, inputs: list[Tensor]) -> Any:
        """Run the network, a compiled one, which keeps its precision, whatever torch is set to here."""
        with neutral():
            return self.network(*inputs)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        face = self.interface
        names = list(face.arguments)
        if face.rest is not None and len(args) > (first := names.index(face.rest)):
            args = (*args[:first], args[first:])
        unknown = [k for k in kwargs if k not in face.arguments]
        if unknown or len(args) > len(names):
            what = unknown[0] if unknown else f"argument {len(names) + 1}"
            raise TFMQError(
                f"forward: {what!r} is unknown; the network takes {nearest_names(str(what), names)}."
            )
        given = {**face.arguments, **dict(zip(names, args, strict=False)), **kwargs}
        tensors = {}
        for name, spec in face.inputs.items():
            value: Any = given
            for step in spec["path"]:
                value = _item(value, step)
            if value is not None and not isinstance(value, Tensor) and name != face.timestep:
                raise TFMQError(f"forward: {name!r} must be a tensor, found {type(value).__name__}.")
            tensors[name] = value
        if face.perturbed is not None and tensors[PERTURBED] is None:
            tensors[PERTURBED] = self._perturbed_rows(tensors[self.first_input])
        kind = 0
        if face.others and tensors[VARIANT] is None and (x := tensors[self.first_input]) is not None:
            kind = self._kind(given)
            tensors[VARIANT] = torch.full((x.shape[0],), kind, device=self.device)
        missing = [n for n, value in tensors.items() if value is None]
        missing += [n for n in face.required if n not in names[: len(args)] and n not in kwargs]
        if missing:
            raise TFMQError(f"forward: the argument {missing[0]!r} is missing.")
        self._require_fixed({**given, **self._lists(given, rows=tensors[self.first_input].shape[0])}, kind)
        return {**given, **tensors}

    def _perturbed_rows(self, x: Tensor | None) -> Tensor | None:
        """Return which rows of a call are computed with what the pipeline has set, (N,) bool. x: the noisy sample (N, ...)."""
        if x is None:
            return None
        face, rows = self.interface.facts, x.shape[0]
        if not self.placed:
            return torch.zeros(rows, dtype=torch.bool, device=self.device)
        if left := sorted(face.swapped - self.placed):
            raise TFMQError(
                f"forward: {left[0]} is the float network's own, but was another one in calibration, with {sorted(self.placed)[0]}; "
                f"{self.verb} again with these layers."
            )
        pattern = torch.tensor(self.interface.perturbed["pattern"], device=self.device)  # type: ignore[index]
        if rows % len(pattern):
            raise TFMQError(
                f"forward: {rows} rows cannot be {len(pattern)} equal parts, as in calibration: {sorted(self.placed)[0]} is set."
            )
        return pattern.repeat_interleave(rows // len(pattern))

    def _lists(self, given: Mapping[str, Any], *, rows: int) -> dict[str, Any]:
        """Return the arguments that have an equal entry for each row, as long as they were at capture."""
        found = {n: given[n] for n in self.interface.lists if isinstance(given.get(n), (list, tuple))}
        return {
            n: [x[0]] * self.interface.lists[n]
            for n, x in found.items()
            if len(x) == rows and all(entry == x[0] for entry in x)
        }

    def _kind(self, given: Mapping[str, Any]) -> int:
        """Return the kind of a call: 0, or i if it has the constants `others[i - 1]`. 0 for one that has those of no kind."""
        found = {n: v for n, (_, v) in leaves(given).items()}
        names = [n for other in self.interface.others for n in other]
        for kind in range(len(self.interface.others) + 1):
            constants = self._constants(kind)
            if not any(isinstance(found.get(n), Tensor) or found.get(n) != constants.get(n) for n in names):
                return kind
        return 0

    def _constants(self, kind: int) -> dict[str, Any]:
        """Return the arguments that are constant in the graph for a kind of calls, by flat name."""
        face = self.interface
        constants = {n: v for n, (_, v) in leaves(face.arguments).items()} | face.constants
        return constants | (face.others[kind - 1] if kind else {})

    def _require_fixed(self, given: Mapping[str, Any], kind: int) -> None:
        """Raise TFMQError for an argument that is constant in the graph but has another value here, or is left out."""
        face, captured = self.interface, self._constants(kind)
        found = {n: v for n, (_, v) in leaves(given).items()}
        for name in [*captured, *(n for n in found if n not in captured)]:
            fixed, value = captured.get(name), found.get(name)
            if name in face.inputs or name == "return_dict":
                continue
            if isinstance(value, Tensor) or value != fixed:
                remedy = "that has the new value" if value is not None else "without it, or give it"
                kinds = dict.fromkeys(repr(self._constants(i).get(name)) for i in range(len(face.others) + 1))
                raise TFMQError(
                    f"forward: {name!r} was {' or '.join(kinds)} when the network was captured and is fixed in the graph"
                    f"{', but is left out here' if value is None else ''}; {self.verb} again with {self.source} {remedy}."
                )

    def _timestep(self, value: Any, batch: int) -> Tensor:
        spec = self.interface.inputs[self.interface.timestep]
        dtype: torch.dtype = getattr(torch, spec["dtype"])
        t: Tensor = torch.as_tensor(value, device=self.device)
        fractional = t.is_floating_point() and not dtype.is_floating_point
        if fractional and not traced([t]) and not torch.equal(t, t.round()):
            raise TFMQError(
                f"timestep={t[t != t.round()].flatten()[0].item()}: the network was captured with integer timesteps; "
                "calibrate with the float schedule."
            )
        t = t.to(dtype)
        if not spec["shape"]:
            one = t.reshape(-1)[:1]
            if t.numel() != 1 and (traced([t]) or not t.numel() or bool((t != one).any())):
                raise TFMQError(
                    f"timestep: the network was captured with one timestep per call, found {t.numel()}; give each timestep's rows "
                    "in a call of their own."
                )
            return one.reshape(())
        if len(spec["shape"]) > 1:
            return _entries(t, spec["shape"][1:], batch)
        if t.dim() > 1:
            if t.numel() != t.shape[0]:
                raise TFMQError(
                    f"timestep: has shape {tuple(t.shape)}, but must have one value per sample, as when the network was captured; "
                    f"{self.verb} again with {self.source} that has timesteps of this shape."
                )
            t = t.reshape(-1)
        if t.dim() == 0 or (t.dim() == 1 and t.shape[0] == 1 and batch != 1):
            t = t.reshape(1).expand(batch)
        if t.shape[0] != batch:
            raise TFMQError(f"timestep: {t.shape[0]} timesteps for a batch of {batch}.")
        return t

    def _input(self, name: str, value: Tensor) -> Tensor:
        spec = self.interface.inputs[name]
        shape = spec["shape"]
        if value.dim() != len(shape) or any(
            e not in (None, s) for e, s in zip(shape, value.shape, strict=True)
        ):
            raise TFMQError(
                f"forward: {name!r} has shape {tuple(value.shape)}, captured with {self._shown(name)}."
            )
        expected = getattr(torch, spec["dtype"])
        # Around a network in half precision, a pipeline has some inputs in float32.
        if {value.dtype, expected} <= {*NETWORK_DTYPES} and self.dtype != torch.float32:
            return value.to(expected)
        if value.dtype != expected:
            raise TFMQError(f"forward: {name!r} is {value.dtype}, captured as {expected}.")
        return value

    def _shown(self, name: str) -> str:
        return f"({', '.join(map(str, self.interface.sizes()[name]))})"

    def _require_sizes(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise TFMQError for sizes at which the network would compute by other operators than those of the graph."""
        moves = self.interface.moves()
        other = {(n, i) for (n, i), size in moves.items() if inputs[n].shape[i] != size}
        if not other or traced(inputs.values()):
            return
        now = {(n, i): size for n, x in inputs.items() for i, size in enumerate(x.shape)}
        for condition in self.interface.conditions:
            if other & set(sizes_in(condition)) and not holds(condition, now):
                name, i = min(other & set(sizes_in(condition)))
                raise TFMQError(
                    f"forward: {name!r} has {now[name, i]} in dimension {i}, captured with {moves[name, i]}; at this size the "
                    f"network breaks what its capture assumed ({shown(condition)}); {self.verb} again with {self.source} of it."
                )

    def _require_nonzero(self, inputs: Mapping[str, Tensor]) -> None:
        """Raise TFMQError for an input of zeros, of which the network asks whether it is one."""
        for name in self.interface.nonzero:
            if not traced(inputs.values()) and not bool(inputs[name].any()):
                raise TFMQError(
                    f"forward: {name!r} is 0 everywhere, and was not when the network was captured, which asks for it and then computes "
                    f"something else; {self.verb} again with {self.source} of such calls."
                )

    def _look_up(self, name: str, given: Tensor, table: Tensor) -> None:
        """Count the values outside a table, or raise TFMQError for them (`Recipe(unseen="error")`).

        The graph itself always takes the nearest entry.
        """
        missing, table = unknown_values(given, table)
        for value in missing:
            if self.recipe.get("unseen") == "error":
                raise TFMQError(self._unseen_words(name, value, table))
            self._unseen[name].add(value.item() if value.dim() == 0 else tuple(value.tolist()))

    def _unseen_words(self, name: str, value: Tensor, table: Tensor) -> str:
        what = "calibrated timesteps" if name == self.interface.timestep else "values declared finite"
        if table.dim() > 1:
            return f"{name}={value.tolist()}: not among the {len(table)} {what}; {self.seen[0].lower()}{self.seen[1:]}."
        below = table[table < value].max().item() if (table < value).any() else None
        above = table[table > value].min().item() if (table > value).any() else None
        return (
            f"{name}={value.item()}: not among the {len(table)} {what}; its neighbours are {below} and {above}. "
            f"{self.seen}."
        )


def _entries(t: Tensor, shape: Sequence[int], batch: int) -> Tensor:
    """Return a timestep for each token or frame of a sample, (N, *shape). One for a sample or for all is that of all its tokens."""
    if t.dim() < 2:
        t = t.reshape(-1, *[1] * len(shape))
    fits = t.dim() == len(shape) + 1 and t.shape[0] in (1, batch)
    if not fits or any(own not in (1, size) for own, size in zip(t.shape[1:], shape, strict=True)):
        raise TFMQError(
            f"timestep: has shape {tuple(t.shape)} for a batch of {batch}, captured with (N, {', '.join(map(str, shape))})."
        )
    return t.expand(batch, *shape)


def _blank(cls: Any) -> Any:
    """Return an object of a class as pickle makes it, before it has its state."""
    return cls.__new__(cls)


class QuantizedGraph(DropIn):
    """A converted graph behind the float network's calling convention. All runtimes start from it.

    outside: the float temporal block beside the graph, if it makes features that the graph takes as inputs, after its
        own, or features at values that are in no table. None: the graph computes or has everything.
    """

    network: GraphModule
    kind = "quantized"  # of the artefact

    def __init__(self, network: GraphModule, *, outside: Outside | None = None, **parts: Any) -> None:
        super().__init__(network, **parts)
        _own(network)
        self.outside = outside
        self._made: dict[str, GraphModule] = {}  # other forms of the graph, on the same tensors

    def __reduce__(self) -> Any:
        new, arguments, state = super().__reduce__()
        return new, arguments, {**state, "_made": {}}

    def parts(self) -> dict[str, Any]:
        more = {} if self.outside is None else {"outside": self.outside}
        return super().parts() | more

    @property
    def temporal_block(self) -> GraphModule:
        """Return the temporal block: timestep (N,), and the conditioning that joins it -> features."""
        if self.outside is not None and BLOCK_NAME not in self.network._modules:
            return self.outside.block
        return temporal_block_of(self.network)

    def in_float32(self) -> QuantizedGraph:
        """Return the same network in float32, with the same integers; itself if it is."""
        return self if self.dtype == torch.float32 else type(self)(self.network, **self.parts()).float()

    def with_fixed_sizes(self) -> tuple[QuantizedGraph, tuple[str, ...]]:
        """Return the network for no sizes but those of the capture, apart from the batch, and a note if it took others."""
        moves = self.interface.moves()
        if not moves:
            return self, ()
        model = type(self)(self.network, **{**self.parts(), "interface": self.interface.fixed()})
        names = dict.fromkeys(name for name, _ in moves)
        return model, (f"takes {', '.join(f'{n} as {model._shown(n)}' for n in names)} alone",)

    def closed(self, *, strict: bool = False) -> tuple[QuantizedGraph, tuple[str, ...]]:
        """Return the network with the temporal block in it, for what runs a graph alone, and notes on what differs.

        It is the network itself if the graph has everything. strict: raise TFMQError for what differs.
        """
        notes = []
        if self.outside is None:
            return self, ()
        if self.outside.taken:
            size = f"{self.outside.size} bytes of the float temporal block"
            notes.append(
                f"{size} are in it, and compute the features that depend on {', '.join(self.outside.conditions)}"
            )
        if self.recipe.get("unseen") == "float":
            notes.append("a timestep or value outside the tables takes the features of its nearest neighbour")
        if strict and notes:
            raise TFMQError(f"strict: {'; '.join(notes)}.")
        network = self._closed() if self.outside.taken else self.network
        return type(self)(network, **{**self.parts(), "outside": None}), tuple(notes)

    def _closed(self) -> GraphModule:
        assert self.outside is not None
        if "closed" not in self._made:
            self._made["closed"] = closed_graph(
                self.network, self.outside, self.device, taken=self.outside.taken
            )
        return self._made["closed"]

    def restored(self) -> GraphModule:
        """Return a graph that computes all features from the inputs, as the float network did; the graph itself if it cannot."""
        gm = self.network
        if self.outside is not None:
            gm = closed_graph(self._opened(), self.outside, self.device, taken=self.outside.features)
        return float_graph(without_module(gm), tables=(TIMESTEPS, *(f"{name}_table" for name in self.finite)))

    def _precise(self) -> Collection[str]:
        block = {} if self.outside is None else placeholders(self.outside.block)
        return {self.interface.timestep, *placeholders(self.temporal_block), *block}

    def _cast_code(self, dtype: torch.dtype) -> None:
        before = self.dtype
        super()._cast_code(dtype)
        inputs = example_inputs(self, batch=2)
        taken = [] if self.outside is None else self.outside.taken_of(inputs)
        self.network = cast_glue(self.network, [*inputs.values(), *taken], before=before, after=dtype)
        _own(self.network)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._made = {}
        if self.outside is not None:
            self.outside.follow(self.device)
        return self

    def _compute(self, inputs: list[Tensor]) -> Any:
        """Run the graph, with straight-through gradients if an input needs one.

        In the caller's autocast, its float operators use that precision, as the float network's do.
        """
        network = self.network
        more: list[Tensor] = []
        if self.outside is not None:
            network, more = self._with_features(inputs)
        return (
            with_gradients(network, [*inputs, *more]) if wants_gradient(inputs) else network(*inputs, *more)
        )

    def _with_features(self, inputs: list[Tensor]) -> tuple[GraphModule, list[Tensor]]:
        """Return the form of the graph that computes a call, and the features that it takes beside the inputs."""
        assert self.outside is not None
        # An export needs a graph without anything outside.
        if any(isinstance(x, FakeTensor) for x in inputs):
            return (self._closed() if self.outside.taken else self.network), []
        kind, more = self._features(inputs)
        return (self._opened() if kind == "opened" else self.network), more

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _features(self, inputs: list[Tensor]) -> tuple[str, list[Tensor]]:
        """Return the form of the graph, and its features: all of them where a value is in no table."""
        assert self.outside is not None
        given = dict(zip(self.interface.inputs, inputs, strict=True))
        with neutral():
            if self.recipe.get("unseen") == "float" and not self.outside.covers(given):
                return "opened", self.outside.evaluate(given)
            taken = self.outside.look_up(given) if self.outside.taken else []
            if not self.outside.rounds_at(given):
                return "network", taken
            found = dict(zip(self.outside.features, self.outside.at_rows(given), strict=True))
            return "opened", list((found | dict(zip(self.outside.taken, taken, strict=True))).values())

    def _opened(self) -> GraphModule:
        """Return the graph with all features as inputs, in the block's order."""
        assert self.outside is not None
        if "opened" not in self._made:
            self._made["opened"] = opened_graph(self.network, self.outside.features)
        return self._made["opened"]

    @neutral()
    def get_extra_state(self) -> Tensor:
        """Return a digest of what a state dict lacks: the graph, with the scales that are constants in it."""
        tables = {name: values.tolist() for name, values in {"": self.timesteps, **self.finite}.items()}
        digest = hashlib.sha256(json.dumps([_written(self.network), tables]).encode()).digest()
        return torch.tensor(list(digest), dtype=torch.uint8)

    @neutral()
    def set_extra_state(self, state: Any) -> None:
        """Check that a state dict fits. Raises TFMQError, before anything is loaded, if its network had other constants."""
        if not torch.equal(torch.as_tensor(state).cpu(), self.get_extra_state()):
            raise TFMQError(
                "load_state_dict: the state dict is of a network with another graph or other scales, which a state dict does "
                "not hold; use save_pretrained(folder) and tfmq_fx.load(folder)."
            )


def _own(network: GraphModule) -> None:
    """Let a graph be a quantized network's: without gradients, and loaded only as a part of it."""
    _freeze(network)
    network.register_load_state_dict_pre_hook(_refuse_graph_alone)  # type: ignore[no-untyped-call]


def _refuse_graph_alone(_network: nn.Module, _state: Any, prefix: str, *_: Any) -> None:
    """Raise TFMQError if a state dict is loaded into a graph by itself, which has no entry that tells if it fits."""
    if not prefix:
        raise TFMQError(
            "load_state_dict: the state dict of q.network lacks the scales, which are constants of the graph; use "
            "q.load_state_dict(q.state_dict()), or save_pretrained(folder) and tfmq_fx.load(folder)."
        )


def example_inputs(model: QuantizedGraph, *, batch: int) -> dict[str, Tensor]:
    """Return zeros in the shapes and dtypes of the graph's inputs; that of the batch is `batch`, others as captured."""
    moves = model.interface.moves()
    return {
        name: torch.zeros(
            [moves.get((name, i), batch) if s is None else s for i, s in enumerate(spec["shape"])],
            dtype=getattr(torch, spec["dtype"]),
            device=model.device,
        )
        for name, spec in model.interface.inputs.items()
    }


def _written(network: GraphModule) -> Any:
    """Return all nodes of a graph, constants included, as JSON; as text if JSON cannot hold one of them."""
    try:
        return graph_to_json(network)
    except TFMQError:
        return [str(m.graph) for m in network.modules() if isinstance(m, GraphModule)]


def _freeze(network: nn.Module) -> None:
    """Replace the parameters by some on the same memory that need no gradient. The float network keeps its own."""
    own: dict[nn.Parameter, nn.Parameter] = {}
    for module in network.modules():
        for name, p in module._parameters.items():
            if p is not None and p.requires_grad:
                module._parameters[name] = own.setdefault(p, nn.Parameter(p.detach(), requires_grad=False))
