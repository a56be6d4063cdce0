"""Requests to pictures, outputs to answers, and everything that is refused before a pixel is decoded."""

from __future__ import annotations

import base64
import io
import json
import pickle
import resource
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import fastprompt as fp
from fastprompt.adapters import Preprocessing
from fastprompt.data.files import read_images
from fastprompt.domains import Domains
from fastprompt.serve import protocol
from fastprompt.serve.protocol import Ask, Catalogue, Limits, Refused
from fastprompt.vit.weights import ViTSpec

SPEC = ViTSpec("vit", (32, 32), (4, 4), 8, 3, True, 0, "cls", mean=(0.5, 0.5, 0.5))
CATALOGUE = Catalogue("vit", "f" * 64, 48, "float32", SPEC, {"birds": ["owl", "tit", "jay"]})
Picture = Callable[..., bytes]


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def decode(
    *files: bytes,
    catalogue: Catalogue = CATALOGUE,
    preprocessing: Preprocessing | None = None,
    sizes: str = "exact",
    **limits: Any,
) -> list[np.ndarray]:
    return protocol.decode(Ask(list(files), None, "float"), catalogue, Limits(**limits), preprocessing, sizes)[0]


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it has width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("format", "mode"),
    [("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("WEBP", "RGB")],
)
def test_pictures_are_decoded_to_their_pixels(picture: Picture, format: str, mode: str) -> None:
    data = picture(format=format, mode=mode)
    [found] = decode(data)
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((3, 32, 32), np.uint8, True)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1)
    np.testing.assert_array_equal(found, expected)


def test_exact_pixels_are_not_resized(picture: Picture) -> None:
    with pytest.raises(Refused, match=r"image 1 is 40 x 32 pixels; .* takes 32 x 32 pixels") as caught:
        decode(picture(), picture(height=40))
    assert (caught.value.status, caught.value.code) == (422, "wrong_size")
    anything = replace(CATALOGUE, spec=replace(SPEC, dynamic_size=True))
    assert [p.shape for p in decode(picture(), picture(height=40), catalogue=anything)] == [(3, 32, 32), (3, 40, 32)]
    with pytest.raises(Refused, match="any height and width that are multiples of 8 pixels"):
        decode(picture(height=36), catalogue=anything)
    with pytest.raises(Refused, match="at most 4096 in all") as caught:
        decode(picture(height=64, width=72), catalogue=anything)
    assert caught.value.status == 413
    with pytest.raises(Refused, match="at most 1000 in all"):
        decode(picture(), catalogue=anything, pixels=1000)


PHOTOS: dict[str, dict[str, Any]] = {
    "jpeg": {"format": "JPEG"},
    "progressive": {"format": "JPEG", "progressive": True},
    "turned": {"format": "JPEG", "orientation": 6},
    "cmyk": {"format": "JPEG", "mode": "CMYK"},
    "grey": {"format": "PNG", "mode": "L"},
    "sixteen": {"format": "PNG", "mode": "I;16"},
    "transparent": {"format": "PNG", "mode": "RGBA"},
    "palette": {"format": "PNG", "mode": "P"},
    "webp": {"format": "WEBP", "lossless": True},
    "small": {"format": "PNG", "height": 9, "width": 7},
    "wide": {"format": "PNG", "height": 20, "width": 300},
}


def photo(picture: Picture, options: dict[str, Any]) -> bytes:
    options = {"height": 77, "width": 45, **options}
    if options.get("mode") == "I;16":
        levels = np.random.default_rng(0).integers(0, 65536, (options["height"], options["width"]), np.uint16)
        stream = io.BytesIO()
        Image.fromarray(levels).save(stream, "PNG")
        return stream.getvalue()
    if "orientation" in options:
        exif = Image.Exif()
        exif[0x0112] = options.pop("orientation")
        options["exif"] = exif
    return picture(**options)


