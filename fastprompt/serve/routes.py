"""HTTP in front of an engine: authentication, limits and timeouts; the same for LitServe and for Ray Serve."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from fastprompt.serve import protocol
from fastprompt.serve.budget import Budget, Share
from fastprompt.serve.protocol import Ask, Catalogue, Limits, Refused, Work

logger = logging.getLogger(__name__)

KEYS_VARIABLE = "FASTPROMPT_API_KEYS"
DECODERS = 2
"""Number of threads that parse requests and decode pictures."""
Compute = Callable[[Work], Awaitable[list[np.ndarray]]]


def read_keys(file: Path | None) -> list[str]:
    """Read API keys, one per line of `file`, or separated by commas in FASTPROMPT_API_KEYS; [] if there are none.

    Whitespace around a key is stripped. Empty lines, and lines of `file` that start with '#', are skipped.

    Raises:
        ValueError: the file, or a variable that is set, has no key. OSError: the file cannot be read.
    """
    if file is None and KEYS_VARIABLE not in os.environ:
        return []
    if file is None:
        said = os.environ[KEYS_VARIABLE].split(",")
    else:
        said = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if not line.lstrip().startswith("#")]
    keys = [key.strip() for key in said if key.strip()]
    if not keys:
        raise ValueError(f"{KEYS_VARIABLE if file is None else file}: has no API key")
    return keys


class Routes:
    """The endpoints of a host, each a function of a Starlette request.

    Args:
        catalogue: what is served. limits: what one client may send. keys: API keys; empty: everybody may send requests.
        compute: runs the engine on a request's pictures; it can raise `Refused`. is_well: whether the engine responds.

    Raises:
        ValueError: `limits` do not admit a picture of the backbone's size.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        limits: Limits,
        keys: Sequence[str],
        compute: Compute,
        is_well: Callable[[], bool] = lambda: True,
    ) -> None:
        self.catalogue, self.limits, self.compute, self.is_well = catalogue, limits, compute, is_well
        own = catalogue.spec.image_size[0] * catalogue.spec.image_size[1]
        if limits.pixels is not None and limits.pixels < own:
            raise ValueError(
                f"Limits.pixels must be at least {own}, as many as the backbone's images have, got {limits.pixels}"
            )
        self._decoders, self._waiting = ThreadPoolExecutor(DECODERS, "decode"), 0
        self._budget = Budget(limits.held())
        self._keys = [form for key in keys for form in _forms(key)]

    async def models(self, request: Request) -> Response:
        """GET /v1/models: the backbone and the adapters."""
        return await self._answered(self._models(request))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/ID: one model."""
        return await self._answered(self._model(request))

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: the backbone's features of pictures."""
        return await self._answered(self._pictures(request, protocol.embeddings_work, protocol.embeddings_answer))

    async def classify(self, request: Request) -> Response:
        """POST /v1/classify: an adapter's classification of pictures."""
        return await self._answered(self._pictures(request, protocol.classify_work, protocol.classify_answer))

    async def health(self, request: Request) -> Response:
        """GET /health: 200 while the host answers requests, else 503."""
        if self.is_well():
            return Response("ok")
        return refusal(Refused(503, "not_ready", "the engine is not ready; try again later"))

    async def __call__(self, request: Request) -> Response:
        """Dispatch to an endpoint by path and method, for a server without a router of its own."""
        endpoints = {
            "/v1/models": ("GET", self.models),
            "/v1/embeddings": ("POST", self.embeddings),
            "/v1/classify": ("POST", self.classify),
            "/health": ("GET", self.health),
        }
        path = _path(request)
        method, endpoint = endpoints.get(path, ("", self.health))
        if path.startswith("/v1/models/"):
            method, endpoint = "GET", self.model
        if not method:
            return await refuse(request, HTTPException(404))
        if request.method == method or (request.method, method) == ("HEAD", "GET"):
            return await endpoint(request)
        allowed = "GET, HEAD" if method == "GET" else method
        return await refuse(request, HTTPException(405, headers={"Allow": allowed}))

    async def _models(self, request: Request) -> dict[str, Any]:
        self._admit(request)
        return self.catalogue.models()

    async def _model(self, request: Request) -> dict[str, Any]:
        self._admit(request)
        asked = _path(request).removeprefix("/v1/models/")
        for entry in self.catalogue.models()["data"]:
            if entry["id"] == asked:
                return entry
        raise Refused(404, "model_not_found", f"there is no model {asked[:100]!r}; GET /v1/models lists them")

    async def _pictures(
        self,
        request: Request,
        to_work: Callable[[Ask, Catalogue, Limits], Work],
        to_answer: Callable[[Ask, Catalogue, Sequence[np.ndarray]], dict[str, Any]],
    ) -> dict[str, Any]:
        self._admit(request)
        is_form = _is_form(request)
        with Share(self._budget) as share:
            try:
                self._check_waiting()
                body = await self._body(request, share)
            except Refused as error:
                error.closes = True
                raise
            self._check_waiting()
            self._waiting += 1
            try:
                return await asyncio.wait_for(
                    self._computed(request, body, share, is_form, to_work, to_answer), self.limits.answer_seconds
                )
            except asyncio.TimeoutError as error:
                raise Refused(504, "timeout", "the engine did not come to this request in time; try again") from error
            finally:
                self._waiting -= 1

    async def _computed(
        self,
        request: Request,
        body: bytearray,
        share: Share,
        is_form: bool,
        to_work: Callable[[Ask, Catalogue, Limits], Work],
        to_answer: Callable[[Ask, Catalogue, Sequence[np.ndarray]], dict[str, Any]],
    ) -> dict[str, Any]:
        """Answer a complete body. It is freed, with the files in it, as soon as its pictures are decoded."""

        def read() -> tuple[Ask, Work]:
            whole = bytes(body)
            body.clear()
            ask = (
                protocol.read_form(protocol.form_fields(whole, request.headers["content-type"]), self.limits)
                if is_form
                else protocol.read_json(whole, self.limits)
            )
            return replace(ask, files=[]), to_work(ask, self.catalogue, self.limits)

        ask, work = await asyncio.get_running_loop().run_in_executor(self._decoders, read)
        share.resize(sum(picture.nbytes for picture in work.pictures))
        answer = to_answer(ask, self.catalogue, await self.compute(work))
        return answer | ({"warnings": list(work.warnings)} if work.warnings else {})

    def _check_waiting(self) -> None:
        if self._waiting >= self.limits.waiting:
            raise Refused(503, "busy", "too many requests wait; try again later")

    async def _answered(self, answering: Awaitable[dict[str, Any]]) -> Response:
        """Return the answer or the error as JSON. Unexpected errors are logged and their text is not sent."""
        try:
            return JSONResponse(await answering)
        except Refused as error:
            return refusal(error)
        except ClientDisconnect:
            return refusal(Refused(400, "disconnected", "the client left"))
        except Exception:
            logger.exception("a request failed")
            return refusal(Refused(500, "internal_error", "the host failed to answer this request"))

    def _admit(self, request: Request) -> None:
        """Refuse clients without a key, in constant time: the duration does not reveal how much of a key was right."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.headers.get("x-api-key", "")
        given = given.strip()
        if not sum(hmac.compare_digest(key, given.encode("latin-1")) for key in self._keys):  # compare with every key
            raise Refused(
                401, "invalid_api_key", "this host needs an API key: 'Authorization: Bearer KEY', or 'X-API-Key: KEY'"
            )

    async def _body(self, request: Request, share: Share) -> bytearray:
        """Read the request's body. Raises Refused as soon as it is known to be too large, or if it is too slow."""
        most, body = self.limits.body_bytes, bytearray()
        too_large = Refused(413, "body_too_large", f"a request has at most {most} bytes")
        declared = int(request.headers.get("content-length") or 0)
        if declared > most:
            raise too_large
        share.check(declared)

        async def read() -> None:
            async for chunk in request.stream():
                if len(body) + len(chunk) > most:
                    raise too_large
                share.resize(len(body) + len(chunk))
                body.extend(chunk)

        try:
            await asyncio.wait_for(read(), self.limits.body_seconds)
        except asyncio.TimeoutError as error:
            raise Refused(
                408, "too_slow", f"the request's body did not come within {self.limits.body_seconds:g} seconds"
            ) from error
        return body


