"""Artefacts that nobody wrote: damaged ones and forged ones. `load` refuses them in one line, or they are still the same.

Damage leaves the hashes as they were: what loads then gives the same bits. A forger recomputes them: what loads then is
another network, but nothing in the folder has run, nothing was written, and nothing huge was allocated.
"""

import functools
import hashlib
import json
import os
import random
import resource
import shutil
import struct
import sys
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, TinyUNet, calibration, make
from tfmq_fx.artefact.saving import CONFIG, GRAPH, REPORT, WEIGHTS, _config_digest
from tfmq_fx.base.errors import TFMQError

FILES = (CONFIG, WEIGHTS, GRAPH, REPORT)
ROOM = 2**30  # bytes that a load may allocate beyond what the process has
BATCH = calibration(10).tensors
X, T = BATCH["sample"], BATCH["timestep"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(an artefact, its outputs)"""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    tfmq_fx.quantize(make(TinyUNet), nearest(), calibration=calibration(10)).save_pretrained(folder)
    with torch.no_grad():
        return folder, tfmq_fx.load(folder)(X, T)


def nearest():
    return tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole[0], tmp_path / "q")


FORBIDDEN = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "pickle.find_class",
)
_watching: list[list[tuple[str, tuple[Any, ...]]]] = []  # of the `watched` that is entered


@functools.cache
def _audit():
    """Add the hook of this process, once: a hook stays for good, and id() calls all of them."""

    def hook(event, args):
        if _watching and (event in FORBIDDEN or (event == "open" and wants_to_write(args))):
            _watching[-1].append((event, args))

    sys.addaudithook(hook)


@contextmanager
def watched(folder):
    """No more memory than ROOM, no program, no file written, no module from the folder."""
    _audit()
    found = []
    _watching.append(found)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before, modules = resource.getrlimit(resource.RLIMIT_AS), set(sys.modules)
    there = sorted(p.name for p in folder.parent.iterdir())
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        _watching.pop()
    assert not found
    assert sorted(p.name for p in folder.parent.iterdir()) == there
    new = [sys.modules[m] for m in set(sys.modules) - modules]
    assert not any(str(folder.parent) in str(m.__dict__.get("__file__")) for m in new)


def wants_to_write(args):
    _, mode, flags = args
    return (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 3)


def outcome(folder):
    """The model, or None when it was refused as it should be."""
    try:
        return tfmq_fx.load(folder)
    except TFMQError as error:
        text = str(error)
        assert len(text.splitlines()) == 1, text
        assert len(text) < 600, text
        assert any(name in text for name in FILES) or str(folder) in text, text
        return None


def same(model, expected):
    with torch.no_grad():
        return torch.equal(model(X, T), expected)


def check_damage(folder, expected):
    """Refused, or the same bits; whether it was refused."""
    with watched(folder):
        model = outcome(folder)
    assert model is None or same(model, expected)
    return model is None


def rehash(folder):
    """As a forger does."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        digests = config["quantization_config"]["sha256"]
        for name in (WEIGHTS, GRAPH):
            digests[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        digests[CONFIG] = _config_digest(config)
        (folder / CONFIG).write_text(json.dumps(config))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # the config itself is broken


@pytest.mark.parametrize("name", FILES)
def test_truncated_files(whole, folder, name):
    content, rng = (folder / name).read_bytes(), random.Random(name)
    for length in {0, 1, 7, 8, 9, len(content) - 1, *(rng.randrange(len(content)) for _ in range(24))}:
        (folder / name).write_bytes(content[:length])
        refused = check_damage(folder, whole[1])
        assert refused or content[length:].isspace()


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits(whole, folder, name):
    content, rng = (folder / name).read_bytes(), random.Random(name)
    refused = 0
    tries = 10 if name == REPORT else 60  # each loads and runs
    for _ in range(tries):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(flipped)
        refused += check_damage(folder, whole[1])
    # The text of the report may be any; in the config, white space.
    assert refused == tries if name in (WEIGHTS, GRAPH) else refused <= tries


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, GRAPH])
def test_flipped_bits_whose_hash_was_made_to_match(folder, name):
    content, config, rng = (
        (folder / name).read_bytes(),
        (folder / CONFIG).read_bytes(),
        random.Random(name + "!"),
    )
    size = (
        struct.unpack("<Q", content[:8])[0] + 8 if name == WEIGHTS else len(content)
    )  # the header, as a rule
    for i in range(60):
        flipped = bytearray(content)
        flipped[rng.randrange(size if i % 4 else len(content))] ^= 1 << rng.randrange(8)
        (folder / CONFIG).write_bytes(config)
        (folder / name).write_bytes(flipped)
        rehash(folder)
        with watched(folder):
            outcome(folder)


