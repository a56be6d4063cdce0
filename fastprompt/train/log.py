"""Output of a training run: the rows of its log, its first line, the progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from fastprompt.kernels import native

_BETWEEN_STATES = ("resume", "diverged")
"""Events that are logged without writing a new state."""


def whole_log(in_state: Sequence[dict[str, Any]], in_file: Sequence[Any]) -> list[dict[str, Any]]:
    """Combine the log rows in the state with those in the log file.

    A process killed between writing the two leaves a file without the state's last rows. A run that was resumed or
    diverged after the last state has more rows in the file. Any other file is ignored.
    """
    rows = list(in_state)
    later = list(in_file[len(rows) :])
    if list(in_file[: len(rows)]) == rows and all(
        isinstance(row, dict) and row.get("event") in _BETWEEN_STATES for row in later
    ):
        return rows + later
    return rows


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the last bits of a result depend on: torch's version, device, threads and instruction sets."""
    found: dict[str, Any] = {"torch": torch.__version__, "device": device.type}
    if device.type == "cpu":
        found |= {
            "threads": torch.get_num_threads(),
            "cpu": torch.backends.cpu.get_cpu_capability(),
            "native": "none" if native.obstacle() else native.level(),
        }
    return found


def start_line(event: Mapping[str, Any], epochs: int, steps: int) -> str:
    """Describe a starting run in one line, from its "start" row and the number of epochs and steps per epoch."""
    counts = event["trained_parameters"]
    around = "int8 and " if event.get("recipe", {}).get("backbone") == "int8" else ""
    return (
        f"training {event['config']['kind']} on {event['device']} in {around}{event['backbone_dtype']}: "
        f"{event['num_train']:,} training and {event['num_val']:,} validation images, "
        f"{counts:,} trained parameters, {epochs} epochs of {steps} steps"
    )


def epoch_line(event: Mapping[str, Any], epochs: int, metric: str, best: bool) -> str:
    """Describe an epoch in one line, from its "epoch" row."""
    accuracy = f", accuracy {event['train_accuracy']:.3f}" if "train_accuracy" in event else ""
    return (
        f"epoch {event['epoch']}/{epochs}: loss {event['train_loss']:.4f}{accuracy}; validation loss "
        f"{event['val_loss']:.4f}, {metric} {event[f'val_{metric}']:.3f}{' (best)' if best else ''}; "
        f"lr {event['lr']:.3g}, {event['images_per_second']:.1f} images/s, {event['seconds']:.1f} s"
    )


def choices_line(choices: Mapping[str, str]) -> str | None:
    """Describe the implementations that a run chose by timing; None if there are none."""
    of_op: dict[str, set[str]] = {}
    for signature, name in choices.items():
        of_op.setdefault(signature.removeprefix("('").partition("'")[0], set()).add(name)
    if not of_op:
        return None
    said = ", ".join(f"{op} by {' and '.join(sorted(names))}" for op, names in sorted(of_op.items()))
    return f"chosen by timing and kept for this run: {said}"


@contextlib.contextmanager
def progress_bar(show: bool, total: int, initial: int) -> Iterator[Any]:
    """A tqdm bar over images, on stderr."""
    from tqdm import tqdm

    # Update a terminal ten times a second, a file or pipe every ten seconds.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=initial, unit="img", disable=not show, mininterval=interval, dynamic_ncols=True
    ) as bar:
        yield bar
