"""The open_clip reader: parity with open_clip's own image towers, refusal by name, prompts in their blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fastprompt as fp

open_clip = pytest.importorskip("open_clip")
from open_clip import transformer as oc  # noqa: E402
from open_clip.model import CLIP, CustomTextCLIP, resize_pos_embed  # noqa: E402
from open_clip.modified_resnet import ModifiedResNet  # noqa: E402
from open_clip.timm_model import TimmModel  # noqa: E402

VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
TEXT = {"width": 32, "heads": 2, "layers": 1, "vocab_size": 16, "context_length": 8}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tower(**options: Any) -> nn.Module:
    sizes = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "heads": 3, "mlp_ratio": 2.5}
    sizes["output_dim"] = 20
    return oc.VisionTransformer(**{**sizes, **options})


@pytest.fixture
def build(randomised: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **options: randomised(tower(**options)).double().eval()


def images(*sides: int) -> Tensor:
    return torch.randn(2, 3, *(sides or (32, 32)), dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == torch.float64
    assert (got - expected).norm() <= tolerance * expected.norm()


OPTIONS: dict[str, dict[str, Any]] = {
    "CLIP": {},
    "CLIP with quick GELU": {"act_layer": oc.QuickGELU},
    "tanh GELU": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "average": {"pool_type": "avg"},
    "norm behind the class token": {"final_ln_after_pool": True},
    "norm behind the average": {"pool_type": "avg", "final_ln_after_pool": True},
    "no pre-norm": {"no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.5},
    "fixed positions": {"pos_embed_type": "sin_cos_2d"},
    "patch dropout does nothing": {"patch_dropout": 0.5},
    "another eps": {"norm_layer": partial(oc.LayerNorm, eps=1e-3)},
    "torch's norm": {"norm_layer": nn.LayerNorm},
    "q/k-norm": {"qk_norm": True},
    "norm inside the attention": {"scale_attn_inner": True},
    "norm inside the mlp": {"scale_fc": True},
    "scaled heads": {"scale_heads": True},
    "custom block of all that": {
        "qk_norm": True,
        "scale_attn_inner": True,
        "scale_fc": True,
        "scale_heads": True,
        "ls_init_value": 0.5,
    },
    "custom block of nothing": {"block_type": "custom"},
    "not square": {"image_size": (24, 40)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_backbone_is_the_towers_forward(build: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    model = build(**options)
    x = images(*options.get("image_size", ()))
    backbone = fp.FrozenViT(model)
    assert_close(backbone(x), model(x))
    assert backbone.image_size == tuple(x.shape[2:])
    assert backbone.grid == (x.shape[2] // 8, x.shape[3] // 8)
    assert backbone.spec.pool == ("patches" if options.get("pool_type") == "avg" else "cls")


@torch.no_grad()
def test_tower_with_tokens_or_without_projection(build: Callable[..., nn.Module]) -> None:
    model, x = build(output_tokens=True), images()
    assert_close(fp.FrozenViT(model)(x), model(x)[0])
    model = build()
    model.prune_intermediate_layers([1])
    backbone = fp.FrozenViT(model)
    assert backbone.depth == 2
    assert backbone.head is None
    assert_close(backbone(x), model(x))


@torch.no_grad()
def test_norms_in_float32_match_in_bfloat16() -> None:
    model = tower(norm_layer=oc.LayerNormFp32).eval()
    for name, child in model.named_modules():
        if not isinstance(child, oc.LayerNormFp32) and name:
            for p in child.parameters(recurse=False):
                p.data = p.data.bfloat16()
    for p in (model.class_embedding, model.positional_embedding, model.proj):
        p.data = p.data.bfloat16()
    x = images().bfloat16()
    backbone = fp.FrozenViT(model)
    assert backbone.norm_pre.upcast
    assert backbone.blocks[0].norm1.upcast
    got, expected = backbone(x), model(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
@torch.no_grad()
def test_image_tower_of_a_model(kind: type[nn.Module], randomised: Callable[..., nn.Module]) -> None:
    model = randomised(kind(20, VISION, TEXT, quick_gelu=True)).double().eval()
    backbone, x = fp.FrozenViT(model), images()
    assert_close(backbone(x), model.encode_image(x))
    assert backbone.fingerprint == fp.FrozenViT(model.visual).fingerprint
    assert fp.FrozenViT.from_open_clip(model).fingerprint == backbone.fingerprint
    assert fp.FrozenViT.from_open_clip(model.visual, mean=(0, 0, 0)).mean == (0, 0, 0)


TIMM = {"timm_model_name": "test_vit", "image_size": 160}


@pytest.mark.parametrize(
    "options",
    [
        {"timm_pool": "token", "timm_proj": "linear"},
        {"timm_pool": "avg", "timm_proj": "linear", "timm_proj_bias": True},
        {"timm_pool": "token", "timm_proj": ""},
        {"timm_pool": "token", "timm_proj": "none"},
        {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
    ],
    ids=str,
)
@torch.no_grad()
def test_timm_tower(options: dict[str, Any], randomised: Callable[..., nn.Module]) -> None:
    model = randomised(CustomTextCLIP(20, {**TIMM, **options}, TEXT)).double().eval()
    x = images(160, 160)
    assert_close(fp.FrozenViT(model)(x), model.encode_image(x))


def test_eva_and_siglip_towers(randomised: Callable[..., nn.Module]) -> None:
    """The towers of EVA02-CLIP and SigLIP, at a small size: their trunks in place of the tower's own."""
    small = {"img_size": 48, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for name, pool, classes in (
        ("eva02_base_patch16_clip_224", "token", 20),
        ("vit_base_patch16_siglip_224", "map", 0),
    ):
        model = TimmModel("test_vit", 20, 160, pool="token", proj="none")
        model.trunk = timm.create_model(name, global_pool=pool, num_classes=classes, **small)
        randomised(model).double().eval()
        x, backbone = images(48, 48), fp.FrozenViT(model)
        with torch.no_grad():
            assert_close(backbone(x), model(x))
        assert backbone.spec.pool == ("cls" if pool == "token" else "map")
        assert (backbone.rotary is not None) == name.startswith("eva02")


def test_attributes_of_clip(build: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(build())
    assert (backbone.width, backbone.depth, backbone.num_heads, backbone.patch_size) == (48, 3, 3, 8)
    assert (backbone.grid, backbone.image_size, backbone.num_prefix) == ((4, 4), (32, 32), 1)
    assert (backbone.mean, backbone.std) == (CLIP_MEAN, CLIP_STD)
    assert backbone.norm_pre is not None
    assert backbone.head.weight.shape == (20, 48)
    assert backbone.patch_bias is None


def test_mean_and_std_that_come_with_the_weights(build: Callable[..., nn.Module]) -> None:
    model = build()
    open_clip.model.set_model_preprocess_cfg(model, {"mean": (0.5, 0.4, 0.3), "std": [0.1, 0.2, 0.3]})
    backbone = fp.FrozenViT(model)
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert fp.FrozenViT(model, std=(1, 1, 1)).std == (1, 1, 1)


def test_fingerprint_is_of_the_backbone_alone(build: Callable[..., nn.Module]) -> None:
    model = build()
    first = fp.FrozenViT(model).fingerprint
    model.proj = None
    assert fp.FrozenViT(model.float()).fingerprint == first
    with torch.no_grad():
        model.ln_pre.bias[0] += 1
    assert fp.FrozenViT(model).fingerprint != first


@torch.no_grad()
def test_other_image_size_resamples_as_open_clip_does(randomised: Callable[..., nn.Module]) -> None:
    model = randomised(CLIP(20, VISION, TEXT)).double().eval()
    larger = CLIP(20, {**VISION, "image_size": (40, 64)}, TEXT).double().eval()
    state = model.state_dict()
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    backbone, x = fp.FrozenViT.from_open_clip(model, image_size=(40, 64)), images(40, 64)
    assert backbone.grid == (5, 8)
    assert_close(backbone(x), larger.encode_image(x))


PROMPTS = {
    "vpt-deep": fp.VPTConfig(num_prompts=4, deep=True),
    "vpt-shallow": fp.VPTConfig(num_prompts=4, deep=False),
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8)),
}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("name", ["CLIP with quick GELU", "norm behind the average", "custom block of all that"])
@torch.no_grad()
def test_prompted_forward_is_the_reference(build: Callable[..., nn.Module], name: str, config: Any) -> None:
    model = fp.PromptedViT(fp.FrozenViT(build(**OPTIONS[name])), config, num_classes=4).eval()
    x = images()
    assert_close(model(x), model.reference_forward(x))


