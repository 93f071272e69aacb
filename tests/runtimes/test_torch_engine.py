"""The same network on oneDNN's int8 kernels with torch alone: values, coverage, packed weights, what is refused."""

import functools
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, ScalarTime, TinyUNet, make
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
    kernels_of,
    lower,
    mixed,
    needs_avx2,
    needs_bfloat16,
    needs_bytes,
    needs_kernels,
    noise,
)
from tests.helpers.nearest import labelled, one_timestep, quantized
from tests.helpers.processes import finish, start
from tfmq_fx.base.arithmetic import NO_INT8
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.passes.int8.kernels import KERNELS
from tfmq_fx.passes.int8.share_quantized import QUANTIZE
from tfmq_fx.runtimes import cpu, torch_engine
from tfmq_fx.runtimes.engine import Nesting

needs_compiler = pytest.mark.skipif(bool(torch_engine.compiler_missing()), reason="there is no C++ compiler")


@functools.cache
def lowered(bits="w8a8", keyed="block", precision="float32", pack=None):
    return lower(quantized(bits, keyed), engine="torch", precision=precision, compile=False, pack=pack)


@pytest.mark.parametrize(("bits", "keyed"), SETTINGS)
def test_every_batch_size_and_step_gives_what_the_quantized_network_gives(bits, keyed):
    assert_every_batch_size_and_step_agrees(lowered(bits, keyed), quantized(bits, keyed))


@needs_bfloat16
@pytest.mark.parametrize("keyed", ["block", "all"])
@torch.no_grad()
def test_bfloat16_stays_within_its_rounding(keyed):
    q, low = quantized("w4a8", keyed), lowered("w4a8", keyed, "bfloat16")
    for t in TIMESTEPS:
        assert moved(low(noise(3), t), q(noise(3), t))[1] <= BFLOAT16
    got, expected = low(noise(10), TIMESTEPS), q(noise(10), TIMESTEPS)
    assert 1e-4 < moved(got, expected)[1] <= BFLOAT16  # and the glue is bfloat16
    assert got.dtype is torch.float32


@needs_bfloat16
@torch.no_grad()
def test_what_follows_from_the_timestep_alone_is_float32():
    """bfloat16 has no 901. Its nearest is 900, whose row of the table it would read."""
    gm = lowered("w4a8", "all", "bfloat16").network.gm
    dtypes = torch_engine.dtypes_of(gm, {"sample": noise(2), "timestep": mixed(2)})
    found = {n.name: d for n, d in dtypes.items() if n.op == "call_function"}
    assert {d for name, d in found.items() if name.startswith(("sin", "cos", "reciprocal"))} == {
        torch.float32
    }
    assert {d for name, d in found.items() if name.startswith(("group_norm", "scaled_dot"))} == {
        torch.bfloat16
    }


@needs_kernels
def test_every_quantized_layer_has_an_int8_kernel():
    report = lowered().report["lowering"]
    kernels, layers = kernels_of(lowered()), {x["path"]: x for x in quantized().report["layers"]}
    for path, layer in layers.items():
        assert kernels[path]["int8"] == (layer["activation_bits"] == 8), path
        assert not kernels[path]["fell_back"]
    assert kernels["down.weight"]["kernel"] == "onednn.qconv_pointwise.default"
    assert kernels["attention.out.weight"]["kernel"] == "onednn.qlinear_pointwise.default"
    assert kernels["conv_in.weight"]["reason"] == "its input is float"
    assert [kernels[a]["op"] for a in kernels.keys() - layers.keys()] == ["scaled_dot_product_attention"]
    assert 0.9 < report["flops"]["int8"] / report["flops"]["total"] < 1
    assert (report["engine"], report["compiled"], report["pack"]) == ("torch", False, None)
    assert report["not_compiled_because"] == "compile=False"
    # The graph that runs has one kernel for each, and no integers beside theirs.
    gm = lowered().network.gm
    calls = Counter(n.target for n in gm.graph.nodes if n.target in KERNELS)
    assert sum(calls.values()) == sum(k["int8"] for k in kernels.values())
    assert not gm.graph.find_nodes(op="call_function", target=QUANTIZE)
    assert {b.dtype for b in gm.buffers() if b.is_mkldnn} == {torch.int8}
    assert all(b.is_mkldnn for b in gm.buffers() if b.dtype in (torch.int8, torch.uint8))


