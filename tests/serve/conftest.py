"""A tiny backbone on disk with two adapters, and pictures for it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import fastprompt as fp

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vit`, a ViT of 32 px in timm's folder format; adapters `birds` (VPT, 3 classes), `cars` (VAPT, 7 classes),
    `rgb` (RGB prompts of its own), `headless` and `stranger`, on another backbone.
    """
    root = tmp_path_factory.mktemp("serve")
    torch.manual_seed(0)
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES)
    pretrained = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "num_classes": 0}
    (root / "vit").mkdir()
    save_file(module.state_dict(), root / "vit" / "model.safetensors")
    (root / "vit" / "config.json").write_text(
        json.dumps(
            {
                "architecture": "vit_tiny_patch16_224",
                "model_args": SIZES,
                "pretrained_cfg": pretrained,
                "num_classes": 0,
            }
        )
    )
    backbone = fp.load_backbone(f"local-dir:{root / 'vit'}")
    other = fp.FrozenViT(timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **SIZES))
    rgb = fp.RGBPGNConfig(num_prompts=4, library_size=5, widths=(4, 8), placement="extend")
    for name, vit, config, classes in [
        ("birds", backbone, fp.VPTConfig(num_prompts=3), 3),
        ("cars", backbone, fp.VAPTConfig(num_prompts=2), 7),
        ("rgb", backbone, rgb, 4),
        ("headless", backbone, fp.VPTConfig(num_prompts=3), None),
        ("stranger", other, fp.VPTConfig(num_prompts=3), 3),
    ]:
        names = [f"{name}-{i}" for i in range(classes)] if name == "birds" else None
        model = fp.PromptedViT(vit, config, classes, class_names=names)
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                parameter.add_(0.5 * torch.randn(parameter.shape))
        model.save_pretrained(root / name)
    return root


@pytest.fixture(scope="session")
def picture() -> Callable[..., bytes]:
    """`picture(seed=0, height=32, width=32, format="PNG", mode="RGB")`: a file with a random picture."""

    def encode(
        seed: int = 0, height: int = 32, width: int = 32, format: str = "PNG", mode: str = "RGB", **options: Any
    ) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(stream, format, **options)
        return stream.getvalue()

    return encode
