"""Every stage on a device that refuses tensors of another: the same integers as on the CPU."""

import copy
import dataclasses
import tempfile
from contextlib import nullcontext

import pytest
import torch
from torch.fx import GraphModule

import tfmq_fx
from benchmarks.networks.small import (
    CALIBRATION,
    FAST,
    TIMESTEPS,
    Labelled,
    Sized,
    TinyUNet,
    Tokens,
    make,
)
from tests.helpers.elsewhere import DEVICE, Elsewhere, MixedDevices, device, moved
from tests.helpers.precomputed import BETWEEN, Wide, example, placed, precomputed
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.interface import Interface
from tfmq_fx.capturing.calibrated import captured
from tfmq_fx.choices import choose
from tfmq_fx.evaluation.errors import measure_errors
from tfmq_fx.graph.nodes import attribute, fresh
from tfmq_fx.passes.clean.move_to_device import move_to_device
from tfmq_fx.passes.pass_manager import PassManager
from tfmq_fx.passes.temporal.find_temporal import find_temporal
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal
from tfmq_fx.pipeline import stages
from tfmq_fx.reconstruction.spill import Budget, Values

LEARNED = dataclasses.replace(FAST, iterations=3, temporal_iterations=3, tune_iterations=3, shards=1)
GPTQ = dataclasses.replace(LEARNED, method="gptq", temporal_method="gptq", tune_iterations=0)
NEAREST = dataclasses.replace(LEARNED, method="nearest", tune_iterations=0)
FINITE = {Labelled: {"class_labels": range(Labelled.classes)}}
RECIPES = {
    "default": {},
    "w4a4": {"activation_bits": 4, "smooth": 0.5, "rotate": 4, "low_rank": 2},
    "keyed": {"keyed": "all", "shared_zero_point": True, "unseen": "float", "group_size": 8},
    "cached": {"maintain": "cache", "cache_type": "int8", "activation_granularity": "token"},
    "chosen": {"maintain": "auto", "attention_bits": 8},
    "looking": {
        "smooth": "auto",
        "keyed": "auto",
        "float_flops": 0.1,
        "double_flops": 0.1,
        "float_bytes": 0.1,
    },
    "two terms": {"rules": (tfmq_fx.Rule(pattern="mid*", activation_terms=2),)},
    **{name: {"temporal_observer": name} for name in ("mse", "kl", "percentile")},
}
CASES = [
    (Labelled, "default", LEARNED),
    (Labelled, "default", GPTQ),
    (Labelled, "keyed", NEAREST),
    (Labelled, "two terms", NEAREST),
    (Labelled, "cached", LEARNED),
    (Labelled, "chosen", NEAREST),
    (Labelled, "looking", NEAREST),
    (Sized, "default", NEAREST),
    (Tokens, "w4a4", NEAREST),
    *((Labelled, name, NEAREST) for name in ("mse", "kl", "percentile")),
]


def graphs(cls):
    """The captured network on the CPU, and on the other device."""
    data = CALIBRATION[cls]()
    here, _, _ = captured(make(cls), data, "timestep")
    there, _, _ = captured(make(cls).to(DEVICE), data, "timestep")
    for target in {str(n.target) for n in there.graph.find_nodes(op="get_attr")}:
        *path, name = target.split(".")
        setattr(there.get_submodule(".".join(path)), name, attribute(here, target))
    return here, moved(there)


def run(gm, cls, recipe):
    data = CALIBRATION[cls]()
    settings = tfmq_fx.settings.Settings(finite=FINITE.get(cls))
    temporal = find_temporal(gm, timestep="timestep", finite=settings.finite or ())
    block = extract_temporal(fresh(gm), temporal)
    chosen = choose(gm, recipe, data, temporal=temporal)
    passes = stages(
        chosen.recipe,
        calibration=data,
        temporal=temporal,
        block=block,
        maxima=chosen.maxima,
        settings=settings,
    )
    converted = PassManager(passes)(fresh(gm)).graph_module
    assert isinstance(converted, GraphModule)
    return converted, measure_errors(gm, converted, data, block=block)


