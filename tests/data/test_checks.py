from __future__ import annotations

import io
import json
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastprompt.data import checks, load_data, read_images
from fastprompt.data.checks import Checked, check_image, check_images, damage
from fastprompt.data.images import MAX_DECODED_BYTES, decoded_bytes, loses_bits, open_image


def test_what_is_known_of_an_image(tmp_path, photo):
    import hashlib

    file = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(40, 20).save(file, exif=exif)
    found = check_image(file)
    info = file.stat()
    assert (found.damage, found.width, found.height, found.kind, found.decoded) == (None, 20, 40, None, 3200)
    assert found.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (found.size, found.mtime_ns) == (info.st_size, info.st_mtime_ns)
    assert found.still_holds(file)
    os.utime(file, ns=(0, 1))
    assert not found.still_holds(file)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_width_and_height_are_those_of_the_upright_image(orientation, suffix, tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    photo(40, 16).save(tmp_path / f"a.{suffix}", exif=exif)
    found = check_image(tmp_path / f"a.{suffix}")
    assert (found.width, found.height) == ((16, 40) if orientation > 4 else (40, 16))


@pytest.mark.parametrize(
    ("values", "kind"), [(np.arange(-7, 93).reshape(10, 10), "I"), (np.arange(100).reshape(10, 10) / 7 - 1, "F")]
)
def test_the_extremes_of_deep_grey_images(values, kind, tmp_path):
    values = values.astype(np.int32 if kind == "I" else np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    found = check_image(tmp_path / "a.tif")
    assert (found.kind, found.low, found.high) == (kind, values.min(), values.max())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
        (lambda path: path.symlink_to(path.name), "symbolic links"),
        (lambda path: path.symlink_to("gone"), "No such file"),
        (lambda path: path.write_bytes(b""), "cannot identify"),
        (lambda path: Image.fromarray(np.full((2, 2), np.inf, np.float32)).save(path, "TIFF"), "NaN or infinite"),
    ],
)
def test_damage_is_told_and_nothing_raised(make, message, tmp_path):
    make(tmp_path / "a.tif")
    assert message in check_image(tmp_path / "a.tif").damage


def test_an_image_that_cannot_be_brought_to_size():
    assert "too extreme to crop" in damage(Checked(width=9000, height=1), (224, 224), "crop")
    assert damage(Checked(width=9000, height=1), (224, 224), "squash") is None
    assert damage(Checked("gone", 9, 9), (224, 224), "squash") == "gone"


BOMBS = {"RGB": (8, 2), "RGBA": (8, 6), "I;16": (16, 0), "L": (8, 0), "P": (8, 3), "LA": (8, 4), "1": (1, 0)}
"""Bit depth and colour type of PNG, by Pillow's mode."""


def bomb(mode: str, side: int) -> bytes:
    """A PNG of `side` x `side` pixels, of which there are a few."""
    import struct
    import zlib

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, *BOMBS[mode], 0, 0, 0))
    palette = chunk(b"PLTE", bytes(768)) if mode == "P" else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
    return b"\x89PNG\r\n\x1a\n" + header + palette + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", BOMBS)
