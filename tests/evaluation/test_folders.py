"""Real pictures from a folder: which files, how they are cut to size, and what is said of folders that do not do."""

import numpy as np
import pytest
import torch
from PIL import Image

from tfmq_fx.base.errors import TFMQError
from tfmq_fx.evaluation.folders import check_images, image_files, images_from


def save(file, pixels):
    """Write pixels (H, W) or (H, W, 3), bytes, and give them as float in [-1, 1], (C, H, W)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    x = torch.from_numpy(pixels.copy()).float() / 127.5 - 1
    return x[None] if x.dim() == 2 else x.permute(2, 0, 1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_pixels_of_the_right_size_are_kept(tmp_path):
    grey, colour = save(tmp_path / "a.png", noise(6, 6)), save(tmp_path / "b.PNG", noise(6, 6, 3, seed=1))
    found = images_from(tmp_path, size=6)
    assert (found.shape, found.dtype) == ((2, 3, 6, 6), torch.float32)
    torch.testing.assert_close(found, torch.stack([grey.expand(3, -1, -1), colour]), atol=1e-6, rtol=0)
    shades = images_from(tmp_path, size=(6, 6), channels=1)
    torch.testing.assert_close(shades[0], grey, atol=1e-6, rtol=0)
    luma = (colour * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    torch.testing.assert_close(shades[1, 0], luma, atol=1.01 / 127.5, rtol=0)


@pytest.mark.parametrize("size", [4, (4, 4), (4, 8), (8, 4), (16, 2)])
def test_an_image_covers_the_size_and_its_centre_is_kept(tmp_path, size):
    pixels = np.zeros((24, 60), np.uint8)
    pixels[:, 30:] = 255  # the edge is in the middle, whatever is cut away
    save(tmp_path / "wide.png", pixels)
    save(tmp_path / "high.png", pixels.T.copy())
    high, wide = images_from(tmp_path, size=size, channels=1)
    height, width = (size, size) if isinstance(size, int) else size
    assert high.shape == wide.shape == (1, height, width)
    for x in (wide[0], high[0].T):
        half = x.shape[1] // 2
        assert (x[:, : half - 1] < -0.9).all()
        assert (x[:, half + 1 :] > 0.9).all()
        assert x.mean().abs() < 0.02


def test_folders_of_classes_hidden_files_and_a_draw(tmp_path):
    for i in range(12):
        save(tmp_path / f"class{i % 3}" / "deeper" / f"{i:02}.bmp", np.full((2, 2), i, np.uint8))
    (tmp_path / "class0" / "words.txt").write_text("no image")
    (tmp_path / "empty").mkdir()

    def drawn(**kwargs):
        values = images_from(tmp_path, size=2, channels=1, **kwargs)[:, 0, 0, 0]
        return ((values + 1) * 127.5).round().int().tolist()

    assert drawn() == [0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11]
    assert drawn(num=5, seed=1) == drawn(num=5, seed=1) != drawn(num=5, seed=2)
    assert sorted(drawn(num=12)) == list(range(12))
    assert len(set(drawn(num=5))) == 5


def test_what_is_wrong_is_named(tmp_path):
    with pytest.raises(TFMQError, match=r"nowhere: no such folder of images"):
        images_from(tmp_path / "nowhere", size=2)
    (tmp_path / "words.txt").write_text("no image")
    with pytest.raises(TFMQError, match=r"no such folder of images"):
        image_files(tmp_path / "words.txt")
    with pytest.raises(TFMQError, match=r"has no images \(.*\.png"):
        images_from(tmp_path, size=2)
    save(tmp_path / "whole.png", noise(32, 32))
    with pytest.raises(TFMQError, match="1 images, but 2 were asked for"):
        check_images(tmp_path, num=2)
    with pytest.raises(TFMQError, match="1 channel or 3, not 4"):
        images_from(tmp_path, size=2, channels=4)
    half = (tmp_path / "whole.png").read_bytes()[:500]
    for name, data in (("half.png", half), ("nothing.png", b""), ("words.png", b"words")):
        (tmp_path / name).write_bytes(data)
        for call in (lambda: check_images(tmp_path), lambda: images_from(tmp_path, size=2)):
            with pytest.raises(TFMQError, match=f"{name}: cannot be read as an image"):
                call()
        (tmp_path / name).unlink()
    check_images(tmp_path)
