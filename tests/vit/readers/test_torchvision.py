"""The torchvision reader: parity with torchvision's own forward, refusal by name, prompts in its blocks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models._api import register_model
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer, interpolate_embeddings

import fastprompt as fp

SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 3,
    "num_heads": 3,
    "hidden_dim": 48,
    "mlp_dim": 80,
    "num_classes": 5,
}


@register_model(name="vit_of_test_torchvision")
def tiny(*, weights: Any = None, progress: bool = True, **options: Any) -> VisionTransformer:
    assert weights is None
    return VisionTransformer(**{**SIZES, **options})


@pytest.fixture
def build(randomised: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda **options: randomised(tiny(**options)).double().eval()


def images(*sides: int) -> Tensor:
    return torch.randn(2, 3, *(sides or (32, 32)), dtype=torch.float64)


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == torch.float64
    assert (got - expected).norm() <= 1e-10 * expected.norm()


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "another eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "rms norm": {"norm_layer": nn.RMSNorm},
    "dropouts do nothing": {"dropout": 0.5, "attention_dropout": 0.5},
    "one head": {"num_heads": 1, "num_layers": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@torch.no_grad()
def test_backbone_is_torchvisions_forward(build: Callable[..., nn.Module], options: dict[str, Any]) -> None:
    model, x = build(**options), images()
    assert_close(fp.FrozenViT(model)(x), model(x))


HEADS: dict[str, nn.Module] = {
    "identity": nn.Identity(),
    "linear": nn.Linear(48, 7),
    "dropout and linear": nn.Sequential(nn.Dropout(0.5), nn.Linear(48, 7)),
    "empty": nn.Sequential(),
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
@torch.no_grad()
def test_replaced_heads(build: Callable[..., nn.Module], head: nn.Module) -> None:
    model, x = build(), images()
    model.heads = head.double().eval()
    backbone = fp.FrozenViT(model)
    assert_close(backbone(x), model(x))
    assert (backbone.head is None) == (not list(head.parameters()))


def test_attributes(build: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(build())
    assert (backbone.width, backbone.depth, backbone.num_heads, backbone.patch_size) == (48, 3, 3, 8)
    assert (backbone.grid, backbone.image_size, backbone.num_prefix) == ((4, 4), (32, 32), 1)
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone.spec.pool == "cls"
    other = fp.FrozenViT(build(), mean=(0.1, 0.2, 0.3), std=(1, 2, 3))
    assert (other.mean, other.std) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_raw_pixels_are_normalised(build: Callable[..., nn.Module]) -> None:
    model, pixels = build(), torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64).view(3, 1, 1)
    assert_close(fp.FrozenViT(model)(pixels), model((pixels.double() / 255 - mean) / std))


def test_fingerprint_is_of_the_backbone_alone(build: Callable[..., nn.Module]) -> None:
    model = build()
    first = fp.FrozenViT(model).fingerprint
    model.heads = nn.Identity()
    assert fp.FrozenViT(model.float()).fingerprint == first
    with torch.no_grad():
        model.encoder.layers[1].mlp[3].bias[0] += 1
    assert fp.FrozenViT(model).fingerprint != first


@torch.no_grad()
def test_other_image_size_resamples_as_torchvision_does(build: Callable[..., nn.Module]) -> None:
    model, larger = build(), build(image_size=48)
    larger.load_state_dict(interpolate_embeddings(48, 8, model.state_dict()))
    backbone, x = fp.FrozenViT(model, image_size=48), images(48, 48)
    assert (backbone.image_size, backbone.grid) == ((48, 48), (6, 6))
    assert_close(backbone(x), larger(x))
    assert fp.FrozenViT(model, image_size=(32, 32)).fingerprint == fp.FrozenViT(model).fingerprint
    assert fp.FrozenViT(model, image_size=(16, 40))(images(16, 40)).shape == (2, 5)


@pytest.mark.parametrize("image_size", [0, "48", True, (32,), (32, 0), 32.0])
def test_image_sizes_that_are_none(build: Callable[..., nn.Module], image_size: Any) -> None:
    with pytest.raises(ValueError, match="image_size must be pixels"):
        fp.FrozenViT(build(), image_size=image_size)
    with pytest.raises(ValueError, match="image_size must be pixels"):
        fp.FrozenViT.from_torchvision("vit_b_16", image_size=image_size)


def test_image_sizes_of_part_patches(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="multiples of the patch size 8, got 36 x 32"):
        fp.FrozenViT(build(), image_size=(36, 32))


PROMPTS = {
    "vpt-deep": fp.VPTConfig(num_prompts=4, deep=True),
    "vpt-shallow": fp.VPTConfig(num_prompts=4, deep=False),
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8)),
}


@pytest.mark.parametrize("config", PROMPTS.values(), ids=PROMPTS.keys())
@torch.no_grad()
def test_prompted_forward_is_the_reference(build: Callable[..., nn.Module], config: Any) -> None:
    model = fp.PromptedViT(fp.FrozenViT(build()), config, num_classes=4).eval()
    x = images()
    assert_close(model(x), model.reference_forward(x))


@torch.no_grad()
def test_shallow_prompts_are_rows_of_torchvisions_sequence(build: Callable[..., nn.Module]) -> None:
    vit, x = build(), images()
    model = fp.PromptedViT(fp.FrozenViT(vit), PROMPTS["vpt-shallow"]).eval()
    patches = vit.conv_proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([vit.class_token.expand(2, -1, -1), patches], 1) + vit.encoder.pos_embedding
    prompts = model.generator().expand(2, -1, -1)
    tokens = torch.cat([tokens[:, :1], prompts, tokens[:, 1:]], 1)
    assert_close(model.forward_features(x), vit.encoder.ln(vit.encoder.layers(tokens))[:, 0])


def with_extra_keys() -> nn.Module:
    model = tiny()
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(48, 3, add_bias_kv=True, batch_first=True)
    return model


def with_one_linear_mlp() -> nn.Module:
    model = tiny()
    model.encoder.layers[0].mlp = nn.Sequential(nn.Linear(48, 48))
    return model


def with_activation() -> nn.Module:
    model = tiny()
    model.encoder.layers[0].mlp[1] = nn.Softplus()
    return model


def with_stride() -> nn.Module:
    model = tiny()
    model.conv_proj = nn.Conv2d(3, 48, 8, stride=4)
    return model


class Mine(VisionTransformer):
    pass


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: resnet18(), "model is ResNet"),
        (lambda: Mine(**SIZES), "model is Mine"),
        (lambda: tiny(representation_size=16), "head is Linear → Tanh → Linear"),
        (lambda: tiny(conv_stem_configs=[ConvStemConfig(8, 3, 8)]), "patch embedding is Sequential"),
        (lambda: tiny(norm_layer=partial(nn.GroupNorm, 1)), "norm layer is GroupNorm"),
        (with_extra_keys, "attention layer is MultiheadAttention with other keys"),
        (with_one_linear_mlp, "mlp layer is 1 layers"),
        (with_activation, "activation is Softplus"),
        (with_stride, r"patch embedding is Conv2d\(3, 48, kernel_size=\(8, 8\), stride=\(4, 4\)\)"),
    ],
)
def test_parts_are_refused_by_name(make: Callable[[], nn.Module], part: str) -> None:
    with pytest.raises(ValueError, match=f"this model cannot be frozen: {part}"):
        fp.FrozenViT(make())


def test_from_torchvision() -> None:
    backbone = fp.FrozenViT.from_torchvision("vit_of_test_torchvision", num_classes=7)
    assert backbone.spec.name == "vit_of_test_torchvision"
    assert backbone(torch.randn(1, 3, 32, 32)).shape == (1, 7)
    backbone = fp.FrozenViT.from_torchvision("vit_of_test_torchvision", image_size=(16, 24), std=(1, 1, 2))
    assert (backbone.grid, backbone.std) == ((2, 3), (1, 1, 2))
    with torch.device("meta"):
        backbone = fp.FrozenViT.from_torchvision("vit_b_32", image_size=384)
    assert (backbone.width, backbone.depth, backbone.grid) == (768, 12, (12, 12))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("vit_c_16",), ValueError, r"torchvision model name \(.*vit_b_16.*\), got 'vit_c_16'"),
        ((tiny(),), TypeError, r"name must be a torchvision model name, got VisionTransformer"),
        (("vit_b_16", 1), TypeError, "pretrained must be a bool or the name of weights, got int"),
        (("vit_b_16", "IMAGENET1K"), ValueError, "pretrained must be one of .*'IMAGENET1K_SWAG_E2E_V1'.*'IMAGENET1K'"),
        (("squeezenet1_0",), ValueError, "model is SqueezeNet"),
    ],
)
def test_from_torchvision_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fp.FrozenViT.from_torchvision(*arguments)


def test_importing_fastprompt_imports_no_library_of_models() -> None:
    code = (
        "import sys, fastprompt as fp; fp.FrozenViT; fp.PromptedViT\n"
        "print([m for m in ('open_clip', 'transformers') if m in sys.modules])\n"
        "print([m for m in sys.modules if m.startswith('fastprompt.vit.readers.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]
