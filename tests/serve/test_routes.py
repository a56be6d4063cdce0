"""Requests as HTTP brings them, with an engine that only counts: forms, kinds of bodies, deadlines."""

from __future__ import annotations

import asyncio
import base64
import struct
import threading
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.requests import Request

from fastprompt.adapters import Preprocessing
from fastprompt.serve import protocol
from fastprompt.serve.protocol import Catalogue, Limits, Refused, Work
from fastprompt.serve.routes import Routes, read_keys
from fastprompt.vit.weights import ViTSpec

SPEC = ViTSpec("vit", (32, 32), (4, 4), 8, 3, True, 0, "cls")
CATALOGUE = Catalogue("vit", "f" * 64, 3, "float32", SPEC, {"birds": ["owl", "tit", "jay"]})
Picture = Callable[..., bytes]
FORM = {"Content-Type": "multipart/form-data; boundary=x"}


async def compute(work: Work) -> list[np.ndarray]:
    return [np.full(3, picture.mean(), np.float32) for picture in work.pictures]


def ask(
    *requests: tuple[str, str, dict[str, Any]],
    limits: Limits | None = None,
    keys: tuple[str, ...] = (),
    compute: Callable[[Work], Awaitable[list[np.ndarray]]] = compute,
    catalogue: Catalogue = CATALOGUE,
    root: str = "",
) -> list[httpx.Response]:
    """The answers to requests (method, address, options of httpx) that are sent at once."""

    async def everything() -> list[httpx.Response]:
        routes = Routes(catalogue, limits or Limits(), keys, compute)

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await (await routes(Request(scope, receive)))(scope, receive, send)

        transport = httpx.ASGITransport(app, root_path=root)
        async with httpx.AsyncClient(transport=transport, base_url="http://host", timeout=60) as client:
            return await asyncio.gather(*(client.request(method, path, **given) for method, path, given in requests))

    return asyncio.run(everything())


def post(path: str = "/v1/embeddings", status: int = 200, **options: Any) -> Any:
    """What one POST is answered, or the error in it."""
    ours = {name: options.pop(name) for name in ("limits", "keys", "compute") if name in options}
    [answer] = ask(("POST", path, options), **ours)
    assert answer.status_code == status, answer.text
    return answer.json() if status == 200 else answer.json()["error"]


def part(value: bytes, *, name: str = "file", filename: str | None = "a.png") -> bytes:
    named = f'; filename="{filename}"' if filename is not None else ""
    return f'--x\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode() + value + b"\r\n"


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def deep(colour: bool) -> bytes:
    """A PNG of 32 x 32 pixels with 16 bits a channel."""
    row = b"\0" + b"\x80\x40" * (32 * (3 if colour else 1))
    chunks = (
        b"IHDR" + struct.pack(">IIBBBBB", 32, 32, 16, 2 if colour else 0, 0, 0, 0),
        b"IDAT" + zlib.compress(row * 32),
        b"IEND",
    )
    packed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("path", ["/v1/classify", "/v1/embeddings"])
def test_answers_say_which_pictures_were_not_read_as_they_stand(picture: Picture, path: str) -> None:
    model = {"model": "birds"} if path == "/v1/classify" else {}
    answer = post(path, json={"input": [url(picture()), url(deep(True)), url(deep(False))], **model})
    assert answer["warnings"] == [
        "image 1 has colours of more than 8 bits a channel: the upper 8 bits of each are read",
        "image 2 is grey with more than 8 bits: its values from 0 to 65535 are scaled to black and white",
    ]
    assert "warnings" not in post(path, json={"input": url(picture()), **model})
    chosen = {"birds": Preprocessing(intensity_range=(0, 40000))}  # the training set's range was chosen
    [of_range] = ask(
        ("POST", "/v1/classify", {"json": {"input": url(deep(False)), "model": "birds"}}),
        catalogue=replace(CATALOGUE, preprocessing=chosen),
    )
    assert of_range.status_code == 200
    assert "warnings" not in of_range.json()


def test_forms_are_read_to_their_end(picture: Picture) -> None:
    whole = part(b"birds", name="model", filename=None) + part(picture(0)) + part(picture(1), filename="ü.png")
    for end in (b"--x--\r\n", b"--x--", b"--x--\r\nepilogue"):
        answer = post("/v1/classify", content=whole + end, headers=FORM)
        assert [entry["index"] for entry in answer["data"]] == [0, 1]
    quoted = {"Content-Type": 'Multipart/Form-Data; charset="UTF-8"; boundary="x"'}
    assert len(post("/v1/classify", content=whole + b"--x--", headers=quoted)["data"]) == 2


