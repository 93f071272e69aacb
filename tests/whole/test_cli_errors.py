"""Every wrong use of the command line is one line on stderr, exit code 2, and leaves nothing behind."""

import shutil
import sys
from types import SimpleNamespace

import pytest

from benchmarks.networks.pipelines import ddpm
from tests.helpers.artefacts import edit
from tests.helpers.command_line import corrupt, run
from tfmq_fx import cli
from tfmq_fx.demo import FOLDER

LONG = "x" * 300
QUICK = ("--steps", 2, "--num-samples", 1)


@pytest.fixture(scope="module")
def template(tiny, tmp_path_factory):
    """A folder with what the table below names."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "file").write_text("text")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("")
    tiny.save_pretrained(folder / "small")  # of another size than the pipeline's pictures
    shutil.copytree(folder / "small", folder / "configured")
    edit(folder / "configured" / "config.json", lambda config: config.update(in_channels=1))
    shutil.copytree(folder / "small", folder / "damaged")
    (folder / "damaged" / "graph.json").write_text("{}")
    shutil.copytree(folder / "small", folder / "another")
    (folder / "another" / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    shutil.copytree(FOLDER, folder / "broken")
    corrupt(folder / "broken")
    (folder / "no-json").mkdir()
    (folder / "no-json" / "model_index.json").write_text("{")
    (folder / "no-json" / "config.json").write_text("{")
    ddpm().save_pretrained(folder / "pipe")
    ddpm().save_pretrained(folder / "half", variant="fp16")
    ddpm().save_pretrained(folder / "lost", max_shard_size="30KB")
    shutil.copytree(folder / "lost", folder / "cut")
    shard = "unet/diffusion_pytorch_model-00002-of-00002.safetensors"
    (folder / "lost" / shard).unlink()
    (folder / "cut" / shard).write_bytes((folder / "cut" / shard).read_bytes()[:-100])
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    """A copy of the template. Relative to it are all paths, and no hub is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("args", "words"),
    [
        # what typer finds
        (("nonsense",), "No such command 'nonsense'"),
        (("quantize",), "Missing argument"),
        (("quantize", "q", "--nonsense"), "No such option"),
        (("quantize", "q", "--steps", 0), "--steps"),
        (("quantize", "q", "--steps", "many"), "--steps"),
        (("quantize", "q", "--num-samples", 0), "--num-samples"),
        (("quantize", "q", "--iterations", -1), "--iterations"),
        (("sample", "small", "--num-samples", -3), "--num-samples"),
        (("evaluate",), "Missing argument"),
        (("report", "small", "--steps", 0), "--steps"),
        (("export", "small"), "Missing argument"),
        # inspect
        (("inspect", "--recipe", "w5"), "'w5' is not a preset"),
        (("inspect", "--model", "nowhere"), "diffusers cannot load it"),
        (("inspect", "--model", "file"), "is a single file; give the folder of its pipeline's configuration"),
        (("inspect", "--model", "full"), "not a diffusers pipeline folder"),
        (("inspect", "--model", "no-json"), "diffusers cannot load it"),
        (("inspect", "--model", "small"), "small: is quantized; its report.json says how"),
        (("inspect", "--input", "sample=1"), "--input"),
        (("inspect", "--no-weights"), "--no-weights"),
        (("inspect", "--timestep", "sigma"), "take a 'sigma'"),
        (("inspect", "--argument", "steps"), "use NAME=JSON"),
        (("inspect", "--argument", "promt=1"), "DDPMPipeline takes no 'promt'; it takes"),
        # quantize
        (("quantize", "q", "--recipe", "w9a9"), "'w9a9' is not a preset"),
        (("quantize", "q", "--scheduler", "Magic"), "no scheduler 'Magic'"),
        (("quantize", "q", "--scheduler", "UNet2DModel"), "no scheduler 'UNet2DModel'"),
        (("quantize", "q", "--recipe", "none.json"), "none.json cannot be read"),
        (("quantize", "q", "--maintain", "magic"), "'magic'"),
        (("quantize", "q", "--unseen", "magic"), "'magic'"),
        (("quantize", "q", "--model", "nowhere"), "diffusers cannot load it"),
        (("quantize", "q", "--model", "full"), "not a diffusers pipeline folder"),
        (("quantize", "q", "--model", "broken"), "diffusers cannot load it"),
        (("quantize", "q", "--model", "lost"), "diffusion_pytorch_model-00002-of-00002.safetensors"),
        (("quantize", "q", "--model", "cut"), "diffusion_pytorch_model-00002-of-00002.safetensors"),
        (("quantize", "q", "--dtype", "float8"), "--dtype float8: is unknown; use float32, float16, bfloat16"),
        (("quantize", "q", "--device", "abacus"), "--device abacus: cannot be used here"),
        (("sample", "small", "--device", "xla:3"), "use one of cpu"),
        (("quantize", "q", "--execution-device", "cuda:9"), "execution_device cuda:9: cannot be used here"),
        (("quantize", "q", "--model", "pipe", "--variant", "fp16"), "diffusers cannot load it"),
        (("quantize", "q", "--model", "no-json"), "diffusers cannot load it"),
        (("quantize", "q", "--config", "pipe"), "--config pipe: is for a --model; the embedded one has its own"),
        (("quantize", "q", "--variant", "fp16"), "--variant fp16: is for a --model; the embedded one has its own"),
        (("sample", "small", "--output", "x.jpg"), "--output x.jpg: is written as PNG; use a name that ends in .png"),
        (("quantize", "q", "--model", "half"), "half/unet: has only fp16 weights; choose them with --variant fp16"),
        (("quantize", "q", "--model", "pipe", "--timestep", "sigma"), "take a 'sigma'"),
        (("quantize", "q", "--component", "prior"), "component: 'prior' takes no 'timestep'; components that do: unet"),
        (("quantize", LONG), "cannot be written (File name too long)"),
        (("quantize", "q", "--model", LONG), "diffusers cannot load it"),
        (("quantize", "q", "--argument", "x=["), "use NAME=JSON"),
        (("quantize", "q", "--argument", "x=1", *QUICK), "DDPMPipeline takes no 'x'; it takes"),
        (("quantize", "q", "--argument", "num_inference_steps=3"), "--argument num_inference_steps"),
        (("quantize", "q", "--argument", "batch_size=-1", *QUICK), "--argument batch_size: the command sets this itself"),
        (("quantize", "q", "--finite", "x"), "use NAME=JSON"),
        (("quantize", "q", "--model", "pipe", "--finite", "x=[1]", *QUICK), "finite='x': the calibration data have no tensor"),
        (("quantize", "q", "--max-megabytes", 0, *QUICK), "0"),
        (("quantize", "full"), "is not a tfmq artefact"),
        (("quantize", "file"), "is not a tfmq artefact"),
        (("quantize", "no-json"), "is not a tfmq artefact"),
        # what reads an artefact
        *(((command, "nowhere"), "no such folder") for command in ("sample", "evaluate", "report")),
        *(((command, "file"), "no such folder") for command in ("sample", "evaluate", "report")),
        *(((command, "full"), "config.json: missing") for command in ("sample", "evaluate", "report")),
        *(((command, "damaged"), "graph.json: corrupt") for command in ("sample", "evaluate", "report")),
        *(((command, "another"), "not a tfmq artefact") for command in ("sample", "evaluate", "report")),
        *(((command, "small", *QUICK), "give the pipeline that was quantized") for command in ("sample", "evaluate", "report")),
        *(((command, "small", "--model", "full"), "not a diffusers") for command in ("sample", "evaluate", "report")),
        *(((command, "small", "--scheduler", "X"), "no scheduler") for command in ("sample", "evaluate", "report")),
        *(((command, "configured", "--argument", "x=1"), "takes") for command in ("sample", "evaluate", "report")),
        *(((command, LONG), "no such folder") for command in ("sample", "evaluate", "report")),
        *(((command, "small", "--component", "prior"), "'prior' takes no") for command in ("sample", "evaluate", "report")),
        *(((command, "small", "--output", LONG), "File name too long") for command in ("sample", "report")),
        # export
        (("export", "small", LONG), "cannot be written (File name too long)"),
        (("export", "nowhere", "net.onnx"), "no such folder"),
        (("export", "damaged", "net.onnx"), "graph.json: corrupt"),
        (("export", "small", "net.exe"), "'.exe' is not supported"),
        (("export", "small", "net.onnx", "--format", "magic"), "'magic' is unknown"),
        (("export", "small", "net.onnx", "--format", "pt2"), "needs a name that ends in .pt2"),
        (("export", "small", "net.pt2", "--strict"), "strict"),
        (("export", "small", "file/net.pt2"), "cannot be written"),
        (("export", "small", "full"), "holds something else"),
    ],
    ids=lambda x: " ".join(map(str, x)).replace(LONG, "LONG") if isinstance(x, tuple) else None,
)  # fmt: skip
def test_every_error_is_one_line(monkeypatch, capsys, place, args, words):
    before = sorted(place.rglob("*"))
    code, out, err = run(monkeypatch, capsys, *args)
    assert (code, out) == (2, ""), err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert words in err
    assert [p for p in sorted(place.rglob("*")) if p not in before] == []


class Empty(SimpleNamespace):
    def __call__(self, num_inference_steps=50):
        raise NotImplementedError


def test_a_pipeline_without_a_denoiser_is_one_line(monkeypatch, capsys):
    pipe = Empty(components={"scheduler": None})
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: pipe)
    code, out, err = run(monkeypatch, capsys, "inspect")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "no components take a 'timestep'" in err


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_one_line(monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = run(monkeypatch, capsys, "report", "nowhere")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert package in err
    assert 'pip install "tfmq_fx[report]"' in err


def test_the_command_alone_shows_its_help(monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys)
    assert code == 2
    assert "quantize" in out + err
    assert "Traceback" not in out + err
