"""Processes that share the work end with the integers of one; one that dies stops the others."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.pipelines import ddpm

SCRIPT = textwrap.dedent(
    """
    import dataclasses, os, sys, time
    import torch
    import torch.distributed as dist
    from safetensors.torch import save_file
    import tfmq_fx
    from tests.networks import FAST, captured, calibration, TIMESTEPS

    output, state, runs, die = sys.argv[1], sys.argv[2] or None, eval(sys.argv[3]), int(sys.argv[4])
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
    else:
        rank = 0
    if die and rank == 1:
        from tfmq_fx import rounding
        learn = rounding._learn
        def dying(name, *args, **kwargs):
            if name != "conv_in.weight":
                print("dying", flush=True)
                os.kill(os.getpid(), 9)
            learn(name, *args, **kwargs)
        rounding._learn = dying
    for name, changes in runs.items():
        how = dataclasses.replace(FAST, **changes)
        recipe = dataclasses.replace(tfmq_fx.Recipe.preset("w4a8"), reconstruction=how)
        gm = tfmq_fx.calibrate(tfmq_fx.prepare(captured(), recipe, timesteps=TIMESTEPS), calibration())
        try:
            tfmq_fx.reconstruct(gm, calibration(), seed=0, state=state)
        except tfmq_fx.TFMQError as error:
            print("error:", error, flush=True)
            os._exit(2)  # the group is broken: nothing to say goodbye to
        found = {n: x.clone() for n, x in tfmq_fx.convert(gm).state_dict().items()}
        save_file(found, f"{output}-{name}-{rank}")
    """
)

PLAIN: dict[str, dict[str, object]] = {"plain": {}}
LEARNED = {
    method: {"method": method, "learn_activation_scale": True, "tune_iterations": 5}
    for method in ("adaround", "gptq")
}


def start(tmp_path, size, *, state="", runs=PLAIN, die=False, name="out"):
    """`size` processes, under torchrun's environment variables; 0: one alone. Each run by its name, one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(max(1, size)):
        group = {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path / name), str(state), repr(runs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (group if size else {})
        processes.append(
            subprocess.Popen(
                [*command, str(int(die))],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes):
    found = [(p.communicate(timeout=300), p.returncode) for p in processes]
    for (_, stderr), code in found:
        assert code == 0, stderr[-2000:]


def integers(tmp_path, rank, run, name="out"):
    return load_file(f"{tmp_path / name}-{run}-{rank}")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes wrote what they learned."""
    path = tmp_path_factory.mktemp("two")
    finish(start(path, 2, runs=LEARNED))
    return path


def test_two_processes_end_with_the_bits_of_one(tmp_path, two):
    """Two parts of a batch either way: a sum of two floats does not depend on who adds them."""
    finish(start(tmp_path, 0, runs=LEARNED))
    for method in LEARNED:
        alone, first, second = (integers(*of, method) for of in ((tmp_path, 0), (two, 0), (two, 1)))
        assert same(first, second)
        assert same(first, alone)


@pytest.mark.slow
def test_three_processes_agree_and_are_near_one(tmp_path):
    """Three parts instead of two: other sums in the last bit, so some weights round otherwise, no more."""
    finish(start(tmp_path, 0, name="alone"))
    finish(start(tmp_path, 3))
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
    first, second = start(tmp_path, 2, **settings, die=True)
    second.communicate(timeout=200)  # its pipes closed, too
    assert second.returncode == -signal.SIGKILL
    died = time.monotonic()
    stdout, _ = first.communicate(timeout=60)
    assert time.monotonic() - died < 60
    assert first.returncode == 2
    assert "rank 0 of 2: another process of the group is gone" in stdout
    assert "0001.safetensors" in {p.name for p in (tmp_path / "state").iterdir()}
    finish(start(tmp_path, 2, **settings))
    assert same(integers(tmp_path, 0, "adaround"), integers(two, 0, "adaround"))


def test_torchrun_on_the_command_line(tmp_path):
    """Every process records its share; one of them writes."""
    ddpm().save_pretrained(tmp_path / "model")
    command = ["quantize", str(tmp_path / "q"), "--model", str(tmp_path / "model"), "--num-samples", "4"]
    command += ["--steps", "3", "--iterations", "2", "--tune-iterations", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*torchrun, "-m", "tfmq_fx.cli", *command],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("MB float ->") == 1
    import tfmq_fx

    assert len(tfmq_fx.load(tmp_path / "q").timesteps) == 3
    assert not list(tmp_path.glob(".q*"))