def test_torn_forms_are_refused_wherever_they_are_torn(picture: Picture) -> None:
    whole = part(picture(0)) + part(picture(1)) + b"--x--\r\n"
    first = len(part(picture(0)))
    cuts = [0, 1, 20, first - 50, first, first + 5, first + 60, len(whole) - 40, len(whole) - 5, len(whole) - 4]
    for cut in (*cuts, *range(100, len(whole) - 4, 211)):
        assert post(status=400, content=whole[:cut], headers=FORM)["code"] == "invalid_form", cut
    assert len(post(content=whole[:-2], headers=FORM)["data"]) == 2


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data", 400),
        ("multipart/form-data; boundary=", 400),
        ("multipart/form-data; boundary=" + "a" * 5000, 400),
        (b"multipart/form-data; boundary=\xff\xfe", 400),
        *(
            (f"{kind}; boundary=x; charset={name}", 415)
            for kind in ("multipart/form-data", "application/json")
            for name in ("undefined", "idna", "punycode", "utf-16", "latin-1", "hex", "rot13", "nonsense", '"\\"')
        ),
        ("image/png", 415),
        ("application/x-www-form-urlencoded", 415),
        ("", 415),
        (";;;=", 415),
    ],
)
def test_other_kinds_of_bodies_are_refused(picture: Picture, kind: str | bytes, status: int) -> None:
    body = part(b"m\\ud800" + b"-" * 70, name="model", filename=None) + part(picture()) + b"--x--\r\n"
    post(status=status, content=body, headers={"Content-Type": kind})
    packed = {**FORM, "Content-Encoding": "gzip"}
    assert "Content-Encoding" in post(status=415, content=body, headers=packed)["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"--x\r\nContent-Disposition: form-data; filename=a\r\n\r\nb\r\n--x--\r\n",
        b"--x\r\nX: y\r\n\r\nb\r\n--x--\r\n",
        b"--x\r\nX: " + b"y" * 2_000_000 + b"\r\n\r\nb\r\n--x--\r\n",
        b"--x\r\n" + b"X: y\r\n" * 300_000 + b"\r\nb\r\n--x--\r\n",
        b"--x\r\nContent-Disposition: form-data; name=model\r\n\r\n\xff\xfe\r\n--x--\r\n",
        b"--x\n\n",
        b"\0" * 1000,
    ],
)
def test_damaged_forms_are_refused(body: bytes) -> None:
    assert post(status=400, content=body, headers=FORM)["code"] == "invalid_form"


def test_what_a_form_has_too_much_of_is_told(picture: Picture) -> None:
    many = [("file", (f"{i}.png", picture(), "image/png")) for i in range(40)]
    error = post(status=422, files=many)
    assert (error["code"], error["message"]) == ("too_many_images", "the request has 40 pictures, at most 32 are taken")
    assert error == post(status=422, json={"input": [url(picture())] * 40})
    assert "more than 1000 parts" in post(status=422, content=part(b"") * 100_000 + b"--x--", headers=FORM)["message"]
    nameless = part(picture(), filename=None)
    assert post(status=400, content=nameless + b"--x--", headers=FORM)["code"] == "invalid_form"  # a PNG is no UTF-8
    nameless = part(b"text", filename=None)
    assert "must have a file name" in post(status=422, content=nameless + b"--x--", headers=FORM)["message"]
    assert post(files=many[:1], data={"user": "u"}) == post(json={"input": url(picture()), "user": "u"})


def test_decoding_and_the_engine_have_one_deadline(monkeypatch: pytest.MonkeyPatch, picture: Picture) -> None:
    body = {"json": {"input": url(picture())}, "limits": Limits(answer_seconds=0.3)}

    async def forever(work: Work) -> list[np.ndarray]:
        await asyncio.sleep(60)
        return []

    assert post(status=504, compute=forever, **body)["code"] == "timeout"
    freed, decode = threading.Event(), protocol.decode

    def stuck(*given: Any, **more: Any) -> list[np.ndarray]:
        freed.wait(60)
        return decode(*given, **more)

    monkeypatch.setattr(protocol, "decode", stuck)
    threading.Timer(2, freed.set).start()
    assert post(status=504, **body)["code"] == "timeout"


def test_requests_wait_in_a_queue_that_ends(picture: Picture) -> None:
    async def slow(work: Work) -> list[np.ndarray]:
        await asyncio.sleep(1)
        return await compute(work)

    request = ("POST", "/v1/embeddings", {"json": {"input": url(picture())}})
    answers = ask(*[request] * 8, limits=Limits(waiting=3), compute=slow)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [503] * 5
    assert {answer.headers.get("retry-after") for answer in answers} == {None, "1"}


