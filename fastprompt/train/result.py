"""What `fit` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class FitResult:
    """The result of `fit`.

    Attributes:
        best_epoch: the epoch, counted from 1, that `recipe.select_by` selects: by default the one with the highest
            validation accuracy and, among equals, the lowest validation loss.
        best_val_accuracy, best_val_loss: of that epoch. For several labels per image, the accuracy is the mean
            average precision; for a regression, R².
        history: one dict per epoch, as in the log.
        images_per_second: training images over training time (validation and saving excluded).
        peak_memory_mib: highest allocation on CUDA; highest resident size of the process while fitting on the CPU.
        seconds: wall time of all epochs, including those of interrupted runs.
        out_dir: directory of log and checkpoints, or None.
    """

    best_epoch: int
    best_val_accuracy: float
    history: list[dict[str, Any]]
    images_per_second: float
    peak_memory_mib: float
    seconds: float
    out_dir: Path | None
    best_val_loss: float = float("nan")
