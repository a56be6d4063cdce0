from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.vit import reference

OFFICIAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "pgn_official"
needs_official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the published PGN checkpoints are not on this machine"
)


def tiny(**options: object) -> fp.PGN:
    return fp.PGN(**{"num_prompts": 4, "library_size": 6, "widths": (4, 8), "width": 24, **options})


def theirs(name: str) -> str:
    """The authors' name of one of our ResNet10 PGN's tensors."""
    if name == "library":
        return "tl_vectors"
    for ours, other in (
        ("trunk.stem.", "model.input_net."),
        ("trunk.fc.", "model.output_net.2."),
        ("trunk.", "model."),
        (".body.", ".net."),
        (".skip.", ".downsample."),
    ):
        name = name.replace(ours, other)
    return name


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_golden_tiny(golden: Callable[[str], dict[str, Tensor]], dtype: torch.dtype, bound: float) -> None:
    data = golden("pgn_tiny")
    pgn = fp.PGN(num_prompts=4, library_size=8, widths=(4, 8, 16, 32), width=24)
    pgn.load_state_dict({name: data["state." + theirs(name)] for name in pgn.state_dict()})
    pgn, images = pgn.to(dtype), data["images"].to(dtype)
    out = pgn.eval()(images)
    assert (out.double() - data["eval.prompts"].double()).norm() <= bound * data["eval.prompts"].norm()
    out = pgn.train()(images)
    assert (out.double() - data["train.prompts"].double()).norm() <= bound * data["train.prompts"].norm()
    (out * data["loss_weights"].to(dtype)).sum().backward()
    assert {theirs(name) for name, _ in pgn.named_parameters()} == {k[5:] for k in data if k.startswith("grad.")}
    for name, p in pgn.named_parameters():
        expected = data["grad." + theirs(name)].double()
        assert (p.grad.double() - expected).norm() <= bound * expected.norm(), name


@needs_official
@pytest.mark.parametrize(
    ("name", "library", "width", "parameters"),
    [
        ("pgn_clip_cifar100", 256, 768, 1_032_304),
        ("pgn_vit_eurosat", 128, 768, 669_808),
        ("pgn_dino_sun397", 128, 384, 620_656),
    ],
)
def test_golden_of_the_published_checkpoints(
    golden: Callable[[str], dict[str, Tensor]], name: str, library: int, width: int, parameters: int
) -> None:
    data = golden("pgn_official")
    pgn = fp.load_official(OFFICIAL / f"{name}.pt")
    assert not pgn.training
    assert (pgn.config.num_prompts, pgn.config.library_size, pgn.config.widths) == (
        16,
        library,
        (16, 32, 64, 128),
    )
    assert (pgn.geometry.width, pgn.num_parameters()) == (width, parameters)
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        pgn, images = pgn.to(dtype), data["images"].to(dtype)
        for out, expected in (
            (pgn.logits(images).flatten(1), data[f"{name}.logits"]),
            (pgn(images), data[f"{name}.prompts"]),
        ):
            assert (out.double() - expected.double()).norm() <= bound * expected.double().norm()


def test_parameter_counts() -> None:
    assert fp.PGN().num_parameters() == 1_032_304
    assert fp.PGN(library_size=128).num_parameters() == 669_808
    assert fp.PGN(library_size=128, width=384).num_parameters() == 620_656
    assert fp.PGN().paper_num_parameters() is None


def test_initial_values() -> None:
    pgn = fp.PGN()
    assert abs(pgn.library.std() - 0.02) < 2e-4
    for module in pgn.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(module.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.15
            assert (module.bias is not None) == (module.kernel_size == (1, 1))


def test_alone_prompts_are_mixtures_of_the_library() -> None:
    pgn, images = tiny().double().eval(), torch.randn(3, 3, 32, 48).double()
    assert pgn.known_at == "image"
    weights, prompts = pgn.mixture(images), pgn(images)
    assert prompts.shape == (3, 4, 24)
    assert weights.shape == (3, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4).double())
    torch.testing.assert_close(prompts, weights @ pgn.library)
    assert not torch.allclose(prompts[0], prompts[1])
    torch.testing.assert_close(pgn(images[1:2]), prompts[1:2])


