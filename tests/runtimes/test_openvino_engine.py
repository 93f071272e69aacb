"""The lowered network is the quantized one, on int8 kernels: values, calls, what really ran, and what is refused."""

import functools

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import (
    TIMESTEPS,
    Attention,
    OneTimestep,
    ScalarTime,
    TinyUNet,
    calibration,
    make,
    sinusoid,
)
from tests.helpers.agreement import FLIPPED_BY, moved
from tests.helpers.lowered import (
    BFLOAT16,
    INT8,
    SETTINGS,
    SIZES,
    assert_every_batch_size_and_step_agrees,
    assert_guided_batches_agree,
    assert_int8_where_pairs_fit,
    assert_same_but_for_ties,
    kept,
    linear_alone,
    lower,
    mixed,
    needs_avx2,
    needs_bfloat16,
    needs_bytes,
    needs_kernels,
    noise,
)
from tests.helpers.nearest import labelled, one_timestep, quantized, recipe
from tests.helpers.processes import finish, start
from tfmq_fx.artefact.drop_in import DropIn
from tfmq_fx.base.arithmetic import NO_INT8, SATURATES
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.demo import embedded_pipeline
from tfmq_fx.runtimes import openvino_engine

pytest.importorskip("openvino", reason="lowering needs the openvino extra")


@functools.cache
def lowered(bits="w8a8", keyed="block", precision="float32"):
    return lower(quantized(bits, keyed), "cpu", precision=precision, cache=kept())


@pytest.mark.parametrize(("bits", "keyed"), SETTINGS)
def test_every_batch_size_and_step_gives_what_the_quantized_network_gives(bits, keyed):
    assert_every_batch_size_and_step_agrees(lowered(bits, keyed), quantized(bits, keyed))


@torch.no_grad()
def test_an_empty_batch_is_empty():
    """OpenVINO divides by the size, which ends the process."""
    x, t = torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)
    assert lowered()(x, t).shape == quantized()(x, t).shape == (0, 1, 8, 8)


@needs_bfloat16
def test_bfloat16_stays_within_its_rounding():
    q, low = quantized(), lowered(precision="bfloat16")
    for t in TIMESTEPS:
        got, expected = low(noise(3), t), q(noise(3), t)
        assert moved(got, expected)[1] <= BFLOAT16
    assert moved(low(noise(10), TIMESTEPS), q(noise(10), TIMESTEPS))[1] <= BFLOAT16


class Growing(nn.Module):
    """A sum that is ninety times as large at the last timestep as at the first."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 1, 1)

    def forward(self, sample, timestep):
        size = (1 + timestep / 10)[:, None, None, None]
        return self.second(self.first(sample) * size + sample * size) / size


@needs_bfloat16
@needs_kernels
@torch.no_grad()
def test_in_bfloat16_a_second_term_has_what_the_first_leaves():
    """OpenVINO would take their difference beside a zero point, for which bfloat16 has no bits left: 0.30 at timestep 0."""
    rule = tfmq_fx.Rule(pattern="second*", activation_bits=8, activation_terms=2)
    q = quantized("w8a8", network_class=Growing, rules=(rule,))
    low = lower(q, "cpu", precision="bfloat16")
    for t in TIMESTEPS:
        got, expected = low(noise(3), t), q(noise(3), t)
        assert (got - expected).norm() < 0.02 * expected.norm()  # 0.002 was seen


class Scaled(nn.Module):
    """A group norm between two convolutions, scaled and shifted by temporal features."""

    def __init__(self):
        super().__init__()
        self.emb, self.norm = nn.Linear(16, 2 * 32), nn.GroupNorm(4, 32)
        self.first, self.second, self.last = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 32), (32, 32), (32, 1))
        )

    def forward(self, sample, timestep):
        scale, shift = self.emb(sinusoid(timestep, 16))[:, :, None, None].chunk(2, dim=1)
        h = self.norm(self.first(sample)) * (1 + scale) + shift
        return self.last(self.second(nn.functional.silu(h)))


@needs_kernels
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@torch.no_grad()
def test_norms_leave_pictures_where_convolutions_read_them(precision):
    """A picture viewed as groups, or in two types, would be moved from pixel by pixel to channel by channel and back."""
    q = quantized("w8a8", network_class=Scaled)
    low = lower(q, "cpu", precision=precision)
    found, expected = low(noise(1), TIMESTEPS[3]), q(noise(1), TIMESTEPS[3])
    assert moved(found, expected)[1] <= (
        BFLOAT16 if precision == "bfloat16" else 1e-2
    )  # float32: rounding ties
    ops = low.network.networks.latest().compiled.get_runtime_model().get_ordered_ops()
    moves = [op for op in ops if op.get_rt_info()["layerType"].astype(str) == "Reorder"]
    assert not [op for op in moves if list(op.output(0).get_shape()) == [1, 32, 8, 8]]


@needs_bfloat16
def test_what_follows_from_the_timestep_is_computed_in_float32():
    """bfloat16 has no 901; the step index would be another timestep's."""
    low = lowered(precision="bfloat16")
    found = {
        kind: e.precision for e in low.network.executions() for kind in [e.kind] if kind in ("TopK", "Math")
    }
    assert found == {"TopK": "f32", "Math": "f32"}


