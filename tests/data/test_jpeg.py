from __future__ import annotations

import numpy as np
import pytest

from fastprompt.data.checks import check_image
from fastprompt.data.jpeg import jpeg_damage


@pytest.fixture
def damage(tmp_path):
    def of(content):
        """What is wrong with a file, by Pillow or by the warnings of libjpeg."""
        (tmp_path / "a.jpg").write_bytes(content)
        return check_image(tmp_path / "a.jpg").damage

    return of


KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True},
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "restart markers": {"restart_marker_blocks": 4},
    "finest": {"quality": 100},
    "coarsest": {"quality": 1},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_files_are_whole(kind, mode, photo, encoded, damage):
    for size in ((1, 1), (7, 9), (200, 150)):
        assert damage(encoded(photo(*size).convert(mode), "JPEG", **KINDS[kind])) is None


@pytest.mark.parametrize(
    ("kind", "mode"),
    [(kind, mode) for kind in KINDS for mode in ("RGB", "L", "CMYK") if (kind, mode) != ("4:2:2", "CMYK")],
)  # that one no decoder but Pillow's reads
def test_a_file_that_ends_early_is_damaged_whatever_is_put_behind(kind, mode, photo, encoded, damage):
    whole = encoded(photo(200, 150).convert(mode), "JPEG", **KINDS[kind])
    start = whole.index(b"\xff\xda") + 20
    for share in (0.1, 0.5, 0.9):
        cut = whole[: start + int(share * (len(whole) - start))].rstrip(b"\xff")
        for behind in (b"\xff\xd9", b"trailer of a phone \xff\xd9", b"\xff\xd9" + b"\0" * 500, b""):
            assert damage(cut + behind), (share, behind)


def test_what_is_behind_the_end_marker_and_padding_do_no_harm(photo, encoded, damage):
    whole = encoded(photo(), "JPEG")
    for behind in (b"\0" * 4096, b"SEFT trailer", encoded(photo(8, 8), "JPEG"), encoded(photo(8, 8), "PNG")):
        assert damage(whole + behind) is None
    for padding in (b"\xff" * 9, b"\0\0\0", b"8 bytes."):
        assert damage(whole[:-2] + padding + b"\xff\xd9") is None


def test_an_overwritten_part_is_damage(photo, encoded, damage):
    whole = encoded(photo(300, 200), "JPEG", quality=90)
    start = whole.index(b"\xff\xda") + 20
    found = 0
    for seed in range(20):
        random = np.random.default_rng(seed)
        at = int(random.integers(start, len(whole) - 600))
        found += damage(whole[:at] + random.bytes(400) + whole[at + 400 :]) is not None
    assert found == 20


@pytest.mark.parametrize("content", [b"no image at all", b"\xff\xd8\xff\xd9", b""])
def test_a_file_that_is_no_jpeg_is_left_to_pillow(content, tmp_path):
    (tmp_path / "a.jpg").write_bytes(content)
    assert jpeg_damage(tmp_path / "a.jpg") is None
    assert check_image(tmp_path / "a.jpg").damage
