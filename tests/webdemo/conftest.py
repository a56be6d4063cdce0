"""Models of every kind that the page shows in its own way, and pictures for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import fastprompt as fp


@pytest.fixture
def models(make_vit: Callable[..., VisionTransformer]) -> dict[str, fp.PromptedViT]:
    """A PGN of three classes with names that are markup, a pixel prompt and a VQT."""
    torch.manual_seed(0)
    backbone = fp.FrozenViT(make_vit())
    pgn = fp.PGNConfig(num_prompts=3, library_size=12, widths=(4, 8))
    names = ["<b>owl</b>", "robin", "wren"]
    return {
        "birds": fp.PromptedViT(backbone, pgn, num_classes=3, class_names=names).eval(),
        "border": fp.PromptedViT(backbone, fp.PixelPromptConfig(border=4), num_classes=2).eval(),
        "vqt": fp.PromptedViT(backbone, fp.VQTConfig(), num_classes=2).eval(),
    }


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [tmp_path / "owl.png", tmp_path / "<i>wide.png"]
    for path, (height, width) in zip(paths, ((40, 40), (30, 60)), strict=True):
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(path)
    return paths
