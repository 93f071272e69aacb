"""Processes that share the work end with the integers of one; one that dies stops the others."""

import dataclasses
import functools
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import tfmq_fx
from benchmarks.networks.pipelines import ddpm
from benchmarks.networks.small import FAST, TIMESTEPS, calibration, captured
from tests.helpers.processes import finish, start
from tests.helpers.reconstructed import same
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.reconstruction import rounding


def learn(talk, output, state, runs, die):
    """What one rank does; without torchrun's variables, a process alone."""
    rank = 0
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    if die and rank == 1:
        rounding._learn = functools.partial(dying, rounding._learn)
    for name, changes in runs.items():
        how = dataclasses.replace(FAST, **changes)
        recipe = dataclasses.replace(tfmq_fx.Recipe(), reconstruction=how)
        gm = tfmq_fx.calibrate(tfmq_fx.prepare(captured(), recipe, timesteps=TIMESTEPS), calibration())
        try:
            tfmq_fx.reconstruct(gm, calibration(), seed=0, state=state)
        except TFMQError as error:
            talk.send(str(error))
            os._exit(2)  # the group is broken: nothing to say goodbye to
        found = {n: x.clone() for n, x in tfmq_fx.convert(gm).state_dict().items()}
        save_file(found, f"{output}-{name}-{rank}")


def dying(learn, name, *args, **kwargs):
    if name != "conv_in.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    learn(name, *args, **kwargs)


PLAIN: dict[str, dict[str, object]] = {"plain": {}}
LEARNED = {
    method: {"method": method, "learn_activation_scale": True, "tune_iterations": 5}
    for method in ("adaround", "gptq")
}


def started(tmp_path, size, *, state=None, runs=PLAIN, die=False, name="out"):
    """`size` processes, under torchrun's environment variables; 0: one alone. Each run by its name, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(
            learn, tmp_path / name, state, runs, die, environment={"RANK": str(rank), **group} if size else {}
        )
        for rank in range(max(1, size))
    ]


def run(*args, **kwargs):
    for process, talk in started(*args, **kwargs):
        finish(process, talk)


def integers(tmp_path, rank, run, name="out"):
    return load_file(f"{tmp_path / name}-{run}-{rank}")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes wrote what they learned."""
    path = tmp_path_factory.mktemp("two")
    run(path, 2, runs=LEARNED)
    return path


def test_two_processes_end_with_the_bits_of_one(tmp_path, two):
    """Two parts of a batch either way: a sum of two floats does not depend on who adds them."""
    run(tmp_path, 0, runs=LEARNED)
    for method in LEARNED:
        alone, first, second = (integers(*of, method) for of in ((tmp_path, 0), (two, 0), (two, 1)))
        assert same(first, second)
        assert same(first, alone)


@pytest.mark.slow
def test_three_processes_agree_and_are_near_one(tmp_path):
    """Three parts instead of two: other sums in the last bit, so some weights round otherwise, no more."""
    run(tmp_path, 0, name="alone")
    run(tmp_path, 3)
    alone = integers(tmp_path, 0, "plain", "alone")
    ranks = [integers(tmp_path, r, "plain") for r in range(3)]
    assert same(ranks[0], ranks[1])
    assert same(ranks[0], ranks[2])
    weights = [n for n in alone if n.endswith("_q")]
    different = sum(int((alone[n] != ranks[0][n]).sum()) for n in weights)
    assert different / sum(alone[n].numel() for n in weights) < 0.02
    for n in alone:
        if n.endswith("scale"):  # histograms of other pieces are merged
            torch.testing.assert_close(ranks[0][n], alone[n], rtol=0.02, atol=1e-6)


def test_one_that_is_killed_stops_the_others_and_what_was_finished_stays(tmp_path, two):
    settings = {"state": tmp_path / "state", "runs": {"adaround": LEARNED["adaround"]}}
    (first, said), (second, _) = started(tmp_path, 2, **settings, die=True)
    second.join(200)
    assert second.exitcode == -signal.SIGKILL
    died = time.monotonic()
    first.join(60)
    assert time.monotonic() - died < 60
    assert first.exitcode == 2
    assert "rank 0 of 2: another process of the group has exited" in said.recv()
    assert "0001.safetensors" in {p.name for p in (tmp_path / "state").iterdir()}
    run(tmp_path, 2, **settings)
    assert same(integers(tmp_path, 0, "adaround"), integers(two, 0, "adaround"))


@pytest.mark.slow  # its processes' imports; two processes that share the work are above
def test_torchrun_on_the_command_line(tmp_path):
    """Every process records its share; one of them writes."""
    ddpm().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "q"), "--model", str(tmp_path / "model"), "--num-samples", "4"]
    command += ["--steps", "3", "--iterations", "2", "--tune-iterations", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "tfmq_fx.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("MB float ->") == 1
    assert len(tfmq_fx.load(tmp_path / "q").timesteps) == 3
    assert not list(tmp_path.glob(".q*"))
