"""Augmentations of training images, from torchvision and timm, reproducible for each image."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastprompt.arguments import ArgumentError

AUGMENTS = ("none", "flip", "crop", "pgn")
TIMMS = ("rand-", "augmix-")
"""How names of timm's augmentations begin."""
Augment = Callable[[torch.Tensor], torch.Tensor]


class TimmAugment(torch.nn.Module):
    """timm's RandAugment (Cubuk et al. 2020) or AugMix (Hendrycks et al. 2020): uint8 (3, H, W) -> uint8 (3, H, W).

    timm draws from the generators of NumPy and Python. They are seeded from torch's and restored.

    Args:
        name: in timm's notation, such as "rand-m9-mstd0.5-inc1" or "augmix-m5-w4-d2".

    Raises:
        ValueError: timm does not take the name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        from timm.data.auto_augment import augment_and_mix_transform, rand_augment_transform

        self.name = name
        make = rand_augment_transform if name.startswith("rand-") else augment_and_mix_transform
        try:
            self.transform: Any = make(name, {})
        except (AssertionError, ValueError, KeyError, IndexError) as error:
            raise ArgumentError("augment", f"must be in timm's notation, got {name!r} ({error})") from error

    def extra_repr(self) -> str:
        return self.name

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        seed = int(torch.randint(2**32, ()))
        before = random.getstate(), np.random.get_state()
        random.seed(seed)
        np.random.seed(seed)
        try:
            return F.pil_to_tensor(self.transform(F.to_pil_image(image)))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


def make_augment(kind: str | Augment, size: tuple[int, int]) -> Augment | None:
    """Return an augmentation uint8 (3, H, W) -> uint8 (3, H, W), or None for "none".

    It draws from torch's global CPU generator. Names joined by "+" are applied in turn: "crop+rand-m9-mstd0.5".

    "flip"  left-right with probability 0.5.
    "crop"  pad by an eighth of the side (reflected), random crop back to size, flip.
    "pgn"   PGN's training recipe: RandomResizedCrop at scale 1, ColorJitter(0.4, 0.4, 0.4, 0.4) with probability 0.8,
            grey 0.2, solarize 0.2, flip. The crop leaves square images unchanged; images that are read for it are
            squashed from their `widest_part`.
    "rand-...", "augmix-..."  timm's RandAugment and AugMix, in its notation ("rand-m9-mstd0.5-inc1"), on the image as
            resized.
    A callable is returned unchanged.

    Raises:
        ValueError: there is no augmentation of that name.
    """
    if callable(kind):
        return kind
    if isinstance(kind, str) and "+" in kind:
        parts = [make_augment(part, size) for part in kind.split("+")]
        return v2.Compose([part for part in parts if part is not None])
    if isinstance(kind, str) and kind.startswith(TIMMS):
        return TimmAugment(kind)
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
    raise ArgumentError(
        "augment",
        f"must be one of {', '.join(map(repr, AUGMENTS))}, 'rand-...' or 'augmix-...' in timm's notation, several "
        f"joined by '+', or a callable, got {kind!r}",
    )


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
