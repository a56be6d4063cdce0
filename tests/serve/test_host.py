"""A host as its clients see it: a real server process, a tiny backbone, and everything that people send."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.data.images import to_tensor
from fastprompt.serve.tenants import HostSettings, load

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("first-key", "second-key-ü")
Picture = Callable[..., bytes]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


class Server:
    """`fastprompt serve` in a process of its own."""

    def __init__(
        self,
        place: Path,
        *flags: str,
        adapters: tuple[str, ...] = ("birds", "cars"),
        keys: str = "",
        port: int | None = None,
    ) -> None:
        self.port = free_port() if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = place / f"log-{self.port}"
        named = [word for name in adapters for word in ("--adapter", f"{name}={place / name}")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTPROMPT_API_KEYS": keys}
        if not keys:
            del environment["FASTPROMPT_API_KEYS"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "fastprompt",
                    "serve",
                    "--backbone",
                    f"local-dir:{place / 'vit'}",
                    *named,
                    "--port",
                    str(self.port),
                    "--dtype",
                    "float32",
                    "--threads",
                    "1",
                    *flags,
                ],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> Server:
        """Until it is healthy, at most five minutes; before that it says 503, or does not listen yet."""
        for _ in range(3000):
            assert self.process.poll() is None, self.log.read_text()
            if self.port == 0 and (said := re.search(r"on (http://127.0.0.1:([0-9]+));", self.log.read_text())):
                self.url, self.port = said[1], int(said[2])
            try:
                status = httpx.get(f"{self.url}/health", timeout=10).status_code
                if status == 200:
                    return self
                assert status == 503
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())


@pytest.fixture(scope="module")
def servers(place: Path) -> Iterator[list[Server]]:
    """Two that start side by side: one with two adapters, keys and small limits, and one to be broken."""
    running = [
        Server(
            place,
            "--max-body-mb",
            "0.25",
            "--max-images",
            "5",
            "--body-timeout",
            "5",
            "--any-size",
            "--allow-origin",
            "https://page.example",
            keys=",".join(KEYS),
        ),
        Server(place, "--backend", "eager", adapters=("birds",), port=0),
    ]
    yield running
    for server in running:
        server.process.terminate()
    for server in running:
        server.process.wait(60)


@pytest.fixture(scope="module")
def server(servers: list[Server]) -> Server:
    return servers[0].wait()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEYS[0]}"}, timeout=60) as connected:
        yield connected


@pytest.fixture(scope="module")
def engine(place: Path) -> fp.Engine:
    adapters = {name: place / name for name in ("birds", "cars")}
    return load(HostSettings(f"local-dir:{place / 'vit'}", None, True, adapters, "float32", 8, 1))[0]


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def expected(engine: fp.Engine, data: bytes, name: str = "__base__") -> np.ndarray:
    image = to_tensor(Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).size[::-1])
    return engine(image[None], adapter_names=[name])[0].numpy()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    assert set(answer.json()["error"]) == {"message", "type", "code"}
    assert "Traceback" not in answer.text
    return answer.json()["error"]


def test_models(client: httpx.Client, place: Path) -> None:
    answer = client.get("/v1/models")
    assert answer.status_code == 200
    backbone, birds, cars = answer.json()["data"]
    assert backbone["id"] == "vit"
    assert str(place) not in answer.text
    assert backbone["fingerprint"] == fp.load_backbone(f"local-dir:{place / 'vit'}").fingerprint
    assert client.get("/v1/models/birds").json() == birds
    assert (backbone["width"], backbone["image_size"], backbone["std"]) == (48, [32, 32], [0.25] * 3)
    assert (birds["id"], birds["object"]) == ("birds", "adapter")
    assert birds["class_names"] == ["birds-0", "birds-1", "birds-2"]
    assert cars["class_names"] == list("0123456")


def test_embeddings_as_json(client: httpx.Client, engine: fp.Engine, picture: Picture, place: Path) -> None:
    files = [picture(0), picture(1, height=40)]
    body = {"input": [url(data) for data in files], "model": "vit"}
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 200, answer.text
    assert [entry["index"] for entry in answer.json()["data"]] == [0, 1]
    for entry, data in zip(answer.json()["data"], files, strict=True):
        np.testing.assert_allclose(entry["embedding"], expected(engine, data), rtol=1e-4, atol=1e-5)
    single = client.post("/v1/embeddings", json={"input": url(files[0]), "encoding_format": "base64"})
    packed = np.frombuffer(base64.b64decode(single.json()["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(packed, expected(engine, files[0]), rtol=1e-4, atol=1e-5)


def test_embeddings_and_classes_as_a_form(client: httpx.Client, engine: fp.Engine, picture: Picture) -> None:
    files = [("file", (f"{i}.png", picture(i, format=kind), "image/png")) for i, kind in enumerate(("PNG", "WEBP"))]
    answer = client.post("/v1/embeddings", files=files, data={"encoding_format": "base64"})
    assert answer.status_code == 200, answer.text
    for i, entry in enumerate(answer.json()["data"]):
        packed = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        np.testing.assert_allclose(packed, expected(engine, files[i][1][1]), rtol=1e-4, atol=1e-5)
    answer = client.post("/v1/classify", files=files, data={"model": "cars"})
    assert answer.status_code == 200, answer.text
    for i, entry in enumerate(answer.json()["data"]):
        likely = torch.from_numpy(expected(engine, files[i][1][1], "cars")).softmax(0)
        assert entry["label"] == int(likely.argmax())
        assert entry["probabilities"][0]["probability"] == pytest.approx(float(likely.max()), rel=1e-3)
        assert len(entry["probabilities"]) == 5


def test_batches_across_tenants_are_what_each_gets_alone(server: Server, engine: fp.Engine, picture: Picture) -> None:
    files = [picture(i, height=40 if i % 5 == 0 else 32) for i in range(24)]

    async def ask(client: httpx.AsyncClient, i: int) -> httpx.Response:
        if i % 3 == 0:
            return await client.post("/v1/embeddings", json={"input": url(files[i])})
        return await client.post("/v1/classify", json={"input": url(picture(i)), "model": ("birds", "cars")[i % 2]})

    async def everybody() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, headers={"X-API-Key": KEYS[0]}, timeout=60) as client:
            return await asyncio.gather(*(ask(client, i) for i in range(len(files))))

    for i, answer in enumerate(asyncio.run(everybody())):
        assert answer.status_code == 200, answer.text
        [entry] = answer.json()["data"]
        if i % 3 == 0:
            np.testing.assert_allclose(entry["embedding"], expected(engine, files[i]), rtol=1e-4, atol=1e-5)
        else:
            likely = torch.from_numpy(expected(engine, picture(i), ("birds", "cars")[i % 2])).softmax(0)
            assert entry["probabilities"][0]["probability"] == pytest.approx(float(likely.max()), rel=1e-3)


def test_any_photo_is_classified(client: httpx.Client, engine: fp.Engine, picture: Picture) -> None:
    """As the README's curl sends it: a form with a file of any size."""
    for options in ({"height": 300, "width": 401, "format": "JPEG"}, {"height": 20, "width": 11, "mode": "RGBA"}):
        data = picture(**options)
        form = {"files": {"file": ("owl.jpg", data)}, "data": {"model": "birds"}}
        answer = client.post("/v1/classify", **form)
        assert answer.status_code == 200, answer.text
        image = to_tensor(Image.open(io.BytesIO(data)), (32, 32))
        likely = torch.as_tensor(engine(image[None], adapter_names=["birds"])[0]).softmax(0)
        [entry] = answer.json()["data"]
        assert entry["probabilities"][0]["probability"] == pytest.approx(float(likely.max()), rel=1e-3)
        refused = client.post("/v1/classify", files=form["files"], data={"model": "birds", "pixels": "exact"})
        assert error_of(refused, 422)["code"] == "wrong_size"


