"""FrozenViT: its attributes, its fingerprint, that it stays frozen, and the images it takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp


def test_attributes(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    assert (backbone.width, backbone.depth, backbone.num_heads, backbone.patch_size) == (48, 3, 3, 8)
    assert (backbone.grid, backbone.image_size, backbone.num_patches, backbone.num_prefix) == (
        (4, 4),
        (32, 32),
        16,
        1,
    )
    assert (backbone.mean, backbone.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (backbone.dtype, backbone.device) == (torch.float32, torch.device("cpu"))


def test_mean_and_std_can_be_given(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit, mean=[0.5, 0.4, 0.3], std=(1, 2, 3))
    assert (backbone.mean, backbone.std) == ((0.5, 0.4, 0.3), (1.0, 2.0, 3.0))
    for mean in ([0.5], 0.5, "abc", (0.5, 0.5, float("nan"))):
        with pytest.raises(ValueError, match=r"mean must be three numbers, got"):
            fp.FrozenViT(tiny_vit, mean=mean)
    with pytest.raises(ValueError, match=r"std must be three positive numbers"):
        fp.FrozenViT(tiny_vit, std=[0.5, 0.0, 0.5])


def looked_at(backbone: fp.FrozenViT, images: Tensor) -> list[str]:
    """The warnings about raw pixels when the backbone sees the images twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backbone(images)
        backbone(images)
    return [str(warning.message) for warning in caught if "raw pixels must be uint8" in str(warning.message)]


@pytest.mark.parametrize(("scale", "found"), [(1, "from 0 to 1"), (255, "from 0 to 255"), (65535, "from 0 to 6.55e")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_that_are_not_normalised_are_told_once(
    tiny_vit: VisionTransformer, scale: float, found: str, dtype: torch.dtype
) -> None:
    images = torch.rand(2, 3, 32, 32, dtype=dtype)
    images = (images - images.min()) / (images.max() - images.min()) * scale
    backbone = fp.FrozenViT(tiny_vit).to(dtype)
    (message,) = looked_at(backbone, images)
    assert found in message
    assert looked_at(backbone, images) == []


def test_normalised_images_are_no_raw_pixels(tiny_vit: VisionTransformer) -> None:
    raw = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    backbone = fp.FrozenViT(tiny_vit)
    for images in (raw, backbone.normalise(raw), torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.7)):
        assert looked_at(fp.FrozenViT(tiny_vit), images) == []
    identity = fp.FrozenViT(tiny_vit, mean=(0, 0, 0), std=(1, 1, 1))
    assert looked_at(identity, raw / 255) == []
    assert len(looked_at(identity, raw.float())) == 1


def test_raw_pixels_after_a_batch_of_zeros_are_told(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    assert looked_at(backbone, torch.zeros(1, 3, 32, 32)) == []
    assert len(looked_at(backbone, torch.rand(1, 3, 32, 32))) == 1


def test_fit_tells_of_raw_pixels(tiny_vit: VisionTransformer) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=1), num_classes=2)
    data = (torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 0, 1]))
    with pytest.warns(UserWarning, match="raw pixels must be uint8"):
        fp.fit(
            model,
            data,
            data,
            recipe=fp.Recipe(epochs=1, warmup_epochs=0, batch_size=4, dtype="float32"),
            progress=False,
        )


