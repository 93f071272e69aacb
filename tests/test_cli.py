import json
import shutil
from importlib.metadata import version

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

import tfmq_fx
from benchmarks.networks.pipelines import PIPELINES, ddpm, saved
from benchmarks.networks.zoo import ZOO
from tests.helpers.command_line import corrupt, run
from tests.helpers.single_file import save_single_file
from tfmq_fx import cli
from tfmq_fx.base.arguments import leaves
from tfmq_fx.demo import FOLDER

# Networks that diffusers cannot load: others', and its own that are called in another way.
OWN = (
    "ddim-official", "latent-diffusion", "scalar-step", "lumina-2", "mochi", "hunyuan-image", "hunyuan-video-1.5", "ltx-2.3",
    "animatediff",
)  # fmt: skip


@pytest.fixture
def artefact(digits, tmp_path):
    digits.save_pretrained(tmp_path / "w4a8")
    return tmp_path / "w4a8"


def test_inspect_shows_the_block(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "inspect")
    assert code == 0
    assert "11 features" in out
    assert "up_blocks.2.resnets.1.time_emb_proj" in out


def test_the_version(monkeypatch, capsys):
    assert run(monkeypatch, capsys, "--version") == (0, f"{version('tfmq_fx')}\n", "")


def test_after_an_interruption_the_state_is_named(monkeypatch, capsys, tmp_path):
    def interrupted(*_, state, **__):
        state.mkdir()
        raise KeyboardInterrupt

    ddpm().save_pretrained(tmp_path / "pipe")
    monkeypatch.setattr("tfmq_fx.pipeline.quantize", interrupted)
    quick = ("--model", tmp_path / "pipe", "--num-samples", 1, "--steps", 2)
    code, out, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", *quick)
    assert (code, out) == (130, "")
    assert (
        err.strip() == f"{tmp_path}/.q.state has the finished blocks; the same command continues from there."
    )


def test_precompute_writes_tables(monkeypatch, capsys, tmp_path):
    ddpm().save_pretrained(tmp_path / "pipe")
    source = ("--model", tmp_path / "pipe", "--steps", 2)
    code, out, err = run(monkeypatch, capsys, "precompute", tmp_path / "p", *source)
    assert code == 0, err
    assert "temporal features at 2 timesteps: " in out
    model = tfmq_fx.load(tmp_path / "p")
    assert model.report["command"].startswith("tfmq precompute")
    code, _, err = run(monkeypatch, capsys, "precompute", tmp_path / "q", *source, "--unseen", "nothing")
    assert (code, "Recipe.unseen: 'nothing' is unknown" in err) == (2, True)


def spec(name, x):
    """A tensor as `--input` wants it."""
    return f"{name}={','.join(map(str, x.shape))}:{str(x.dtype).removeprefix('torch.')}"


def has_specs(entry):
    """Whether all inputs are tensors with a name, which is what `--input` can say."""
    given = leaves({n: x for n, x in entry.inputs(False).items() if n != "return_dict"}).values()
    return all(isinstance(x, torch.Tensor) and all(isinstance(p, str) for p in path) for path, x in given)


# The others' blocks are compared in tests/whole/test_zoo.py; what is asked here is the command.
FEW = ("diffuser-hopper", "flux")
ENTRIES = [
    pytest.param(e, marks=() if e.name in FEW else pytest.mark.slow, id=e.name)
    for e in ZOO
    if e.name not in OWN and has_specs(e)
]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # diffusers' own
@pytest.mark.parametrize("entry", ENTRIES)
def test_inspect_gives_the_block_of_every_network_of_the_zoo(monkeypatch, capsys, tmp_path, entry):
    entry.build(False).save_config(tmp_path)
    inputs = [(path, x) for path, x in leaves(entry.inputs(False)).values() if isinstance(x, torch.Tensor)]
    specs = [a for path, x in inputs for a in ("--input", spec(".".join(path), x))]
    code, out, err = run(
        monkeypatch, capsys, "inspect", "--model", tmp_path, "--no-weights", "--json", *specs
    )
    assert code == 0, err
    found = json.loads(out)
    block, layers = found["temporal_block"], {x["path"].removesuffix(".weight") for x in found["layers"]}
    assert {f["path"] for f in block["features"]} & layers == set(entry.features)
    assert set(block["keys"]) == set(entry.keys)


