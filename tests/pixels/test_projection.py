from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.pixels.projection import Projection, slot_positions


def make(width: int, patch: int, **options: Any) -> fp.FrozenViT:
    vit = VisionTransformer(
        img_size=4 * patch, patch_size=patch, embed_dim=width, depth=1, num_heads=2, num_classes=0, **options
    )
    with torch.no_grad():
        vit.pos_embed.normal_(std=0.3)
        vit.patch_embed.proj.weight.normal_(std=0.05)
        if vit.patch_embed.proj.bias is not None:
            vit.patch_embed.proj.bias.normal_(std=0.1)
    return fp.FrozenViT(vit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3)).double()


def make_ill_conditioned() -> fp.FrozenViT:
    """12 pixels, 12 wide, condition number 1e6."""
    backbone = make(12, 2)
    with torch.no_grad():
        u, _, v = torch.linalg.svd(backbone.patch_weight.flatten(1))
        backbone.patch_weight.copy_((u * torch.logspace(0, -6, 12, dtype=torch.float64) @ v).view(12, 3, 2, 2))
    return backbone


@pytest.fixture(params=[False, True], ids=["bias", "no bias"])
def wide(request: pytest.FixtureRequest) -> fp.FrozenViT:
    """3p² = 192 pixels, 48 wide."""
    return make(48, 8, pre_norm=request.param)


def test_it_is_the_backbones_patch_embedding_of_raw_pixels(wide: fp.FrozenViT) -> None:
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    expected = torch.nn.functional.conv2d(wide.normalise(pixels), wide.patch_weight, wide.patch_bias, stride=8)
    found = Projection.of(wide).tokens(pixels.double().flatten(1) / 255)
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-10, atol=1e-10)
    in_float32 = Projection.of(wide).tokens_in_float32(pixels.double().flatten(1) / 255)
    torch.testing.assert_close(in_float32, expected.flatten(1), rtol=1e-5, atol=1e-5)
    assert not torch.equal(in_float32, found)


def sums(library: Tensor, offset: Tensor) -> Tensor:
    return library[None] + offset[:, None]  # (K, M, 3p²)


