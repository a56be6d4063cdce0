from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp

RGBPrompts = fp.RGBPrompts


def make(width: int = 48, patch: int = 8, depth: int = 2, **options: Any) -> fp.FrozenViT:
    vit = VisionTransformer(img_size=4 * patch, patch_size=patch, embed_dim=width, depth=depth, num_heads=2,
                            num_classes=0, **options)
    with torch.no_grad():
        vit.pos_embed.normal_(std=0.3)
        vit.patch_embed.proj.weight.normal_(std=0.05)
    return fp.FrozenViT(vit)


def trained(backbone: fp.FrozenViT, **options: Any) -> fp.PromptedViT:
    """A PGN with tokens as large as after training."""
    model = fp.PromptedViT(backbone, fp.PGNConfig(num_prompts=8, library_size=12, **options), num_classes=5)
    with torch.no_grad():
        model.generator.library.normal_(std=0.5)
        for p in model.generator.trunk.fc.parameters():
            p.normal_(std=1.0)
    return model.eval()


def logits_of_host(backbone: fp.FrozenViT, images: Tensor) -> Tensor:
    """Another party's backbone that takes images of any size: only timm's own model and the tensors are shared."""
    from fastprompt.vit import reference

    sequence = reference.encode(backbone, images.to(backbone.dtype))
    return reference.read_out(backbone, sequence, "cls")


