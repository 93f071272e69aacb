"""The engine for GPUs, with the CPU in a GPU's place: the operators' reference implementations, and recordings in Python."""
# ruff: noqa: F811

import functools
import threading

import pytest
import torch

from benchmarks.networks.small import TIMESTEPS
from tests.helpers.agreement import moved as difference
from tests.helpers.elsewhere import DEVICE, Elsewhere, device, moved
from tests.helpers.gpu import CPU, gpu  # noqa: F401  (the latter is a fixture)
from tests.helpers.lowered import (
    BFLOAT16,
    assert_every_batch_size_and_step_agrees,
    assert_guided_batches_agree,
    assert_same_but_for_ties,
    kernels_of,
    mixed,
    noise,
)
from tests.helpers.nearest import labelled, quantized
from tfmq_fx.artefact.graph_json import tensors_of
from tfmq_fx.artefact.program import flat_graph
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.int8_kernels import CUDNN_PLANS, TILES
from tfmq_fx.graph.nodes import fresh
from tfmq_fx.passes import (
    TO_INT8,
    PassManager,
    cuda_kernels,
    fuse_epilogues,
    move_to_device,
    share_quantized,
    signed_activations,
)
from tfmq_fx.passes.int8.fold_weights import fold_weights
from tfmq_fx.passes.int8.kernels import GPU_KERNELS, arguments_of
from tfmq_fx.runtimes import cuda_engine
from tfmq_fx.runtimes.engine import Nesting


def lower(q, **settings):
    return q.lower("cuda", **{"compile": False, "precision": "float32"} | settings)


@pytest.fixture(scope="module")
def low(gpu):  # noqa: ARG001
    return lower(quantized("w4a8", "all"), strict=True)


def network(low, compile=False):
    """Return the network of `low` made anew, as for another call of `lower`."""
    own = low.network
    return cuda_engine.CudaNetwork(
        own.gm, nesting=own.nesting, compile=compile, folder=None, device=own.device
    )


def test_every_batch_size_and_step_gives_what_the_quantized_network_gives(low, gpu):
    before = gpu.made, gpu.replayed
    assert_every_batch_size_and_step_agrees(low, quantized("w4a8", "all"))
    assert gpu.made - before[0] == 2  # 3 and 16, beside the first: the timestep is data
    assert gpu.replayed - before[1] == 13


def test_guided_batches_and_labels(gpu):  # noqa: ARG001
    q = labelled("w8a8")
    assert_guided_batches_agree(lower(q, strict=True), q)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"group_size": 8}, {"activation_granularity": "token"}])
def test_scales_per_group_and_per_token(changes, gpu):  # noqa: ARG001
    q = quantized(**changes)
    low = lower(q)
    assert_same_but_for_ties([(low(noise(n), mixed(n)), q(noise(n), mixed(n))) for n in (1, 3)])
    fallen = [k for k in kernels_of(low).values() if k["fell_back"]]
    assert bool(fallen) == ("group_size" in changes)
    assert all(k["reason"].startswith("its weight has scales per group: the GPU's") for k in fallen)
    if fallen:
        with pytest.raises(TFMQError, match=f"strict: {len(fallen)} of 15 layers"):
            lower(q, strict=True)


@torch.no_grad()
def test_the_rest_computes_in_bfloat16_and_weights_stay_packed(low):
    q = quantized("w4a8", "all")
    packed = lower(q, precision=None, pack="int4")
    got, expected = packed(noise(10), TIMESTEPS), q(noise(10), TIMESTEPS)
    assert 1e-4 < difference(got, expected)[1] <= BFLOAT16
    assert got.dtype is torch.float32
    reports = [x.report["lowering"] for x in (low, packed)]
    assert reports[1]["precision"] == "bfloat16"
    kernels = [n for n in packed.network.gm.graph.nodes if n.target in GPU_KERNELS]
    is_packed = [arguments_of(n)["weight_zero"] is not None for n in kernels]
    assert is_packed.count(False) == 1  # of the edges' eight bits
    assert reports[1]["weight_bytes"] < reports[0]["weight_bytes"]