@torch.no_grad()
def test_it_is_the_same_to_call():
    q, low = quantized(), lowered()
    assert (low.config, low.dtype, low.device) == (q.config, q.dtype, q.device)
    x = noise(4)
    expected = low(x, torch.tensor([300] * 4))
    for t in (300, 300.0, torch.tensor(300), torch.tensor([300])):
        assert torch.equal(low(x, t), expected)
    assert torch.equal(low(sample=x, timestep=300), expected)
    assert torch.equal(low(x.transpose(2, 3).contiguous().transpose(2, 3), 300), expected)
    low(x, 451)
    assert low.report["unseen_timesteps"] == {"451": 1}
    low.reset_unseen()
    with pytest.raises(TFMQError, match="2 timesteps for a batch of 4"):
        low(x, torch.tensor([1, 2]))


def test_guided_batches_and_labels():
    q = labelled("w8a8")
    low = lower(q, engine="torch", precision="float32", compile=False, strict=INT8)
    assert_guided_batches_agree(low, q)


@torch.no_grad()
def test_a_network_of_one_timestep_per_call():
    q = one_timestep(ScalarTime)
    low = lower(q, engine="torch", precision="float32", compile=False)
    assert [k["int8"] for k in low.report["lowering"]["kernels"]] == [INT8, INT8, False, False]
    for size in SIZES:
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(size))
        assert_same_but_for_ties([(low(x, t), q(x, t)) for t in TIMESTEPS])


@needs_bytes
@pytest.mark.parametrize("keyed", ["block", "all"])
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=needs_bfloat16)])
@torch.no_grad()
def test_packed_weights_compute_the_same_bits_in_half_the_memory(precision, keyed):
    plain, packed = (lowered("w4a8", keyed, precision, pack) for pack in (None, "int4"))
    for size in (1, 3):
        assert torch.equal(plain(noise(size), mixed(size)), packed(noise(size), mixed(size)))
    bits = {x["path"]: x["weight_bits"] for x in quantized("w4a8", keyed).report["layers"]}
    for path, kernel in kernels_of(packed).items():
        assert kernel["kernel"].startswith("tfmq.int4") == (bits.get(path) == 4 and kernel["int8"]), path
    weights = [b for b in packed.network.gm.buffers() if b.dtype is torch.uint8]
    rows = [p.flatten(1) for n, p in make(TinyUNet).named_parameters() if bits.get(n) == 4]
    assert sum(b.numel() for b in weights) == sum(len(r) * -(-r.shape[1] // 2) for r in rows)
    bytes_ = [low.report["lowering"]["weight_bytes"] for low in (plain, packed)]
    saved = sum(r.numel() for r in rows) - sum(b.numel() for b in weights)
    # But for the zero points, and for what oneDNN pads on some CPUs; all else weighs as before.
    assert 0.9 * saved < bytes_[0] - bytes_[1] <= (1 if INT8 else 1.1) * saved


@needs_kernels
def test_eight_bits_cannot_be_packed_and_stay():
    low = lowered("w8a8", pack="int4")
    assert "onednn.qconv_pointwise.default" in {k["kernel"] for k in kernels_of(low).values()}
    assert low.report["lowering"]["weight_bytes"] == lowered("w8a8").report["lowering"]["weight_bytes"]


GRANULARITIES = [{"group_size": 8}, {"activation_granularity": "token"}]


@torch.no_grad()
@pytest.mark.parametrize("changes", GRANULARITIES)
def test_scales_per_group_and_per_token_give_what_the_quantized_network_gives(changes):
    q = quantized(**changes)
    low = lower(q, engine="torch", precision="float32", compile=False)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in SIZES])