@torch.no_grad()
def test_prompts_are_rows_of_open_clips_sequence(build: Callable[..., nn.Module]) -> None:
    """VPT's rows stand behind the pre-norm and before the patches, PGN's before the pre-norm and behind the patches."""
    tower, x = build(act_layer=oc.QuickGELU), images()
    patches = tower.conv1(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([tower.class_embedding.expand(2, 1, -1), patches], 1) + tower.positional_embedding

    model = fp.PromptedViT(fp.FrozenViT(tower), PROMPTS["vpt-shallow"]).eval()
    normed, prompts = tower.ln_pre(tokens), model.generator().expand(2, -1, -1)
    rows = torch.cat([normed[:, :1], prompts, normed[:, 1:]], 1)
    assert_close(model.forward_features(x), tower._pool(tower.transformer(rows))[0])

    model = fp.PromptedViT(fp.FrozenViT(tower), PROMPTS["pgn"]).eval()
    rows = tower.ln_pre(torch.cat([tokens, model.generator(x)], 1))
    assert_close(model.forward_features(x), tower._pool(tower.transformer(rows))[0])


def with_cross_attention() -> nn.Module:
    model = tower()
    model.transformer.resblocks[1] = oc.ResidualAttentionBlock(48, 3, is_cross_attention=True)
    return model


def with_norm() -> nn.Module:
    model = tower()
    model.transformer.resblocks[2].ln_2 = nn.BatchNorm1d(48)
    return model


def without_norm() -> nn.Module:
    model = tower()
    model.transformer.resblocks[2].ln_1 = nn.Identity()
    return model


def with_gated_mlp() -> nn.Module:
    model = tower()
    model.transformer.resblocks[0].mlp.gate = nn.Linear(48, 48)
    return model


class Mine(oc.VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: tower(attentional_pool=True, attn_pooler_heads=2), "pooling is an AttentionalPooler"),
        (lambda: tower(attentional_pool="parallel", attn_pooler_heads=2), "pooling is an AttentionalPooler"),
        (lambda: tower(pool_type="none"), "pool_type is 'none'"),
        (lambda: tower(scaled_cosine_attn=True), r"attention layer is .*scaled_cosine_attn"),
        (lambda: tower(scale_attn=True), r"block is .*scale_attn"),
        (lambda: tower(act_layer=nn.Softplus), "activation is Softplus"),
        (lambda: tower(patch_size=(8, 4)), r"patch embedding is Conv2d\(3, 48, kernel_size=\(8, 4\)"),
        (with_cross_attention, "block is .*cross-attention"),
        (with_norm, "norm layer is BatchNorm1d"),
        (without_norm, "a block's norm layer is Identity"),
        (with_gated_mlp, "mlp layer is c_fc, gelu, c_proj, gate"),
        (lambda: Mine(32, 8, 48, 1, 3, 4.0), "image tower is Mine"),
        (lambda: ModifiedResNet([1, 1, 1, 1], 8, 2, 32, 8), "image tower is ModifiedResNet"),
        (lambda: TimmModel("test_vit", 20, 160, pool="token", proj="mlp"), "linear layer is Mlp"),
        (lambda: TimmModel("test_resnet", 20, 160), "model is ResNet"),
    ],
)
def test_parts_are_refused_by_name(make: Callable[[], nn.Module], part: str) -> None:
    with pytest.raises(ValueError, match=f"this model cannot be frozen: {part}"):
        fp.FrozenViT(make())


