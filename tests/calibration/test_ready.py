"""What is switched on in the float network is named before anything runs, with the call that mends it."""

import accelerate
import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import tfmq_fx
from benchmarks.networks.pipelines import ddpm, unet_text
from benchmarks.networks.small import TinyUNet, calibration, make
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.calibration.ready import require_ready


def offloaded(network):
    accelerate.cpu_offload_with_hook(network, execution_device="cpu")
    return network


def layerwise(network):
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    return network


def compiled_in_place(network):
    network.mid_block.compile()
    return network


def quantized(network):
    quantize_(network, Int8WeightOnlyConfig())
    return network


def in_bytes(network):
    network.conv_in.weight = nn.Parameter(network.conv_in.weight.to(torch.uint8), requires_grad=False)
    return network


def scattered(network):
    network.conv_out.to("meta")
    return network


def changed(change):
    def of(network):
        change(network)
        return network

    return of


WRONG = {
    "offload hook": (
        offloaded,
        r"offload hook \(CpuOffload\); call pipe.remove_all_hooks\(\), .* execution_device=",
    ),
    "layerwise casting": (layerwise, r"has diffusers' hook 'layerwise_casting'"),
    "slices": (
        changed(lambda n: n.set_attention_slice("max")),
        r"attn1 computes attention in slices .*pipe.disable_attention_slicing\(\)",
    ),
    "fused": (
        changed(lambda n: n.fuse_qkv_projections()),
        r"attn1.to_qkv is in train mode; call .eval\(\) .*fuse_qkv_projections\(\) made it so",
    ),
    "train mode": (changed(lambda n: n.mid_block.train()), r"mid_block is in train mode; call .eval\(\)"),
    "compiled": (torch.compile, r"the network is compiled; .* network._orig_mod"),
    "compiled in place": (compiled_in_place, "mid_block is compiled; load the network again"),
    "torchao": (quantized, r"weight .*: is quantized already \(Int8Tensor\); load the float network"),
    "bytes": (in_bytes, r"weight conv_in.weight: is quantized already \(torch.uint8\)"),
    "float64": (changed(lambda n: n.double()), r"is torch.float64, .* call network.float\(\)"),
    "two devices": (scattered, r"conv_out.bias on meta; move the network to one device"),
}


@pytest.mark.parametrize("name", WRONG)
def test_it_is_named_with_the_call_that_mends_it(name):
    change, words = WRONG[name]
    network = unet_text().eval()
    require_ready(network)
    with pytest.raises(TFMQError, match=words) as error:
        require_ready(change(network))
    assert "\n" not in str(error.value)


def test_the_calls_mend_it():
    network = unet_text().eval()
    network.set_attention_slice("max")
    network.set_attn_processor(unet_text().attn_processors)
    network.fuse_qkv_projections()
    network.eval()
    accelerate.hooks.remove_hook_from_module(offloaded(network), recurse=True)
    require_ready(network)
    require_ready(unet_text().eval().half())


def test_fused_projections_are_quantized_as_they_are():
    network = unet_text().eval()
    network.fuse_qkv_projections()
    example = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([1, 2]),
        "encoder_hidden_states": torch.randn(2, 8, network.config.cross_attention_dim),
        "return_dict": False,
    }
    gm = tfmq_fx.capture(network.eval(), example)
    assert any("attn1.to_qkv" in str(n.target) for n in gm.graph.nodes)
    with torch.no_grad():
        (expected,) = network(**example)
        assert torch.equal(gm(*[x for x in example.values() if isinstance(x, torch.Tensor)])[0], expected)


def test_nothing_has_run_by_then():
    pipe, calls = ddpm(), []
    pipe.unet.train()
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for call in (
        lambda: tfmq_fx.quantize(pipe),
        lambda: CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2),
        lambda: tfmq_fx.quantize(pipe.unet, calibration=calibration()),
        lambda: tfmq_fx.capture(make(TinyUNet).train(), {"timestep": torch.tensor([1])}),
    ):
        with pytest.raises(TFMQError, match="in train mode"):
            call()
    assert not calls