@needs_kernels
def test_every_quantized_layer_has_an_int8_kernel():
    report = lowered().report["lowering"]
    kernels = {k["path"]: k for k in report["kernels"]}
    layers = {layer["path"]: layer for layer in quantized().report["layers"]}
    assert layers.keys() <= kernels.keys()
    for path, layer in layers.items():
        assert kernels[path]["int8"] == (layer["activation_bits"] == 8), path
        assert not kernels[path]["fell_back"]
        assert kernels[path]["kernel"].endswith("_I8" if kernels[path]["int8"] else "_f32")
    assert kernels["conv_in.weight"]["reason"] == "its input is float"
    attention = kernels.keys() - layers.keys()
    assert [kernels[a]["op"] for a in attention] == ["scaled_dot_product_attention"]
    assert report["flops"]["total"] == sum(k["flops"] for k in report["kernels"])
    assert kernels["conv_in.weight"]["flops"] == 2 * 9 * 8 * 64
    assert kernels["attention.qkv.weight"]["flops"] == 2 * 8 * 24 * 16
    assert 0.9 < report["flops"]["int8"] / report["flops"]["total"] < 1


def test_it_is_the_same_to_call():
    q, low = quantized(), lowered()
    assert isinstance(low, DropIn)
    assert (low.config, low.dtype, low.device) == (q.config, q.dtype, q.device)
    x = noise(4)
    with torch.no_grad():
        expected = low(x, torch.tensor([300] * 4))
        for t in (300, 300.0, torch.tensor(300), torch.tensor([300])):
            assert torch.equal(low(x, t), expected)
        assert torch.equal(low(sample=x, timestep=300), expected)
        low(x, torch.tensor([300, 451, 452, 451]))
        low(x, 451)
    assert low.report["unseen_timesteps"] == {"451": 2, "452": 1}
    assert low.report["layers"] == q.report["layers"]
    low.reset_unseen()
    for call, words in (
        (lambda: low(x, 300, 1), "'argument 3' is unknown"),
        (lambda: low(x.repeat(1, 2, 1, 1), 300), r"shape \(4, 2, 8, 8\), captured with \(N, 1, any"),
        (lambda: low(x, torch.tensor([1, 2])), "2 timesteps for a batch of 4"),
        (lambda: low.double(), r"to\(torch\.float64\): use float32, float16 or bfloat16"),
        (lambda: low.to("meta"), r"to\(meta\): this network is compiled for cpu"),
    ):
        with pytest.raises(TFMQError, match=words):
            call()


@torch.no_grad()
def test_one_compiled_network_serves_all_steps_of_a_batch_size():
    low = lowered()
    for size in (2, 5, 2, 1):
        for t in TIMESTEPS:
            low(noise(size), t)
            low(noise(size), mixed(size))
    assert {"1", "2", "5"} <= low.report["lowering"]["compiled_seconds"].keys()
    made = low.network.networks.made
    compiled = list(made.values())
    assert len(compiled) <= low.network.networks.KEPT
    for t in TIMESTEPS:
        low(noise(2), t)
    assert {id(c) for c in made.values()} == {id(c) for c in compiled}


def test_guided_batches_and_labels():
    q = labelled("w8a8")
    assert_guided_batches_agree(lower(q, "cpu", precision="float32"), q)


@torch.no_grad()
def test_a_network_of_one_timestep_per_call():
    q = one_timestep(ScalarTime)
    low = lower(q, "cpu", precision="float32")
    reasons = {k["path"]: k["reason"] for k in low.report["lowering"]["kernels"]}
    quantized_input = "" if INT8 else SATURATES
    float_input = "its input is float"  # the first and the last layer's, by the recipe
    assert reasons == {
        "time.0.weight": quantized_input,
        "time.2.weight": quantized_input,
        "body.weight": float_input,
        "head.weight": float_input,
    }
    for size in SIZES:
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        assert_same_but_for_ties([(low(x, t), q(x, t)) for t in TIMESTEPS])


