"""Files and folders that are absent, unchanged or complete."""

import hashlib
import logging
import os

import pytest
import torch

from tfmq_fx.base import files
from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import (
    MANIFEST,
    damaged,
    finite_json,
    keep_folder,
    raw_bytes,
    replace_files,
    replace_folder,
    require_writable,
    update_with_tensors,
)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_a_file_and_those_beside_it_come_together(tmp_path):
    file = tmp_path / "new" / "net.onnx"

    def write(path):
        path.write_text("graph")
        path.with_name("net.onnx.data").write_text("weights")

    replace_files(file, write)
    assert names(file.parent) == ["net.onnx", "net.onnx.data"]
    replace_files(file, lambda path: path.write_text("other"))
    assert file.read_text() == "other"


@pytest.mark.parametrize("replace", [replace_files, replace_folder])
def test_what_was_there_stays_when_writing_fails(tmp_path, replace):
    target = tmp_path / "there"
    good = (
        (lambda path: path.write_text("old"))
        if replace is replace_files
        else (lambda path: (path / "f").touch())
    )
    replace(target, good)

    def full(path):
        good(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(TFMQError, match=rf"{target}: cannot be written \(No space left on device\)"):
        replace(target, full)
    assert names(tmp_path) == ["there"]
    assert target.read_text() == "old" if replace is replace_files else names(target) == ["f"]


@pytest.mark.parametrize("replace", [replace_files, replace_folder])
def test_a_place_that_cannot_be_written_is_named(tmp_path, replace):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "below"
    with pytest.raises(TFMQError, match=f"{target}: cannot be written"):
        replace(target, lambda _: pytest.fail("called"))


def two(folder):
    (folder / "a").write_text("one")
    (folder / "b").write_text("two")


def test_a_kept_folder_is_written_once_until_it_is_damaged(tmp_path, caplog):
    folder = tmp_path / "new" / "x"
    assert not keep_folder(folder, two)
    assert keep_folder(folder, lambda _: pytest.fail("called"))
    (folder / "a").write_text("not")
    (folder / "b").unlink()
    (folder / "stranger").touch()
    assert damaged(folder) == ["a", "b"]
    with caplog.at_level(logging.WARNING, files.log.name):
        assert not keep_folder(folder, two)
    assert [r.message for r in caplog.records] == [f"{folder}: damaged or missing: a, b; it is made anew"]
    assert names(folder) == ["a", "b", MANIFEST]
    assert names(folder.parent) == ["x"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "7", "\x00", '{"a": 1}', '{"a": {"bytes": 3}}', '{"\\u0000": null, "c": {}}'],
)
def test_a_manifest_that_is_no_manifest_is_damage(tmp_path, text):
    keep_folder(tmp_path / "x", two)
    (tmp_path / "x" / MANIFEST).write_text(text)
    assert damaged(tmp_path / "x")
    assert not keep_folder(tmp_path / "x", two)
    assert not damaged(tmp_path / "x")


@pytest.mark.parametrize("was_there", [False, True])
def test_the_first_of_two_that_write_a_kept_folder_wins(tmp_path, was_there):
    """Whoever has checked the files may be reading them."""
    if was_there:
        keep_folder(tmp_path / "x", two)
        (tmp_path / "x" / "a").write_text("not")

    def slower(new):
        (new / "a").write_text("slower")
        keep_folder(tmp_path / "x", two)

    assert not keep_folder(tmp_path / "x", slower)
    assert (tmp_path / "x" / "a").read_text() == "one"
    assert not damaged(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_another_error_comes_through_and_leaves_nothing(tmp_path):
    def wrong(_):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        replace_files(tmp_path / "file", wrong)
    assert names(tmp_path) == []


def test_a_digest_tells_names_types_and_shapes_apart():
    x = torch.arange(6, dtype=torch.int32)

    def digest(*tensors):
        found = hashlib.sha256()
        update_with_tensors(found, tensors)
        return found.hexdigest()

    assert digest(("a", x)) == digest(("a", x.clone()))
    others = [("b", x), ("a", x.float()), ("a", x.view(2, 3)), ("a", x + 1)]
    assert len({digest(pair) for pair in [("a", x), *others]}) == 5
    assert bytes(raw_bytes(x.view(2, 3).T)) == x.view(2, 3).T.contiguous().numpy().tobytes()


def test_json_has_no_infinity():
    assert finite_json({"a": [1.0, float("inf"), (float("nan"), "x")], 2: None}) == {
        "a": [1.0, None, [None, "x"]],
        "2": None,
    }


@pytest.mark.parametrize("replace", [replace_files, replace_folder])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_its_target_is_written(tmp_path, replace, there):
    write = (
        (lambda path: path.write_text("new"))
        if replace is replace_files
        else (lambda path: (path / "f").write_text("new"))
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    if there:
        replace(disk / "target", write)
    (tmp_path / "link").symlink_to("disk/target")
    replace(tmp_path / "link", write)
    assert (tmp_path / "link").is_symlink()
    written = disk / "target" if replace is replace_files else disk / "target" / "f"
    assert written.read_text() == "new"
    assert names(tmp_path) == ["disk", "link"]
    assert names(disk) == ["target"]


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_what_is_written_has_the_users_permissions(tmp_path, umask):
    def private(path):
        path.touch()
        path.chmod(0o600)

    before = os.umask(umask)
    try:
        replace_files(tmp_path / "file", private)
        replace_folder(tmp_path / "folder", lambda new: private(new / "f"))
    finally:
        os.umask(before)
    modes = [(tmp_path / n).stat().st_mode & 0o777 for n in ("file", "folder", "folder/f")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask, 0o666 & ~umask]
    assert names(tmp_path / "folder") == ["f"]


def test_names_are_as_long_as_the_disk_allows(tmp_path):
    """The temporary folder's name must not be longer than the name itself."""
    longest = "ü" * 127
    replace_folder(tmp_path / longest, lambda new: (new / "f").touch())
    replace_files(tmp_path / f"{longest}x", lambda path: path.touch())
    assert names(tmp_path) == sorted([longest, f"{longest}x"])


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "ü" * 128, "new/" + "x" * 300 + "/below", "file/below"])
def test_what_cannot_be_written_is_known_before_the_work(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(TFMQError, match=r"cannot be written \((File name too long|Not a directory)\)"):
        require_writable(tmp_path / name)
    require_writable(tmp_path / "new" / "folder")
    assert names(tmp_path) == ["file"]
