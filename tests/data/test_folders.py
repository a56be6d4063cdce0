from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastprompt.adapters import Preprocessing
from fastprompt.data import load_data
from fastprompt.data.folders import Reading, folder_source

READING = Reading((16, 16))
SKIP = Reading((16, 16), on_bad="skip")


@pytest.fixture
def plain(tmp_path, fill):
    fill(tmp_path / "set" / "cat", 4)
    fill(tmp_path / "set" / "dog", 6, "jpg")
    return tmp_path / "set"


@pytest.fixture
def divided(tmp_path, fill):
    for part, number in (("train", 4), ("val", 2), ("test", 3)):
        for name in ("cat", "dog", "eel"):
            fill(tmp_path / "set" / part / name, number)
    return tmp_path / "set"


def test_plain_class_folders(plain):
    (plain / ".git").mkdir()
    (plain / "__MACOSX").mkdir()
    with pytest.warns(UserWarning, match=r"set: left out 2 hidden or system folder\(s\) \(.git, __MACOSX\)"):
        source = folder_source(plain, READING)
    assert source.class_names == ["cat", "dog"]
    assert Counter(source.train.labels) == {0: 4, 1: 6}
    assert source.train.keys[0] == os.path.join("cat", "0.png")
    assert source.train.read(9).size == (16, 12)
    assert source.val is None
    assert source.test is None
    assert source.left_out == {"hidden or system folder(s)": 2}
    assert source.intensity_range is None


@pytest.mark.parametrize(
    "names", [("train", "val", "test"), ("Training", "Validation", "Testing"), ("seg_train", "dev", "eval")]
)
def test_divided_folder(divided, names):
    for old, new in zip(("train", "val", "test"), names, strict=True):
        (divided / old).rename(divided / new)
    source = folder_source(divided, READING)
    assert source.class_names == ["cat", "dog", "eel"]
    assert [len(part.labels) for part in (source.train, source.val, source.test)] == [12, 6, 9]
    data = load_data(divided, image_size=8)
    assert (len(data.train), len(data.val), len(data.test)) == (12, 6, 9)


def test_test_folder_with_fewer_classes_keeps_the_numbers_of_train(divided):
    shutil.rmtree(divided / "test" / "cat")
    assert Counter(folder_source(divided, READING).test.labels) == {1: 3, 2: 3}


def test_every_format_pillow_reads_is_read(tmp_path, fill):
    for suffix in ("png", "gif", "jfif", "jpe", "jp2", "webp", "tif", "tga", "bmp"):
        fill(tmp_path / "a", 1, suffix)
        fill(tmp_path / "b", 1, suffix)
    assert len(folder_source(tmp_path, READING).train.labels) == 18


def test_left_out_files_are_named_and_counted(plain):
    for name in ("a.heic", "b.heic", "notes.txt"):
        (plain / "cat" / name).write_text("")
    (plain / "cover.png").write_text("")
    with pytest.warns(
        UserWarning, match=r"left out 1 image\(s\) beside the class folders \(cover.png\); 3 file.*2 .heic"
    ):
        data = load_data(plain, image_size=8)
    left_out = {"file(s) without an image extension": 3, "image(s) beside the class folders": 1}
    assert data.summary()["left_out"] == left_out


@pytest.mark.filterwarnings("ignore:.*left out")
def test_bad_folders(tmp_path, fill, divided):
    fill(tmp_path / "loose")
    (tmp_path / "empty").mkdir()
    (tmp_path / "textual" / "a").mkdir(parents=True)
    (tmp_path / "textual" / "b").mkdir()
    (tmp_path / "textual" / "a" / "x.txt").write_text("")
    fill(tmp_path / "one" / "only")
    shutil.copytree(divided, tmp_path / "wrapped" / "archive")
    fill(tmp_path / "partly" / "a")
    (tmp_path / "partly" / "b").mkdir()
    fill(divided / "val" / "fox")
    (tmp_path / "file").write_text("")
    fill(tmp_path / "unlabelled" / "train" / "a")
    fill(tmp_path / "unlabelled" / "train" / "b")
    fill(tmp_path / "unlabelled" / "test")
    for name, message in {
        "loose": "has images but no class folders",
        "empty": "no class folders and no images",
        "textual": "no image in any class folder",
        "one": r"only one class folder \(only\)",
        "wrapped": r"only one class folder \(archive\).*archive has splits: pass its path",
        "partly": r"no image in the class folder\(s\) b",
        "set": "classes that .*train does not have: fox",
        "file": "got the file",
        "unlabelled": "test has images but no class folders: .* or move the folder away",
        "absent": "must be a folder that exists",
    }.items():
        for given in (tmp_path / name, str(tmp_path / name)):
            with pytest.raises(ValueError, match=message):
                load_data(given, image_size=8)