@pytest.mark.parametrize("shipped", [False, pytest.param(True, marks=pytest.mark.slow)])
@torch.no_grad()
def test_through_the_pipeline(shipped):
    """To convert the shipped model takes a minute."""
    pipe = embedded_pipeline() if shipped else ddpm()
    pipe.set_progress_bar_config(disable=True)
    config = pipe.unet.config
    nearest = tfmq_fx.Reconstruction(method="nearest")
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=4, num_inference_steps=5, seed=0)
    q = tfmq_fx.quantize(pipe, tfmq_fx.Recipe(reconstruction=nearest), calibration=data)
    low = lower(q, "cpu", precision="float32", strict=INT8)
    x = torch.randn(4, config.in_channels, config.sample_size, config.sample_size)
    t = q.timesteps[[0, 4, 2, 1]]
    assert type(low(x, t)) is type(q(x, t))
    assert isinstance(low(x, t, return_dict=False), tuple)
    assert moved(low(x, t).sample, q(x, t).sample)[1] <= FLIPPED_BY
    assert low.config.in_channels == config.in_channels
    run = {"batch_size": 2, "num_inference_steps": 5, "output_type": "np"}
    pictures = []
    for unet in (q, low):
        ours = DDIMPipeline(pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config))
        ours.unet = unet
        ours.set_progress_bar_config(disable=True)
        pictures.append(ours(generator=torch.Generator().manual_seed(0), **run).images)
    # Rounding ties; 3e-3 was seen. In bfloat16 five steps of a network of random weights end 0.03 apart.
    assert abs(pictures[0] - pictures[1]).mean() < 0.005
    assert low.report["unseen_timesteps"] == {}


@needs_kernels
def test_a_layer_that_falls_back_is_reported_and_refused_on_request(monkeypatch, tmp_path):
    original = openvino_engine.Compiled

    def without_low_precision(folder, *, settings, **rest):
        return original(folder, settings={**settings, "LP_TRANSFORMS_MODE": "NO"}, **rest)

    monkeypatch.setattr(openvino_engine, "Compiled", without_low_precision)
    low = lower(quantized(), "cpu", precision="float32", cache=tmp_path)
    fallen = [k for k in low.report["lowering"]["kernels"] if k["fell_back"]]
    assert "OpenVINO chose a float kernel" in {k["reason"] for k in fallen}
    assert len(fallen) == len(quantized().report["layers"]) - 2  # conv_in and conv_out keep float inputs
    assert low.report["lowering"]["flops"]["int8"] == 0
    with pytest.raises(
        TFMQError,
        match=r"strict: 12 of 15 layers are quantized and run in float: \S+\.weight: OpenVINO chose a float kernel",
    ):
        lower(quantized(), "cpu", precision="float32", strict=True, cache=tmp_path)


def attention_of(low):
    (kernel,) = [k for k in low.report["lowering"]["kernels"] if k["op"] == "scaled_dot_product_attention"]
    return kernel


@needs_kernels
def test_attention_multiplies_bytes_where_the_recipe_quantizes_it():
    q = quantized(attention_bits=8)
    low = lower(q, "cpu", precision="float32", cache=kept(), strict=True)
    assert attention_of(low)["int8"]
    flops = low.report["lowering"]["flops"]
    plain = lowered().report["lowering"]["flops"]
    assert flops["int8"] - plain["int8"] == attention_of(low)["flops"] / 2  # q by k
    assert_every_batch_size_and_step_agrees(low, q)


class WrittenOut(TinyUNet):
    def __init__(self):
        super().__init__()
        self.attention = Products(8)