def test_rows_that_lie_there_are_drawn_and_grouped():
    data = CALIBRATION[TinyUNet]()
    with device():
        there = tfmq_fx.CalibrationSet.from_tensors({n: x.to(DEVICE) for n, x in data.tensors.items()})
        for one_timestep in (False, True):
            pairs = zip(
                there.batches(7, one_timestep=one_timestep),
                data.batches(7, one_timestep=one_timestep),
                strict=True,
            )
            for batch, expected in pairs:
                assert all(torch.equal(batch[n].cpu(), x) for n, x in expected.items())
        assert torch.equal(there.draw(11, seed=3), data.draw(11, seed=3))


@pytest.mark.parametrize(("cls", "name", "reconstruction"), CASES)
def test_all_stages_give_the_same_integers(cls, name, reconstruction):
    recipe = dataclasses.replace(tfmq_fx.Recipe(), **RECIPES[name], reconstruction=reconstruction)
    here, there = graphs(cls)
    expected, errors = run(here, cls, recipe)
    with device():
        found, found_errors = run(there, cls, recipe)
    tensors = tensors_of(found)
    assert {type(x) for x in tensors.values()} <= {Elsewhere, torch.nn.Parameter}
    assert {x.device for x in tensors.values()} == {DEVICE}
    for path, x in tensors_of(expected).items():
        y = tensors[path].cpu()
        # Attention has another kernel there: scales and factors that depend on it differ in their last bits.
        rtol = max(1e-4, torch.finfo(x.dtype).eps) if x.is_floating_point() else 0.0
        assert torch.equal(x, y) or (rtol and torch.allclose(x, y, rtol=rtol, atol=1e-6)), path
    for a, b in zip(found_errors.by_timestep, errors.by_timestep, strict=True):
        assert a == pytest.approx(b, rel=1e-2, abs=1e-9)


def test_a_quantized_network_is_called_and_saved_there(tmp_path):
    recipe = tfmq_fx.Recipe(reconstruction=NEAREST, unseen="error")
    parts, data = {}, CALIBRATION[TinyUNet]()
    for place, gm in zip(("here", "there"), graphs(TinyUNet), strict=True):
        with device() if place == "there" else nullcontext():
            converted, _ = run(gm, TinyUNet, recipe)
            face = Interface.of(make(TinyUNet), gm, data.arguments(slice(0, 2)), None)
            q = tfmq_fx.QuantizedModel(
                converted,
                interface=face,
                timesteps=data.timesteps,
                config={},
                recipe=recipe.to_json(),
                report={},
            )
            x = data.tensors["sample"][:4]
            x = x.to(DEVICE) if place == "there" else x
            parts[place] = q(x, 300).cpu()
            assert q.device == x.device
            q.save_pretrained(tmp_path / place)
    torch.testing.assert_close(parts["there"], parts["here"])  # attention has another kernel there
    loaded = tfmq_fx.load(tmp_path / "there")(data.tensors["sample"][:4], 300)
    torch.testing.assert_close(loaded, parts["here"])


@pytest.mark.parametrize("place", ["cpu", "device"])
def test_the_block_of_a_precomputed_network_stays_or_comes_along(place):
    model = placed(precomputed(Wide), place)
    cases = [TIMESTEPS[:2], torch.tensor([BETWEEN, 0])]
    given = [{**example(Wide), "timestep": t} for t in cases]
    with torch.no_grad():
        expected = [model(**x) for x in given]
    copied = copy.deepcopy(model)  # without tables of requests
    with device(), torch.no_grad():
        moved(copied.network)
        move_to_device(copied.network, device=DEVICE)
        copied.outside.follow(DEVICE)
        assert copied.outside.device.type == ("cpu" if place == "cpu" else DEVICE.type)
        for x, output in zip(given, expected, strict=True):
            found = copied(**{n: value.to(DEVICE) for n, value in x.items()})
            assert found.device == DEVICE
            assert torch.equal(found.cpu(), output)


def test_streams_on_disk_come_back_to_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    node = torch.fx.Graph().placeholder("x")
    with device(), Budget(0) as budget:
        values = Values(budget)
        values[node] = torch.ones(3, device=DEVICE)
        assert budget.spilled
        assert values[node].device == DEVICE


def test_the_device_refuses_others():
    with device():
        x = torch.ones(3).to(DEVICE)
        with pytest.raises(MixedDevices, match=r"aten\.add\.Tensor"):
            x + torch.ones(3)
        assert x[torch.tensor([0])].device == (x + torch.tensor(1)).device == DEVICE
