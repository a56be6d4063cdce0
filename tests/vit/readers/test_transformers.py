"""The transformers reader: parity with each model's own output, refusal by name, prompts in their blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import fastprompt as fp

hf = pytest.importorskip("transformers", minversion="5.23")

SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3}
TEXT = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


def vit(kind: str = "ViTForImageClassification", **options: Any) -> nn.Module:
    return getattr(hf, kind)(hf.ViTConfig(**{**SIZES, "intermediate_size": 80, "num_labels": 5, **options}))


def clip(kind: str = "CLIPVisionModelWithProjection", **options: Any) -> nn.Module:
    vision = {**SIZES, "intermediate_size": 80, "projection_dim": 20, **options}
    if kind.startswith("CLIPVision"):
        return getattr(hf, kind)(hf.CLIPVisionConfig(**vision))
    return getattr(hf, kind)(hf.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=20, num_labels=5))


def siglip(kind: str = "SiglipVisionModel", **options: Any) -> nn.Module:
    vision = {**SIZES, "intermediate_size": 80, **options}
    if kind == "SiglipVisionModel":
        return hf.SiglipVisionModel(hf.SiglipVisionConfig(**vision))
    return getattr(hf, kind)(hf.SiglipConfig(vision_config=vision, text_config=TEXT, num_labels=5))


def dinov2(kind: str = "Dinov2Model", **options: Any) -> nn.Module:
    config = hf.Dinov2WithRegistersConfig if "Registers" in kind else hf.Dinov2Config
    return getattr(hf, kind)(config(**{**SIZES, "mlp_ratio": 2, "num_labels": 5, **options}))


def dinov3(**options: Any) -> nn.Module:
    return hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**{**SIZES, "intermediate_size": 80, **options}))


def siglip2(kind: str = "Siglip2VisionModel", **options: Any) -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
    vision = {**sizes, "intermediate_size": 80, "num_patches": 16, **options}
    if kind == "Siglip2VisionModel":
        return hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**vision))
    return getattr(hf, kind)(hf.Siglip2Config(vision_config=vision, text_config=TEXT, num_labels=5))


def deit(kind: str = "DeiTForImageClassificationWithTeacher", **options: Any) -> nn.Module:
    return getattr(hf, kind)(hf.DeiTConfig(**{**SIZES, "intermediate_size": 80, "num_labels": 5, **options}))


def mae(**options: Any) -> nn.Module:
    return hf.ViTMAEModel(hf.ViTMAEConfig(**{**SIZES, "intermediate_size": 80, "mask_ratio": 0.0, **options}))


def beit(kind: str = "BeitForImageClassification", **options: Any) -> nn.Module:
    return getattr(hf, kind)(hf.BeitConfig(**{**SIZES, "intermediate_size": 80, "num_labels": 5, **options}))


def in_patches(x: Tensor) -> dict[str, Tensor]:
    """Images as SigLIP 2's image processor cuts them: patches in order, each (row, column, channel)."""
    rows, columns = x.shape[2] // 8, x.shape[3] // 8
    patches = x.unflatten(3, (columns, 8)).unflatten(2, (rows, 8)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]] * len(x))
    return {"pixel_values": patches, "pixel_attention_mask": torch.ones(patches.shape[:2]), "spatial_shapes": shapes}


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).pooler_output


def logits(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).logits