@pytest.mark.parametrize("side", [13_000, 60_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_small_files_of_many_pixels_are_refused_before_they_are_decoded(mode, side, tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(bomb(mode, side))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda _: pytest.fail("it was decoded"))
    assert "max_decoded_bytes=536,870,912" in check_image(tmp_path / "bomb.png").damage


@pytest.mark.parametrize(("mode", "megapixels"), [("RGB", 134), ("L", 107), ("P", 107), ("RGBA", 67), ("I;16", 89)])
def test_the_limit_in_pixels(mode, megapixels):
    side = int((megapixels * 1e6) ** 0.5)
    for larger, refused in ((0, False), (300, True)):
        image = Image.new(mode, (1, 1))
        image._size = (side + larger, side + larger)
        assert (decoded_bytes(image) > MAX_DECODED_BYTES) == refused


def test_more_is_decoded_where_it_is_allowed_beyond_pillows_own_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("L", (60, 50)).save(tmp_path / "a.png")
    assert "max_decoded_bytes" in check_image(tmp_path / "a.png").damage
    assert check_image(tmp_path / "a.png", 2**30).damage is None
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.fixture
def many(tmp_path, photo, monkeypatch):
    """Paths of six files in a folder that counts as one to be remembered; the cache is empty."""
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(checks, "REMEMBERED_FROM", 6)
    (tmp_path / "set").mkdir()
    for i in range(6):
        photo(seed=i).save(tmp_path / "set" / f"{i}.png")
    return [str(tmp_path / "set" / f"{i}.png") for i in range(6)]


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, in order."""
    found = []
    real = checks.check_image

    def check(path, **options):
        found.append(os.path.basename(path))
        return real(path, **options)

    monkeypatch.setattr(checks, "check_image", check)
    return found


def test_what_was_found_is_remembered_until_a_file_changes(many, tmp_path, decoded, photo):
    first = check_images(many, root=tmp_path / "set")
    assert sorted(decoded) == [f"{i}.png" for i in range(6)]
    decoded.clear()
    assert check_images(many, root=tmp_path / "set") == first
    assert decoded == []
    photo(seed=9).save(many[2])
    os.utime(many[4], ns=(5, 5))
    again = check_images(many, root=tmp_path / "set")
    assert sorted(decoded) == ["2.png", "4.png"]
    assert again[2].sha256 != first[2].sha256
    assert again[3] == first[3]


def test_damaged_files_and_larger_limits_are_looked_at_again(many, tmp_path, decoded):
    with open(many[0], "wb"):
        pass
    found = check_images(many, 10**4, tmp_path / "set")
    assert found[0].damage
    assert all(checked.damage is None for checked in found[1:])
    decoded.clear()
    check_images(many, 10**4, tmp_path / "set")
    assert decoded == ["0.png"]
    decoded.clear()
    assert "max_decoded_bytes=10" in check_images(many, 10, tmp_path / "set")[3].damage
    assert len(decoded) == 6


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"decoders": []}', b"\xff\xfe", None])
def test_a_memory_that_cannot_be_read_is_no_memory(many, tmp_path, decoded, content):
    first = check_images(many, root=tmp_path / "set")
    (memory,) = (tmp_path / "cache" / "checked").iterdir()
    if content is None:  # of another decoder
        stored = json.loads(memory.read_text())
        stored["decoders"][1] = "0.0"
        content = json.dumps(stored).encode()
    memory.write_bytes(content)
    decoded.clear()
    assert check_images(many, root=tmp_path / "set") == first
    assert len(decoded) == 6


def test_a_cache_that_cannot_be_written_is_told(many, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(UserWarning, match="the check of .*set could not be cached"):
        assert len(check_images(many, root=tmp_path / "set")) == 6


def test_an_interrupted_check_goes_on_where_it_stopped(many, tmp_path, decoded, monkeypatch):
    monkeypatch.setattr(checks, "_AT_ONCE", 2)
    real = checks.check_image

    def interrupt(path, **options):
        if path == many[4]:
            raise KeyboardInterrupt
        return real(path, **options)

    monkeypatch.setattr(checks, "check_image", interrupt)
    with pytest.raises(KeyboardInterrupt):
        check_images(many, root=tmp_path / "set")
    monkeypatch.setattr(checks, "check_image", real)
    decoded.clear()
    check_images(many, root=tmp_path / "set")
    assert sorted(decoded) == ["4.png", "5.png"]


def test_few_files_are_not_worth_a_memory(many, tmp_path):
    check_images(many[:5], root=tmp_path / "set")
    check_images(many)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("large", "at_once"), [(1, 1), (1 << 40, 2)])
def test_large_images_are_decoded_one_at_a_time(large, at_once, tmp_path, photo, monkeypatch):
    """The others are decoded at once: each of two waits until the other has begun."""
    for i in range(2):
        photo(seed=i).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(checks, "_LARGE", large)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    running, seen, both = set(), set(), threading.Barrier(2)

    def decode(path, image):
        running.add(path)
        seen.add(len(running))
        if large > 1:
            both.wait(60)
            seen.add(len(running))
            both.wait(60)
        running.remove(path)

    monkeypatch.setattr(checks, "decode", decode)
    assert [checked.damage for checked in check_images([str(tmp_path / f"{i}.png") for i in range(2)])] == [None, None]
    assert max(seen) == at_once


def test_a_mode_that_is_read_and_not_converted_is_damage(tmp_path, photo, monkeypatch):
    photo().save(tmp_path / "a.png")

    def convert(*_):
        raise ValueError("conversion from XYZ to RGB not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    assert check_image(tmp_path / "a.png").damage == "conversion from XYZ to RGB not supported"


def colours_of_16_bits(values: np.ndarray, kind: str) -> bytes:
    """A PNG or a TIFF of (H, W, 3) numbers below 65536, which Pillow does not write."""
    height, width, channels = values.shape
    if kind == "png":
        pixels = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        colour = {2: 4, 3: 2, 4: 6}[channels]
        header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
        chunks = (header, b"IDAT" + zlib.compress(pixels), b"IEND")
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks
        )
    data, bits = values.astype("<u2").tobytes(), 8 + 2 + 12 * 9 + 4
    tags = [
        *((256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)),
        *((273, 4, 1, bits + 6), (277, 3, 1, 3), (278, 3, 1, height), (279, 4, 1, len(data))),
    ]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)  # little-endian: a short fills the lower half
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<IHHH", 0, 16, 16, 16) + data


@pytest.mark.parametrize(("kind", "channels"), [("png", 3), ("png", 4), ("png", 2), ("tiff", 3)])
def test_colours_of_16_bits_are_their_upper_8_and_told(kind: str, channels: int, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (12, 16, channels))
    if channels in (2, 4):
        values[..., -1] = 65535  # opaque
    folder = tmp_path / "images"
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(5):
            (folder / name / f"{i}.{kind}").write_bytes(colours_of_16_bits(values, kind))
    file = folder / "cat" / f"0.{kind}"
    expected = values[..., :3] >> 8 if channels > 2 else np.repeat(values[..., :1] >> 8, 3, 2)
    np.testing.assert_array_equal(np.asarray(open_image(file)), expected)
    full_range = np.floor(values[..., :1] * 255 / 65535)
    assert np.abs(expected[..., :1] - full_range).max() <= 1
    with pytest.warns(UserWarning, match=r"10 image\(s\) have colours of more than 8 bits a channel, e\.g\. .*upper 8"):
        load_data(str(folder), image_size=16)
    with pytest.warns(UserWarning, match=r"1 image\(s\) have colours of more than 8 bits a channel"):
        read_images([file], image_size=16)
    assert not check_image(plain(tmp_path / "plain.png")).cut


def depth_of_16(data: bytes, kind: str) -> bytes:
    """The file with a header that says 16 (AVIF: 10) bits a channel; Pillow writes no such files itself."""
    if kind == "AVIF":
        at = data.index(b"av1C") + 6
        return data[:at] + bytes([data[at] | 0x40]) + data[at + 1 :]
    at = data.index(b"\xff\x4f\xff\x51") + 4 + 38
    return data[:at] + bytes([15, data[at + 1], 15, data[at + 3], 15]) + data[at + 5 :]


@pytest.mark.parametrize("kind", ["JPEG2000", "AVIF"])
def test_depth_of_compressed_colours_is_read_from_the_header(kind: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    for data, cut in ((buffer.getvalue(), False), (depth_of_16(buffer.getvalue(), kind), True)):
        with Image.open(io.BytesIO(buffer.getvalue())) as opened:
            if cut:  # libavif refuses a header that is not of its pixels
                opened.fp = io.BytesIO(data)
            assert loses_bits(opened) is cut
            if not cut:
                opened.load()  # reading the header has left the file as it was
                assert opened.size == image.size
    if kind == "JPEG2000":  # grey keeps its bits
        grey = io.BytesIO()
        Image.fromarray(np.zeros((40, 40), np.uint16)).save(grey, kind)
        assert not loses_bits(Image.open(grey))


@pytest.mark.parametrize(
    ("data", "cut"),
    [
        (b"P6\n2 2\n65535\n" + bytes(24), True),
        (b"P3\n2 2\n1023\n" + b"1 " * 12, True),
        (b"P6\n2 2\n255\n" + bytes(12), False),
        (b"P6\n2 2\n100\n" + bytes(12), False),
        (b"P5\n2 2\n65535\n" + bytes(8), False),  # grey
    ],
)
def test_colours_of_a_portable_map_above_255_are_told(data: bytes, cut: bool, tmp_path: Path) -> None:
    (tmp_path / "map.ppm").write_bytes(data)
    checked = check_image(tmp_path / "map.ppm")
    assert checked.damage is None
    assert checked.cut is cut


def plain(path: Path) -> Path:
    Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)).save(path)  # grey: all bits are read
    return path