def test_inspect_of_a_networks_folder_with_its_weights(monkeypatch, capsys):
    inputs = ("--input", "sample=2,1,16,16", "--input", "timestep=2:int64")
    code, out, _ = run(monkeypatch, capsys, "inspect", "--model", FOLDER / "unet", *inputs)
    assert code == 0
    assert "1.74 M parameters" in out
    assert "11 features" in out


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (
            (),
            "alone has no pipeline that shows how it is called; give the shape of each input that it needs (sample, timestep",
        ),
        (("--input", "sample"), "use NAME=SHAPE"),
        (("--input", "sample=2,x"), "use NAME=SHAPE"),
        (("--input", "sample=2:strange"), "use NAME=SHAPE"),
        (("--input", "noise=2"), "takes"),
        (("--input", "sample=2,1,16,16"), "timestep: not named, and no input has shape"),
    ],
)
def test_inspect_says_what_it_needs(monkeypatch, capsys, inputs, words):
    code, _, err = run(monkeypatch, capsys, "inspect", "--model", FOLDER / "unet", *inputs)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1


def test_quantize_sample_and_evaluate_a_local_folder(monkeypatch, capsys, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(FOLDER, model)
    common = ("--model", model, "--scheduler", "DDIMScheduler", "--steps", 4)
    code, out, err = run(
        monkeypatch,
        capsys,
        "quantize",
        tmp_path / "q",
        "--recipe",
        "w8a16",
        "--num-samples",
        2,
        "--iterations",
        5,
        "--tune-iterations",
        2,
        *common,
    )
    assert (code, err) == (0, "")
    assert "11 temporal features at 4 timesteps" in out
    code, out, _ = run(
        monkeypatch,
        capsys,
        "sample",
        tmp_path / "q",
        "--output",
        tmp_path / "grid.png",
        "--num-samples",
        3,
        *common,
    )
    assert code == 0
    assert Image.open(tmp_path / "grid.png").size[0] > 400
    code, out, _ = run(monkeypatch, capsys, "evaluate", tmp_path / "q", "--num-samples", 3, *common)
    assert code == 0
    assert "temporal_cosine_distance" in out


@pytest.mark.parametrize("command", ["inspect", "quantize", "sample", "evaluate", "report"])
def test_every_command_has_help(monkeypatch, capsys, command):
    code, out, _ = run(monkeypatch, capsys, command, "--help")
    assert code == 0
    assert "--model" in out


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "not a diffusers pipeline folder"),
        (lambda f: shutil.copytree(FOLDER, f, dirs_exist_ok=True) and corrupt(f), "diffusers cannot load it"),
    ],
)
def test_a_bad_model_folder_is_one_line_and_leaves_nothing(monkeypatch, capsys, tmp_path, make, words):
    model = tmp_path / "model"
    model.mkdir()
    make(model)
    code, out, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", "--model", model)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("quantize", "OUT", "--recipe", "w5a5"), "'w5a5' is not a preset"),
        (("quantize", "OUT", "--scheduler", "Magic"), "no scheduler 'Magic'"),
        (("quantize", "OUT", "--argument", "x=["), "use NAME=JSON"),
        (("sample", "OUT"), "no such folder"),
        (("evaluate", "OUT"), "no such folder"),
    ],
)
def test_wrong_arguments_are_one_line(monkeypatch, capsys, tmp_path, args, words):
    args = [str(tmp_path / "q") if a == "OUT" else a for a in args]
    code, out, err = run(monkeypatch, capsys, *args)
    assert (code, out) == (2, "")
    assert words in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_not_ours_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "mine.txt").write_text("")
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path)
    assert code == 2
    assert "is not a tfmq artefact" in err