Case = tuple[Callable[..., nn.Module], dict[str, Any], Callable[[nn.Module, Tensor], Tensor], str]
CASES: dict[str, Case] = {
    "ViTForImageClassification": (vit, {}, logits, "cls"),
    "ViTForImageClassification without labels": (vit, {"num_labels": 0}, logits, "cls"),
    "ViTForImageClassification without qkv bias": (vit, {"qkv_bias": False}, logits, "cls"),
    "ViTForImageClassification, not square": (vit, {"image_size": (24, 40)}, logits, "cls"),
    "ViTForImageClassification, other norms": (vit, {"layer_norm_eps": 1e-3, "hidden_act": "relu"}, logits, "cls"),
    "ViTForImageClassification, dropouts": (
        vit,
        {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5},
        logits,
        "cls",
    ),
    "ViTForImageClassification, two channels": (vit, {"num_channels": 2}, logits, "cls"),
    "ViTModel": (vit, {"kind": "ViTModel"}, lambda m, x: m(x).last_hidden_state[:, 0], "cls"),
    "CLIPVisionModelWithProjection": (clip, {}, lambda m, x: m(x).image_embeds, "cls"),
    "CLIPVisionModelWithProjection, GELU": (clip, {"hidden_act": "gelu"}, lambda m, x: m(x).image_embeds, "cls"),
    "CLIPVisionModel": (clip, {"kind": "CLIPVisionModel"}, pooled, "cls"),
    "CLIPModel": (clip, {"kind": "CLIPModel"}, lambda m, x: m.get_image_features(x).pooler_output, "cls"),
    "CLIPForImageClassification": (clip, {"kind": "CLIPForImageClassification"}, logits, "patches"),
    "SiglipVisionModel": (siglip, {}, pooled, "map"),
    "SiglipVisionModel, part patches": (siglip, {"image_size": 38}, pooled, "map"),
    "SiglipVisionModel without head": (
        siglip,
        {"vision_use_head": False},
        lambda m, x: m(x).last_hidden_state.mean(1),
        "patches",
    ),
    "SiglipModel": (
        siglip,
        {"kind": "SiglipModel"},
        lambda m, x: m.get_image_features(x).pooler_output,
        "map",
    ),
    "SiglipForImageClassification": (siglip, {"kind": "SiglipForImageClassification"}, logits, "patches"),
    "Dinov2Model": (dinov2, {}, pooled, "cls"),
    "Dinov2Model with SwiGLU": (dinov2, {"use_swiglu_ffn": True, "drop_path_rate": 0.2}, pooled, "cls"),
    "Dinov2WithRegistersModel": (dinov2, {"kind": "Dinov2WithRegistersModel"}, pooled, "cls"),
    "Dinov2WithRegistersModel with SwiGLU": (
        dinov2,
        {"kind": "Dinov2WithRegistersModel", "use_swiglu_ffn": True, "num_register_tokens": 2},
        pooled,
        "cls",
    ),
    "DINOv3ViTModel": (dinov3, {}, pooled, "cls"),
    "DINOv3ViTModel, gated and not square": (
        dinov3,
        {"use_gated_mlp": True, "image_size": (24, 40), "num_register_tokens": 0, "hidden_act": "silu"},
        pooled,
        "cls",
    ),
    "DINOv3ViTModel, other biases": (
        dinov3,
        {"query_bias": False, "key_bias": True, "proj_bias": False},
        pooled,
        "cls",
    ),
    "Siglip2VisionModel": (siglip2, {}, lambda m, x: m(**in_patches(x)).pooler_output, "map"),
    "Siglip2Model": (
        siglip2,
        {"kind": "Siglip2Model"},
        lambda m, x: m.get_image_features(**in_patches(x)).pooler_output,
        "map",
    ),
    "Siglip2ForImageClassification": (
        siglip2,
        {"kind": "Siglip2ForImageClassification"},
        lambda m, x: m(**in_patches(x)).logits,
        "patches",
    ),
    "DeiTForImageClassificationWithTeacher": (deit, {}, logits, "cls+dist"),
    "DeiTForImageClassification": (deit, {"kind": "DeiTForImageClassification"}, logits, "cls"),
    "DeiTModel": (deit, {"kind": "DeiTModel"}, lambda m, x: m(x).last_hidden_state[:, 0], "cls"),
    "ViTMAEModel": (mae, {}, lambda m, x: m(x).last_hidden_state[:, 0], "cls"),
    "BeitForImageClassification": (beit, {"use_relative_position_bias": True}, logits, "patches"),
    "BeitForImageClassification, shared bias": (
        beit,
        {
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
        },
        logits,
        "cls",
    ),
    "BeitModel": (
        beit,
        {"kind": "BeitModel", "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0},
        pooled,
        "patches",
    ),
}


@pytest.fixture
def build(randomised: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda name: randomised(CASES[name][0](**CASES[name][1])).double().eval()


def images(*sides: int, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, *(sides or (32, 32)), dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == torch.float64
    assert (got - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_backbone_is_the_models_own_output(build: Callable[..., nn.Module], name: str) -> None:
    _, options, output, pool = CASES[name]
    size = options.get("image_size", 32)
    sides = size if isinstance(size, tuple) else (size, size)
    model, x = build(name), images(*sides, channels=options.get("num_channels", 3))
    backbone = fp.FrozenViT(model)
    assert_close(backbone(x), output(model, x))
    assert backbone.spec.pool == pool
    assert backbone.image_size == tuple(x.shape[2:])
    assert backbone.grid == (x.shape[2] // 8, x.shape[3] // 8)


@torch.no_grad()
def test_a_missing_bias_is_zero(build: Callable[..., nn.Module]) -> None:
    model = build("ViTForImageClassification")
    model.vit.layers[1].attention.k_proj.bias = None
    model.vit.layers[1].attention.v_proj.bias = None
    x = images()
    assert_close(fp.FrozenViT(model)(x), model(x).logits)


def test_a_bias_of_beit_is_for_squares() -> None:
    with pytest.raises(ValueError, match=r"image_size is \(24, 40\); supported: a square"):
        fp.FrozenViT(beit(image_size=(24, 40), use_relative_position_bias=True))


@pytest.mark.parametrize("name", ["DINOv3ViTModel", "Siglip2VisionModel"])
@torch.no_grad()
def test_other_sizes_follow_the_rule_of_the_model(build: Callable[..., nn.Module], name: str) -> None:
    model, x = build(name), images(24, 40)
    backbone = fp.FrozenViT(model, image_size=(24, 40))
    assert_close(backbone(x), CASES[name][2](model, x), 1e-6)


ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
    "mish": "mish",
    "linear": "identity",
    "relu6": "relu6",
    "leaky_relu": "leaky_relu",
    "hardswish": "hard_swish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


@pytest.mark.parametrize("act", ACTIVATIONS)
@torch.no_grad()
def test_activations(act: str, randomised: Callable[..., nn.Module]) -> None:
    model, x = randomised(vit(hidden_act=act, num_hidden_layers=1)).double().eval(), images()
    backbone = fp.FrozenViT(model)
    assert_close(backbone(x), model(x).logits)
    assert backbone.blocks[0].mlp.act == ACTIVATIONS[act]


@pytest.mark.parametrize(
    ("name", "mean", "std", "num_prefix"),
    [
        ("ViTModel", HALF, HALF, 1),
        ("CLIPVisionModel", CLIP_MEAN, CLIP_STD, 1),
        ("SiglipVisionModel", HALF, HALF, 0),
        ("Dinov2Model", IMAGENET_MEAN, IMAGENET_STD, 1),
        ("Dinov2WithRegistersModel", IMAGENET_MEAN, IMAGENET_STD, 5),
    ],
)
def test_attributes(
    build: Callable[..., nn.Module], name: str, mean: tuple[float], std: tuple[float], num_prefix: int
) -> None:
    model = build(name)
    backbone = fp.FrozenViT(model)
    assert (backbone.width, backbone.depth, backbone.num_heads, backbone.patch_size) == (48, 3, 3, 8)
    assert (backbone.grid, backbone.image_size, backbone.num_prefix) == ((4, 4), (32, 32), num_prefix)
    assert (backbone.mean, backbone.std, backbone.spec.name) == (mean, std, name)
    assert fp.FrozenViT.from_transformers(model, std=(1, 2, 3)).std == (1, 2, 3)


@pytest.mark.parametrize("name", ["ViTForImageClassification", "CLIPVisionModelWithProjection"])
def test_fingerprint_is_of_the_backbone_alone(build: Callable[..., nn.Module], name: str) -> None:
    model = build(name)
    first = fp.FrozenViT(model).fingerprint
    tower = model.vit if name.startswith("ViT") else model.vision_model
    assert fp.FrozenViT(tower.float()).fingerprint == first
    norm = tower.layernorm if name.startswith("ViT") else tower.pre_layrnorm
    with torch.no_grad():
        norm.bias[0] += 1
    assert fp.FrozenViT(model).fingerprint != first


def test_clip_is_the_same_backbone_in_every_library(randomised: Callable[..., nn.Module]) -> None:
    """The same weights in transformers, timm and open_clip: the same fingerprint, so adapters move between them."""
    oc = pytest.importorskip("open_clip.transformer")
    model = randomised(clip())
    other = oc.VisionTransformer(32, 8, 48, 3, 3, 80 / 48, output_dim=20, act_layer=oc.QuickGELU)
    tower, blocks = model.vision_model, zip(model.vision_model.encoder.layers, other.transformer.resblocks, strict=True)
    with torch.no_grad():
        other.conv1.weight.copy_(tower.embeddings.patch_embedding.weight)
        other.class_embedding.copy_(tower.embeddings.class_embedding)
        other.positional_embedding.copy_(tower.embeddings.position_embedding.weight)
        for theirs, mine in ((other.ln_pre, tower.pre_layrnorm), (other.ln_post, tower.post_layernorm)):
            theirs.load_state_dict(mine.state_dict())
        for a, b in blocks:
            b.ln_1.load_state_dict(a.layer_norm1.state_dict())
            b.ln_2.load_state_dict(a.layer_norm2.state_dict())
            b.mlp.c_fc.load_state_dict(a.mlp.fc1.state_dict())
            b.mlp.c_proj.load_state_dict(a.mlp.fc2.state_dict())
            b.attn.out_proj.load_state_dict(a.self_attn.out_proj.state_dict())
            qkv = (a.self_attn.q_proj, a.self_attn.k_proj, a.self_attn.v_proj)
            b.attn.in_proj_weight.copy_(torch.cat([part.weight for part in qkv]))
            b.attn.in_proj_bias.copy_(torch.cat([part.bias for part in qkv]))
        other.proj.copy_(model.visual_projection.weight.t())
    mine, theirs = fp.FrozenViT(model), fp.FrozenViT(other)
    assert mine.fingerprint == theirs.fingerprint
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(mine(x), theirs(x))

    third = timm.create_model("vit_base_patch16_clip_quickgelu_224", img_size=32, patch_size=8, embed_dim=48, depth=3,
                              num_heads=3, mlp_ratio=80 / 48, num_classes=0)  # fmt: skip
    canonical = fp.FrozenViT(third)
    canonical.load_state_dict({k: v for k, v in mine.state_dict().items() if not k.startswith("head.")})
    assert canonical.fingerprint == mine.fingerprint


RESIZED = {
    "ViTForImageClassification": 1e-10,
    "CLIPVisionModelWithProjection": 1e-10,
    "SiglipVisionModel": 1e-10,
    "Dinov2Model": 1e-6,
    "Dinov2WithRegistersModel": 1e-6,
}


@pytest.mark.parametrize("size", [(48, 48), (16, 40)])
@pytest.mark.parametrize("name", RESIZED)
@torch.no_grad()
def test_other_image_size_resamples_as_transformers_does(
    build: Callable[..., nn.Module], name: str, size: tuple[int, int]
) -> None:
    """DINOv2's embedding is resampled by transformers in float32, in whatever dtype the model is."""
    model, x = build(name), images(*size)
    backbone = fp.FrozenViT.from_transformers(model, image_size=size)
    asked = {} if name.startswith("Dino") else {"interpolate_pos_encoding": True}
    output = model(x, **asked)
    expected = output.logits if name.startswith("ViT") else output[0] if "Projection" in name else output.pooler_output
    assert_close(backbone(x), expected, RESIZED[name])


PROMPTS = {
    "vpt-deep": fp.VPTConfig(num_prompts=4, deep=True),
    "vpt-shallow": fp.VPTConfig(num_prompts=4, deep=False),
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8)),
}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS.keys())
@pytest.mark.parametrize("name", [*RESIZED, "CLIPForImageClassification", "Dinov2WithRegistersModel with SwiGLU"])
@torch.no_grad()
def test_prompted_forward_is_the_reference(build: Callable[..., nn.Module], name: str, config: Any) -> None:
    model = fp.PromptedViT(fp.FrozenViT(build(name)), config, num_classes=4).eval()
    x = images()
    assert_close(model(x), model.reference_forward(x))


def insert(tokens: Tensor, prompts: Tensor, num_prefix: int) -> Tensor:
    return torch.cat([tokens[:, :num_prefix], prompts.expand(2, -1, -1), tokens[:, num_prefix:]], 1)


@pytest.mark.parametrize("name", RESIZED)
@torch.no_grad()
def test_shallow_prompts_are_rows_of_the_models_sequence(build: Callable[..., nn.Module], name: str) -> None:
    vision, x = build(name), images()
    model = fp.PromptedViT(fp.FrozenViT(vision), PROMPTS["vpt-shallow"]).eval()
    tower = getattr(vision, "vit", getattr(vision, "vision_model", vision))
    tokens = tower.embeddings(x)
    if name.startswith("CLIP"):
        tokens = tower.pre_layrnorm(tokens)
    tokens = insert(tokens, model.generator(), model.backbone.num_prefix)
    for layer in tower.layers if name.startswith("ViT") else next(iter(tower.encoder.children())):
        tokens = layer(tokens, None)
    if name.startswith("Siglip"):
        tokens = tower.post_layernorm(tokens)
        expected = tower.head(tokens[:, 4:])
    elif name.startswith("CLIP"):
        expected = tower.post_layernorm(tokens[:, 0])
    else:
        expected = tower.layernorm(tokens)[:, 0]
    assert_close(model.forward_features(x), expected)


def with_layer(change: Callable[[nn.Module], None], make: Callable[..., nn.Module] = vit) -> nn.Module:
    model = make()
    change(model)
    return model


def set_norm(model: nn.Module) -> None:
    model.vit.layers[1].layernorm_before = nn.BatchNorm1d(48)


def set_linear(model: nn.Module) -> None:
    model.vit.layers[1].attention.q_proj = nn.Sequential(nn.Linear(48, 48))


def set_classifier(model: nn.Module) -> None:
    model.classifier = nn.Sequential(nn.Linear(48, 5))


def set_mlp(model: nn.Module) -> None:
    model.vit.layers[1].mlp = nn.Linear(48, 48)


def set_layer(model: nn.Module) -> None:
    model.vit.layers[1] = nn.Identity()


class Mine(hf.ViTModel):
    pass


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: dinov2("Dinov2ForImageClassification"), "model is Dinov2ForImageClassification.*patches' average"),
        (
            lambda: dinov2("Dinov2WithRegistersForImageClassification"),
            "model is Dinov2WithRegistersForImageClassification.*patches' average",
        ),
        (lambda: dinov2("Dinov2Backbone"), "model is Dinov2Backbone"),
        (lambda: dinov2(image_size=(24, 40)), r"image_size is \(24, 40\)"),
        (lambda: vit("ViTForMaskedImageModeling", image_size=32), "model is ViTForMaskedImageModeling"),
        (lambda: vit(patch_size=(8, 4)), r"patch embedding is Conv2d\(3, 48, kernel_size=\(8, 4\)"),
        (lambda: vit(hidden_act="gelu_10"), "activation is ClippedGELUActivation"),
        (lambda: vit(hidden_act="gelu_fast"), "activation is FastGELUActivation"),
        (lambda: Mine(vit().config), "model is Mine"),
        (lambda: with_layer(set_norm), "norm layer is BatchNorm1d"),
        (lambda: with_layer(set_linear), "linear layer is Sequential"),
        (lambda: with_layer(set_classifier), "linear layer is Sequential"),
        (lambda: with_layer(set_mlp), "layer is Linear"),
        (lambda: with_layer(set_layer), "layer is Identity"),
        (lambda: clip("CLIPModel").text_model, "model is CLIPTextModel"),
        (lambda: hf.ViTMAEForPreTraining(hf.ViTMAEConfig(**SIZES)), "model is ViTMAEForPreTraining"),
        (lambda: hf.DINOv3ViTBackbone(hf.DINOv3ViTConfig(**SIZES)), "model is DINOv3ViTBackbone"),
        (lambda: siglip2(num_patches=15), "num_patches is 15; supported: a square number"),
        (lambda: hf.Swinv2Model(hf.Swinv2Config(image_size=32, embed_dim=12, depths=[1], num_heads=[1])), "Swinv2"),
    ],
)
def test_parts_are_refused_by_name(make: Callable[[], nn.Module], part: str) -> None:
    with pytest.raises(ValueError, match=f"this model cannot be frozen: .*{part}"):
        fp.FrozenViT(make())


