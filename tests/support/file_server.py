"""An HTTP server on this machine that sends parts of files, and can fail while it does."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


class FileServer(ThreadingHTTPServer):
    """Files in memory.

    Attributes:
        files: path → content. requests: (path, first byte, end) of every request.
        cut: path → how many of the next answers end in the middle. busy: path → how many are 503.
        whole: whether ranges are ignored.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, int, int]] = []
        self.cut: dict[str, int] = {}
        self.busy: dict[str, int] = {}
        self.whole = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def asked_for(handler: BaseHTTPRequestHandler, content: bytes) -> tuple[int, int]:
    """Return the range of the content that a request asks for."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    return (int(asked[1]), min(int(asked[2]) + 1, len(content))) if asked else (0, len(content))


def send(handler: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], cut: bool = False) -> None:
    """Answer with the range of the content that was asked for, half of it if it is `cut`."""
    start, end = asked_for(handler, content)
    part = "Range" in handler.headers
    handler.send_response(206 if part else 200)
    for name, value in headers.items():
        handler.send_header(name, value)
    if part:
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
    handler.send_header("Content-Length", str(end - start))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content[start : start + (end - start) // 2] if cut else content[start:end])
    handler.close_connection = handler.close_connection or cut


class _Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        content = self.server.files.get(path)
        busy = self.server.busy.get(path, 0) > 0
        if content is None or busy:
            self.server.busy[path] = self.server.busy.get(path, 0) - busy
            self.send_response(503 if busy else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if self.server.whole:
            del self.headers["Range"]
        cut = self.server.cut.get(path, 0) > 0
        self.server.cut[path] = self.server.cut.get(path, 0) - cut
        tag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        self.server.requests.append((path, *asked_for(self, content)))
        send(self, content, tag, cut)


@contextmanager
def running() -> Iterator[FileServer]:
    """A server that answers until the end of the block."""
    server = FileServer()
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