@pytest.mark.parametrize("kind", PHOTOS)
@pytest.mark.parametrize(
    "preprocessing", [Preprocessing(), Preprocessing("squash"), Preprocessing("crop", (1000.0, 30000.0))]
)
@pytest.mark.filterwarnings("ignore:.*grey image")
def test_photos_become_the_pixels_that_predict_reads(
    picture: Picture, tmp_path: Path, kind: str, preprocessing: Preprocessing
) -> None:
    data = photo(picture, PHOTOS[kind])
    (tmp_path / "photo").write_bytes(data)
    expected, _ = read_images(
        tmp_path / "photo", 32, resize=preprocessing.resize, intensity_range=preprocessing.intensity_range
    )
    catalogue = replace(CATALOGUE, preprocessing={"birds": preprocessing})
    work = protocol.classify_work(Ask([data], "birds", "float"), catalogue, Limits())
    np.testing.assert_array_equal(work.pictures, expected.numpy())
    if preprocessing == Preprocessing():
        work = protocol.embeddings_work(Ask([data], None, "float"), CATALOGUE, Limits())
        np.testing.assert_array_equal(work.pictures, expected.numpy())


def test_which_sizes_are_kept(picture: Picture) -> None:
    """Embeddings keep what the backbone takes, for clients that send prompts as pixels; adapters get their own size."""
    anything = replace(CATALOGUE, spec=replace(SPEC, dynamic_size=True), adapters={"birds": ["a"], "rgb": ["a"]})
    pixels = replace(anything, in_pixels=["rgb"])
    tall, odd, large = picture(height=40), picture(height=36), picture(height=64, width=72)

    def shape(work: Any, data: bytes, **asked: Any) -> tuple[int, ...]:
        ask = Ask([data], asked.get("model"), "float", asked.get("pixels", "fit"))
        return work(ask, pixels, Limits()).pictures[0].shape[1:]

    embeddings, classify = protocol.embeddings_work, protocol.classify_work
    assert [shape(embeddings, data) for data in (tall, odd, large)] == [(40, 32), (32, 32), (32, 32)]
    assert [shape(classify, data, model="birds") for data in (tall, odd, large)] == [(32, 32)] * 3
    assert shape(embeddings, tall, pixels="exact") == shape(classify, tall, model="birds", pixels="exact") == (40, 32)
    assert shape(classify, tall, model="rgb") == (40, 32)
    for options in ({"pixels": "exact"}, {"pixels": "exact", "model": "birds"}, {"model": "rgb"}):
        for data, code in ((odd, "wrong_size"), (large, "too_many_pixels")):
            with pytest.raises(Refused) as caught:
                shape(classify if "model" in options else embeddings, data, **options)
            assert caught.value.code == code
    with pytest.raises(Refused, match="too long and thin") as caught:
        shape(classify, picture(height=3, width=100_000, mode="1"), model="birds")
    assert (caught.value.status, caught.value.code) == (422, "extreme_shape")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_are_limited_by_what_they_take_decoded(picture: Picture) -> None:
    """Before anything is decoded, which would find these files damaged: one picture, and all of a request together."""
    for files in ([bomb(13000, 13000)], [bomb(6000, 6000)] * 2, [picture(), *[bomb(2000, 2000)] * 31]):
        with pytest.raises(Refused) as caught:
            decode(*files, sizes="own")
        assert (caught.value.status, caught.value.code) == (413, "too_many_pixels")
    whole = picture(height=100, width=100)
    assert decode(whole, sizes="own", decoded_bytes=40_000)[0].shape == (3, 32, 32)
    with pytest.raises(Refused, match="take 40000 bytes to decode, at most 39999"):
        decode(whole, sizes="own", decoded_bytes=39_999)
    with pytest.raises(Refused, match=r"\(100 x 100, 100 x 100 pixels\) take 80000 bytes"):
        decode(whole, whole, sizes="own", decoded_bytes=79_999)
    transparent = picture(height=100, width=100, mode="RGBA")
    with pytest.raises(Refused, match="take 80000 bytes"):
        decode(transparent, sizes="own", decoded_bytes=79_999)


