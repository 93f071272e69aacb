import json
import random
import time

import pytest
import torch
from safetensors import safe_open

import tfmq_fx
from benchmarks.networks.small import TIMESTEPS, calibration
from tests.helpers.artefacts import edit
from tests.helpers.nearest import recipe
from tests.helpers.processes import start
from tfmq_fx.artefact.saving import CONFIG, GRAPH, REPORT, WEIGHTS
from tfmq_fx.base.errors import TFMQError

BATCH = calibration().tensors
X, T = BATCH["sample"], BATCH["timestep"]


@pytest.fixture
def folder(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "q")
    return tmp_path / "q"


def test_a_round_trip_is_bit_exact(tiny, folder):
    loaded = tfmq_fx.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(X, T), tiny(X, T))
    assert loaded.recipe == json.loads(json.dumps(tiny.recipe))
    assert torch.equal(loaded.timesteps, TIMESTEPS)
    assert loaded.report == json.loads(json.dumps(tiny.report))
    loaded.save_pretrained(folder.with_name("again"))
    for name in (WEIGHTS, GRAPH, CONFIG, REPORT):
        assert (folder.with_name("again") / name).read_bytes() == (folder / name).read_bytes()


def test_the_layout_is_what_is_documented(tiny, folder):
    """Read with safetensors and numpy alone, as somebody else's program would."""
    config = json.loads((folder / CONFIG).read_text())["quantization_config"]
    assert (config["quant_method"], config["format_version"]) == ("tfmq", 4)
    with safe_open(folder / WEIGHTS, "np") as file:
        packed, scale, zero_point = (
            file.get_tensor(f"down.weight_{part}") for part in ("q", "scale", "zero_point")
        )
    spec = config["tensors"]["down.weight_q"]
    assert spec["bits"] == 4
    q, zero_point = (
        torch.tensor([nibble for byte in x.tolist() for nibble in (byte & 15, byte >> 4)])
        for x in (packed, zero_point)
    )
    w = (q.reshape(spec["shape"]) - zero_point.view(-1, 1, 1, 1)) * torch.tensor(scale).view(-1, 1, 1, 1)
    node = next(
        n
        for n in tiny.network.graph.nodes
        if n.name.startswith("dequantize") and "down_weight_q" in str(n.args[0])
    )
    interpreter = torch.fx.Interpreter(tiny.network)
    for arg in node.all_input_nodes:
        interpreter.env[arg] = interpreter.run_node(arg)
    assert torch.equal(interpreter.run_node(node), w)


def test_nothing_is_pickled(folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([CONFIG, WEIGHTS, GRAPH, REPORT])
    assert not any(p.read_bytes()[:2] == b"\x80\x04" for p in folder.iterdir())


def test_saving_again_replaces_what_is_ours(tiny, folder):
    tiny.save_pretrained(folder)
    tfmq_fx.load(folder)
    assert [p.name for p in folder.parent.iterdir()] == ["q"]


def test_a_folder_that_is_not_ours_is_left_alone(tiny, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(TFMQError, match="exists and is not a tfmq artefact"):
        tiny.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TFMQError, match="cannot be written"):
        tiny.save_pretrained(tmp_path / "file" / "q")


def test_a_failure_while_writing_leaves_nothing(tiny, tmp_path, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tfmq_fx.artefact.saving.save_file", full)
    with pytest.raises(TFMQError, match="No space left"):
        tiny.save_pretrained(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [WEIGHTS, GRAPH, CONFIG, REPORT])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damaged_files_are_refused(folder, name, damage):
    file = folder / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x80
        file.write_bytes(content)
    with pytest.raises(TFMQError, match=name):
        tfmq_fx.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("quantization_config"), "not a tfmq artefact"),
        (lambda c: c["quantization_config"].update(format_version=99), "format version 99"),
        (
            lambda c: c["quantization_config"]["tensors"]["down.weight_q"].update(shape=[1, 2]),
            "takes 1 bytes",
        ),
        (lambda c: c["quantization_config"]["tensors"].pop("down.weight_q"), "down.weight_q"),
        (lambda c: c["quantization_config"].pop("interface"), "quantization_config has no 'interface'"),
        (lambda c: c["quantization_config"].update(timesteps=[]), r"config\.json: 'timesteps' is empty"),
        (
            lambda c: c["quantization_config"]["interface"]["inputs"]["sample"].update(dtype="load"),
            "'load' is not a valid dtype",
        ),
        (lambda c: c["quantization_config"]["sha256"].update({"../../etc/passwd": "0"}), "unknown file"),
        (
            lambda c: c["quantization_config"]["tensors"]["down.weight_q"].update(dtype="load"),
            "not a valid dtype",
        ),
    ],
)
def test_altered_configs_are_refused(folder, change, words):
    edit(folder / CONFIG, change)
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.load(folder)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"folder": "/nowhere/at/all"}, "no such folder"),
        ({"folder": None}, "folder: expected str or Path, found NoneType"),
        ({"folder": "/", "max_memory": "2GB"}, "max_memory: '2GB' is not a number of GiB"),
        ({"folder": "/", "max_memory": -1}, "max_memory: -1 is not a number of GiB"),
        ({"folder": "/", "max_memory": float("nan")}, "max_memory: nan is not a number of GiB"),
    ],
)
def test_what_cannot_be_loaded_is_named(arguments, words):
    with pytest.raises(TFMQError, match=words):
        tfmq_fx.load(**arguments)


