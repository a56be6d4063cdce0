"""Connections of clients that hold on to them: uvicorn with the host's protocol, without an engine."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.requests import Request

from fastprompt.serve import connections, routes
from fastprompt.serve.budget import Budget
from fastprompt.serve.protocol import Catalogue, Limits, Work
from fastprompt.serve.routes import Routes
from fastprompt.vit.weights import ViTSpec

SPEC = ViTSpec("vit", (32, 32), (4, 4), 8, 3, True, 0, "cls")
CATALOGUE = Catalogue("vit", "f" * 64, 3, "float32", SPEC, {"birds": ["owl" * 100_000]})
LIMITS = Limits(body_bytes=2**20, body_seconds=1.0)
KEY = b"Authorization: Bearer key\r\n"


async def compute(work: Work) -> list[np.ndarray]:
    return [np.full(3, picture.mean(), np.float32) for picture in work.pictures]


@contextlib.contextmanager
def serving(
    limits: Limits, compute: Callable[[Work], Awaitable[list[np.ndarray]]] = compute, seen: list[str] | None = None
) -> Iterator[tuple[int, uvicorn.Server, threading.Thread]]:
    """A web server; `seen` gets the path of each request that comes through to the app."""
    endpoints = Routes(CATALOGUE, limits, ["key"], compute)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if seen is not None:
                seen.append(scope["path"])
            await (await endpoints(Request(scope, receive)))(scope, receive, send)

    protocol = type("Protocol", (connections.ImpatientProtocol,), {"limits": limits})
    with socket.create_server(("127.0.0.1", 0), backlog=200) as listener:
        web = connections.PatientServer(
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


def until(connection: socket.socket, *ends: bytes) -> bytes:
    """What comes until it ends so, or the connection is closed."""
    answer = b""
    while not answer.endswith(ends) and (block := connection.recv(65536)):
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
            answer = until(connection, b"}}", b"ok")
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
    monkeypatch.setattr(connections, "CONNECTIONS", 5)
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


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + KEY
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    "request_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET /health HTTP/2.0\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/0.9\r\nHost: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 100_000,
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: +5\r\n\r\nhello",
        HEAD + b"Content-Length: 0x5\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\nContent-Length: 50\r\n\r\nhello",
        HEAD + b"Content-Length: 5, 5\r\n\r\nhello",
        HEAD + b"Content-Length : 5\r\n\r\nhello",
        HEAD + b"Content-Length: 5\r\n 0\r\n\r\nhello",
        HEAD + b"X: y\r\n\tz\r\nContent-Length: 5\r\n\r\nhello",
        HEAD + b"X: y\n z\nContent-Length: 5\n\nhello",
        HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        *(
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunk
            for chunk in (
                b"no chunk\r\n",
                b"-1\r\nx\r\n0\r\n\r\n",
                b"0x5\r\nhello\r\n0\r\n\r\n",
                b"5_0\r\nhello\r\n0\r\n\r\n",
                b"5 \nhello\r\n0\r\n\r\n",
                b"5;\nhello\r\n0\r\n\r\n",
                b"fffffffffffffffffffff\r\nx",
                b"4\r\nhello\r\n0\r\n\r\n",
                b"\r\n",
            )
        ),
    ],
)
def test_what_is_no_http_is_answered_as_any_error_and_closed(request_: bytes) -> None:
    seen: list[str] = []
    with serving(LIMITS, seen=seen) as (port, _, _), connect(port) as connection:
        connection.sendall(request_ + SMUGGLED)
        status, headers, error = error_of(rest(connection))  # one answer, and the end
        assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert "/smuggled" not in seen


def test_requests_that_say_where_they_end_are_taken(port: int) -> None:
    for request in (
        b"Content-Length: 2\r\n\r\n{}",
        b"Transfer-Encoding: Chunked\r\n\r\n1;a=b\r\n{\r\n01\r\n}\r\n0\r\nX: y\r\n\r\n",
        b"Expect: 100-continue\r\nContent-Length:2\r\n\r\n{}",
    ):
        with connect(port) as connection:
            connection.sendall(HEAD + b"Connection: close\r\n" + request)
            answer = rest(connection).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
            assert error_of(answer)[::2] == (422, {**error_of(answer)[2], "message": "input: Field required"})


def test_who_is_refused_while_sending_reads_why(port: int) -> None:
    """The host reads on for a while: a reset would overtake the answer."""
    for head, status in (
        (HEAD + b"Content-Length: 4000000\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (HEAD + b"Content-Length: 4000000\r\n\r\n", 413),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n3d0900\r\n", 413),
    ):
        with connect(port) as connection:
            connection.sendall(head + b"x" * 4_000_000)
            status_, headers, _ = error_of(rest(connection))
            assert (status_, headers["connection"]) == (status, "close")


def picture_request(data: bytes, *headers: bytes) -> bytes:
    body = json.dumps({"input": f"data:image/png;base64,{base64.b64encode(data).decode()}"}).encode()
    return HEAD + b"".join(headers) + b"Content-Length: %d\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("chunked", [False, True])
def test_unfinished_bodies_share_a_budget(
    picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch, chunked: bool
) -> None:
    """40 bodies of 1 MiB come at once: at most 4 MiB are held, others are refused, and a small one is answered."""
    budgets: list[Budget] = []
    most = [0]

    class Watched(Budget):
        def __init__(self, size: int) -> None:
            super().__init__(size)
            budgets.append(self)

        def __setattr__(self, name: str, value: int) -> None:
            super().__setattr__(name, value)
            if name == "used":
                most[0] = max(most[0], value)

    monkeypatch.setattr(routes, "Budget", Watched)
    limits = Limits(body_bytes=2**20, body_seconds=60.0, held_bytes=2**22)
    length = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" if chunked else b"Content-Length: %d\r\n\r\n"
    with serving(limits) as (port, _, _), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connect(port)) for _ in range(40)]
        for connection in slow:
            connection.sendall(HEAD + length % 2**20)
        for connection in slow:
            with contextlib.suppress(OSError):  # refused in the middle of it
                connection.sendall(b" " * (2**20 - 1))
        with connect(port) as small:
            small.sendall(picture_request(picture(), b"Connection: close\r\n"))
            assert rest(small).startswith(b"HTTP/1.1 200")
        statuses = []
        for connection in slow:
            with contextlib.suppress(OSError):
                connection.sendall(b" \r\n0\r\n\r\n" if chunked else b" ")
            status, headers, error = error_of(until(connection, b"}}"))
            statuses.append(status)
            if status == 503:
                assert (error["code"], headers["retry-after"], headers["connection"]) == ("busy", "1", "close")
        assert set(statuses) == {400, 503}  # whole and read, but no JSON; or refused
        assert 2**21 < most[0] <= 2**22
        assert [budget.used for budget in budgets] == [0]


def test_a_body_that_cannot_fit_is_refused_by_its_length(picture: Callable[..., bytes]) -> None:
    limits = Limits(body_bytes=2**20, body_seconds=60.0, held_bytes=2**21)
    with serving(limits) as (port, _, _), connect(port) as first, connect(port) as second:
        first.sendall(HEAD + b"Content-Length: 1000000\r\n\r\n" + b" " * 900_000)
        while True:  # until the first holds what it has sent
            with connect(port) as second:
                second.sendall(HEAD + b"Content-Length: 1000000\r\nExpect: 100-continue\r\n\r\n")
                answer = until(second, b"}}", b"Continue\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 100"):
                break
        assert error_of(answer)[0] == 503


class Held:
    """`compute` that stops the whole event loop at its first picture, so that connections pile up before the host."""

    def __init__(self) -> None:
        self.reached, self.released = threading.Event(), threading.Event()

    async def __call__(self, work: Work) -> list[np.ndarray]:
        self.reached.set()
        assert self.released.wait(60)
        return await compute(work)


def test_all_that_reached_the_host_before_its_end_is_answered(picture: Callable[..., bytes]) -> None:
    """Accepted by the kernel alone, accepted and unread, and several on one connection."""
    held, whole = Held(), picture_request(picture())
    with serving(Limits(), held) as (port, web, thread), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(port)) for _ in range(20)]
        for connection in idle:  # their connections are kept
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert until(connection, b"ok").endswith(b"ok")
        first = stack.enter_context(connect(port))
        first.sendall(whole)
        assert held.reached.wait(60)
        for connection in idle:
            connection.sendall(whole)
        waiting = [stack.enter_context(connect(port)) for _ in range(60)]
        for connection in waiting:
            connection.sendall(whole)
        first.sendall(whole * 2)
        web.should_exit = True
        held.released.set()
        for connection in (first, *idle, *waiting):
            assert rest(connection).count(b"HTTP/1.1 200") == (3 if connection is first else 1)
        thread.join(60)
        assert not thread.is_alive()


def test_a_request_under_way_to_an_idle_connection_is_answered_at_the_end() -> None:
    with serving(Limits()) as (port, web, thread), connect(port) as kept, connect(port) as fresh:
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert until(kept, b"ok").endswith(b"ok")
        web.should_exit = True
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # until the door is closed
                connect(port).close()
        for connection in (kept, fresh):
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = rest(connection)
            assert answer.startswith(b"HTTP/1.1 200")
            assert b"connection: close" in answer.lower()
        thread.join(60)
        assert not thread.is_alive()
