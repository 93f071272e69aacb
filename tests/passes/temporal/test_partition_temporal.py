"""The temporal block as a module of its own."""

import torch
from torch.nn import functional as F

import tfmq_fx
from benchmarks.networks.small import TinyUNet, captured, make, sinusoid
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.passes import extract_temporal, find_temporal, partition_temporal


def find(network, **inputs):
    gm = tfmq_fx.capture(network.eval(), {"timestep": torch.tensor([3, 500]), **inputs})
    return gm, find_temporal(gm)


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