def test_the_report(low):
    report, kernels = low.report["lowering"], kernels_of(low)
    assert (report["target"], report["engine"], report["device"]) == ("cuda", "cuda", "stand-in")
    assert (report["compiled"], report["recorded"], report["instructions"]) == (False, True, ["sm_90"])
    assert report["not_compiled_because"] == "compile=False"
    assert "1" in report["compiled_seconds"]
    assert "threads" not in report
    layers = {x["path"]: x for x in quantized("w4a8", "all").report["layers"]}
    for path, layer in layers.items():
        assert kernels[path]["int8"] == (layer["activation_bits"] == 8), path
        assert not kernels[path]["fell_back"]
    down = kernels["down.weight"]
    assert (down["kernel"], down["precision"]) == ("tfmq.int8_conv2d.default", "i8")
    assert kernels["attention.out.weight"]["kernel"] == "tfmq.int8_linear.default"
    assert kernels["conv_in.weight"]["reason"] == "its input is float"
    assert 0.9 < report["flops"]["int8"] / report["flops"]["total"] < 1


@torch.no_grad()
def test_no_call_sees_anothers_buffers(low):
    first = low(noise(2), 300)
    kept = first.clone()
    low(noise(2) * 2, 500)
    assert torch.equal(first, kept)
    expected = {t: low(noise(2), t) for t in TIMESTEPS.tolist()}
    wrong = []

    def work(t):
        wrong.extend(t for _ in range(3) if not torch.equal(low(noise(2), t), expected[t]))

    threads = [threading.Thread(target=work, args=(t,)) for t in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_last_four_batch_sizes_are_kept(low, gpu):
    made, before = network(low), gpu.made
    for n in (1, 2, 3, 4, 5, 5, 1):
        made(noise(n), mixed(n))
    assert gpu.made - before == 6  # 1 was made twice
    assert made.seconds.keys() == {1, 2, 3, 4, 5}
    assert len(made.networks.made) == 4


def test_what_cannot_be_recorded_runs_all_the_same_and_says_so(low, monkeypatch):
    def refuses(*_, **__):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(cuda_engine, "record", refuses)
    made = network(low)
    assert torch.equal(made(noise(3), mixed(3)), low(noise(3), mixed(3)))
    assert made.not_recorded_because == "CUDA error: operation not permitted when stream is capturing"


def test_what_does_not_compile_runs_node_by_node_unless_asked_for(low, monkeypatch):
    def fails(*_, **__):
        raise ValueError("out of registers\nand more")

    monkeypatch.setattr(cuda_engine, "compiled", fails)
    monkeypatch.setattr(cuda_engine, "_milliseconds", lambda _: 1.0)
    made = network(low, compile=None)
    assert torch.equal(made(noise(3), mixed(3)), low(noise(3), mixed(3)))
    words = r"compiling for inputs of \(3, 1, 8, 8\), \(3,\): ValueError: out of registers"
    assert made.not_compiled_because == words.replace("\\", "")
    with pytest.raises(TFMQError, match=f"compile=True: {words}; use compile=False"):
        network(low, compile=True)(noise(3), mixed(3))


def test_tiles_are_measured_once_for_each_shape_and_kept(low, tmp_path):
    gm = fresh(low.network.gm)
    kernels = [n for n in gm.graph.nodes if n.target in GPU_KERNELS]
    inputs, measured = [noise(2), mixed(2)], []

    def measure(call):
        call()
        measured.append(call)
        if len(measured) == 2:
            raise RuntimeError("out of shared memory")  # cannot be the fastest
        return -len(measured)  # the last is the fastest

    file = tmp_path / "new" / "tiles.json"
    found = cuda_engine.tiles_of(gm, inputs, TILES, file=file, measure=measure)
    assert found.keys() == {n.name for n in kernels}
    assert set(found.values()) == {TILES[-1]}
    assert len(measured) % len(TILES) == 0
    assert len(measured) < len(kernels) * len(TILES)  # some have one shape
    assert cuda_engine.tiles_of(gm, inputs, TILES, file=file, measure=lambda _: 1 / 0) == found
    cuda_engine.set_tiles(gm, found)
    assert {tuple(arguments_of(n)["tile"]) for n in kernels} == {TILES[-1]}


@torch.no_grad()
def test_cudnn_is_a_candidate_where_it_is_installed(low, monkeypatch):
    monkeypatch.setattr(cuda_engine, "frontend", lambda: None)
    assert [cuda_engine.candidates(c) for c in (False, None, True)] == [((),), ((),), TILES]
    monkeypatch.setattr(cuda_engine, "frontend", lambda: object())
    assert [cuda_engine.candidates(c) for c in (False, None, True)] == [((),), ((),), (*TILES, *CUDNN_PLANS)]
    gm, inputs = fresh(low.network.gm), [noise(2), mixed(2)]
    expected = gm(*inputs)
    found = cuda_engine.tiles_of(gm, inputs, CUDNN_PLANS, file=None, measure=lambda call: call().sum().item())
    cuda_engine.set_tiles(gm, found)
    for node in gm.graph.nodes:
        if node.name in found:
            given = arguments_of(node)
            constants = [
                gm.get_buffer(given[n].target) for n in ("correction", "bias") if given[n] is not None
            ]
            assert all(c.dtype == torch.float32 for c in constants)  # cuDNN takes nothing else
    torch.testing.assert_close(gm(*inputs), expected)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_compiles_the_graph(gpu, monkeypatch):
    monkeypatch.setattr(cuda_engine, "_milliseconds", lambda _: 1.0)
    q = quantized("w4a8", "all")
    low = lower(q, compile=True, strict=True)
    assert_every_batch_size_and_step_agrees(low, q)
    assert low.report["lowering"]["compiled"]
    assert gpu.made == 3


@torch.no_grad()
def test_a_tensor_on_another_device_is_refused(low):
    with pytest.raises(TFMQError, match="'sample' is on meta, and this network is compiled for cpu"):
        low(noise(2).to("meta"), 300)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "openvino"}, 'engine=\'openvino\': for target "cpu", not for "cuda"; leave it out'),
        ({"engine": "cudnn"}, "engine='cudnn': unknown; use"),
        ({"pack": "int2"}, "pack='int2': unknown"),
        ({"precision": "float8"}, "precision='float8': unknown"),
    ],
)
def test_settings_of_another_target_are_refused(settings, words, gpu):  # noqa: ARG001
    with pytest.raises(TFMQError, match=words):
        lower(quantized(), **settings)


