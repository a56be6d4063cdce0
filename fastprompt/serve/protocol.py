"""The protocol between a host and its clients: parse requests into pictures, format outputs, and refuse bad requests.

Nothing here depends on a web server. Client data is checked before it is decoded, and Pillow decodes it.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.multipart import MultipartParser, parse_options_header

from fastprompt.adapters import Preprocessing
from fastprompt.data import images
from fastprompt.domains import Domains
from fastprompt.vit.weights import ViTSpec

BASE = "__base__"
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_RETURNED_CLASSES = 5
"""Number of classes whose probabilities an answer includes, most likely first."""
PIXEL_BYTES = 16
"""Maximum encoded bytes per pixel (twice PNG's worst case)."""
METADATA = 2**18
"""Maximum bytes of a picture's metadata, in addition to those of its pixels."""
SCANS = 100
"""Maximum number of scans of a JPEG. Each scan covers all pixels; progressive files have about ten."""
CHEAP_SCANS = 10
"""Number of JPEG scans that count as one decoding; a file with ten times as many counts as ten pictures."""
PARTS = 1000
"""Maximum number of form parts that the parser reads. `Limits.images` is smaller, and its error names the limit."""
PART_HEADERS = 2**13
"""Maximum bytes of the headers of one form part."""
COMMAS = 1000
"""Maximum number of commas in a JSON body, in addition to two per picture (one in its data URL, one after it)."""
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A JPEG marker. Within a scan, FF is followed by 00 or by a restart number."""


class Refused(Exception):
    """A request that is answered with an error.

    Attributes:
        status: the HTTP status. code: one word for programs. message: for people, without internal details of the host.
        closes: whether the connection ends with the answer, because the client may still be sending its request.
    """

    closes = False

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(status, code, message)
        self.status, self.code, self.message = status, code, message

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error"}.get(self.status, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind if self.status < 500 else "server_error", "code": self.code}
        }


@dataclass(frozen=True)
class Limits:
    """The maximum that a host accepts from one client.

    Attributes:
        body_bytes: per request. images: per request.
        pixels: per picture computed at its own size; None: four times the backbone's.
        body_seconds: time limit for a request's headers, and then for its body.
        answer_seconds: time after which a request that waits for the engine is answered 504.
        waiting: number of requests that may wait for the engine; others are answered 503 meanwhile.
        held_bytes: of the bodies and pictures of all requests at once. A request may hold as many as remain free
            afterwards; others are answered 503 meanwhile. None: 256 MiB, or twice `body_bytes` if that is more.
        decoded_bytes: of a request's pictures during decoding (`fastprompt.data.images.decoded_bytes`).
    """

    body_bytes: int = 8 * 2**20
    images: int = 32
    pixels: int | None = None
    body_seconds: float = 10.0
    answer_seconds: float = 30.0
    waiting: int = 128
    held_bytes: int | None = None
    decoded_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        for name in ("body_bytes", "images", "body_seconds", "answer_seconds", "waiting", "decoded_bytes"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Limits.{name} must be positive and finite, got {getattr(self, name)}")
        if self.held_bytes is not None and self.held_bytes < 2 * self.body_bytes:
            raise ValueError(
                f"Limits.held_bytes must be at least twice body_bytes, {2 * self.body_bytes}, got {self.held_bytes}"
            )
        if self.pixels is not None and self.pixels <= 0:
            raise ValueError(f"Limits.pixels must be positive or None, got {self.pixels}")

    def held(self) -> int:
        """`held_bytes`, or its default if None."""
        return max(256 * 2**20, 2 * self.body_bytes) if self.held_bytes is None else self.held_bytes


@dataclass(frozen=True)
class Catalogue:
    """What a host serves.

    Attributes:
        name: of the backbone. width: of its features. dtype: of its computation. adapters: class names by adapter.
        spec: the backbone's properties, among them the image sizes that it accepts.
        fixed: adapters that only accept images of the backbone's own size, whatever the backbone accepts.
        created: load time in seconds since 1970.
        preprocessing: how pictures are resized to the backbone's size, by adapter; "crop" for adapters without one.
        in_pixels: adapters whose prompts are pixels; they take pictures unresized.
        domains: of adapters that were trained on several data sets.
    """

    name: str
    fingerprint: str
    width: int
    dtype: str
    spec: ViTSpec
    adapters: Mapping[str, Sequence[str]]
    fixed: Collection[str] = ()
    created: int = 0
    preprocessing: Mapping[str, Preprocessing] = field(default_factory=dict)
    in_pixels: Collection[str] = ()
    domains: Mapping[str, Domains] = field(default_factory=dict)

    def models(self) -> dict[str, Any]:
        """Return the answer to `GET /v1/models`."""
        spec, owned = self.spec, {"created": self.created, "owned_by": "fastprompt"}
        backbone = {
            "id": self.name,
            "object": "model",
            **owned,
            "fingerprint": self.fingerprint,
            "width": self.width,
            "image_size": list(spec.image_size),
            "patch_size": spec.patch_size,
            "any_size": spec.dynamic_size,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "dtype": self.dtype,
        }
        adapters = [
            {
                "id": name,
                "object": "adapter",
                **owned,
                "class_names": list(names),
                **({"domains": list(self.domains[name].names)} if name in self.domains else {}),
                "any_size": spec.dynamic_size and name not in self.fixed,
            }
            for name, names in self.adapters.items()
        ]
        return {"object": "list", "data": [backbone, *adapters]}

    def sizes(self) -> str:
        """Describe the accepted picture sizes, for people."""
        spec = self.spec
        if not spec.dynamic_size:
            return f"{spec.image_size[0]} x {spec.image_size[1]} pixels (height x width)"
        if spec.dynamic_pad:
            return "any size"
        return f"any height and width that are multiples of {spec.patch_size} pixels"


@dataclass(frozen=True)
class Work:
    """The engine's work for one request.

    Attributes:
        pictures: uint8 (3, H, W) each. adapter: the adapter that computes them.
        warnings: what was not read as it stands, a sentence each; they are sent with the answer.
    """

    pictures: list[np.ndarray]
    adapter: str
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A parsed request: encoded pictures and the options of the request.

    `pixels` is "fit" (pictures of other sizes are resized) or "exact" (they are refused). `domain` is that of all
    pictures, for an adapter of several domains.
    """

    files: list[bytes]
    model: str | None
    encoding_format: str
    pixels: str = "fit"
    domain: str | None = None


class _Body(BaseModel):
    """The JSON of a request. `user` is part of OpenAI's API and has no effect."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input: str | list[str]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    pixels: Literal["fit", "exact"] | None = None
    domain: str | None = None
    user: str | None = None


def read_json(body: bytes, limits: Limits) -> Ask:
    """Parse a JSON request: {"input": data URL or list of them, "model", "encoding_format", "pixels", "domain": ...}.

    Raises:
        Refused: it is not such JSON, or an input is not a base64 data URL.
    """
    if body.count(b",") > COMMAS + 2 * limits.images:  # a value costs a hundred times its bytes, an error even more
        raise Refused(
            422, "invalid_request", f"body: has too many values; 'input' takes at most {limits.images} data URLs"
        )
    try:
        asked = _Body.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        problems = {f"{'.'.join(map(str, e['loc']))[:50] or 'body'}: {e['msg']}": None for e in errors}
        malformed = errors[0]["type"] == "json_invalid"
        raise Refused(
            400 if malformed else 422, "invalid_json" if malformed else "invalid_request", "; ".join(list(problems)[:5])
        ) from error
    inputs = [asked.input] if isinstance(asked.input, str) else asked.input
    check_count(len(inputs), limits)
    files = [_from_data_url(url, i) for i, url in enumerate(inputs)]
    return Ask(files, asked.model, asked.encoding_format or "float", asked.pixels or "fit", asked.domain)


_PART_EVENTS = (
    "on_part_begin",
    "on_header_field",
    "on_header_value",
    "on_header_end",
    "on_part_data",
    "on_part_end",
    "on_end",
)


class _Parts:
    """The parts that a form's parser has found: (name, value) of each, as bytes if it has a file name."""

    def __init__(self) -> None:
        self.fields: list[tuple[str, str | bytes]] = []
        self.complete = False
        self.on_part_begin()

    def on_part_begin(self) -> None:
        self._key, self._value, self._disposition, self._data = bytearray(), bytearray(), b"", bytearray()
        self._headers = 0

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._key += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        if self._headers + len(self._key) + len(self._value) > PART_HEADERS:
            raise ValueError("too long headers")

    def on_header_end(self) -> None:
        self._headers += len(self._key) + len(self._value)
        if self._key.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._key, self._value = bytearray(), bytearray()

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def on_part_end(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if b"name" not in options:
            raise ValueError("a part without a name")
        self.fields.append(
            (
                options[b"name"].decode(errors="replace"),
                bytes(self._data) if b"filename" in options else self._data.decode(),
            )
        )

    def on_end(self) -> None:
        self.complete = True


def form_fields(body: bytes, content_type: str) -> list[tuple[str, str | bytes]]:
    """Return (name, value) of each part of multipart/form-data, as text, or as bytes if the part has a file name.

    Raises:
        Refused: it is not such a form, is truncated, or has too many parts.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        raise Refused(400, "invalid_form", "Content-Type must name the boundary of the form's parts")
    if body.count(b"--" + boundary) > PARTS:
        raise Refused(422, "invalid_request", f"the form has more than {PARTS} parts")
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, {name: getattr(parts, name) for name in _PART_EVENTS})  # type: ignore[arg-type]
        for start in range(0, len(body), 2**16):
            parser.write(body[start : start + 2**16])
    except ValueError as error:  # includes the parser's own errors
        raise Refused(400, "invalid_form", "the body is no valid multipart/form-data in UTF-8") from error
    if not parts.complete:
        raise Refused(400, "invalid_form", "the form is cut off: its closing boundary is missing")
    return parts.fields


_OPTIONS = ("model", "encoding_format", "pixels", "domain", "user")


def read_form(fields: Sequence[tuple[str, str | bytes]], limits: Limits) -> Ask:
    """Parse the parts of multipart/form-data: `file` for each picture, and the options of `read_json`.

    Raises:
        Refused: a part has an unknown name, is repeated, or has an invalid value.
    """
    files: list[bytes] = []
    texts: dict[str, str] = {}
    for name, value in fields:
        if name == "file" and isinstance(value, bytes):
            files.append(value)
        elif name == "file":
            raise Refused(
                422,
                "invalid_request",
                "a part 'file' must have a file name, as filename=\"owl.png\" in its Content-Disposition",
            )
        elif (
            name in ("model", "encoding_format", "pixels", "domain", "user")
            and isinstance(value, str)
            and name not in texts
        ):
            texts[name] = value
        else:
            raise Refused(
                422,
                "invalid_request",
                f"part {name[:50]!r} is not taken: a form has a part 'file' for each picture, and at most one "
                "'model', 'encoding_format', 'pixels', 'domain' and 'user', without file names",
            )
    encoding_format = texts.get("encoding_format", "float")
    if encoding_format not in ("float", "base64"):
        raise Refused(
            422, "invalid_request", f"encoding_format must be 'float' or 'base64', got {encoding_format[:20]!r}"
        )
    pixels = texts.get("pixels", "fit")
    if pixels not in ("fit", "exact"):
        raise Refused(422, "invalid_request", f"pixels must be 'fit' or 'exact', got {pixels[:20]!r}")
    check_count(len(files), limits)
    return Ask(files, texts.get("model"), encoding_format, pixels, texts.get("domain"))


def check_count(images: int, limits: Limits) -> None:
    """Refuse a request without pictures or with too many."""
    if images == 0:
        raise Refused(422, "no_images", "the request has no picture")
    if images > limits.images:
        raise Refused(422, "too_many_images", f"the request has {images} pictures, at most {limits.images} are taken")


def _from_data_url(url: str, index: int) -> bytes:
    header, comma, data = url.partition(",")
    if not comma or header[:5].lower() != "data:" or not header.lower().endswith(";base64"):
        raise Refused(
            422,
            "invalid_url",
            f"input {index} must be a data URL, data:image/png;base64,...; the host fetches nothing from elsewhere",
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refused(422, "invalid_base64", f"input {index} is no valid base64: {error}") from error


def decode(
    ask: Ask, catalogue: Catalogue, limits: Limits, preprocessing: Preprocessing | None = None, sizes: str = "exact"
) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """Decode the pictures of a request to uint8 (3, H, W) each, at sizes that the backbone accepts.

    The second part are warnings, a sentence each: which pictures lose bits, and how deep grey ones are scaled.

    Args:
        preprocessing: how pictures are resized to the backbone's own size; None: the default.
        sizes: "exact" (other sizes are refused), "kept" (sizes that the backbone does not accept are resized), or "own"
            (all but the backbone's own are resized, as in `fastprompt predict`).

    Raises:
        Refused: a picture is damaged, has an unsupported format or size, or would take too much memory or work. In the
            last case it is refused before any work is done.
    """
    opened = [_opened(data, i, catalogue, limits, sizes) for i, data in enumerate(ask.files)]
    total = sum(cost for _, cost in opened)
    if total > limits.decoded_bytes:
        named = ", ".join(f"{image.height} x {image.width}" for image, _ in opened[:5])
        raise Refused(
            413,
            "too_many_pixels",
            f"the pictures ({named}{', ...' if len(opened) > 5 else ''} pixels) take {total} bytes to decode, at most "
            f"{limits.decoded_bytes} are taken for a request",
        )
    preprocessing = preprocessing or Preprocessing()
    found, warnings = [], []
    for i, (data, (image, _)) in enumerate(zip(ask.files, opened, strict=True)):
        with _refusing(i), image:
            if warning := images.depth_warning(image, preprocessing.intensity_range):
                warnings.append(f"image {i} {warning}")
            images.decode(data, image)
            whole = images.upright(image)
            found.append(_brought_to_size(whole, i, catalogue, limits, preprocessing, sizes))
    return found, tuple(warnings)


@contextlib.contextmanager
def _refusing(index: int) -> Iterator[None]:
    """Context that turns a decoder's exceptions into Refused errors about the picture."""
    try:
        yield
    except Refused:
        raise
    except Image.DecompressionBombError as error:
        raise Refused(413, "too_many_pixels", f"image {index} has too many pixels") from error
    except Image.UnidentifiedImageError as error:
        raise Refused(422, "not_an_image", f"image {index} is neither PNG, JPEG nor WebP") from error
    except Exception as error:  # crafted bytes can make a decoder raise anything
        raise Refused(422, "damaged_image", f"image {index} cannot be decoded") from error


def _opened(data: bytes, index: int, catalogue: Catalogue, limits: Limits, sizes: str) -> tuple[Image.Image, int]:
    """Open a picture, reading only its header; return it and the bytes needed to decode it, more for many scans."""
    _check_bytes(data, _most_pixels(catalogue, limits) if sizes == "exact" else limits.decoded_bytes // 4, index)
    with _refusing(index):
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if sizes == "exact":
            _check_size(image.height, image.width, index, catalogue, limits)
        _check_bytes(data, image.height * image.width, index)
        scans = jpeg_scans(data) if data.startswith(b"\xff\xd8") else 1
        if scans > SCANS:
            raise Refused(422, "too_many_scans", f"image {index} is a JPEG of more than {SCANS} scans")
        return image, images.decoded_bytes(image) * max(CHEAP_SCANS, scans) // CHEAP_SCANS


def jpeg_scans(data: bytes) -> int:
    """Return the number of scans of a JPEG up to its end marker; any number above `SCANS` returns `SCANS` + 1."""
    at, scans = 2, 0
    while scans <= SCANS and (marker := _MARKER.search(data, at)):
        kind, at = marker[1][0], marker.end()
        if kind == 0xD9:
            break
        scans += kind == 0xDA
        if kind not in (0x01, 0xD8):  # these markers have no length
            at += int.from_bytes(data[at : at + 2], "big")
    return scans


def _brought_to_size(
    image: Image.Image, index: int, catalogue: Catalogue, limits: Limits, preprocessing: Preprocessing, sizes: str
) -> np.ndarray:
    """Resize if needed; return the upright picture as uint8 (3, H, W)."""
    wrong = _wrong_size(image.height, image.width, index, catalogue, limits)
    if sizes == "exact" and wrong:
        raise wrong
    rgb = images.to_rgb(image, preprocessing.intensity_range)
    if sizes != "own" and not wrong:
        return np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1))
    size = catalogue.spec.image_size
    try:
        images.covering(rgb.width, rgb.height, size, preprocessing.resize)
    except ValueError as error:
        said = f"image {index} is {rgb.height} x {rgb.width} pixels, which is too long and thin to be cropped"
        raise Refused(422, "extreme_shape", said) from error
    return images.to_tensor(rgb, size, preprocessing.resize).numpy()


def _most_pixels(catalogue: Catalogue, limits: Limits) -> int:
    return limits.pixels or 4 * catalogue.spec.image_size[0] * catalogue.spec.image_size[1]


def _check_bytes(data: bytes, pixels: int, index: int) -> None:
    """Refuse a file that costs more to decode than a picture with that many pixels."""
    most = PIXEL_BYTES * pixels + METADATA
    if len(data) > most:
        raise Refused(
            413, "image_too_large", f"image {index} has {len(data)} bytes, at most {most} are taken for its size"
        )


def _check_size(height: int, width: int, index: int, catalogue: Catalogue, limits: Limits) -> None:
    if wrong := _wrong_size(height, width, index, catalogue, limits):
        raise wrong


def _wrong_size(height: int, width: int, index: int, catalogue: Catalogue, limits: Limits) -> Refused | None:
    """Return why a picture is not computed at its own size; None if it is."""
    if catalogue.spec.obstacle(height, width):
        return Refused(
            422,
            "wrong_size",
            f"image {index} is {height} x {width} pixels; as exact pixels this model takes {catalogue.sizes()}",
        )
    most = _most_pixels(catalogue, limits)
    if height * width > most:
        return Refused(
            413, "too_many_pixels", f"image {index} is {height} x {width} pixels, at most {most} in all are taken"
        )
    return None


def embeddings_work(ask: Ask, catalogue: Catalogue, limits: Limits) -> Work:
    """Parse a request for features of the backbone itself.

    Sizes that the backbone accepts are kept: clients that send prompts as pixels rely on this. Raises Refused if
    another model is requested, and in the cases that `decode` lists.
    """
    if ask.model not in (None, catalogue.name):
        raise Refused(
            404, "model_not_found", f"model {str(ask.model)[:100]!r} gives no embeddings here; {catalogue.name!r} does"
        )
    if ask.domain is not None:
        raise Refused(422, "invalid_request", "domain is taken for the classes of an adapter, not for embeddings")
    pictures, warnings = decode(ask, catalogue, limits, sizes="exact" if ask.pixels == "exact" else "kept")
    return Work(pictures, BASE, warnings)


def classify_work(ask: Ask, catalogue: Catalogue, limits: Limits) -> Work:
    """Parse a request for logits of an adapter.

    Pictures are preprocessed as the adapter's training images were. They stay as they are if the adapter's prompts are
    pixels, or if the request asks for exact pixels. Raises Refused if it names no adapter or one that is not served,
    and in the cases that `decode` lists.
    """
    if ask.model is None:
        raise Refused(422, "invalid_request", "model must name an adapter; GET /v1/models lists them")
    if ask.model not in catalogue.adapters:
        raise Refused(404, "model_not_found", f"there is no adapter {ask.model[:100]!r}; GET /v1/models lists them")
    _check_domain(ask, catalogue.domains.get(ask.model))
    if ask.model in catalogue.fixed:
        catalogue = replace(catalogue, spec=replace(catalogue.spec, dynamic_size=False))
    sizes = "exact" if ask.pixels == "exact" or ask.model in catalogue.in_pixels else "own"
    pictures, warnings = decode(ask, catalogue, limits, catalogue.preprocessing.get(ask.model), sizes)
    return Work(pictures, ask.model, warnings)


def _check_domain(ask: Ask, domains: Domains | None) -> None:
    """Refuse a domain that the adapter does not have, or its absence where each domain has a head of its own."""
    if domains is None and ask.domain is not None:
        raise Refused(422, "invalid_request", f"adapter {str(ask.model)[:100]!r} has no domains")
    if domains is not None and ask.domain not in (None, *domains.names):
        raise Refused(
            422, "invalid_request", f"domain must be one of {', '.join(domains.names)}, got {str(ask.domain)[:100]!r}"
        )
    if domains is not None and ask.domain is None and domains.labels == "per-domain":
        raise Refused(
            422,
            "invalid_request",
            f"domain must be given, one of {', '.join(domains.names)}: each has a head of its own",
        )


def embeddings_answer(ask: Ask, catalogue: Catalogue, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Format features (D,) of each picture as OpenAI's list of embeddings."""
    data = [
        {
            "object": "embedding",
            "index": i,
            "embedding": base64.b64encode(features.astype("<f4").tobytes()).decode()
            if ask.encoding_format == "base64"
            else features.tolist(),
        }
        for i, features in enumerate(outputs)
    ]
    return {"object": "list", "model": catalogue.name, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


def classify_answer(ask: Ask, catalogue: Catalogue, outputs: Sequence[np.ndarray]) -> dict[str, Any]:
    """Format logits (C,) of each picture: the most likely class, and the probabilities of the most likely ones.

    For an adapter of several domains, classes are those of the domain that the request gives. Otherwise the answer
    names the domain whose classes are most likely together, and classes are those of all.
    """
    names, data = catalogue.adapters[str(ask.model)], []
    domains = catalogue.domains.get(str(ask.model))
    for i, logits in enumerate(outputs):
        if domains is not None and ask.domain is not None:
            others = np.ones(len(logits), bool)
            others[list(domains.classes[domains.index(ask.domain)])] = False
            logits = np.where(others, -np.inf, logits)
        likely = np.exp(logits.astype(np.float64) - logits.max())
        likely /= likely.sum()
        order = [label for label in np.argsort(-likely, kind="stable") if np.isfinite(logits[label])]
        best = [int(label) for label in order[:MAX_RETURNED_CLASSES]]
        of_domain = {} if domains is None else {"domain": ask.domain or domains.likeliest(likely.tolist())}
        data.append(
            {
                "index": i,
                **of_domain,
                "label": best[0],
                "class": names[best[0]],
                "probabilities": [
                    {"label": label, "class": names[label], "probability": float(likely[label])} for label in best
                ],
            }
        )
    return {"object": "list", "model": ask.model, "data": data}
