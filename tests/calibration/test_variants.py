"""Plain arguments that only some calls have, such as the layers that a guidance skips: each row as its call was."""

import copy
import functools

import diffusers
import pytest
import torch
from torch import nn

import tfmq_fx
from tests.helpers.lowered import lower
from tests.helpers.nearest import recipe
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet


class Skips(nn.Module):
    """Blocks that a call may skip, an output that it may scale, and nothing else that depends on its arguments."""

    def __init__(self):
        super().__init__()
        self.time, self.blocks = nn.Linear(1, 8), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.out = nn.Linear(8, 8)

    def forward(self, sample, timestep, skip_layers=None, options=None):
        x = sample + self.time(timestep.expand(sample.shape[0])[:, None].float() / 1000)[:, None]
        for i, block in enumerate(self.blocks):
            if i not in (skip_layers or ()):
                x = x + block(x).sin()
        return self.out(x) * (options or {}).get("scale", 1.0)


class Skipping(diffusers.DiffusionPipeline):  # type: ignore[misc]
    """A loop that guides itself by its network without a layer, in some steps."""

    def __init__(self, unet):
        super().__init__()
        self.register_modules(unet=unet)

    @torch.no_grad()
    def __call__(self, batch_size=1, num_inference_steps=3, generator=None, skip=(1,), scale=None):
        x = torch.randn(batch_size, 5, 8, generator=generator)
        for i in range(num_inference_steps):
            t = torch.tensor(900 - 300 * i)
            new = self.unet(x, t)
            if skip and i > 0:
                new = new + 2 * (new - self.unet(x, t, skip_layers=list(skip)))
            if scale is not None:
                new = new + self.unet(x, t, options={"scale": scale})
            x = x - 0.1 * new
        return {"latents": x}


def skipping():
    torch.manual_seed(0)
    return Skipping(Skips().eval())


@functools.cache
def recorded(**given):
    pipe = skipping()
    return pipe, CalibrationSet.record(pipe, num_samples=3, num_inference_steps=3, **given)


@functools.cache
def quantized(**given):
    pipe, data = recorded(**given)
    return tfmq_fx.quantize(pipe, recipe("w8a8"), calibration=data)


def drawn(pipe, unet=None, **given):
    pipe = copy.copy(pipe)
    pipe.unet = pipe.unet if unet is None else unet
    return pipe(2, generator=torch.Generator().manual_seed(3), **given)["latents"]


def off(a, b):
    return float((a - b).norm() / b.norm())


def test_each_row_says_which_call_it_is_of():
    _, data = recorded(scale=0.5)
    assert data.others == ({"options_scale": 0.5}, {"skip_layers_0": 1})
    kinds = [0, 1, 0, 2, 1, 0, 2, 1]
    assert data.tensors["variant_rows"].tolist() == [k for k in kinds for _ in range(3)]
    assert data.rows(torch.tensor([9, 0])).others == data.others
    assert recorded(skip=())[1].others == ()


def test_the_network_computes_rows_of_all_kinds_beside_each_other():
    pipe, data = recorded(scale=0.5)
    x, t = data.tensors["sample"][:6], torch.full((6,), 300)
    kinds = torch.tensor([0, 1, 2, 2, 1, 0])
    found = data.row_wise(pipe.unet)(x, t, variant_rows=kinds)
    of_kind = pipe.unet(x, t), pipe.unet(x, t, options={"scale": 0.5}), pipe.unet(x, t, [1])
    assert torch.equal(found, torch.stack([of_kind[k][i] for i, k in enumerate(kinds)]))


def test_the_graph_has_each_layer_once():
    q = quantized(scale=0.5)
    layers = [layer["path"] for layer in q.report["layers"]]
    assert sorted(layers) == sorted(n for n, p in skipping().unet.named_parameters() if p.dim() == 2)
    (note,) = [n for n in q.report["notes"] if n["name"] == "calibration"]
    assert note["reason"].startswith("options_scale, skip_layers_0: not the same in all calls of the network")


@pytest.mark.parametrize("given", [{}, {"skip": ()}, {"scale": 0.5}])
def test_every_kind_of_call_is_computed_as_in_the_float_network(given, tmp_path):
    q = quantized(scale=0.5)
    pipe, _ = recorded(scale=0.5)
    expected, found = drawn(pipe, **given), drawn(pipe, q, **given)
    # 8 bits: the bound of the other small networks. The three ways of sampling are further apart.
    assert off(found, expected) < 0.01
    others = [drawn(pipe, **other) for other in ({}, {"skip": ()}, {"scale": 0.5}) if other != given]
    assert min(off(x, expected) for x in others) > 0.03
    q.save_pretrained(tmp_path / "q")
    again = tfmq_fx.load(tmp_path / "q")
    assert torch.equal(drawn(pipe, again, **given), found)
    assert (
        off(drawn(pipe, lower(again, engine="torch", precision="float32", compile=False), **given), found)
        < 1e-5
    )


def test_another_value_is_refused_with_those_that_work():
    q, x = quantized(scale=0.5), torch.zeros(2, 5, 8)
    with pytest.raises(
        TFMQError, match="forward: 'skip_layers_0' was None or 1 when the network was captured"
    ):
        q(x, torch.tensor(600), skip_layers=[2])
    with pytest.raises(TFMQError, match="forward: 'skip_layers_0' was None or 1"):
        q(x, torch.tensor(600), skip_layers=[1], options={"scale": 0.5})  # each was calibrated, not both


def test_a_recording_is_kept_with_its_kinds(tmp_path):
    _, data = recorded()
    for _ in range(2):
        kept = CalibrationSet.record(
            skipping(), num_samples=3, num_inference_steps=3, cache=tmp_path, deterministic=True
        )
        assert list(kept.others) == [{"skip_layers_0": 1}]
        assert torch.equal(kept.tensors["variant_rows"], data.tensors["variant_rows"])


class Mixes(Skips):
    """A network whose rows depend on the other rows of their call."""

    def forward(self, sample, timestep, skip_layers=None, options=None):
        x = super().forward(sample, timestep, skip_layers, options)
        return x - x.mean(0, keepdim=True)


def test_a_network_that_mixes_rows_is_refused():
    pipe = Skipping(Mixes().eval())
    data = CalibrationSet.record(pipe, num_samples=3, num_inference_steps=3)
    with pytest.raises(
        TFMQError,
        match="Mixes: computes rows with other values of skip_layers_0 in a way that cannot be told",
    ):
        tfmq_fx.quantize(pipe, recipe("w8a8"), calibration=data)
