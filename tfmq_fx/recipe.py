"""Recipes: what to quantize and how. Frozen values, with no behaviour beyond validation and JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from tfmq_fx.base.arithmetic import FLOAT8, FLOAT_BITS, INT, check_bits, check_group_size
from tfmq_fx.base.errors import TFMQError, nearest_names, require_type
from tfmq_fx.graph.nodes import LAYER_OPS
from tfmq_fx.observers.minmax import TemporalMinMaxObserver
from tfmq_fx.observers.samples import TemporalKLObserver, TemporalMSEObserver, TemporalPercentileObserver
from tfmq_fx.observers.temporal import TemporalObserver

TEMPORAL_OBSERVERS: dict[str, type[TemporalObserver]] = {
    "minmax": TemporalMinMaxObserver,
    "mse": TemporalMSEObserver,
    "kl": TemporalKLObserver,
    "percentile": TemporalPercentileObserver,
}
ACTIVATION_OBSERVERS = ("minmax", "mse")
GRANULARITIES = ("tensor", "token")
LINEAR_DTYPES = (INT, FLOAT8)
UNSEEN = ("nearest", "error", "float")
KEYED = ("block", "all")
RULES = ("rules", "chosen")  # the fields that are tuples of rules
SHARES = ("float_flops", "double_flops", "float_bytes")
AUTO = "auto"  # chosen by `tfmq_fx.choices.choose`, from what it does to the network's output
OFF = "off"
MAINTENANCES = ("reconstruct", "cache", "auto")
CACHE_TYPES = ("float16", "bfloat16", "int8")
METHODS = ("nearest", "adaround", "gptq", "gptq+adaround")


def _check_types(settings: Any, where: str) -> None:
    """Raise TFMQError unless every field holds a value of its type, and make the values plain (`_plain`).

    where: what the settings are called in the message.
    """
    cls: type = type(settings)
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        try:
            found = _plain(value, _types(cls)[f.name])
        except TypeError:
            raise TFMQError(f"{where}.{f.name}: {value!r} is not of type {f.type}.") from None
        if isinstance(found, float) and not math.isfinite(found):
            raise TFMQError(f"{where}.{f.name}: {value!r} is not a finite number.")
        object.__setattr__(settings, f.name, found)


@functools.cache
def _types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _plain(value: Any, expected: Any) -> Any:
    """Return a value of the type `expected`, with a list as a tuple, and a number of another library as Python's own.

    Raises TypeError for a value of another type.
    """
    origin, parts = get_origin(expected), get_args(expected)
    if origin is UnionType:
        for part in parts:
            try:
                return _plain(value, part)
            except TypeError:
                pass
        raise TypeError
    if origin is tuple and isinstance(value, (list, tuple)):
        each = [parts[0]] * len(value) if parts[-1] is ... else list(parts)
        if len(each) == len(value):
            return tuple(map(_plain, value, each))
    if origin is type and isinstance(value, type) and issubclass(value, parts[0]):
        return value
    if expected in _NUMBERS and isinstance(value, _NUMBERS[expected]) and not isinstance(value, bool):
        return expected(value)
    if origin is None and expected not in _NUMBERS and isinstance(value, expected):
        return value
    raise TypeError


_NUMBERS: dict[Any, type] = {int: Integral, float: Real}


def _check_known(value: str, known: tuple[str, ...], argument: str) -> None:
    if value not in known:
        raise TFMQError(f"{argument}: {value!r} is unknown; use one of {', '.join(known)}.")


def _check_smooth(value: float | str | None, argument: str, *, words: tuple[str, ...]) -> None:
    if isinstance(value, str) and value not in words:
        raise TFMQError(f"{argument}: {value!r} is unknown; use {words[0]!r}, or a number from 0 to 1.")
    if not isinstance(value, str) and value is not None and not 0.0 <= value <= 1.0:
        raise TFMQError(f"{argument}: {value} is not between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings for the layers that a pattern matches. The first matching rule overrides the recipe's own."""

    pattern: str  # fnmatch over the weight's module path, e.g. "encoder.0.*"
    op: str | None = None  # only this operator, one of LAYER_OPS ("conv2d", "linear"); None: any
    weight_bits: int | None = None  # None: as the recipe says
    activation_bits: int | None = None  # None: as the recipe says
    # None: as the recipe says. A size at least as long as the row gives one scale per output channel.
    group_size: int | None = None
    activation_granularity: str | None = None  # None: as the recipe says
    # 2: the input is a sum of two integer tensors, the second of what the rounding of the first leaves. That has
    # the precision of twice the bits, for a second product.
    activation_terms: int | None = None  # None: 1
    linear_dtype: str | None = None  # of a linear, as in the recipe; None: as the recipe says
    smooth: float | str | None = None  # SmoothQuant's alpha, or "off"; None: as the recipe says
    keyed: str | None = None  # "all" or "block", as in the recipe; None: as the recipe says

    def __post_init__(self) -> None:
        _check_types(self, f"Rule({self.pattern!r})")
        if self.op is not None:
            _check_known(self.op, LAYER_OPS, f"Rule({self.pattern!r}).op")
        for name in ("weight_bits", "activation_bits"):
            if (bits := getattr(self, name)) is not None:
                check_bits(bits, f"Rule({self.pattern!r}).{name}")
        if self.group_size is not None:
            check_group_size(self.group_size, f"Rule({self.pattern!r}).group_size")
        if self.activation_granularity is not None:
            _check_known(
                self.activation_granularity, GRANULARITIES, f"Rule({self.pattern!r}).activation_granularity"
            )
        if self.linear_dtype is not None:
            _check_known(self.linear_dtype, LINEAR_DTYPES, f"Rule({self.pattern!r}).linear_dtype")
        if self.activation_terms not in (None, 1, 2):
            raise TFMQError(
                f"Rule({self.pattern!r}).activation_terms: {self.activation_terms!r} is not 1 or 2."
            )
        _check_smooth(self.smooth, f"Rule({self.pattern!r}).smooth", words=(OFF,))
        if self.keyed is not None:
            _check_known(self.keyed, KEYED, f"Rule({self.pattern!r}).keyed")


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Settings for choosing integers, tuned for quality per second. Comments give the reference's values."""

    # "nearest": no data at all. "gptq": second order, layer by layer. "adaround": learned, block by block.
    # "gptq+adaround": learned, starting from the result of gptq.
    method: str = "adaround"
    # For the temporal block, whose few keys make a second-order step cheap. None: "gptq", or "nearest" if
    # `method` is "nearest".
    temporal_method: str | None = None
    iterations: int = 400  # per block (reference: 20,000)
    temporal_iterations: int = 2000  # TIAR (reference: 20,000)
    temporal_batch_size: int = 1024  # keys per iteration of TIAR: every timestep of a usual schedule at once
    batch_size: int = 32  # samples per iteration
    num_samples: int = 1024  # calibration samples used, spread evenly over the calibration set
    learning_rate: float = 0.1  # of alpha, Adam (reference: 1e-3)
    # Of the mean rounding regulariser, in a loss where the error of round-to-nearest counts as 1.
    round_weight: float = 100.0
    learn_activation_scale: bool = False  # with AdaRound: learn scales of the block's static activations too
    activation_learning_rate: float = 1e-2  # of the logarithm of those scales, Adam
    # Steps that then tune all blocks together on the network's output, with each timestep's error relative to
    # its error before tuning. A step takes `batch_size` rows, drawn from the whole calibration set. None:
    # 400, or 0 with method "nearest".
    tune_iterations: int | None = None
    # Tuning takes no more steps than cost this many floating-point operations, a backward pass counting as two
    # forward passes; a report's note says how many were left out. None: all.
    tune_flops: float | None = None
    tune_learning_rate: float = 5e-3  # of the weights, in units of their scale, Adam
    tune_scale_learning_rate: float = 1e-3  # of the logarithm of those scales, Adam
    # The number of parts of a mini-batch, each computed on one thread of one process. The integers depend on
    # this number, not on the number of threads. It must be at least the number of processes.
    shards: int = 2
    # GiB of block inputs and targets; beyond it they lie in half precision on disk (TMPDIR). Integers of weights that
    # take more than this lie there as well, mapped to memory. Limits tuning too.
    max_memory: float = 8.0
    gptq_samples: int = 256  # samples whose layer inputs form GPTQ's Hessian
    # Rows of a layer's Hessian for each of its K columns. If the samples have more, positions are drawn.
    gptq_rows: int = 128
    # GiB. A layer of K inputs is cut into pieces if its Hessian and factors (40 K^2 bytes) take more.
    gptq_memory: float = 8.0
    # Whether GPTQ rounds the weights that best make up for the errors before them (GPTAQ, Li et al. 2025). None: those of fewer
    # than 8 bits, for the rounding of other weights, and the temporal block's. True: all, for the rounding of activations as
    # well, beside which blocks' weights are then chosen: the smallest error of one call, for networks that sample in one step.
    corrected: bool | None = None
    damping: float = 0.01  # of GPTQ's Hessian, as a share of its mean diagonal
    warmup: float = 0.2  # share of the iterations before the regulariser starts
    beta: tuple[float, float] = (20.0, 2.0)  # the regulariser's exponent at the start and at the end

    def __post_init__(self) -> None:
        _check_types(self, "Reconstruction")
        _check_known(self.method, METHODS, "Reconstruction.method")
        if self.temporal_method is not None:
            _check_known(self.temporal_method, METHODS, "Reconstruction.temporal_method")
        for name in (
            "iterations",
            "temporal_iterations",
            "temporal_batch_size",
            "batch_size",
            "num_samples",
            "gptq_samples",
            "gptq_rows",
            "gptq_memory",
            "shards",
            "learning_rate",
            "activation_learning_rate",
            "tune_learning_rate",
            "tune_scale_learning_rate",
        ):
            if not getattr(self, name) > 0:
                raise TFMQError(f"Reconstruction.{name}: {getattr(self, name)} is not positive.")
        for name in ("tune_iterations", "tune_flops", "round_weight", "max_memory", "damping"):
            if (value := getattr(self, name)) is not None and not value >= 0:
                raise TFMQError(f"Reconstruction.{name}: {value} is negative.")
        if not 0.0 <= self.warmup <= 1.0:
            raise TFMQError(f"Reconstruction.warmup: {self.warmup} is not a share, between 0 and 1.")
        if not all(0.0 < exponent < math.inf for exponent in self.beta):
            raise TFMQError(f"Reconstruction.beta: {self.beta} are not two positive numbers.")

    @property
    def block_samples(self) -> int:
        """The number of samples that blocks are run on: AdaRound learns from all, GPTQ from at most `gptq_samples`."""
        return self.num_samples if "adaround" in self.method else min(self.num_samples, self.gptq_samples)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All settings of one quantization."""

    weight_bits: int = 4  # of every convolution and linear; 16: float
    activation_bits: int = 8  # of every convolution's and linear's input; 16: float
    edge_weight_bits: int = 8  # at least this for the first and last layer and the first time-embedding layer
    # At least this for the input of the first and last layer; 16: float.
    edge_activation_bits: int = FLOAT_BITS
    # The number of consecutive weights of an output channel, flattened to (C_out, K), that share a scale and
    # zero point; None: all K. If it does not divide K, `fitting_group_size` chooses another, which the plan's
    # notes name.
    group_size: int | None = None
    # Scales of the inputs of linear layers outside the temporal block: one per "tensor", calibrated, or one
    # per "token", symmetric and computed at run time, regardless of `keyed`. Convolutions keep "tensor": the
    # positions in one window would have different scales within one dot product, which no integer kernel can
    # factor out.
    activation_granularity: str = "tensor"
    # What linear layers multiply: "int", integers of weight_bits and activation_bits, or "float8_e4m3fn" (4 bits of
    # exponent, 3 of mantissa). Then input and weight are the largest magnitude / 448 times such a number: the input with
    # the scales that it would have as integers, the weight with one per output channel. Two exceptions: 16 bits stay
    # float, and a weight of at most 4 bits stays integer, which is exact in float8. Other bits than 8 become 8, which the
    # plan's notes say. Convolutions multiply integers.
    linear_dtype: str = INT
    # Of q, k and v at attention matmuls, symmetric; 16: float. OpenVINO multiplies quantized q and k in int8.
    attention_bits: int = FLOAT_BITS
    temporal_observer: str | type[TemporalObserver] = "minmax"  # estimator inside the temporal block
    # The activations with qparams per timestep: "block" (the temporal block's) or "all". "auto": those where
    # it pays.
    keyed: str = "block"
    # Outside the temporal block, where activations are keyed: all keys of an activation share one zero point. The scale
    # then costs an int8 kernel one multiplication; with separate zero points, it would also have to subtract
    # a float32 map.
    shared_zero_point: bool = True
    activation_observer: str = "mse"  # estimator elsewhere: "minmax" or "mse" (torchao's histogram search)
    # What to use for a timestep outside the table; the report counts these. "nearest": its neighbour's
    # scales, and the neighbour's features where they are cached. "float": the float temporal block, which the
    # artefact then keeps as well. "error": raise TFMQError.
    unseen: str = "nearest"
    # Finite inputs share a key with the timestep while the product of their value counts is within this.
    max_table_entries: int = 65536
    # What provides the temporal features at inference. "reconstruct": the quantized temporal block. "cache":
    # a table of the float block's results at every key. "auto": for each feature, the one of fewer bytes
    # whose disturbance is within bounds.
    maintain: str = "reconstruct"
    # Of that table: "float16", "bfloat16", or "int8" with a scale per key and feature.
    cache_type: str = "float16"
    # For "auto": the largest allowed disturbance of a feature, both its mean cosine distance to float and the
    # relative squared error that it alone causes in the network's output.
    maintain_bound: float = 1e-4
    # For "auto": a budget of bytes for everything that provides the features, spent on the least disturbance.
    # None: the fewest bytes.
    maintain_bytes: int | None = None
    # For few bits. These change the float graph before anything is quantized, except the temporal block and
    # the first and last layers.
    # SmoothQuant's alpha: 0 makes the weights even, 1 the activations; None: off. "auto": for each layer the
    # one with the least effect on the output.
    smooth: float | str | None = None
    # Block size of a Hadamard rotation of the input channels, a power of two; None: off.
    rotate: int | None = None
    low_rank: int | None = None  # rank of a 16-bit branch beside each layer (SVDQuant); None: off
    # Where the error would otherwise be largest: the share of all multiplications that may stay in float; the share
    # that may be done twice, on inputs in two terms (Rule.activation_terms); and the share by which the weights may
    # grow, from more bits for some.
    float_flops: float = 0.0
    double_flops: float = 0.0
    float_bytes: float = 0.0
    rules: tuple[Rule, ...] = ()  # exceptions by module path; a rule that matches nothing is an error
    # Settings of single layers, by the whole path, that `choose` found for "auto" and these shares. A rule
    # that matches the layer goes before them, field by field.
    chosen: tuple[Rule, ...] = ()
    reconstruction: Reconstruction = field(default_factory=Reconstruction)

    def __post_init__(self) -> None:
        _check_types(self, "Recipe")
        for name in (
            "weight_bits",
            "activation_bits",
            "edge_weight_bits",
            "edge_activation_bits",
            "attention_bits",
        ):
            check_bits(getattr(self, name), f"Recipe.{name}")
        if self.group_size is not None:
            check_group_size(self.group_size, "Recipe.group_size")
        if self.max_table_entries < 1:
            raise TFMQError(f"Recipe.max_table_entries: {self.max_table_entries} is not positive.")
        _check_smooth(self.smooth, "Recipe.smooth", words=(AUTO,))
        for name in SHARES:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise TFMQError(f"Recipe.{name}: {getattr(self, name)} is not a share, between 0 and 1.")
        if self.rotate is not None and (self.rotate < 2 or self.rotate & (self.rotate - 1)):
            raise TFMQError(
                f"Recipe.rotate: {self.rotate} is not a power of two; use 2, 4, 8, 16, ..., or None for no rotation."
            )
        if self.low_rank is not None and self.low_rank < 1:
            raise TFMQError(f"Recipe.low_rank: {self.low_rank} is not positive.")
        if isinstance(self.temporal_observer, str) and self.temporal_observer not in TEMPORAL_OBSERVERS:
            raise TFMQError(
                f"Recipe.temporal_observer: {self.temporal_observer!r} is unknown; use one of "
                f"{', '.join(TEMPORAL_OBSERVERS)}, or a subclass of TemporalObserver."
            )
        if FLOAT8 in (self.linear_dtype, *(rule.linear_dtype for rule in self.rules)) and issubclass(
            self.temporal_observer_class, TemporalKLObserver
        ):
            raise TFMQError(
                f"Recipe.temporal_observer: 'kl' counts values by integer, and linear_dtype={FLOAT8!r} has none; use another."
            )
        for name, known in (
            ("activation_observer", ACTIVATION_OBSERVERS),
            ("unseen", UNSEEN),
            ("keyed", (*KEYED, AUTO)),
            ("activation_granularity", GRANULARITIES),
            ("linear_dtype", LINEAR_DTYPES),
            ("maintain", MAINTENANCES),
            ("cache_type", CACHE_TYPES),
        ):
            _check_known(getattr(self, name), known, f"Recipe.{name}")
        if not self.maintain_bound >= 0:
            raise TFMQError(f"Recipe.maintain_bound: {self.maintain_bound} is not zero or more.")
        if self.maintain_bytes is not None and self.maintain_bytes < 1:
            raise TFMQError(f"Recipe.maintain_bytes: {self.maintain_bytes} is not positive.")
        if self.maintain_bytes is not None and self.maintain != "auto":
            raise TFMQError(f"Recipe.maintain_bytes: a budget is for maintain='auto', not {self.maintain!r}.")

    @property
    def temporal_observer_class(self) -> type[TemporalObserver]:
        observer = self.temporal_observer
        return TEMPORAL_OBSERVERS[observer] if isinstance(observer, str) else observer

    @staticmethod
    def of(given: str | Recipe) -> Recipe:
        """Return a recipe as it is, and for a name the preset. Raises TFMQError for anything else."""
        if isinstance(given, str):
            return Recipe.preset(given)
        require_type(
            given, Recipe, "recipe", "use a preset's name, Recipe.from_json(dict) or Recipe.read(file)"
        )
        return given

    @staticmethod
    def preset(name: str) -> Recipe:
        """Return the recipe called w{weight bits}a{activation bits}. Raises TFMQError for an unknown name."""
        if not isinstance(name, str) or name not in PRESETS:
            hint = "; for a file, use Recipe.read(file)" if str(name).endswith(".json") else ""
            raise TFMQError(
                f"recipe: {name!r} is not a preset; presets are {nearest_names(str(name), PRESETS)}{hint}."
            )
        return PRESETS[name]

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Recipe:
        """Return the recipe with these fields, as given by `to_json`; fields left out have their defaults.

        Raises TFMQError for an unknown field, a value of another type, and a user-defined observer class.
        """
        _check_fields(Recipe, values, "Recipe")
        nested: dict[str, Any] = {n: _rules(values[n], f"Recipe.{n}") for n in RULES if n in values}
        if "reconstruction" in values:
            _check_fields(Reconstruction, values["reconstruction"], "Recipe.reconstruction")
            nested["reconstruction"] = Reconstruction(**values["reconstruction"])
        return Recipe(**{**values, **nested})

    @staticmethod
    def read(file: str | Path) -> Recipe:
        """Read a recipe from a JSON file with all or some of the fields that `to_json` gives.

        Raises TFMQError for any other file, and for a key that is there twice.
        """
        try:
            text = Path(file).read_text(encoding="utf-8")
            values = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        except OSError as error:
            raise TFMQError(f"recipe: {file} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise TFMQError(f"recipe: {file} is not valid JSON ({error}).") from error
        if not isinstance(values, dict):
            raise TFMQError(f"recipe: {file} holds no JSON object of Recipe's fields.")
        return Recipe.from_json(values)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values. A user-defined observer class is recorded by its qualified name only."""
        values = dataclasses.asdict(self)
        if not isinstance(self.temporal_observer, str):
            values["temporal_observer"] = (
                f"{self.temporal_observer.__module__}.{self.temporal_observer.__qualname__}"
            )
        return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the JSON object. Raises ValueError for a key that is there twice, of which json takes the last."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} is there twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    """Raise ValueError for the numbers that JSON lacks, and Python's json reads."""
    raise ValueError(f"it has no {name}")