def test_scans_of_a_jpeg_are_counted_in_the_picture_alone(picture: Picture) -> None:
    plain = picture(format="JPEG", height=100, width=100)
    progressive = picture(format="JPEG", height=100, width=100, progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert protocol.jpeg_scans(plain) == 1
    assert 5 < protocol.jpeg_scans(progressive) <= protocol.CHEAP_SCANS
    assert protocol.jpeg_scans(plain + b"\xff\xda" * 1000) == 1  # as phones append films
    commented = plain[:2] + b"\xff\xfe\x00\x0a" + b"\xff\xda" * 4 + plain[2:]
    assert protocol.jpeg_scans(commented) == 1
    many = progressive[:-2] + scan * 50 + progressive[-2:]
    assert protocol.jpeg_scans(many) == protocol.jpeg_scans(progressive) + 50
    assert protocol.jpeg_scans(progressive[:-2] + scan * 5000) == protocol.SCANS + 1
    assert decode(plain + b"\xff\xda" * 1000, sizes="own")[0].shape == (3, 32, 32)
    with pytest.raises(Refused, match="bytes to decode"):  # each scan goes over all pixels
        decode(many, sizes="own", decoded_bytes=5 * 40_000)


def test_a_picture_turned_by_its_exif_has_to_fit_upright(picture: Picture) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    anything = replace(CATALOGUE, spec=replace(SPEC, dynamic_size=True))
    assert [p.shape for p in decode(picture(height=40, exif=exif), catalogue=anything)] == [(3, 32, 40)]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("pad", [False, True])
def test_what_is_refused_is_what_the_backbone_refuses(
    randomised: Callable[..., nn.Module], dynamic: bool, pad: bool
) -> None:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=1,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=dynamic,
        dynamic_img_pad=pad,
    )
    backbone = fp.FrozenViT(randomised(vit))
    for size in ((32, 32), (40, 32), (32, 33), (8, 8), (36, 32)):
        refused = bool(backbone.spec.obstacle(*size))
        if refused:
            with pytest.raises(ValueError, match="images must"):
                backbone(torch.zeros(1, 3, *size))
        else:
            backbone(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 422, "not_an_image"),
        (b"hello", 422, "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 40, 422, "damaged_image"),
        (bomb(60000, 60000), 413, "too_many_pixels"),
        (bomb(12000, 12000), 422, "wrong_size"),
        (bomb(32, 32), 422, "damaged_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg' width='32' height='32'/>", 422, "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", 422, "not_an_image"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_pictures_are_refused(data: bytes, status: int, code: str) -> None:
    with pytest.raises(Refused) as caught:
        decode(data)
    assert (caught.value.status, caught.value.code) == (status, code)


def test_pictures_that_cost_more_than_their_pixels_are_refused(picture: Picture) -> None:
    progressive = picture(format="JPEG", progressive=True, quality=95)
    assert decode(progressive)[0].shape == (3, 32, 32)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    png, chunk = picture(), struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt"))
    for data, status, code in [
        (progressive[:-2] + scan * 40_000, 413, "image_too_large"),
        (progressive[:-2] + scan * 200 + progressive[-2:], 422, "too_many_scans"),
        (png[:33] + chunk * 30_000 + png[33:], 413, "image_too_large"),
        (png[:33] + chunk * 600_000 + png[33:], 413, "image_too_large"),
    ]:
        began = time.process_time()
        with pytest.raises(Refused) as caught:
            decode(data)
        assert (caught.value.status, caught.value.code) == (status, code)
        assert time.process_time() - began < 0.2
    assert decode(png[:33] + chunk * 1000 + png[33:])[0].shape == (3, 32, 32)
    assert decode(picture(format="PNG", mode="RGBA", compress_level=0))[0].shape == (3, 32, 32)
    assert decode(picture(format="JPEG", quality=100, icc_profile=bytes(200_000)))[0].shape == (3, 32, 32)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "BMP", "PPM"])
