"""The trained models of benchmarks/zoo: their folders, what their pipelines draw, and quantizing them."""

import json

import pytest
import torch

import tfmq_fx
from benchmarks.digits import digits as real_digits
from benchmarks.zoo import dit_digits, flow_digits, ldm_shapes
from benchmarks.zoo.dit_digits import dit_digits_pipeline
from benchmarks.zoo.flow_digits import flow_digits_pipeline
from benchmarks.zoo.ldm_shapes import ldm_shapes_pipeline
from benchmarks.zoo.shapes import CLOSE, PROMPTS, as_asked, judge
from benchmarks.zoo.shapes import draw as drawn_shapes
from tfmq_fx.base.metrics import psnr, psnr_by_image
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.passes.quantize.state import state_of

STEPS = 10
LABELS = list(range(10))
# Nothing is chosen: that takes as long as all the rest.
W8A8 = tfmq_fx.Recipe(weight_bits=8, reconstruction=tfmq_fx.Reconstruction(method="nearest"))


@pytest.fixture(scope="module")
def dit():
    pipe = dit_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, network=None, **kwargs):
    return sample(pipe, network, num_samples=30, num_inference_steps=STEPS, seed=3, **kwargs)


@pytest.fixture(scope="module")
def reference(dit):
    return draw(dit, class_labels=LABELS)


@pytest.mark.parametrize(
    ("folder", "components"),
    [
        (dit_digits.FOLDER, {"transformer": "DiTTransformer2DModel"}),
        (ldm_shapes.FOLDER, {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}),
        (flow_digits.FOLDER, {"unet": "UNet2DModel"}),
    ],
    ids=["dit-digits", "ldm-shapes", "flow-digits"],
)
def test_the_folder_is_small_and_in_diffusers_format(folder, components):
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 8e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    for component, name in components.items():
        assert json.loads((folder / component / "config.json").read_text())["_class_name"] == name


def nearest_digit(images):
    """Label of the nearest real digit (98.8% right, leaving each digit itself out), and the distance to it."""
    real, labels = real_digits()
    distance, row = torch.cdist(images.flatten(1), real.flatten(1)).min(1)
    return labels[row], distance


def test_samples_show_the_digit_asked_for(reference):
    # The nearest real digit takes no training, unlike the classifier.
    label, _ = nearest_digit(reference)
    asked = torch.tensor(LABELS).repeat(3)
    # Chance is 3 of 30.
    assert (label == asked).sum() >= 27


def test_labels_are_repeated_drawn_and_checked(dit):
    run = {"num_inference_steps": 2, "output_type": "pt", "guidance_scale": 1.0}

    def images(**kwargs):
        return dit(generator=torch.Generator().manual_seed(0), **run, **kwargs).images

    assert torch.equal(images(class_labels=[3, 7], batch_size=4), images(class_labels=[3, 7, 3, 7]))
    assert torch.equal(images(class_labels=5), images(class_labels=torch.tensor([5])))
    for wrong in (11, [], [-1, 2]):
        with pytest.raises(ValueError, match="class_labels"):
            images(class_labels=wrong)
    data = tfmq_fx.CalibrationSet.record(dit, num_samples=20, num_inference_steps=1, guidance_scale=1.0)
    assert torch.bincount(data.tensors["class_labels"]).tolist() == [2] * 10
    guided = tfmq_fx.CalibrationSet.record(dit, num_samples=20, num_inference_steps=1)
    assert torch.bincount(guided.tensors["class_labels"]).tolist() == [2] * 10 + [20]
    assert torch.equal(guided.tensors["hidden_states"][:20], data.tensors["hidden_states"])


