"""One deadline for a whole request, whatever a host does to be slow; and TLS, proxies and several addresses work."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastprompt_client import Client, HostError
from fastprompt_client.host import Host

TIMEOUT, SLACK = 0.4, 4.0
"""Seconds; a dripping host goes on for far longer."""
ANSWER = json.dumps({"data": [{"index": 0, "embedding": [1.0, 2.0]}]}).encode()

Script = Callable[[socket.socket, threading.Event], None]


@pytest.fixture
def serve() -> Iterator[Callable[[Script], int]]:
    """`serve(script)`: the port of a server that hands each connection, and the test's end, to `script`."""
    ended, servers, threads = threading.Event(), [], []

    def start(script: Script) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def talk(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                script(connection, ended)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    thread = threading.Thread(target=talk, args=(server.accept()[0],), daemon=True)
                    thread.start()
                    threads.append(thread)

        threading.Thread(target=accept, daemon=True).start()
        return server.getsockname()[1]

    yield start
    ended.set()
    for server in servers:
        server.close()
    for thread in threads:
        thread.join(timeout=20)


def receive(connection: socket.socket) -> bytes:
    """A request's head, read to the end of the request."""
    with connection.makefile("rb") as stream:
        lines = list(iter(stream.readline, b"\r\n"))
        for line in lines:
            if line.lower().startswith(b"content-length:"):
                stream.read(int(line.partition(b":")[2]))
        return b"".join(lines)


def dripping(before: bytes, drop: bytes, pause: float = 0.02) -> Script:
    """Reads the request, sends `before` and then `drop` again and again."""

    def script(connection: socket.socket, ended: threading.Event) -> None:
        receive(connection)
        connection.sendall(before)
        for _ in range(1000):
            connection.sendall(drop)
            if pause and ended.wait(pause):
                return

    return script


def deaf(connection: socket.socket, ended: threading.Event) -> None:
    """Reads nothing and says nothing."""
    ended.wait(20)


OK = b"HTTP/1.1 200 OK\r\n"
SLOW: dict[str, Script] = {
    "nothing": deaf,
    "the status line": dripping(b"", b"H"),
    "a header": dripping(OK + b"X: ", b"x"),
    "headers": dripping(OK, b"X: y\r\n", 0.1),
    "100 Continue": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "100 Continue without a pause": dripping(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100_000, 0),
    "headers of 100 Continue": dripping(b"HTTP/1.1 100 Continue\r\n", b"X: y\r\n"),
    "the body": dripping(OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "a body without length": dripping(OK + b"\r\n", b" "),
    "a chunk's size": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0"),
    "a chunk's extension": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"x"),
    "small chunks": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "trailers": dripping(OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X: y\r\n"),
    "an error's body": dripping(b"HTTP/1.1 500 Broken\r\nContent-Length: 100000\r\n\r\n", b" "),
    "a redirect's body": dripping(b"HTTP/1.1 302 Found\r\nLocation: /x\r\nContent-Length: 100000\r\n\r\n", b" "),
}


@pytest.fixture
def on_time() -> Iterator[None]:
    """Fails where the test takes longer than a timeout and some slack."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < TIMEOUT + SLACK


@pytest.mark.parametrize("script", SLOW.values(), ids=SLOW)
def test_a_slow_host_is_given_up_in_time(script: Script, serve: Callable[[Script], int], on_time: None) -> None:
    url = f"http://127.0.0.1:{serve(script)}"
    with pytest.raises(HostError, match=r"within 0\.4 s|answered 500: Broken|redirects to /x, which is not followed"):
        Host(url, timeout=TIMEOUT).embed([b"png"])


def test_a_host_that_does_not_read_is_given_up_in_time(serve: Callable[[Script], int], on_time: None) -> None:
    with pytest.raises(HostError, match=r"within 0\.4 s"):
        Host(f"http://127.0.0.1:{serve(deaf)}", timeout=TIMEOUT).embed([bytes(8 << 20)])


def test_a_host_that_reads_slowly_is_given_up_in_time(serve: Callable[[Script], int], on_time: None) -> None:
    def script(connection: socket.socket, ended: threading.Event) -> None:
        while connection.recv(1 << 10) and not ended.wait(0.01):
            pass

    with pytest.raises(HostError, match=r"within 0\.4 s"):
        Host(f"http://127.0.0.1:{serve(script)}", timeout=TIMEOUT).embed([bytes(8 << 20)])


def half_a_record(connection: socket.socket, ended: threading.Event) -> None:
    """The head of a TLS record, and nothing of the record."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    ended.wait(20)


def drops(connection: socket.socket, ended: threading.Event) -> None:
    """A TLS record, byte by byte."""
    connection.sendall(b"\x16\x03\x03\x40\x00")
    while not ended.wait(0.02):
        connection.sendall(b"\x02")


@pytest.mark.parametrize("script", [deaf, half_a_record, drops])
def test_a_host_that_does_not_shake_hands_is_given_up_in_time(
    script: Script, serve: Callable[[Script], int], on_time: None
) -> None:
    def answer(connection: socket.socket, ended: threading.Event) -> None:
        connection.recv(1 << 16)
        script(connection, ended)

    with pytest.raises(HostError, match=r"within 0\.4 s"):
        Host(f"https://127.0.0.1:{serve(answer)}", timeout=TIMEOUT).embed([b"png"])


def test_a_proxy_that_drips_is_given_up_in_time(
    serve: Callable[[Script], int], on_time: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{serve(dripping(b'HTTP/1.1 200 OK', b'x'))}")
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(HostError, match=r"within 0\.4 s"):
        Host("https://host.invalid", timeout=TIMEOUT).embed([b"png"])


def test_a_name_that_is_looked_up_for_long_is_given_up_in_time(on_time: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: ended.wait(20))
    with pytest.raises(HostError, match=r"within 0\.4 s"):
        Host("http://host.invalid", timeout=TIMEOUT).embed([b"png"])
    ended.set()


def test_a_host_that_does_not_accept_is_given_up_in_time(on_time: None) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # fill the queue of connections that nobody accepts
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        with pytest.raises(HostError, match=r"within 0\.4 s"):
            Host(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=TIMEOUT).embed([b"png"])


def test_the_next_address_is_tried(serve: Callable[[Script], int], monkeypatch: pytest.MonkeyPatch) -> None:
    def script(connection: socket.socket, ended: threading.Event) -> None:
        receive(connection)
        connection.sendall(OK + b"Content-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER))

    port = serve(script)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*kind, ("127.0.0.1", closed)), (*kind, ("127.0.0.1", port))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    np.testing.assert_array_equal(Host("http://host.invalid", timeout=20).embed([b"png"]), [[1, 2]])


def test_a_name_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(HostError, match=r"host\.invalid/v1/embeddings cannot be reached: .*not known"):
        Host("http://host.invalid", timeout=20).embed([b"png"])


@pytest.mark.parametrize("call", ["predict", "verify", "check"])
def test_all_requests_of_a_call_share_the_deadline(
    call: str, folder: Path, photo: np.ndarray, serve: Callable[[Script], int]
) -> None:
    """A host that takes nearly all of the time for each answer."""

    def script(connection: socket.socket, ended: threading.Event) -> None:
        receive(connection)
        ended.wait(0.75 * TIMEOUT)
        connection.sendall(OK + b"Content-Length: 11\r\n\r\n" + b'{"data": []}')

    client, url = Client(folder, timeout=TIMEOUT), f"http://127.0.0.1:{serve(script)}"
    images = [photo] if call == "predict" else []
    with pytest.raises(HostError, match=r"within 0\.4 s"):
        getattr(client, call)(url, *images)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_and_a_proxy_work(serve: Callable[[Script], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=host.invalid", "-addext", "subjectAltName=DNS:host.invalid,IP:127.0.0.1"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def secure(connection: socket.socket, ended: threading.Event) -> None:
        with context.wrap_socket(connection, server_side=True) as wrapped:
            receive(wrapped)
            wrapped.sendall(OK + b"Content-Length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER))

    def proxy(connection: socket.socket, ended: threading.Event) -> None:
        heads.append(receive(connection))
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        secure(connection, ended)

    heads: list[bytes] = []
    url = f"https://127.0.0.1:{serve(secure)}"
    with pytest.raises(HostError, match="certificate verify failed"):
        Host(url, timeout=20).embed([b"png"])
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    np.testing.assert_array_equal(Host(url, timeout=20).embed([b"png"]), [[1, 2]])
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{serve(proxy)}")
    monkeypatch.delenv("no_proxy", raising=False)
    np.testing.assert_array_equal(Host("https://host.invalid", timeout=20).embed([b"png"]), [[1, 2]])
    assert heads[0].startswith(b"CONNECT host.invalid:443 HTTP/1.")
