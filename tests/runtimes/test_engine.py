"""What every engine keeps to: threads get their own outputs, a damaged cache is made anew, and no gradients."""

import copy
import functools
import json
import logging
import shutil
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS
from tests.helpers.lowered import kept, lower, mixed, noise
from tests.helpers.nearest import quantized
from tests.helpers.processes import finish, start
from tfmq_fx.artefact.drop_in import Tally
from tfmq_fx.base import files
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import MANIFEST, damaged
from tfmq_fx.runtimes import torch_engine
from tfmq_fx.runtimes.engine import PerShape

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="this needs the openvino extra")
needs_compiler = pytest.mark.skipif(bool(torch_engine.compiler_missing()), reason="there is no C++ compiler")
OPENVINO = pytest.param({"engine": "openvino"}, marks=needs_openvino, id="openvino")
EAGER = pytest.param({"engine": "torch", "compile": False}, id="torch-eager")
COMPILED = pytest.param({"engine": "torch", "compile": True}, marks=needs_compiler, id="torch-compiled")
THREADS, CALLS = 6, 20


def network(settings):
    q = quantized("w4a8")
    return lower(q, precision="float32", batch=2, cache=kept(), **settings) if settings else q


@functools.cache
def library():
    """Return the network's library, compiled once: it takes half a minute."""
    network({"engine": "torch", "compile": True})
    (file,) = Path(kept()).rglob(torch_engine.LIBRARY)
    return file


