"""What is said of a network before anything is quantized."""

import tfmq_fx
from benchmarks.networks.small import Tokens, calibration, make
from tfmq_fx.inspection import describe

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


def test_inspection_states_both():
    found = describe(
        make(Tokens),
        {"sample": X[:2], "timestep": T[:2]},
        tfmq_fx.Recipe(group_size=16, activation_granularity="token"),
    )
    down = next(layer for layer in found["layers"] if layer["path"] == "down.weight")
    assert (down["group_size"], down["activation_granularity"]) == (16, "token")
    assert {"mix.weight", "unpatch.weight"} <= {n["name"] for n in found["notes"]}
