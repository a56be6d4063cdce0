"""A backbone that every method runs on, and models on it whose every trained tensor is random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp

METHODS: dict[str, Any] = {
    "vpt": fp.VPTConfig(num_prompts=3),
    "vpt-5": fp.VPTConfig(num_prompts=5),
    "vpt-shallow": fp.VPTConfig(num_prompts=3, deep=False, project=6),
    "pgn": fp.PGNConfig(num_prompts=3, library_size=5, widths=(4, 8)),
    "v2apt": fp.V2APTConfig(num_prompts=4, num_instance=2, latent=3, hidden=5),
    "v2apt-samples": fp.V2APTConfig(num_prompts=3, num_instance=1, latent=3, hidden=5, inference_samples=2),
    "vapt": fp.VAPTConfig(num_prompts=3, hidden=4),
    "free": fp.FreePromptsConfig(num_prompts=2),
    "pixel": fp.PixelPromptConfig(border=4),
    "linear": fp.LinearProbeConfig(),
    **{
        f"rgb-{placement}": fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8), placement=placement)
        for placement in ("latent", "extend", "replace")
    },
}
Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def methods() -> dict[str, Any]:
    """A configuration of each method by name."""
    return METHODS


@pytest.fixture
def backbone(randomised: Callable[..., nn.Module]) -> fp.FrozenViT:
    """32 px, class token, one register, attention pooling, pre-norm, a 7-way classifier."""
    vit = VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=7,
        reg_tokens=1,
        global_pool="map",
        pre_norm=True,
    )
    return fp.FrozenViT(randomised(vit))


@pytest.fixture
def build(backbone: fp.FrozenViT) -> Build:
    """`build(method, seed=0, num_classes=5, readout="cls", ...)`: a model in eval mode."""

    def model_of(
        method: str, seed: int = 0, num_classes: int | None = 5, readout: str = "cls", **options: Any
    ) -> fp.PromptedViT:
        vit = options.pop("backbone", backbone)
        model = fp.PromptedViT(vit, METHODS[method], num_classes, readout=readout, **options)
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
