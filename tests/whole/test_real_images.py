"""Samples against real pictures: torchvision's Inception from a file, and `tfmq evaluate --real`."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from tests.helpers.command_line import run
from tfmq_fx import cli
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.evaluation import extractors
from tfmq_fx.evaluation.extractors import (
    extractor_named,
    network_extractor,
    set_distances,
    torchvision_inception_extractor,
)
from tfmq_fx.evaluation.folders import images_from
from tfmq_fx.evaluation.sampling import sample

DRAWN = {"num_samples": 4, "num_inference_steps": 2, "seed": 1}
OPTIONS = ("--model", "model", "--num-samples", 4, "--steps", 2)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file like torchvision's, of random numbers."""
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_v3(init_weights=False).state_dict(), file)
    return file


def tiny(_weights=None):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))
    return network_extractor(network.eval(), "0")


def test_torchvisions_inception_is_its_own_network_on_scaled_pictures(weights):
    from torchvision.models import inception_v3
    from torchvision.transforms.v2.functional import normalize, resize

    x = torch.linspace(-1, 1, 256).mul(127.5).round().div(127.5).view(1, 1, 16, 16)
    found = torchvision_inception_extractor(weights)(x)
    assert (found.pooled_ND.shape, found.spatial_NS.shape) == ((1, 2048), (1, 2023))
    network = inception_v3(init_weights=False, transform_input=True).eval()  # as torchvision's users call it
    network.load_state_dict(torch.load(weights))
    kept = {}
    for name in ("Mixed_6e", "avgpool"):
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: kept.update({name: out})
        )
    pixels = resize(x.expand(-1, 3, -1, -1), [299, 299], antialias=True) / 2 + 0.5
    with torch.no_grad():
        logits = network(normalize(pixels, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]))
    close = {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(found.probabilities_NK, logits.softmax(-1), **close)
    torch.testing.assert_close(found.pooled_ND, kept["avgpool"].flatten(1), **close)
    torch.testing.assert_close(found.spatial_NS, kept["Mixed_6e"][:, :7].flatten(1), **close)


def test_weights_are_found_where_torchvision_keeps_them_and_never_downloaded(monkeypatch, tmp_path, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("a download"))
    with pytest.raises(TFMQError, match=r"no weights at .*inception_v3_google-0cc3c7bd.pth; download https"):
        extractor_named("torchvision-inception")
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "inception_v3_google-0cc3c7bd.pth").symlink_to(weights)
    assert callable(extractor_named("torchvision-inception"))
    for name, value in (("other.pth", {"a": torch.zeros(1)}), ("list.pth", [1])):
        torch.save(value, tmp_path / name)
        with pytest.raises(TFMQError, match=f"{name} does not hold weights of inception_v3"):
            torchvision_inception_extractor(tmp_path / name)
    (tmp_path / "words.pth").write_text("words")
    with pytest.raises(TFMQError, match=r"words.pth does not hold weights") as error:
        torchvision_inception_extractor(tmp_path / "words.pth")
    assert "\n" not in str(error.value)
    with pytest.raises(TFMQError, match="'vgg' is unknown; use one of inception, torchvision-inception"):
        extractor_named("vgg")


def test_distances_of_sets_in_closed_form():
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 3, generator=g)

    def features(x):
        return extractors.Features(pooled_ND=x, spatial_NS=2 * x, probabilities_NK=None)

    same = set_distances(features(rows), features(rows))
    assert (same["precision"], same["recall"]) == (1.0, 1.0)
    moved = set_distances(features(rows + 10), features(rows))
    assert moved["frechet"] == pytest.approx(300, rel=1e-5)
    assert moved["frechet_spatial"] == pytest.approx(1200, rel=1e-5)
    assert (moved["precision"], moved["recall"]) == (0.0, 0.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A pipeline, an artefact of it, and folders of images."""
    folder = tmp_path_factory.mktemp("place")
    pipe = ddpm()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "model")
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=2, num_inference_steps=2, seed=0)
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    tfmq_fx.quantize(pipe, recipe, calibration=data).save_pretrained(folder / "q")
    images = np.random.default_rng(0).integers(0, 256, (6, 20, 30, 3), dtype=np.uint8)
    for i, pixels in enumerate(images):
        (folder / "real" / "a").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / "real" / "a" / f"{i}.png")
    (folder / "empty").mkdir()
    shutil.copytree(folder / "real", folder / "damaged")
    for file in (folder / "damaged" / "a").iterdir():
        file.write_bytes(file.read_bytes()[:300])
    return folder


@pytest.fixture
def place(template, tmp_path, monkeypatch):
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(extractors.EXTRACTORS, "tiny", tiny)
    return tmp_path


def test_evaluate_measures_both_sets_of_samples(monkeypatch, capsys, place):
    code, out, err = run(
        monkeypatch, capsys, "evaluate", "q", *OPTIONS, "--real", "real", "--extractor", "tiny"
    )
    assert (code, err) == (0, "")
    assert "PSNR to float" in out
    assert "to 4 real images" in out
    assert "note: 4 samples of 5 features" in out
    rows = {
        line.split("│")[1].strip(): line.split("│")[2:4] for line in out.splitlines() if line.count("│") == 4
    }
    images = sample(cli.load_pipeline("model"), None, **DRAWN)
    _, channels, *size = images.shape
    real = images_from(place / "real", size=size, channels=channels, num=4, seed=1)
    expected = set_distances(tiny()(images), tiny()(real))
    assert set(expected) <= set(rows)
    for name, value in expected.items():
        assert float(rows[name][0]) == pytest.approx(value, rel=1e-3), name
    assert rows["frechet"][0] != rows["frechet"][1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--real", "nowhere"), "nowhere: no such folder of images"),
        (("--real", "empty"), "empty: the folder has no images"),
        (("--real", "damaged"), ".png: cannot be read as an image"),
        (("--real", "real", "--num-samples", 7), "real: the folder has 6 images, but 7 were asked for"),
        (("--real", "real", "--num-samples", 3), "--num-samples 3: precision and recall need more than 3"),
        (("--real", "real", "--extractor", "vgg"), "extractor: 'vgg' is unknown; use one of inception"),
        (("--real", "real", "--extractor", "torchvision-inception", "--extractor-weights", "none"), "no weights at none"),
        (("--real", "real", "--extractor", "torchvision-inception", "--extractor-weights", "q/config.json"), "does not hold weights"),
        (("--real", "real", "--extractor", "inception", "--extractor-weights", "none"), "inception_extractor: n"),
        (("--extractor", "tiny"), "--extractor"),
        (("--extractor-weights", "none"), "--extractor"),
    ],
    ids=lambda x: " ".join(map(str, x)) if isinstance(x, tuple) else None,
)  # fmt: skip
@pytest.mark.usefixtures("place")
def test_what_is_wrong_is_said_in_one_line_before_any_sampling(monkeypatch, capsys, options, words):
    monkeypatch.setattr(cli, "load_pipeline", lambda *_: pytest.fail("sampled"))
    code, out, err = run(monkeypatch, capsys, "evaluate", "q", *OPTIONS, "--extractor", "tiny", *options)
    assert (code, out, len(err.splitlines())) == (2, "", 1), err
    assert words in err


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_evaluate_with_torchvisions_inception(monkeypatch, capsys, weights):
    options = ("--real", "real", "--extractor", "torchvision-inception", "--extractor-weights", weights)
    code, out, err = run(monkeypatch, capsys, "evaluate", "q", *OPTIONS, *options)
    assert (code, err) == (0, "")
    assert "frechet_spatial" in out
    assert "4 samples in 2048 features" in out
