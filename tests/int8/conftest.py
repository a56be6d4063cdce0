"""A tiny ViT, images that calibrate it, and its int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastprompt as fp


@pytest.fixture
def backbone(make_vit: Callable[..., Any]) -> fp.FrozenViT:
    return fp.FrozenViT(make_vit(num_classes=0))


@pytest.fixture
def images() -> Tensor:
    """Twelve normalised images (12, 3, 32, 32)."""
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[12, 8])
def weights(request: pytest.FixtureRequest, backbone: fp.FrozenViT, images: Tensor) -> fp.Int8Weights:
    """With activations of 12 and of 8 bits."""
    return fp.Int8Weights.calibrate(backbone, images, activation_bits=request.param)
