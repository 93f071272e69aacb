"""A reconstruction that is stopped at any moment goes on from its last finished block, to the same integers."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import calibration, prepared
from tests.helpers.processes import start
from tests.helpers.reconstructed import TUNED, integers, reconstructed, same
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.parallel import Ranks
from tfmq_fx.passes.quantize.state import state_of
from tfmq_fx.reconstruction import resume
from tfmq_fx.reconstruction import run as of_run
from tfmq_fx.reconstruction.resume import Finished


@pytest.fixture(scope="module")
def uninterrupted():
    return reconstructed()


def test_keeping_state_changes_nothing_and_a_second_run_learns_nothing(tmp_path, uninterrupted, monkeypatch):
    first = reconstructed(tmp_path / "s")
    assert same(integers(first), integers(uninterrupted))
    blocks = len(state_of(first).reconstruction)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        *(f"{i:04d}.safetensors" for i in range(blocks)),
        "state.json",
    ]
    for learn in ("run.choose_rounding", "stage.tune"):
        monkeypatch.setattr(f"tfmq_fx.reconstruction.{learn}", lambda *_a, **_k: pytest.fail("learned again"))
    again = reconstructed(tmp_path / "s")
    assert same(integers(again), integers(uninterrupted))
    assert state_of(again).reconstruction == state_of(first).reconstruction


@pytest.mark.parametrize("finished", [0, 1, 4, 7])
def test_it_goes_on_from_what_is_there(tmp_path, uninterrupted, finished):
    reconstructed(tmp_path / "s")
    for file in sorted((tmp_path / "s").glob("*.safetensors"))[finished:]:
        file.unlink()
    if finished == 4:  # as a power failure may leave it
        (tmp_path / "s" / "0003.safetensors").write_bytes(b"")
    assert same(integers(reconstructed(tmp_path / "s")), integers(uninterrupted))


def reconstruct(talk, state, file):  # noqa: ARG001
    torch.manual_seed(0)
    gm = tfmq_fx.reconstruct(prepared(), calibration(), TUNED, seed=0, state=state)
    torch.save(dict(tfmq_fx.convert(gm).state_dict()), file)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_integers(tmp_path):
    def run(state, output, kill_after=None):
        process, _ = start(reconstruct, state, output)
        if kill_after is not None:
            while process.is_alive() and len(list(state.glob("*.safetensors"))) < kill_after:
                time.sleep(0.005)
            process.kill()
        process.join()
        return process.exitcode

    assert run(tmp_path / "a", tmp_path / "a.pt") == 0
    assert run(tmp_path / "b", tmp_path / "b.pt", kill_after=2) == -signal.SIGKILL
    assert not (tmp_path / "b.pt").exists()
    assert run(tmp_path / "b", tmp_path / "b.pt") == 0
    a, b = torch.load(tmp_path / "a.pt"), torch.load(tmp_path / "b.pt")
    assert same(a, b)


def test_another_run_does_not_take_over_the_state(tmp_path):
    reconstructed(tmp_path / "s")
    with pytest.raises(TFMQError, match="belongs to another run"):
        reconstructed(tmp_path / "s", iterations=21)


def test_out_of_memory_names_the_block_and_keeps_what_was_finished(tmp_path, uninterrupted, monkeypatch):
    learn, third = of_run.choose_rounding, state_of(uninterrupted).reconstruction[2].name

    def full(name, *args, **kwargs):
        if name == third:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines")
        return learn(name, *args, **kwargs)

    monkeypatch.setattr(of_run, "choose_rounding", full)
    with pytest.raises(
        TFMQError, match=f"block {third}: out of memory .*2.00 GiB.*finished blocks are in"
    ) as error:
        reconstructed(tmp_path / "s")
    assert "\n" not in str(error.value)
    assert len(list((tmp_path / "s").glob("*.safetensors"))) == 2
    with pytest.raises(TFMQError, match="nothing is kept"):
        reconstructed()
    monkeypatch.setattr(of_run, "choose_rounding", learn)
    assert same(integers(reconstructed(tmp_path / "s")), integers(uninterrupted))


def test_a_full_disk_keeps_what_was_finished(tmp_path, uninterrupted, monkeypatch):
    save = resume.save_file

    def full(tensors, file, metadata):
        if file.name.startswith("0002."):
            file.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, file, metadata=metadata)

    monkeypatch.setattr(resume, "save_file", full)
    with pytest.raises(TFMQError, match=r"cannot be saved \(.*No space left.*\); the 2 before it are saved"):
        reconstructed(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "0000.safetensors",
        "0001.safetensors",
        "state.json",
    ]
    monkeypatch.setattr(resume, "save_file", save)
    assert same(integers(reconstructed(tmp_path / "s")), integers(uninterrupted))


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_learned(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TFMQError, match="the state of reconstruction cannot be saved"):
        reconstructed(tmp_path / "file" / "s")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(TFMQError, match="is not empty and has no state"):
        reconstructed(tmp_path / "full")


def test_a_state_that_another_process_writes_while_the_folder_is_looked_at_is_taken(tmp_path, monkeypatch):
    listing = Path.iterdir

    def late(folder):
        (tmp_path / "state.json").write_text(json.dumps({"fingerprint": "this run's"}))
        return listing(folder)

    monkeypatch.setattr(Path, "iterdir", late)
    Finished(tmp_path, "this run's", Ranks())
    with pytest.raises(TFMQError, match="belongs to another run"):
        Finished(tmp_path, "another's", Ranks())
