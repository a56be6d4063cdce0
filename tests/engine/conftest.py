"""A backbone that every method runs on, and models on it whose every trained tensor is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import PromptConfig

Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def make_backbone(make_vit: Callable[..., VisionTransformer]) -> Callable[..., fp.FrozenViT]:
    """`make_backbone(**options)`: class token, one register, attention pooling, pre-norm, a 7-way classifier."""
    vit = make_vit(num_classes=7, reg_tokens=1, global_pool="map", pre_norm=True)
    return lambda **options: fp.FrozenViT(vit, **options)


@pytest.fixture
def backbone(make_backbone: Callable[..., fp.FrozenViT]) -> fp.FrozenViT:
    """The backbone of `make_backbone` as it is."""
    return make_backbone()


@pytest.fixture
def build(backbone: fp.FrozenViT, configs: dict[str, PromptConfig]) -> Build:
    """`build(method, seed=0, num_classes=5, readout="cls", ...)`: a model in eval mode."""

    def model_of(
        method: str, seed: int = 0, num_classes: int | None = 5, readout: str = "cls", **options: Any
    ) -> fp.PromptedViT:
        vit = options.pop("backbone", backbone)
        model = fp.PromptedViT(vit, configs[method], num_classes, readout=readout, **options)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, p in model.trainable_parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=random, dtype=p.dtype))
        return model.eval()

    return model_of


@pytest.fixture
def images() -> Tensor:
    """Eleven normalised images (11, 3, 32, 32)."""
    return torch.randn(11, 3, 32, 32, generator=torch.Generator().manual_seed(1))