def test_errors_nobody_foresaw_keep_their_text_back(picture: Picture, caplog: pytest.LogCaptureFixture) -> None:
    async def broken(work: Work) -> list[np.ndarray]:
        raise RuntimeError("secret address 0x7f")

    async def refusing(work: Work) -> list[np.ndarray]:
        raise Refused(422, "wrong_size", "too small")

    assert "secret" not in str(post(status=500, json={"input": url(picture())}, compute=broken))
    assert "secret" in caplog.text
    assert post(status=422, json={"input": url(picture())}, compute=refusing)["message"] == "too small"


def test_keys_are_read_from_lines_or_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTPROMPT_API_KEYS", raising=False)
    assert read_keys(None) == []
    monkeypatch.setenv("FASTPROMPT_API_KEYS", " one,,two , #3")
    assert read_keys(None) == ["one", "two", "#3"]
    file = tmp_path / "keys"
    file.write_bytes("\ufeffteam-a\r\n# of team b\n\n ab,c#d \n  # none\nü\u2028x".encode())
    assert read_keys(file) == ["team-a", "ab,c#d", "ü\u2028x"]
    file.write_text("# none\n")
    with pytest.raises(ValueError, match="keys: has no API key"):
        read_keys(file)
    monkeypatch.setenv("FASTPROMPT_API_KEYS", " ,")
    with pytest.raises(ValueError, match="FASTPROMPT_API_KEYS: has no API key"):
        read_keys(None)


def test_keys_are_taken_as_clients_send_them() -> None:
    def status(**headers: str | bytes) -> int:
        sent: Any = {name.replace("_", "-"): value for name, value in headers.items()}
        return ask(("GET", "/v1/models", {"headers": sent}), keys=("key,1", "schlüssel"))[0].status_code

    for key in (b"key,1", "schlüssel".encode(), "schlüssel".encode("latin-1")):
        for value in (b"Bearer " + key, b"bearer  " + key, b"BEARER " + key + b" "):
            assert status(Authorization=value) == 200
        assert status(X_API_Key=key) == status(X_API_Key=key, Authorization=b"Basic abc") == 200
        assert status(X_API_Key=key, Authorization=b"Bearer other") == 401
        assert status(Authorization=b"Bearer" + key) == status(Authorization=key) == 401
    assert status() == status(X_API_Key="") == 401
    assert status(Authorization="Bearer ") == status(Authorization="Bearer key") == 401


def test_models_are_told_together_and_alone() -> None:
    paths = ("/v1/models", "/v1/models/vit", "/v1/models/birds", "/v1/models/none", "/v1/models/")
    together, vit, birds, *unknown = ask(*(("GET", path, {}) for path in paths))
    assert together.json()["data"] == [vit.json(), birds.json()]
    for entry, id_ in ((vit.json(), "vit"), (birds.json(), "birds")):
        assert (entry["id"], entry["created"], entry["owned_by"]) == (id_, 0, "fastprompt")
    assert [answer.status_code for answer in unknown] == [404, 404]
    assert ask(("GET", "/v1/models/vit", {}), keys=("key",))[0].status_code == 401


@pytest.mark.parametrize("root", ["", "/api", "/v1/models"])
def test_a_model_has_one_address(root: str) -> None:
    named = replace(CATALOGUE, adapters={"birds": ["owl"], "team/birds": ["owl"], "a b%": ["owl"]})

    def status(path: str) -> tuple[int, str]:
        [answer] = ask(("GET", root + path, {}), catalogue=named, root=root)
        return answer.status_code, answer.json().get("id", "")

    for name in ("vit", "birds", "team/birds"):
        assert status(f"/v1/models/{name}") == (200, name)
    assert status("/v1/models/a%20b%25") == (200, "a b%")
    for path in (
        "/v1/models/v1/models/birds",
        "/v1/models/x/v1/models/birds",
        "/v1/models//birds",
        "/v1/models/birds/",
        "/v1/models/team",
        "/v1/models/team//birds",
        "/v1/models/Birds",
        "//v1/models/birds",
        "/x/v1/models/birds",
        "/v1/v1/models/birds",
        "/v1/modelsbirds",
    ):
        assert status(path) == (404, ""), path


def test_other_methods_are_refused_with_those_that_are_not() -> None:
    for method, path, allowed in [
        ("GET", "/v1/embeddings", "POST"),
        ("HEAD", "/v1/classify", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/vit", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
    ]:
        [answer] = ask((method, path, {}))
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
    answers = ask(*(("HEAD", path, {}) for path in ("/health", "/v1/models", "/v1/models/vit")))
    assert [answer.status_code for answer in answers] == [200] * 3
    answers = ask(("GET", "/v1/models/", {}), ("POST", "/v1/embeddings/", {}))
    assert [answer.status_code for answer in answers] == [404] * 2


def test_limits_that_take_no_picture_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Limits.pixels must be at least 1024, .* got 1023"):
        Routes(CATALOGUE, Limits(pixels=1023), [], compute)
    Routes(CATALOGUE, Limits(pixels=1024), [], compute)
