"""Wrap anything that computes the network in the float network's calling convention."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from tfmq_fx.artefact.float_network import FloatModule, stand_in
from tfmq_fx.artefact.interface import PERTURBED, VARIANT, Interface
from tfmq_fx.artefact.known import unknown_values
from tfmq_fx.artefact.nan_rows import with_nan_rows
from tfmq_fx.artefact.outputs import output_class
from tfmq_fx.artefact.plain import holds_tensors, is_json
from tfmq_fx.base.ambient import neutral, traced
from tfmq_fx.base.arguments import leaves
from tfmq_fx.base.arithmetic import NETWORK_DTYPES, dtype_name
from tfmq_fx.base.errors import TFMQError, nearest_names
from tfmq_fx.base.stand_ins import StandIn
from tfmq_fx.graph.sizes import holds, shown, sizes_in

log = logging.getLogger(__name__)

_COUNTED = ContextVar("counted", default=True)


@contextmanager
def uncounted() -> Iterator[None]:
    """Neither count nor refuse unseen timesteps and values, in this thread, until exit: for short runs that only probe."""
    token = _COUNTED.set(False)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def _item(value: Any, step: str | int) -> Any:
    """Return value[step] of a dict or list, or None if there is no such item."""
    if isinstance(value, Mapping):
        return value.get(step)
    if isinstance(value, (list, tuple)) and isinstance(step, int) and step < len(value):
        return value[step]
    return None


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
        self.eval()
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
        now, new = (dtype_name(d) for d in (self.dtype, dtype))
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
        rows = given[self.first_input].shape[0]
        inputs = {n: self._input(n, given[n], rows) for n in self.interface.inputs if n != t}
        inputs[t] = self._timestep(given[t], inputs[self.first_input].shape[0])
        if not traced(inputs.values()):
            self._look_up_all(inputs)
        elif self.recipe.get("unseen") == "error" and torch.compiler.is_dynamo_compiling():
            torch.compiler.disable(self._look_up_all)(inputs)  # type: ignore[no-untyped-call]
        self._require_sizes(inputs)
        self._require_nonzero(inputs)
        taken = [inputs[n] for n in self.interface.inputs]
        output = with_nan_rows(self._compute(taken), taken, sample=inputs[self.first_input])
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
        for name in face.idle:
            if holds_tensors(given.get(name)):
                raise TFMQError(
                    f"forward: {name!r} holds tensors; it held none when the network was captured, which did nothing with it; "
                    f"{self.verb} again with {self.source} of such calls."
                )
            given[name] = face.arguments[name]
        tensors = {}
        for name, spec in face.inputs.items():
            value: Any = given
            for step in spec["path"]:
                value = _item(value, step)
            if value is not None and not isinstance(value, Tensor) and name != face.timestep:
                raise TFMQError(f"forward: {name!r} must be a tensor, found {type(value).__name__}.")
            tensors[name] = value
        if isinstance(t := given.get(face.timestep), (list, tuple)):
            given[face.timestep] = tensors[face.timestep] = torch.as_tensor(t, device=self.device)
        for name, kept in face.stand_ins.items():
            if tensors[name] is None and (like := tensors[kept[1]]) is not None:
                tensors[name] = StandIn(*kept).of(like, tensors[self.first_input].shape[0])
        if face.perturbed is not None and tensors[PERTURBED] is None:
            tensors[PERTURBED] = self._perturbed_rows(tensors[self.first_input])
        kind = 0
        if face.others and tensors[VARIANT] is None and (x := tensors[self.first_input]) is not None:
            kind = face.kind_of(given)
            tensors[VARIANT] = torch.full((x.shape[0],), kind, device=self.device)
        missing = [n for n, value in tensors.items() if value is None]
        missing += [n for n in face.required if n not in names[: len(args)] and n not in kwargs]
        if missing:
            raise TFMQError(f"forward: the argument {missing[0]!r} is missing.")
        self._require_fixed(
            {**given, **face.given_lists(given, rows=tensors[self.first_input].shape[0])}, kind
        )
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

    def _require_fixed(self, given: Mapping[str, Any], kind: int) -> None:
        """Raise TFMQError for an argument that is constant in the graph but has another value here, or is left out."""
        face = self.interface
        captured = face.constants_of(kind)
        found = {n: v for n, (_, v) in leaves(given).items()}
        for name in [*captured, *(n for n in found if n not in captured)]:
            fixed, value = captured.get(name), found.get(name)
            if name in face.inputs or name == "return_dict":
                continue
            if isinstance(value, Tensor) or value != fixed:
                remedy = "that has the new value" if value is not None else "without it, or give it"
                kinds = dict.fromkeys(
                    repr(face.constants_of(i).get(name)) for i in range(len(face.others) + 1)
                )
                raise TFMQError(
                    f"forward: {name!r} was {' or '.join(kinds)} when the network was captured and is fixed in the graph"
                    f"{', but is left out here' if value is None else ''}; {self.verb} again with {self.source} {remedy}."
                )

    def _timestep(self, value: Any, batch: int) -> Tensor:
        spec = self.interface.inputs[self.interface.timestep]
        dtype: torch.dtype = getattr(torch, spec["dtype"])
        try:
            t: Tensor = torch.as_tensor(value, device=self.device)
        except (TypeError, ValueError, RuntimeError):
            raise TFMQError(f"timestep: {value!r} is no number, and no tensor of numbers.") from None
        if t.is_floating_point() and not dtype.is_floating_point:
            if not traced([t]):
                self._note_fractions(t, torch.iinfo(dtype).max // 2)
            t = t.round()
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

    def _note_fractions(self, t: Tensor, most: int) -> None:
        """Count the timesteps that are no integers, which a network that was captured with integers takes rounded.

        Raises TFMQError for them if `Recipe(unseen="error")`, for fractions between -1 and 1, which are of another schedule, and for
        what is no number up to `most`.
        """
        wrong = t[~(t.abs() <= most)]
        if wrong.numel():
            raise TFMQError(f"timestep={wrong.flatten()[0].item()}: is no timestep.")
        fractions = t[t != t.round()]
        if not fractions.numel() or not _COUNTED.get():
            return
        refused = fractions if self.recipe.get("unseen") == "error" else fractions[fractions.abs() < 1]
        if refused.numel():
            raise TFMQError(
                f"timestep={refused[0].item()}: the network was captured with integer timesteps; calibrate with the float schedule."
            )
        seen = self._unseen[self.interface.timestep]
        for value in fractions.unique().tolist():
            if value not in seen:
                log.warning(
                    "timestep=%s: the network was captured with integer timesteps; it is rounded", value
                )
            seen.add(value)

    def _input(self, name: str, value: Tensor, rows: int) -> Tensor:
        spec = self.interface.inputs[name]
        value = self.interface.of_rows(name, value, rows)
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

    def _look_up_all(self, inputs: Mapping[str, Tensor]) -> None:
        if _COUNTED.get():
            for name, table in {self.interface.timestep: self.timesteps, **self.finite}.items():
                self._look_up(name, inputs[name], table)

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
