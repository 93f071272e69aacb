"""A quantized network in diffusers' hands: configs, casts, moves, offload hooks, adapters, exchanged schedulers."""

import dataclasses
import subprocess
import sys

import accelerate
import diffusers
import pytest
import torch
from diffusers.quantizers import PipelineQuantizationConfig
from peft import LoraConfig

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, PROMPTS, saved
from tfmq_fx.artefact.quantized_graph import example_inputs
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.calibration.data import CalibrationSet
from tfmq_fx.evaluation.sampling import sample, swapped
from tfmq_fx.passes import move_to_device

(SD,) = [e for e in PIPELINES if e.name == "sd"]
# Nothing is chosen: that takes as long as all the rest.
NEAREST = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))
ARGUMENTS = {"prompt": PROMPTS, "height": 16, "width": 16}
# diffusers' own, on this torch and numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return saved(SD, tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def data(sd):
    return CalibrationSet.record(sd, num_samples=3, num_inference_steps=4, **ARGUMENTS)


@pytest.fixture(scope="module")
def q(sd, data):
    return tfmq_fx.quantize(sd, NEAREST, calibration=data)


@pytest.fixture
def folder(q, tmp_path):
    q.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def draw(pipe, network=None):
    return sample(pipe, network, num_samples=3, num_inference_steps=4, seed=1, **ARGUMENTS)


def test_the_door_opens_whichever_is_imported_first(folder):
    assert (
        type(diffusers.UNet2DConditionModel.from_pretrained(folder)) is tfmq_fx.QuantizedModel
    )  # tfmq_fx, above
    code = (
        "import diffusers, diffusers.quantizers; import tfmq_fx; from diffusers import UNet2DConditionModel as U; "
        f"assert type(U.from_pretrained({str(folder)!r})) is tfmq_fx.QuantizedModel"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)


def test_a_float_network_with_a_quantization_config_is_refused_with_the_way_to_go(sd, tmp_path):
    sd.save_pretrained(tmp_path / "pipe")
    config = tfmq_fx.TFMQConfig("w4a8")
    with pytest.raises(
        TFMQError, match=r"needs calibration, .*pipe\.unet = tfmq_fx\.quantize\(pipe, config\.to_recipe"
    ):
        diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "pipe" / "unet", quantization_config=config)
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    with pytest.raises(TFMQError, match="needs calibration"):
        diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", quantization_config=mapping)


def test_a_config_without_a_recipe_is_refused():
    with pytest.raises(TFMQError, match="'w4a9' is not a preset; presets are w4a8"):
        tfmq_fx.TFMQConfig("w4a9")
    assert tfmq_fx.TFMQConfig(NEAREST.to_json()).recipe == NEAREST.to_json()


def test_modules_to_not_convert_stay_float(sd, data):
    config = tfmq_fx.TFMQConfig("w8a8", modules_to_not_convert=["conv_out", "attn2", "down_blocks.0"])
    recipe = dataclasses.replace(config.to_recipe(sd.unet), reconstruction=NEAREST.reconstruction)
    q = tfmq_fx.quantize(sd, recipe, calibration=data)
    quantized = {layer["path"] for layer in q.report["layers"] if layer["weight_bits"] < 16}
    kept = {
        p
        for p, _ in sd.unet.named_parameters()
        if p.startswith(("conv_out.", "down_blocks.0.")) or ".attn2." in p
    }
    assert quantized
    assert kept
    assert not quantized & kept
    with pytest.raises(
        TFMQError, match=r"modules_to_not_convert: no module 'conv_ou'; nearest are .*conv_out"
    ):
        tfmq_fx.TFMQConfig(modules_to_not_convert=["conv_ou"]).to_recipe(sd.unet)


