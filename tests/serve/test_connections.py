"""Connections of clients that hold on to them: uvicorn with the host's protocol, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.requests import Request

from fastprompt.serve import host
from fastprompt.serve.protocol import Catalogue, Limits, Work
from fastprompt.serve.routes import Routes
from fastprompt.vit.weights import ViTSpec

SPEC = ViTSpec("vit", (32, 32), (4, 4), 8, 3, True, 0, "cls")
CATALOGUE = Catalogue("vit", "f" * 64, 3, "float32", SPEC, {"birds": ["owl" * 100_000]})
LIMITS = Limits(body_bytes=2**20, body_seconds=1.0)
KEY = b"Authorization: Bearer key\r\n"


async def compute(work: Work) -> list[np.ndarray]:
    raise AssertionError("no picture comes this far")


@contextlib.contextmanager
def serving(limits: Limits) -> Iterator[tuple[int, uvicorn.Server, threading.Thread]]:
    routes = Routes(CATALOGUE, limits, ["key"], compute)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await (await routes(Request(scope, receive)))(scope, receive, send)

    protocol = type("Protocol", (host.ImpatientProtocol,), {"limits": limits})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        web = uvicorn.Server(
            uvicorn.Config(
                app, http=protocol, ws="none", lifespan="off", log_level="error", timeout_graceful_shutdown=20
            )
        )
        thread = threading.Thread(target=lambda: asyncio.run(web.serve([listener])))
        thread.start()
        try:
            yield listener.getsockname()[1], web, thread
        finally:
            web.should_exit = True
            thread.join(60)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(LIMITS) as (number, _, _):
        yield number


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def rest(connection: socket.socket) -> bytes:
    """What comes until the connection is closed."""
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while block := connection.recv(65536):
            answer += block
    return answer


def error_of(answer: bytes) -> tuple[int, dict[str, str], dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize(
    ("request_line", "more", "status"),
    [
        (b"POST /v1/embeddings", b"", 401),
        (b"POST /v1/embeddings", KEY, 415),
        (b"POST /nothing", b"", 404),
        (b"GET /v1/embeddings", KEY, 405),
        (b"GET /health", b"", 200),
    ],
)
def test_a_body_that_nobody_reads_does_not_hold_a_connection(
    port: int, request_line: bytes, more: bytes, status: int
) -> None:
    with connect(port) as connection:
        connection.sendall(request_line + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n" + more + b"\r\n")
        began, closed = time.monotonic(), False
        while time.monotonic() - began < 8 and not closed:  # a byte now and then
            time.sleep(0.1)
            try:
                connection.send(b"x")
            except OSError:
                closed = True
        assert closed
        assert rest(connection).startswith(b"HTTP/1.1 %d" % status)


def test_who_sends_too_much_that_nobody_reads_is_cut_off(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 900000000\r\n\r\n")
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 100 * 2**20:
                sent += connection.send(b"x" * 2**16)
        assert sent < 50 * 2**20  # the kernel holds some


def test_who_is_refused_reads_why_and_may_go_on(port: int) -> None:
    body = b"x" * 900_000
    with connect(port) as connection:
        for head, status in ((b"POST /v1/embeddings", b"401"), (b"POST /nothing", b"404"), (b"GET /health", b"200")):
            connection.sendall(head + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n\r\n" + body)
            answer = b""
            while not answer.endswith((b"}}", b"ok")):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b"connection: close" not in answer.lower()
        connection.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9000\r\nExpect: 100-continue\r\n\r\n")
        assert rest(connection).startswith(b"HTTP/1.1 404")


def test_answers_that_are_not_read_are_dropped() -> None:
    with serving(LIMITS) as (port, web, thread), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", port))
        connection.settimeout(30)
        one = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n" + KEY + b"\r\n"
        closed = False
        for _ in range(100):  # each answer has 300 KB, until nothing more fits in between
            try:
                connection.sendall(one)
            except OSError:
                closed = True
                break
            time.sleep(0.05)
        assert closed
        with connect(port) as idle:
            idle.sendall(one * 20)  # still unread when the host ends
            time.sleep(0.2)
            began = time.monotonic()
            web.should_exit = True
            thread.join(60)
            assert time.monotonic() - began < 10


def test_too_many_connections_are_answered_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CONNECTIONS", 5)
    with serving(Limits(body_seconds=30.0)) as (port, _, _), contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(port)) for _ in range(5)]
        for connection in held:
            connection.sendall(b"GET /health HTTP/1.1\r\n")
        status, headers, error = error_of(rest(stack.enter_context(connect(port))))
        assert (status, error["code"], headers["connection"]) == (503, "busy", "close")
        for connection in held:
            connection.sendall(b"Host: x\r\nConnection: close\r\n\r\n")
            assert rest(connection).startswith(b"HTTP/1.1 200")
        last = stack.enter_context(connect(port))
        last.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert rest(last).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + KEY
        + b"Transfer-Encoding: chunked\r\n\r\nno chunk\r\n",
    ],
)
def test_what_is_no_http_is_answered_as_any_error(port: int, request_: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(request_)
        status, headers, error = error_of(rest(connection))
        assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
