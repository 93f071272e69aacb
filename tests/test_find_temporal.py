import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tfmq_fx
from tests.networks import ScalarTime, TinyUNet, captured, make, sinusoid
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.errors import TFMQError
from tfmq_fx.graph import weight_argument
from tfmq_fx.passes import extract_temporal, find_temporal, partition_temporal
from tfmq_fx.passes.find_temporal import taint


def feature_paths(gm, temporal):
    nodes = {n.name: n for n in gm.graph.nodes}
    return [
        str(nodes[f].args[weight_argument(nodes[f])].target).removesuffix(".weight")
        for f in temporal.features
    ]


def find(network, **inputs):
    gm = tfmq_fx.capture(network.eval(), {"timestep": torch.tensor([3, 500]), **inputs})
    return gm, find_temporal(gm)


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


def test_the_block_alone_is_a_function_of_the_timestep():
    network = make(TinyUNet)
    gm = captured(TinyUNet)
    block = extract_temporal(gm, find_temporal(gm))
    t = torch.tensor([7, 400, 999])
    with torch.no_grad():
        emb = F.silu(network.time_mlp(sinusoid(t, network.emb_dim)))
        for got, layer in zip(block(t), (network.down_block.emb, network.up_block.emb), strict=True):
            torch.testing.assert_close(got, layer(emb))


def test_partitioning_is_bitwise_and_idempotent():
    gm = captured(TinyUNet)
    x, t = torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 5])
    temporal = find_temporal(gm)
    with torch.no_grad():
        before = gm(x, t)
        assert partition_temporal(gm, temporal=temporal).modified
        assert torch.equal(gm(x, t), before)
    assert not partition_temporal(gm, temporal=temporal).modified
    calls = [(n.target, [str(i) for i in n.all_input_nodes]) for n in gm.graph.nodes if n.op == "call_module"]
    assert calls == [("temporal_block", ["timestep"])]
    outside = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    assert not any("emb" in name or "time_mlp" in name for name in outside)


def test_partitioning_the_demo_network_is_bitwise():
    unet = embedded_pipeline().unet
    gm, temporal = find(unet, sample=torch.randn(2, 1, 16, 16), return_dict=False)
    x, t = torch.randn(3, 1, 16, 16), torch.tensor([0, 999, 40])
    with torch.no_grad():
        expected = unet(x, t).sample
        partition_temporal(gm, temporal=temporal)
        assert torch.equal(gm(x, t)[0], expected)


class Conditioned(nn.Module):
    """Shape-only use of the sample, a class label that joins behind the time MLP, casts, views and chunks."""

    def __init__(self):
        super().__init__()
        self.time, self.label = nn.Linear(8, 8), nn.Embedding(10, 8)
        self.scale_shift, self.body = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, sample, timestep, label):
        batch = sample.shape[0]
        t = timestep.to(sample.dtype) * torch.ones_like(sample[:, 0]) + torch.zeros(batch, dtype=sample.dtype)
        emb = self.time(sinusoid(t.detach(), 8)) + self.label(label)
        scale, shift = self.scale_shift(F.silu(emb)).chunk(2, dim=1)
        return self.body(sample) * (1 + scale) + shift


def test_shape_dtype_and_like_do_not_taint_but_a_label_does():
    gm, temporal = find(Conditioned(), sample=torch.randn(2, 4), label=torch.tensor([1, 2]))
    assert feature_paths(gm, temporal) == ["time"]
    marks = {n.name: m for n, m in taint(gm).items()}
    scale_shift = next(
        n.name
        for n in gm.graph.nodes
        if n.op == "call_function" and any("scale_shift" in str(i) for i in n.all_input_nodes)
    )
    assert marks[scale_shift] == {"timestep", "label"}
    extract_temporal(gm, temporal)(torch.tensor([3, 4]))


def test_an_in_place_write_taints_every_alias():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.time, self.body = nn.Linear(8, 4), nn.Linear(4, 4)

        def forward(self, sample, timestep):
            emb = self.time(sinusoid(timestep, 8))
            buffer = torch.zeros(emb.shape[0], 4)
            view = buffer[:, :2]
            buffer.add_(self.body(sample))
            return self.body(emb) * view.sum()

    gm, temporal = find(Writes(), sample=torch.randn(2, 4))
    marks = taint(gm)
    total = next(n for n in gm.graph.nodes if "sum" in n.name)
    assert "sample" in marks[total]
    assert feature_paths(gm, temporal) == ["body"]


def test_an_unknown_input_shows_the_names():
    with pytest.raises(
        TFMQError, match=r"timestep='t': the graph has no such input; its inputs are sample, timestep"
    ):
        find_temporal(captured(TinyUNet), timestep="t")


class NoTime(nn.Module):
    def forward(self, sample, timestep):
        return sample + torch.zeros(timestep.shape[0], 1)


class Unused(nn.Module):
    def forward(self, sample, timestep):  # noqa: ARG002
        return sample * 2


class OnlyMixed(nn.Module):
    def forward(self, sample, timestep):
        return sample * timestep[:, None]


@pytest.mark.parametrize(
    ("network", "words"),
    [(NoTime(), "no temporal block"), (Unused(), "baked in as a constant"), (OnlyMixed(), None)],
)
def test_networks_without_a_temporal_block(network, words):
    gm = tfmq_fx.capture(network.eval(), {"sample": torch.randn(2, 3), "timestep": torch.tensor([1, 2])})
    if words is None:  # a view of t is a value of t alone, but no layer: nothing that could be quantized
        assert len(find_temporal(gm).features) == 1
        with pytest.raises(TFMQError, match="nothing to quantize"):
            tfmq_fx.prepare(gm, tfmq_fx.Recipe.preset("w4a8"), timesteps=torch.tensor([1, 2]))
    else:
        with pytest.raises(TFMQError, match=words):
            find_temporal(gm)