def huge() -> bytes:
    """A PNG of a few bytes that says it has 12,000 x 12,000 pixels."""
    stream = io.BytesIO()
    Image.new("1", (1, 1)).save(stream, "PNG")
    size = struct.pack(">II", 12000, 12000)
    header = b"IHDR" + size + stream.getvalue()[24:29]
    return stream.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + stream.getvalue()[33:]


def test_wrong_requests_are_refused_in_one_form(client: httpx.Client, picture: Picture) -> None:
    good = url(picture())
    for path, body, status, code in [
        ("/v1/embeddings", {"input": url(picture(height=33)), "pixels": "exact"}, 422, "wrong_size"),
        ("/v1/embeddings", {"input": url(picture(height=512, mode="1")), "pixels": "exact"}, 413, "too_many_pixels"),
        ("/v1/classify", {"input": url(huge()), "model": "birds"}, 413, "too_many_pixels"),
        ("/v1/embeddings", {"input": url(picture()[:300])}, 422, "damaged_image"),
        ("/v1/embeddings", {"input": url(picture(format="GIF"))}, 422, "not_an_image"),
        ("/v1/embeddings", {"input": "data:image/png;base64,####"}, 422, "invalid_base64"),
        ("/v1/embeddings", {"input": [good] * 6}, 422, "too_many_images"),
        ("/v1/embeddings", {"input": 3}, 422, "invalid_request"),
        ("/v1/embeddings", {"input": good, "model": "birds"}, 404, "model_not_found"),
        ("/v1/classify", {"input": good}, 422, "invalid_request"),
        ("/v1/classify", {"input": good, "model": "dogs"}, 404, "model_not_found"),
        ("/v1/classify", {"input": url(picture(height=40)), "model": "cars", "pixels": "exact"}, 422, "wrong_size"),
        ("/v1/nothing", {}, 404, "not_found"),
    ]:
        assert error_of(client.post(path, json=body), status)["code"] == code
    assert error_of(client.get("/v1/embeddings"), 405)["code"] == "method_not_allowed"
    assert error_of(client.post("/v1/embeddings", content=b"x"), 415)["code"] == "unsupported_media_type"
    wrong = {"Content-Type": "application/json"}
    assert error_of(client.post("/v1/embeddings", content=b"{", headers=wrong), 400)["code"] == "invalid_json"
    for kind in ("multipart/form-data", "multipart/form-data; boundary=x"):
        error_of(client.post("/v1/embeddings", content=b"nonsense", headers={"Content-Type": kind}), 400)
    many = [("file", (f"{i}.png", picture(), "image/png")) for i in range(7)]
    assert "has 7 pictures" in error_of(client.post("/v1/embeddings", files=many), 422)["message"]
    for path in ("/", "/docs", "/openapi.json", "/info", "/v1/embeddings/", "/health/", "/v1/models/none"):
        error_of(client.get(path), 404)
    for path, allowed in (("/v1/embeddings", {"POST"}), ("/v1/models", {"GET", "HEAD"}), ("/health", {"GET", "HEAD"})):
        answer = client.request("DELETE", path)
        assert error_of(answer, 405)["code"] == "method_not_allowed"
        assert set(answer.headers["allow"].split(", ")) == allowed
        assert client.head(path).status_code == (405 if path == "/v1/embeddings" else 200)
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=30) as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert b'"code":"invalid_http"' in b"".join(iter(lambda: connection.recv(4096), b""))