def test_a_type_is_chosen_at_loading_and_after(sd, q, folder, tmp_path):
    half = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float16)
    assert half.dtype == torch.float16
    assert torch.equal(
        half.state_dict()["network.conv_in.weight_q"], q.state_dict()["network.conv_in.weight_q"]
    )
    with pytest.raises(TFMQError, match="device_map=auto: a quantized network loads on the CPU"):
        diffusers.UNet2DConditionModel.from_pretrained(folder, device_map="auto")
    with swapped(sd, q):
        sd.save_pretrained(tmp_path / "pipe")
        sd.to("cpu", torch.float32)
    found = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", torch_dtype=torch.bfloat16)
    assert found.unet.dtype == torch.bfloat16
    assert found.to(torch.float32).unet.dtype == torch.float32


def test_a_network_moves_to_another_device(folder):
    moved = tfmq_fx.load(folder).to("meta")
    inputs = [x.to("meta") for x in example_inputs(moved, batch=2).values()]
    assert {x.device.type for x in moved.network(*inputs)} == {"meta"}
    assert moved.device.type == "meta"
    assert move_to_device(moved.network, device=torch.device("meta")).modified is False


def test_offload_hooks_and_slicing_change_nothing(sd, q, folder):
    expected = draw(sd, q)
    hooked = tfmq_fx.load(folder)
    accelerate.cpu_offload_with_hook(hooked, execution_device="cpu")
    assert torch.equal(draw(sd, hooked), expected)
    sequential = tfmq_fx.load(folder)
    accelerate.cpu_offload(sequential, execution_device="cpu")
    assert torch.equal(draw(sd, sequential), expected)
    with swapped(sd, q):
        sd.enable_attention_slicing()
        sd.disable_attention_slicing()
    assert torch.equal(draw(sd, q), expected)


def test_slicing_without_effect_is_said(q, caplog):
    with caplog.at_level("WARNING", logger="tfmq_fx.artefact.drop_in"):
        q.set_attention_slice("auto")
    assert "attention is fixed in the captured graph" in caplog.text


def test_an_exchanged_scheduler_runs_and_its_timesteps_are_counted(sd, folder):
    model, own = tfmq_fx.load(folder), sd.scheduler
    sd.scheduler = diffusers.UniPCMultistepScheduler.from_config(own.config)
    try:
        assert torch.isfinite(draw(sd, model)).all()
        new = {str(int(t)) for t in sd.scheduler.timesteps} - {str(int(t)) for t in model.timesteps}
    finally:
        sd.scheduler = own
    assert new
    assert set(model.report["unseen_timesteps"]) == new


def test_adapters_are_fused_before_or_refused(sd, data, q, tmp_path):
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    plain = draw(sd)
    sd.unet.add_adapter(config)
    adapted = draw(sd)
    with pytest.raises(TFMQError, match=r"the network has adapters .*fuse_lora"):
        tfmq_fx.quantize(sd, NEAREST, calibration=data)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path, unet_lora_layers=_lora_layers(sd.unet), safe_serialization=True
    )
    with swapped(sd, q), pytest.raises(TFMQError, match="LoRA: a quantized network takes no adapters"):
        sd.load_lora_weights(tmp_path)
    sd.unet.fuse_lora()
    sd.unet.unload_lora()
    assert not torch.allclose(adapted, plain, atol=1e-3)
    torch.testing.assert_close(draw(sd), adapted, atol=1e-4, rtol=0)
    fused = tfmq_fx.quantize(sd, NEAREST, calibration=data)
    images = draw(sd, fused)
    assert (images - adapted).square().mean() < (images - plain).square().mean()


def _lora_layers(network):
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(network)


def test_attributes_of_the_float_networks_modules_are_kept(sd, q, folder):
    for model in (q, tfmq_fx.load(folder)):
        assert model.time_embedding.linear_1.in_features == sd.unet.time_embedding.linear_1.in_features
        assert (
            model.down_blocks[1].attentions[0].out_channels
            == sd.unet.down_blocks[1].attentions[0].out_channels
        )
        assert model.attn_processors.keys() == sd.unet.attn_processors.keys()
        with pytest.raises(IndexError, match=r"down_blocks\[7\]: the float network has 2 modules there"):
            _ = model.down_blocks[7]
