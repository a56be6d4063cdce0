"""A backbone and images small enough to train on in a test."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture
def tiny_run(tmp_path: Path) -> list[str]:
    """The flags for a two-block ViT and 30 images, dark and light, both in tmp_path."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    (tmp_path / "vit").mkdir()
    save_file(model.state_dict(), tmp_path / "vit" / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(15):
            Image.fromarray(random.integers(low, low + 127, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return ["--backbone", f"local-dir:{tmp_path / 'vit'}", "--image-size", "32", "--data", str(tmp_path / "images")]