def test_sigmoid_weights() -> None:
    pgn, images = tiny(activation="sigmoid").double().eval(), torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(pgn.mixture(images), torch.sigmoid(pgn.logits(images)))
    torch.testing.assert_close(pgn(images), torch.sigmoid(pgn.logits(images)) @ pgn.library)


def test_prompt_rows_of_the_logits_are_contiguous_blocks_of_the_last_layer() -> None:
    pgn, images = tiny().double().eval(), torch.randn(1, 3, 32, 32).double()
    assert torch.equal(pgn.logits(images).flatten(), pgn.trunk(images).flatten())
    with torch.no_grad():
        pgn.trunk.fc.bias.zero_()
        pgn.trunk.fc.weight.zero_()
        pgn.trunk.fc.bias[6 + 2] = 100.0  # prompt 1, token 2
    torch.testing.assert_close(pgn(images)[0, 1], pgn.library[2])
    torch.testing.assert_close(pgn(images)[0, 0], pgn.library.mean(0))


def test_network_by_hand() -> None:
    pgn, x = tiny(widths=(4, 8)).double().eval(), torch.randn(2, 3, 32, 32).double()
    trunk, images = pgn.trunk, x
    for m in trunk.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.eval()

    def norm(x: Tensor, m: nn.BatchNorm2d) -> Tensor:
        return F.batch_norm(x, m.running_mean, m.running_var, m.weight, m.bias, eps=1e-5)

    x = F.max_pool2d(F.relu(norm(F.conv2d(x, trunk.stem[0].weight, stride=2, padding=1), trunk.stem[1])), 3, 2, 1)
    for i, block in enumerate(trunk.blocks):
        y = F.relu(norm(F.conv2d(x, block.body[0].weight, stride=1 + i, padding=1), block.body[1]))
        y = norm(F.conv2d(y, block.body[3].weight, padding=1), block.body[4])
        x = F.relu(y + (x if i == 0 else F.conv2d(x, block.skip.weight, block.skip.bias, stride=2)))
    expected = F.linear(x.mean(dim=(2, 3)), trunk.fc.weight, trunk.fc.bias)
    torch.testing.assert_close(trunk(images), expected)


def test_stem_pool() -> None:
    images = torch.randn(2, 3, 32, 32).double()
    with_pool, without = tiny().double().eval(), tiny(stem_pool=False).double().eval()
    without.load_state_dict(with_pool.state_dict())
    assert not torch.allclose(with_pool(images), without(images))
    seen = []
    without.trunk.blocks[0].register_forward_hook(lambda m, args, out: seen.append(args[0].shape[2:]))
    without(images)
    assert seen == [(16, 16)]


def test_resolution_resizes_what_the_generator_sees() -> None:
    pgn, seen = tiny(resolution=16).double().eval(), []
    pgn.trunk.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    flat = torch.full((1, 3, 32, 48), 0.7).double()
    pgn(flat)
    assert seen[0].shape == (1, 3, 16, 16)
    torch.testing.assert_close(seen[0], torch.full((1, 3, 16, 16), 0.7).double())
    small = torch.randn(1, 3, 16, 16).double()
    pgn(small)
    assert torch.equal(seen[1], small)


@pytest.mark.parametrize("sides", [(32, 48), (50, 33), (32, 32), (10, 20), (16, 24)])
def test_short_side_resizes_as_the_authors_torchvision(sides: tuple[int, int]) -> None:
    """torchvision 0.13: `resize(images, 16)` sets the short side, and does not antialias tensors."""
    from torchvision.transforms.functional import resize

    pgn, seen = tiny(resolution=16, resize="short_side").double().eval(), []
    pgn.trunk.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    images = torch.randn(2, 3, *sides).double()
    pgn(images)
    expected = resize(images, [16], antialias=False)
    torch.testing.assert_close(seen[0], expected)
    if min(sides) > 16:
        assert not torch.allclose(expected, resize(images, [16], antialias=True))