@needs_bfloat16
@torch.no_grad()
@pytest.mark.parametrize("changes", GRANULARITIES)
def test_scales_per_group_and_per_token_in_bfloat16(changes):
    q = quantized(**changes)
    half = lower(q, engine="torch", precision="bfloat16", compile=False)
    assert moved(half(noise(3), mixed(3)), q(noise(3), mixed(3)))[1] <= BFLOAT16


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "words"), [(GRANULARITIES[0], "its weight has scales per group"), (GRANULARITIES[1], "")]
)
def test_scales_per_group_run_in_float_and_are_reported_and_those_per_token_in_int8(changes, words):
    q = quantized(**changes)
    low = lower(q, engine="torch", precision="float32", compile=False)
    fallen = [k for k in kernels_of(low).values() if k["fell_back"]]
    assert all(words and k["reason"].startswith(words) and not k["int8"] for k in fallen)
    if words:
        with pytest.raises(TFMQError, match=f"strict: {len(fallen)} of 15 layers .* {words}"):
            lower(q, engine="torch", compile=False, strict=True)
    else:
        lower(q, engine="torch", compile=False, strict=True)
        assert kernels_of(low)["attention.qkv.weight"]["int8"]


@needs_avx2
@torch.no_grad()
@pytest.mark.usefixtures("without_vnni")
def test_without_vnni_what_does_not_saturate_is_int8(monkeypatch):
    q = quantized("w4a8", "all")
    with pytest.warns(UserWarning, match="this CPU has no int8 instructions .* beyond 64 steps from zero"):
        low = q.lower(engine="torch", precision="float32", compile=False)
    assert_int8_where_pairs_fit(q, low)
    assert_every_batch_size_and_step_agrees(low, q)
    if not INT8:  # the control: with 8-bit weights on int8 kernels the sums are wrong here
        monkeypatch.setattr(cpu, "int8_instructions", lambda: ["none"])
        wrong = quantized().lower(engine="torch", precision="float32", compile=False)
        assert moved(wrong(noise(3), mixed(3)), quantized()(noise(3), mixed(3)))[1] > FLIPPED_BY


@torch.no_grad()
@pytest.mark.usefixtures("without_int8")
def test_a_cpu_without_int8_instructions_says_so_and_computes_the_same():
    with pytest.warns(UserWarning, match="this CPU has no int8 instructions"):
        low = quantized().lower(engine="torch", precision="float32", compile=False)
    assert low.report["lowering"]["flops"]["int8"] == 0
    assert {k["reason"] for k in kernels_of(low).values() if k["fell_back"]} == {NO_INT8}
    assert_same_but_for_ties([(low(noise(n), mixed(n)), quantized()(noise(n), mixed(n))) for n in SIZES])


@torch.no_grad()
def test_a_missing_compiler_is_reported_and_the_kernels_run_all_the_same(monkeypatch, tmp_path):
    none = str(tmp_path / "none")
    # First: the settings keep the CXX of their first import. Their own patch, since pytest's does not bring them back.
    with torch._inductor.config.patch({"cpp.cxx": (none,)}):
        monkeypatch.setenv("CXX", none)
        low = lower(quantized(), engine="torch", precision="float32")
        report = low.report["lowering"]
        assert (report["compiled"], report["compiled_seconds"]) == (False, {})
        assert report["not_compiled_because"].startswith("no C++ compiler")
        assert torch.equal(low(noise(3), mixed(3)), lowered()(noise(3), mixed(3)))
        with pytest.raises(TFMQError, match=r"compile=True: no C\+\+ compiler .*use compile=False"):
            lower(quantized(), engine="torch", compile=True)


