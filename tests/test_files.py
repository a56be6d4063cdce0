from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from fastprompt.files import atomic_write, atomic_write_many, make_directory, remove, remove_stale_temporaries

FULL = OSError(errno.ENOSPC, "No space left on device")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_writes_bytes_text_and_what_a_function_writes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "deep" / "a.txt", "ä")
    atomic_write(tmp_path / "b", b"\x00\x01")
    atomic_write(tmp_path / "c", lambda file: file.write(b"streamed"))
    assert (tmp_path / "new" / "deep" / "a.txt").read_text(encoding="utf-8") == "ä"
    assert (tmp_path / "b").read_bytes() == b"\x00\x01"
    assert (tmp_path / "c").read_bytes() == b"streamed"


def test_the_file_is_synced_before_it_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append("replace"), replace(a, b))[1])
    atomic_write(tmp_path / "a", b"1")
    assert order == ["fsync", "replace", "fsync"]  # the file, the name, the directory


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt(), ValueError("in the writer")])
def test_a_failing_writer_leaves_the_old_file_alone(tmp_path: Path, error: BaseException) -> None:
    atomic_write(tmp_path / "a", b"old")

    def half(file: BinaryIO) -> None:
        file.write(b"ha")
        raise error

    with pytest.raises(type(error)):
        atomic_write(tmp_path / "a", half)
    assert contents(tmp_path) == {"a": b"old"}
    with pytest.raises(type(error)):
        atomic_write(tmp_path / "fresh" / "a", half)
    assert contents(tmp_path) == {"a": b"old"}


@pytest.mark.parametrize("call", ["fsync", "replace", "link"])
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_several_files_are_replaced_together_or_not_at_all(
    call: str,
    number: int,
    error: BaseException,
    existed: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path / "adapter"
    if existed:
        atomic_write_many(directory, {"a": b"old a", "b": b"old b"})
        (directory / "mine").write_bytes(b"kept")
    before = contents(directory) if existed else None
    calls = 0
    real = getattr(os, call)

    def failing(*args: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return real(*args)

    new = {"a": b"new a", "b": b"new b"}
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if call == "link" and (not existed or isinstance(error, OSError)):
            atomic_write_many(directory, new)  # nothing to keep, or a file system without links
            assert contents(directory).items() >= new.items()
            return
        with pytest.raises(type(error)):
            atomic_write_many(directory, new)
    assert (contents(directory) if existed else directory.exists()) == (before or False)
    atomic_write_many(directory, new)
    assert contents(directory).items() >= new.items()
    assert len(contents(directory)) == 2 + existed


def test_errors_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*weights\.bin: No space left on device") as raised:
        atomic_write(tmp_path / "weights.bin", b"1")
    assert raised.value.errno == errno.ENOSPC
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"could not write .*file"):
        atomic_write(tmp_path / "file" / "inside", b"1")


@pytest.mark.parametrize(("number", "raises"), [(errno.EIO, True), (errno.ENOSPC, True), (errno.EINVAL, False)])
def test_a_directory_that_fails_to_synchronise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    """EINVAL says that the file system has no such call; everything else that the file may not last."""
    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    for act in (lambda: atomic_write(tmp_path / "a", b"1"), lambda: remove(tmp_path, ["a"])):
        if raises:
            with pytest.raises(OSError, match=f"could not make the files written into {tmp_path} durable") as raised:
                act()
            assert raised.value.errno == number
        else:
            act()
    assert contents(tmp_path) == {}


def test_directories_are_made_durably_and_removed_again_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd))[1])
    assert make_directory(tmp_path / "a" / "b") == [tmp_path / "a" / "b", tmp_path / "a"]
    assert synced == [str(tmp_path / "a"), str(tmp_path)]
    assert make_directory(tmp_path / "a" / "b") == []

    def full(descriptor: int) -> None:
        raise FULL

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="durable"):
        make_directory(tmp_path / "c" / "d")
    assert not (tmp_path / "c").exists()


def test_files_and_folders_are_removed_in_order(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("a", "b", "folder/inside"):
        (tmp_path / name).write_bytes(b"1")
    remove(tmp_path, ["absent", "folder", "b"])
    assert contents(tmp_path) == {"a": b"1"}


def test_stale_temporaries_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".a.123-abcd.tmp", ".a.123-abcd.old.tmp", "a", ".hidden", "b.tmp"):
        (tmp_path / name).write_bytes(b"1")
    remove_stale_temporaries(tmp_path)
    assert sorted(contents(tmp_path)) == [".hidden", "a", "b.tmp"]
