"""The reader of timm's Eva: parity with timm for every form of position, projection and pooling."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm import layers as tl
from timm.models.eva import Eva
from torch import nn

import fastprompt as fp

FORMS: dict[str, dict[str, Any]] = {
    "eva": {"init_values": None},
    "eva02": {"use_rot_pos_emb": True, "ref_feat_shape": (2, 3), "qkv_fused": False, "swiglu_mlp": True},
    "eva02 with inner norms": {
        "use_rot_pos_emb": True,
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "global_pool": "token",
    },
    "eva02 enormous": {"use_post_norm": True, "global_pool": "token"},
    "post-norm with rotation": {"use_post_norm": True, "use_rot_pos_emb": True, "global_pool": "token"},
    "rope vit": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "class_token": False,
        "num_reg_tokens": 1,
        "init_values": 1e-5,
    },
    "rope axial": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "attn_type": "rope",
        "rope_grid_indexing": "xy",
        "rope_temperature": 100.0,
        "global_pool": "token",
    },
    "rope axial with absolute": {
        "use_rot_pos_emb": True,
        "no_embed_class": True,
        "attn_type": "rope",
        "rope_grid_indexing": "xy",
        "global_pool": "token",
    },
    "rope mixed": {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "attn_type": "rope",
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "rope_temperature": 10.0,
        "global_pool": "token",
        "init_values": 1e-5,
    },
    "rope mixed, rows first": {"use_rot_pos_emb": True, "rope_type": "mixed", "no_embed_class": True},
    "one mixed block": {"use_rot_pos_emb": True, "rope_type": "mixed", "depth": 1},
    "mrope": {"use_rot_pos_emb": True, "rope_type": "mrope", "rope_mrope_section": (2, 3, 3)},
    "perception encoder": {
        "global_pool": "map",
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (3, 3),
        "rope_grid_offset": 1.0,
        "rope_grid_indexing": "xy",
        "attn_pool_num_heads": 4,
        "attn_pool_mlp_ratio": 4.0,
    },
    "perception encoder without pooling norm": {
        "attn_type": "rope",
        "use_pre_transformer_norm": True,
        "use_post_transformer_norm": False,
        "use_fc_norm": False,
        "use_rot_pos_emb": True,
        "class_token": False,
    },
    "dinov3": {
        "dynamic_img_size": True,
        "qkv_bias": False,
        "init_values": 1e-5,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "num_reg_tokens": 4,
        "use_fc_norm": False,
    },
    "dinov3 with biases": {
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "use_rot_pos_emb": True,
        "swiglu_mlp": True,
        "swiglu_align_to": 8,
    },
    "dinov3 of neighbours": {"rope_type": "dinov3", "use_rot_pos_emb": True, "rope_grid_offset": 0.25},
    "sapiens2": {
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "attn_type": "rope",
        "qkv_fused": False,
        "num_kv_heads": (2, 4),
        "qk_norm": True,
        "norm_layer": tl.RmsNorm,
        "init_values": 1e-5,
        "attn_only_layer_scale": True,
    },
    "norms of neighbours": {"use_rot_pos_emb": True, "qk_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-3)},
}


def build(randomise: Any, **options: Any) -> Eva:
    """A tiny Eva, 3 x 4 patches and heads of 16, whose parameters and buffers are all random."""
    sizes = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = randomise(Eva(**{**sizes, **options}))
    half = options.get("rope_rotate_half", False)
    with torch.no_grad():
        for name, value in model.named_buffers():
            name = name.rpartition(".")[2]
            if name in ("pos_embed", "pos_embed_cached"):  # (N, sin and cos of d), where each angle stands twice
                noise = torch.randn(len(value), 2, value.shape[1] // 4)
                value += (noise.repeat(1, 1, 2) if half else noise.repeat_interleave(2, -1)).flatten(1)
            elif name == "k_bias":
                value.copy_(torch.randn_like(value))
            elif name in ("bands", "periods", "inv_freq"):
                value *= 1 + 0.2 * torch.rand_like(value)
    return model.double().eval()


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_forms_match_timm(randomised: Any, form: str) -> None:
    model = build(randomised, **FORMS[form])
    images = torch.randn(2, 3, 24, 32, dtype=torch.float64)
    backbone, expected = fp.FrozenViT(model), model(images)
    assert (backbone(images) - expected).norm() <= 1e-10 * expected.norm()
    assert (backbone.rotary is None) == (model.rope is None)


ROTATED = [form for form in FORMS if "use_rot_pos_emb" in FORMS[form]]


@pytest.mark.parametrize("form", ROTATED)
@torch.no_grad()
def test_sizes_of_images_match_timm(randomised: Any, form: str) -> None:
    model = build(randomised, **FORMS[form] | {"dynamic_img_size": True})
    backbone = fp.FrozenViT(model)
    for sides in ((24, 32), (16, 16), (40, 24)):
        images = torch.randn(2, 3, *sides, dtype=torch.float64)
        expected, others = model(images), [backbone]
        if sides != (24, 32):
            others.append(fp.FrozenViT(model, image_size=sides))
        for other in others:
            assert (other(images) - expected).norm() <= 1e-5 * expected.norm()


@torch.no_grad()
def test_a_cast_keeps_the_angles_of_far_patches(randomised: Any) -> None:
    backbone = fp.FrozenViT(build(randomised, **FORMS["rope axial"]).float(), image_size=(8, 4096))
    angles = backbone.rotary.angles(backbone.grid)
    backbone.bfloat16()
    assert backbone.blocks[0].qkv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(backbone.rotary.angles(backbone.grid), angles, rtol=0, atol=0)
    assert {turns.sin.dtype for turns in backbone.turns(backbone.grid, backbone.dtype)} == {torch.bfloat16}


def test_fingerprints_see_frequencies_and_the_rule(randomised: Any) -> None:
    def of(form: str = "eva02", **options: Any) -> fp.FrozenViT:
        return fp.FrozenViT(build(randomised, **FORMS[form] | options))

    torch.manual_seed(1)
    backbone = of()
    torch.manual_seed(1)
    assert of().is_same(backbone)
    for options in ({"rope_temperature": 100.0}, {"ref_feat_shape": (3, 3)}, {"rope_grid_offset": 1.0}):
        torch.manual_seed(1)
        assert not of(**options).is_same(backbone), options
    mixed = of("rope mixed")
    other = build(randomised, **FORMS["rope mixed"])
    with torch.no_grad():
        other.rope.freqs[0, 1, 0, 0] += 1e-3
    assert not fp.FrozenViT(other).is_same(mixed)


def test_gated_attention_is_refused(randomised: Any) -> None:
    model = build(randomised, **FORMS["eva02"])
    model.blocks[1].attn.gate = nn.Linear(64, 64)
    with pytest.raises(ValueError, match="gated EvaAttention"):
        fp.FrozenViT(model)


def test_unknown_rotations_are_refused(randomised: Any) -> None:
    model = build(randomised, **FORMS["eva02"])
    model.rope.grid_type = "pixel"
    with pytest.raises(ValueError, match="rotary embedding is RotaryEmbeddingCat"):
        fp.FrozenViT(model)
