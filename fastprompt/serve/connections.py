"""HTTP connections with uvicorn and h11: handle slow, broken or hostile clients, and shut down without resets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from h11._connection import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastprompt.serve.protocol import Limits, Refused
from fastprompt.serve.routes import refusal

CONNECTIONS = 512
"""Maximum number of open connections: half of the files that a process may open by default."""
LINGER = 1.0
"""Seconds for which a host that is shutting down keeps an idle connection open, for a request already on its way."""
UNREAD = 8
"""Discard what a refused client still sends, up to this multiple of the body limit, so that it can read the error."""
CLOSE = (b"connection", b"close")
_END_OF_HEAD = re.compile(rb"\n\r?\n")


def framing_fault(head: bytes) -> str:
    """Return why the head of a request makes its end ambiguous; empty if it does not.

    Two servers that parse such a request differently can be made to see different requests (RFC 9112 §6.3, §11.2).
    h11 rejects most of them by itself; this covers those that it would repair instead.

    Args:
        head: request line and header lines, without the empty line.
    """
    request_line, *lines = head.replace(b"\r\n", b"\n").split(b"\n")
    version = request_line.rpartition(b" ")[2]
    if not version.startswith(b"HTTP/1."):
        return "the HTTP version must be 1.0 or 1.1"
    if any(line[:1] in (b" ", b"\t") for line in lines):
        return "a header line must not be folded (RFC 9112 §5.2)"
    fields = [(name.lower(), value) for name, _, value in (line.partition(b":") for line in lines)]
    lengths = [value for name, value in fields if name == b"content-length"]
    encodings = [value for name, value in fields if name == b"transfer-encoding"]
    if len(lengths) > 1 or any(b"," in value for value in lengths):
        return "Content-Length must be given once (RFC 9112 §6.3)"
    if lengths and encodings:
        return "Content-Length and Transfer-Encoding exclude each other (RFC 9112 §6.3)"
    if encodings and version == b"HTTP/1.0":
        return "HTTP/1.0 has no Transfer-Encoding (RFC 9112 §6.1)"
    return ""


class StrictConnection(h11.Connection):
    """h11's server connection. A request with a `framing_fault` is a protocol error; `fault` keeps the reason."""

    fault = ""

    def next_event(self) -> Any:
        head, fault = (self.trailing_data[0] if self.their_state is h11.IDLE else b""), ""
        if end := _END_OF_HEAD.search(head):
            fault = framing_fault(head[: end.start()].removesuffix(b"\r"))
        event = super().next_event()
        if fault and isinstance(event, h11.Request):
            self.fault = fault
            raise h11.RemoteProtocolError(fault)
        return event


