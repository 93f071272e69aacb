"""The arguments of `quantize` other than the recipe and the data, shared by the function and the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from tfmq_fx.base.errors import TFMQError, require_type
from tfmq_fx.base.files import require_writable

LARGEST_SEED = 2**43  # up to a million seeds are derived from one, and torch's generators take 64 bits


def check_seed(seed: Any, argument: str = "seed") -> None:
    """Raise TFMQError, naming `argument`, unless `seed` is an integer from -2**43 to 2**43."""
    if not isinstance(seed, Integral) or abs(int(seed)) > LARGEST_SEED:
        raise TFMQError(f"{argument}: {seed!r} is not a valid seed; use an integer from -2**43 to 2**43.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of one quantization that do not depend on the recipe. Raises TFMQError for an invalid value.

    A field whose metadata has "help" is an option of `tfmq quantize`, with that help text.
    """

    # The name of the network's argument that holds the timestep.
    timestep: str = "timestep"
    # The name of the pipeline component to quantize. None: the one that takes `timestep`.
    component: str | None = None
    # Other inputs with finitely many values: name -> values. They join the timestep in the key.
    finite: Mapping[str, Any] | None = field(
        default=None,
        metadata={"help": "An input with finitely many values, as NAME=JSON, e.g. class_labels=[0,1,2]."},
    )
    # Seeds every random number: the same seed gives the same integers.
    seed: int = field(default=0, metadata={"help": "Seed of the noise and of calibration."})
    # Refuse a network if part of it would stay in float or be keyed more coarsely than the recipe asks for.
    strict: bool = field(
        default=False,
        metadata={
            "help": "Fail if anything would stay in float or be keyed more coarsely than the recipe asks for."
        },
    )
    # A folder for the finished parts of reconstruction, to resume from after an interruption.
    # None: keep nothing.
    state: str | Path | None = None
    # Where all stages compute, if the network does not lie there: each weight is copied there when it is read.
    # None: where the network lies.
    execution_device: str | None = field(
        default=None,
        metadata={
            "help": "Where all stages compute, such as cuda:0, while the network stays where it is: for one that does not fit there."
        },
    )

    def __post_init__(self) -> None:
        for name, value in (("timestep", self.timestep), ("component", self.component or "unet")):
            if not (isinstance(value, str) and value.isidentifier()):
                raise TFMQError(f"{name}: {value!r} is not a valid name; use a Python identifier.")
        if self.finite is not None and not isinstance(self.finite, Mapping):
            raise TFMQError(
                f"finite: {type(self.finite).__name__} is not a mapping; use {{NAME: VALUES}}, e.g. "
                '{"class_labels": range(10)}.'
            )
        check_seed(self.seed)
        if self.state is not None:
            require_type(self.state, (str, Path), "state", "name a folder")
            require_writable(Path(self.state) / "state.json")

    def arguments(self) -> dict[str, Any]:
        """Return the fields as keyword arguments of `quantize`: the values themselves, not copies."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