def test_another_layout_of_transformers_is_refused() -> None:
    model = vit()
    del model.vit.layernorm
    with pytest.raises(ValueError, match=r"ViTForImageClassification of transformers .* 5\.23 .*layernorm"):
        fp.FrozenViT(model)


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (vit, "ViTForImageClassification"),
        (lambda: vit("ViTModel"), "ViTModel"),
        (lambda: clip("CLIPModel"), "CLIPVisionModelWithProjection"),
        (clip, "CLIPVisionModelWithProjection"),
        (lambda: clip("CLIPVisionModel"), "CLIPVisionModel"),
        (lambda: siglip("SiglipModel"), "SiglipVisionModel"),
        (siglip, "SiglipVisionModel"),
        (lambda: siglip("SiglipForImageClassification"), "SiglipForImageClassification"),
        (dinov2, "Dinov2Model"),
        (lambda: dinov2("Dinov2WithRegistersModel"), "Dinov2WithRegistersModel"),
    ],
)
@torch.no_grad()
def test_from_transformers_loads_a_checkpoint(
    tmp_path: Path, randomised: Callable[..., nn.Module], make: Callable[[], nn.Module], kind: str
) -> None:
    model = randomised(make()).eval()
    model.save_pretrained(tmp_path / "a-model")
    backbone, known = fp.FrozenViT.from_transformers(tmp_path / "a-model"), fp.FrozenViT(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(backbone(x), known(x))
    assert backbone.fingerprint == known.fingerprint
    assert backbone.mean == known.mean
    assert backbone.spec.name == "a-model"
    fresh = fp.FrozenViT.from_transformers(str(tmp_path / "a-model"), pretrained=False, image_size=48)
    assert fresh.grid == (6, 6)
    assert fresh(torch.randn(2, 3, 48, 48)).shape == known(x).shape
    assert not torch.equal(fresh.patch_weight, known.patch_weight)


@pytest.mark.parametrize("half", [False, True])
def test_mean_and_std_of_the_image_processor(tmp_path: Path, half: bool) -> None:
    model = vit("ViTModel")
    (model.half() if half else model).save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = fp.FrozenViT.from_transformers(tmp_path)
    assert (backbone.mean, backbone.std, backbone.dtype) == ((0.1, 0.2, 0.3), (1, 2, 3), torch.float32)
    assert fp.FrozenViT.from_transformers(tmp_path, mean=HALF).mean == HALF
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**processor, "do_normalize": False}))
    backbone = fp.FrozenViT.from_transformers(tmp_path)
    assert (backbone.mean, backbone.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda: vit("ViTModel").config, 48),
        (lambda: clip("CLIPModel").config, 20),
        (lambda: clip().config, 20),
        (lambda: siglip("SiglipModel").config, 48),
        (lambda: dinov2().config, 48),
    ],
)
def test_from_transformers_of_a_config(make: Callable[[], Any], outputs: int) -> None:
    config = make()
    before = config.to_dict()
    backbone = fp.FrozenViT.from_transformers(config)
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, outputs)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((3,), {}, TypeError, "model must be a transformers model, its config, a hub name or a folder, got int"),
        ((hf.BertConfig(),), {}, ValueError, "model must be of type vit, clip, .*, got 'bert'"),
        ((hf.ViTConfig(), "yes"), {}, TypeError, "pretrained must be a bool, got 'yes'"),
        ((hf.ViTConfig(),), {"revision": "main"}, ValueError, r"a config takes no options .* got \['revision'\]"),
        ((nn.Linear(2, 2),), {"revision": "main"}, ValueError, r"a model takes no options .* got \['revision'\]"),
        ((nn.Linear(2, 2),), {}, ValueError, "class Linear .* is not supported"),
        ((hf.ViTConfig(),), {"image_size": "big"}, ValueError, "image_size must be pixels .* got 'big'"),
        (("not/a/folder",), {"local_files_only": True}, OSError, "not/a/folder"),
    ],
)
def test_from_transformers_refuses(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fp.FrozenViT.from_transformers(*arguments, **options)


def test_transformers_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"transformers is not installed: pip install 'fastprompt\[hf\]'"):
        fp.FrozenViT.from_transformers("google/vit-base-patch16-224")
