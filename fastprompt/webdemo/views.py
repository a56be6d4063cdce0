"""What a model makes of one picture: classes, maps of its prompts, tokens of its library."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastprompt.adapters import Preprocessing
from fastprompt.analysis.library import has_library
from fastprompt.data.images import to_tensor
from fastprompt.model import PromptedViT

MOST_CLASSES, MOST_TOKENS = 5, 8
HEAT = (213, 94, 0)
"""Colour of a map's largest value: Okabe and Ito's vermilion."""
SHOWN = 224
"""Least side of a map's picture in pixels."""


@dataclass(frozen=True)
class View:
    """What is shown of one picture.

    Attributes:
        classes: the likeliest classes and their probabilities; of an adapter with a head for each domain, by domain.
        maps: caption and picture.
        tokens: the library's most used tokens and their shares of the prompts; empty without a library.
    """

    classes: dict[str, list[tuple[str, float]]]
    maps: list[tuple[str, Image.Image]] = field(default_factory=list)
    tokens: list[tuple[int, float]] = field(default_factory=list)


def view(model: PromptedViT, picture: Image.Image) -> View:
    """Classify an RGB picture, preprocessed as in training, and show how its prompts act.

    Raises:
        ValueError: the picture is too elongated for the backbone, or the model's outputs are not finite.
    """
    resize = (model.preprocessing or Preprocessing()).resize
    pixels = to_tensor(picture, model.backbone.image_size, resize)[None].to(model.backbone.device)
    with torch.inference_mode():
        logits = model(pixels).float().cpu()
        model.check_outputs(pixels, logits)
        return View(likeliest(model, logits), prompt_maps(model, pixels), library_tokens(model, pixels))


def likeliest(model: PromptedViT, logits: Tensor) -> dict[str, list[tuple[str, float]]]:
    """Name the likeliest classes of logits (1, C), for each domain that has a head of its own."""
    names = list(model.class_names or map(str, range(logits.shape[1])))
    domains = model.domains
    parts = {"": logits}
    if domains is not None and domains.labels == "per-domain":
        parts = {name: domains.only(logits, name) for name in domains.names}
    found = {}
    for part, values in parts.items():
        probabilities = values[0].double().softmax(-1)
        best = probabilities.topk(min(MOST_CLASSES, int(values[0].isfinite().sum())))
        found[part] = [(names[i], float(p)) for p, i in zip(best.values, best.indices.tolist(), strict=True)]
    return found


def library_tokens(model: PromptedViT, pixels: Tensor) -> list[tuple[int, float]]:
    """Return the tokens that make up most of the picture's prompts, each with its share; [] without a library."""
    generator: Any = model.generator
    if not has_library(model):
        return []
    weights = generator.mixture(model.backbone.normalise(pixels).float())[0].double()  # (K, M)
    shares = (weights / weights.sum(-1, keepdim=True)).mean(0)
    best = shares.topk(min(MOST_TOKENS, len(shares)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def prompt_maps(model: PromptedViT, pixels: Tensor) -> list[tuple[str, Image.Image]]:
    """Draw where the prompts act on one picture (1, 3, H, W), uint8.

    A method that changes the image has the changed picture. Otherwise the maps are how much the patches of the first,
    the middle and the last block that computes them attend to the prompts, and how much the class token attends to the
    patches in the last block: means over heads, relative to the largest. [] where attention runs in windows, or the
    prompts are no tokens of the sequence.
    """
    generator: Any = model.generator
    picture = pixels[0].permute(1, 2, 0).cpu().numpy()
    if generator is not None and generator.changes_images:
        changed = generator.prompt_images(model.backbone.normalise(pixels).float())
        return [("what the frozen model sees", Image.fromarray(_pixels_of(model, changed)))]
    sequence = generator is None or generator.role == "sequence"
    if model.backbone.graph.maps is None or not sequence:
        return []
    attention = model.attention_maps(pixels)
    grid = model.backbone.spec.grid
    reading = [i for i, a in enumerate(attention) if "patches" in a.queries and "prompts" in a.keys]
    drawn = []
    for i in sorted({reading[0], reading[len(reading) // 2], reading[-1]} if reading else ()):
        to_prompts = attention[i].between("patches", "prompts")[0].sum(-1).mean(0)  # (N,)
        drawn.append((f"block {i}: patches that read the prompts", heat(picture, to_prompts.reshape(grid))))
    last = attention[-1]
    if "cls" in last.queries and "patches" in last.keys:
        of_class = last.between("cls", "patches")[0, :, 0].mean(0)
        drawn.append((f"block {len(attention) - 1}: what the class token reads", heat(picture, of_class.reshape(grid))))
    return drawn


def _pixels_of(model: PromptedViT, images: Tensor) -> np.ndarray:
    """Return normalised images (1, 3, H, W) as uint8 (H, W, 3)."""
    mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (model.backbone.mean, model.backbone.std))
    return ((images[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()


def heat(picture: np.ndarray, values: Tensor) -> Image.Image:
    """Lay values (rows, columns) from 0 over a picture (H, W, 3), uint8, in grey; the largest is all colour."""
    height, width = picture.shape[:2]
    scale = max(1.0, SHOWN / min(height, width))
    size = round(width * scale), round(height * scale)
    grey = Image.fromarray(picture).convert("L").convert("RGB").resize(size, Image.Resampling.BICUBIC)
    shares = (values.float() / values.max().clamp_min(1e-12)).cpu().numpy()
    mask = Image.fromarray((217 * shares).round().astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", size, HEAT), grey, mask)
