from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import fastprompt as fp
from fastprompt.pixels.export import export_client
from fastprompt_client import Client, HostError, HostMismatch


def jpeg(quality: int, **options: Any) -> Callable[[Image.Image], Image.Image]:
    def change(picture: Image.Image) -> Image.Image:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=quality, **options)
        return Image.open(stream).convert("RGB")

    return change


def swapped(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.asarray(picture)[:, :, ::-1].copy())


def gif(picture: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    picture.save(stream, "GIF")
    return Image.open(stream).convert("RGB")


def imagenet(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (pixels / 255 - mean) / std


def test_client_and_host_together_are_the_model(model: fp.PromptedViT, host: Any, tmp_path: Path) -> None:
    export_client(model, tmp_path)
    client = Client(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = model.backbone  # the same prediction as the model that training validated
        pictures = fp.RGBPrompts(model).pictures(torch.from_numpy(images).permute(0, 3, 1, 2))
        from fastprompt.pixels.export import host_features

        features = torch.stack([host_features(expected, expected.normalise(p[None]), "cls") for p in pictures])
        logits = model.head(features)
    found = client.classify(client.embed(host.url, list(images)))
    for prediction, row in zip(found, logits.softmax(-1), strict=True):
        assert prediction.name == "abc"[int(row.argmax())]
        np.testing.assert_allclose(prediction.probabilities, row.numpy(), atol=5e-3)
        assert prediction.probability == prediction.probabilities.max()
    assert len({prediction.name for prediction in found}) > 1


def test_what_is_deployed_is_what_training_saw(extend: fp.PromptedViT, host: Any, folder: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = extend(torch.from_numpy(images).permute(0, 3, 1, 2)).argmax(-1)
    client = Client(folder)
    assert [client.predict(host.url, image).name for image in images] == ["abc"[i] for i in expected]


def test_an_image_is_squashed_where_training_squashed_it(
    extend: fp.PromptedViT, tmp_path: Path, photo: np.ndarray
) -> None:
    from fastprompt.data.images import to_tensor

    for resize in ("crop", "squash"):
        manifest = export_client(extend, tmp_path / resize, resize=resize)
        assert manifest["preprocessing"]["resize"] == resize
        trained = to_tensor(Image.fromarray(photo), (32, 32), resize).permute(1, 2, 0).numpy()
        assert np.abs(Client(tmp_path / resize).picture(photo)[:32].astype(int) - trained).max() <= 1
    assert np.abs(Client(tmp_path / "crop").picture(photo)[:32].astype(int) - trained).max() > 1


def test_the_right_host_is_verified_once(folder: Path, host: Any, photo: np.ndarray) -> None:
    client = Client(folder)
    found = client.verify(host.url)
    assert found.ok
    assert found.cosine > 0.99999
    assert found.likely is None
    assert "is right" in found.message
    sent = len(host.requests)
    for url in (host.url, host.url + "/", host.url + "/v1", host.url + "/v1/embeddings"):
        assert client.predict(url, photo).name in "abc"
    assert [path for path, _, _ in host.requests[sent:]] == ["/v1/embeddings"] * 4
    assert all(body["model"] == "tiny" for path, _, body in host.requests if path == "/v1/embeddings")


BROKEN = {
    "jpeg 85": ({"change": jpeg(85)}, "JPEG compression"),
    "jpeg 95": ({"change": jpeg(95)}, "JPEG compression"),
    "jpeg 97, 4:4:4": ({"change": jpeg(97, subsampling=0)}, "JPEG compression"),
    "jpeg 80, 4:4:4": ({"change": jpeg(80, subsampling=0)}, "JPEG compression"),
    "jpeg 40": ({"change": jpeg(40)}, "JPEG compression"),
    "squeezed": ({"change": lambda p: p.resize((32, 32), Image.Resampling.BICUBIC)}, "resizing"),
    "squeezed, bilinear": ({"change": lambda p: p.resize((32, 32), Image.Resampling.BILINEAR)}, "resizing"),
    "half and back": ({"change": lambda p: p.resize((16, 20)).resize(p.size)}, "resizing"),
    "middle": ({"change": lambda p: p.crop((0, 4, 32, 36))}, "cropping"),
    "resized and cropped": (
        {"change": lambda p: p.resize((37, 46), Image.Resampling.BICUBIC).crop((2, 7, 34, 39))},
        "resizing and cropping",
    ),
    "a fifth cut off": (
        {"change": lambda p: p.resize((40, 50), Image.Resampling.BICUBIC).crop((4, 9, 36, 41))},
        "resizing and cropping",
    ),
    "lowest rows": ({"change": lambda p: p.crop((0, 8, 32, 40))}, "cropping"),
    "bgr": ({"change": swapped}, "blue and red swapped (BGR)"),
    "mirrored": ({"change": ImageOps.mirror}, "mirroring"),
    "grey": ({"change": lambda p: p.convert("L").convert("RGB")}, "no colours"),
    "gif": ({"change": gif}, "few colours"),
    "imagenet": ({"normalise": imagenet}, "other mean and standard deviation"),
    "not normalised": ({"normalise": lambda pixels: pixels / 255}, "other mean and standard deviation"),
    "mean of patches": ({"readout": "patches"}, "another readout"),
    "normalised": ({"finish": lambda v: v / np.linalg.norm(v)}, "scaled embeddings"),
    "random answers": ({"finish": lambda v: np.random.default_rng(0).normal(size=v.shape)}, "another model"),
    "narrower": ({"finish": lambda v: v[:32]}, "another model"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_broken_host_is_refused_by_name(folder: Path, host: Any, photo: np.ndarray, kind: str) -> None:
    changes, likely = BROKEN[kind]
    for name, value in changes.items():
        setattr(host, name, value)
    client = Client(folder)
    found = client.check(host.url)
    assert not found.ok
    assert found.likely == likely, found.message
    with pytest.raises(HostMismatch, match="refused"):
        client.verify(host.url)
    sent = len(host.requests)
    with pytest.raises(HostMismatch, match="Likely: "):
        client.predict(host.url, photo)
    pictures = [body["input"] for path, _, body in host.requests[sent:] if path == "/v1/embeddings"]
    assert len(pictures) == 1  # the golden one; the photo was not sent


UNKNOWN = {
    "jpeg 88, 4:4:4": jpeg(88, subsampling=0),
    "jpeg 20, 4:4:4": jpeg(20, subsampling=0),
    "moved by a pixel": lambda p: Image.fromarray(np.roll(np.asarray(p), 1, 1)),
    "sixteen levels": lambda p: Image.fromarray(np.asarray(p) // 16 * 16),
}


@pytest.mark.parametrize("kind", list(UNKNOWN))
def test_a_mistake_that_none_resembles_is_not_named(folder: Path, host: Any, kind: str) -> None:
    host.change = UNKNOWN[kind]
    found = Client(folder).check(host.url)
    assert not found.ok
    assert found.likely is None, found.message
    assert "Likely: unknown" in found.message
    assert "The nearest is " in found.message


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_host_in_another_format_is_right(
    model: fp.PromptedViT, host: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    manifest = export_client(model, tmp_path)
    host.backbone = copy.deepcopy(model.backbone).to(dtype)
    host.normalise = host.backbone.normalise
    found = Client(tmp_path).verify(host.url)
    assert 1 - found.cosine <= (1 - manifest["golden"]["threshold"]) / 3 + 1e-6


def test_a_model_exported_in_bfloat16_knows_a_host_in_float32(
    extend: fp.PromptedViT, host: Any, tmp_path: Path
) -> None:
    model = copy.deepcopy(extend)
    model.set_backbone_dtype(torch.bfloat16)
    export_client(model, tmp_path)
    assert Client(tmp_path).verify(host.url).ok


def test_another_model_is_refused_and_its_fingerprint_is_shown(
    folder: Path, host: Any, other_backbone: Callable[..., Any]
) -> None:
    host.backbone = other_backbone(seed=5)
    host.normalise = host.backbone.normalise
    found = Client(folder).check(host.url)
    assert not found.ok
    assert found.likely == "another model"
    assert host.backbone.fingerprint[:12] in found.message


def test_a_host_that_breaks_later_is_refused_at_the_next_verify(folder: Path, host: Any, photo: np.ndarray) -> None:
    client = Client(folder)
    client.predict(host.url, photo)
    host.change = jpeg(80)
    client.predict(host.url, photo)
    with pytest.raises(HostMismatch):
        client.verify(host.url)
    with pytest.raises(HostMismatch):
        client.predict(host.url, photo)
    host.change = lambda picture: picture
    client.predict(host.url, photo)


def test_the_model_with_the_fingerprint_is_asked_for(folder: Path, host: Any) -> None:
    entry = host.listing()["data"][0]
    host.models = [{**entry, "id": "first", "fingerprint": "0"}, {**entry, "id": "second"}]
    Client(folder).verify(host.url)
    assert host.requests[-1][2]["model"] == "second"
    Client(folder, model="mine").verify(host.url)
    assert host.requests[-1][2]["model"] == "mine"
    host.models = []
    Client(folder).verify(host.url)
    assert "model" not in host.requests[-1][2]


def test_the_only_model_is_asked_for(folder: Path, host: Any) -> None:
    for models, expected in (
        ([{"id": "one", "object": "model"}], "one"),
        ([{"id": "one"}, {"id": 3}], "one"),
        ([{"id": "one", "object": "model"}, {"id": "birds", "object": "adapter"}], "one"),
        ([{"id": "one", "object": "model"}, {"id": "two", "object": "model"}], None),
        ([{"id": "birds", "object": "adapter"}], None),
    ):
        host.models = models
        Client(folder).verify(host.url)
        assert host.requests[-1][2].get("model") == expected


def test_the_key_is_sent(folder: Path, host: Any) -> None:
    host.key = "secret"
    with pytest.raises(HostError, match="answered 401: wrong key"):
        Client(folder).verify(host.url)
    assert Client(folder, api_key="secret").verify(host.url).ok


def test_a_length_that_does_not_matter_is_accepted(backbone: fp.FrozenViT, host: Any, tmp_path: Path) -> None:
    config = fp.RGBPGNConfig(num_prompts=4, library_size=12, widths=(4, 8))
    model = fp.PromptedViT(backbone, config, 3, "text", class_embeddings=torch.randn(3, 48))
    export_client(model, tmp_path)
    host.finish = lambda v: v / np.linalg.norm(v)
    assert Client(tmp_path).verify(host.url).ok


def test_many_images_go_in_several_requests(folder: Path, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images = list(np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    client = Client(folder)
    together = client.embed(host.url, images)
    assert [len(body["input"]) for _, _, body in host.requests] == [16, 4]
    monkeypatch.setattr("fastprompt_client.client.BYTES_PER_CALL", 3 * len(client.png(images[0])) + 200)
    np.testing.assert_array_equal(client.embed(host.url, images[:7]), together[:7])
    assert [len(body["input"]) for _, _, body in host.requests[2:]] == [3, 3, 1]
    np.testing.assert_array_equal(together[17], client.embed(host.url, images[17])[0])


def heads(backbone: fp.FrozenViT) -> dict[str, Any]:
    """Every head, one with a projection, one with an MLP."""
    texts, layers = torch.randn(3, 10), [(torch.randn(20, 48), torch.randn(20)), (torch.randn(10, 20), None)]
    projection = torch.nn.Linear(48, 10)
    with_projection = fp.FrozenViT(backbone_with(projection))
    return {
        "linear": (backbone, {"num_classes": 3}),
        "text": (with_projection, {"num_classes": 3, "head": "text", "class_embeddings": texts, "logit_scale": 7.0}),
        "label_map": (with_projection, {"num_classes": 3, "head": "label_map"}),
        "prototypes": (backbone, {"head": fp.PrototypeHead(texts, layers)}),
        "rows as they are": (backbone, {"head": fp.PrototypeHead(texts, layers, normalise=False)}),
        "trained map": (with_projection, {"head": fp.LabelMapHead(with_projection, 3, trainable=True)}),
    }


def backbone_with(head: torch.nn.Linear) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=2, num_classes=10)
    vit.head = head
    return vit


@pytest.mark.parametrize("kind", ["linear", "text", "label_map", "prototypes", "rows as they are", "trained map"])
def test_every_head_gives_the_same_probabilities(backbone: fp.FrozenViT, tmp_path: Path, kind: str) -> None:
    vit, options = heads(backbone)[kind]
    model = fp.PromptedViT(vit, fp.RGBPGNConfig(num_prompts=4, library_size=3, widths=(4, 8)), **options).eval()
    export_client(model, tmp_path)
    features = torch.randn(5, 48)
    found = Client(tmp_path).classify(features.numpy())
    with torch.no_grad():
        expected = model.head(features).softmax(-1)
    np.testing.assert_allclose(np.stack([p.probabilities for p in found]), expected.numpy(), rtol=1e-4, atol=1e-6)
    assert Client(tmp_path).class_names == ("0", "1", "2")


def test_classify_refuses_what_does_not_fit(folder: Path, backbone: fp.FrozenViT, tmp_path: Path) -> None:
    client = Client(folder)
    assert len(client.classify(np.zeros(48))) == 1
    for wrong in (np.zeros((2, 47)), np.full((1, 48), np.nan)):
        with pytest.raises(ValueError, match=r"features must be finite and \(n, 48\)"):
            client.classify(wrong)
    export_client(fp.PromptedViT(backbone, fp.PixelPromptConfig(border=2)), tmp_path)
    with pytest.raises(ValueError, match="has no head"):
        Client(tmp_path).classify(np.zeros((1, 48)))


def test_an_inverted_pgn_is_deployed(
    backbone: fp.FrozenViT, make: Callable[..., Any], host: Any, tmp_path: Path
) -> None:
    model = make(backbone, fp.PGNConfig(num_prompts=4, library_size=5, widths=(4, 8)))
    inverted = fp.RGBPrompts.invert(model, "extend", picture=True)
    export_client(inverted, tmp_path)
    client, different = Client(tmp_path), 0
    for seed in range(5):
        image = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        wanted = fp.RGBPrompts(inverted).pictures(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        found = client.picture(image).astype(int)
        assert np.abs(found - wanted.permute(1, 2, 0).numpy().astype(int)).max() <= 1
        different += int((found != wanted.permute(1, 2, 0).numpy()).sum())
    assert different <= 1e-3 * 5 * found.size
    assert client.verify(host.url).ok


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timeout": 0}, ValueError, "timeout must be above 0"),
        ({"timeout": -1}, ValueError, "timeout must be above 0"),
        ({"timeout": float("nan")}, ValueError, "timeout must be above 0"),
        ({"timeout": float("inf")}, ValueError, "timeout must be above 0 and at most 86,400 seconds, got inf"),
        ({"timeout": 1e12}, ValueError, "timeout must be above 0"),
        ({"timeout": "3"}, TypeError, "timeout must be a number of seconds, got '3'"),
        ({"timeout": None}, TypeError, "timeout must be a number"),
        ({"timeout": True}, TypeError, "timeout must be"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
        ({"threads": "2"}, TypeError, "threads must be a whole number, got '2'"),
        ({"max_pixels": 0}, ValueError, "max_pixels must be at least 1"),
        ({"max_pixels": 1e6}, TypeError, "max_pixels must be a whole number"),
        ({"model": 3}, TypeError, "model must be a name"),
        ({"model": ""}, TypeError, "model must be a name"),
        ({"api_key": 3}, ValueError, "api_key must be"),
        ({"api_key": ""}, ValueError, "api_key must be"),
        ({"api_key": "secret\n"}, ValueError, "api_key must be printable ASCII, or None for no key$"),
    ],
    ids=str,
)
def test_arguments_are_checked_at_once(
    folder: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Client(folder, **options)


def test_what_is_wrong_here_is_found_before_the_host_is_asked(
    folder: Path, backbone: fp.FrozenViT, host: Any, photo: np.ndarray, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image none\.jpg is not a file"):
        Client(folder).predict(host.url, "none.jpg")
    with pytest.raises(TypeError, match="image must be a path, bytes, a PIL image or a uint8 array, got list"):
        Client(folder).predict(host.url, [photo, photo])
    export_client(fp.PromptedViT(backbone, fp.PixelPromptConfig(border=2)), tmp_path)
    with pytest.raises(ValueError, match="has no head"):
        Client(tmp_path).predict(host.url, photo)
    assert not host.requests


def test_images_must_not_be_empty(folder: Path, host: Any) -> None:
    with pytest.raises(ValueError, match="images must hold at least one"):
        Client(folder).embed(host.url, [])
