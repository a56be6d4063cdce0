"""The reader of timm's Swin transformers: parity with timm's own forward, and refusal by name of all else."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

import fastprompt as fp

FAMILIES = (
    "swin_tiny_patch4_window7_224",
    "swin_large_patch4_window12_384",
    "swin_s3_tiny_224",
    "swinv2_tiny_window8_256",
    "swinv2_base_window12to16_192to256",
)


def perturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def build(cls: type[nn.Module] = SwinTransformer, **options: Any) -> nn.Module:
    sizes = {
        "img_size": 32,
        "patch_size": 4,
        "embed_dim": 12,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "window_size": 4,
        "num_classes": 5,
    }
    return perturb(cls(**{**sizes, **options}))


def assert_same_forward(model: nn.Module, images: Tensor) -> fp.FrozenViT:
    backbone = fp.FrozenViT(model)
    with torch.no_grad():
        expected, got = model(images), backbone(images)
    assert got.shape == expected.shape
    assert got.dtype == torch.float64
    assert (got - expected).norm() <= 1e-12 * expected.norm()
    return backbone


@pytest.mark.parametrize("name", FAMILIES)
def test_families_match_timm(name: str) -> None:
    sizes = {"img_size": 64, "embed_dim": 12, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "window_size": 4}
    extra = {"pretrained_window_sizes": (6, 6, 6)} if "to" in name else {}
    model = perturb(timm.create_model(name, num_classes=5, **sizes, **extra))
    backbone = assert_same_forward(model, torch.randn(2, 3, 64, 64, dtype=torch.float64))
    assert backbone.spec.name == name
    assert (backbone.mean, backbone.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


OPTIONS: dict[str, dict[str, Any]] = {
    "windows padded": {"img_size": (52, 36)},
    "windows shrunken": {"img_size": (20, 28), "depths": (2, 2, 2), "num_heads": (1, 2, 4)},
    "always_partition": {"img_size": (20, 28), "always_partition": True},
    "odd feature maps": {"img_size": (36, 44), "depths": (1, 1, 1), "num_heads": (1, 2, 4)},
    "oblong windows": {"window_size": (3, 5)},
    "a window for each stage": {"img_size": 64, "window_size": [(2, 3), 8]},
    "no qkv bias": {"qkv_bias": False},
    "no classifier": {"num_classes": 0},
    "wide mlp": {"mlp_ratio": 2.5},
    "one stage": {"depths": (2,), "num_heads": (3,)},
    "other patches": {"img_size": 30, "patch_size": 2, "window_size": 5},
    "dropouts do nothing": {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5},
}


@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_match_timm(cls: type[nn.Module], options: dict[str, Any]) -> None:
    size = options.get("img_size", 32)
    size = size if isinstance(size, tuple) else (size, size)
    backbone = assert_same_forward(build(cls, **options), torch.randn(2, 3, *size, dtype=torch.float64))
    assert backbone.image_size == size


def test_head_dim_matches_timm() -> None:
    model = build(head_dim=8, num_heads=(2, 3))
    backbone = assert_same_forward(model, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert backbone.blocks[0].qkv.weight.shape == (48, 12)


@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
@pytest.mark.parametrize("size", [(32, 32), (44, 60), (8, 4)])
def test_dynamic_sizes_match_timm(cls: type[nn.Module], size: tuple[int, int]) -> None:
    model = build(cls, strict_img_size=False)
    assert_same_forward(model, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cls", [SwinTransformer, SwinTransformerV2])
@torch.no_grad()
def test_another_size_changes_windows_as_timm_does(cls: type[nn.Module]) -> None:
    model, images = build(cls), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    backbone = fp.FrozenViT(model, image_size=(64, 96))
    assert model.patch_embed.img_size == (32, 32)  # the module itself is left alone
    assert (backbone.image_size, backbone.grid) == ((64, 96), ((16, 24), (8, 12)))
    assert backbone.blocks[0].window == (8, 12)
    model.set_input_size((64, 96))
    assert (backbone(images) - model(images)).norm() <= 1e-12 * model(images).norm()


def test_a_size_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="image_size must have sides that are multiples of the patch size 4"):
        fp.FrozenViT(build(), image_size=30)


def with_strange_norm() -> nn.Module:
    model = build()
    model.layers[0].blocks[1].norm2 = nn.GroupNorm(1, 12)
    return model


def with_strange_merging() -> nn.Module:
    model = build()
    model.layers[1].downsample = nn.Conv2d(12, 24, 2, 2)
    return model


def with_strange_attention() -> nn.Module:
    model = build()
    model.layers[0].blocks[0].attn = nn.MultiheadAttention(12, 1)
    return model


def with_overlap() -> nn.Module:
    model = build()
    model.patch_embed.proj = nn.Conv2d(3, 12, 4, stride=2)
    return model


class Mine(SwinTransformer):
    """A subclass may compute otherwise."""


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: timm.create_model("swinv2_cr_tiny_ns_224", embed_dim=24, depths=(1,), num_heads=(1,)), "V2Cr"),
        (lambda: build(Mine), "model is Mine"),
        (lambda: build(global_pool="max"), "global_pool is 'max'"),
        (lambda: build(global_pool=""), "global_pool is ''"),
        (lambda: build(in_chans=1), "in_chans is 1"),
        (lambda: build(depths=(1, 0)), r"depths is \(1, 0\)"),
        (lambda: build(patch_size=(4, 2)), r"patch_size is \(4, 2\)"),
        (lambda: build(img_size=2, depths=(1,), num_heads=(1,)), "at least one patch of 4 pixels"),
        (with_strange_norm, "norm layer is GroupNorm"),
        (with_strange_merging, "downsample is Conv2d"),
        (with_strange_attention, "attention layer is MultiheadAttention"),
        (with_overlap, r"patch_embed\.proj is Conv2d"),
    ],
)
def test_parts_are_refused_by_name(make: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        fp.FrozenViT(make())
