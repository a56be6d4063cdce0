from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastprompt.data import walk
from fastprompt.data.walk import LeftOut, images_below, loose_images, subfolders

SYSTEM = [
    ".ipynb_checkpoints",
    ".thumbnails",
    ".Trash-1000",
    ".git",
    ".AppleDouble",
    "__MACOSX",
    "@eaDir",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "$Recycle.Bin",
]


def names(folder: Path, found) -> list[str]:
    return [os.path.relpath(path, folder) for path in found]


@pytest.mark.parametrize("name", SYSTEM)
def test_hidden_and_system_folders_are_neither_searched_nor_classes(name, tmp_path, fill):
    fill(tmp_path / "a", 2)
    fill(tmp_path / name, 2)
    fill(tmp_path / "a" / name / "deep", 2)
    left_out = LeftOut()
    assert names(tmp_path, images_below(tmp_path / "a", left_out)) == ["a/0.png", "a/1.png"]
    assert subfolders(tmp_path, left_out) == ["a"]
    assert left_out.counts() == {walk.SYSTEM_FOLDER: 2}
    assert f"2 hidden or system folder(s) (a/{name}, {name})" in left_out.message(tmp_path)


def test_files_of_the_system_are_counted_and_nothing_to_tell(tmp_path, fill):
    fill(tmp_path, 1)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png", ".gitkeep", "Icon\r"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    left_out = LeftOut()
    assert names(tmp_path, images_below(tmp_path, left_out)) == ["0.png"]
    assert left_out.counts() == {walk.SYSTEM_FILE: 6}
    assert left_out.message(tmp_path) is None


def test_what_is_no_image_is_told_by_extension_with_examples(tmp_path, fill):
    fill(tmp_path / "a", 1)
    for name in ("1.txt", "2.txt", "x.HEIC", "noext", "f.eps"):
        (tmp_path / "a" / name).write_text("")
    (tmp_path / "a" / ".hidden.png").write_text("")
    left_out = LeftOut()
    images_below(tmp_path, left_out)
    assert left_out.counts() == {walk.NO_IMAGE: 5, walk.HIDDEN_IMAGE: 1}
    message = left_out.message(tmp_path)
    for part in (
        "5 file(s) without an image extension",
        "2 .txt, e.g. a/1.txt",
        "1 .heic, e.g. a/x.HEIC",
        "1 without extension, e.g. a/noext",
        "1 .eps, its reader starts Ghostscript, e.g. a/f.eps",
        "1 hidden file(s) with the name of an image (a/.hidden.png)",
    ):
        assert part in message


@pytest.mark.parametrize("target", [".", "..", "../..", "../../.."])
def test_links_to_a_folder_above_are_not_followed(target, tmp_path, fill):
    fill(tmp_path / "set" / "a" / "deep", 2)
    fill(tmp_path / "set" / "b", 2)
    (tmp_path / "set" / "a" / "deep" / "up").symlink_to(target)
    left_out = LeftOut()
    assert len(images_below(tmp_path / "set", left_out)) == 4
    assert len(images_below(tmp_path / "set" / "a", left_out)) == 2
    assert left_out.counts() == {walk.LOOP: 1}


def test_a_link_to_the_folder_that_holds_the_classes_is_no_class(tmp_path, fill):
    fill(tmp_path / "a")
    (tmp_path / "self").symlink_to(".")
    assert subfolders(tmp_path, LeftOut()) == ["a"]


def test_links_between_folders_end(tmp_path, fill):
    for name, other in (("a", "b"), ("b", "a")):
        fill(tmp_path / name, 2)
        (tmp_path / name / "other").symlink_to(f"../{other}")
        (tmp_path / name / "itself").symlink_to("itself")
    assert len(images_below(tmp_path, LeftOut())) == 4
    assert len(images_below(tmp_path / "a", LeftOut())) == 4


def test_many_links_do_not_multiply(tmp_path, fill):
    """Each of 30 folders has two links to the next: 2³⁰ paths lead to the last."""
    for i in range(30):
        fill(tmp_path / "chain" / str(i), 1)
        for name in ("left", "right"):
            (tmp_path / "chain" / str(i) / name).symlink_to(f"../{i + 1}")
    (tmp_path / "a").symlink_to("chain/0")
    assert len(images_below(tmp_path / "a", LeftOut())) == 30


def test_linked_folders_and_files_are_followed(tmp_path, fill):
    fill(tmp_path / "elsewhere", 3)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "more").symlink_to(tmp_path / "elsewhere")
    assert names(tmp_path, images_below(tmp_path / "a", LeftOut())) == [f"a/more/{i}.png" for i in range(3)]


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_with_two_names_is_taken_once_under_its_own(link, tmp_path, fill):
    fill(tmp_path / "z", 2)
    (tmp_path / "a").mkdir()
    link(tmp_path / "z" / "0.png", tmp_path / "a" / "again.png")
    left_out = LeftOut()
    found = names(tmp_path, images_below(tmp_path, left_out))
    assert len(found) == 2
    assert left_out.counts() == {walk.AGAIN: 1}
    if link is os.symlink:
        assert found == ["z/0.png", "z/1.png"]


def test_special_files_are_left_out_without_being_opened(tmp_path, fill):
    fill(tmp_path, 1)
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("/dev/zero", tmp_path / "zero.png")
    here = socket.socket(socket.AF_UNIX)
    here.bind(os.path.relpath(tmp_path / "socket.png"))
    left_out = LeftOut()
    assert names(tmp_path, images_below(tmp_path, left_out)) == ["0.png"]
    assert left_out.counts() == {walk.SPECIAL: 3}
    here.close()


def test_an_image_that_is_a_link_to_nothing_is_missed(tmp_path, fill):
    fill(tmp_path, 1)
    os.symlink("gone.png", tmp_path / "lost.png")
    os.symlink("gone.txt", tmp_path / "lost.txt")
    left_out = LeftOut()
    found = images_below(tmp_path, left_out)
    assert names(tmp_path, found) == ["0.png", "lost.png"]
    assert found[str(tmp_path / "lost.png")] is None
    assert left_out.counts() == {walk.NO_IMAGE: 1}


def test_a_folder_may_be_called_like_an_image(tmp_path, fill):
    fill(tmp_path / "photo.png", 2)
    assert len(images_below(tmp_path, LeftOut())) == 2
    assert loose_images(tmp_path) == []
    assert subfolders(tmp_path, LeftOut()) == ["photo.png"]


def test_the_order_is_torchvisions(tmp_path, fill):
    from torchvision.datasets import ImageFolder

    for folder in ("a", "a/b", "a/b-c", "a/b/d", "a.b"):
        fill(tmp_path / "set" / "class" / folder, 2)
    ours = list(images_below(tmp_path / "set" / "class", LeftOut()))
    assert ours == [path for path, _ in ImageFolder(str(tmp_path / "set")).samples]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, fill, monkeypatch):
    fill(tmp_path / "locked")
    real = os.scandir

    def scandir(path="."):
        if Path(os.fspath(path)).name == "locked":
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"cannot read the folder .*locked: Permission denied"):
        images_below(tmp_path, LeftOut())
