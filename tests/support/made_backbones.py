"""Backbones as files, small enough to train on in a test."""

from __future__ import annotations

import json
from pathlib import Path

import timm
from safetensors.torch import save_file

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def write_backbone(folder: Path, **sizes: int) -> str:
    """Write a random ViT in timm's own folder format; return the name that loads it."""
    sizes = {**SIZES, **sizes}
    module = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    folder.mkdir(parents=True)
    save_file(module.state_dict(), folder / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"
