"""A tiny model and an easy four-class problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp

COLOURS = torch.tensor([[200, 50, 50], [50, 200, 50], [50, 50, 200], [128, 128, 128]])


@pytest.fixture
def colours() -> Callable[..., tuple[Tensor, Tensor]]:
    """colours(n, seed=0): uint8 images (n, 3, 32, 32) of four noisy colours, and which colour, (n,)."""

    def make(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        labels = torch.arange(count) % 4
        noise = torch.randint(-40, 40, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed))
        return (COLOURS[labels][:, :, None, None] + noise).clamp(0, 255).to(torch.uint8), labels

    return make


@pytest.fixture
def make_model() -> Callable[..., Any]:
    """make_model(config=VPT, num_classes=4, seed=0): a PromptedViT, always on the same tiny ViT."""

    def make(config: Any = None, num_classes: int | None = 4, seed: int = 0) -> Any:
        torch.manual_seed(0)
        vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0)
        torch.manual_seed(seed)
        return fp.PromptedViT(fp.FrozenViT(vit), config or fp.VPTConfig(num_prompts=2), num_classes=num_classes)

    return make