def test_a_missing_file_is_named_once(folder):
    (folder / GRAPH).unlink()
    with pytest.raises(TFMQError) as error:
        tfmq_fx.load(folder)
    assert str(error.value) == f"{folder / GRAPH}: missing."


def test_a_missing_list_of_hashes_is_named(folder):
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]["sha256"]
    (folder / CONFIG).write_text(json.dumps(config))
    with pytest.raises(TFMQError, match=r"config\.json: quantization_config has no 'sha256'"):
        tfmq_fx.load(folder)


def test_a_pipelines_folder_shows_the_artefact_in_it(folder):
    (folder.parent / "model_index.json").write_text("{}")
    with pytest.raises(TFMQError, match=f"is a pipeline's folder; its artefacts are {folder}"):
        tfmq_fx.load(folder.parent)


def save_forever(talk, folder, target):
    q = tfmq_fx.load(folder)
    talk.send("ready")
    while True:
        q.save_pretrained(target)


def test_a_killed_writer_leaves_the_folder_absent_or_whole(folder, tmp_path):
    target, rng = tmp_path / "out", random.Random(0)
    for _ in range(5):
        process, talk = start(save_forever, folder, target)
        assert talk.recv() == "ready"
        time.sleep(rng.uniform(0.01, 0.3))
        process.kill()
        process.join()
        if target.exists():
            tfmq_fx.load(target)


class Turns(torch.nn.Module):
    """Rotates by a table of complex numbers in double precision, which safetensors does not know."""

    def __init__(self):
        super().__init__()
        self.linear, self.time = torch.nn.Linear(8, 8), torch.nn.Linear(1, 8)
        self.turns = torch.polar(torch.ones(4).double(), torch.arange(4.0).double())

    def forward(self, sample, timestep):
        h = self.linear(sample) + self.time(timestep[:, None] / 1000)
        turned = torch.view_as_complex(h.unflatten(-1, (4, 2))) * self.turns
        return torch.view_as_real(turned).flatten(-2).to(sample.dtype)


def test_double_complex_constants_are_kept_exactly(tmp_path):
    given = {"sample": torch.randn(12, 8), "timestep": torch.tensor([900.0, 600, 300]).repeat(4)}
    q = tfmq_fx.quantize(
        Turns().eval(), recipe("w8a8"), calibration=tfmq_fx.CalibrationSet.from_tensors(given)
    )
    q.save_pretrained(tmp_path)
    loaded = tfmq_fx.load(tmp_path)
    assert torch.equal(loaded(**given), q(**given))
    assert any(x.dtype == torch.complex128 for x in loaded.network.buffers())
    one = {n: x[:1] for n, x in given.items()}  # products of one row depend on where the memory is
    assert torch.equal(loaded(**one), q(**one))