def test_other_kinds_of_pictures_are_refused_whatever_they_are_called(picture: Picture, format: str) -> None:
    with pytest.raises(Refused, match="neither PNG, JPEG nor WebP"):
        decode(picture(format=format))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_torn_and_flipped_pictures_are_refused_or_decoded_but_never_fail(picture: Picture, format: str) -> None:
    whole = picture(format=format)
    with pytest.raises(Refused):
        decode(whole[: len(whole) // 2])
    random, refused = np.random.default_rng(0), []
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[random.integers(0, len(whole), 3)] ^= random.integers(1, 256, 3, np.uint8)
        try:
            assert decode(damaged.tobytes())[0].shape == (3, 32, 32)
        except Refused as error:
            refused.append(error.status)
    assert refused
    assert set(refused) <= {413, 422}


def test_json_requests(picture: Picture) -> None:
    one, two = picture(0), picture(1, format="JPEG")
    ask = protocol.read_json(json.dumps({"input": url(one)}).encode(), Limits())
    assert ask == Ask([one], None, "float")
    body = {"input": [url(one), url(two, "jpeg")], "model": "m", "encoding_format": "base64", "user": "u"}
    assert protocol.read_json(json.dumps(body).encode(), Limits()) == Ask([one, two], "m", "base64")
    exact = {"input": url(one), "pixels": "exact"}
    assert protocol.read_json(json.dumps(exact).encode(), Limits()) == Ask([one], None, "float", "exact")


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "EOF"),
        (b"{", 400, "EOF"),
        (b"\xff\xfe", 400, ""),
        (b"[" * 100_000, 400, "recursion"),
        (b"[]", 422, "body: "),
        (b"{}", 422, "input: Field required"),
        (b'{"input": 3}', 422, "input"),
        (b'{"input": [1, 2]}', 422, "input"),
        (b'{"input": []}', 422, "no picture"),
        (b'{"input": "", "dimensions": 3}', 422, "dimensions: Extra"),
        (b'{"input": "", "encoding_format": "int8"}', 422, "encoding_format"),
        (b'{"input": "", "pixels": "some"}', 422, "pixels"),
        (b'{"input": "", "model": 7}', 422, "model"),
        (b'{"input": "cat.png"}', 422, "input 0 must be a data URL"),
        (b'{"input": "http://169.254.169.254/latest"}', 422, "fetches nothing"),
        (b'{"input": "file:///etc/passwd"}', 422, "fetches nothing"),
        (b'{"input": "data:image/png,abc"}', 422, "input 0 must be a data URL"),
        (b'{"input": ["data:image/png;base64,@@@@"]}', 422, "input 0 is no valid base64"),
        (b'{"input": ["data:image/png;base64,abc"]}', 422, "input 0 is no valid base64"),
        (json.dumps({"input": ["data:,"] * 33}).encode(), 422, "has 33 pictures, at most 32"),
    ],
)
def test_wrong_json_is_refused(body: bytes, status: int, message: str) -> None:
    with pytest.raises(Refused) as caught:
        protocol.read_json(body, Limits())
    assert caught.value.status == status
    assert message in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize(
    "body",
    [
        b'{"input":[' + b"0," * 500_000 + b"0]}",
        b'{"input":[' + b"[]," * 2_000_000 + b"0]}",
        b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}",
        b'{"' + b"k" * 4_000_000 + b'":0}',
    ],
)
def test_bodies_of_many_values_cost_little(body: bytes) -> None:
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused) as caught:
        protocol.read_json(body, Limits())
    assert caught.value.status == 422
    assert len(caught.value.message) < 500
    assert time.process_time() - began < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_nulls_and_schemes_of_json_are_taken_as_the_standards_have_them(picture: Picture) -> None:
    body = {
        "input": url(picture()).replace("data:", "DATA:").replace(";base64", ";BASE64"),
        "encoding_format": None,
        "user": None,
        "model": None,
    }
    assert protocol.read_json(json.dumps(body).encode(), Limits()) == Ask([picture()], None, "float")