def test_nothing_trains(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    assert not any(p.requires_grad for p in backbone.parameters())
    assert not backbone(tiny_images).requires_grad


def test_eval_mode_is_sticky(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit.train())
    assert not backbone.training
    nn.Sequential(backbone).train()
    assert not any(m.training for m in backbone.modules())


def test_weights_are_copied(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    before = backbone(tiny_images)
    with torch.no_grad():
        for p in tiny_vit.parameters():
            p.zero_()
    assert torch.equal(backbone(tiny_images), before)
    assert before.abs().sum() > 0


def test_fingerprint_survives_casts(tiny_vit: VisionTransformer) -> None:
    fingerprint = fp.FrozenViT(tiny_vit).fingerprint
    assert len(fingerprint) == 64
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert fp.FrozenViT(tiny_vit).to(dtype).fingerprint == fingerprint
    assert fp.FrozenViT(tiny_vit).bfloat16().float().fingerprint == fingerprint
    assert fp.FrozenViT(copy.deepcopy(tiny_vit).double()).fingerprint == fingerprint


def test_fingerprint_follows_loaded_tensors(tiny_vit: VisionTransformer, randomised: Callable[..., nn.Module]) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    fingerprint, state = backbone.fingerprint, copy.deepcopy(backbone.state_dict())
    nn.Sequential(backbone).load_state_dict({"0." + k: v for k, v in state.items()})
    assert backbone.fingerprint == fingerprint
    cast = copy.deepcopy(backbone).bfloat16()
    cast.load_state_dict(state)
    cast.load_state_dict(cast.state_dict())
    assert cast.fingerprint == fingerprint
    other = fp.FrozenViT(randomised(tiny_vit, seed=1))
    backbone.load_state_dict(other.state_dict())
    assert backbone.fingerprint == other.fingerprint != fingerprint


def test_fingerprint_of_a_fine_tuned_copy_is_that_of_its_original(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    model = fp.PromptedViT(backbone, fp.FullFineTuneConfig(), 3)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    assert model.backbone.fingerprint == backbone.fingerprint


def test_fingerprint_leaves_the_classifier_out(tiny_vit: VisionTransformer) -> None:
    fingerprint = fp.FrozenViT(tiny_vit).fingerprint
    tiny_vit.reset_classifier(7)
    assert fp.FrozenViT(tiny_vit).fingerprint == fingerprint


def test_fingerprint_changes_with_every_tensor_of_the_trunk(tiny_vit: VisionTransformer) -> None:
    seen = {fp.FrozenViT(tiny_vit).fingerprint}
    for p in tiny_vit.parameters():
        before = p.detach().clone()
        with torch.no_grad():
            p.view(-1)[-1] += 1e-3
        seen.add(fp.FrozenViT(tiny_vit).fingerprint)
        with torch.no_grad():
            p.copy_(before)
    assert len(seen) == 1 + len(list(tiny_vit.parameters()))


def test_fingerprint_sees_the_structure() -> None:
    def build(**options: object) -> str:
        torch.manual_seed(0)
        sizes = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 1,
            "num_heads": 3,
            "num_classes": 0,
        }
        return fp.FrozenViT(VisionTransformer(**{**sizes, **options})).fingerprint

    variants: list[dict[str, object]] = [
        {},
        {"num_heads": 6},
        {"act_layer": "quick_gelu"},
        {"global_pool": "avg"},
        {"dynamic_img_size": True},
    ]
    assert len({build(**options) for options in variants}) == len(variants)


def test_raw_pixels_are_normalised_inside(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)).double()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).double(), torch.tensor([0.2, 0.3, 0.4]).double()
    normalised = (pixels.double() / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(backbone(pixels), backbone(normalised), rtol=0, atol=1e-6)
    assert not torch.allclose(backbone(pixels), backbone(pixels.double()))


def test_raw_pixels_are_not_rounded_by_a_bfloat16_backbone(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit).bfloat16()
    assert backbone.normalise(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda x: x.numpy(), TypeError, "images must be a torch.Tensor, got ndarray"),
        (lambda x: x.long(), TypeError, "got torch.int64"),
        (lambda x: x.to(torch.complex64), TypeError, "got torch.complex64"),
        (lambda x: x[0], ValueError, r"shape \(B, 3, H, W\), got \(3, 32, 32\)"),
        (lambda x: x[:, :1], ValueError, r"got \(4, 1, 32, 32\)"),
        (lambda x: x.permute(0, 2, 3, 1), ValueError, r"got \(4, 32, 32, 3\)"),
        (lambda x: x[..., :24], ValueError, "must be 32 x 32 pixels for this backbone, got 32 x 24"),
        (lambda x: x * float("nan"), ValueError, "NaN or infinite"),
        (lambda x: torch.where(x > 2, float("inf"), x), ValueError, "NaN or infinite"),
        (lambda x: x.to("meta"), ValueError, "images are on meta, the backbone is on cpu"),
    ],
    ids=["array", "int64", "complex", "one image", "gray", "channels last", "size", "nan", "inf", "device"],
)
def test_bad_images_are_refused(
    tiny_vit: VisionTransformer,
    tiny_images: Tensor,
    make: Callable[[Tensor], object],
    error: type[Exception],
    message: str,
) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    with pytest.raises(error, match=message):
        backbone(make(tiny_images))


