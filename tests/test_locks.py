from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastprompt import locks
from fastprompt.files import atomic_write
from fastprompt.locks import LOCK_FILE, OWNER_FILE, DirectoryInUse, directory_lock

HOLD = """
import os, sys
from fastprompt.locks import directory_lock
with directory_lock(sys.argv[1]):
    child = os.fork() if sys.argv[2] == "fork" else 0  # a loading process, which outlives its parent
    if child == 0:
        print("held", flush=True)
    sys.stdin.read()
    if sys.argv[2] == "fork" and child == 0:
        os._exit(0)
"""


def holder(directory: Path, kind: str = "plain") -> subprocess.Popen[str]:
    """A process that holds the lock of a directory until its standard input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_at_once_and_told_who_writes(tmp_path: Path) -> None:
    first = holder(tmp_path / "run")
    (tmp_path / "run" / "file").write_text("1")
    with pytest.raises(DirectoryInUse, match=rf"is being written by process {first.pid} on .*-c") as raised:
        directory_lock(tmp_path / "run").__enter__()
    assert raised.value.owner is not None
    assert raised.value.owner["pid"] == first.pid
    first.communicate()
    assert first.returncode == 0
    with directory_lock(tmp_path / "run") as writable:
        assert writable


def test_a_second_thread_is_refused(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def contend() -> None:
        try:
            with directory_lock(tmp_path):
                pass
        except DirectoryInUse as error:
            found.append(error)

    with directory_lock(tmp_path):
        thread = threading.Thread(target=contend)
        thread.start()
        thread.join()
    assert f"process {os.getpid()}" in str(found[0])


@pytest.mark.parametrize("kind", ["plain", "fork"])
def test_the_lock_of_a_killed_process_is_free_even_if_its_children_live(tmp_path: Path, kind: str) -> None:
    first = holder(tmp_path, kind)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert (tmp_path / OWNER_FILE).exists()
    with directory_lock(tmp_path) as writable:
        assert writable
        assert json.loads((tmp_path / OWNER_FILE).read_text())["pid"] == os.getpid()
    first.communicate()


def contender(directory: Path, start: Any, done: Any, results: Any) -> None:
    start.wait()
    try:
        with directory_lock(directory):
            results.put("won")
            done.wait()
    except DirectoryInUse:
        results.put("refused")
        done.wait()


def test_of_several_contenders_for_a_stale_lock_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        directory = tmp_path / str(attempt)
        first = holder(directory)
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        start, done, results = context.Event(), context.Event(), context.Queue()
        others = [context.Process(target=contender, args=(directory, start, done, results)) for _ in range(6)]
        for other in others:
            other.start()
        start.set()
        outcomes = sorted(results.get() for _ in others)
        done.set()
        for other in others:
            other.join()
        assert outcomes == ["refused"] * 5 + ["won"]


def test_an_owner_whose_process_id_was_reused_is_not_named(tmp_path: Path) -> None:
    with directory_lock(tmp_path):
        owner = json.loads((tmp_path / OWNER_FILE).read_text())
        atomic_write(tmp_path / OWNER_FILE, json.dumps({**owner, "process": "an earlier boot 12"}))
        with pytest.raises(DirectoryInUse, match="is being written by another process") as raised:
            directory_lock(tmp_path).__enter__()
        assert raised.value.owner is None
        atomic_write(tmp_path / OWNER_FILE, json.dumps({**owner, "host": "elsewhere", "process": None}))
        with pytest.raises(DirectoryInUse, match=f"process {os.getpid()} on elsewhere"):
            directory_lock(tmp_path).__enter__()


def test_a_directory_made_for_nothing_is_removed_and_one_with_files_stays(tmp_path: Path) -> None:
    with directory_lock(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with directory_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("1")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [LOCK_FILE, "file"]
    with directory_lock(tmp_path):
        pass
    assert tmp_path.is_dir()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_directory_that_cannot_be_written_needs_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / "file").write_text("1")
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with directory_lock(tmp_path) as writable:
        assert not writable
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_system_without_locks_gets_an_owners_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with directory_lock(tmp_path) as writable:
        assert writable
        with pytest.raises(DirectoryInUse, match=f"process {os.getpid()}"):
            directory_lock(tmp_path).__enter__()
    with directory_lock(tmp_path):
        pass


def test_a_full_disk_takes_the_owners_name_and_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(locks, "atomic_write", full)
    with directory_lock(tmp_path) as writable:
        assert writable
        with pytest.raises(DirectoryInUse, match="by another process"):
            directory_lock(tmp_path).__enter__()
