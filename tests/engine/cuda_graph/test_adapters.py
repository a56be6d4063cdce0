"""Adapters of one method shape are swapped without a capture; others are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import (
    close,
    eager,
    graphed_of,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.engine.cuda_graph import method_shape
from fastprompt.generators import PromptConfig

Build = Callable[..., fp.PromptedViT]


def test_swap_without_capture(build: Build, images: Tensor, method: str) -> None:
    models = [build(method, seed=seed) for seed in (1, 2, 3)]
    graphed, _ = graphed_of(build(method))
    for model in (models[0], models[1], models[2], models[0]):
        graphed.load_adapter(model)
        close(graphed(images[:3]), eager(model, images[:3]))
        state = models[1].adapter_state_dict()
        graphed.load_adapter(state)
        close(graphed(images[:3]), eager(models[1], images[:3]))
    assert graphed.captures == 3


def test_options_of_training_do_not_separate_adapters(build: Build) -> None:
    same = fp.VAPTConfig(num_prompts=3, hidden=4, channel_dropout=0.3, hidden_dropout=0.2, prompt_dropout=0.1)
    assert method_shape(build("vapt")) == method_shape(build(same))
    assert hash(method_shape(build(same)))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vpt-5", {}),
        ("vpt-shallow", {}),
        ("vapt", {}),
        ("vpt-deep", {"num_classes": 4}),
        ("vpt-deep", {"readout": "patches"}),
    ],
)
def test_another_method_shape_is_refused(build: Build, images: Tensor, method: str, options: dict[str, Any]) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    before = graphed(images[:2])
    with pytest.raises(ValueError, match="adapter has another method shape"):
        graphed.load_adapter(build(method, seed=1, **options))
    assert torch.equal(graphed(images[:2]), before)


def test_options_that_no_tensor_shows_are_part_of_the_shape(build: Build) -> None:
    graphed, _ = graphed_of(build("pgn"))
    sigmoid = fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8), activation="sigmoid")
    with pytest.raises(ValueError, match="adapter has another method shape"):
        graphed.load_adapter(build(sigmoid))


def test_constants_of_a_head_are_part_of_the_shape(build: Build) -> None:
    texts = torch.randn(3, 48)
    model, other = (
        build("vpt-deep", head="text", class_embeddings=texts, logit_scale=scale) for scale in (100.0, 50.0)
    )
    graphed, _ = graphed_of(model)
    with pytest.raises(ValueError, match="adapter has another method shape"):
        graphed.load_adapter(other)


def test_another_backbone_or_an_incomplete_state_is_refused(
    configs: dict[str, PromptConfig], build: Build, make_vit: Callable[..., VisionTransformer]
) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    other = fp.PromptedViT(fp.FrozenViT(make_vit(1)), configs["vpt-deep"], num_classes=3)
    with pytest.raises(ValueError, match="adapter is of another backbone"):
        graphed.load_adapter(other)
    with pytest.raises(ValueError, match="missing"):
        graphed.load_adapter({})