def test_dynamic_size_takes_whole_patches_only() -> None:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3, dynamic_img_size=True)
    backbone = fp.FrozenViT(vit)
    assert backbone(torch.zeros(1, 3, 16, 24)).shape == (1, 1000)
    for size in ((30, 32), (32, 0)):
        with pytest.raises(ValueError, match=f"multiples of the patch size 8, got {size[0]} x {size[1]}"):
            backbone(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(tiny_vit: VisionTransformer, tiny_images: Tensor, batch: int) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    expected = backbone(tiny_images)[:batch]
    torch.testing.assert_close(backbone(tiny_images[:batch]), expected, rtol=1e-5, atol=1e-6)


def test_from_timm_builds_at_another_size() -> None:
    backbone = fp.FrozenViT.from_timm("test_vit", image_size=64)
    assert (backbone.image_size, backbone.grid, backbone.width) == ((64, 64), (4, 4), 64)
    assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert fp.FrozenViT.from_timm("test_vit", image_size=(32, 64), num_classes=0).grid == (2, 4)


def test_from_timm_takes_names_only(tiny_vit: VisionTransformer) -> None:
    with pytest.raises(TypeError, match=r"name must be a timm model name.*FrozenViT\(module\)"):
        fp.FrozenViT.from_timm(tiny_vit)


@pytest.mark.parametrize("size", [0, -32, 32.5, "32", (32,), (32, 0), True])
def test_from_timm_refuses_what_is_no_size(size: object) -> None:
    with pytest.raises(ValueError, match=r"image_size must be pixels or \(height, width\), got"):
        fp.FrozenViT.from_timm("test_vit", image_size=size)


def test_from_timm_names_an_unknown_model() -> None:
    with pytest.raises(ValueError, match=r"name must be a timm model name, got 'vit_huge_patch1'"):
        fp.FrozenViT.from_timm("vit_huge_patch1")


def test_from_timm_names_options_that_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"timm does not build 'test_resnet' with \{'img_size': 64\}"):
        fp.FrozenViT.from_timm("test_resnet", image_size=64)


