"""Train through int8: the blocks of a model's own backbone run in int8 for a while."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.int8.linear import LINEARS, linear_of
from fastprompt.int8.weights import CALIBRATION_IMAGES, LEAST_IMAGES, Int8Weights, cached, find_weights
from fastprompt.vit.frozen import FrozenViT


def calibrated(backbone: FrozenViT, batches: Iterable[Tensor]) -> Int8Weights:
    """Return the backbone's weights in the user cache; if there are none, calibrate them and keep them there.

    Args:
        batches: images like those that the backbone will see, (N, C, H, W) each; only as many as are needed are read.

    Raises:
        TypeError, ValueError: `find_weights` says why they cannot run, or there are too few images.
    """
    if not cached(backbone.fingerprint).is_file():
        images: list[Tensor] = []
        for batch in batches:
            images += batch
            if len(images) >= CALIBRATION_IMAGES:
                break
        if len(images) < LEAST_IMAGES:
            raise ArgumentError("int8", f"needs at least {LEAST_IMAGES} images to calibrate, got {len(images)}")
        Int8Weights.calibrate(backbone, torch.stack(images[:CALIBRATION_IMAGES])).save()
    return find_weights(backbone, None)


@contextlib.contextmanager
def running_in_int8(backbone: FrozenViT, weights: Int8Weights) -> Iterator[None]:
    """Context in which the backbone's blocks run in int8, forward and backward.

    Meanwhile its own weights of these Linears lie in a deleted file that is mapped into memory, so they take memory
    only where something reads them. They are back, bit for bit, at the end.

    Raises:
        TypeError, ValueError, RuntimeError: the weights cannot run (`find_weights`).
    """
    find_weights(backbone, weights)
    private, copies = backbone.private, backbone.copies
    backbone.set_copies("folded")
    backbone.folded()
    backbone.private = True  # it keeps these folded blocks
    try:
        weights.put_into(backbone, serving=False)
        with _weights_in_a_file(backbone):
            yield
    finally:
        backbone.private, backbone.copies = private, copies
        backbone.refold()


@contextlib.contextmanager
def _weights_in_a_file(backbone: FrozenViT) -> Iterator[None]:
    parameters = [linear_of(block, name).weight for block in backbone.blocks for name in LINEARS]
    with tempfile.TemporaryDirectory(prefix="fastprompt-") as folder:
        path = Path(folder) / "weights.pt"
        torch.save([p.data for p in parameters], path)
        mapped = torch.load(path, mmap=True, weights_only=True)
    for p, tensor in zip(parameters, mapped, strict=True):
        p.data = tensor
    try:
        yield
    finally:
        for p, tensor in zip(parameters, mapped, strict=True):
            p.data = tensor.clone()
