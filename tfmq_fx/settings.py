"""What `quantize` is told beside the recipe and the data: one frozen value, of the function and of the command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

from tfmq_fx.base.errors import TFMQError

LARGEST_SEED = 2**43  # a million seeds are derived from one, and torch's generators take 64 bits


def check_seed(seed: Any, argument: str = "seed") -> None:
    """Raise TFMQError, which names the argument, for what is no whole number of at most 2**43 in size."""
    if not isinstance(seed, Integral) or abs(int(seed)) > LARGEST_SEED:
        raise TFMQError(f"{argument}: {seed!r} is no whole number from -2**43 to 2**43.")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one network is quantized, whatever the recipe. Raises TFMQError for a value that cannot be meant.

    A field whose metadata has "help" is an option of `tfmq quantize`, with those words.
    """

    # The name of the network's argument that has the timestep: one word.
    timestep: str = "timestep"
    # The name of the pipeline's component to quantize. None: the one that takes `timestep`.
    component: str | None = None
    # Other inputs with finitely many values, name -> its values, which join the timestep in the key. None: none.
    finite: Mapping[str, Any] | None = field(
        default=None,
        metadata={"help": "An input with finitely many values, as NAME=JSON, e.g. class_labels=[0,1,2]."},
    )
    # Of every random number; the same seed gives the same integers.
    seed: int = field(default=0, metadata={"help": "Seed of noise and of calibration."})
    # Refuse a network of which something would stay in float or be keyed more coarsely than the recipe asks for.
    strict: bool = field(
        default=False,
        metadata={"help": "Refuse what would stay in float or be keyed more coarsely than asked for."},
    )
    # A folder that keeps what reconstruction has finished, to go on from after an interruption. None: nothing is kept.
    state: str | Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("timestep", self.timestep), ("component", self.component or "unet")):
            if not (isinstance(value, str) and value.isidentifier()):
                raise TFMQError(f"{name}: {value!r} is no name of an argument or component.")
        if self.finite is not None and not isinstance(self.finite, Mapping):
            raise TFMQError(
                f"finite: {type(self.finite).__name__} is no mapping; use {{NAME: VALUES}}, e.g. "
                '{"class_labels": range(10)}.'
            )
        check_seed(self.seed)

    def arguments(self) -> dict[str, Any]:
        """Return the fields by name, as `quantize` takes them: the values themselves, not copies."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
