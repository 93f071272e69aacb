"""The manager that knows what must come before what."""

from functools import partial

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration
from tests.helpers.graphs import RECIPE, exported
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes import PassManager, partition_temporal, remove_noops, root_batch_size
from tfmq_fx.passes.quantize.state import state_of


def test_our_manager_lists_every_violation_before_anything_runs():
    ran = []
    gm, _ = exported()

    def note(gm):
        ran.append(gm)

    order = [
        note,
        tfmq_fx.convert,
        partition_temporal,
        partial(tfmq_fx.prepare, recipe=RECIPE, timesteps=TIMESTEPS),
        root_batch_size,
    ]
    with pytest.raises(TFMQError) as error:
        PassManager(order)(gm)
    assert str(error.value) == (
        "passes: convert needs calibrate before it; root_batch_size must come before partition_temporal; "
        "prepare must come before partition_temporal; root_batch_size must come before prepare."
    )
    assert not ran


def test_a_pass_added_later_is_checked_too():
    gm, _ = exported()
    manager = PassManager([remove_noops])
    manager.add_pass(tfmq_fx.convert)
    with pytest.raises(TFMQError, match="passes: convert needs calibrate before it"):
        manager(gm)


def test_our_manager_goes_on_from_where_the_graph_stands():
    gm, _ = exported()
    prepared = tfmq_fx.prepare(gm, RECIPE, timesteps=TIMESTEPS)
    result = PassManager([partial(tfmq_fx.calibrate, calibration=calibration()), tfmq_fx.convert])(prepared)
    assert state_of(result.graph_module).stage == "converted"


def test_a_passs_own_error_comes_through():
    gm, _ = exported()
    with pytest.raises(TFMQError, match="timesteps: found repeated values"):
        PassManager([partial(tfmq_fx.prepare, recipe=RECIPE, timesteps=torch.tensor([1, 1]))])(gm)


def test_any_other_error_comes_through_with_the_name_of_its_pass():
    gm, _ = exported()

    def looks_up(_gm):
        return {}["missing"]

    with pytest.raises(KeyError, match="missing") as error:
        PassManager([remove_noops, looks_up])(gm)
    (note,) = error.value.__notes__
    assert note == "passes: this was looks_up, after ['remove_noops']."


def test_the_names_are_told_to_whoever_listens_when_each_pass_has_run():
    gm, _ = exported()
    heard = []

    def renames(gm):
        next(iter(gm.graph.nodes)).name = "first"
        return gm

    manager = PassManager(
        [remove_noops, partial(root_batch_size, timestep="timestep"), renames], done=heard.append
    )
    assert manager.names == ["remove_noops", "root_batch_size", "renames"]
    manager(gm)
    assert heard == manager.names
    assert manager.changed == ["renames"]