def test_unreadable_folder(plain, monkeypatch):
    real = os.scandir

    def scandir(path="."):
        if Path(os.fspath(path)).name == "dog":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read the folder .*dog: Permission denied"):
        load_data(plain, image_size=8)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_in_two_splits_or_classes_is_refused(link, divided, plain):
    link(divided / "train" / "dog" / "0.png", divided / "test" / "dog" / "leak.png")
    with pytest.raises(
        ValueError, match=r"links put 1 image file\(s\) into two classes or splits: .*train.dog.0.png and .*leak"
    ):
        folder_source(divided, READING)
    (divided / "test" / "dog" / "leak.png").unlink()
    link(divided / "val" / "dog" / "0.png", divided / "val" / "cat" / "other.png")
    with pytest.raises(ValueError, match="into two classes or splits"):
        folder_source(divided, READING)


def test_a_split_that_links_to_another_is_refused(divided):
    (divided / "test" / "dog" / "more").symlink_to("../../train")
    with pytest.raises(ValueError, match=r"12 image file\(s\) into two classes or splits"):
        folder_source(divided, READING)


def test_a_second_name_in_the_same_class_counts_once(plain):
    os.link(plain / "cat" / "0.png", plain / "cat" / "again.png")
    with pytest.warns(UserWarning, match="1 further name"):
        assert len(folder_source(plain, READING).train.labels) == 10


def test_special_files_do_not_hang(plain):
    os.mkfifo(plain / "cat" / "pipe.png")
    with pytest.warns(UserWarning, match=r"1 special file\(s\), such as pipes and sockets \(cat.pipe.png\)"):
        assert len(folder_source(plain, READING).train.labels) == 10


