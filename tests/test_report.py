"""The report: one page that needs nothing else, its plots, and its numbers."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import FAST, ScalarTime
from tests.helpers.command_line import run as run_cli
from tests.helpers.lowered import BYTES
from tests.helpers.nearest import one_timestep
from tfmq_fx import report
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.evaluation.plots import OURS
from tfmq_fx.evaluation.sampling import sample
from tfmq_fx.evaluation.trajectories import output_errors, trajectory
from tfmq_fx.report import measure, nearest_of, write_report

SETTINGS = {"num_samples": 2, "num_inference_steps": 10, "seed": 3}
FEATURES = 5  # of the pipeline's network
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def pipe():
    pipe = ddpm()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def q(pipe):
    data = tfmq_fx.CalibrationSet.record(pipe, num_samples=4, num_inference_steps=10, seed=0)
    return tfmq_fx.quantize(pipe, tfmq_fx.Recipe(reconstruction=FAST), calibration=data)


@pytest.fixture(scope="module")
def measured(pipe, q):
    return measure(pipe, q, **SETTINGS, nearest=False, command="tfmq report it")


@pytest.fixture(scope="module")
def folder(measured, tmp_path_factory):
    numbers, runs = measured
    path = tmp_path_factory.mktemp("report") / "page"
    write_report(numbers, runs, path, title="digits <w4a8>")
    return path


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_trajectories_start_from_the_same_noise_and_end_in_the_samples(pipe, q, measured):
    _, runs = measured
    ours, reference = runs[OURS], runs["float"]
    assert torch.equal(ours.inputs[0], reference.inputs[0])
    assert ours.timesteps == reference.timesteps == sorted(ours.timesteps, reverse=True)
    assert len(ours.inputs) == 10
    drawn = sample(pipe, q, **SETTINGS)
    assert torch.equal(drawn, ours.images)
    assert not torch.equal(ours.images, reference.images)


def test_numbers(measured, q):
    numbers, _ = measured
    assert numbers["trajectory_errors"][0]["relative_mse"] == 0.0
    assert numbers["trajectory_errors"][-1]["relative_mse"] > 0.0
    errors = numbers["output_errors"]
    assert set(errors) == {OURS, "float in bfloat16"}
    assert sum(errors[OURS].values()) > sum(errors["float in bfloat16"].values()) > 0
    drift = numbers["temporal_drift"]
    assert len(drift["cosine_distance"]) == len(drift["features"]) == FEATURES
    assert all(len(row) == len(drift["timesteps"]) == 10 for row in drift["cosine_distance"])
    # The same distances that the report's means by timestep are of.
    columns = zip(*drift["cosine_distance"], strict=True)
    for column, row in zip(columns, q.report["errors_by_timestep"], strict=True):
        assert sum(column) / FEATURES == pytest.approx(row["temporal_cosine_distance"], rel=1e-2)
    if BYTES:
        assert numbers["kernels"]["flops"]["int8"] > 0
    assert set(numbers["milliseconds"]) == {"batch", "float", OURS, *(["int8 kernels"] if BYTES else [])}


@pytest.mark.usefixtures("without_int8")
def test_without_int8_instructions_nothing_is_timed_as_int8_and_the_page_says_why(
    measured, monkeypatch, tmp_path
):
    said = []
    monkeypatch.setattr(report.log, "warning", lambda words, *rest: said.append(words % rest))
    low, words = report.lowered(one_timestep(ScalarTime), batch=1)
    assert low is None
    assert said == ["report: no int8 kernels are timed: this CPU has no int8 instructions (VNNI, AMX)."]
    numbers, runs = measured
    write_report({**numbers, "kernels": {"missing": words}}, runs, tmp_path / "page", title="x")
    page = (tmp_path / "page" / "report.html").read_text()
    assert "No int8 kernels were tried: this CPU has no int8 instructions (VNNI, AMX)." in page


def test_round_to_nearest_is_calibrated_beside_it_and_worse(pipe, q):
    data = tfmq_fx.CalibrationSet.record(pipe, **SETTINGS)
    errors = output_errors(pipe.unet, {"ours": q, "nearest": nearest_of(pipe, q, data)}, data)
    assert sum(errors["nearest"].values()) > sum(errors["ours"].values())


def test_the_page_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"url\(\s*['\"]?(?!#)", text)
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 3
    assert "digits &lt;w4a8&gt;" in text
    assert "tfmq report it" in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "#010203" not in text
    assert "currentColor" in text


def test_the_same_plots_as_png_and_numbers_as_json(folder, measured):
    names = {"drift.png", "output_errors.png", "trajectory_errors.png", "trajectory.png"}
    assert {f.name for f in folder.iterdir()} == names | {"report.html", "report.json"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    numbers = json.loads((folder / "report.json").read_text())
    assert numbers["pictures"]["psnr"] == pytest.approx(measured[0]["pictures"]["psnr"])
    assert numbers["settings"]["seed"] == 3


def test_an_artefact_without_drift_says_so_and_infinity_is_null(measured, tmp_path):
    numbers, runs = measured
    changed = {**numbers, "temporal_drift": None, "pictures": {**numbers["pictures"], "psnr": math.inf}}
    write_report(changed, runs, tmp_path / "page", title="x")
    assert "This artefact does not contain it" in (tmp_path / "page" / "report.html").read_text()
    assert json.loads((tmp_path / "page" / "report.json").read_text())["pictures"]["psnr"] is None
    assert not (tmp_path / "page" / "drift.png").exists()


def test_the_choice_of_maintenance_is_shown(measured, tmp_path):
    numbers, runs = measured
    feature = {
        "path": "up.time",
        "chosen": "cache",
        "bytes": {"reconstruct": 640, "cache": 320},
        "why": "smaller",
    }
    kept = {
        "maintain": "auto",
        "features": [{**feature, "disturbance": {"reconstruct": 1e-5, "cache": 2e-8}}],
    }
    changed = {**numbers, "quantization": {**numbers["quantization"], "maintenance": kept}}
    write_report(changed, runs, tmp_path / "page", title="x")
    text = (tmp_path / "page" / "report.html").read_text()
    assert "How each temporal feature is maintained (auto)" in text
    assert "cache 320" in text
    older = {k: v for k, v in numbers["quantization"].items() if k != "maintenance"}
    write_report({**numbers, "quantization": older}, runs, tmp_path / "page", title="x")
    assert "How each temporal feature" not in (tmp_path / "page" / "report.html").read_text()


def test_a_folder_with_something_else_is_refused_and_left_alone(measured, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(TFMQError, match="holds something else"):
        write_report(*measured, tmp_path, title="x")
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("of", "changes", "words"),
    [
        (lambda pipe, _: pipe.unet, {}, "model: expected QuantizedModel, found UNet2DModel"),
        (lambda _, q: q, {"num_inference_steps": 0}, "num_inference_steps=0 must be a positive integer"),
    ],
)
def test_what_cannot_be_measured_is_refused(pipe, q, of, changes, words):
    with pytest.raises(TFMQError, match=words):
        measure(pipe, of(pipe, q), **{**SETTINGS, **changes})


def test_the_hook_is_gone_when_sampling_fails(pipe, q):
    with pytest.raises(TFMQError):
        trajectory(pipe, q, q, **SETTINGS, no_such_argument=1)
    assert not q._forward_pre_hooks


def test_command_line(monkeypatch, capsys, pipe, q, tmp_path):
    q.save_pretrained(tmp_path / "q")
    pipe.save_pretrained(tmp_path / "model")
    options = "--model", str(tmp_path / "model"), "--num-samples", "1", "--steps", "2", "--no-nearest"
    code, _, error = run_cli(monkeypatch, capsys, "report", str(tmp_path / "q"), *options)
    assert code == 0, error
    assert (tmp_path / "q-report" / "report.html").is_file()
    assert "tfmq report" in json.loads((tmp_path / "q-report" / "report.json").read_text())["command"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1200, 390])
def test_in_headless_chromium(folder, tmp_path, width):
    shot = tmp_path / "page.png"
    result = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={tmp_path / 'user'}", "--enable-logging=stderr", f"--window-size={width},2400",
            "--hide-scrollbars", f"--screenshot={shot}", (folder / "report.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "CONSOLE" not in result.stderr  # an error, or a request that was blocked
    import matplotlib.image

    pixels = matplotlib.image.imread(shot)
    assert pixels.shape[1] == width
    assert len(set(map(tuple, pixels[::8, ::8, :3].reshape(-1, 3).tolist()))) > 20  # drawn, not blank