def test_a_corrupt_artefact_is_one_line(monkeypatch, capsys, artefact):
    (artefact / "graph.json").write_text("{}")
    code, _, err = run(monkeypatch, capsys, "sample", artefact)
    assert code == 2
    assert "graph.json: corrupt or truncated" in err


class Renamed(UNet2DModel):  # type: ignore[misc]
    """Its timestep has another name."""

    def forward(self, sample, t, class_labels=None, return_dict=True):
        return super().forward(sample, t, class_labels, return_dict)


def test_the_timestep_and_the_component_have_names(monkeypatch, capsys, tmp_path):
    """`sample` takes the timestep's name from the artefact, of which component it must be told."""
    pipe = DDIMPipeline(Renamed.from_config(ddpm().unet.config).eval(), DDIMScheduler())
    pipe.register_modules(other=Renamed.from_config(pipe.unet.config).eval())
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(type(pipe), "components", property(lambda p: {"other": p.other, "unet": p.unet}))
    quick, q = ("--steps", 2, "--num-samples", 1), tmp_path / "q"
    named = ("--timestep", "t", "--component", "unet")
    quantize = ("quantize", q, "--recipe", "w8a16", *quick)
    code, _, err = run(monkeypatch, capsys, *quantize, "--timestep", "t")
    assert code == 2
    assert "2 components take a 't' (other, unet)" in err
    code, out, err = run(monkeypatch, capsys, "inspect", "--component", "unet")  # sees which argument changes
    assert code == 0, err
    assert "time_emb_proj" in out
    code, _, err = run(monkeypatch, capsys, *quantize, *named)
    assert code == 0, err
    for command in ("sample", "evaluate", "report"):
        more = () if command == "evaluate" else ("--output", tmp_path / f"{command}.png")
        code, out, err = run(monkeypatch, capsys, command, q, *more, *quick, "--component", "unet")
        assert code == 0, err
        assert "PSNR" in out


@pytest.fixture
def single_file(tmp_path):
    """A small pipeline, its checkpoint file, and the folder of its configuration, which has no weights."""
    entry = next(e for e in PIPELINES if e.name == "sd")
    pipe, folder, file = saved(entry, tmp_path), tmp_path / "pipe", tmp_path / "model.safetensors"
    save_single_file(pipe, file)
    for weights in folder.rglob("*model.safetensors"):
        weights.unlink()
    return pipe, file, folder, entry.arguments


def test_a_checkpoint_file_with_the_folder_of_its_configuration(monkeypatch, capsys, single_file, tmp_path):
    pipe, file, folder, _ = single_file
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", "--model", file)
    assert code == 2
    assert "--config" in err
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", "--model", folder, "--config", folder)
    assert code == 2
    assert "single file" in err
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", "--model", file, "--config", tmp_path)
    assert code == 2
    assert "no model_index.json" in err
    found = cli.load_pipeline(str(file), dtype="bfloat16", config=str(folder))
    for component in ("unet", "vae", "text_encoder"):
        network, before = getattr(found, component), getattr(pipe, component).state_dict()
        assert network.dtype == torch.bfloat16
        for name, x in network.state_dict().items():
            assert torch.equal(x, before[name].to(x.dtype)), name


@pytest.mark.slow
def test_a_checkpoint_file_is_quantized(monkeypatch, capsys, single_file, tmp_path):
    pipe, file, folder, arguments = single_file
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"weight_bits": 8, "reconstruction": {"method": "nearest"}}))
    given = (*(f"--argument={n}={json.dumps(x)}" for n, x in arguments.items()), "--recipe", recipe)
    given = ("--model", file, "--config", folder, "--num-samples", 1, "--steps", 2, *given)
    code, _, err = run(monkeypatch, capsys, "quantize", tmp_path / "q", *given, "--dtype", "bfloat16")
    assert code == 0, err
    q, before = tfmq_fx.load(tmp_path / "q"), pipe.unet.state_dict()
    kept = {n: x for n, x in q.network.state_dict().items() if n in before}
    assert q.dtype == torch.bfloat16
    assert kept
    assert all(torch.equal(x, before[n].bfloat16()) for n, x in kept.items())
