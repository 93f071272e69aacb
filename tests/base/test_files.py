"""Files and folders that are absent, unchanged or complete."""

import hashlib

import pytest
import torch

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.base.files import finite_json, raw_bytes, replace_files, replace_folder, update_with_tensors


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