def test_text_towers_are_refused() -> None:
    with pytest.raises(ValueError, match="image tower is TextTransformer"):
        fp.FrozenViT.from_open_clip(oc.TextTransformer(**TEXT))


@pytest.fixture
def tiny_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a tiny model among open_clip's, whose text tower would need the hub."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    text = {"hf_model_name": "not/there", "hf_tokenizer_name": "not/there"}
    config = {"embed_dim": 20, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": text}
    (tmp_path / "ViT-Tiny-8.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    return "ViT-Tiny-8"


def test_from_open_clip_by_name(tiny_name: str) -> None:
    backbone = fp.FrozenViT.from_open_clip(tiny_name)
    assert (backbone.spec.name, backbone.grid, backbone.blocks[0].mlp.act) == (tiny_name, (4, 4), "quick_gelu")
    assert (backbone.mean, backbone.std) == (CLIP_MEAN, CLIP_STD)
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 20)
    assert fp.FrozenViT.from_open_clip(tiny_name, image_size=(16, 40)).grid == (2, 5)


@torch.no_grad()
def test_from_open_clip_loads_weights(tmp_path: Path) -> None:
    model = CLIP(20, VISION, TEXT).eval()
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    config = {
        "model_cfg": {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT},
        "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    backbone = fp.FrozenViT.from_open_clip(f"local-dir:{tmp_path}")
    assert backbone.fingerprint == fp.FrozenViT(model).fingerprint
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), CLIP_STD)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(x), model.encode_image(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("ViT-B-17",), ValueError, "model must be an open_clip model name, got 'ViT-B-17'"),
        ((16,), TypeError, "model must be an open_clip model name or a module, got int"),
        (("ViT-B-32", "nobody"), ValueError, "pretrained must be a file or one of .*'openai'.* got 'nobody'"),
        (("ViT-B-32", True), TypeError, "pretrained must be a tag of published weights, a file or None, got True"),
        (("ViT-B-32", None, -1), ValueError, "image_size must be pixels or .* got -1"),
        ((nn.Identity(), "openai"), ValueError, "pretrained must be None for a model that is built"),
        ((nn.Linear(3, 3),), ValueError, "class Linear .* is not supported"),
    ],
)
def test_from_open_clip_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.FrozenViT.from_open_clip(*arguments)


def test_open_clip_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"open_clip is not installed: pip install 'fastprompt\[openclip\]'"):
        fp.FrozenViT.from_open_clip("ViT-B-32")
