from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.generators.rgb_pgn import round_pixels
from fastprompt.vit import reference


@pytest.fixture
def backbone(tiny_vit: VisionTransformer) -> fp.FrozenViT:
    return fp.FrozenViT(tiny_vit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).double()


def make(backbone: fp.FrozenViT, placement: str, **options: Any) -> fp.PromptedViT:
    sizes = {"num_prompts": 4, "library_size": 6, "widths": (4, 8)}
    config = fp.RGBPGNConfig(**{**sizes, "placement": placement, **options})
    return fp.PromptedViT(backbone, config, num_classes=3).eval()


def levels(backbone: fp.FrozenViT, images: Tensor) -> Tensor:
    """Normalised images → levels 0 … 255."""
    mean, std = (torch.tensor(x, dtype=images.dtype).view(3, 1, 1) for x in (backbone.mean, backbone.std))
    return (images * std + mean) * 255


@pytest.mark.parametrize("placement", ["extend", "replace"])
def test_the_prompted_image_is_an_8_bit_picture(backbone: fp.FrozenViT, placement: str) -> None:
    model, pixels = make(backbone, placement), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    images = backbone.normalise(pixels)
    prompted = levels(backbone, model.generator(images))
    assert prompted.shape == (3, 3, 40 if placement == "extend" else 32, 32)
    assert (prompted - prompted.round()).abs().max() < 1e-9
    assert prompted.min() >= -1e-9
    assert prompted.max() <= 255 + 1e-9
    patches = model.generator.patches(images)  # (B, 4, 3, 8, 8)
    for i in range(4):
        torch.testing.assert_close(prompted[:, :, -8:, 8 * i : 8 * i + 8], patches[:, i] * 255, rtol=0, atol=1e-9)
    if placement == "extend":
        torch.testing.assert_close(prompted[:, :, :32].round().to(torch.uint8), pixels)
    else:
        small = F.interpolate(pixels.double(), size=(24, 32), mode="bilinear", antialias=True)
        assert (prompted[:, :, :24] - small).abs().max() <= 0.5 + 1e-9


@pytest.mark.parametrize("placement", ["extend", "replace"])
def test_the_model_is_the_host_on_the_saved_picture(backbone: fp.FrozenViT, placement: str) -> None:
    """What validation measures is what another party's model says of the PNG."""
    model, pixels = make(backbone, placement), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    client = fp.RGBPrompts(model)
    pictures = client.pictures(pixels)
    assert pictures.dtype == torch.uint8
    sequence = reference.encode(backbone, backbone.normalise(pictures))
    found = client.classify(reference.read_out(backbone, sequence, "cls"))
    torch.testing.assert_close(found, model(pixels), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.reference_forward(pixels), model(pixels), rtol=1e-9, atol=1e-9)


def test_latent_prompts_are_the_patch_embedding_without_position(backbone: fp.FrozenViT) -> None:
    model, images = make(backbone, "latent"), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    generator = model.generator
    normalised = generator.normalised(generator.patches(images)).flatten(0, 1)
    tokens = F.conv2d(normalised, backbone.patch_weight, backbone.patch_bias, stride=8).view(3, 4, 48)
    torch.testing.assert_close(generator(images), tokens, rtol=1e-9, atol=1e-9)
    sequence = reference.embed(backbone, images).with_prompts(tokens, prompts_last=True).tokens
    for block in backbone.blocks:
        sequence = reference.run_block(block, sequence)
    torch.testing.assert_close(model.forward_features(images), backbone.norm(sequence)[:, 0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["latent", "extend", "replace"])
def test_every_parameter_trains_through_the_rounding(backbone: fp.FrozenViT, placement: str) -> None:
    model = make(backbone, placement).train()
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    model(images).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())
    again = make(backbone, placement, round_pixels=False).train()
    again.load_state_dict(model.state_dict())
    again(images).square().sum().backward()
    plain = dict(again.named_parameters())["generator.library"].grad
    cosine = F.cosine_similarity(grads["generator.library"].flatten(), plain.flatten(), dim=0)
    assert cosine > 0.99


def test_every_mixture_of_a_bounded_library_is_a_picture(backbone: fp.FrozenViT) -> None:
    generator = make(backbone, "extend", round_pixels=False).generator
    with torch.no_grad():
        generator.library.mul_(1e3)
        generator.trunk.fc.weight.mul_(100)
    patches = generator.patches(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    assert patches.min() >= 0
    assert patches.max() <= 1


def test_rounding_cuts_off_and_passes_the_gradient() -> None:
    x = torch.tensor([-0.2, 0.0, 0.5, 1.3], dtype=torch.float64, requires_grad=True)
    y = round_pixels(x)
    assert torch.allclose(y, torch.tensor([0, 0, 128 / 255, 1], dtype=torch.float64))
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, dtype=torch.float64))


def test_an_adapter_holds_nothing_of_the_backbone_and_loads(backbone: fp.FrozenViT, tmp_path: Any) -> None:
    model = make(backbone, "replace")
    assert all(p.shape != backbone.patch_weight.shape for p in model.generator.parameters())
    model.save_pretrained(tmp_path)
    again, images = fp.PromptedViT.from_pretrained(backbone, tmp_path), torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(again.double()(images), model(images), rtol=1e-5, atol=1e-5)


def test_a_copy_and_a_move_keep_reading_the_models_own_backbone(backbone: fp.FrozenViT) -> None:
    import copy

    model = make(backbone, "latent")
    twin = copy.deepcopy(model)
    assert twin.generator._backbone[0] is twin.backbone
    assert twin.float().generator(torch.randn(2, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "below"}, "placement must be one of"),
        ({"placement": "extend", "num_prompts": 5}, "must fill whole rows of 4 patches with placement 'extend', got 5"),
        ({"placement": "replace", "num_prompts": 16}, "leave one of 4 to the image with placement 'replace', got 16"),
        ({"placement": "extend", "activation": "sigmoid"}, "only convex mixtures of pictures"),
        (
            {"placement": "latent", "bounded": False, "compensate": True},
            "placement must be 'extend' with compensate",
        ),
    ],
)
def test_bad_options_are_named(backbone: fp.FrozenViT, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(backbone, **options)


def test_bad_input_is_named(backbone: fp.FrozenViT, tiny_swin: Callable[..., nn.Module]) -> None:
    with pytest.raises(TypeError, match="geometry must be the FrozenViT"):
        fp.RGBPGN()
    with pytest.raises(ValueError, match="not defined on a Swin"):
        fp.RGBPGN(geometry=fp.FrozenViT(tiny_swin()))
    generator = make(backbone, "extend").generator
    with pytest.raises(ValueError, match=r"images must have \(32, 32\) pixels"):
        generator(torch.zeros(1, 3, 16, 32, dtype=torch.float64))
    with pytest.raises(ValueError, match="layer must be None"):
        generator(torch.zeros(1, 3, 32, 32, dtype=torch.float64), layer=0)
    with pytest.raises(ValueError, match="'latent'"):
        make(backbone, "latent").generator.prompt_images(torch.zeros(1, 3, 32, 32, dtype=torch.float64))


def test_pictures_beside_an_image_have_no_sequence(
    tiny_vit: VisionTransformer, configs: dict[str, PromptConfig]
) -> None:
    generator = fp.RGBPGN(configs["rgb-pgn"], fp.FrozenViT(tiny_vit))
    with pytest.raises(ValueError, match=r"RGBPGN makes other images, not prompt tokens: use prompt_images"):
        generator.sequence(torch.randn(2, 3, 32, 32), torch.randn(2, 17, 48))
