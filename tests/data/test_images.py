from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data import list_images, read_images
from fastprompt.data.images import check_image, open_image, to_rgb, to_tensor


def photo(width=48, height=32, seed=0):
    generator = np.random.default_rng(seed)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def halves(width=40, height=20):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def broken_files(folder: Path):
    jpeg, png = encoded(photo(), "JPEG"), encoded(photo(), "PNG")
    contents = {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half.png": png[: len(png) // 2],
        "empty.png": b"",
        "text.jpg": b"this is not an image",
        "half.bmp": encoded(photo(), "BMP")[:2000],
        "flipped.png": png[:200] + bytes([png[200] ^ 255]) + png[201:],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return sorted(contents)


def test_broken_files_are_found_without_decoding_whole_ones(tmp_path):
    for name in broken_files(tmp_path):
        assert check_image(tmp_path / name), name
    for kind in ("jpg", "png", "bmp", "webp", "tiff"):
        photo().save(tmp_path / f"whole.{kind}")
        assert check_image(tmp_path / f"whole.{kind}") is None
    (tmp_path / "trailing.jpg").write_bytes(encoded(photo(), "JPEG") + b"\0" * 500)
    assert check_image(tmp_path / "trailing.jpg") is None


def test_read_images_names_the_broken_file(tmp_path):
    photo().save(tmp_path / "good.png")
    (tmp_path / "half.jpg").write_bytes(encoded(photo(), "JPEG")[:-100])
    with pytest.raises(ValueError, match=r"1 image file\(s\) cannot be read: .*half\.jpg \(.*truncated"):
        read_images(tmp_path, 16)
    with pytest.warns(UserWarning, match=r"skipped 1 .*half\.jpg"):
        images, names = read_images(tmp_path, 16, on_bad="skip")
    assert images.shape == (1, 3, 16, 16)
    assert names == [str(tmp_path / "good.png")]
    (tmp_path / "good.png").unlink()
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(ValueError, match="none of the 1"):
        read_images(tmp_path, 16, on_bad="skip")


def test_files_and_folders_come_back_in_order(tmp_path):
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    for seed, name in enumerate(["folder/b.png", "folder/a.jpg", "folder/deep/c.PNG", "first.png", "odd.name"]):
        photo(seed=seed).save(tmp_path / name, "PNG")
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    (tmp_path / "folder" / "._a.jpg").write_bytes(b"macOS leaves these")
    images, names = read_images([tmp_path / "odd.name", str(tmp_path / "folder")], (32, 48))
    assert [Path(name).name for name in names] == ["odd.name", "a.jpg", "b.png", "c.PNG"]
    assert images.dtype == torch.uint8
    assert torch.equal(images[0], torch.from_numpy(np.asarray(photo(seed=4)).copy()).permute(2, 0, 1))


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: rotate 90 degrees clockwise to show
    halves().save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == (255, 0, 0)
    assert image.getpixel((10, 35)) == (0, 0, 255)
    images, _ = read_images(tmp_path / "turned.png", (40, 20))
    assert images[0, :, 5, 10].tolist() == [255, 0, 0]


def test_crop_keeps_the_shape_of_things_and_squash_keeps_all_of_it():
    wide = Image.new("RGB", (60, 20), "green")
    wide.paste("red", (20, 0, 40, 20))
    cropped = to_tensor(wide, (20, 20), "crop")
    assert cropped[0].float().mean() > 250  # the red middle only
    squashed = to_tensor(wide, (20, 20), "squash")
    assert squashed[0, 10, 10] > 200
    assert squashed[0, 10, 1] < 50
    assert to_tensor(wide, (7, 33), "crop").shape == (3, 7, 33)
    assert to_tensor(Image.new("RGB", (1, 500)), (16, 16)).shape == (3, 16, 16)


def test_other_modes_become_rgb():
    grey = Image.fromarray(np.full((4, 4), 77, dtype=np.uint8))
    assert to_rgb(grey).getpixel((0, 0)) == (77, 77, 77)
    assert to_tensor(torch.full((1, 4, 4), 77, dtype=torch.uint8), (4, 4)).unique().tolist() == [77]
    deep = Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16))
    assert to_rgb(deep).getpixel((0, 0)) == (155, 155, 155)
    dark = Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))  # of 65535, however dark the whole image is
    assert to_rgb(dark).getpixel((0, 0)) == (0, 0, 0)
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    assert to_rgb(palette).getpixel((0, 0)) == (10, 20, 30)


def test_bad_arguments(tmp_path):
    photo().save(tmp_path / "a.png")
    (tmp_path / "none").mkdir()
    cases = [
        ((tmp_path / "absent.png", 16), {}, ValueError, "no such file or folder.*absent.png"),
        ((tmp_path / "none", 16), {}, ValueError, "no image in the folder"),
        (([], 16), {}, ValueError, "at least one image file"),
        ((tmp_path / "a.png", 0), {}, ValueError, "image_size: expected a positive size, got 0"),
        ((tmp_path / "a.png", -3), {}, ValueError, "image_size"),
        ((tmp_path / "a.png", 1.5), {}, TypeError, "image_size"),
        ((tmp_path / "a.png", True), {}, TypeError, "image_size"),
        (
            (tmp_path / "a.png", 16),
            {"resize": "stretch"},
            ValueError,
            "resize: expected one of 'crop', 'squash'",
        ),
        ((tmp_path / "a.png", 16), {"on_bad": "ignore"}, ValueError, "on_bad"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            read_images(*arguments, **options)


def test_unreadable_folder_is_an_error_not_an_empty_one(tmp_path, monkeypatch):
    import os

    (tmp_path / "locked").mkdir()
    photo().save(tmp_path / "a.png")
    real = os.scandir

    def scandir(path="."):
        if Path(os.fspath(path)).name == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read the folder .*locked: Permission denied"):
        list_images(tmp_path)
