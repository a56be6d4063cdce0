"""HTTP client for `POST /v1/embeddings`: bounded in time and size, no redirects, every answer checked."""

from __future__ import annotations

import base64
import binascii
import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastprompt_client.deadline import Handler

LARGEST_ANSWER = 64 << 20
LARGEST_ERROR = 64 << 10
LONGEST_TIMEOUT = 86_400.0


class HostError(RuntimeError):
    """The host cannot be reached, refuses the request, or does not return embeddings; the message says which."""


class HostMismatch(HostError):
    """The host's embedding of the golden picture is not the one that the model was trained with."""


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which would send key and pictures to another place and lose the request's body."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Host:
    """A connection to one host.

    Args:
        url: "http://host:8000", optionally followed by "/v1" or "/v1/embeddings".
        api_key: sent as `Authorization: Bearer`.
        timeout: seconds for a request, from looking up the host's name to the last byte of its answer.

    Raises:
        TypeError, ValueError: `url` is not an http or https address, `api_key` cannot be sent, or `timeout` is not a
            valid time.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout: float = 30.0) -> None:
        if not isinstance(url, str):
            raise TypeError(f"url must be a text, got {type(url).__name__}")
        try:
            parts = urllib.parse.urlsplit(url.strip())
        except ValueError as error:
            raise ValueError(f"url must be http://HOST or https://HOST, got {url!r}: {error}") from error
        if parts.username is not None or parts.password is not None:
            raise ValueError("url must not hold a user or password; pass a key as api_key")
        if parts.query:
            raise ValueError("url must not have a query (?...): a host's address ends with its path")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url must be http://HOST or https://HOST, got {url!r}")
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"url must have a port from 1 to 65535, got {url!r}") from error
        if port == 0:
            raise ValueError(f"url must have a port from 1 to 65535, got {url!r}")
        if not parts.path.isascii() or not parts.path.isprintable() or " " in parts.path:
            raise ValueError(f"url must have a path of printable ASCII, other characters as %XX, got {url!r}")
        base = parts._replace(fragment="").geturl().rstrip("/")
        self.base = base.removesuffix("/v1/embeddings").removesuffix("/v1")
        check_timeout(timeout)
        check_key(api_key)
        self.timeout = timeout
        self.headers = {"Accept": "application/json", "User-Agent": "fastprompt-client"}
        if api_key is not None:
            self.headers["Authorization"] = f"Bearer {api_key}"
        self.opener = urllib.request.build_opener(_NoRedirects(), Handler())

    def deadline(self) -> float:
        """Return the `time.monotonic` at which `timeout` from now ends, to share between requests."""
        return time.monotonic() + self.timeout

    def models(self, deadline: float | None = None) -> list[dict[str, Any]]:
        """Return what the host lists under `GET /v1/models`; empty if the list cannot be read."""
        try:
            answer = self._call("/v1/models", None, deadline)
        except HostError:
            return []
        listed = answer.get("data")
        return [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []

    def embed(self, pictures: Sequence[bytes], model: str | None = None, deadline: float | None = None) -> np.ndarray:
        """Embed PNG files in one request: (n, D) float32.

        Raises:
            HostError: the host does not return one finite embedding for each of them, all of the same width.
        """
        texts = ["data:image/png;base64," + base64.b64encode(picture).decode() for picture in pictures]
        body: dict[str, Any] = {"input": texts, "encoding_format": "base64"}
        if model is not None:
            body["model"] = model
        answer = self._call("/v1/embeddings", body, deadline)
        data = answer.get("data")
        if not isinstance(data, list) or len(data) != len(pictures):
            raise HostError(
                f"{self.base} must return {len(pictures)} embeddings, got "
                f"{len(data) if isinstance(data, list) else type(data).__name__}"
            )
        vectors: list[np.ndarray | None] = [None] * len(pictures)
        for place, entry in enumerate(data):
            index = entry.get("index", place) if isinstance(entry, dict) else None
            if type(index) is not int or not 0 <= index < len(vectors) or vectors[index] is not None:
                raise HostError(
                    f"{self.base} returned entry {place} without an index of its own from 0 to {len(vectors) - 1}"
                )
            vectors[index] = self._vector(entry.get("embedding"), index)
        found = [vector for vector in vectors if vector is not None]
        if len({len(vector) for vector in found}) > 1:
            raise HostError(f"{self.base} returned embeddings of different widths")
        return np.stack(found)

    def _vector(self, value: Any, index: int) -> np.ndarray:
        try:
            if isinstance(value, str):
                vector = np.frombuffer(base64.b64decode(value, validate=True), "<f4")
            elif isinstance(value, list) and all(type(entry) in (int, float) for entry in value):
                with np.errstate(over="ignore"):
                    vector = np.asarray(value, np.float32)
            else:
                raise ValueError("neither a list of numbers nor base64")
        except (ValueError, OverflowError, binascii.Error) as error:
            raise HostError(f"{self.base} returned an invalid embedding for picture {index}: {error}") from error
        if not len(vector) or not np.isfinite(vector).all():
            raise HostError(f"{self.base} returned an embedding for picture {index} that is empty or not finite")
        return vector

    def _call(self, path: str, body: dict[str, Any] | None, deadline: float | None) -> dict[str, Any]:
        headers, data = dict(self.headers), None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        request = urllib.request.Request(self.base + path, data, headers)
        request.deadline = self.deadline() if deadline is None else deadline  # type: ignore[attr-defined]
        try:
            with self.opener.open(request) as response:
                content = _body(response, LARGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                said = _reason(error)
            raise HostError(f"{self.base}{path} answered {error.code}: {said}") from error
        except TimeoutError as error:
            raise HostError(f"{self.base}{path} did not answer within {self.timeout:g} s") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                reason = f"no connection within {self.timeout:g} s"
            raise HostError(f"{self.base}{path} cannot be reached: {printable(str(reason))}") from error
        if len(content) > LARGEST_ANSWER:
            raise HostError(f"{self.base}{path} answered more than {LARGEST_ANSWER:,} bytes")
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise HostError(f"{self.base}{path} must answer with JSON: {error}") from error
        if not isinstance(answer, dict):
            raise HostError(f"{self.base}{path} must answer with a JSON object, got {type(answer).__name__}")
        return answer


def check_timeout(timeout: float) -> None:
    """Raise TypeError or ValueError unless `timeout` is a valid number of seconds."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not 0 < timeout <= LONGEST_TIMEOUT:
        raise ValueError(f"timeout must be above 0 and at most {LONGEST_TIMEOUT:,.0f} seconds, got {timeout}")