@pytest.mark.parametrize("placement", ["latent", "extend"])
@pytest.mark.parametrize("options", [{}, {"pre_norm": True}, {"reg_tokens": 2}, {"no_embed_class": True}],
                         ids=["plain", "pre-norm", "registers", "no position on the class token"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_inverted_prompts_give_the_same_logits(placement: str, options: dict[str, Any], activation: str) -> None:
    backbone = make(**options).double()
    model, images = trained(backbone, activation=activation), torch.randn(3, 3, 32, 32, dtype=torch.float64)
    inverted = RGBPrompts.invert(model, placement)
    assert RGBPrompts.inversion_error(model, inverted) < 1e-10
    for forward in (inverted, inverted.reference_forward):
        torch.testing.assert_close(forward(images), model(images), rtol=1e-8, atol=1e-8)
    assert torch.equal(model.generator.trunk.fc.weight, inverted.generator.trunk.fc.weight)


@pytest.mark.parametrize(("width", "patch"), [(48, 8), (768, 32), (384, 16)], ids=["tiny", "B/32", "S/16"])
def test_in_float32_the_logits_are_equal_to_rounding_where_the_report_says_exact(width: int, patch: int) -> None:
    backbone = make(width, patch, depth=1)
    model, images = trained(backbone), torch.randn(2, 3, 4 * patch, 4 * patch)
    assert RGBPrompts.report(backbone).exact
    expected = model(images)
    found = RGBPrompts.invert(model, "extend")(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_client_and_a_host_together_are_the_model() -> None:
    backbone = make()
    model, images = trained(backbone), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    client = RGBPrompts(RGBPrompts.invert(model, "extend"))
    prompted = client(images)
    assert prompted.shape == (3, 3, 48, 32)
    found = client.classify(logits_of_host(backbone, prompted))
    expected = model(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_without_position_embedding_taken_into_account_it_would_fail() -> None:
    backbone = make()
    model, images = trained(backbone), torch.randn(3, 3, 32, 32)
    inverted = RGBPrompts.invert(model, "extend")
    expected = model(images)
    for name in ("offset", "compensation"):
        wrong = RGBPrompts.invert(model, "extend")
        with torch.no_grad():
            getattr(wrong.generator, name).zero_()
        assert (wrong(images) - expected).abs().max() > 100 * (inverted(images) - expected).abs().max()


def test_a_picture_keeps_what_fits_into_8_bits() -> None:
    backbone = make()
    model = trained(backbone)
    with torch.no_grad():  # tokens of pictures
        patches = torch.rand(12, 192, dtype=torch.float64) * 0.5 + 0.25
        from fastprompt.rgb.projection import Projection

        model.generator.library.copy_(Projection.of(backbone).tokens(patches))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    inverted = RGBPrompts.invert(model, "latent", picture=True)
    assert RGBPrompts.inversion_error(model, inverted) < 1e-6
    patches = inverted.generator.patches(backbone.normalise(images)) * 255
    assert (patches - patches.round()).abs().max() < 1e-3
    assert patches.min() >= 0
    assert patches.max() <= 255
    expected = model(images)
    assert (inverted(images) - expected).abs().max() < 0.05 * expected.abs().max()


def test_an_inverted_model_is_saved_and_loaded(tmp_path: Any) -> None:
    backbone = make()
    inverted = RGBPrompts.invert(trained(backbone), "extend")
    inverted.save_pretrained(tmp_path)
    again, images = fp.PromptedViT.from_pretrained(backbone, tmp_path), torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), inverted(images))


def test_the_report_says_what_inversion_does() -> None:
    report = RGBPrompts.report(make())
    assert (report.rank, report.width, report.pixels, report.prompts) == (48, 48, 192, 8)
    assert report.exact
    assert [found.placement for found in report.placements] == ["latent", "extend", "replace"]
    by = {found.placement: found for found in report.placements}
    assert by["latent"].shift == by["replace"].shift == 0
    assert by["extend"].shift > 0.01
    assert (by["latent"].shrink, by["replace"].shrink) == (1, 0.5)
    assert "exact" in str(report)


def test_the_report_warns_where_tokens_are_lost() -> None:
    report = RGBPrompts.report(make(width=48, patch=2))
    assert report.rank == 12
    assert not report.exact
    assert all(found.float_error > 0.3 for found in report.placements)
    assert "12 of 48 dimensions" in str(report)
    assert "RGBPGNConfig" in str(report)


def test_the_reported_error_is_that_of_inversion() -> None:
    backbone = make(width=48, patch=2)
    model = trained(backbone)
    report = RGBPrompts.report(backbone, library=model.generator.library)
    latent = RGBPrompts.inversion_error(model, RGBPrompts.invert(model, "latent"))
    assert latent == pytest.approx(report.placements[0].float_error, rel=1e-4)


def test_an_ill_conditioned_patch_embedding_is_reported() -> None:
    backbone = make(width=12, patch=2)  # square: 12 pixels, 12 wide
    with torch.no_grad():
        u, _, v = torch.linalg.svd(backbone.patch_weight.flatten(1))
        backbone.patch_weight.copy_((u * torch.logspace(0, -6, 12) @ v).view(12, 3, 2, 2))
    report = RGBPrompts.report(backbone)
    assert report.condition > 1e5
    assert not report.exact
    assert "ill-conditioned" in str(report)


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda b, m: RGBPrompts.report(b, 3), ValueError, "num_prompts must fill whole rows of 4 patches"),
    (lambda b, m: RGBPrompts.report(b, 16), ValueError, "leave one of 4 to the image"),
    (lambda b, m: RGBPrompts.report(b, library=torch.zeros(2, 3)), ValueError, r"library must be a tensor \(M, 48\)"),
    (lambda b, m: RGBPrompts.report(3), TypeError, "backbone must be a FrozenViT"),
    (lambda b, m: RGBPrompts.invert(m, "replace"), ValueError, "placement must be 'latent' or 'extend'"),
    (lambda b, m: RGBPrompts.invert(fp.PromptedViT(b, fp.VPTConfig()), "latent"), ValueError, "PGNConfig"),
    (lambda b, m: RGBPrompts.invert(b), TypeError, "model must be a PromptedViT"),
    (lambda b, m: RGBPrompts(m), ValueError, "model must make other images"),
    (lambda b, m: RGBPrompts(b), TypeError, "model must be a PromptedViT"),
    (lambda b, m: RGBPrompts.invert(trained(b, activation="sigmoid"), picture=True), ValueError, "softmax"),
    (lambda b, m: RGBPrompts.inversion_error(m, m), TypeError, "inverted"),
    (lambda b, m: RGBPrompts.invert(fp.PromptedViT(b, fp.PGNConfig(num_prompts=3)), "extend"), ValueError,
     "num_prompts must fill whole rows"),
])
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    backbone = make()
    with pytest.raises(error, match=message):
        call(backbone, trained(backbone))