class LingeringTransport:
    """A transport that closes in two steps if the client is still sending.

    A socket closed with unread bytes sends a reset, which can destroy the answer in flight. So the sending side is
    closed first. Further input is discarded until the client closes, or until it sends too much or takes too long.
    """

    def __init__(self, transport: Any, is_sending: Callable[[], bool], limits: Limits) -> None:
        self._transport, self._is_sending = transport, is_sending
        self._seconds, self._left = limits.body_seconds, UNREAD * limits.body_bytes
        self._end: asyncio.TimerHandle | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    @property
    def lingers(self) -> bool:
        return self._end is not None

    def is_closing(self) -> bool:
        return self.lingers or self._transport.is_closing()

    def close(self) -> None:
        if self.is_closing():
            return
        if not self._is_sending():
            self._transport.close()
            return
        self._end = asyncio.get_running_loop().call_later(self._seconds, self._transport.abort)
        try:
            self._transport.write_eof()
            self._transport.resume_reading()
        except OSError:  # the client is gone
            self._transport.abort()

    def discard(self, data: bytes) -> None:
        """Discard input that arrives after `close`."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def closed(self) -> None:
        """Stop the timer: the connection is gone."""
        if self._end is not None:
            self._end.cancel()


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP protocol, hardened against clients that hold on to resources.

    A connection is closed if its headers arrive too late, if the client reads its answers too slowly, or if it sends a
    body that nobody reads (`Routes` handles slow bodies). It is closed at once if too many are open.
    """

    limits = Limits()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        size = self.config.h11_max_incomplete_event_size or DEFAULT_MAX_INCOMPLETE_EVENT_SIZE
        self.conn: StrictConnection = StrictConnection(h11.SERVER, size)
        self.app: Any = partial(self._answered, self.app)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._ending = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.transport: Any = LingeringTransport(transport, self._is_sending, self.limits)
        transport.set_write_buffer_limits(high=0)  # call `pause_writing` at the first byte that is not taken
        self._start("headers", transport.close)
        if len(self.connections) > CONNECTIONS:
            self._refuse(Refused(503, "busy", "too many connections are open; try again later"))

    def data_received(self, data: bytes) -> None:
        if self.transport.lingers:
            self.transport.discard(data)
            return
        self._stop("idle")
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop("headers")
        else:
            self._start("headers", self.transport.close)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("answer", self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("answer")

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.transport.closed()
        for name in list(self._timers):
            self._stop(name)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._close_if_idle()

    def shutdown(self) -> None:
        """Close the connection once its pending requests are answered; called once, at shutdown."""
        self._ending = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        """During shutdown: close soon unless a request is in progress."""
        if self._ending and self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._start("idle", self.transport.close, LINGER)

    def _start(self, name: str, act: Callable[[], None], seconds: float | None = None) -> None:
        if name not in self._timers:
            self._timers[name] = self.loop.call_later(seconds or self.limits.body_seconds, act)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

    def _is_sending(self) -> bool:
        """Whether bytes of the client may still be in flight, other than those of a next request."""
        return self.conn.their_state in (h11.SEND_BODY, h11.ERROR)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._refuse(Refused(400, "invalid_http", self.conn.fault or msg))
        else:
            self.transport.close()  # after or within an answer

    def _refuse(self, error: Refused) -> None:
        """Answer without a request, and close."""
        answer = refusal(error)
        headers = [(name, value) for name, value in answer.raw_headers if name != CLOSE[0]] + [CLOSE]
        for event in (
            h11.Response(status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase),
            h11.Data(data=bytes(answer.body)),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # this answers its request
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    async def _answered(self, app: Any, scope: Any, receive: Any, send: Any) -> None:
        """Run the app. Drain the rest of the body before it answers, so that the connection can be kept.

        If the rest is too long or too slow, or if the app asks for it with `Connection: close`, the connection is
        closed after the answer.
        """

        async def drain() -> None:
            left = self.limits.body_bytes
            while left >= 0 and self.conn.their_state is h11.SEND_BODY:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", []))
                headers = [header for header in given if header != CLOSE]
                takes_nothing = CLOSE in given or self.conn.they_are_waiting_for_100_continue
                if self.conn.their_state is h11.SEND_BODY and not takes_nothing:
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(drain(), self.limits.body_seconds)
                is_last = self._ending and not self.conn.trailing_data[0]
                if is_last or self.conn.their_state is h11.SEND_BODY:
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            await send(message)

        await app(scope, receive, answer)


async def _nothing() -> None:
    """Run nothing beside the server."""


class PatientServer(uvicorn.Server):
    """uvicorn's server. On shutdown, it answers every request that has reached this machine.

    Args:
        beside: a task that runs from the start until everything is answered.
    """

    def __init__(self, config: uvicorn.Config, beside: Callable[[], Coroutine[Any, Any, None]] = _nothing) -> None:
        super().__init__(config)
        self.beside = beside

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and run the task beside it."""
        beside = asyncio.create_task(self.beside())
        try:
            await super().serve(sockets)
        finally:
            beside.cancel()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept the connections that are already queued, stop listening, and end when all requests are answered."""
        for connection in self.server_state.connections:
            connection.shutdown()
        waiting = []
        for listener in sockets or []:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                while True:
                    waiting.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        loop = asyncio.get_running_loop()
        for accepted in waiting:
            with contextlib.suppress(OSError):  # the client is gone
                await loop.connect_accepted_socket(self._protocol, accepted)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        make: Any = self.config.http_protocol_class
        return make(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
