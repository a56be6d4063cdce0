"""Load several adapters, each on its own backbone; adapters of one backbone share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from fastprompt.adapters import read_adapter, source_of
from fastprompt.arguments import ArgumentError
from fastprompt.model import PromptedViT
from fastprompt.runs.directory import adapter_dir, read_settings
from fastprompt.runs.execute import backbone_at
from fastprompt.vit import FrozenViT


def load_models(
    adapters: Mapping[str, Path], backbone: str | None = None, device: torch.device | str = "cpu"
) -> dict[str, PromptedViT]:
    """Load adapters in eval mode.

    Args:
        adapters: directories of adapters or runs, or repositories of the Hub as "owner/name", by the name to show.
        backbone: a name that `fp.load_backbone` knows, for all adapters; None: the one that each records.

    Raises:
        ValueError, FileNotFoundError: an adapter is missing or damaged, belongs to another backbone, does not name its
            backbone, or has no head. The error names it. FetchError: a file cannot be fetched.
    """
    shared: dict[tuple[str, int], FrozenViT] = {}
    models = {}
    for name, path in adapters.items():
        directory, settings = adapter_dir(path), read_settings(path)
        config, _ = read_adapter(directory)
        source = source_of(config)
        wanted = backbone or (settings.backbone if settings else None) or (source.backbone_name if source else None)
        if wanted is None:
            raise ArgumentError("backbone", f"is required: the adapter {name!r} does not name its backbone")
        key = wanted, int(config["backbone"]["image_size"][0])
        if key not in shared:
            shared[key] = backbone_at(*key).to(device)
        models[name] = PromptedViT.from_pretrained(shared[key], directory).to(device)
        if models[name].head is None:
            raise ArgumentError("adapters", f"must have classes, {name!r} has no head")
    return models
