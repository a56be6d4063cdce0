from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp

RGBPrompts = fp.RGBPrompts


def make(width: int = 48, patch: int = 8, depth: int = 2, **options: Any) -> fp.FrozenViT:
    vit = VisionTransformer(
        **{
            "img_size": 4 * patch,
            "patch_size": patch,
            "embed_dim": width,
            "depth": depth,
            "num_heads": 2,
            "num_classes": 0,
            **options,
        }
    )
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
@pytest.mark.parametrize(
    "options",
    [{}, {"pre_norm": True}, {"reg_tokens": 2}, {"no_embed_class": True}],
    ids=["plain", "pre-norm", "registers", "no position on the class token"],
)
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
        from fastprompt.pixels.projection import Projection

        model.generator.library.copy_(Projection.of(backbone).tokens(patches))
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    inverted = RGBPrompts.invert(model, "latent", picture=True)
    assert 1e-4 < RGBPrompts.inversion_error(model, inverted) < 0.01  # what 8 bits take
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


@pytest.mark.parametrize("readout", ["patches", "map", "prompts", "patches+prompts"])
def test_extend_is_refused_where_the_host_would_pool_the_prompts(readout: str) -> None:
    backbone = make(global_pool="map", class_token=False, num_classes=0) if readout == "map" else make()
    config = fp.PGNConfig(num_prompts=8, library_size=12)
    model = fp.PromptedViT(backbone, config, num_classes=5, readout=readout).eval()
    with pytest.raises(ValueError, match=f"placement 'extend': readout '{readout.replace('+', '.')}' would pool"):
        RGBPrompts.invert(model, "extend")
    images = torch.randn(2, 3, 32, 32)
    inverted = RGBPrompts.invert(model, "latent")
    torch.testing.assert_close(inverted(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_picture_that_is_extended_is_what_the_model_itself_sees() -> None:
    backbone = make()
    inverted = RGBPrompts.invert(trained(backbone), "extend", picture=True)
    images = (torch.rand(4, 3, 32, 32) > 0.5).to(torch.uint8) * 255  # black and white: much is cut off
    client = RGBPrompts(inverted)
    seen = inverted.generator.prompt_images(backbone.normalise(images))
    torch.testing.assert_close(backbone.normalise(client.pictures(images)), seen, rtol=0, atol=1e-5)


def test_the_error_of_inversion_is_that_of_the_pixels_that_are_sent() -> None:
    from fastprompt.pixels.projection import Projection, slot_positions

    backbone = make(48, 4)  # square: pictures lose much
    model = trained(backbone)
    inverted = RGBPrompts.invert(model, "extend", picture=True)
    library, offset = (part.detach().double() for part in (inverted.generator.library, inverted.generator.offset))
    places = slot_positions(backbone, "extend", 2)[0]
    pixels = ((library[None] + offset[:, None]) * 255).round().clamp(0, 255) / 255
    wanted = model.generator.library.detach().double()
    beside = Projection.of(backbone).tokens(pixels) + places[:, None] - wanted
    expected = (beside.norm(dim=(1, 2)) / wanted.norm()).max()
    found = RGBPrompts.inversion_error(model, inverted)
    assert found == pytest.approx(float(expected), rel=1e-6)
    assert found > 0.1

    report = RGBPrompts.report(backbone, 8, model.generator.library)
    assert report.placements[1].picture_error == pytest.approx(found, rel=1e-3)


def test_the_error_of_inversion_counts_what_the_images_own_patches_lose() -> None:
    backbone = make()
    model, images = trained(backbone), (torch.rand(4, 3, 32, 32) > 0.5).to(torch.uint8) * 255
    exact, picture = (RGBPrompts.invert(model, "extend", picture=picture) for picture in (False, True))
    assert RGBPrompts.inversion_error(model, exact, images) < 1e-5
    assert RGBPrompts.inversion_error(model, picture, images) > 0.05 > RGBPrompts.inversion_error(model, picture)


def test_offsets_use_the_null_space_too() -> None:
    backbone = make()
    with torch.no_grad():
        backbone.pos_embed.mul_(3)
    model = trained(backbone)
    generator = RGBPrompts.invert(model, "extend").generator
    pixels = generator.library[None] + generator.offset[:, None]
    assert pixels.min() > -1e-3
    assert pixels.max() < 1 + 1e-3
    assert RGBPrompts.inversion_error(model, RGBPrompts.invert(model, "extend", picture=True)) < 0.02


def test_the_client_is_a_copy_in_eval_mode() -> None:
    backbone = make()
    model = fp.PromptedViT(backbone, fp.RGBPGNConfig(num_prompts=4, library_size=12), num_classes=5).train()
    client, images = RGBPrompts(model), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert model.generator.training
    assert model.head.training
    before = client.pictures(images)
    model.train()(images)  # moves the running statistics
    with torch.no_grad():
        model.generator.library.add_(1)
    assert torch.equal(client.pictures(images), before)
    assert client._backbone[0] is backbone


def test_the_hosts_position_embedding_is_its_librarys() -> None:
    transformers = pytest.importorskip("transformers")
    host = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        host.embeddings.position_embeddings.normal_(std=0.3)
        host.embeddings.patch_embeddings.projection.weight.normal_(std=0.05)
    backbone = fp.FrozenViT(host)
    model, images = trained(backbone), torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    client = RGBPrompts(RGBPrompts.invert(model, "extend"))
    with torch.no_grad():
        features = host(client(images), interpolate_pos_encoding=True).last_hidden_state[:, 0]
        expected = model(images)
    assert (client.classify(features) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_inverting_and_loading_download_nothing(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    backbone, made = make(), torchvision.models.resnet18
    monkeypatch.setattr(torchvision.models, "resnet18", lambda weights=None, **options: made(**options))
    model = trained(backbone, trunk="resnet18", pretrained_trunk=True)
    model.save_pretrained(tmp_path)

    def refuse(weights: Any = None, **options: Any) -> Any:
        assert weights is None
        return made(**options)

    monkeypatch.setattr(torchvision.models, "resnet18", refuse)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(RGBPrompts.invert(model, "latent")(images), model(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fp.PromptedViT.from_pretrained(backbone, tmp_path)(images), model(images))


def test_the_report_says_what_inversion_does() -> None:
    report = RGBPrompts.report(make())
    assert (report.rank, report.width, report.pixels, report.prompts) == (48, 48, 192, 8)
    assert report.exact
    assert [found.placement for found in report.placements] == ["latent", "extend", "replace"]
    assert [found.placement for found in report.invertible] == ["latent", "extend"]
    by = {found.placement: found for found in report.placements}
    assert by["latent"].shift == by["replace"].shift == by["latent"].shift_left == 0
    assert by["extend"].shift > 0.01
    assert 0 < by["extend"].shift_left < 0.3
    assert (by["latent"].shrink, by["replace"].shrink) == (1, 0.5)
    assert "Inversion is exact" in str(report)
    assert "with 'latent' and 'extend'." in str(report)
    assert "cannot be inverted with 'replace': it has not seen the shrunk image" in str(report)
    assert "RGBPGNConfig) work on this backbone with 'latent', 'extend' and 'replace'" in str(report)


@pytest.mark.parametrize(
    ("options", "num_prompts", "obstacles", "inversions"),
    [
        ({}, 5, ("", "must fill whole rows of 4 patches", "must fill whole rows of 4 patches"), ("", "", "")),
        ({}, 16, ("", "", "leave one of 4 to the image"), ("", "", "")),
        ({"img_size": (8, 32)}, None, ("", "", "leave one of 1 to the image"), ("", "", "")),
        ({"img_size": 34}, None, ("", "image_size=(32, 32)", "image_size=(32, 32)"), ("", "", "")),
        ({"global_pool": "avg"}, None, ("", "", ""), ("", "readout 'patches' would pool", "shrunk image")),
        (
            {"global_pool": "map", "class_token": False},
            None,
            ("", "", ""),
            ("", "readout 'map' would pool", "shrunk image"),
        ),
    ],
    ids=["5 prompts", "16 prompts", "one row", "34 pixels", "mean of patches", "attention pooling"],
)
def test_the_report_says_why_a_placement_is_impossible(
    options: dict[str, Any], num_prompts: int | None, obstacles: tuple[str, ...], inversions: tuple[str, ...]
) -> None:
    backbone = make(**options)
    report = RGBPrompts.report(backbone, num_prompts)
    for found, obstacle, inversion in zip(report.placements, obstacles, inversions, strict=True):
        assert obstacle in found.obstacle
        assert bool(obstacle) == bool(found.obstacle)
        assert inversion in found.inversion
        assert (found.low == found.low) != bool(obstacle)  # numbers where it is possible
        assert not obstacle or f"Not with '{found.placement}': {found.obstacle}" in str(report)
        config = fp.RGBPGNConfig(placement=found.placement, num_prompts=report.prompts, library_size=4)
        images = torch.rand(2, 3, *backbone.image_size)
        if obstacle:
            with pytest.raises(ValueError, match=r"RGBPGNConfig\.(num_prompts|placement)"):
                fp.PromptedViT(backbone, config, num_classes=3)
        else:
            assert fp.PromptedViT(backbone, config, num_classes=3).eval()(images).shape == (2, 3)


def test_the_report_of_backbones_that_cannot_be_inverted(tiny_swin: Any) -> None:
    report = RGBPrompts.report(fp.FrozenViT(tiny_swin()))
    assert not report.invertible
    assert not report.exact
    assert all("Swin" in found.obstacle for found in report.placements)
    assert "PixelPromptConfig" in str(report)
    backbone = make()
    backbone.patch_norm = backbone.norm
    report = RGBPrompts.report(backbone)
    assert not report.exact
    assert all("norms its patch embedding" in found.inversion for found in report.placements)
    assert "RGBPGNConfig) work on this backbone with 'latent', 'extend' and 'replace'" in str(report)


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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b, m: RGBPrompts.report(b, 0), ValueError, "num_prompts must be a positive whole number"),
        (lambda b, m: RGBPrompts.report(b, "4"), ValueError, "num_prompts must be a positive whole number"),
        (
            lambda b, m: RGBPrompts.report(b, library=torch.zeros(2, 3)),
            ValueError,
            r"library must be a tensor of floats \(M, 48\)",
        ),
        (
            lambda b, m: RGBPrompts.report(b, library=torch.zeros(0, 48)),
            ValueError,
            "library must be a tensor of floats",
        ),
        (lambda b, m: RGBPrompts.report(b, library=torch.zeros(2, 48)), ValueError, "not all zero"),
        (lambda b, m: RGBPrompts.report(b, library=torch.full((2, 48), torch.nan)), ValueError, "must be finite"),
        (lambda b, m: RGBPrompts.report(b, library=torch.ones(2, 48, dtype=torch.complex64)), ValueError, "of floats"),
        (lambda b, m: RGBPrompts.report(b, seed="a"), TypeError, "seed must be a whole number"),
        (lambda b, m: RGBPrompts.report(3), TypeError, "backbone must be a FrozenViT"),
        (lambda b, m: RGBPrompts.invert(m, "replace"), ValueError, "placement must be 'latent' or 'extend'"),
        (lambda b, m: RGBPrompts.invert(fp.PromptedViT(b, fp.VPTConfig()), "latent"), ValueError, "PGNConfig"),
        (lambda b, m: RGBPrompts.invert(b), TypeError, "model must be a PromptedViT"),
        (lambda b, m: RGBPrompts(m), ValueError, "model must have pixel prompts"),
        (lambda b, m: RGBPrompts(b), TypeError, "model must be a PromptedViT"),
        (lambda b, m: RGBPrompts.invert(trained(b, activation="sigmoid"), picture=True), ValueError, "softmax"),
        (lambda b, m: RGBPrompts.inversion_error(m, m), ValueError, "inverted must be the result"),
        (lambda b, m: RGBPrompts.inversion_error(m, None), TypeError, "inverted must be a PromptedViT"),
        (lambda b, m: RGBPrompts.inversion_error(b, m), TypeError, "model must be a PromptedViT"),
        (
            lambda b, m: RGBPrompts.inversion_error(
                m, fp.PromptedViT(b, fp.RGBPGNConfig(num_prompts=8, library_size=12))
            ),
            ValueError,
            "inverted must be the result",
        ),
        (
            lambda b, m: RGBPrompts.inversion_error(m, RGBPrompts.invert(trained(make(48, 4)), "latent")),
            ValueError,
            "inverted must be the result",
        ),
        (lambda b, m: RGBPrompts(RGBPrompts.invert(m)).classify([1.0]), TypeError, "features must be a torch.Tensor"),
        (
            lambda b, m: RGBPrompts(RGBPrompts.invert(m)).classify(torch.zeros(2, 3)),
            ValueError,
            r"features must be floats \(B, 48\)",
        ),
        (
            lambda b, m: RGBPrompts.invert(fp.PromptedViT(b, fp.PGNConfig(num_prompts=3)), "extend"),
            ValueError,
            "num_prompts must fill whole rows",
        ),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], message: str) -> None:
    backbone = make()
    with pytest.raises(error, match=message):
        call(backbone, trained(backbone))
