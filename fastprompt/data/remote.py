"""Files on HTTP servers, read where the needed bytes lie.

Connections break and servers restart. A read that fails is repeated from the byte where it stopped, after a pause that
doubles; after `ATTEMPTS` attempts without a byte it is an error that names the file. So nothing is left out silently.
"""

from __future__ import annotations

import http.client
import io
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass

from fastprompt.fetch import FetchError

ATTEMPTS = 5
PAUSE = 0.5
"""Seconds before the second attempt."""
TIMEOUT = 60
"""Seconds without an answer that count as a failure."""
PIECE = 2**20
PASSING = (408, 425, 429)
"""What a server may answer otherwise later, as all from 500."""


def is_address(name: str) -> bool:
    """Whether this is the address of a file on an HTTP server."""
    return name.startswith(("http://", "https://"))


def expanded(name: str) -> list[str]:
    """Return the names that braces stand for: "a-{00..02}" is a-00, a-01, a-02, and "{a,b-{0..1}}" is a, b-0, b-1."""
    before, brace, rest = name.partition("{")
    if not brace:
        return [name]
    depth, start, words = 1, 0, list[str]()
    for at, letter in enumerate(rest):
        depth += (letter == "{") - (letter == "}")
        if depth == 0 or (depth == 1 and letter == ","):
            words.append(rest[start:at])
            start = at + 1
        if depth == 0:
            break
    if depth:
        return [name]  # a brace that is not closed stands for itself
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", words[0]) if len(words) == 1 else None
    if numbers is not None:
        width = len(numbers[1]) if numbers[1].startswith("0") else 0
        words = [f"{i:0{width}}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
    return [before + one + behind for word in words for one in expanded(word) for behind in expanded(rest[start:])]


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address, in the state in which it was found.

    Attributes:
        address: where it is. size: in bytes. tag: the server's name for these contents; "": it is not compared.
        token: sent to this server as a bearer token, but not to where it redirects; None: nothing is sent.
    """

    address: str
    size: int
    tag: str = ""
    token: str | None = None

    def __str__(self) -> str:
        return _named(self.address)

    @classmethod
    def find(cls, address: str, token: str | None = None) -> RemoteFile:
        """Ask for a file's size and tag.

        Raises:
            FetchError: there is no such file, the server does not say its size, or it cannot be reached.
        """
        for attempt in _attempts():
            try:
                with _opened(address, 0, 1, token) as answer:
                    return cls(address, _size(answer, address), answer.headers.get("ETag", ""), token)
            except (OSError, http.client.HTTPException) as error:
                attempt.failed(address, error)
        raise AssertionError

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from byte `start` on.

        Raises:
            FetchError: the file has changed, or the server cannot be reached.
        """
        return b"".join(self.pieces(start, size))

    def pieces(self, start: int, size: int) -> Iterator[bytes]:
        """Yield `size` bytes from byte `start` on, as they come."""
        end = start + size
        if not 0 <= start <= end <= self.size:
            raise FetchError(f"{self} has {self.size} bytes, none from {start} to {end}")
        attempts = _attempts()
        while start < end:
            attempt = next(attempts)
            try:
                with _opened(self.address, start, end, self.token) as answer:
                    tag = answer.headers.get("ETag", "") if self.tag else ""
                    if (_size(answer, self.address), tag) != (self.size, self.tag):
                        raise FetchError(f"{self} has changed while it was read: start again")
                    while start < end and (piece := answer.read1(min(PIECE, end - start))):
                        start += len(piece)
                        attempts = _attempts()  # what arrived counts as a success
                        yield piece
                    if start < end:
                        raise OSError(f"the answer ended {end - start} bytes early")
            except (OSError, http.client.HTTPException) as error:
                attempt.failed(self.address, error)

    def stream(self) -> io.BufferedReader:
        """Return a file that is read once, from the beginning to the end."""
        return io.BufferedReader(_Stream(self.pieces(0, self.size)), PIECE)


class _Stream(io.RawIOBase):
    """Pieces as a file."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        super().__init__()
        self.pieces, self.left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self.left = self.left or next(self.pieces, b"")
        count = min(len(buffer), len(self.left))
        buffer[:count] = self.left[:count]
        self.left = self.left[count:]
        return count


class Seekable(io.RawIOBase):
    """A remote file that can be read anywhere, as readers of Parquet do. Each read is a request."""

    def __init__(self, file: RemoteFile) -> None:
        super().__init__()
        self.file, self.at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.file.size}[whence]
        return self.at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(0, min(len(buffer), self.file.size - self.at))
        buffer[:count] = self.file.read(self.at, count)
        self.at += count
        return count


@dataclass(frozen=True)
class _Attempt:
    """One of several attempts. pause: seconds to wait after it; None: it was the last."""

    pause: float | None

    def failed(self, address: str, error: Exception) -> None:
        """Wait before the next attempt; raise FetchError if there is none, or if another would fail too."""
        status = error.code if isinstance(error, urllib.error.HTTPError) else None
        if status is not None and status < 500 and status not in PASSING:
            raise FetchError(f"cannot read {_named(address)}: {error}") from error
        if self.pause is None:
            said = str(error) or type(error).__name__
            raise FetchError(f"cannot read {_named(address)} after {ATTEMPTS} attempts: {said}") from error
        time.sleep(self.pause)


def _named(address: str) -> str:
    """Return an address for messages, without what may be a signature."""
    return address.partition("?")[0]


def _attempts() -> Iterator[_Attempt]:
    return iter([_Attempt(PAUSE * 2**i if i + 1 < ATTEMPTS else None) for i in range(ATTEMPTS)])


def _opened(address: str, start: int, end: int, token: str | None) -> http.client.HTTPResponse:
    """Ask for bytes from `start` up to `end`."""
    request = urllib.request.Request(address, headers={"Range": f"bytes={start}-{end - 1}"})
    if token is not None:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    return answer


def _size(answer: http.client.HTTPResponse, address: str) -> int:
    """Return the size of the whole file that an answer with a part of it states."""
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", answer.headers.get("Content-Range", ""))
    if answer.status != 206 or found is None:
        raise FetchError(f"{_named(address)} is on a server that does not send parts of a file: copy it to a folder")
    return int(found[1])
