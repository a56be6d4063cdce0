"""The timm reader: parity with timm's own forward for every family, and refusal by name of all else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm import layers as tl
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn

import fastprompt as fp

FAMILIES = {
    "vit_tiny_patch16_384": ("cls", 1),
    "vit_xsmall_patch16_clip_224": ("cls", 1),
    "vit_base_patch16_siglip_gap_224": ("patches", 0),
    "aimv2_large_patch14_224": ("patches", 0),
    "vit_base_patch16_siglip_224": ("map", 0),
    "vit_base_patch16_clip_quickgelu_224": ("cls", 1),
    "vit_small_patch16_36x1_224": ("cls", 1),
    "vit_medium_patch16_reg4_gap_256": ("patches", 4),
    "beit3_base_patch16_224": ("patches", 1),
    "vit_wee_patch16_reg1_gap_256": ("patches", 1),
    "flexivit_small": ("cls", 1),
    "vit_small_patch14_reg4_dinov2": ("cls", 5),
    "vit_so150m2_patch16_reg1_gap_256": ("patches", 1),
    "eva_large_patch14_196": ("patches", 1),
    "vit_base_patch16_radio_v3": ("cls", 8),
    "test_vit": ("cls", 1),
    "test_vit2": ("patches", 1),
    "test_vit3": ("map", 1),
    "test_vit4": ("patches", 1),
    "vit_base_patch16_rpn_224": ("patches", 0),
    "vit_giant_patch14_dinov2": ("cls", 1),
    "vit_intern300m_patch14_448": ("cls", 1),
    "vit_so150m_patch16_reg4_map_256": ("map", 4),
}


def perturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.double().eval()


def build(**options: Any) -> nn.Module:
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 5,
    }
    return perturb(VisionTransformer(**{**settings, **options}))


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
    patch = 14 if "patch14" in name else 16
    model = perturb(timm.create_model(name, img_size=3 * patch, embed_dim=96, depth=2, num_heads=3, num_classes=5))
    backbone = assert_same_forward(model, torch.randn(2, 3, 3 * patch, 3 * patch, dtype=torch.float64))
    assert (backbone.spec.pool, backbone.num_prefix) == FAMILIES[name]
    assert backbone.spec.name == name
    assert (backbone.mean, backbone.std) == (model.pretrained_cfg["mean"], model.pretrained_cfg["std"])


HAND_BUILT: dict[str, dict[str, Any]] = {
    "qk_norm": {"qk_norm": True},
    "qk_norm rms": {"qk_norm": True, "norm_layer": tl.RmsNorm},
    "inner norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "all norms": {
        "qk_norm": True,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "pre_norm": True,
        "init_values": 0.5,
    },
    "gate first": {"mlp_layer": partial(tl.GluMlp, gate_last=False), "act_layer": nn.SiLU},
    "gate last": {"mlp_layer": partial(tl.GluMlp, gate_last=True), "act_layer": nn.SiLU},
    "swiglu packed": {"mlp_layer": tl.SwiGLUPacked},
    "swiglu with norm": {"mlp_layer": tl.SwiGLU, "scale_mlp_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "no biases": {"qkv_bias": False, "proj_bias": False, "pre_norm": True},
    "no position embedding": {"pos_embed": "none"},
    "no_embed_class": {"no_embed_class": True, "reg_tokens": 2},
    "registers without class token": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "fc_norm on cls": {"fc_norm": True},
    "avg without fc_norm": {"global_pool": "avg", "fc_norm": False},
    "avg with fc_norm": {"global_pool": "avg", "fc_norm": True},
    "avg over prefix": {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 1},
    "map over prefix": {"global_pool": "map", "pool_include_prefix": True},
    "map with fc_norm": {"global_pool": "map", "fc_norm": True},
    "no final norm": {"final_norm": False},
    "patch norm": {"embed_norm_layer": tl.LayerNorm},
    "rms norm": {"norm_layer": tl.RmsNorm},
    "torch's layer norm": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "res-post-norm": {"block_fn": ResPostBlock, "init_values": 0.5},
    "no classifier": {"num_classes": 0},
    "wide mlp": {"mlp_ratio": 2.5},
    "not square": {"img_size": (24, 40)},
    "dropouts do nothing": {
        "drop_rate": 0.5,
        "pos_drop_rate": 0.5,
        "patch_drop_rate": 0.5,
        "proj_drop_rate": 0.5,
        "attn_drop_rate": 0.5,
        "drop_path_rate": 0.5,
    },
}


@pytest.mark.parametrize("options", HAND_BUILT.values(), ids=HAND_BUILT.keys())
def test_options_match_timm(options: dict[str, Any]) -> None:
    size = options.get("img_size", (32, 32))
    backbone = assert_same_forward(build(**options), torch.randn(2, 3, *size, dtype=torch.float64))
    assert backbone.image_size == tuple(size)
    assert backbone.grid == (size[0] // 8, size[1] // 8)


ACTIVATIONS = [
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "silu",
    "relu",
    "relu6",
    "leaky_relu",
    "elu",
    "celu",
    "selu",
    "mish",
    "tanh",
    "sigmoid",
    "hard_sigmoid",
    "hard_swish",
]


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations_match_timm(act: str) -> None:
    backbone = assert_same_forward(build(act_layer=act, depth=1), 3 * torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert backbone.blocks[0].mlp.act == act


@pytest.mark.parametrize("act", [nn.GELU, partial(nn.GELU, approximate="tanh"), nn.Identity])
def test_torch_activations_match_timm(act: Any) -> None:
    assert_same_forward(build(act_layer=act, depth=1), torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 56), (16, 8)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"no_embed_class": True, "reg_tokens": 2},
        {"pos_embed": "none"},
        {"class_token": False, "global_pool": "map"},
    ],
    ids=str,
)
def test_dynamic_size_matches_timm(size: tuple[int, int], options: dict[str, Any]) -> None:
    model = build(dynamic_img_size=True, **options)
    assert_same_forward(model, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("size", [(32, 32), (30, 45), (1, 9)])
def test_dynamic_padding_matches_timm(size: tuple[int, int]) -> None:
    model = build(dynamic_img_size=True, dynamic_img_pad=True)
    assert_same_forward(model, torch.randn(2, 3, *size, dtype=torch.float64))


@pytest.mark.parametrize("norm", [tl.LayerNormFp32, tl.RmsNormFp32])
def test_norms_in_float32_match_timm_in_bfloat16(norm: type[nn.Module]) -> None:
    model, images = build(norm_layer=norm, qk_norm=True).bfloat16(), torch.randn(2, 3, 32, 32).bfloat16()
    backbone = fp.FrozenViT(model)
    assert torch.equal(backbone(images), model(images))


def test_other_resolution_by_set_input_size() -> None:
    model = build()
    model.set_input_size((40, 24))
    backbone = assert_same_forward(model, torch.randn(2, 3, 40, 24, dtype=torch.float64))
    assert backbone.grid == (5, 3)


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"pos_embed": "none"}], ids=str)
@torch.no_grad()
def test_other_resolution_at_reading(options: dict[str, Any]) -> None:
    model, images = build(**options), torch.randn(2, 3, 40, 24, dtype=torch.float64)
    backbone = fp.FrozenViT(model, image_size=(40, 24))
    model.set_input_size((40, 24))  # timm resamples in float32
    assert backbone.grid == (5, 3)
    assert (backbone(images) - model(images)).norm() <= 1e-6 * model(images).norm()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("vit_large_patch14_xp_224", "block is ParallelScalingBlock"),
        ("vit_small_patch16_18x2_224", "block is ParallelThingsBlock"),
        ("vit_dwee_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_dpwee_patch16_reg1_gap_256", "DiffParallelScalingBlock"),
    ],
)
def test_other_architectures_are_refused_by_name(name: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        fp.FrozenViT(timm.create_model(name, depth=1, embed_dim=96, num_heads=3))


@pytest.mark.parametrize("name", ["test_resnet", "hiera_tiny_224", "convnext_atto", "vit_tiny_r_s16_p8_224"])
def test_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    if name.startswith("vit"):
        model.patch_embed.proj = nn.Linear(3, 3)
    part = {"test": "ResNet", "hiera": "Hiera", "convnext": "ConvNeXt", "vit": r"patch_embed\.proj is Linear"}
    with pytest.raises(ValueError, match=part[name.partition("_")[0]]):
        fp.FrozenViT(model)


def test_convolutional_stems_match_timm(randomised: Any, tiny_images: Tensor) -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, depth=2, embed_dim=48, num_heads=3, num_classes=5)
    backbone = assert_same_forward(randomised(model).double().eval(), tiny_images.double())
    assert backbone.patch_size == 32 // backbone.grid[0]
    prompted = fp.PromptedViT(backbone, fp.VAPTConfig(3, kernel=1), num_classes=4).eval()
    raw = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    for images in (tiny_images.double(), raw):
        torch.testing.assert_close(prompted(images), prompted.reference_forward(images), rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in backbone.parameters())
    with pytest.raises(ValueError, match="a convolutional stem"):
        fp.RGBPGN(fp.RGBPGNConfig(4, 5, widths=(4, 8)), backbone)


def test_a_stem_without_projection_matches_timm(randomised: Any) -> None:
    model = randomised(timm.create_model("vit_base_mci_224", img_size=32, depth=1, num_classes=5)).double().eval()
    backbone = assert_same_forward(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert backbone.grid == (2, 2)
    model.patch_embed.patch_size = (2, 2)
    with pytest.raises(ValueError, match=r"patch_size is \(2, 2\); supported: \(1, 1\) without a projection"):
        fp.FrozenViT(model)


def gated() -> nn.Module:
    model = build()
    model.blocks[1].attn = tl.Attention(48, num_heads=3, gated=True)
    return model


def with_strange_norm() -> nn.Module:
    model = build()
    model.blocks[1].norm2 = nn.GroupNorm(1, 48)
    return model


def with_slope() -> nn.Module:
    model = build(act_layer="leaky_relu")
    model.blocks[0].mlp.act = nn.LeakyReLU(0.3)
    return model


def with_overlap() -> nn.Module:
    model = build()
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, stride=4)
    return model


def with_head() -> nn.Module:
    model = build()
    model.head = nn.Sequential(nn.Linear(48, 5))
    return model


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: build(global_pool="prr"), "global_pool is 'prr'"),
        (lambda: build(global_pool="max"), "global_pool is 'max'"),
        (lambda: build(global_pool=""), "global_pool is ''"),
        (lambda: build(norm_layer=nn.Identity), "norm layer is Identity"),
        (lambda: build(patch_size=(8, 4)), r"patch_size is \(8, 4\)"),
        (lambda: build(act_layer=nn.Softplus), "activation is Softplus"),
        (lambda: build(norm_layer=tl.SimpleNorm), "norm layer is SimpleNorm"),
        (gated, "gated Attention"),
        (with_strange_norm, "norm layer is GroupNorm"),
        (with_slope, r"activation is LeakyReLU\(negative_slope=0.3"),
        (with_head, "linear layer is Sequential"),
        (with_overlap, r"patch_embed\.proj is Conv2d"),
        (lambda: build(depth=0), "depth is 0"),
        (lambda: build(img_size=4), r"img_size is \(4, 4\); supported: at least one patch of 8 pixels"),
    ],
)
def test_parts_are_refused_by_name(make: Any, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        fp.FrozenViT(make())


def test_subclasses_that_may_compute_otherwise_are_refused() -> None:
    class Mine(VisionTransformer):
        pass

    with pytest.raises(ValueError, match=r"Mine"):
        fp.FrozenViT(Mine(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3))


def test_modules_of_no_library_and_non_modules_are_refused() -> None:
    with pytest.raises(ValueError, match=r"class Linear"):
        fp.FrozenViT(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got str"):
        fp.FrozenViT("vit_base_patch16_224")
