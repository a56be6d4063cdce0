from __future__ import annotations

import pytest
from PIL import Image

from fastprompt.data.formats import FORMATS, REFUSED, is_image_name, opened_formats, why_not_opened

OLD_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@pytest.mark.parametrize("suffix", [*OLD_EXTENSIONS, ".gif", ".jfif", ".jpe", ".jp2", ".j2k", ".apng", ".tga", ".mpo"])
def test_what_pillow_reads_is_an_image(suffix):
    assert is_image_name(f"folder/photo{suffix}")
    assert is_image_name(f"folder/PHOTO{suffix.upper()}")


@pytest.mark.parametrize(
    "name", ["notes.txt", "labels.csv", "photo", "photo.heic", "photo.png.part", "movie.mp4", "png"]
)
def test_other_names_are_none(name):
    assert not is_image_name(name)


@pytest.mark.parametrize(
    ("suffix", "reason"), [(".eps", "Ghostscript"), (".wmf", "operating system"), (".h5", "no pixels")]
)
def test_formats_that_are_refused_say_why(suffix, reason):
    assert not is_image_name(f"a{suffix}")
    assert reason in why_not_opened(suffix)
    assert why_not_opened(".txt") is None
    assert not set(opened_formats(f"a{suffix}")) & set(REFUSED)


def test_every_extension_of_the_registry_is_decided():
    Image.init()
    for suffix, name in Image.EXTENSION.items():
        opened = opened_formats(f"a{suffix}")
        if is_image_name(f"a{suffix}"):
            assert name == "MPO" or name in opened
        else:
            assert name in REFUSED or name not in Image.OPEN


def test_formats_told_by_little_are_tried_only_for_their_own_extension():
    assert set(opened_formats("a.png")) == set(FORMATS) & set(Image.OPEN)
    assert set(opened_formats("a.TGA")) == (set(FORMATS) | {"TGA"}) & set(Image.OPEN)


def test_a_plugin_adds_its_format(monkeypatch):
    assert not is_image_name("a.heic")
    Image.init()
    monkeypatch.setitem(Image.OPEN, "HEIF", (None, None))
    monkeypatch.setitem(Image.EXTENSION, ".heic", "HEIF")
    assert is_image_name("a.heic")
    assert "HEIF" in opened_formats("a.heic")