def test_resnet18_trunk_is_torchvision_s() -> None:
    from torchvision.models import resnet18

    pgn = fp.PGN(trunk="resnet18", num_prompts=2, library_size=3, width=24).double().eval()
    reference = resnet18(num_classes=6).double().eval()
    reference.load_state_dict(pgn.trunk.state_dict())
    images = torch.randn(2, 3, 32, 32).double()
    torch.testing.assert_close(pgn.logits(images), reference(images).view(2, 2, 3))


def test_batch_norm_uses_and_updates_batch_statistics_in_training_only() -> None:
    pgn, images = tiny(), 2 + torch.randn(4, 3, 32, 32)
    norm = pgn.trunk.stem[1]
    before = norm.running_mean.clone()
    pgn.eval()(images)
    assert torch.equal(norm.running_mean, before)
    pgn.train()(images)
    assert norm.num_batches_tracked == 1
    assert not torch.equal(norm.running_mean, before)
    # in training an image's prompts depend on the other images of the batch
    assert not torch.allclose(pgn(images)[:2], pgn(images[:2]))


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_prompts_join_last_and_before_clip_s_pre_norm(
    pre_norm_vit: VisionTransformer, tiny_images: Tensor, activation: str
) -> None:
    vit = pre_norm_vit.double()
    model = fp.PromptedViT(
        fp.FrozenViT(vit),
        fp.PGNConfig(num_prompts=4, library_size=6, widths=(4, 8), activation=activation),
        readout="patches+prompts",
    ).eval()
    with torch.no_grad():
        model.generator.library.mul_(50)
    images = tiny_images.double()
    x = torch.cat([vit._pos_embed(vit.patch_embed(images)), model.generator(images)], dim=1)
    x = vit.norm(vit.blocks(vit.norm_pre(x)))
    assert x.shape == (4, 3 + 16 + 4, 48)
    expected = x[:, 3:].mean(dim=1)
    torch.testing.assert_close(model(images), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.reference_forward(images), expected, rtol=1e-12, atol=1e-12)
    # the order of tokens is invisible to attention, not to what reads the tokens
    context = model.generator.context(images)
    tokens = reference.encode(model.backbone, images, model.generator, context).tokens
    torch.testing.assert_close(tokens, x, rtol=1e-10, atol=1e-10)
    model.readout = "prompts"
    torch.testing.assert_close(model(images), x[:, 19:].mean(dim=1), rtol=1e-10, atol=1e-10)


def test_generator_sees_the_normalised_image(tiny_vit: VisionTransformer) -> None:
    backbone = fp.FrozenViT(tiny_vit)
    model = fp.PromptedViT(backbone, fp.PGNConfig(num_prompts=2, library_size=3, widths=(4,))).eval()
    seen = []
    model.generator.trunk.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    model(pixels)
    torch.testing.assert_close(seen[0], backbone.normalise(pixels))


def test_wrong_images_are_named() -> None:
    pgn = tiny()
    with pytest.raises(TypeError, match=r"x must be a floating-point tensor, normalised images .* got torch.uint8"):
        pgn(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(TypeError, match=r"got NoneType"):
        pgn()
    with pytest.raises(ValueError, match=r"x must be normalised images \(B, 3, H, W\), got \(3, 32, 32\)"):
        pgn(torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"library_size": 0}, ValueError, "library_size must be at least 1"),
        ({"activation": "relu"}, ValueError, "activation must be one of"),
        ({"trunk": "resnet50"}, ValueError, "trunk must be one of"),
        ({"widths": [16, 32]}, TypeError, "widths must be tuple"),
        ({"widths": ()}, ValueError, "widths must be positive integers"),
        ({"widths": (16, -1)}, ValueError, "widths must be positive integers"),
        ({"resolution": 0}, ValueError, "resolution must be at least 1"),
        ({"resize": "crop"}, ValueError, "resize must be one of"),
        ({"stem_pool": "no"}, TypeError, "stem_pool must be bool"),
        ({"pretrained_trunk": True}, ValueError, "trunk must be 'resnet18' with pretrained_trunk, got 'resnet10'"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"PGNConfig\.{message}"):
        fp.PGNConfig(**options)


def test_one_small_image_in_training_says_what_to_do() -> None:
    generator = fp.PGN(num_prompts=3, library_size=5, width=48).train()
    with pytest.raises(ValueError, match=r"images must be at least 2 while PGN trains, got 1 of 32 x 32 pixels"):
        generator(torch.randn(1, 3, 32, 32))
    assert generator.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 3, 48)


