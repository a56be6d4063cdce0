"""HTTP connections with one deadline for all of their operations.

A socket's timeout applies to each wait, so a host that sends a byte now and then never times out. Here, every operation
from looking up the name to reading the last byte gets only the time left until the deadline, and none starts after it.
"""

from __future__ import annotations

import functools
import http.client
import math
import socket
import ssl
import threading
import time
import urllib.request
from typing import Any


class _Timed:
    """A socket with a `deadline` for all its operations, in seconds of `time.monotonic`."""

    deadline = math.inf

    def _hurry(self) -> None:
        self.settimeout(remaining(self.deadline))  # type: ignore[attr-defined]

    def recv_into(self, *arguments: Any, **options: Any) -> int:
        self._hurry()
        return super().recv_into(*arguments, **options)  # type: ignore[misc]

    def send(self, *arguments: Any) -> int:
        self._hurry()
        return super().send(*arguments)  # type: ignore[misc]

    def sendall(self, *arguments: Any) -> None:
        self._hurry()
        super().sendall(*arguments)  # type: ignore[misc]

    def do_handshake(self, *arguments: Any) -> None:
        self._hurry()
        super().do_handshake(*arguments)  # type: ignore[misc]


class _Socket(_Timed, socket.socket):
    pass


class _TLSSocket(_Timed, ssl.SSLSocket):
    pass


def remaining(deadline: float) -> float:
    """Return the seconds until `deadline`; raise TimeoutError after it."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def _addresses(host: str, port: int, deadline: float) -> list[Any]:
    """Run `socket.getaddrinfo`, which has no timeout, in a thread that is abandoned if it takes too long."""
    found: list[Any] = []

    def look_up() -> None:
        try:
            found.append(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(remaining(deadline))
    if not found:
        raise TimeoutError(f"the address of {host} was not found in time")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def _connected(deadline: float, address: tuple[str, int], *_: Any) -> _Socket:
    """Connect to the first of a host's addresses that accepts a connection."""
    failed: OSError | None = None
    addresses = _addresses(*address, deadline)
    for tried, (family, kind, protocol, _name, place) in enumerate(addresses):
        connection = None
        try:
            connection = _Socket(family, kind, protocol)
            connection.deadline = deadline
            connection.settimeout(remaining(deadline) / (len(addresses) - tried))
            connection.connect(place)
            return connection
        except OSError as error:
            failed = error
            if connection is not None:
                connection.close()
    raise failed or OSError(f"{address[0]} has no address")


class _Connection(http.client.HTTPConnection):
    def __init__(self, *arguments: Any, deadline: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.deadline = deadline
        self._create_connection = functools.partial(_connected, deadline)


class _TLSConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def __init__(self, *arguments: Any, context: ssl.SSLContext, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.context = context

    def connect(self) -> None:
        super().connect()  # also sets up a proxy's tunnel
        name = getattr(self, "_tunnel_host", None) or self.host
        wrapped = self.context.wrap_socket(self.sock, server_hostname=name, do_handshake_on_connect=False)
        assert isinstance(wrapped, _TLSSocket)
        wrapped.deadline, self.sock = self.deadline, wrapped
        wrapped.do_handshake()


class Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https addresses by the deadline in a request's attribute `deadline`."""

    def __init__(self) -> None:
        urllib.request.HTTPHandler.__init__(self)
        self.context: ssl.SSLContext | None = None

    def http_open(self, request: Any) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, deadline=request.deadline), request)

    def https_open(self, request: Any) -> http.client.HTTPResponse:
        if self.context is None:
            self.context = ssl.create_default_context()
            self.context.sslsocket_class = _TLSSocket
            self.context.set_alpn_protocols(["http/1.1"])
        connection = functools.partial(_TLSConnection, deadline=request.deadline, context=self.context)
        return self.do_open(connection, request)