def _rules(values: object, where: str) -> tuple[Rule, ...]:
    """Return the rules with these fields. where: the name of the list, for messages."""
    if not isinstance(values, (list, tuple)):
        raise TFMQError(f"{where}: {values!r} is not a list.")
    for i, rule in enumerate(values):
        _check_fields(Rule, rule, f"{where}[{i}]")
        if "pattern" not in rule:
            raise TFMQError(f"{where}[{i}]: no pattern; name the modules that it applies to.")
    return tuple(Rule(**rule) for rule in values)


def _check_fields(cls: type, values: object, where: str) -> None:
    """Raise TFMQError unless `values` are fields of the dataclass `cls`. where: the object's name, for the message."""
    if not isinstance(values, Mapping):
        raise TFMQError(f"{where}: {values!r} is not a JSON object; give a dict of {cls.__name__}'s fields.")
    known = _types(cls)
    for name in values:
        if name not in known:
            raise TFMQError(f"{where}: unknown field {name!r}; known are {nearest_names(str(name), known)}.")


# What `choose` finds for each network. At 8 bits the activations are the problem, not the rounding of the weights
# (docs/choosing_a_recipe.md).
_CHOSEN: dict[str, Any] = {
    "smooth": AUTO,
    "keyed": AUTO,
    "float_flops": 0.03,
    "double_flops": 0.1,
    "float_bytes": 0.02,
    "activation_observer": "minmax",
}
_FEW: dict[str, Any] = {**_CHOSEN, "float_bytes": 0.05}  # at few bits, a weight of 8 bits costs little
# Tuned for half a minute of a CPU core, and three times as long below W4A8: a small network gains from it, a large one would take hours.
_TUNED = Reconstruction(method="gptq", tune_flops=5e11)
_LONGER = Reconstruction(method="gptq", tune_flops=1.5e12)
# At 8 bits the gain of tuning is hardly visible, and a Hessian of few rows is as good (docs/measured/reconstruction.md).
_UNTUNED = Reconstruction(method="gptq", tune_iterations=0, gptq_rows=16)
PRESETS = {
    "w8a8": Recipe(weight_bits=8, activation_bits=8, reconstruction=_UNTUNED, **_CHOSEN),
    "w4a8": Recipe(weight_bits=4, activation_bits=8, reconstruction=_TUNED, **_FEW),
    # Beside float activations the weights are all there is to choose, those of the first and last layer before others. At 4 bits their
    # channels are levelled too, by what they multiply (AWQ).
    "w8a16": Recipe(
        weight_bits=8, activation_bits=FLOAT_BITS, reconstruction=_UNTUNED, float_bytes=_CHOSEN["float_bytes"]
    ),
    "w4a16": Recipe(
        weight_bits=4,
        activation_bits=FLOAT_BITS,
        reconstruction=_TUNED,
        smooth=AUTO,
        float_bytes=_FEW["float_bytes"],
    ),
    # The branches as measured in docs/measured/low_bits.md, the choices in docs/measured/terrain.md.
    "w4a4": Recipe(weight_bits=4, activation_bits=4, low_rank=8, reconstruction=_LONGER, **_FEW),
    "w3a8": Recipe(weight_bits=3, activation_bits=8, low_rank=8, reconstruction=_LONGER, **_FEW),
    "w2a8": Recipe(weight_bits=2, activation_bits=8, low_rank=8, reconstruction=_LONGER, **_FEW),
}
