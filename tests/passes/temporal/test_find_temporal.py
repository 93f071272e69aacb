import pytest
import torch
from torch import nn

import tfmq_fx
from benchmarks.networks.small import ScalarTime, TinyUNet, captured, make, sinusoid
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.graph.nodes import op_name, weight_argument
from tfmq_fx.graph.state import Captured, set_state
from tfmq_fx.passes import find_temporal
from tfmq_fx.passes.temporal.partition_temporal import extract_temporal


def find(network, **inputs):
    gm = tfmq_fx.capture(network.eval(), {"timestep": torch.tensor([3, 500]), **inputs})
    return gm, find_temporal(gm)


def feature_paths(gm, temporal):
    nodes = {n.name: n for n in gm.graph.nodes}
    return [
        str(nodes[f].args[weight_argument(nodes[f])].target).removesuffix(".weight")
        for f in temporal.features
    ]


def test_the_tiny_networks_features_are_its_embedding_layers():
    gm = captured(TinyUNet)
    assert feature_paths(gm, find_temporal(gm)) == ["down_block.emb", "up_block.emb"]


def test_the_demo_networks_features_are_every_residual_blocks_time_projection():
    unet = embedded_pipeline().unet
    gm, temporal = find(unet, sample=torch.randn(2, 1, 16, 16), return_dict=False)
    expected = {name for name, _ in unet.named_modules() if name.endswith("time_emb_proj")}
    assert set(feature_paths(gm, temporal)) == expected
    assert len(temporal.features) == len(expected) == 11


def test_a_scalar_timestep():
    gm = tfmq_fx.capture(make(ScalarTime), {"sample": torch.randn(2, 4), "timestep": torch.tensor(7)})
    assert feature_paths(gm, find_temporal(gm)) == ["time.2"]


def test_an_unknown_input_shows_the_names():
    with pytest.raises(
        TFMQError, match=r"timestep='t': the graph has no such input; its inputs are sample, timestep"
    ):
        find_temporal(captured(TinyUNet), timestep="t")


class OnlyShape(nn.Module):
    def forward(self, sample, timestep):
        return sample + torch.zeros(timestep.shape[0], 1)


class Unused(nn.Module):
    def forward(self, sample, timestep):  # noqa: ARG002
        return sample * 2


class Dropped(nn.Module):
    """The timestep is computed with, but the result goes nowhere."""

    def __init__(self):
        super().__init__()
        self.register_buffer("state", torch.zeros(()))

    def forward(self, sample, timestep):
        self.state.copy_((timestep * 2).sum())  # export keeps writes to buffers
        return sample * 2


class OnlyMixed(nn.Module):
    def forward(self, sample, timestep):
        return sample * timestep[:, None]


class MixedFirst(nn.Module):
    def forward(self, sample, timestep):
        return sample * timestep


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            OnlyShape(),
            r"timestep='timestep': only its shape, dtype or device is used \(by node sym_size_int\)",
        ),
        (Unused(), "baked in as a constant"),
        (Dropped(), "does not reach the output; its last use is node copy_"),
        (MixedFirst(), "no temporal block found; no value computed from timestep alone"),
    ],
)
def test_networks_without_a_temporal_block(network, words):
    gm = tfmq_fx.capture(
        network.eval(), {"sample": torch.randn(2), "timestep": torch.tensor([1, 2])}, "timestep"
    )
    with pytest.raises(TFMQError, match=words):
        find_temporal(gm)


def test_a_view_of_the_timestep_is_a_block_without_layers():
    gm = tfmq_fx.capture(OnlyMixed().eval(), {"sample": torch.randn(2, 3), "timestep": torch.tensor([1, 2])})
    assert len(find_temporal(gm).features) == 1
    with pytest.raises(TFMQError, match="nothing to quantize"):
        tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=torch.tensor([1, 2]))


class Preconditioned(nn.Module):
    """Karras et al. 2022: the network predicts what is left of the noise, and sigma scales what it sees and returns."""

    def __init__(self, inner, *, learned=False):
        super().__init__()
        self.inner, self.learned = inner, nn.Linear(1, 1) if learned else None

    def forward(self, sample, timestep):
        sigma = timestep.float().view(-1, 1)
        seen, skip = (1 + sigma**2).rsqrt(), 1 / (1 + sigma**2)
        gain = sigma * seen if self.learned is None else self.learned(sigma)
        return skip * sample + gain * self.inner(seen * sample, (sigma.log() / 4).flatten())


@pytest.mark.parametrize("learned", [False, True])
def test_the_scalars_by_which_a_sampler_scales_the_data_are_no_features(learned):
    gm, temporal = find(Preconditioned(make(ScalarTime), learned=learned), sample=torch.randn(2, 4))
    paths = ["inner.time.2", *["learned"] * learned]
    assert sorted(feature_paths(gm, temporal)) == paths
    block = extract_temporal(gm, temporal)
    assert not [n for n in block.graph.nodes if op_name(n) in ("rsqrt", "reciprocal")]


class Chosen(nn.Module):
    """Tokens to draw have one modulation, those of a picture to edit another; `late` adds a number from some timestep on."""

    def __init__(self):
        super().__init__()
        self.time, self.mod = nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("given", torch.tensor([False, False, True, True, True])[:, None])

    def forward(self, sample, timestep):
        emb = self.time(sinusoid(timestep, 8))
        drawn, given = self.mod(emb)[:, None], self.mod(torch.zeros_like(emb))[:, None]
        late = torch.where(timestep > 400, 1.5, 0.5)
        return sample * torch.where(self.given, given, drawn) * late[:, None, None]


def test_what_is_chosen_of_layers_for_each_token_is_no_feature_but_the_layers_are():
    gm, temporal = find(Chosen(), sample=torch.randn(2, 5, 3))
    assert feature_paths(gm, temporal) == ["mod"]


class TwoTimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, sample, t, r):
        return sample * self.a(sinusoid(t, 8)) + self.b(sinusoid(r, 8))


def test_a_network_instead_of_its_graph_is_refused():
    for timestep in (None, "timestep"):
        with pytest.raises(TFMQError, match="gm: expected GraphModule, found TinyUNet; capture the network"):
            find_temporal(make(TinyUNet), timestep=timestep)


def test_two_inputs_that_could_be_the_timestep_are_refused_until_one_is_named():
    inputs = {"sample": torch.randn(2, 3), "t": torch.tensor([1, 2]), "r": torch.tensor([3, 4])}
    with pytest.raises(
        TFMQError, match="timestep: not named, and t and r could be it; name it with timestep="
    ):
        tfmq_fx.capture(TwoTimes().eval(), inputs)
    gm = tfmq_fx.capture(TwoTimes().eval(), inputs, timestep="r")
    set_state(gm, Captured())
    with pytest.raises(TFMQError, match="t and r could be it"):
        find_temporal(gm)
    assert feature_paths(gm, find_temporal(gm, timestep="t", conditioning=())) == ["a"]


def test_the_only_input_that_can_be_the_timestep_needs_no_name():
    class OneTime(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 3)

        def forward(self, x, sigma):
            return x * self.a(sinusoid(sigma, 8))

    gm = tfmq_fx.capture(OneTime().eval(), {"x": torch.randn(2, 3), "sigma": torch.tensor([0.5, 2.0])})
    assert find_temporal(gm).timestep == "sigma"