@pytest.fixture
def eager_switches():
    """Let Python change threads as often as it can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def together(work, count=THREADS):
    """Run work(0), work(1), .. in a thread each, started at one moment, and raise what they raise."""
    barrier, errors = threading.Barrier(count), []

    def run(i):
        try:
            barrier.wait()
            work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("settings", [pytest.param({}, id="q"), OPENVINO, EAGER, COMPILED])
def test_every_thread_gets_the_outputs_of_its_own_inputs(settings):
    model = network(settings)
    sizes = (2, 2) if settings.get("compile") else (2, 3)  # Inductor takes half a minute for each
    inputs = {
        (i, j): (torch.randn(sizes[j % 2], 1, 8, 8) * (i + 1), mixed(sizes[j % 2]))
        for i in range(THREADS)
        for j in range(CALLS)
    }
    with torch.no_grad():
        expected = {key: model(*x) for key, x in inputs.items()}
    got = {}

    @torch.no_grad()
    def work(i):
        for j in range(CALLS):
            got[i, j] = model(*inputs[i, j])

    together(work)
    assert [key for key in inputs if not torch.equal(got[key], expected[key])] == []  # kept until now


@needs_openvino
def test_threads_share_a_network_that_is_compiled_while_they_wait(tmp_path):
    low = lower(quantized("w4a8"), engine="openvino", precision="float32", cache=tmp_path)
    compile_, compiled = low.network.networks.make, []
    low.network.networks.make = lambda inputs: compiled.append(len(inputs[0])) or compile_(inputs)
    got = {}

    @torch.no_grad()
    def work(i):
        got[i] = low(noise(5 + i % 2), mixed(5 + i % 2))

    together(work)
    assert sorted(compiled) == [5, 6]
    assert all(torch.equal(got[i], got[i % 2]) for i in got)
    assert {"1", "5", "6"} == low.report["lowering"]["compiled_seconds"].keys()


def test_nobody_waits_for_another_shape_and_a_failure_does_not_stay():
    began, go_on = threading.Event(), threading.Event()
    failing = [True]

    def make(inputs):
        if len(inputs[0]) == 2:
            began.set()
            assert go_on.wait(60)
            if failing.pop():
                raise TFMQError("no")
        return len(inputs[0])

    networks = PerShape(make)
    failing += [True]

    def slow(_):
        with pytest.raises(TFMQError, match="no"):
            networks.of([noise(2)])

    thread = threading.Thread(target=slow, args=(0,))
    thread.start()
    assert began.wait(60)
    assert [networks.of([noise(n)]) for n in (1, 3, 4, 5, 6, 1)] == [1, 3, 4, 5, 6, 1]
    go_on.set()
    thread.join()
    failing[:] = [False]
    assert networks.of([noise(2)]) == 2
    assert networks.latest() == 2
    assert [len(shapes[0]) for shapes in networks.made] == [4] * PerShape.KEPT


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("settings", [pytest.param({}, id="q"), OPENVINO, EAGER])
def test_threads_count_unseen_timesteps_exactly(settings):
    model = network(settings)
    model.reset_unseen()
    unseen = torch.arange(1000)[~torch.isin(torch.arange(1000), TIMESTEPS)]
    together(lambda _: [model._look_up("timestep", t, model.timesteps) for t in unseen.split(25)])
    counts = model.report["unseen_timesteps"]
    model.reset_unseen()
    assert counts == {str(t.item()): THREADS for t in unseen}


class Slow(int):
    """A timestep during whose look-up in a dict Python changes threads."""

    def __hash__(self):
        time.sleep(1e-4)
        return int(self)


def test_no_count_is_lost_between_reading_and_writing_it():
    counts = Tally()
    together(lambda _: [counts.add(Slow(451)) for _ in range(CALLS)])
    assert counts.in_order() == [(451, THREADS * CALLS)]
    assert copy.deepcopy(counts) == counts  # as a quantized network is copied, without the lock


@pytest.mark.parametrize("settings", [OPENVINO, EAGER])
@torch.no_grad()
def test_calls_are_counted_while_another_thread_compiles(settings, monkeypatch):
    low = network(settings)
    low.reset_unseen()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as torch says in all threads
    low(noise(2), 451)
    assert low.report["unseen_timesteps"] == {"451": 1}
    low.reset_unseen()


def files_of(folder):
    return sorted(f for f in folder.rglob("*") if f.is_file())


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


DAMAGES = {
    "flipped": flip,
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "removed": lambda file: file.unlink(),
    "text": lambda file: file.write_text("Not Found\n"),
}


@pytest.mark.parametrize("settings", [OPENVINO, COMPILED])
@torch.no_grad()
def test_a_damaged_file_of_the_cache_is_made_anew(settings, tmp_path, monkeypatch, caplog):
    if settings["engine"] == "torch":
        monkeypatch.setattr(torch_engine, "compile_to", lambda file, *_: shutil.copyfile(library(), file))

    def again():
        low = lower(quantized("w4a8"), precision="float32", batch=2, cache=tmp_path / "cache", **settings)
        return low(noise(2), mixed(2)), low.report["lowering"]["kernels"]

    expected, kernels = again()
    names = [f.relative_to(tmp_path) for f in files_of(tmp_path)]
    assert len(names) == (7 if settings["engine"] == "openvino" else 4)
    for name in names:
        for damage in DAMAGES.values():
            damage(tmp_path / name)
            caplog.clear()
            with caplog.at_level(logging.WARNING, files.log.name):
                got = again()
            assert torch.equal(got[0], expected)
            assert got[1] == kernels
            (said,) = (r.message for r in caplog.records if r.name == files.log.name)
            assert name.name in said or name.name == MANIFEST
            assert [f.relative_to(tmp_path) for f in files_of(tmp_path)] == names
            assert not any(damaged(f.parent) for f in files_of(tmp_path))


@needs_compiler
@pytest.mark.slow
@torch.no_grad()
def test_a_library_with_a_flipped_bit_is_compiled_again(tmp_path):
    shutil.copytree(library().parent.parent, tmp_path / library().parent.parent.name)
    file = tmp_path / library().relative_to(kept())
    flip(file)
    settings = {"engine": "torch", "compile": True, "precision": "float32", "batch": 2}
    low = lower(quantized("w4a8"), cache=tmp_path, **settings)
    assert torch.equal(low(noise(2), mixed(2)), network(settings)(noise(2), mixed(2)))
    assert not damaged(file.parent)


@needs_openvino
def test_a_cache_of_an_older_layout_is_not_read(tmp_path, monkeypatch):
    lower(quantized("w4a8"), engine="openvino", cache=tmp_path)
    monkeypatch.setattr("tfmq_fx.runtimes.engine.LAYOUT", 2)
    old = lower(quantized("w4a8"), engine="openvino", cache=tmp_path)
    assert not old.report["lowering"]["cached"]


def lower_and_call(talk, artefact, cache, output):
    q = tfmq_fx.load(artefact)
    talk.send("ready")
    talk.recv()
    with torch.no_grad():
        low = lower(q, engine="openvino", precision="float32", batch=2, cache=cache)
        torch.save((low(noise(2), mixed(2)), low.report["lowering"]["kernels"]), output)


@needs_openvino
@torch.no_grad()
def test_processes_that_find_a_damaged_cache_at_once_all_compute_the_same(tmp_path):
    quantized("w4a8").save_pretrained(tmp_path / "q")
    cache = tmp_path / "cache"
    low = lower(tfmq_fx.load(tmp_path / "q"), engine="openvino", precision="float32", batch=2, cache=cache)
    expected = low(noise(2), mixed(2))
    for file in files_of(cache):
        flip(file)
    outputs = [tmp_path / f"{i}.pt" for i in range(2)]
    processes = [start(lower_and_call, tmp_path / "q", cache, output) for output in outputs]
    for _, talk in processes:
        assert talk.recv() == "ready"
    for _, talk in processes:
        talk.send("go")
    for process in processes:
        finish(*process)
    for output in outputs:
        got, kernels = torch.load(output)
        assert torch.equal(got, expected)
        assert kernels == low.report["lowering"]["kernels"]
    assert not any(damaged(f.parent) for f in files_of(cache))


@pytest.mark.parametrize("settings", [OPENVINO, EAGER])
def test_a_gradient_is_refused(settings):
    low = network(settings)
    x = noise(2)
    expected = low(x, 300)
    x.requires_grad_()
    words = r"^forward: {} requires a gradient, but a lowered network has none; call the network .* torch\.no_grad\(\)\.$"
    with pytest.raises(TFMQError, match=words.format("sample")):
        low(sample=x, timestep=300)
    with pytest.raises(TFMQError, match=words.format("argument 1")):
        low(x, 300)
    with pytest.raises(TFMQError, match=words.format("timestep")):
        low(noise(2), timestep=torch.tensor(300.0, requires_grad=True))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(low(x, 300), expected)
    assert torch.equal(low(x.detach(), 300), expected)


def test_a_manifest_is_plain_json(tmp_path):
    files.keep_folder(tmp_path / "x", lambda new: (new / "a").write_text("text"))
    entry = json.loads((tmp_path / "x" / MANIFEST).read_text())["a"]
    assert entry == {
        "bytes": 4,
        "sha256": "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1",
    }
