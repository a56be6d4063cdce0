"""Prompts that start from the training images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.train import prompt_init
from fastprompt.train.sources import RunData

Pair = tuple[Tensor, Tensor]
CONFIGS = [fp.VPTConfig(3), fp.VPTConfig(3, deep=False, first_block=1), fp.FreePromptsConfig(3), fp.CVPTConfig(3)]
CONFIGS += [fp.VQTConfig(3, first_block=1)]


@pytest.fixture
def data() -> Pair:
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8), torch.arange(9) % 3


def test_means_are_those_of_the_groups_that_are_there() -> None:
    centres = torch.tensor([[10.0, 0, 0], [0, 10.0, 0], [0, 0, 10.0]])
    rows = (centres[:, None] + 0.1 * torch.randn(3, 20, 3)).flatten(0, 1)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):  # k-means may stop with two groups in one; of many starts one does not
        found = prompt_init.group_means(rows, 3, generator)
        if torch.cdist(found, centres).amin(dim=0).max() < 0.2:
            return
    raise AssertionError("no start finds the groups")


def test_more_prompts_than_tokens() -> None:
    found = prompt_init.group_means(torch.randn(2, 4), 5, torch.Generator().manual_seed(0))
    assert found.shape == (5, 4)
    assert torch.isfinite(found).all()


def test_a_quarter_of_a_prompt_lies_outside_the_tokens_own_directions() -> None:
    own = torch.randn(2, 12)
    rows = torch.randn(200, 2) @ own  # of rank 2
    prompts = prompt_init.initial_prompts(rows, 4, torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(own.T)[0]
    inside = prompts @ basis @ basis.T
    means = prompt_init.group_means(rows, 4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(inside, 0.75 * means, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close((prompts - inside).norm(dim=1), 0.25 * means.norm(dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.kind}-{getattr(config, 'first_block', 0)}")
def test_tokens_are_those_that_enter_the_prompts_blocks(
    make_vit: Callable[..., Any], data: Pair, config: PromptConfig
) -> None:
    """The first block's are the embedding's; without groups and noise, prompts are the tokens."""
    model = fp.PromptedViT(fp.FrozenViT(make_vit(pre_norm=True)), config, num_classes=3).eval()
    tokens = prompt_init.entering(model, [data[0]])
    assert list(tokens) == list(model.generator.layers)
    vit = model.backbone
    first = min(tokens)
    x = vit.graph.papers.embed(vit, vit.normalise(data[0])).tokens
    if not model.generator.before_pre_norm:
        x = vit.norm_pre(x)
        for block in vit.blocks[:first]:
            x = block(x)
    torch.testing.assert_close(tokens[first], x[:, vit.num_prefix :].flatten(0, 1))


def test_stages_of_a_swin(tiny_swin: Callable[..., Any]) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.VPTConfig(2), num_classes=2)
    images = torch.randn(2, 3, *model.backbone.image_size)
    before = [p.clone() for p in model.generator.parameters()]
    prompt_init.prompts_from_data(model, iter([(images, None)]), 0)
    for layer, prompts in model.generator.free_tokens().items():
        assert prompts.shape == (2, model.generator.geometry.widths[layer])
    assert all(not torch.equal(a, b) for a, b in zip(before, model.generator.parameters(), strict=True))


def run(make_vit: Callable[..., Any], data: Pair, out: Path | None = None, **fields: Any) -> fp.PromptedViT:
    torch.manual_seed(0)
    model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(3), num_classes=3)
    options = {"epochs": 2, "batch_size": 4, "dtype": "float32", "lr": 1e-3, **fields}
    fp.fit(model, data, data, out_dir=out, progress=False, **options)
    return model


def test_fit_starts_from_them_by_the_seed(make_vit: Callable[..., Any], data: Pair, tmp_path: Path) -> None:
    """At a rate that moves nothing, the trained prompts are the initial ones."""
    still = {"prompt_init": "data", "lr": 1e-12, "epochs": 1}
    runs = [run(make_vit, data, tmp_path, **still), run(make_vit, data, tmp_path, **still)]  # the second is finished
    runs += [run(make_vit, data, **still), run(make_vit, data, **still, seed=1)]
    first, finished, again, other = (model.generator.static.embeddings.detach() for model in runs)
    assert torch.equal(first, finished)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)
    expected = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(3), num_classes=3)
    recipe = fp.default_recipe(expected.config).replace(batch_size=4)
    prompt_init.prompts_from_data(expected, RunData(expected, data, data, recipe).sampled(), 0)
    torch.testing.assert_close(first, expected.generator.static.embeddings.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", [fp.VPTConfig(3, project=4), fp.VAPTConfig(3), fp.LinearProbeConfig()])
def test_computed_prompts_are_refused(make_vit: Callable[..., Any], data: Pair, config: PromptConfig) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit()), config, num_classes=3)
    with pytest.raises(ValueError, match="prompt_init must be 'default' unless prompts are learned tokens"):
        fp.fit(model, data, data, epochs=1, prompt_init="data", progress=False)
    with pytest.raises(ValueError, match="prompt_init must be one of 'default', 'data', got 'kmeans'"):
        fp.Recipe(prompt_init="kmeans")
