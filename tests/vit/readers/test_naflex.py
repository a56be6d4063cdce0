"""The reader of timm's NaFlexVit: parity with timm at one size for every form of embedding, block and pooling."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

import fastprompt as fp

FORMS: dict[str, dict[str, Any]] = {
    "gap": {"reg_tokens": 2, "fc_norm": True, "global_pool": "avg", "init_values": 1e-5},
    "par": {"reg_tokens": 2, "global_pool": "avg", "pos_embed_ar_preserving": True},
    "parfac": {
        "global_pool": "avg",
        "pos_embed": "factorized",
        "pos_embed_ar_preserving": True,
        "pos_embed_grid_size": (4, 4),
    },
    "factorized": {"global_pool": "avg", "pos_embed": "factorized"},
    "siglip": {"act_layer": "gelu_tanh", "pos_embed_interp_mode": "bilinear"},
    "map of all tokens": {"class_token": True, "reg_tokens": 1, "pool_include_prefix": True},
    "radio": {
        "class_token": True,
        "reg_tokens": 3,
        "global_pool": "token",
        "final_norm": False,
        "pos_embed_interp_mode": "bilinear",
        "pos_embed_ar_preserving": True,
        "pos_embed_antialias": False,
        "pos_embed_align_corners": True,
    },
    "convolved": {"embed_proj_type": "conv", "embed_norm_layer": "layernorm", "pre_norm": True},
    "channels first": {"patchify_channels_last": False},
    "no positions": {"pos_embed": "none", "qk_norm": True, "qkv_bias": False},
    "eva": {"attn_type": "eva", "swiglu_mlp": True, "qkv_fused": False, "scale_mlp_norm": True},
    "axial": {"rope_type": "axial", "rope_ref_feat_shape": (3, 3), "rope_grid_indexing": "xy", "class_token": True},
    "mixed": {"rope_type": "mixed", "pos_embed": "none"},
    "dinov3": {"rope_type": "dinov3", "rope_rotate_half": True, "pos_embed": "none", "reg_tokens": 2},
}


def build(randomise: Any, **options: Any) -> NaFlexVit:
    """A tiny NaFlexVit for 3 x 4 patches of 8 pixels."""
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "pos_embed_grid_size": (3, 4)}
    model = randomise(NaFlexVit(NaFlexVitCfg(**{**sizes, **options}), num_classes=5))
    with torch.no_grad():
        for name, value in model.named_buffers():
            if name.endswith("k_bias"):
                value.copy_(torch.randn_like(value))
            elif name.rpartition(".")[2] in ("bands", "periods"):
                value *= 1 + 0.2 * torch.rand_like(value)
    return model.double().eval()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_match_timm(randomised: Any, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    model = build(randomised, **FORMS[form])
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # timm resamples in float32
    backbone = fp.FrozenViT(model)
    assert backbone.grid == FORMS[form].get("pos_embed_grid_size", (3, 4))
    for other in (backbone, fp.FrozenViT(model, image_size=(40, 24)), fp.FrozenViT(model, image_size=48)):
        images = torch.randn(2, 3, *other.image_size, dtype=torch.float64)
        expected = model(images)
        exact = other is backbone or model.rope is None  # timm computes the angles of other sizes in float32
        assert (other(images) - expected).norm() <= (1e-10 if exact else 1e-6) * expected.norm()
        assert other.fingerprint != backbone.fingerprint or other is backbone or model.embeds.pos_embed is None


@torch.no_grad()
def test_images_have_the_size_that_the_model_is_made_for() -> None:
    tiny = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    assert fp.FrozenViT.from_timm("naflexvit_base_patch16_gap", **tiny).image_size == (384, 384)
    smaller = fp.FrozenViT.from_timm("naflexvit_base_patch16_gap", image_size=(96, 64), **tiny)
    assert smaller.grid == (6, 4)
    classic = timm.create_model("vit_tiny_patch16_224", use_naflex=True, img_size=64, depth=1)
    assert fp.FrozenViT(classic).image_size == (64, 64)


@torch.no_grad()
def test_prompts_run_on_it(randomised: Any) -> None:
    backbone = fp.FrozenViT(build(randomised, **FORMS["parfac"]))
    model = fp.PromptedViT(backbone, fp.VPTConfig(2), num_classes=3)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model.reference_forward(images)
    assert (model(images) - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attn_gated": True, "attn_type": "rope"}, "gated AttentionRope"),
        ({"attn_layer": "diff"}, "DiffAttention"),
        ({"pos_embed": "factorized", "pos_embed_ar_preserving": True}, "a square for factorized positions"),
        ({"global_pool": "max"}, "global_pool is 'max'"),
        ({"patch_size": (8, 16)}, r"patch_size is \(8, 16\)"),
        ({"pos_embed_grid_size": None, "pos_embed": "none"}, "img_size is None"),
    ],
)
def test_what_cannot_be_represented_is_named(options: dict[str, Any], named: str) -> None:
    sizes = {"patch_size": 8, "embed_dim": 64, "depth": 1, "num_heads": 4, "pos_embed_grid_size": (3, 4)}
    with pytest.raises(ValueError, match=named):
        fp.FrozenViT(NaFlexVit(NaFlexVitCfg(**{**sizes, **options})))


def test_hiera_is_refused_with_its_reason() -> None:
    with torch.device("meta"):
        model = timm.create_model("hiera_tiny_224")
    with pytest.raises(ValueError, match=r"Hiera of timm\.models\.hiera, whose blocks pool their tokens"):
        fp.FrozenViT(model)
    assert "timm.models.hiera" in sys.modules