def places(spread: float) -> Tensor:
    return spread * torch.randn(4, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_pixels_give_the_tokens_and_use_the_null_space_to_stay_pictures(wide: fp.FrozenViT, spread: float) -> None:
    projection, added = Projection.of(wide), places(spread)
    assert projection.rank == 48
    tokens = projection.tokens(0.2 + 0.6 * torch.rand(6, 192, dtype=torch.float64))
    pixels = sums(*projection.pixels(tokens, added))
    torch.testing.assert_close(
        projection.tokens(pixels) + added[:, None], tokens.expand(4, -1, -1), rtol=1e-9, atol=1e-9
    )
    assert pixels.min() > -1e-4
    assert pixels.max() < 1 + 1e-4
    least = sums((tokens - projection.bias) @ projection.inverse.T, -added @ projection.inverse.T)
    assert least.min() < -0.1 or least.max() > 1.1  # least squares alone is no picture


def test_pixels_far_outside_stay_exact_and_are_nearer_to_the_box_than_least_squares(wide: fp.FrozenViT) -> None:
    projection, added = Projection.of(wide), places(5.0)
    tokens = 20 * torch.randn(6, 48, dtype=torch.float64)
    library, offset = projection.pixels(tokens, added)
    pixels, least = (
        sums(library, offset),
        sums((tokens - projection.bias) @ projection.inverse.T, -added @ projection.inverse.T),
    )
    torch.testing.assert_close(
        projection.tokens(pixels) + added[:, None], tokens.expand(4, -1, -1), rtol=1e-9, atol=1e-9
    )

    beyond = pixels - pixels.clamp(0, 1)
    assert beyond.norm() < (least - least.clamp(0, 1)).norm()
    for gradient in (beyond.sum(dim=0), beyond.sum(dim=1)):  # by the library, by the offsets: what could be taken off
        free = gradient - gradient @ projection.weight.T @ projection.inverse.T
        assert free.norm() < 1e-3 * gradient.norm()


def test_a_picture_is_better_than_cutting_off(wide: fp.FrozenViT) -> None:
    projection, added = Projection.of(wide), places(2.0)
    tokens = projection.tokens(torch.rand(6, 192, dtype=torch.float64)) + 2 * torch.randn(6, 48, dtype=torch.float64)

    def error(pixels: Tensor) -> float:
        return float((projection.tokens(pixels.clamp(0, 1)) + added[:, None] - tokens).norm())

    picture, exact = sums(*projection.picture(tokens, added)), sums(*projection.pixels(tokens, added))
    assert error(picture) < 0.99 * error(exact)
    assert (picture - picture.clamp(0, 1)).norm() < 0.8 * (exact - exact.clamp(0, 1)).norm()


def test_a_picture_of_an_ill_conditioned_embedding_is_better_than_grey() -> None:
    projection, added = Projection.of(make_ill_conditioned()), 0.02 * torch.randn(4, 12, dtype=torch.float64)
    tokens = projection.tokens(torch.rand(6, 12, dtype=torch.float64)) + 0.05 * torch.randn(6, 12, dtype=torch.float64)
    errors = [
        float((projection.tokens(pixels.clamp(0, 1)) + added[:, None] - tokens).norm())
        for pixels in (
            sums(*projection.picture(tokens, added)),
            torch.full((4, 6, 12), 0.5, dtype=torch.float64),
            sums(*projection.pixels(tokens, added)),
        )
    ]
    assert errors[0] < 0.8 * min(errors[1:])


def test_undo_takes_a_change_of_tokens_back(wide: fp.FrozenViT) -> None:
    projection, change = Projection.of(wide), places(0.1)
    added = projection.undo(change)
    torch.testing.assert_close(added @ projection.weight.T, -change, rtol=1e-9, atol=1e-9)
    assert projection.left_over(change, projection.undo(change, picture=True)) < 0.2


def test_undo_adds_little_to_a_picture_where_it_would_only_be_cut_off() -> None:
    projection, change = Projection.of(make_ill_conditioned()), 0.1 * torch.randn(16, 12, dtype=torch.float64)
    exact, picture = projection.undo(change), projection.undo(change, picture=True)
    assert exact.abs().max() > 10
    assert projection.left_over(change, picture) < min(1, 0.5 * projection.left_over(change, exact))


def test_without_full_rank_the_nearest_token_is_taken() -> None:
    projection = Projection.of(make(48, 2))  # 12 pixels, 48 wide
    assert projection.rank == 12
    tokens = torch.randn(3, 48, dtype=torch.float64)
    beside = projection.tokens(sums(*projection.pixels(tokens, torch.zeros(1, 48, dtype=torch.float64)))[0]) - tokens
    assert beside.norm() > 0.5 * tokens.norm()
    torch.testing.assert_close(beside @ projection.weight, torch.zeros(3, 12, dtype=torch.float64), rtol=0, atol=1e-9)


def test_slot_positions_are_what_the_host_adds(wide: fp.FrozenViT) -> None:
    own = wide.pos_embed[0, wide.num_prefix if wide.spec.pos_on_prefix else 0 :]
    slots, change = slot_positions(wide, "replace", 1)
    assert torch.equal(slots, own[12:])
    assert torch.equal(change, torch.zeros_like(own))
    slots, change = slot_positions(wide, "extend", 2)
    assert slots.shape == (8, 48)
    blank = torch.zeros(1, 3, 48, 32, dtype=torch.float64)
    from fastprompt.vit import reference

    embedded = reference.embed(wide, blank).patches[0] - reference.embed(wide, blank[:, :, :32]).patches[0, :1] + own[0]
    torch.testing.assert_close(embedded, torch.cat([own + change, slots]), rtol=1e-9, atol=1e-9)


def test_what_has_no_linear_patch_embedding_is_refused(tiny_swin: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="norms its patch embedding"):
        Projection.of(fp.FrozenViT(tiny_swin()))
    with pytest.raises(TypeError, match="backbone must be a FrozenViT"):
        Projection.of(nn.Linear(2, 2))  # type: ignore[arg-type]