def test_sequence_is_tokens_and_prompts() -> None:
    generator = fp.PGN(num_prompts=3, library_size=5, widths=(4,), width=16).double()
    images, tokens = torch.randn(2, 3, 16, 16).double(), torch.randn(2, 7, 16).double()
    theirs = torch.cat([tokens, generator(images)], dim=1)
    for given in (tokens, tokens.clone().requires_grad_()):
        ours = generator.sequence(images, given)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(ours)
        for x, y in zip(
            torch.autograd.grad((ours * weights).sum(), list(generator.parameters()), retain_graph=True),
            torch.autograd.grad((theirs * weights).sum(), list(generator.parameters()), retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.autograd.grad((ours * weights).sum(), given)[0], weights[:, :7])
    assert generator.sequence(images, tokens.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(given, tokens, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ("tokens", TypeError, r"tokens must be a floating-point tensor \(B, T, 16\), got str"),
        (
            torch.zeros(2, 7, 16, dtype=torch.long),
            TypeError,
            "tokens must be a floating-point tensor .* got torch.int64",
        ),
        (torch.zeros(2, 7, 15), ValueError, r"tokens must be \(2, T, 16\), .* got \(2, 7, 15\)"),
        (torch.zeros(3, 7, 16), ValueError, r"tokens must be \(2, T, 16\), .* got \(3, 7, 16\)"),
        (torch.zeros(2, 7, 16, device="meta"), ValueError, "tokens must be on cpu, where the images are, got meta"),
    ],
)
def test_sequence_takes_the_images_tokens(tokens: Any, error: type[Exception], message: str) -> None:
    generator = fp.PGN(num_prompts=3, library_size=5, widths=(4,), width=16)
    with pytest.raises(error, match=message):
        generator.sequence(torch.randn(2, 3, 16, 16), tokens)


def test_without_a_library_the_network_predicts_the_prompts(tiny_images: Tensor) -> None:
    """PGN, Fig. 4: the last Linear has an output for each number of the prompts."""
    pgn = tiny(library_size=None).eval()
    assert pgn.trunk.fc.out_features == 4 * 24
    assert "library" not in pgn.state_dict()
    features = pgn.trunk.stem(tiny_images)
    features = pgn.trunk.pool(features)
    for block in pgn.trunk.blocks:
        features = block(features)
    expected = (features.mean((2, 3)) @ pgn.trunk.fc.weight.T + pgn.trunk.fc.bias).view(4, 4, 24)
    torch.testing.assert_close(pgn(tiny_images), expected)
    assert pgn.num_parameters() == tiny().num_parameters() + (4 * 24 - 4 * 6) * 9 - 6 * 24
    assert 0.01 < pgn(tiny_images).std() < 0.04, "they start as large as tokens of a library"
    with pytest.raises(ValueError, match="library_size must be a number of tokens"):
        pgn.mixture(tiny_images)
    with pytest.raises(ValueError, match=r"PGNConfig\.library_size must be at least 1, got 0"):
        fp.PGNConfig(library_size=0)
    with pytest.raises(ValueError, match=r"RGBPGNConfig\.library_size must be int, got None"):
        fp.RGBPGNConfig(library_size=None)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_predicted_prompts_enter_the_model_where_mixed_ones_do(
    pre_norm: bool, make_vit: Callable[..., VisionTransformer], tiny_images: Tensor, tmp_path: Path
) -> None:
    backbone = fp.FrozenViT(make_vit(pre_norm=pre_norm))
    config = fp.PGNConfig(num_prompts=2, library_size=None, widths=(4, 8))
    model = fp.PromptedViT(backbone, config, num_classes=3).double().eval()
    images = tiny_images.double()
    logits = model(images)
    torch.testing.assert_close(logits, model.reference_forward(images), rtol=1e-10, atol=1e-10)
    model.train()
    model(images).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.generator.parameters() if p.ndim > 1)
    model.eval().save_pretrained(tmp_path)
    loaded = fp.PromptedViT.from_pretrained(backbone, tmp_path)
    assert loaded.config.library_size is None