VALUES: tuple[object, ...] = (
    None, True, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**30, -(2**70), 1e308, float("nan"), float("inf"), "", "x",
    "../../x", "/etc/passwd", "os.system", "__class__", "a\nb", 'x")\nraise SystemExit(3)\n#', [], {}, [[]], [1, 2],
    [-1, -8], [2**32, 2**32], [2**40], [0, 2**62], {"node": "nothing"}, {"device": "cuda:99"}, {"device": "no\nne"},
    {"float": "1e9"}, {"dtype": "torch.load"}, {"slice": [1, 2, 3, 4]}, {"tuple": 5}, {"dict": 5}, "torch.float64",
    "builtins.eval", "aten.from_file.default", "aten.save.default", "aten.__class__.default", "aten.conv2d.__init__",
    "quantized_decomposed.__dict__.default", "operator.attrgetter", "math.__loader__",
)  # fmt: skip


def places(value, found):
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        places(inner, found)
    return found


def mutate(value, rng):
    """One change somewhere in a JSON value, shallow places as often as deep ones."""
    found = places(value, [])
    shallow = places(dict.fromkeys(value), [])
    container, key = rng.choice(found) if rng.random() < 0.8 else (value, rng.choice(shallow)[1])
    kind = rng.randrange(5)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice([v for v in VALUES if isinstance(v, str)])] = container.pop(key)
    elif kind == 2 and isinstance(container, list):
        container.append(rng.choice(VALUES))
    elif kind == 3:
        other = rng.choice(found)
        container[key] = json.loads(json.dumps(other[0][other[1]]))
    else:
        container[key] = rng.choice(VALUES)


@pytest.mark.parametrize("forged", [False, True], ids=["damaged", "forged"])
@pytest.mark.parametrize("name", [CONFIG, GRAPH, REPORT])
def test_altered_json(whole, folder, name, forged):
    texts = {n: (folder / n).read_bytes() for n in (CONFIG, name)}
    rng = random.Random(f"{name} {forged}")
    for _ in range(10 if name == REPORT else 100):
        for n, text in texts.items():
            (folder / n).write_bytes(text)
        data = json.loads(texts[name])
        mutate(data if rng.random() < 0.3 else data.get("quantization_config", data), rng)
        (folder / name).write_text(json.dumps(data))
        if forged:
            rehash(folder)
            with watched(folder):
                outcome(folder)
        else:
            check_damage(folder, whole[1])


@pytest.mark.parametrize("name", [CONFIG, GRAPH, REPORT])
@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "\ufeff{}", "[" * 200_000, '{"a":' * 100_000, "1" * 10_000, '{"a": NaN}', '{"a": -Infinity}',
        '{"nodes": [], "nodes": []}', '{"nodes": [], "submodules": {}}',
    ],
    ids=lambda t: repr(t[:30]),
)  # fmt: skip
def test_strange_json(whole, folder, name, text):
    (folder / name).write_text(text)
    rehash(folder)
    with watched(folder):
        model = outcome(folder)
    assert model is None or (name == REPORT and same(model, whole[1]))


def edited(folder, name, change):
    data = json.loads((folder / name).read_text())
    change(data)
    (folder / name).write_text(json.dumps(data))
    rehash(folder)


BREAKOUT = 'x): pass\nimport os; os.system("touch /tmp/tfmq-was-here")\ndef f(y'


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.update(kwargs={BREAKOUT: 1}),
        lambda n: n.update(kwargs={"lambda": 1}),
        lambda n: n.update(name=BREAKOUT),
        lambda n: n.update(name="import"),
        lambda n: n.update(target="aten.save.default", args=[{"node": n["name"]}, "/tmp/tfmq-was-here"]),
        lambda n: n.update(target="aten.from_file.out", args=["/etc/passwd"]),
        lambda n: n.update(op="placeholder", target=BREAKOUT),
        lambda n: n.update(op="call_method", target="__class__"),
        lambda n: n.update(op="call_module", target="../x"),
        lambda n: n.update(op="get_attr", target='x")\nraise SystemExit(3)\n("'),
    ],
)
def test_a_graph_cannot_bring_code(folder, change):
    """torch.fx writes the graph as Python source and runs that."""
    edited(folder, GRAPH, lambda g: change(next(n for n in g["nodes"] if n["op"] == "call_function")))
    with watched(folder):
        assert outcome(folder) is None