def test_a_target_and_its_engines():
    with pytest.raises(TFMQError, match='engine=\'cuda\': for target "cuda", not for "cpu"'):
        quantized().lower("cpu", engine="cuda")
    with pytest.raises(TFMQError, match="target='cdua': unknown; use cuda, cpu"):
        quantized().lower("cdua")


@torch.no_grad()
def test_passes_make_their_constants_on_the_networks_device():
    q = quantized("w4a8", "all", shared_zero_point=False)
    gm = flat_graph(q.with_fixed_sizes()[0])
    with device():
        moved(gm)
        move_to_device(gm, device=DEVICE)
        kernels = functools.partial(cuda_kernels, pack="int4")
        PassManager([*TO_INT8, signed_activations, kernels, fuse_epilogues, share_quantized])(gm)
        fold_weights(gm)
        assert {type(x) for x in tensors_of(gm).values()} <= {Elsewhere, torch.nn.Parameter}
        (got,) = gm(noise(3).to(DEVICE), mixed(3).to(DEVICE))
    assert sum(n.target in GPU_KERNELS for n in gm.graph.nodes) == 12
    assert_same_but_for_ties([(got.cpu(), q(noise(3), mixed(3)))])


class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = torch.nn.Buffer(torch.zeros(1))

    def forward(self, x):
        self.calls.add_(1)
        return (x + self.calls,)


def test_recording_is_no_call_of_the_users(gpu):  # noqa: ARG001
    with torch.no_grad():
        exported = torch.export.export(Counts(), (torch.zeros(2),), strict=False)
    gm = fresh(exported.module(check_guards=False))
    made = cuda_engine.CudaNetwork(gm, nesting=Nesting(gm), compile=False, folder=None, device=CPU.device)
    assert [made(torch.zeros(2))[0].tolist() for _ in range(3)] == [[1, 1], [2, 2], [3, 3]]
    assert made(torch.zeros(1, 2))[0].tolist() == [[4, 4]]  # all shapes share it