def check_key(api_key: str | None) -> None:
    """Raise a ValueError that does not show the key unless it is None or can be sent."""
    if api_key is not None and not (
        isinstance(api_key, str) and api_key and api_key.isascii() and api_key.isprintable()
    ):
        raise ValueError("api_key must be printable ASCII, or None for no key")


def _body(response: http.client.HTTPResponse, limit: int) -> bytes:
    """Read up to `limit` bytes of an answer without waiting for the rest."""
    parts, size = [], 0
    while size < limit:
        part = response.read1(min(1 << 16, limit - size))
        if not part:
            break
        parts.append(part)
        size += len(part)
    return b"".join(parts)


def printable(text: str) -> str:
    """Replace control and invisible characters by spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the message of an OpenAI-style error, or the text of another answer."""
    if 300 <= error.code < 400:
        return printable(
            f"it redirects to {error.headers.get('Location')}, which is not followed; pass that address as url"
        )
    try:
        content = _body(error.fp, LARGEST_ERROR)  # type: ignore[arg-type]
    except (OSError, http.client.HTTPException):
        return printable(str(error.reason))
    try:
        return printable(str(json.loads(content)["error"]["message"])[:500])
    except (ValueError, KeyError, TypeError, RecursionError):
        return printable(content.decode("utf-8", "replace").strip()[:200] or str(error.reason))