class Products(Attention):
    def forward(self, x):
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        y = self.out((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v)
        return x + y.transpose(1, 2).reshape(x.shape)


@needs_kernels
def test_attention_written_out_multiplies_bytes_twice():
    q = quantized(network_class=WrittenOut, attention_bits=8)
    low = lower(q, "cpu", precision="float32", cache=kept(), strict=True)
    found = [k["int8"] for k in low.report["lowering"]["kernels"] if k["op"] == "bmm"]
    assert found == [True, True]
    assert_every_batch_size_and_step_agrees(low, q)


@needs_avx2
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_attention_is_float_on_the_same_integers():
    q, plain = quantized("w4a8", attention_bits=8), quantized("w4a8")
    with pytest.warns(UserWarning, match=NO_INT8[:20]):
        low, plain = (x.lower("cpu", precision="float32", cache=kept()) for x in (q, plain))
    assert (attention_of(low)["int8"], attention_of(low)["reason"]) == (False, SATURATES)
    assert_every_batch_size_and_step_agrees(low, q)
    assert attention_of(low)["kernel"] == attention_of(plain)["kernel"]  # of float operands


@needs_avx2
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_what_does_not_saturate_is_int8():
    q = quantized("w4a8", "all")
    with pytest.warns(UserWarning, match="this CPU has no int8 instructions .* beyond 64 steps from zero"):
        low = q.lower("cpu", precision="float32", cache=kept())
    assert_int8_where_pairs_fit(q, low)
    assert_every_batch_size_and_step_agrees(low, q)
    words = r"strict: 1 of 15 layers .* time_mlp\.0\.weight: .* would saturate"
    with pytest.warns(UserWarning, match=NO_INT8[:20]), pytest.raises(TFMQError, match=words):
        q.lower("cpu", precision="float32", cache=kept(), strict=True)


@needs_avx2
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_weights_of_eight_bits_are_float_and_kept_as_bytes():
    with pytest.warns(UserWarning, match=NO_INT8[:20]):
        report = quantized().lower("cpu", precision="float32", cache=kept()).report
    assert {k["reason"] for k in report["lowering"]["kernels"] if k["fell_back"]} == {SATURATES}
    assert report["lowering"]["flops"]["int8"] == 0
    assert report["lowering"]["weight_bytes"] < 0.4 * report["sizes"]["float_bytes"]


@needs_avx2
@torch.no_grad()
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_weights_that_fit_no_signed_byte_are_float():
    """All positive: q - z reaches 255. OpenVINO has kernels of unsigned weights, too, and they saturate."""
    network = make(ScalarTime)
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.abs_()
    q, x = linear_alone(8, network), torch.randn(5, 4)
    with pytest.warns(UserWarning, match=NO_INT8[:20]):
        low = q.lower("cpu", precision="float32", cache=kept())
    assert {k["reason"] for k in low.report["lowering"]["kernels"]} == {SATURATES}
    assert_same_but_for_ties([(low(x, t), q(x, t)) for t in TIMESTEPS])


class ScaledNorm(nn.Module):
    """Scale and shift after a group norm."""

    def __init__(self):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 16))
        self.norm = nn.GroupNorm(4, 8)
        self.first, self.mid, self.last = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 8), (8, 8), (8, 1)))

    def forward(self, sample, timestep):
        scale, shift = self.time(sinusoid(timestep, 8))[..., None, None].chunk(2, dim=1)
        h = self.norm(self.first(sample)) * (1 + scale) + shift
        return self.last(nn.functional.silu(self.mid(nn.functional.silu(h))))


@pytest.mark.usefixtures("without_int8")
def test_without_int8_a_scaled_norm_does_not_end_the_process():
    """OpenVINO 2026.4's generated kernels crash on it."""
    q = quantized("w8a8", network_class=ScaledNorm)
    with pytest.warns(UserWarning, match="this CPU has no int8 instructions"):
        low = q.lower("cpu", engine="openvino", precision="float32")
    x, t = noise(2), TIMESTEPS[:2]
    with torch.no_grad():
        # Float on the same integers, but an activation on a tie may take the next of 255 steps.
        assert (low(x, t) - q(x, t)).norm() < 0.01 * q(x, t).norm()


@torch.no_grad()
@pytest.mark.usefixtures("without_int8")
def test_a_cpu_without_int8_instructions_says_so_and_computes_the_same():
    with pytest.warns(UserWarning, match="this CPU has no int8 instructions"):
        low = quantized().lower("cpu", precision="float32", cache=kept())
    assert low.report["lowering"]["flops"]["int8"] == 0
    assert_same_but_for_ties([(low(noise(n), mixed(n)), quantized()(noise(n), mixed(n))) for n in SIZES])
    with pytest.raises(TFMQError, match="this CPU has no int8 instructions"):
        quantized().lower("cpu", strict=True)


def other_granularity(**changes):
    nearest = tfmq_fx.Reconstruction(method="nearest")
    return tfmq_fx.quantize(
        make(TinyUNet), tfmq_fx.Recipe(reconstruction=nearest, **changes), calibration=calibration()
    )


@torch.no_grad()
def test_scales_per_group_run_in_float_and_are_reported():
    q = other_granularity(group_size=8)
    low = lower(q, "cpu", precision="float32")
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES])
    kernels = {k["path"]: k for k in low.report["lowering"]["kernels"]}
    for path in ("time_mlp.2.weight", "down_block.conv1.weight"):
        assert (kernels[path]["int8"], kernels[path]["fell_back"]) == (False, True)


