from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data import list_images, read_images


def test_files_and_folders_come_back_in_order(tmp_path, photo):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for seed, name in enumerate(["folder/b.png", "folder/a.jpg", "folder/deep/c.PNG", "first.png", "odd.name"]):
        photo(seed=seed).save(tmp_path / name, "PNG")
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    (tmp_path / "folder" / "._a.jpg").write_bytes(b"macOS leaves these")
    with pytest.warns(
        UserWarning, match=r"folder: left out 1 file\(s\) without an image extension .*1 .txt, e.g. notes.txt"
    ):
        images, names = read_images([tmp_path / "odd.name", str(tmp_path / "folder")], (32, 48))
    assert [Path(name).name for name in names] == ["odd.name", "a.jpg", "b.png", "c.PNG"]
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], torch.from_numpy(np.asarray(photo(seed=4)).copy()).permute(2, 0, 1))


def test_the_broken_file_is_named_or_skipped(tmp_path, photo, encoded):
    photo().save(tmp_path / "good.png")
    whole = encoded(photo(200, 200), "JPEG")
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    Image.new("RGB", (9000, 1)).save(tmp_path / "thin.png")
    with pytest.raises(ValueError, match=r"^2 image file\(s\) .*half\.jpg \(.*premature.*thin\.png \(.*extreme"):
        read_images(tmp_path, 224)
    with pytest.warns(UserWarning, match=r"skipped 2 .*half\.jpg.*thin\.png"):
        images, names = read_images(tmp_path, 224, on_bad="skip")
    assert images.shape == (1, 3, 224, 224)
    assert names == [str(tmp_path / "good.png")]
    (tmp_path / "good.png").unlink()
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="got 2 unreadable files"):
        read_images(tmp_path, 224, on_bad="skip")


def test_loops_are_walked_once(tmp_path, photo):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        photo().save(tmp_path / name / "0.png")
        (tmp_path / name / "up").symlink_to("..")
    with pytest.warns(UserWarning, match="2 link"):
        assert len(list_images(tmp_path)) == 2


def test_a_file_that_is_given_twice_is_there_twice(tmp_path, photo):
    photo().save(tmp_path / "a.png")
    assert len(list_images([tmp_path / "a.png", tmp_path / "a.png"])) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((np.ones((8, 8)) * 4095).astype(np.uint16), r"4095 to 4095, read as 0 to 65535"),
        (np.linspace(0, 255, 64, dtype=np.float32).reshape(8, 8), r"0 to 255, read as 0 to 1"),
        (np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8), r"-1 to 1, read as 0 to 1"),
        (np.arange(-1024, 0, 16, dtype=np.int32).reshape(8, 8), r"-1024 to -16, read as 0 to 65535"),
    ],
)
def test_levels_that_would_be_lost_are_told_unless_the_range_is_given(values, message, tmp_path):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.warns(UserWarning, match=rf"1 grey image\(s\) .*a.tif \({message}\).*intensity_range=\(low, high\)"):
        read_images(tmp_path, 8)
    bounds = (float(values.min()), float(values.max()) + 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images, _ = read_images(tmp_path, 8, intensity_range=bounds)
    expected = ((values.astype(float) - bounds[0]) / (bounds[1] - bounds[0]) * 255).astype(int)
    assert np.abs(images[0, 0].numpy().astype(int) - expected).max() <= 1


def test_usual_deep_images_need_no_word(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)).save(tmp_path / "a.png")
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "b.tif")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_images(tmp_path, 8)


def test_an_image_may_take_so_many_bytes(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="max_decoded_bytes=1,000"):
        read_images(tmp_path, 8, max_decoded_bytes=1000)
    assert len(read_images(tmp_path, 8, max_decoded_bytes=40_000)[1]) == 1


def test_bad_arguments(tmp_path, photo):
    photo().save(tmp_path / "a.png")
    (tmp_path / "none").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    cases = [
        ((tmp_path / "absent.png", 16), {}, ValueError, "paths must be files or folders that exist, got .*absent.png"),
        ((tmp_path / "none", 16), {}, ValueError, "paths must hold images, got the folder"),
        ((tmp_path / "texts", 16), {}, ValueError, "paths must hold images, got the folder .*1 .txt"),
        (([], 16), {}, ValueError, "at least one image file"),
        ((tmp_path / "a.png", 0), {}, ValueError, "image_size must be positive, got 0"),
        ((tmp_path / "a.png", -3), {}, ValueError, "image_size"),
        ((tmp_path / "a.png", 1.5), {}, TypeError, "image_size"),
        ((tmp_path / "a.png", True), {}, TypeError, "image_size"),
        ((tmp_path / "a.png", 16), {"resize": "stretch"}, ValueError, "resize must be one of .'crop', 'squash'"),
        ((tmp_path / "a.png", 16), {"on_bad": "ignore"}, ValueError, "on_bad"),
        ((tmp_path / "a.png", 16), {"intensity_range": (1, 0)}, ValueError, "intensity_range"),
        ((tmp_path / "a.png", 16), {"max_decoded_bytes": -1}, ValueError, "max_decoded_bytes"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            read_images(*arguments, **options)
