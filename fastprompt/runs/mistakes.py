"""The images that a model gets most surely wrong, with their pictures."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

if TYPE_CHECKING:
    from fastprompt.train.evaluate import Evaluation

WORST = 12
SIDE = 96
"""Longest side of a kept picture, in pixels."""


def worst_mistakes(evaluation: Evaluation, images: Any) -> list[dict[str, Any]]:
    """Return the mistakes with the highest probabilities, up to `WORST`, the worst first, as JSON values.

    Each has "index" in the split, "label" and "predicted" class, "probability" of the latter, "file" (None for images
    without a file of their own) and "picture": a PNG in base64 of what the model saw, at most `SIDE` pixels wide and
    high; None for images that are neither grey nor RGB.

    Args:
        images: the data set that was evaluated; item i is the uint8 image (C, H, W) and the label of row i, and
            `file_of(i)` its file.
    """
    predictions = evaluation.predictions
    sure = evaluation.probabilities.gather(1, predictions[:, None])[:, 0].masked_fill(evaluation.correct, -1.0)
    order = torch.argsort(sure, descending=True, stable=True)[: min(WORST, int((~evaluation.correct).sum()))]
    return [
        {
            "index": i,
            "label": int(evaluation.labels[i]),
            "predicted": int(predictions[i]),
            "probability": float(sure[i]),
            "file": images.file_of(i),
            "picture": _picture(images[i][0]),
        }
        for i in order.tolist()
    ]


def _picture(pixels: Any) -> str | None:
    """Return an image (C, H, W) as a PNG in base64."""
    if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8 or pixels.shape[0] not in (1, 3):
        return None
    array = pixels.permute(1, 2, 0).squeeze(2).cpu().numpy()
    picture, buffer = Image.fromarray(array), io.BytesIO()
    picture.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")