def _forms(key: str) -> set[bytes]:
    """Return the bytes that clients send for a key: UTF-8, or Latin-1 as from browsers and Python's own client."""
    forms = {key.encode("utf-8", "surrogateescape")}
    with contextlib.suppress(UnicodeEncodeError):
        forms.add(key.encode("latin-1"))
    return forms


def _path(request: Request) -> str:
    """Return the decoded path below the address at which the host is mounted."""
    path, root = request.scope["path"], request.scope.get("root_path", "").rstrip("/")
    return path.removeprefix(root) if path.startswith(root + "/") else path


def _is_form(request: Request) -> bool:
    """Whether the body is a form rather than JSON. Raises Refused if it is neither, compressed, or not in UTF-8."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    kind = kind.lower()
    if kind not in (b"application/json", b"multipart/form-data"):
        raise Refused(
            415,
            "unsupported_media_type",
            f"a request is application/json or multipart/form-data, got {kind.decode('latin-1')[:100]!r}",
        )
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise Refused(
            415, "unsupported_media_type", f"charset must be utf-8, got {options[b'charset'].decode('latin-1')[:100]!r}"
        )
    packed = request.headers.get("content-encoding", "identity")
    if packed.strip().lower() not in ("", "identity"):
        raise Refused(
            415, "unsupported_media_type", f"a body must not be packed, got Content-Encoding {packed[:100]!r}"
        )
    return kind == b"multipart/form-data"


def refusal(error: Refused) -> Response:
    """Return an error as JSON. If the client may still be sending, the connection is closed."""
    headers = {503: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status, {})
    return JSONResponse(error.body(), error.status, {**headers, "Connection": "close"} if error.closes else headers)


async def refuse(request: Request, error: Exception) -> Response:
    """Convert a web framework's own error (unknown address, wrong method) to our format."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    codes = {404: "not_found", 405: "method_not_allowed"}
    detail = str(error.detail) if isinstance(error, HTTPException) and status < 500 else "the host failed"
    code = codes.get(status, "invalid_request" if status < 500 else "internal_error")
    answer = refusal(Refused(status, code, detail))
    answer.headers.update(getattr(error, "headers", None) or {})
    return answer
