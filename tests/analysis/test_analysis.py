"""The papers' figures as functions, on tiny models whose outputs are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.analysis.domains import read_out, tokens_used
from fastprompt.analysis.features import recorded


def images_of(shade: int, count: int = 10, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed + shade)
    pixels = torch.randint(shade, shade + 40, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return TensorDataset(pixels, torch.arange(count) % 2)


@pytest.fixture
def model(tiny_vit: nn.Module) -> Callable[[fp.PromptConfig], fp.PromptedViT]:
    return lambda config: fp.PromptedViT(fp.FrozenViT(tiny_vit), config, num_classes=2).eval()


def pgn(model: Callable[..., fp.PromptedViT]) -> fp.PromptedViT:
    return model(fp.PGNConfig(num_prompts=2, library_size=6, widths=(4, 4)))


def test_every_public_name_of_the_analysis_resolves() -> None:
    for name in fp.analysis.__all__:
        assert callable(getattr(fp.analysis, name)), name
    with pytest.raises(AttributeError, match="no_such"):
        _ = fp.analysis.no_such


def test_what_is_collected_is_what_the_model_computes(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = pgn(model)
    data = images_of(60)
    pixels = prompted.backbone.normalise(data.tensors[0])
    for source, expected in (
        ("generator", prompted.generator(pixels)),
        ("mixture", prompted.generator.mixture(pixels)),
        ("backbone", prompted.backbone(pixels)),
        ("prompted", prompted.forward_features(pixels)),
    ):
        found, labels = fp.analysis.collect(prompted, data, source, batch_size=4)
        torch.testing.assert_close(found, expected.detach().flatten(1), rtol=1e-4, atol=1e-5)
        assert torch.equal(labels, data.tensors[1])
    assert not prompted.training


def test_vapts_prompts_are_those_of_the_last_block(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = model(fp.VAPTConfig(num_prompts=3, hidden=4))
    with torch.no_grad():
        for parameter in prompted.generator.parameters():
            parameter.normal_()
    data = images_of(60, 4)
    found, _ = fp.analysis.collect(prompted, data, "generator")
    blocks = recorded(prompted, prompted.backbone.normalise(data.tensors[0]))
    assert [block for block, _, _ in blocks] == [0, 1, 2]
    torch.testing.assert_close(found, blocks[-1][1].flatten(1))
    assert found.std(0).max() > 0, "they depend on the image"
    assert "plain_prompts" not in vars(prompted.generator)


@pytest.mark.parametrize(
    ("config", "source", "message"),
    [
        (fp.VPTConfig(num_prompts=2), "generator", "whose prompts do not depend on the image"),
        (fp.VPTConfig(num_prompts=2), "mixture", "has no token library"),
        (fp.PGNConfig(num_prompts=2, library_size=None, widths=(4,)), "mixture", "has no token library"),
        (fp.LinearProbeConfig(), "generator", "whose prompts do not depend"),
        (fp.VPTConfig(num_prompts=2), "head", "source must be one of"),
    ],
)
def test_what_a_method_does_not_have(
    config: fp.PromptConfig, source: str, message: str, model: Callable[..., fp.PromptedViT]
) -> None:
    with pytest.raises(ValueError, match=message):
        fp.analysis.collect(model(config), images_of(60), source)
    with pytest.raises(TypeError, match="model must be a PromptedViT"):
        fp.analysis.collect(nn.Linear(1, 1), images_of(60))  # type: ignore[arg-type]


def test_mutual_information_is_the_entropy_where_features_name_the_label() -> None:
    labels = np.repeat(np.arange(4), 50)
    features = np.eye(4)[labels] + np.random.default_rng(0).normal(0, 0.01, (200, 4))
    found = fp.analysis.mutual_information(features, labels)
    assert found.raw == pytest.approx(np.log(4))
    assert found.entropy == pytest.approx(np.log(4))
    assert 0 < found.bias < 0.1
    assert found.corrected == pytest.approx(found.raw - found.bias)


def test_mutual_information_of_noise_is_corrected_to_nothing() -> None:
    random = np.random.default_rng(0)
    found = fp.analysis.mutual_information(random.normal(size=(200, 3)), random.integers(0, 5, 200), clusters=20)
    assert found.raw > 0.1, "the plug-in estimate is biased"
    assert abs(found.corrected) < 3 * found.std


def test_information_of_a_model(model: Callable[..., fp.PromptedViT]) -> None:
    data = TensorDataset(
        torch.cat([images_of(shade).tensors[0] for shade in (0, 200)]), torch.arange(2).repeat_interleave(10)
    )
    found = fp.analysis.information(pgn(model), data)
    assert list(found) == ["generator", "mixture", "backbone", "prompted"]
    assert found["backbone"].raw == pytest.approx(np.log(2))
    assert list(fp.analysis.information(model(fp.VPTConfig(num_prompts=2)), data)) == ["backbone", "prompted"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clusters": 0}, "clusters must be an integer of at least 1"),
        ({"clusters": 9}, "clusters must be at most the number of images, 8"),
        ({"permutations": True}, "permutations must be"),
    ],
)
def test_wrong_arguments_of_mutual_information(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.analysis.mutual_information(np.zeros((8, 2)), np.zeros(8), **arguments)
    with pytest.raises(ValueError, match="features must be"):
        fp.analysis.mutual_information(np.zeros((8, 2)), np.zeros(7))
    with pytest.raises(ValueError, match="features must be finite"):
        fp.analysis.mutual_information(np.full((8, 2), np.nan), np.zeros(8))


def test_the_effective_rank() -> None:
    assert fp.analysis.effective_rank(torch.eye(5)) == pytest.approx(5)
    assert fp.analysis.effective_rank(torch.ones(4, 3)) == pytest.approx(1)
    with pytest.raises(ValueError, match="matrix must have two axes"):
        fp.analysis.effective_rank(torch.zeros(2, 2))


def tokens_by_brightness(prompted: fp.PromptedViT) -> None:
    """Make a PGN take token 0 of the library for dark images and token 3 for bright ones."""

    def logits(images: Tensor) -> Tensor:
        bright = images.mean((1, 2, 3)) > 0
        found = torch.zeros(len(images), 2, 6)
        found[:, :, 0] = torch.where(bright, 0.0, 40.0)[:, None]
        found[:, :, 3] = torch.where(bright, 40.0, 0.0)[:, None]
        return found

    prompted.generator.logits = logits  # type: ignore[assignment]


def test_domains_that_take_tokens_of_their_own_are_discovered(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = pgn(model)
    tokens_by_brightness(prompted)
    found = fp.analysis.discover_domains(prompted, {"night": images_of(0, 12), "day": images_of(200)}, max_images=10)
    assert found.embedding.shape == (20, 2)
    assert found.labels.tolist() == [0] * 10 + [1] * 10
    assert found.read_out["mixture"].nearest == found.read_out["mixture"].linear == 1
    assert found.read_out["backbone"].chance == 0.5
    assert found.tokens_used == {"night": 1, "day": 1}
    assert found.overlap is not None
    assert found.overlap[0, 0] == pytest.approx(1)
    assert found.overlap[0, 1] == pytest.approx(0, abs=1e-6)
    taken = fp.analysis.nearest_domain(prompted, images_of(190, seed=5), found)
    assert list(taken) == ["day", "night"]
    assert taken["day"] == pytest.approx(1)


def test_domains_that_take_the_same_tokens_are_not(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = pgn(model)
    prompted.generator.logits = lambda images: torch.randn(len(images), 2, 6)  # type: ignore[assignment]
    found = fp.analysis.discover_domains(prompted, {"a": images_of(60, 40), "b": images_of(60, 40, seed=1)})
    assert found.read_out["mixture"].linear < 0.75
    assert found.overlap is not None
    assert found.overlap[0, 1] > 0.8


def test_a_method_without_library_shows_its_prompts(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = model(fp.PGNConfig(num_prompts=2, library_size=None, widths=(4,)))
    found = fp.analysis.discover_domains(prompted, {"a": images_of(0), "b": images_of(200)})
    assert list(found.read_out) == ["generator", "backbone"]
    assert found.tokens_used == {}
    with pytest.raises(ValueError, match="token library"):
        fp.analysis.nearest_domain(prompted, images_of(0), found)


def test_wrong_domains(model: Callable[..., fp.PromptedViT]) -> None:
    with pytest.raises(ValueError, match="at least two domains"):
        fp.analysis.discover_domains(pgn(model), {"a": images_of(0)})
    with pytest.raises(ValueError, match="at least 5 images of each domain, got 4 of b"):
        fp.analysis.discover_domains(pgn(model), {"a": images_of(0), "b": images_of(0, 4)})
    with pytest.raises(TypeError, match="data must be domain"):
        fp.analysis.discover_domains(pgn(model), [images_of(0)])  # type: ignore[arg-type]


def test_the_nearest_other_image_is_not_the_image_itself() -> None:
    vectors = np.repeat(np.arange(10.0), 2)[:, None]  # each image has a twin in the other domain
    found = read_out(vectors, np.tile([0, 1], 10))
    assert found.nearest == 0
    assert tokens_used(np.array([0.5, 0.4, 0.1])) == 2
    assert tokens_used(np.ones(10)) == 9


def v2apt(model: Callable[..., fp.PromptedViT]) -> fp.PromptedViT:
    prompted = model(fp.V2APTConfig(num_prompts=3, num_instance=2, latent=4, hidden=5))
    with torch.no_grad():
        for parameter in prompted.generator.decoders.parameters():
            parameter.normal_(0, 0.5)
    return prompted


def test_latent_units_that_say_nothing_have_no_kl(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = v2apt(model)
    stats = torch.zeros(10, 8)
    stats[:, 1] = torch.linspace(-2, 2, 10)  # μ of unit 1; log σ² is 0
    prompted.generator.stats = lambda embeddings: stats[: len(embeddings)]  # type: ignore[assignment]
    use = fp.analysis.latent_use(prompted, images_of(60))
    assert use.kl[[0, 2, 3]].tolist() == [0, 0, 0]
    assert use.kl[1] == pytest.approx(float((stats[:, 1] ** 2 / 2).mean()))
    assert use.active == 1
    assert use.std[1] > 1
    assert fp.analysis.most_telling_units(prompted, images_of(60), count=1) == [1]


def test_a_traversal_moves_one_unit(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = v2apt(model)
    images = images_of(60, 3).tensors[0]
    seen: list[Tensor] = []
    own = prompted.generator.stats

    def record(embeddings: Tensor) -> Tensor:
        seen.append(own(embeddings))
        return seen[-1]

    prompted.generator.stats = record  # type: ignore[assignment]
    found = fp.analysis.traverse(prompted, images, 2, [-3.0, 0.0, 3.0])
    assert found.shape == (3, 3, 2)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 3))
    assert (found[0] - found[2]).abs().max() > 1e-4
    mean = float(seen[0][0, 2].detach())
    at_mean = fp.analysis.traverse(prompted, images[:1], 2, [mean])
    torch.testing.assert_close(at_mean[0], prompted(images[:1]).softmax(-1).detach(), rtol=1e-4, atol=1e-5)


def test_wrong_traversals(model: Callable[..., fp.PromptedViT]) -> None:
    images = images_of(60, 2).tensors[0]
    with pytest.raises(TypeError, match="must be a V²APT, got 'pgn'"):
        fp.analysis.traverse(pgn(model), images, 0, [0.0])
    with pytest.raises(ValueError, match="unit must be from 0 to 3, got 4"):
        fp.analysis.traverse(v2apt(model), images, 4, [0.0])
    with pytest.raises(ValueError, match="values must hold"):
        fp.analysis.traverse(v2apt(model), images, 0, [])


def test_similarity_of_prompts_that_are_patches(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = model(fp.VAPTConfig(num_prompts=2, hidden=4, static_layers=1))
    images = images_of(60, 3).tensors[0]
    before = fp.analysis.similarity_maps(prompted, images)
    assert {block: tuple(each.shape) for block, each in before.items()} == dict.fromkeys(range(3), (3, 2, 4, 4))
    assert before[1].abs().max() == 0, "adaptive prompts start as zeros"
    prompted.generator.plain_prompts = (  # type: ignore[assignment]
        lambda layer, context, tokens=None, draws=None: tokens[:, 5:7]
    )
    found = fp.analysis.similarity_maps(prompted, images)
    assert found[2].flatten(2)[:, 0].argmax(-1).tolist() == [5, 5, 5]
    torch.testing.assert_close(found[2].flatten(2)[:, 1, 6], torch.ones(3))


def test_methods_without_prompt_tokens_have_no_similarity(model: Callable[..., fp.PromptedViT]) -> None:
    with pytest.raises(ValueError, match="must have prompt tokens, got 'linear'"):
        fp.analysis.similarity_maps(model(fp.LinearProbeConfig()), images_of(60, 1).tensors[0])


def test_the_library_counts_its_dead_tokens(model: Callable[..., fp.PromptedViT]) -> None:
    prompted = pgn(model)
    tokens_by_brightness(prompted)
    usage = fp.analysis.library_usage(prompted, images_of(0))
    assert usage["dead_tokens"] == 5
    assert 1 < usage["effective_rank"] <= 6