def test_it_is_quantized_with_a_table_of_timesteps_and_labels(dit, reference):
    data = tfmq_fx.CalibrationSet.record(dit, num_samples=10, num_inference_steps=STEPS, class_labels=LABELS)
    q = tfmq_fx.quantize(dit, W8A8, calibration=data, finite={"class_labels": range(11)})
    assert q.report["temporal_block"]["finite"] == {"class_labels": 11}
    assert all(set(k) == {"timestep", "class_labels"} for k in q.report["temporal_block"]["keys"].values())
    modules = {
        f"{n}.weight"
        for n, m in dit.transformer.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert {layer["path"] for layer in q.report["layers"]} == modules
    y = draw(dit, q, class_labels=LABELS)
    # Measured 44.1 dB; the next coarser settings, 8-bit edge inputs and 4-bit weights, reach 41.7 and 31.7.
    assert psnr_by_image(y, reference).mean() > 42.5
    assert psnr(y, reference) < 80  # it is quantized, not the float network


def test_every_first_time_embedding_layer_keeps_eight_bits(dit):
    """The network embeds the timestep anew in each block: it has as many first layers as blocks."""
    tensors = {
        "hidden_states": torch.zeros(2, 1, 16, 16),
        "timestep": torch.tensor([1, 2]),
        "class_labels": torch.tensor([0, 1]),
    }
    gm = tfmq_fx.capture(dit.transformer, {**tensors, "return_dict": False})
    layers = state_of(tfmq_fx.prepare(gm, tfmq_fx.Recipe(), timesteps=torch.tensor([1, 2]))).plan.layers
    bits = {layer.path: layer.weight_bits for layer in layers}
    blocks = dit.transformer.config.num_layers
    assert [
        bits[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight"] for i in range(blocks)
    ] == [8] * blocks
    assert bits["transformer_blocks.0.norm1.emb.timestep_embedder.linear_2.weight"] == 4


# Text to image in latents: one sample for each caption.
SHAPES = {"num_inference_steps": STEPS, "prompt": PROMPTS, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def ldm():
    pipe = ldm_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shapes(ldm):
    return sample(ldm, num_samples=len(PROMPTS), seed=3, **SHAPES)


def test_the_judge_knows_drawn_shapes_and_no_others():
    captions = torch.arange(480) % len(PROMPTS)
    pictures = drawn_shapes(captions, seed=0)
    label, closeness = judge(pictures)
    assert torch.equal(label, captions)
    assert closeness.min() > 25
    assert as_asked(pictures + 0.05 * torch.randn_like(pictures), captions).all()
    blurred = torch.nn.functional.avg_pool2d(pictures, 7, stride=1, padding=3)
    for wrong in (
        blurred,
        torch.maximum(pictures, drawn_shapes(captions, seed=1)),
        torch.zeros_like(pictures),
    ):
        assert as_asked(wrong, captions).float().mean() < 0.5
    assert not as_asked(pictures, (captions + 1) % len(PROMPTS)).any()


def test_the_autoencoder_keeps_the_pictures(ldm):
    captions = torch.arange(48) % len(PROMPTS)
    pictures = drawn_shapes(captions, seed=2_000_000)
    with torch.no_grad():
        decoded = ldm.vae(pictures).sample
        latents = ldm.vae.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(0))
    # Measured 37.1 dB and all of them.
    assert psnr(decoded, pictures) > 35
    assert as_asked(decoded, captions).float().mean() > 0.95
    # What the UNet sees has the noise's scale.
    assert abs(latents.std() * ldm.vae.config.scaling_factor - 1) < 0.1


def test_samples_show_the_shape_the_prompt_asks_for(shapes):
    # Chance is 1 of 24; measured all of them.
    assert as_asked(shapes, torch.arange(len(PROMPTS))).sum() >= 22


def test_samples_without_a_prompt_are_of_many_kinds(ldm):
    pictures = sample(ldm, num_samples=24, seed=3, num_inference_steps=STEPS, prompt="", guidance_scale=1.0)
    label, closeness = judge(pictures)
    # Measured 14 of the 24 captions, and 23 of the pictures close to one.
    assert len(label.unique()) >= 10
    assert (closeness > CLOSE).sum() >= 20


@pytest.mark.slow
def test_text_to_image_is_quantized(ldm, shapes):
    data = tfmq_fx.CalibrationSet.record(ldm, num_samples=12, **SHAPES)
    # Guidance calls the network without and with the prompt, in one batch.
    assert len(data) == 12 * STEPS * 2
    q = tfmq_fx.quantize(ldm, W8A8, calibration=data)
    modules = {
        f"{n}.weight"
        for n, m in ldm.unet.named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert {layer["path"] for layer in q.report["layers"]} == modules
    y = sample(ldm, q, num_samples=len(PROMPTS), seed=3, **SHAPES)
    # Measured 42.5 dB, 41.2 with 8-bit edge inputs and 33.0 with 4-bit weights. The bound is not between the first two:
    # one shape whose place moves by half a pixel (23 dB) takes half a dB from the mean of 24.
    assert psnr_by_image(y, shapes).mean() > 39
    assert psnr(y, shapes) < 80  # it is quantized, not the float network
    assert as_asked(y, torch.arange(len(PROMPTS))).sum() >= 22


@pytest.fixture(scope="module")
def flow():
    pipe = flow_digits_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_flow_matching_is_quantized_on_float_times(flow):
    run = {"num_inference_steps": 12, "seed": 3}
    reference = sample(flow, num_samples=30, **run)
    label, distance = nearest_digit(reference)
    # Real digits are 3.5 from the nearest other on average, means of two 4.9, noise is 15.8.
    assert distance.mean() < 4.4
    assert len(label.unique()) >= 7
    data = tfmq_fx.CalibrationSet.record(flow, num_samples=10, num_inference_steps=12)
    assert len(data.timesteps) == 12
    assert (data.timesteps % 1 != 0).any()
    q = tfmq_fx.quantize(flow, W8A8, calibration=data)
    y = sample(flow, q, num_samples=30, **run)
    assert q.report["unseen_timesteps"] == {}
    # Measured 49.6 dB; the next coarser settings, 8-bit edge inputs and 4-bit weights, reach 45.8 and 34.0.
    assert psnr_by_image(y, reference).mean() > 47
    assert psnr(y, reference) < 80  # it is quantized, not the float network