@pytest.mark.parametrize(
    "name", ['x")\nraise SystemExit(3)\n("', "../../x", "a..b", "", "forward", "__class__.x", "a\0b"]
)
def test_names_of_tensors(folder, name):
    """In all three files that have them."""
    tensors = load_file(folder / WEIGHTS)
    old = next(n for n in tensors if n.endswith("weight_q"))
    tensors[name] = tensors.pop(old)
    save_file(tensors, folder / WEIGHTS)
    edited(folder, CONFIG, lambda c: rename(c["quantization_config"]["tensors"], old, name))
    text = (folder / GRAPH).read_text().replace(json.dumps(old), json.dumps(name))
    (folder / GRAPH).write_text(text)
    rehash(folder)
    with watched(folder):
        assert outcome(folder) is None


def rename(mapping, old, new):
    mapping[new] = mapping.pop(old)


@pytest.mark.parametrize(
    "spec",
    [
        {"shape": [10**10], "quant_min": 0, "quant_max": 0, "bits": 0},  # no bits, no bytes, much memory
        {"shape": [10**10]},
        {"shape": [2**32, 2**32]},  # nothing, modulo 2**64
        {"shape": [-1, -8]},
        {"shape": [1] * 5000},
        {"shape": 8},
        {"shape": [8.0]},
        {"shape": ["8"]},
        {"quant_min": -(2**70)},
        {"quant_max": 2**70},
        {"quant_max": 7},
        {"quant_min": True},
        {"bits": 3},
        {"dtype": "float32"},
        {"dtype": "bool"},
        {"dtype": "nothing"},
        {"dtype": "load"},
        {"dtype": None},
    ],
    ids=repr,
)
def test_other_shapes_and_bits(folder, spec):
    def change(config):
        found = config["quantization_config"]["tensors"]
        found[next(n for n in found if n.endswith("weight_q"))].update(spec)

    edited(folder, CONFIG, change)
    with watched(folder):
        assert outcome(folder) is None


def header(claimed, tensors, data=b""):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text) if claimed is None else claimed) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 8, header(2**63, {}), header(2**40, {}), header(99_999_999, {}), header(0, {}),
        header(None, {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        header(None, {"x": {"dtype": "F32", "shape": [2**32, 2**32], "data_offsets": [0, 0]}}),
        header(None, {"x": {"dtype": "F32", "shape": [2**63, 4], "data_offsets": [0, 0]}}),
        header(None, {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"\0" * 4),
        header(None, {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, b"\0" * 4),
        header(None, {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        struct.pack("<Q", 8) + b'{"x":{}}', struct.pack("<Q", 40_000) + b'{"a":' * 8000,
        b"PK\x03\x04" + b"\0" * 100, b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
    ids=lambda c: repr(c[:24]),
)  # fmt: skip
def test_strange_weights(folder, content):
    (folder / WEIGHTS).write_bytes(content)
    rehash(folder)
    with watched(folder):
        assert outcome(folder) is None


@pytest.mark.parametrize("listed", ["../../x", "/etc/passwd", "graph.json/../x", "", "report.json"])
def test_no_file_outside_is_read(folder, listed):
    edited(folder, CONFIG, lambda c: c["quantization_config"]["sha256"].update({listed: "0"}))
    with watched(folder):
        assert outcome(folder) is None


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_plain_file(whole, folder, name):
    """Links to files are taken, as the hub's cache has them; loops, devices, pipes and folders are not waited for."""
    file, content = folder / name, (folder / name).read_bytes()
    (folder / "elsewhere").write_bytes(content)
    for target in (name, "/dev/zero", "/dev/null", ".", "nowhere"):
        file.unlink()
        file.symlink_to(target)
        with watched(folder):
            assert outcome(folder) is None
    file.unlink()
    file.symlink_to("elsewhere")
    assert same(tfmq_fx.load(folder), whole[1])
    file.unlink()
    os.mkfifo(file)
    with watched(folder):
        assert outcome(folder) is None


def test_modules_in_the_folder_are_not_imported(monkeypatch, whole, folder):
    for name in ("torch", "json", "diffusers", "tfmq_fx", "sitecustomize", "modeling"):
        (folder / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(folder)
    edited(
        folder, CONFIG, lambda c: c["quantization_config"]["interface"].update(output_type="modeling.Output")
    )
    with watched(folder):
        assert outcome(folder) is None
    edited(folder, CONFIG, lambda c: c["quantization_config"]["interface"].update(output_type=None))
    assert same(tfmq_fx.load(folder), whole[1])
    assert torch.equal(tfmq_fx.load(folder).timesteps, TIMESTEPS)
