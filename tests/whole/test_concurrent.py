"""Several processes at once, with one folder: to save into, to read from, to keep a reconstruction's state in."""

import os
import threading

import pytest
import torch

import tfmq_fx
from benchmarks.networks.small import FAST, TinyUNet, calibration, make, prepared
from tests.helpers.processes import finish, start
from tests.helpers.reconstructed import integers, reconstructed, same
from tfmq_fx.artefact.saving import CONFIG
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import replace_folder


def save_often(talk, folder, seed):
    recipe = tfmq_fx.Recipe(reconstruction=tfmq_fx.Reconstruction(method="nearest"))
    q = tfmq_fx.quantize(make(TinyUNet, seed=seed), recipe, calibration=calibration(10))
    together(talk)
    for _ in range(100):
        q.save_pretrained(folder)


def together(talk):
    """Wait for the others."""
    talk.send("ready")
    talk.recv()


def go(processes):
    for _, talk in processes:
        assert talk.recv() == "ready"
    for _, talk in processes:
        talk.send("go")


def test_processes_that_save_into_one_folder_leave_one_whole_artefact(tmp_path):
    """And whoever reads meanwhile gets one of them, or a TFMQError."""
    processes = [start(save_often, tmp_path / "q", seed) for seed in (0, 1)]
    go(processes)
    seen, errors = set(), set()
    while any(p.is_alive() for p, _ in processes):
        try:
            model = tfmq_fx.load(tmp_path / "q")
        except TFMQError as error:
            errors.add(str(error).replace(str(tmp_path), ""))
        else:
            seen.add(model.network.get_buffer("conv_in.weight_scale").sum().item())
    for p, talk in processes:
        finish(p, talk)
    assert [f.name for f in tmp_path.iterdir()] == ["q"]
    assert len((tmp_path / "q" / CONFIG).read_bytes()) > 100
    scale = tfmq_fx.load(tmp_path / "q").network.get_buffer("conv_in.weight_scale").sum().item()
    assert len(seen | {scale}) <= 2
    assert all(len(e.splitlines()) == 1 for e in errors)


def test_many_threads_replace_one_folder(tmp_path):
    """The renames alone, more often than processes that quantize can."""
    failed = []

    def write(name):
        try:
            for _ in range(100):
                replace_folder(tmp_path / "q", lambda f: [(f / x).write_text(name) for x in "ab"])
        except TFMQError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in "xyz"]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert [f.name for f in tmp_path.iterdir()] == ["q"]
    assert (tmp_path / "q" / "a").read_text() == (tmp_path / "q" / "b").read_text()


def test_a_folder_that_is_replaced_while_it_is_read_is_no_mixture(tiny, tmp_path, monkeypatch):
    """The other artefact has the same shapes and comes between the check of the hashes and the reading."""
    from tfmq_fx.artefact import saving

    folder, read = tmp_path / "q", saving.load_file
    tiny.save_pretrained(folder)

    def late(file):
        monkeypatch.undo()
        tiny.save_pretrained(folder)
        return read(file)

    monkeypatch.setattr(saving, "load_file", late)
    with pytest.raises(TFMQError, match="was replaced while it was read; load it again"):
        tfmq_fx.load(folder)
    tfmq_fx.load(folder)


def test_what_was_there_stays_when_the_new_folder_cannot_be_moved(tmp_path, monkeypatch):
    """It is moved aside, the new one fails, and the old one comes back."""
    replace_folder(tmp_path / "q", lambda f: (f / "a").write_text("old"))
    rename = os.rename

    def failing(a, b):
        if a.name.endswith("-old0") or b.exists() or b.name != "q":
            rename(a, b)
        else:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(TFMQError, match="Input/output error"):
        replace_folder(tmp_path / "q", lambda f: (f / "a").write_text("new"))
    assert [f.name for f in tmp_path.iterdir()] == ["q"]
    assert (tmp_path / "q" / "a").read_text() == "old"


def reconstruct(talk, state, file):
    torch.manual_seed(0)
    gm = prepared()
    together(talk)
    gm = tfmq_fx.convert(tfmq_fx.reconstruct(gm, calibration(), FAST, seed=0, state=state))
    torch.save(dict(gm.state_dict()), file)


def test_two_processes_that_do_the_same_run_share_its_state(tmp_path):
    processes = [start(reconstruct, tmp_path / "s", tmp_path / f"{i}.pt") for i in range(2)]
    go(processes)
    for p, talk in processes:
        finish(p, talk)
    assert same(*(torch.load(tmp_path / f"{i}.pt") for i in range(2)))
    assert all(not f.name.startswith(".") for f in (tmp_path / "s").iterdir())


def test_blocks_of_another_run_are_not_taken(tmp_path):
    """Both have begun at the same moment, and passed the check of state.json."""
    expected = integers(reconstructed(tmp_path / "s"))
    other = integers(reconstructed(tmp_path / "other", learning_rate=0.5))
    assert not same(expected, other)
    for file in (tmp_path / "other").glob("*.safetensors"):
        (tmp_path / "s" / file.name).write_bytes(file.read_bytes())
    assert same(integers(reconstructed(tmp_path / "s")), expected)
