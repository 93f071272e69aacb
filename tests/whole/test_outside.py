"""The networks that others trained: what is read from their files, their sampler, and the rows of their benchmarks."""

import numpy as np
import pytest
import torch

import tfmq_fx
from benchmarks import galaxies, terrain
from benchmarks.networks.galaxies import LAST_TIME, STEPS, Galaxies, noise, rows, times, trajectory
from benchmarks.networks.wheels import wheel_file
from benchmarks.recipes import named


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file like the wheel's, of random numbers."""
    sizes: list[tuple[int, ...]] = [(64, 2, 4, 4), (64, 1, 1), (1, 64, 4, 4), (1, 1, 1)]
    for _ in range(4):
        sizes += [(512, 64), (512,), (64, 512), (64,)] * 2 + [(64, 64)] * 4
    sizes += [(64, 64)] * 2
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("leaves") / "network.eqx"
    with path.open("wb") as leaves:
        for size in sizes:
            np.save(leaves, random.standard_normal(size, dtype=np.float32) / 8)
        np.save(leaves, np.float32(LAST_TIME))
    return path


def test_the_leaves_are_read_in_order(file):
    network = Galaxies("hsc32", file)
    with file.open("rb") as leaves:
        found = [np.load(leaves) for _ in range(55)]
    state = network.state_dict()
    assert len(state) == 54
    assert torch.equal(state["conv_in.weight"], torch.from_numpy(found[0]))
    assert torch.equal(state["conv_out.weight"][5, 0], torch.from_numpy(found[2][0, 5, ::-1, ::-1].copy()))
    assert torch.equal(state["blocks.0.hidden_mixer.0.weight"], torch.from_numpy(found[8]))
    assert torch.equal(state["blocks.3.norm2.bias"], torch.from_numpy(found[51]))
    assert torch.equal(state["norm.bias"], torch.from_numpy(found[53]))


def test_a_file_with_leaves_to_spare_is_refused(file, tmp_path):
    (tmp_path / "longer.eqx").write_bytes(file.read_bytes() + b"more")
    with pytest.raises(ValueError, match="other leaves"):
        Galaxies("hsc32", tmp_path / "longer.eqx")


def test_the_sampler_ends_at_the_data():
    """For data that are all 3, the score is known: the last step gives them exactly."""

    def score(y, t):
        alpha = torch.exp(-t).reshape(-1, 1, 1, 1)
        return -(y - alpha.sqrt() * 3) / (1 - alpha)

    found = trajectory(score, noise(2, 32, seed=0))
    assert found.shape == (STEPS + 1, 2, 1, 32, 32)
    assert (found[-1] - 3).abs().max() < 1e-3
    assert (found[12] - 3).abs().max() > 0.1


def test_rows_are_what_the_sampler_gives_the_network_and_quantize_it(file):
    network = Galaxies("hsc32", file).eval()
    given = rows(network, 2, seed=1)
    assert given["y"].shape == (2 * STEPS, 1, 32, 32)
    assert torch.equal(given["y"][:2], noise(2, 32, seed=1))
    assert torch.equal(given["t"].unique(), times().flip(0))
    data = tfmq_fx.CalibrationSet.from_tensors(given, timestep="t")
    q = tfmq_fx.quantize(network, named("w8a8 plain"), calibration=data, timestep="t")
    assert q.report["temporal_block"]["timesteps"] == STEPS
    y, reference = q(**given), network(**given)
    assert (y - reference).norm() < 0.05 * reference.norm()


def test_a_file_that_is_there_is_not_downloaded(tmp_path):
    (tmp_path / "a.eqx").write_bytes(b"here")
    assert wheel_file("no-such-wheel==0", "folder/a.eqx", tmp_path) == tmp_path / "a.eqx"


def test_every_row_has_a_recipe():
    others = {"bf16", "onnxruntime", "nncf"}
    for name in {*galaxies.ROWS, *terrain.ROWS, *terrain.MORE} - others:
        assert isinstance(named(name), tfmq_fx.Recipe)
    assert named("w4a8 gptq").reconstruction.tune_iterations == 0
    assert named("w4a8 nearest").reconstruction.method == "nearest"
    assert named("w4a8 all int8").edge_activation_bits == 8
    assert named("w8a8 plain").smooth is None
    with pytest.raises(ValueError, match="use one of unchosen, nearest"):
        named("w8a8 no")
    with pytest.raises(ValueError, match="not a preset"):
        named("w9 gptq")
