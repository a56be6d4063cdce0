"""Augmentations of training images, from torchvision, reproducible for each image."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastprompt.arguments import ArgumentError

AUGMENTS = ("none", "flip", "crop", "pgn")
Augment = Callable[[torch.Tensor], torch.Tensor]


def make_augment(kind: str | Augment, size: tuple[int, int]) -> Augment | None:
    """Return an augmentation uint8 (3, H, W) -> uint8 (3, H, W), or None for "none".

    It draws from torch's global CPU generator.

    "flip"  left-right with probability 0.5.
    "crop"  pad by an eighth of the side (reflected), random crop back to size, flip.
    "pgn"   PGN's training recipe: RandomResizedCrop at scale 1, ColorJitter(0.4, 0.4, 0.4, 0.4) with probability 0.8,
            grey 0.2, solarize 0.2, flip. The crop leaves square images unchanged; images that are read for it are
            squashed from their `widest_part`.
    A callable is returned unchanged.
    """
    if callable(kind):
        return kind
    flip = v2.RandomHorizontalFlip()
    if kind == "none":
        return None
    if kind == "flip":
        return flip
    if kind == "crop":
        padding = [max(1, size[1] // 8), max(1, size[0] // 8)]
        return v2.Compose([v2.RandomCrop(size, padding=padding, padding_mode="reflect"), flip])
    if kind == "pgn":
        return v2.Compose(
            [
                v2.RandomResizedCrop(
                    size, scale=(1.0, 1.0), interpolation=v2.InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.4)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomSolarize(threshold=128, p=0.2),
                flip,
            ]
        )
    raise ArgumentError("augment", f"must be one of {', '.join(map(repr, AUGMENTS))} or a callable, got {kind!r}")


def widest_part(image: Image.Image | torch.Tensor) -> Image.Image | torch.Tensor:
    """Crop an image centrally to the largest part with an aspect ratio from 3/4 to 4/3; usually the whole image.

    torchvision's RandomResizedCrop takes the same part at scale 1, except that it is sometimes off by one line of
    pixels on images that are not square.
    """
    height, width = F.get_size(image)
    wide, high = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return F.crop(image, (height - high) // 2, (width - wide) // 2, high, wide)


def apply_seeded(augment: Augment, image: torch.Tensor, seed: int, epoch: int, index: int) -> torch.Tensor:
    """Return `augment(image)` with randomness that depends on (seed, epoch, index) only.

    The state of torch's CPU generator is restored afterwards.
    """
    key = hashlib.sha256(f"{seed} {epoch} {index}".encode()).digest()
    generator = torch.default_generator
    state = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(key[:8], "little"))
        return augment(image)
    finally:
        generator.set_state(state)