def test_forms() -> None:
    fields: list[tuple[str, str | bytes]] = [("file", b"1"), ("model", "m"), ("file", b"2")]
    assert protocol.read_form(fields, Limits()) == Ask([b"1", b"2"], "m", "float")
    for extra, message in [
        (("file", "text"), "'file' must have a file name"),
        (("model", "again"), "part 'model'"),
        (("input", b"3"), "part 'input'"),
        (("model", b"3"), "part 'model'"),
        (("encoding_format", "hex"), "encoding_format must be"),
        (("pixels", "some"), "pixels must be 'fit' or 'exact', got 'some'"),
    ]:
        with pytest.raises(Refused) as caught:
            protocol.read_form([*fields, extra], Limits())
        assert message in caught.value.message
    assert protocol.read_form([*fields, ("pixels", "exact")], Limits()).pixels == "exact"
    with pytest.raises(Refused, match="no picture"):
        protocol.read_form([("model", "m")], Limits())
    with pytest.raises(Refused, match="at most 1 are"):
        protocol.read_form(fields, Limits(images=1))


def test_models_are_found_by_name(picture: Picture) -> None:
    for model in (None, "vit"):
        work = protocol.embeddings_work(Ask([picture()], model, "float"), CATALOGUE, Limits())
        assert work.adapter == "__base__"
    assert protocol.classify_work(Ask([picture()], "birds", "float"), CATALOGUE, Limits()).adapter == "birds"
    for model, status in ((None, 422), ("vit", 404), ("__base__", 404)):
        with pytest.raises(Refused) as caught:
            protocol.classify_work(Ask([], model, "float"), CATALOGUE, Limits())
        assert caught.value.status == status
    with pytest.raises(Refused, match="'birds' gives no embeddings here; 'vit' does"):
        protocol.embeddings_work(Ask([], "birds", "float"), CATALOGUE, Limits())


def test_answers() -> None:
    features = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    for form in ("float", "base64"):
        answer = protocol.embeddings_answer(Ask([], None, form), CATALOGUE, list(features))
        assert (answer["object"], answer["model"]) == ("list", "vit")
        assert answer["usage"] == {"prompt_tokens": 0, "total_tokens": 0}
        assert [(d["object"], d["index"]) for d in answer["data"]] == [("embedding", 0), ("embedding", 1)]
        got = [d["embedding"] for d in answer["data"]]
        found = np.array(got) if form == "float" else np.stack([np.frombuffer(base64.b64decode(g), "<f4") for g in got])
        np.testing.assert_array_equal(found.astype(np.float32), features)
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    [found] = protocol.classify_answer(Ask([], "birds", "float"), CATALOGUE, [logits])["data"]
    assert (found["index"], found["label"], found["class"]) == (0, 1, "tit")
    assert [p["class"] for p in found["probabilities"]] == ["tit", "jay", "owl"]
    expected = torch.from_numpy(logits).double().softmax(0)[[1, 2, 0]].tolist()
    assert [p["probability"] for p in found["probabilities"]] == pytest.approx(expected)


def test_models_say_what_clients_need() -> None:
    backbone, adapter = CATALOGUE.models()["data"]
    owned = {"created": 0, "owned_by": "fastprompt"}
    assert backbone == {
        "id": "vit",
        "object": "model",
        **owned,
        "fingerprint": "f" * 64,
        "width": 48,
        "image_size": [32, 32],
        "patch_size": 8,
        "any_size": False,
        "mean": [0.5] * 3,
        "std": [0.229, 0.224, 0.225],
        "dtype": "float32",
    }
    assert adapter == {
        "id": "birds",
        "object": "adapter",
        **owned,
        "class_names": ["owl", "tit", "jay"],
        "any_size": False,
    }


