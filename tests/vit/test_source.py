"""What a backbone records of the call that loaded it, and that the call repeated gives the same backbone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import fastprompt as fp
from fastprompt.vit.assets import load_source
from fastprompt.vit.source import BackboneSource

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny timm model in a folder, as a relative path."""
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES)
    (tmp_path / "vit").mkdir()
    save_file(model.state_dict(), tmp_path / "vit" / "model.safetensors")
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": SIZES, "pretrained_cfg": pretrained}
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**config, "num_classes": 0}))
    monkeypatch.chdir(tmp_path)
    return "local-dir:vit"


def again(backbone: fp.FrozenViT) -> fp.FrozenViT:
    """The backbone loaded by what it records, by way of JSON."""
    assert backbone.source is not None
    return load_source(BackboneSource(**json.loads(json.dumps(dataclasses.asdict(backbone.source)))))


@pytest.mark.parametrize("image_size", [None, 48, (48, 32)])
def test_the_recorded_call_gives_the_same_backbone(
    folder: str, image_size: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backbone in (
        fp.load_backbone(folder, image_size),
        fp.FrozenViT.from_timm(folder, pretrained=True, image_size=image_size),
        fp.FrozenViT.from_timm(folder, pretrained=True, image_size=image_size, dynamic_img_size=True),
    ):
        monkeypatch.chdir(Path("/"))
        other = again(backbone)
        monkeypatch.chdir(tmp_path)
        assert other.fingerprint == backbone.fingerprint
        assert (other.image_size, other.source) == (backbone.image_size, backbone.source)


def test_mean_and_std_are_recorded(folder: str) -> None:
    pixels: Any = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    plain, image = fp.load_backbone(folder), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    for backbone in (
        fp.load_backbone(folder, **pixels),
        fp.FrozenViT.from_timm(folder, pretrained=True, **pixels),
        plain.normalising_by(**pixels),
        plain.normalising_by(pixels["mean"]).normalising_by(std=pixels["std"]),
    ):
        other = again(backbone)
        assert (other.mean, other.std) == (backbone.mean, backbone.std) == (pixels["mean"], pixels["std"])
        assert other.fingerprint == plain.fingerprint
        assert torch.equal(other(image), backbone(image))
        assert not torch.equal(other(image), plain(image))
        assert backbone.source is not None
        assert backbone.source.backbone_name == backbone.source.name


def test_mean_and_std_are_checked_before_any_weights_are_read(tmp_path: Path) -> None:
    for load in (
        lambda **pixels: fp.FrozenViT.from_timm("vit_huge_patch14_224", **pixels),
        lambda **pixels: fp.FrozenViT.from_timm("local-dir:nothing", pretrained=True, **pixels),
        lambda **pixels: fp.FrozenViT.from_torchvision("vit_h_14", True, **pixels),
        lambda **pixels: fp.FrozenViT.from_open_clip("ViT-B-16", "openai", **pixels),
        lambda **pixels: fp.FrozenViT.from_transformers(tmp_path, **pixels),
        lambda **pixels: fp.load_backbone("local-dir:nothing", **pixels),
    ):
        with pytest.raises(ValueError, match="mean must be three numbers"):
            load(mean=0.5)
        with pytest.raises(ValueError, match="std must be three positive numbers"):
            load(std=(0.5, 0.5, 0.0))


def test_other_pixels_are_folded_anew(tiny_vit: torch.nn.Module) -> None:
    backbone, image = fp.FrozenViT(tiny_vit), torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2)).eval()
    model(image)
    other = fp.PromptedViT(backbone.normalising_by(std=(1, 1, 1)), fp.VPTConfig(num_prompts=2)).eval()
    other.load_adapter_state_dict(model.adapter_state_dict())
    torch.testing.assert_close(other(image), other.reference_forward(image), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(image), model.reference_forward(image), rtol=1e-4, atol=1e-4)
    assert backbone.normalising_by() is backbone
    assert backbone.normalising_by(backbone.mean, list(backbone.std)) is backbone


def test_copies_know_it_too(folder: str) -> None:
    backbone = fp.load_backbone(folder)
    assert backbone.source == BackboneSource("load_backbone", f"local-dir:{Path('vit').absolute()}")
    assert backbone.any_size().source == backbone.source
    assert fp.PromptedViT(backbone, fp.FullFineTuneConfig(), 3).backbone.source == backbone.source
    assert backbone.source.backbone_name == backbone.source.name


def test_what_cannot_be_loaded_again_is_not_recorded(folder: str, tiny_vit: torch.nn.Module) -> None:
    assert fp.FrozenViT(tiny_vit).source is None
    assert fp.FrozenViT.from_timm("vit_tiny_patch16_224", **SIZES).source is None  # random weights
    assert fp.FrozenViT.from_timm(folder, pretrained=True, cache_dir="/tmp").source is None
    torchvision = fp.FrozenViT.from_torchvision("vit_b_32", image_size=32, num_classes=2)
    assert torchvision.source is None


@pytest.mark.parametrize(
    ("call", "source"),
    [
        (("torchvision", "vit_b_16", True, None, {"mean": (0.5, 0.5, 0.5)}), {"mean": [0.5, 0.5, 0.5]}),
        (("open_clip", "ViT-B-16", "openai", 224, {"force_quick_gelu": True}), {"force_quick_gelu": True}),
        (("open_clip", "hf-hub:timm/x", None, 224, {}), {}),
        (("transformers", "google/vit", True, None, {"revision": "abc"}), {"revision": "abc"}),
        (("transformers", "google/vit", True, None, {"trust_remote_code": True}), None),
        (("transformers", "google/vit", False, None, {}), None),
        (("open_clip", "ViT-B-16", None, None, {}), None),
        (("timm", "vit_tiny_patch16_224", True, 1 << 20, {}), None),
    ],
    ids=str,
)
def test_options_that_are_recorded(call: tuple[Any, ...], source: dict[str, Any] | None) -> None:
    found = BackboneSource.of_call(*call)
    assert (found is None) == (source is None)
    if found is not None:
        assert (found.loader, found.name, found.pretrained, found.image_size) == call[:4]
        assert found.options == source
        assert found.backbone_name is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loader": "pickle", "name": "x"}, "loader must be one of"),
        ({"loader": "timm", "name": 3}, "name and pretrained must be texts"),
        ({"loader": "timm", "name": "x", "pretrained": [1]}, "name and pretrained must be texts"),
        ({"loader": "timm", "name": "x", "image_size": 10**9}, "image_size must be"),
        ({"loader": "timm", "name": "x", "image_size": [224, True]}, "image_size must be"),
        ({"loader": "timm", "name": "x", "image_size": "224"}, "image_size must be"),
        ({"loader": "timm", "name": "x", "options": {"checkpoint_path": "/etc/passwd"}}, r"\['checkpoint_path'\]"),
        ({"loader": "transformers", "name": "x", "options": {"trust_remote_code": True}}, "trust_remote_code"),
        ({"loader": "timm", "name": "x", "options": [1]}, "options must be a mapping"),
    ],
    ids=str,
)
def test_a_source_that_an_adapter_may_not_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        BackboneSource(**values)
