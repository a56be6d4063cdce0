from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data.images import (
    TooLarge,
    check_decoded_bytes,
    decoded_limit,
    open_image,
    to_rgb,
    to_tensor,
)


def halves(width=40, height=20):
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (width // 2, 0, width, height))
    return image


def test_exif_orientation_is_honoured(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its left side: rotate 90 degrees clockwise to show
    halves().save(tmp_path / "turned.png", exif=exif)
    image = open_image(tmp_path / "turned.png")
    assert image.size == (20, 40)
    assert image.getpixel((10, 5)) == (255, 0, 0)
    assert image.getpixel((10, 35)) == (0, 0, 255)


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


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("bounds", [(0, 65535), (0, 4095), (-1024, 3071), (0, 1), (100, 101), (-1e6, 1e6)])
def test_deep_grey_images_are_scaled_from_the_range(dtype, bounds):
    values = np.linspace(bounds[0] - 50, bounds[1] + 50, 300).reshape(3, 100)
    values = values.clip(0, 65535).astype(dtype) if dtype == np.uint16 else values.astype(dtype)
    found = np.asarray(to_rgb(Image.fromarray(values), bounds))
    exact = ((values.astype(np.float64) - bounds[0]) / (bounds[1] - bounds[0]) * 255).clip(0, 255)
    expected = np.rint(exact) if dtype == np.float32 else np.floor(exact + 1e-9)
    assert found.shape == (3, 100, 3)
    assert np.abs(found[..., 0] - expected).max() <= (0 if dtype == np.uint16 else 1)
    assert (found[..., 0] == found[..., 2]).all()


def test_16_bits_are_divided_by_257_and_8_bit_floats_are_exact():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 1], values // 257)
    levels = np.arange(256, dtype=np.float32)[None]
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(levels / 255)))[..., 0], levels)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(levels), (0, 255)))[..., 0], levels)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I"])
def test_the_range_of_a_mode_does_not_depend_on_the_image(mode):
    dark, bright = (to_rgb(Image.new(mode, (4, 4), value)).getpixel((0, 0))[0] for value in (200, 65535))
    assert (dark, bright) == (0, 255)


def test_large_deep_images_are_scaled_in_parts():
    values = np.arange(2 * 700_001, dtype=np.int32).reshape(2, 700_001)
    found = np.asarray(to_rgb(Image.fromarray(values), (0, 1_400_001)))[..., 0]
    assert np.array_equal(found, values * 255 // 1_400_001)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value, tmp_path):
    Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"cannot read the image .*a.tif: it has NaN or infinite values"):
        open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_images_in_a_file_the_first_is_read(suffix, tmp_path):
    frames = [Image.new("RGB", (9, 9), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / f"a.{suffix}").getpixel((4, 4))[0] > 240


def test_damage_that_pillow_passes_over_is_found(tmp_path, photo, encoded):
    jpeg, png = encoded(photo(100, 80), "JPEG"), encoded(photo(100, 80), "PNG")
    (tmp_path / "a.jpg").write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")
    (tmp_path / "a.png").write_bytes(png[: len(png) // 2] + bytes(len(png) // 2))
    for name in ("a.jpg", "a.png"):
        with pytest.raises(ValueError, match=rf"cannot read the image .*{name}"):
            open_image(tmp_path / name)
        assert open_image(tmp_path / name, strict=False).size == (100, 80)


def test_a_file_that_is_none_or_not_there(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.png")
    for name, message in (("pipe.png", "cannot read the image .*pipe.png: it is not a regular file"),
                          ("gone.png", "no such image file: .*gone.png")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            open_image(tmp_path / name)


def test_an_image_may_take_so_many_bytes(tmp_path):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", max_decoded_bytes=40_000).size == (100, 100)
    with pytest.raises(ValueError, match=r"a.png: 100 x 100 pixels in mode RGB need 40,000 bytes when decoded"):
        open_image(tmp_path / "a.png", max_decoded_bytes=39_999)
    with Image.open(tmp_path / "a.png") as image, pytest.raises(TooLarge):
        check_decoded_bytes(image, 100)


@pytest.mark.parametrize(("value", "error"), [(1.5, TypeError), (True, TypeError), (0, ValueError), (-7, ValueError)])
def test_bad_limits(value, error):
    with pytest.raises(error, match="max_decoded_bytes must be"):
        decoded_limit(value)
    assert decoded_limit(None) == 2**29
    assert decoded_limit(7) == 7