def test_limits_are_checked_and_errors_travel() -> None:
    for name in ("body_bytes", "images", "pixels", "body_seconds", "answer_seconds", "waiting", "decoded_bytes"):
        with pytest.raises(ValueError, match=f"Limits.{name} must be positive"):
            Limits(**{name: 0})
    for name in ("body_seconds", "answer_seconds"):
        for value in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"Limits.{name} must be positive and finite, got {value}"):
                Limits(**{name: value})
    for held in (0, 2**24 - 1):
        with pytest.raises(
            ValueError, match=f"Limits.held_bytes must be at least twice body_bytes, 16777216, got {held}"
        ):
            Limits(held_bytes=held)
    assert Limits().held() == 2**28
    assert Limits(body_bytes=2**28).held() == 2**29
    assert Limits(held_bytes=2**24).held() == 2**24
    error = pickle.loads(pickle.dumps(Refused(413, "body_too_large", "too much")))
    assert error.body() == {"error": {"message": "too much", "type": "invalid_request_error", "code": "body_too_large"}}
    assert Refused(401, "x", "y").body()["error"]["type"] == "authentication_error"
    assert Refused(500, "x", "y").body()["error"]["type"] == "server_error"


TWO = replace(CATALOGUE, domains={"birds": Domains(("field", "lake"), ((0, 1), (1, 2)))})
HEADS = replace(CATALOGUE, domains={"birds": Domains(("field", "lake"), ((0, 1), (2,)), "per-domain")})


def test_a_domain_limits_the_classes(picture: Picture) -> None:
    logits = np.array([2.0, 1.0, 3.0], np.float32)
    [found] = protocol.classify_answer(Ask([], "birds", "float", "fit", "field"), TWO, [logits])["data"]
    assert (found["domain"], found["class"]) == ("field", "owl")
    assert [each["class"] for each in found["probabilities"]] == ["owl", "tit"]
    assert sum(each["probability"] for each in found["probabilities"]) == pytest.approx(1)
    [inferred] = protocol.classify_answer(Ask([], "birds", "float"), TWO, [logits])["data"]
    assert (inferred["domain"], inferred["class"]) == ("lake", "jay")
    assert len(inferred["probabilities"]) == 3
    [plain] = protocol.classify_answer(Ask([], "birds", "float"), CATALOGUE, [logits])["data"]
    assert "domain" not in plain
    assert TWO.models()["data"][1]["domains"] == ["field", "lake"]


@pytest.mark.parametrize(
    ("catalogue", "domain", "message"),
    [
        (TWO, "sea", "domain must be one of field, lake, got 'sea'"),
        (HEADS, None, "domain must be given, one of field, lake: each has a head of its own"),
        (CATALOGUE, "field", "adapter 'birds' has no domains"),
    ],
)
def test_domains_that_do_not_fit_are_refused(
    catalogue: Catalogue, domain: str | None, message: str, picture: Picture
) -> None:
    ask = Ask([picture()], "birds", "float", "fit", domain)
    with pytest.raises(Refused, match=message) as caught:
        protocol.classify_work(ask, catalogue, Limits())
    assert caught.value.status == 422
    with pytest.raises(Refused, match="not for embeddings"):
        protocol.embeddings_work(Ask([picture()], None, "float", "fit", "field"), TWO, Limits())
    assert protocol.classify_work(Ask([picture()], "birds", "float", "fit", "field"), HEADS, Limits()).pictures


def test_requests_carry_a_domain(picture: Picture) -> None:
    body = json.dumps({"input": url(picture()), "model": "birds", "domain": "lake"}).encode()
    assert protocol.read_json(body, Limits()).domain == "lake"
    assert protocol.read_form([("file", picture()), ("domain", "lake")], Limits()).domain == "lake"
