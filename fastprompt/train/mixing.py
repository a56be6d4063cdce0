"""What a recipe does to a batch of training images: timm's mixup, cutmix and random erasing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastprompt.train.recipes import Recipe
from fastprompt.train.tasks import one_hot


class Mixing:
    """Mixes and erases a batch: images, labels → images, targets.

    The draws come from the global generators of NumPy, Python and torch, as in timm.

    Args:
        num_classes: C of the targets (B, C) that mixed images get.
        normalise: function from images of any kind to normalised floating-point images.
        device: device of the images.
    """

    def __init__(
        self, recipe: Recipe, num_classes: int, normalise: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.num_classes, self.normalise = num_classes, normalise
        self.mixup: Any = None
        self.erasing: Any = None
        if recipe.mixup or recipe.cutmix:
            from timm.data import Mixup

            # The loss smooths the labels, so timm does not.
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=0.0, num_classes=num_classes)
        if recipe.random_erasing:
            from timm.data.random_erasing import RandomErasing

            self.erasing = RandomErasing(recipe.random_erasing, mode="pixel", device=device)

    @property
    def active(self) -> bool:
        """Whether anything is done."""
        return self.mixup is not None or self.erasing is not None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return new images, normalised, and the labels (B,), or (B, C) probabilities if images are mixed."""
        if not self.active:
            return images, labels
        images = self.normalise(images).clone(memory_format=torch.contiguous_format)
        if self.mixup is not None:
            even = len(images) // 2 * 2
            targets = one_hot(labels, self.num_classes)
            if even:
                images[:even], targets[:even] = self.mixup(images[:even], labels[:even])
            labels = targets
        if self.erasing is not None:
            images = self.erasing(images)
        return images, labels