def test_large_bodies_are_refused_with_and_without_a_length(server: Server, client: httpx.Client) -> None:
    large = {"Content-Type": "application/json"}
    whole = client.post("/v1/embeddings", content=b" " * 300_000, headers=large)
    assert error_of(whole, 413)["code"] == "body_too_large"

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 10_000

    assert error_of(client.post("/v1/embeddings", content=chunks(), headers=large), 413)["code"] == "body_too_large"
    for size in (300_000, 1_900_000):
        files = [("file", ("a.png", b" " * size, "image/png"))]
        error_of(client.post("/v1/embeddings", files=files), 413)
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        "Content-Type: application/json\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_slow_clients_are_sent_away_and_hold_nobody(server: Server, client: httpx.Client, picture: Picture) -> None:
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
    ).encode()
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(20)]
    for i, connection in enumerate(slow):
        connection.sendall(head + b"{" if i % 2 else head[:60])
    began = time.monotonic()
    assert client.post("/v1/embeddings", json={"input": url(picture())}).status_code == 200
    for i, connection in enumerate(slow):
        answer = b""
        while block := connection.recv(4096):
            answer += block
        assert answer.startswith(b"HTTP/1.1 408") if i % 2 else answer == b""
        connection.close()
    assert time.monotonic() - began < 25


def test_keys(server: Server, picture: Picture) -> None:
    body = {"input": url(picture())}
    wrong = ["Bearer", "Bearer x", "Bearer first-ke", "Bearer first-key,second-key-ü", "Basic first-key", "first-key"]
    for path in ("/v1/embeddings", "/v1/classify"):
        for header in ({}, {"X-API-Key": "third"}, *({"Authorization": text.encode()} for text in wrong)):
            answer = httpx.post(server.url + path, json=body, headers=header)
            assert error_of(answer, 401)["type"] == "authentication_error"
    error_of(httpx.get(server.url + "/v1/models"), 401)
    assert httpx.get(server.url + "/health").status_code == 200
    for key in KEYS:
        for header in ({"Authorization": f"Bearer {key}".encode()}, {"X-API-Key": key.encode()}):
            assert httpx.get(server.url + "/v1/models", headers=header).status_code == 200
    assert all(key not in server.log.read_text() for key in KEYS)
    command = Path(f"/proc/{server.process.pid}/cmdline")
    assert not command.exists() or KEYS[0].encode() not in command.read_bytes()


def test_pages_of_allowed_origins_may_ask(server: Server, client: httpx.Client) -> None:
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-api-key",
    }
    for origin, allowed in (("https://page.example", "https://page.example"), ("https://other.example", None)):
        before = httpx.options(server.url + "/v1/embeddings", headers={"Origin": origin, **asked})
        answer = client.get("/v1/models", headers={"Origin": origin})
        refused = client.post("/v1/embeddings", json={}, headers={"Origin": origin})
        assert (before.status_code == 200) == bool(allowed)
        for got in (before, answer, refused):
            assert got.headers.get("access-control-allow-origin") == allowed


