"""Files on HTTP servers: names with braces, parts of files, and servers that fail."""

from __future__ import annotations

import io

import pytest
from file_server import running

from fastprompt.data import remote
from fastprompt.data.remote import RemoteFile, Seekable
from fastprompt.fetch import FetchError


def test_braces() -> None:
    assert remote.expanded("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert remote.expanded("{a,b-{0..1}}") == ["a", "b-0", "b-1"]
    assert remote.expanded("a-{0") == ["a-{0"]


def test_any_part_of_a_file_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PIECE", 7)
    content = bytes(range(100))
    with running() as server:
        server.files["/a"] = content
        file = RemoteFile.find(f"{server.address}/a?signature=secret")
        assert (str(file), file.size) == (f"{server.address}/a", 100)
        assert file.read(10, 20) == content[10:30]
        assert file.stream().read() == content
        anywhere = io.BufferedReader(Seekable(file))
        anywhere.seek(-5, io.SEEK_END)
        assert anywhere.read() == content[-5:]
        with pytest.raises(FetchError, match="has 100 bytes, none from 90 to 101"):
            file.read(90, 11)


def test_a_read_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.0)
    content = bytes(range(64))
    with running() as server:
        server.files["/a"] = content
        file = RemoteFile.find(f"{server.address}/a")
        server.cut["/a"], before = 3, len(server.requests)
        assert file.read(0, 64) == content
        assert [start for _, start, _ in server.requests[before:]] == [0, 32, 48, 56]
        server.busy["/a"] = remote.ATTEMPTS
        with pytest.raises(FetchError, match="/a after 5 attempts: HTTP Error 503"):
            file.read(0, 64)
        server.busy["/a"] = remote.ATTEMPTS - 1
        assert file.read(0, 64) == content
