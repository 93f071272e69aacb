"""What to quantize, and how: frozen values, no behaviour beyond validation and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from tfmq_fx.base.arithmetic import FLOAT_BITS, check_bits, check_group_size
from tfmq_fx.base.errors import TFMQError, nearest_names
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
UNSEEN = ("nearest", "error", "float")
KEYED = ("block", "all")
MAINTENANCES = ("reconstruct", "cache", "auto")
CACHE_TYPES = ("float16", "bfloat16", "int8")
METHODS = ("nearest", "adaround", "gptq", "gptq+adaround")


def _check_known(value: str, known: tuple[str, ...], argument: str) -> None:
    if value not in known:
        raise TFMQError(f"{argument}: {value!r} is unknown; use one of {', '.join(known)}.")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Settings for the layers a pattern matches; the first matching rule wins over the recipe's own."""

    pattern: str  # fnmatch over the weight's module path, e.g. "encoder.0.*"
    op: str | None = None  # only this operator ("conv2d", "linear"); None: any
    weight_bits: int | None = None  # None: as the recipe says
    activation_bits: int | None = None  # None: as the recipe says
    # None: as the recipe says. A size no smaller than the row is one scale per output channel.
    group_size: int | None = None
    activation_granularity: str | None = None  # None: as the recipe says

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits"):
            if (bits := getattr(self, name)) is not None:
                check_bits(bits, f"Rule({self.pattern!r}).{name}")
        if self.group_size is not None:
            check_group_size(self.group_size, f"Rule({self.pattern!r}).group_size")
        if self.activation_granularity is not None:
            _check_known(
                self.activation_granularity, GRANULARITIES, f"Rule({self.pattern!r}).activation_granularity"
            )


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """How integers are chosen. Defaults are tuned for quality per second; the reference's stand in the comments."""

    # "nearest": no data at all. "gptq": second order, layer by layer. "adaround": learned, block by block.
    # "gptq+adaround": learned from where gptq ends.
    method: str = "adaround"
    # Of the temporal block, whose few keys make a second-order step cheap. None: "gptq", or "nearest" with `method`.
    temporal_method: str | None = None
    iterations: int = 400  # per block (reference: 20,000)
    temporal_iterations: int = 2000  # TIAR (reference: 20,000)
    temporal_batch_size: int = 1024  # keys per iteration of TIAR: every timestep of a usual schedule at once
    batch_size: int = 32  # samples per iteration
    num_samples: int = 1024  # calibration samples used, spread evenly over the calibration set
    learning_rate: float = 0.1  # of alpha, Adam (reference: 1e-3)
    round_weight: float = (
        100.0  # of the mean rounding regulariser, where round-to-nearest's error counts as 1
    )
    learn_activation_scale: bool = False  # with AdaRound: the scales of the block's static activations too
    activation_learning_rate: float = 1e-2  # of the logarithm of those scales, Adam
    # Then all blocks together, on the network's output, each timestep's error in units of what it was before: steps of
    # `batch_size` rows, drawn from the whole calibration set. None: 400, or 0 with method "nearest".
    tune_iterations: int | None = None
    tune_learning_rate: float = 5e-3  # of the weights, in units of their scale, Adam
    tune_scale_learning_rate: float = 1e-3  # of the logarithm of those scales, Adam
    # Parts that a mini-batch is cut into: each is computed on one thread, by one process. The integers depend on
    # their number, not on the number of threads. As many as processes at least.
    shards: int = 2
    max_memory: float = 8.0  # GiB of block inputs and targets; past it they lie in half precision on disk (TMPDIR). Also of tuning
    gptq_samples: int = 256  # samples whose layer inputs make GPTQ's Hessian
    gptq_memory: float = (
        8.0  # GiB; a layer of K inputs whose Hessian and factors (48 K^2 bytes) take more is cut into pieces
    )
    damping: float = 0.01  # of GPTQ's Hessian, as a share of its mean diagonal
    warmup: float = 0.2  # share of the iterations before the regulariser starts
    beta: tuple[float, float] = (20.0, 2.0)  # the regulariser's exponent, from and to

    def __post_init__(self) -> None:
        for name in ("method", "temporal_method"):
            if getattr(self, name) not in (*METHODS, *([None] if name == "temporal_method" else [])):
                raise TFMQError(
                    f"Reconstruction.{name}: {getattr(self, name)!r} is unknown; use one of {', '.join(METHODS)}."
                )
        for name in (
            "iterations",
            "temporal_iterations",
            "temporal_batch_size",
            "batch_size",
            "num_samples",
            "gptq_samples",
            "shards",
        ):
            if getattr(self, name) < 1:
                raise TFMQError(f"Reconstruction.{name}: {getattr(self, name)} is not positive.")
        if self.tune_iterations is not None and self.tune_iterations < 0:
            raise TFMQError(f"Reconstruction.tune_iterations: {self.tune_iterations} is negative.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One quantization setting."""

    weight_bits: int = 4  # of every convolution and linear; 16: float
    activation_bits: int = 8  # of every convolution's and linear's input; 16: float
    edge_weight_bits: int = 8  # at least this for the first and last layer and the first time-embedding layer
    edge_activation_bits: int = (
        FLOAT_BITS  # at least this for the input of the first and last layer; 16: float
    )
    # Consecutive weights of an output channel, flattened to (C_out, K), that share a scale and zero point; None: all K.
    # Where it does not divide K, see `fitting_group_size`: the plan's notes say what was taken.
    group_size: int | None = None
    # Scales of the inputs of linear layers outside the temporal block: one per "tensor", calibrated, or one per "token",
    # symmetric and computed at run time, whatever `keyed` says. Convolutions keep "tensor": the positions under one
    # window would have scales of their own inside one dot product, which no integer kernel can factor out.
    activation_granularity: str = "tensor"
    # Of q, k and v at attention matmuls, symmetric; 16: float. OpenVINO multiplies q by k in int8 then.
    attention_bits: int = FLOAT_BITS
    temporal_observer: str | type[TemporalObserver] = "minmax"  # estimator inside the temporal block
    keyed: str = (
        "block"  # which activations have qparams per timestep: "block" (the temporal block's) or "all"
    )
    # With keyed="all", outside the temporal block: the keys of an activation share its zero point. Its scale then costs an
    # int8 kernel one multiplication; zero points of their own cost a float32 map to subtract, too.
    shared_zero_point: bool = True
    activation_observer: str = "mse"  # estimator elsewhere: "minmax" or "mse" (torchao's histogram search)
    # A timestep outside the table, counted in the report: "nearest", its neighbour's scales, and features where they are
    # cached; "float", the float temporal block, which the artefact keeps beside; or an "error".
    unseen: str = "nearest"
    max_table_entries: int = (
        65536  # finite inputs share a key with the timestep while their product fits this
    )
    # What gives the temporal features at inference: "reconstruct", the quantized temporal block; "cache", a table of what
    # the float block computes at every key; "auto", for each feature the one of fewer bytes whose disturbance is in bounds.
    maintain: str = "reconstruct"
    cache_type: str = (
        "float16"  # of that table: "float16", "bfloat16", or "int8" with a scale per key and feature
    )
    # For "auto", the largest disturbance of a feature: its mean cosine distance to float, and the relative squared error
    # that it alone makes in the network's output.
    maintain_bound: float = 1e-4
    # For "auto", bytes for everything that gives the features: the least disturbance that fits. None: the fewest bytes.
    maintain_bytes: int | None = None
    # For few bits, on the float graph before anything is quantized, outside the temporal block and the first and last layers:
    smooth: float | None = (
        None  # SmoothQuant's alpha: 0 leaves the weights, 1 the activations even; None: off
    )
    rotate: int | None = (
        None  # block size of a Hadamard rotation of the input channels, a power of two; None: off
    )
    low_rank: int | None = None  # rank of a 16-bit branch beside each layer (SVDQuant); None: off
    rules: tuple[Rule, ...] = ()  # exceptions by module path; a rule that matches nothing is an error
    reconstruction: Reconstruction = field(default_factory=Reconstruction)

    def __post_init__(self) -> None:
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
        if self.smooth is not None and not 0.0 <= self.smooth <= 1.0:
            raise TFMQError(f"Recipe.smooth: {self.smooth} is not between 0 and 1.")
        if self.rotate is not None and (self.rotate < 2 or self.rotate & (self.rotate - 1)):
            raise TFMQError(f"Recipe.rotate: {self.rotate} is no power of two from 2 on.")
        if self.low_rank is not None and self.low_rank < 1:
            raise TFMQError(f"Recipe.low_rank: {self.low_rank} is not positive.")
        if isinstance(self.temporal_observer, str):
            if self.temporal_observer not in TEMPORAL_OBSERVERS:
                raise TFMQError(
                    f"Recipe.temporal_observer: {self.temporal_observer!r} is unknown; use one of "
                    f"{', '.join(TEMPORAL_OBSERVERS)}, or a subclass of TemporalObserver."
                )
        elif not (
            isinstance(self.temporal_observer, type) and issubclass(self.temporal_observer, TemporalObserver)
        ):
            raise TFMQError(
                f"Recipe.temporal_observer: {self.temporal_observer!r} is not a subclass of TemporalObserver."
            )
        for name, known in (
            ("activation_observer", ACTIVATION_OBSERVERS),
            ("unseen", UNSEEN),
            ("keyed", KEYED),
            ("activation_granularity", GRANULARITIES),
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
    def preset(name: str) -> Recipe:
        """The recipe of that name, w{weight bits}a{activation bits}. Raises TFMQError for an unknown name."""
        if name not in PRESETS:
            raise TFMQError(f"recipe: {name!r} is no preset; presets are {nearest_names(name, PRESETS)}.")
        return PRESETS[name]

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Recipe:
        """What `to_json` gave, or some of it: fields left out have their defaults.

        Raises TFMQError for an unknown field, a value of another type, and an observer class of the user's.
        """
        plain = {n: x for n, x in values.items() if n not in ("reconstruction", "rules")}
        settings, rules = values.get("reconstruction", {}), values.get("rules", ())
        _check_fields(Recipe, plain, "Recipe")
        _check_fields(Reconstruction, settings, "Recipe.reconstruction")
        if not isinstance(rules, (list, tuple)):
            raise TFMQError(f"Recipe.rules: {rules!r} is no list.")
        for i, rule in enumerate(rules):
            _check_fields(Rule, rule, f"Recipe.rules[{i}]")
            if "pattern" not in rule:
                raise TFMQError(f"Recipe.rules[{i}]: no pattern; say which modules it is for.")
        if "beta" in settings:
            settings = {**settings, "beta": tuple(settings["beta"])}
        return Recipe(
            **plain, reconstruction=Reconstruction(**settings), rules=tuple(Rule(**rule) for rule in rules)
        )

    @staticmethod
    def read(file: Path) -> Recipe:
        """A recipe from a JSON file of what `to_json` gave, or of any of its fields. Raises TFMQError for a file that is not."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise TFMQError(f"recipe: {file} cannot be read ({error.strerror}).") from error
        except ValueError as error:
            raise TFMQError(f"recipe: {file} is no JSON ({error}).") from error
        if not isinstance(values, dict):
            raise TFMQError(f"recipe: {file} holds no JSON object of Recipe's fields.")
        return Recipe.from_json(values)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an observer class of the user's is kept by its qualified name, for the record only."""
        values = dataclasses.asdict(self)
        if not isinstance(self.temporal_observer, str):
            values["temporal_observer"] = (
                f"{self.temporal_observer.__module__}.{self.temporal_observer.__qualname__}"
            )
        return values


def _check_fields(cls: type, values: object, where: str) -> None:
    """Raise TFMQError unless these are some fields of a dataclass, each with a JSON value of its type."""
    if not isinstance(values, Mapping):
        raise TFMQError(f"{where}: {values!r} is no JSON object.")
    types = get_type_hints(cls)
    for name, value in values.items():
        if name not in types:
            raise TFMQError(f"{where}: there is no {name!r}; there is {nearest_names(str(name), types)}.")
        expected = types[name]
        if get_origin(expected) is tuple:
            fits = (
                isinstance(value, (list, tuple))
                and len(value) == 2
                and all(type(x) in (int, float) for x in value)
            )
        else:
            allowed = get_args(expected) or (expected,)
            fits = type(value) in allowed or (type(value) is int and float in allowed)
        if not fits:
            shown = expected.__name__ if isinstance(expected, type) else expected
            raise TFMQError(f"{where}.{name}: {value!r} is no {shown}.")


# Tuned, as every method that learns; at 8 bits one seed alone shows what that is worth (docs/reconstruction.md).
_GPTQ, _UNTUNED = Reconstruction(method="gptq"), Reconstruction(method="gptq", tune_iterations=0)
PRESETS = {
    # At 8 bits learned rounding is no better than the second-order step, and dearer (docs/reconstruction.md).
    "w8a8": Recipe(weight_bits=8, activation_bits=8, reconstruction=_UNTUNED),
    "w4a8": Recipe(weight_bits=4, activation_bits=8),
    "w8a16": Recipe(weight_bits=8, activation_bits=FLOAT_BITS, reconstruction=_UNTUNED),
    "w4a16": Recipe(weight_bits=4, activation_bits=FLOAT_BITS),
    # As measured in docs/low_bits.md.
    "w4a4": Recipe(weight_bits=4, activation_bits=4, smooth=0.5, low_rank=8, reconstruction=_GPTQ),
    "w3a8": Recipe(weight_bits=3, activation_bits=8, low_rank=8, reconstruction=_GPTQ),
    "w2a8": Recipe(weight_bits=2, activation_bits=8, low_rank=8, reconstruction=_GPTQ),
}
