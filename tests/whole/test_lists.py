"""Networks that take lists with one entry for each sample, and return lists: captured, quantized, saved, lowered, sampled."""

import dataclasses

import diffusers
import pytest
import torch
from torch._subclasses import FakeTensorMode

import tfmq_fx
from benchmarks.networks.pipelines import autoencoder
from benchmarks.networks.small import Experts, Listed, experts, listed, make
from tests.helpers.lowered import lower
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.row_lists import RowLists, row_lists
from tfmq_fx.base.second_rows import rows_of_call

NEAREST = dataclasses.replace(
    tfmq_fx.Recipe.preset("w8a8"), reconstruction=tfmq_fx.Reconstruction(method="nearest")
)


@pytest.fixture(scope="module")
def network():
    return make(Listed)


@pytest.fixture(scope="module")
def quantized(network):
    data = tfmq_fx.CalibrationSet.from_tensors(listed(), timestep="t")
    return tfmq_fx.quantize(network, NEAREST, calibration=data)


def relative(a, b):
    return max(float((x - y).norm() / y.norm()) for x, y in zip(a, b, strict=True))


class Residuals(torch.nn.Module):  # a list of two tensors with a batch of two
    def forward(self, sample, timestep, residuals):
        return sum(residuals) + sample * timestep[:, None]


def test_lists_of_rows_are_told_from_other_lists(network):
    found = RowLists(arguments=("x", "words"), outputs=(0,))
    assert row_lists(network, listed(1), "t") == row_lists(network, listed(3), "t") == found

    x = torch.randn(2, 3)
    assert (
        row_lists(
            Residuals(), {"sample": x, "timestep": torch.tensor([3, 5]), "residuals": [x, x]}, "timestep"
        )
        is None
    )
    one = {"sample": x[:1], "timestep": torch.tensor([3]), "residuals": [x[:1]]}
    assert row_lists(Residuals(), one, "timestep") is None


def test_the_graph_has_a_batch_and_computes_what_the_lists_do(network):
    gm = tfmq_fx.capture(network, listed(2, (3,)), timestep="t")
    given = listed(5, (7,))  # of another length
    with torch.no_grad():
        expected = torch.stack(network(**given)["sample"])
        made = gm(torch.stack(given["x"]), given["t"], torch.stack(given["words"]))["sample"]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


class OfLayers(Listed):
    """Names what it returns by numbers, and cannot run with gradients."""

    def forward(self, x, t, words):
        assert not torch.is_grad_enabled()
        return {3: super().forward(x, t, words)["sample"]}


def test_a_dict_of_lists_may_have_numbers_for_names_and_nothing_is_compared_with_gradients():
    network = make(OfLayers)
    gm = tfmq_fx.capture(network, listed(2, (3,)), timestep="t")
    given = listed(4, (5,))
    with torch.no_grad():
        expected = torch.stack(network(**given)[3])
        made = gm(torch.stack(given["x"]), given["t"], torch.stack(given["words"]))[3]
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


def test_a_call_with_lists_returns_lists_and_its_rows_may_differ_in_size(network, quantized):
    given = listed(6, (3, 4, 8, 1, 7))  # 4 and 8 need no padding, which the capture had
    given["x"][5] = torch.randn(2, 4, 12)
    with torch.no_grad():
        expected, found = network(**given)["sample"], quantized(**given)["sample"]
    assert isinstance(found, list)
    assert (
        relative(found, expected) < 0.04
    )  # two layers of 8 bits; prompts and pictures of other lengths than calibrated
    alone = quantized(given["x"][1:2], given["t"][1:2], given["words"][1:2])["sample"]
    torch.testing.assert_close(alone[0], found[1], rtol=1e-4, atol=1e-4)
    stacked = quantized(torch.stack(given["x"][:5:4]), given["t"][:5:4], given["words"][:5:4])["sample"]
    assert isinstance(stacked, torch.Tensor)  # for tensors, a tensor
    assert torch.allclose(stacked[1], found[4], atol=1e-4)
    with pytest.raises(TFMQError, match=r"lists of samples have different lengths: \{'x': 6, 'words': 5\}"):
        quantized(given["x"], given["t"], given["words"][:5])


def test_it_is_saved_loaded_and_lowered(quantized, tmp_path):
    given = listed(4, (3, 7, 8))
    expected = quantized(**given)["sample"]
    quantized.save_pretrained(tmp_path)
    loaded = tfmq_fx.load(tmp_path)
    assert all(map(torch.equal, loaded(**given)["sample"], expected))
    lowered = lower(loaded, "cpu")
    assert relative(lowered(**given)["sample"], expected) < 0.02  # bfloat16 between the integers on some CPUs


