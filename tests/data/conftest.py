"""Images and folders of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def photo() -> Callable[..., Image.Image]:
    """photo(width, height, seed): smooth colours with a little noise."""

    def build(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
        return Image.fromarray((smooth + random.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8))

    return build


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(image, format, **options): the bytes of an image file."""

    def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def fill(photo: Callable[..., Image.Image]) -> Callable[..., Path]:
    """fill(folder, number, suffix): that many different images in a folder, which is returned."""

    def write(folder: Path, number: int = 3, suffix: str = "png") -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(number):
            photo(16, 12, seed=hash((str(folder), i)) % 2**32).save(folder / f"{i}.{suffix}")
        return folder

    return write
