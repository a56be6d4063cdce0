from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp


def test_frame_is_zero_inside_and_learned_outside() -> None:
    pixel = fp.PixelPrompt(border=3, image_size=(16, 20))
    frame = pixel.frame()
    assert frame.shape == (1, 3, 16, 20)
    assert (frame[:, :, 3:-3, 3:-3] == 0).all()
    assert (frame != 0).sum() == pixel.num_parameters() == pixel.paper_num_parameters() == 3 * (16 * 20 - 10 * 14)
    assert torch.equal(frame[:, :, :3], pixel.top)
    assert torch.equal(frame[:, :, -3:], pixel.bottom)
    assert torch.equal(frame[:, :, 3:-3, :3], pixel.left)
    assert torch.equal(frame[:, :, 3:-3, -3:], pixel.right)


def test_published_parameter_count_and_initial_values() -> None:
    pixel = fp.PixelPrompt()
    assert pixel.num_parameters() == pixel.paper_num_parameters() == 69_840
    values = torch.cat([p.flatten() for p in pixel.parameters()])
    assert abs(values.std() - 1) < 0.02


def test_alone_adds_the_frame() -> None:
    pixel, images = fp.PixelPrompt(border=3, image_size=(16, 20)), torch.randn(2, 3, 16, 20)
    assert torch.equal(pixel(images), images + pixel.frame())
    with pytest.raises(ValueError, match=r"images must have \(16, 20\) pixels like the frame, got \(16, 16\)"):
        pixel(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"layer must be None"):
        pixel(images, layer=0)
    with pytest.raises(ValueError, match=r"has no prompt tokens"):
        pixel.prompts(0, None)


def test_model_runs_the_backbone_on_prompted_images(tiny_vit: VisionTransformer, tiny_images: Tensor) -> None:
    backbone = fp.FrozenViT(tiny_vit).double()
    model, images = fp.PromptedViT(backbone, fp.PixelPromptConfig(border=4)), tiny_images.double()
    torch.testing.assert_close(model(images), backbone(images + model.generator.frame()), rtol=1e-10, atol=1e-10)
    model(images).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.generator.parameters())


def test_raw_pixels_are_normalised_before_the_frame_is_added(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    model = fp.PromptedViT(backbone, fp.PixelPromptConfig(border=4))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(model(pixels), backbone(backbone.normalise(pixels) + model.generator.frame()))


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match=r"PixelPromptConfig\.border must be at least 1"):
        fp.PixelPromptConfig(border=0)
    with pytest.raises(ValueError, match=r"border must be less than half of the 32 x 48 image, got 16"):
        fp.PixelPrompt(border=16, image_size=(32, 48))