@torch.no_grad()
def test_scales_per_token_run_on_int8_kernels():
    q = other_granularity(activation_granularity="token")
    low = lower(q, "cpu", precision="float32", strict=INT8)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES])
    kernels = {k["path"]: k for k in low.report["lowering"]["kernels"]}
    assert kernels["attention.qkv.weight"]["int8"]


class Symmetric(TinyUNet):
    """What attention reads lies in [-1, 1], and reaches both."""

    def __init__(self):
        super().__init__()
        self.attention.norm = Saturated()


class Saturated(nn.Module):
    def forward(self, x):
        return torch.tanh(1000 * x)


@needs_bytes
def test_kernels_that_read_signed_bytes_are_int8_too():
    """OpenVINO takes them where the zero point is in the middle."""
    low = lower(quantized("w4a8", network_class=Symmetric), "cpu", precision="float32", strict=INT8)
    (kernel,) = [k for k in low.report["lowering"]["kernels"] if k["path"] == "attention.qkv.weight"]
    assert kernel["kernel"].endswith("_i8")
    assert kernel["int8"]


@torch.no_grad()
def test_the_cache_keeps_the_conversion(tmp_path):
    q, x = one_timestep(ScalarTime), torch.randn(3, 4)
    first = lower(q, "cpu", precision="float32", cache=tmp_path)
    second = lower(q, "cpu", precision="float32", cache=tmp_path)
    assert [low.report["lowering"]["cached"] for low in (first, second)] == [False, True]
    assert torch.equal(first(x, 300), second(x, 300))
    assert first.report["lowering"]["kernels"] == second.report["lowering"]["kernels"]
    assert lower(one_timestep(OneTimestep), "cpu", cache=tmp_path).report["lowering"]["cached"] is False


class Activations(nn.Module):
    """A timestep's layers with an activation between them, as many networks of others have them."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = getattr(torch.nn.functional, activation)
        self.first, self.second, self.third = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv1d(a, b, 3, padding=1) for a, b in ((5, 8), (8, 8), (8, 5))
        )

    def forward(self, sample, timestep):
        emb = self.second(self.activation(self.first(sinusoid(timestep, 8))))
        emb = self.third(self.activation(emb))
        h = self.conv1(sample) + emb[:, :, None]
        return self.conv3(self.activation(self.conv2(self.activation(h))))


def lowered_on_one_thread(talk, activation):
    torch.manual_seed(0)
    data = tfmq_fx.CalibrationSet.from_tensors(
        {"sample": torch.randn(20, 5, 16), "timestep": TIMESTEPS.repeat(2)}
    )
    q = tfmq_fx.quantize(Activations(activation).eval(), recipe("w8a8"), calibration=data)
    lowered = q.lower("cpu", engine="openvino", precision="float32")
    given = data.arguments(slice(0, 4))
    with torch.no_grad():
        torch.testing.assert_close(lowered(**given), q(**given), rtol=1e-4, atol=1e-5)
    talk.send([k["path"] for k in lowered.report["lowering"]["kernels"] if k["fell_back"]])


@needs_kernels
@pytest.mark.parametrize("activation", ["gelu", "mish", "hardtanh", "sigmoid"])
def test_a_timesteps_layers_may_have_any_activation(activation):
    """On one thread, OpenVINO 2026.4 merges them, which ended the process: so this is one of its own."""
    assert finish(*start(lowered_on_one_thread, activation)) == []


@torch.no_grad()
def test_what_openvino_cannot_merge_is_computed_one_by_one(monkeypatch, caplog):
    own = openvino_engine.Compiled._compiled

    def failing(compiled, inputs, settings):
        if "SNIPPETS_MODE" not in settings:
            raise RuntimeError("Exception from src/core.cpp:117:\nnot enough registers\n")
        return own(compiled, inputs, settings)

    monkeypatch.setattr(openvino_engine.Compiled, "_compiled", failing)
    q = quantized()
    low = lower(q, "cpu", precision="float32", cache=None)
    assert low.report["lowering"]["not_merged_because"] == "not enough registers"
    assert "each operator by itself, which is slower: not enough registers" in caplog.text
    assert_same_but_for_ties([(low(noise(2), t), q(noise(2), t)) for t in TIMESTEPS[:2]])


def test_what_openvino_cannot_compile_at_all_is_refused(monkeypatch):
    def failing(*_):
        raise RuntimeError("Exception from src/core.cpp:117:\nno such kernel\n")

    monkeypatch.setattr(openvino_engine.Compiled, "_compiled", failing)
    with pytest.raises(TFMQError, match="OpenVINO cannot compile the graph: no such kernel; "):
        lower(quantized(), "cpu", precision="float32", cache=None)