class Strange(nn.Module):
    """An operator that does not run in bfloat16."""

    def __init__(self):
        super().__init__()
        self.unet = TinyUNet()

    def forward(self, sample, timestep):
        return torch.fft.fft(self.unet(sample, timestep)).real


@needs_bfloat16
def test_an_operator_that_cannot_run_names_its_node():
    with pytest.raises(TFMQError, match=r"node fft_fft: aten\.fft_fft\.default cannot run here \(.*BFloat16"):
        lower(quantized(network_class=Strange), engine="torch", precision="bfloat16", compile=False)


@torch.no_grad()
def lower_again(talk, folder, cache, inputs, output):  # noqa: ARG001
    q = tfmq_fx.load(folder)
    low = q.lower(engine="torch", precision="float32", cache=cache, batch=2, compile=True)
    torch.save(low(*torch.load(inputs)), output)
    report = low.report["lowering"]
    assert report["cached"], report
    assert report["compiled"], report
    assert not counters["inductor"], counters


@needs_compiler
@torch.no_grad()
def test_compiled_once_for_all_steps_and_processes(tmp_path):
    q = labelled("w4a8", keyed="all")
    global_settings = torch._inductor.config.get_config_copy()
    cache = tmp_path / "cache"
    low = lower(q, engine="torch", precision="float32", cache=cache, batch=2, compile=True, strict=INT8)
    assert low.report["lowering"]["compiled"]
    assert torch._inductor.config.get_config_copy() == global_settings
    before = {k: dict(v) for k, v in counters.items()}
    x, y = torch.randn(2, 1, 6, 6), torch.tensor([0, 3])
    pairs = [(low(x, t, y), q(x, t, y)) for t in TIMESTEPS]
    pairs += [(low(x, TIMESTEPS[[i, 3]], y), q(x, TIMESTEPS[[i, 3]], y)) for i in range(10)]
    assert {k: dict(v) for k, v in counters.items()} == before  # nothing was traced or compiled
    assert low.report["lowering"]["compiled_seconds"].keys() == {"2"}
    assert_same_but_for_ties(pairs)
    plain = lower(q, engine="torch", precision="float32", compile=False)
    assert low.report["lowering"]["kernels"] == plain.report["lowering"]["kernels"]

    # Another process needs no compiler, and has the same bits.
    q.save_pretrained(tmp_path / "q")
    torch.save((x, mixed(2), y), tmp_path / "inputs.pt")
    files = [tmp_path / "q", cache, tmp_path / "inputs.pt", tmp_path / "output.pt"]
    finish(*start(lower_again, *files, environment={"CXX": str(tmp_path / "none")}))
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), low(x, mixed(2), y))


def test_code_that_lacks_a_kernel_is_not_used(tmp_path):
    """The check behind the report of a compiled network: as many calls in the C++ as kernels in the graph."""
    import zipfile

    gm = torch_engine.prepare_graph(quantized(), precision="float32", pack=None).gm
    call = "aoti_torch_cpu__qlinear_pointwise_tensor(x);\n"
    for calls, file in ((12, "all.pt2"), (11, "less.pt2")):
        with zipfile.ZipFile(tmp_path / file, "w") as archive:
            archive.writestr("model/x.wrapper.cpp", call * calls)
    torch_engine.check_calls(tmp_path / "all.pt2", gm)
    with pytest.raises(TFMQError, match="calls 11 int8 kernels where the graph has 12"):
        torch_engine.check_calls(tmp_path / "less.pt2", gm)


def test_a_batch_size_that_does_not_compile_names_its_shapes(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("cc1plus: out of memory\nand more")

    monkeypatch.setattr(torch_engine, "compile_to", fails)
    network = torch_engine.TorchCompiled(lambda: None, folder=tmp_path, nesting=Nesting(quantized().network))
    with pytest.raises(
        TFMQError, match=r"for inputs of \(3, 1, 8, 8\), \(3,\): RuntimeError: cc1plus: out of memory$"
    ):
        network(noise(3), mixed(3))