def bad_files(photo, encoded):
    """Contents that are no whole image of their extension, by file name."""
    import struct
    import zlib

    image = photo(40, 40)
    png, jpeg, gif = encoded(image, "PNG"), encoded(photo(200, 200), "JPEG"), encoded(image, "GIF")
    tiff = encoded(image, "TIFF", compression="tiff_lzw")

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(image))
    short = png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 40, 8, 2, 0, 0, 0))
    short += chunk(b"IDAT", zlib.compress(rows)[:1500]) + chunk(b"IEND", b"")
    return {
        "half.jpg": jpeg[: len(jpeg) // 2],
        "half_with_end.jpg": jpeg[: len(jpeg) // 2] + b"\xff\xd9",
        "half_with_trailer.jpg": jpeg[: len(jpeg) // 2] + b"trailer of a phone \xff\xd9",
        "header.jpg": jpeg[:400] + b"\xff\xd9",
        "markers.jpg": b"\xff\xd8\xff\xd9",
        "overwritten.jpg": jpeg[:2500] + b"\xff\x2d" * 40 + jpeg[2580:],
        "half.png": png[: len(png) // 2],
        "short.png": short,
        "zeros.png": png[: len(png) // 2] + bytes(len(png) // 2),
        "flipped.png": png[:200] + bytes([png[200] ^ 1]) + png[201:],
        "half.bmp": encoded(image, "BMP")[:2000],
        "half.gif": gif[: len(gif) // 2],
        "half_with_end.gif": gif[: len(gif) // 2] + b"\0;",
        "half.tif": tiff[: len(tiff) // 2],
        "half.webp": encoded(image, "WEBP")[:150],
        "empty.png": b"",
        "text.jpg": b"this is not an image",
        "postscript.png": encoded(image, "EPS"),
        "nan.tif": encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"),
        "thin.png": encoded(Image.new("RGB", (9000, 1)), "PNG"),
        "thin.jpg": encoded(Image.new("RGB", (1, 9000)), "JPEG"),
    }


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_whatever_cannot_be_read_is_named_up_front_or_skipped(plain, photo, encoded):
    bad = bad_files(photo, encoded)
    for name, content in bad.items():
        file = plain / "cat" / name
        file.write_bytes(content)
        named = rf"cannot be read: .*cat.{name} \(.+\)"
        with pytest.raises(ValueError, match=rf"^1 image file\(s\) {named}.*on_bad='skip'"):
            folder_source(plain, Reading((224, 224)))
        with pytest.warns(UserWarning, match=rf"^skipped 1 image file\(s\) that {named}"):
            source = folder_source(plain, Reading((224, 224), on_bad="skip"))
        assert Counter(source.train.labels) == {0: 4, 1: 6}, name
        assert not any(name in key for key in source.train.keys)
        assert all(source.train.read(i).mode == "RGB" for i in range(10))
        file.unlink()


def test_squash_takes_what_is_long_and_thin(plain, encoded):
    (plain / "cat" / "thin.png").write_bytes(encoded(Image.new("RGB", (9000, 1)), "PNG"))
    assert len(folder_source(plain, Reading((224, 224), Preprocessing("squash"))).train.labels) == 11


def test_a_link_to_nothing_is_a_missing_image(plain):
    (plain / "cat" / "lost.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"cannot be read: .*lost.png"):
        folder_source(plain, READING)
    with pytest.warns(UserWarning, match=r"skipped 1 .*lost.png"):
        assert len(folder_source(plain, SKIP).train.labels) == 10


def test_a_class_without_a_readable_image_is_an_error(plain):
    for file in (plain / "cat").iterdir():
        file.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="skipped 4"),
        pytest.raises(ValueError, match=r"no image in the class folder.*cat"),
    ):
        folder_source(plain, SKIP)


def test_a_file_that_breaks_after_the_check_is_named(plain, photo, encoded):
    source = folder_source(plain, READING)
    whole = encoded(photo(300, 300), "JPEG")
    for content in (b"overwritten", whole[: len(whole) // 2] + b"\xff\xd9"):
        (plain / "dog" / "0.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read the image .*dog.0\.jpg"):
            source.train.read(4)
    (plain / "dog" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"no such image file: .*dog.0\.jpg"):
        source.train.read(4)


def test_an_image_that_is_too_large_is_refused_or_skipped_or_allowed(plain, encoded):
    (plain / "cat" / "large.png").write_bytes(encoded(Image.new("RGB", (1000, 1000)), "PNG"))
    small = Reading((16, 16), max_decoded_bytes=10**6)
    with pytest.raises(
        ValueError, match=r"large.png \(1000 x 1000 pixels .*4,000,000 bytes.*max_decoded_bytes=1,000,000"
    ):
        folder_source(plain, small)
    with pytest.warns(UserWarning, match="large.png"):
        assert len(folder_source(plain, Reading((16, 16), on_bad="skip", max_decoded_bytes=10**6)).train.labels) == 10
    assert len(folder_source(plain, READING).train.labels) == 11


def test_sources_travel_to_other_processes(plain):
    source = folder_source(plain, READING)
    assert pickle.loads(pickle.dumps(source)).train.read(0) == source.train.read(0)


RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(64, 0)
DEEP = {
    "float, 0 to 1": (RAMP, (0, 1)),
    "float, a third of 0 to 1": (RAMP / 3, (0, 1)),
    "float, a little above 1": (RAMP * 1.001, (0, 1.001)),
    "float, -1 to 1": (RAMP * 2 - 1, (-1, 1)),
    "float, 0 to 255": (RAMP * 255, (0, 255)),
    "float, 0 to 65535": (RAMP * 65535, (0, 65535)),
    "float, metres": (RAMP * 3000 - 500, (-500, 2500)),
    "float, tiny": (RAMP * 1e-6, (0, 1e-6)),
    "8 bits in 16": ((RAMP * 255).astype(np.uint16), (0, 255)),
    "10 bits in 16": ((RAMP * 1023).astype(np.uint16), (0, 1023)),
    "12 bits in 16": ((RAMP * 4095).astype(np.uint16), (0, 4095)),
    "14 bits in 16": ((RAMP * 16383).astype(np.uint16), (0, 16383)),
    "thermal camera": ((RAMP * 900 + 7000).astype(np.uint16), (7000, 7900)),
    "int32, a million": ((RAMP * 1e6).astype(np.int32), (0, 10**6)),
    "int32, negative": ((RAMP * 4095 - 1024).astype(np.int32), (-1024, 3071)),
}


def deep_set(root, values, others=None, suffix="tif"):
    """Two classes with three images of `values` each, of which one is `others`."""
    for name in ("a", "b"):
        (root / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(values if others is None or i else others).save(root / name / f"{i}.{suffix}")
    return root


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_images_keep_their_levels_and_say_how(kind, tmp_path):
    values, bounds = DEEP[kind]
    with pytest.warns(UserWarning, match=r"has 6 grey images of more than 8 bits, e.g. a.0.tif: .*intensity_range"):
        data = load_data(deep_set(tmp_path, values), image_size=64)
    assert data.intensity_range == pytest.approx(bounds, rel=1e-6)
    assert data.summary()["intensity_range"] == list(data.intensity_range)
    found = data.train[0][0][0, 32].double().numpy()
    expected = (values[32].astype(float) - bounds[0]) / (bounds[1] - bounds[0]) * 255
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("suffix", ["tif", "png"])
def test_full_16_bits_are_read_as_ever_without_a_word(suffix, tmp_path):
    values = (RAMP * 65535).astype(np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(deep_set(tmp_path, values, suffix=suffix), image_size=64)
    assert data.intensity_range == (0, 65535)
    assert np.array_equal(data.train[0][0][0, 32].numpy(), values[32] // 257)


def test_signed_16_bits(tmp_path):
    values = (RAMP * 4095 - 1024).astype(np.int16)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.fromarray(values.view(np.uint16)).save(tmp_path / name / f"{i}.tif", tiffinfo={339: 2})
    with pytest.warns(UserWarning, match="-1024 and 3071"):
        data = load_data(tmp_path, image_size=64)
    assert len(data.train[0][0].unique()) == 64


def test_the_range_is_that_of_the_data_set_not_of_the_image(tmp_path):
    """A dark image stays dark beside bright ones."""
    bright, dark = (RAMP * 4095).astype(np.uint16), (RAMP * 100).astype(np.uint16)
    with pytest.warns(UserWarning, match="0 and 4095"):
        source = folder_source(deep_set(tmp_path, bright, dark), Reading((64, 64)))
    assert np.asarray(source.train.read(0)).max() == 6
    assert np.asarray(source.train.read(1)).max() == 255


def test_the_range_is_that_of_the_train_images(tmp_path):
    deep_set(tmp_path / "train", (RAMP * 1023).astype(np.uint16))
    deep_set(tmp_path / "test", (RAMP * 4095).astype(np.uint16))
    with pytest.warns(UserWarning, match=r"0 and 1023 .*6 exceed this range, e.g. test.a.0.tif"):
        data = load_data(tmp_path, image_size=64)
    assert (data.test[0][0] == 255).float().mean() > 0.7


def test_a_range_that_is_asked_for_is_taken_without_a_word(tmp_path):
    deep_set(tmp_path, (RAMP * 4095).astype(np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_data(tmp_path, image_size=64, intensity_range=(1000, 2000))
    assert data.intensity_range == (1000, 2000)
    row = data.train[0][0][0, 32]
    assert (row[0], row[63]) == (0, 255)
    assert 10 < len(row.unique()) < 25


def test_integers_and_floats_of_other_ranges_in_one_folder_are_refused(tmp_path):
    deep_set(tmp_path, RAMP, (RAMP * 4095).astype(np.uint16))
    got = r"integer grey images in \(0.0, 4095.0\) and float ones in \(0.0, 1.0\)"
    with pytest.raises(ValueError, match=rf"intensity_range must be one .*{got}"):
        folder_source(tmp_path, READING)
    assert len(folder_source(tmp_path, Reading((16, 16), Preprocessing(intensity_range=(0, 1)))).train.labels) == 6


def test_constant_images_are_read(tmp_path):
    with pytest.warns(UserWarning, match="7 and 8"):
        assert (
            np.asarray(folder_source(deep_set(tmp_path, np.full((9, 9), 7, np.uint16)), READING).train.read(0)).max()
            == 0
        )