def worker_of(server: Server) -> int:
    """The process id of the host's worker, once it is started."""
    while True:
        for children in Path(f"/proc/{server.process.pid}/task").glob("*/children"):
            for pid in children.read_text().split():
                with contextlib.suppress(FileNotFoundError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if b"spawn_main" in command and b"resource_tracker" not in command:
                        return int(pid)
        assert server.process.poll() is None, server.log.read_text()
        time.sleep(0.01)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_worker_that_hangs_or_dies_is_replaced(servers: list[Server], engine: fp.Engine, picture: Picture) -> None:
    server = servers[1].wait()
    body = {"input": url(picture()), "model": "birds"}

    def ask() -> httpx.Response:
        return httpx.post(f"{server.url}/v1/classify", json=body, timeout=300)

    assert ask().status_code == 200
    stopped = worker_of(server)
    os.kill(stopped, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask)
        while httpx.get(f"{server.url}/health", timeout=60).status_code == 200:
            time.sleep(0.1)
        error = error_of(waiting.result(), 503)
    assert error["code"] == "worker_lost"
    assert waiting.result().headers["retry-after"] == "1"
    server.wait()
    assert worker_of(server) != stopped
    likely = torch.from_numpy(expected(engine, picture(), "birds")).softmax(0)
    [entry] = ask().json()["data"]
    assert entry["probabilities"][0]["probability"] == pytest.approx(float(likely.max()), rel=1e-3)
    died = worker_of(server)
    os.kill(died, signal.SIGKILL)
    while (started := worker_of(server)) == died:
        time.sleep(0.01)
    os.kill(started, signal.SIGKILL)  # before it is ready: a third one would not be either
    assert server.process.wait(120) == 1
    assert "before it was ready" in server.log.read_text()


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_wrong_commands_end_before_a_server_starts(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["serve", "--backbone", f"local-dir:{place / 'vit'}"]
    for flags, message in [
        (["--adapter", "birds"], "--adapter must be NAME=DIR, got 'birds'"),
        (["--adapter", "a=b", "--adapter", "a=c"], "--adapter must not repeat a name, got 'a' twice"),
        (["--adapter", f"x={place / 'stranger'}"], "adapter 'x': the adapter in .* on another backbone"),
        (["--adapter", f"x={place / 'headless'}"], "has no head"),
        (["--adapter", f"x={tmp_path}"], "adapter_config.json"),
        (["--max-images", "0"], "Limits.images must be positive"),
        (["--max-pixels", "1023"], "Limits.pixels must be at least 1024"),
        (["--max-held-mb", "15"], "Limits.held_bytes must be at least twice body_bytes, 16777216, got 15728640"),
        (["--batch-wait-ms", "-1"], "batch_wait must be seconds"),
        *(
            ([flag, value], f"{flag} must be finite, got {value}")
            for value in ("nan", "inf")
            for flag in (
                "--max-body-mb",
                "--max-held-mb",
                "--max-decoded-mb",
                "--body-timeout",
                "--timeout",
                "--batch-wait-ms",
            )
        ),
        (["--api-keys-file", str(tmp_path / "none")], "No such file"),
    ]:
        assert main([*command, "--port", str(free_port()), *flags]) == 2
        line = error_line(capsys)
        assert line.startswith("fastprompt serve: error: ")
        assert re.search(message, line), line
    (tmp_path / "empty").write_text("\n # none\n")
    assert main([*command, "--api-keys-file", str(tmp_path / "empty")]) == 2
    assert "has no API key" in error_line(capsys)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main([*command, "--port", str(taken.getsockname()[1])]) == 1
        assert "in use" in error_line(capsys)
    monkeypatch.setitem(sys.modules, "litserve", None)
    assert main(command) == 1
    assert "pip install 'fastprompt[serve]'" in error_line(capsys)


def test_the_end_answers_all_that_came_and_takes_nothing_new(server: Server, picture: Picture) -> None:
    """The last test of the file: it ends the server that the others share."""
    body = json.dumps({"input": url(picture())}).encode()
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEYS[0]}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with contextlib.ExitStack() as stack:
        slow, *others = (
            stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=60)) for _ in range(61)
        )
        slow.sendall(head + body[:100])
        for connection in others:
            connection.sendall(head + body)
        server.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(ConnectionRefusedError):
            while True:  # until it accepts nothing new
                socket.create_connection(("127.0.0.1", server.port), timeout=60).close()
                time.sleep(0.01)
        slow.sendall(body[100:])
        for connection in (slow, *others):
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            assert answer.startswith(b"HTTP/1.1 200"), answer[:500] + server.log.read_bytes()
    assert server.process.wait(60) == 0
    assert "Traceback" not in server.log.read_text()
