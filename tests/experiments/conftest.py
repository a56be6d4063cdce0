"""A backbone and images small enough to train on in a test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from made_backbones import write_backbone
from PIL import Image


@pytest.fixture
def tiny_run(tmp_path: Path) -> list[str]:
    """The flags for a two-block ViT and 30 images, dark and light, both in tmp_path."""
    torch.manual_seed(0)
    backbone = write_backbone(tmp_path / "vit")
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(15):
            Image.fromarray(random.integers(low, low + 127, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return ["--backbone", backbone, "--image-size", "32", "--data", str(tmp_path / "images")]
