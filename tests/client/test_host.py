from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from typing import Any

import numpy as np
import pytest

from fastprompt_client import host as host_module
from fastprompt_client.host import Host, HostError


def vector(value: Any, **more: Any) -> bytes:
    return json.dumps({"data": [{"index": 0, "embedding": value, **more}]}).encode()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"{", "must answer with JSON"),
        (200, b"[" * 100_000, "must answer with JSON"),
        (200, b"[]", "must answer with a JSON object, got list"),
        (200, b"{}", "must return 1 embeddings, got NoneType"),
        (200, b'{"data": []}', "must return 1 embeddings, got 0"),
        (200, b'{"data": [3]}', "returned entry 0 without an index"),
        (200, vector([1.0], index=7), "returned entry 0 without an index of its own"),
        (200, vector([1.0], index=True), "returned entry 0 without an index of its own"),
        (200, vector([1.0, "x"]), "neither a list of numbers nor base64"),
        (200, vector(None), "neither a list of numbers nor base64"),
        (200, vector([]), "empty or not finite"),
        (200, vector([1e39]), "empty or not finite"),
        (200, vector([float("nan")]), "empty or not finite"),
        (200, vector("%%%"), "returned an invalid embedding for picture 0"),
        (200, vector(base64.b64encode(b"abc").decode()), "returned an invalid embedding for picture 0"),
        (500, b"broken", "answered 500: broken"),
        (413, b'{"error": {"message": "too large", "code": 413}}', "answered 413: too large"),
        (400, b'{"error": 3}', 'answered 400: {"error": 3}'),
        (500, b"\x1b[31mred\x1b[0m\r\x07", "answered 500:  [31mred [0m"),
        (400, json.dumps({"error": {"message": "a\x1b]0;b\u202ec\nd"}}).encode(), "answered 400: a ]0;b c d"),
    ],
    ids=str,
)
def test_bad_answers_are_named(host: Any, status: int, body: bytes, message: str) -> None:
    host.respond = lambda path: (status, {}, body)
    with pytest.raises(HostError) as caught:
        Host(host.url).embed([b"png"])
    assert message in str(caught.value)
    assert host.url in str(caught.value)
    assert len(str(caught.value)) < 900
    assert str(caught.value).isprintable()


def test_embeddings_come_in_the_order_of_the_pictures_in_both_formats(host: Any) -> None:
    coded = base64.b64encode(np.array([3, 4], "<f4").tobytes()).decode()
    body = {"data": [{"index": 1, "embedding": [1, 2.5]}, {"index": 0, "embedding": coded}]}
    host.respond = lambda path: (200, {}, json.dumps(body).encode())
    np.testing.assert_array_equal(Host(host.url).embed([b"a", b"b"]), [[3, 4], [1, 2.5]])
    body["data"][1]["embedding"] = [1]
    with pytest.raises(HostError, match="different widths"):
        Host(host.url).embed([b"a", b"b"])


def test_a_redirect_is_not_followed(host: Any) -> None:
    host.respond = lambda path: (307, {"Location": host.url + "/elsewhere"}, b"")
    with pytest.raises(HostError, match=r"redirects to .*elsewhere, which is not followed"):
        Host(host.url, api_key="secret").embed([b"png"])
    assert [path for path, _, _ in host.requests] == ["/v1/embeddings"]


def test_an_answer_without_end_is_cut_off(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "LARGEST_ANSWER", 1000)
    host.respond = lambda path: (200, {}, b" " * 2000)
    with pytest.raises(HostError, match="more than 1,000 bytes"):
        Host(host.url).embed([b"png"])


def test_a_silent_host_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(HostError, match=r"within 0\.2 s"):
            Host(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.2).embed([b"png"])


def receive(connection: socket.socket) -> None:
    """Read a request to its end: a connection that is closed with unread bytes is reset."""
    with connection.makefile("rb") as stream:
        headers = [line.partition(b":") for line in iter(stream.readline, b"\r\n")]
        stream.read(int(next(value for name, _, value in headers if name.lower() == b"content-length")))


@pytest.mark.parametrize("status", [b"200 OK", b"500 Broken"], ids=["answer", "error"])
def test_a_host_that_drips_is_given_up(status: bytes) -> None:
    given_up, dripped = threading.Event(), []

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            receive(connection)
            connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 100\r\n\r\n")
            while len(dripped) < 100 and not given_up.wait(0.05):
                connection.sendall(b" ")
                dripped.append(b" ")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        with pytest.raises(HostError, match=r"did not answer within 0\.3 s|answered 500: Broken"):
            Host(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.3).embed([b"png"])
        given_up.set()
        thread.join(timeout=20)
        assert len(dripped) < 100, "the whole answer was waited for"


def test_an_answer_in_pieces_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = vector([1.5] * 30_000)

    def serve(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            receive(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n")
            for start in range(0, len(answer), 9000):
                part = answer[start : start + 9000]
                connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
            connection.sendall(b"0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve, args=(server,), daemon=True)
        thread.start()
        found = Host(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=20).embed([b"png"])
        thread.join(timeout=20)
    np.testing.assert_array_equal(found, np.full((1, 30_000), 1.5))


def test_a_host_that_is_not_there_or_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(HostError, match="cannot be reached"):
        Host(f"http://127.0.0.1:{port}").embed([b"png"])
    assert Host(f"http://127.0.0.1:{port}").models() == []


@pytest.mark.parametrize("url", ["", "host:8000", "ftp://host", "file:///etc/passwd", "http://", "//host", "http://["])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="url must be http://HOST or https://HOST"):
        Host(url)
    with pytest.raises(TypeError, match="url must be a text"):
        Host(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://host:0", "a port from 1 to 65535"),
        ("http://host:99999", "a port from 1 to 65535"),
        ("http://host:-1", "a port from 1 to 65535"),
        ("http://host:abc", "a port from 1 to 65535"),
        ("http://host/?x=1", "must not have a query"),
        ("http://host/v1/embeddings?key=secret", "must not have a query"),
        ("http://host/a b", "a path of printable ASCII"),
        ("http://host/ä", "a path of printable ASCII"),
    ],
)
def test_addresses_that_no_request_can_have_are_refused(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"url must (have )?{message}|url {message}") as caught:
        Host(url)
    assert "secret" not in str(caught.value)


def test_secrets_are_not_printed() -> None:
    for arguments in (("http://me:secret@host",), ("http://host", "secret\nX: y"), ("http://host", "secrét")):
        with pytest.raises(ValueError, match=r"url must not hold a user|api_key must be printable") as caught:
            Host(*arguments)
        assert "secr" not in str(caught.value)


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"data": 3}', b'{"data": [3, {"id": "a"}]}', b"no json"], ids=str)
def test_a_list_of_models_is_optional(host: Any, body: bytes) -> None:
    host.respond = lambda path: (200, {}, body)
    assert Host(host.url).models() == ([{"id": "a"}] if b'"a"' in body else [])