def test_tensors_load_into_a_backbone_without_memory(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    empty = copy.deepcopy(backbone).to("meta")
    empty.load_state_dict(backbone.state_dict(), assign=True)
    assert empty.fingerprint == backbone.fingerprint


def test_any_size_takes_taller_images_on_the_same_tensors(tiny_vit: VisionTransformer) -> None:
    fixed, images = fp.FrozenViT(tiny_vit), torch.randn(2, 3, 40, 32)
    other = fixed.any_size()
    with pytest.raises(ValueError, match="images must be 32 x 32"):
        fixed.forward_features(images)
    with pytest.raises(ValueError, match="multiples of the patch size"):
        other.forward_features(torch.randn(2, 3, 41, 32))
    dynamic = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0, dynamic_img_size=True
    ).eval()
    dynamic.load_state_dict(tiny_vit.state_dict())
    torch.testing.assert_close(other.forward_features(images), dynamic(images))
    assert other.fingerprint == fixed.fingerprint
    assert other.patch_weight is fixed.patch_weight


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["patch_embed.proj.weight", "pos_embed", "blocks.1.attn.qkv.bias", "norm.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_vit: VisionTransformer, name: str, bad: float) -> None:
    own = {"patch_embed.proj.weight": "patch_weight", "blocks.1.attn.qkv.bias": "blocks.1.qkv.bias"}.get(name, name)
    backbone = fp.FrozenViT(tiny_vit)
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    with torch.no_grad():
        tiny_vit.get_parameter(name).view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"module must have finite weights, got NaN or infinite values in {own}$"):
        fp.FrozenViT(tiny_vit)
    state = {key: tensor.clone() for key, tensor in before.items()}
    state[own].view(-1)[-1] = bad
    with pytest.raises(ValueError, match=f"state_dict must have finite weights, got .* in {own}$"):
        backbone.load_state_dict(state)
    assert all(torch.equal(tensor, before[key]) for key, tensor in backbone.state_dict().items())


def test_large_weights_are_finite(tiny_vit: VisionTransformer) -> None:
    """Their sum is not."""
    with torch.no_grad():
        tiny_vit.blocks[0].mlp.fc1.weight.fill_(3e38)
    fp.FrozenViT(tiny_vit)


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("method", ["pgn", "pixel", "vpt-deep"])
def test_images_of_other_channels(
    make_vit: Callable[..., VisionTransformer], configs: dict[str, fp.PromptConfig], channels: int, method: str
) -> None:
    vit = make_vit(in_chans=channels)
    mean, std = [0.3] * channels, [0.2] * channels
    backbone = fp.FrozenViT(vit, mean=mean, std=std).double()
    assert backbone.channels == channels
    raw = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
    images = ((raw / 255 - 0.3) / 0.2).double()
    torch.testing.assert_close(backbone.forward_features(images), vit.double().forward_features(images)[:, 0])
    model = fp.PromptedViT(backbone, configs[method], num_classes=3).eval()
    expected = model.reference_forward(images)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(raw), expected, rtol=1e-5, atol=1e-6)
    engine = fp.Engine(model.float(), batch_sizes=(1, 2), dtype=torch.float32, backend="eager")
    torch.testing.assert_close(engine(raw).double(), expected, rtol=1e-3, atol=1e-3)
    engine.release()


def test_channels_are_checked_by_name(make_vit: Callable[..., VisionTransformer]) -> None:
    backbone = fp.FrozenViT(make_vit(in_chans=1))
    assert (backbone.mean, backbone.std) == ((0.0,), (1.0,))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 1, H, W\), got \(2, 3, 32, 32\)"):
        backbone(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match="std must be 1 positive numbers"):
        fp.FrozenViT(make_vit(in_chans=1), std=(0.2, 0.2, 0.2))
    with pytest.raises(ValueError, match="RGBPGNConfig needs a backbone that reads RGB images, this one reads 1"):
        fp.PromptedViT(backbone, fp.RGBPGNConfig(4, 5, widths=(4, 8)))
    with pytest.raises(ValueError, match="trunk 'resnet18' reads images of three channels"):
        fp.PromptedViT(backbone, fp.PGNConfig(3, 5, trunk="resnet18"))


def test_a_model_trains_on_images_of_one_channel(make_vit: Callable[..., VisionTransformer]) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit(in_chans=1)), fp.VPTConfig(2), num_classes=2)
    data = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8), torch.arange(8) % 2
    recipe = fp.Recipe(epochs=1, batch_size=4, warmup_epochs=0.0)
    assert len(fp.fit(model, data, data, recipe).history) == 1
    colour = data[0].expand(-1, 3, -1, -1), data[1]
    with pytest.raises(ValueError, match=r"train must have images of shape \(N, 1, H, W\)"):
        fp.fit(model, colour, colour, recipe)