def test_blocks_are_learned_from_rows_of_several_sizes(network):
    data = tfmq_fx.CalibrationSet.from_tensors(listed(), timestep="t")
    assert sorted({len(rows) for rows in data.groups(24)}) == [12]
    assert [x.shape[1] for x in (batch["words"] for batch in data.batches(24))] == [3, 7]
    settings = tfmq_fx.Reconstruction(method="gptq", tune_iterations=0)
    q = tfmq_fx.quantize(network, tfmq_fx.Recipe(weight_bits=4, reconstruction=settings), calibration=data)
    given = listed(4, seed=1)
    with torch.no_grad():
        assert relative(q(**given)["sample"], network(**given)["sample"]) < 0.3  # 4 bits


def test_a_list_that_makes_no_rows_is_refused():
    given = {
        "sample": torch.randn(4, 3),
        "timestep": torch.tensor([5, 3, 1, 0]),
        "residuals": [*torch.randn(4, 3)],
    }
    data = tfmq_fx.CalibrationSet.from_tensors(given)
    with pytest.raises(TFMQError, match="'x' has samples of 2 sizes; calibrate on those of one size"):
        tfmq_fx.CalibrationSet.from_tensors(
            {**(other := listed(3)), "x": [*other["x"][:2], torch.randn(2, 4, 4)]}, timestep="t"
        )
    with pytest.raises(
        TFMQError, match="residuals are lists with an entry for each row, but Residuals does not compute"
    ):
        data.row_wise(Residuals())


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    pipe = diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=autoencoder(latent_channels=16, shift_factor=0.0),
        text_encoder=None, tokenizer=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def recorded(pipe, **more):
    prompts = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (5, 9)]
    return tfmq_fx.CalibrationSet.record(
        pipe, num_samples=2, num_inference_steps=2, height=32, width=32, guidance_scale=3.0, prompt_embeds=prompts,
        negative_prompt_embeds=[torch.ones(7, 16)] * 2, **more,
    )  # fmt: skip


def test_a_pipeline_of_lists_is_recorded_with_prompts_of_several_lengths(pipe, tmp_path):
    data = recorded(pipe)
    assert data.timestep == "t"  # which changes from call to call
    assert data.row_lists == RowLists(arguments=("x", "cap_feats"), outputs=(0,))
    assert {n: tuple(x.shape) for n, x in data.tensors.items()} == {
        "x": (8, 16, 1, 16, 16),
        "t": (8,),
        "cap_feats": (8, 9, 16),
    }
    lengths = data.row_sizes.of["cap_feats"][:, 0].tolist()
    assert [n for n, c in zip(lengths, data.conditional.tolist(), strict=True) if c] == [5, 9, 5, 9]
    assert {n for n, c in zip(lengths, data.conditional.tolist(), strict=True) if not c} == {7}
    for other in (
        recorded(pipe, max_memory=1),
        recorded(pipe, cache=tmp_path),
        recorded(pipe, cache=tmp_path),
    ):
        assert all(torch.equal(x, other.tensors[n]) for n, x in data.tensors.items())
        assert torch.equal(other.row_sizes.kinds, data.row_sizes.kinds)


@pytest.mark.slow
def test_it_draws_from_the_pipeline_as_the_float_network_does(pipe):
    data = recorded(pipe)
    network = pipe.transformer
    q = tfmq_fx.quantize(network, NEAREST, calibration=data)
    given = data.arguments(slice(0, 8))
    with torch.no_grad():
        assert relative(q(**given)[0], data.row_wise(network)(**given)[0]) < 0.03


def test_it_is_precomputed_from_the_pipelines_own_schedule(pipe):
    """Whose calls are repeated, but not those that show which arguments are lists."""
    prompt = torch.randn(5, 16, generator=torch.Generator().manual_seed(5))
    found = tfmq_fx.precompute(
        pipe, num_inference_steps=3, height=32, width=32, guidance_scale=0.0, prompt_embeds=[prompt]
    )
    assert {f["chosen"] for f in found.report["maintenance"]["features"]} == {"table"}
    assert len(found.timesteps) == 3
    call = {
        "x": [torch.randn(16, 1, 16, 16)] * 2,
        "t": found.timesteps[1:],
        "cap_feats": [prompt, prompt[:3]],
    }
    with torch.no_grad():
        torch.testing.assert_close(found(**call)[0], pipe.transformer(**call)[0])


@pytest.mark.parametrize(
    ("cls", "call", "timestep"), [(Listed, lambda n: listed(n, (3,)), "t"), (Experts, experts, "timestep")]
)
def test_networks_of_fake_weights_are_captured_once_it_is_known_what_they_take(cls, call, timestep):
    found = rows_of_call(make(cls), call(2), timestep)  # by values, of which fake weights have none
    with FakeTensorMode(allow_non_fake_inputs=True):
        gm = tfmq_fx.capture(found.batched(make(cls)), found.taken(call(2)), timestep=timestep)
    real = tfmq_fx.capture(make(cls), call(2), timestep=timestep)
    assert [n.target for n in gm.graph.nodes] == [n.target for n in real.graph.nodes]
