"""Accuracy and calibration under ImageNet-C's corruptions (Hendrycks and Dietterich, ICLR 2019)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.extras import needed
from fastprompt.model import class_names_of
from fastprompt.runs.uncertainty import Estimate, over_seeds_and_images
from fastprompt.train.evaluate import evaluate_classes

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen corruptions of ImageNet-C."""
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Robustness:
    """What corruptions do to one model.

    Attributes:
        clean: accuracy and expected calibration error (15 bins) of the images as they are.
        corrupted: (corruption, severity) -> the same of corrupted images.
        accuracy, ece: their means over all corruptions and severities.
        correct: (N,) share of its corrupted versions that each image is classified correctly in.
    """

    clean: tuple[float, float]
    corrupted: dict[tuple[str, int], tuple[float, float]]
    accuracy: float
    ece: float
    correct: np.ndarray


def corrupt(images: Tensor, corruption: str, severity: int, seed: int = 0) -> Tensor:
    """Corrupt raw images, each with randomness of its own that depends on (seed, corruption, severity, index) only.

    Args:
        images: (N, 3, H, W) uint8, at least 32 pixels a side, at the model's size, as ImageNet-C corrupts them.
        corruption: one of `CORRUPTIONS`.
        severity: 1 to 5.

    Raises:
        TypeError, ValueError: an argument is wrong.
        ImportError: the package imagecorruptions-imaug is not installed; it comes with the extra `robustness`.
    """
    with needed("robustness", "corrupted images"):
        import imagecorruptions

    if corruption not in CORRUPTIONS:
        raise ArgumentError("corruption", f"must be one of {', '.join(CORRUPTIONS)}, got {corruption!r}")
    if severity not in SEVERITIES:
        raise ArgumentError("severity", f"must be from 1 to 5, got {severity!r}")
    if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ArgumentTypeError("images", "must be raw pixels, uint8 (N, 3, H, W): corruptions are defined on those")
    if min(images.shape[2:]) < SMALLEST_SIDE:
        raise ArgumentError(
            "images", f"must have at least {SMALLEST_SIDE} pixels a side, got {tuple(images.shape[2:])}"
        )
    before = np.random.get_state()
    found = torch.empty_like(images)
    try:
        for index, image in enumerate(images):
            key = hashlib.sha256(f"{seed} {corruption} {severity} {index}".encode()).digest()
            np.random.seed(int.from_bytes(key[:4], "little"))
            pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            changed = imagecorruptions.corrupt(pixels, severity, corruption)
            found[index] = torch.from_numpy(np.ascontiguousarray(changed)).permute(2, 0, 1)
    finally:
        np.random.set_state(before)
    return found


def robustness(
    models: Mapping[str, PromptedViT],
    data: Any,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    max_images: int = 1000,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Robustness]:
    """Evaluate models on the same corrupted images.

    Args:
        models: name -> model with a head; all read images of one size. Include a probe to compare with
            (`robustness_difference`).
        data: a Dataset yielding (uint8 (3, H, W), label), without augmentation. Its class names, if it has any, are
            matched with the models', as `fastprompt.evaluate` does.
        corruptions, severities: which to apply; by default the fifteen of ImageNet-C at severities 1 to 5.
        max_images: number of images to use at most, the first ones.
        seed: of the corruptions.

    Raises:
        TypeError, ValueError: an argument is wrong. ImportError: see `corrupt`.
    """
    if not isinstance(models, Mapping) or not models:
        raise ArgumentTypeError("models", f"must be name -> model, at least one, got {models!r}")
    for name, values in (("corruptions", corruptions), ("severities", severities)):
        if isinstance(values, str) or not len(values) or len({*values}) < len(values):
            raise ArgumentError(name, f"must be different and at least one, got {values!r}")
    if isinstance(max_images, bool) or not isinstance(max_images, int) or max_images < 1:
        raise ArgumentError("max_images", f"must be a positive integer, got {max_images!r}")
    items = [data[i] for i in range(min(max_images, len(data)))]
    if len(items) < 2:
        raise ArgumentError("data", f"must have at least two images, got {len(items)}")
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    names = class_names_of(data)
    clean: dict[str, tuple[float, float]] = {}
    results: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
    correct: dict[str, list[np.ndarray]] = {}
    for corruption in corruptions:
        for severity in severities:
            changed = corrupt(images, corruption, severity, seed)
            for name, model in models.items():
                found = evaluate_classes(model, (changed, labels), batch_size, class_names=names)
                results.setdefault(name, {})[corruption, severity] = (found.accuracy, found.ece)
                correct.setdefault(name, []).append(found.correct.numpy())
    for name, model in models.items():
        found = evaluate_classes(model, (images, labels), batch_size, class_names=names)
        clean[name] = (found.accuracy, found.ece)
    return {
        name: Robustness(
            clean[name],
            results[name],
            float(np.mean([accuracy for accuracy, _ in results[name].values()])),
            float(np.mean([ece for _, ece in results[name].values()])),
            np.mean(correct[name], axis=0),
        )
        for name in models
    }


def robustness_difference(a: Robustness, b: Robustness) -> Estimate:
    """Return the accuracy of a minus that of b under the same corruptions, with an interval over images."""
    if list(a.corrupted) != list(b.corrupted) or len(a.correct) != len(b.correct):
        raise ArgumentError("b", "must be of the same images, corruptions and severities as a")
    return over_seeds_and_images((a.correct - b.correct)[None])
