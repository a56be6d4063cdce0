"""What a run tells others: callbacks, and the experiment trackers that Accelerate knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.extras import needed
from fastprompt.train.directory import TRACKER_DIRECTORY

if TYPE_CHECKING:
    from fastprompt.train.result import FitResult

TRACKERS = ("tensorboard", "wandb", "trackio")
_TAKES = f"must hold Callback objects or names of trackers ({', '.join(TRACKERS)})"


@dataclass(frozen=True)
class Step:
    """One optimizer step, as callbacks see it.

    Attributes:
        epoch, step: counted from 1; `step` within the epoch.
        steps: steps in the epoch.
        lr: peak group's learning rate in this step.
        loss: training loss, and grad_norm: gradient norm before clipping. Both are 0-dimensional tensors on the
            model's device: on a GPU, reading one (`float(step.loss)`) waits for the step, so read them rarely.
    """

    epoch: int
    step: int
    steps: int
    lr: float
    loss: Tensor
    grad_norm: Tensor


class Callback:
    """Is told what happens in a run. Override the methods that you need.

    A callback must not change model or optimizer. A run that is resumed tells only what happens from then on. An
    exception ends the run, which can be resumed.
    """

    def on_start(self, start: Mapping[str, Any]) -> None:
        """Called before the first step, with the log's "start" row: recipe, configuration, sizes, device."""

    def on_step(self, step: Step) -> None:
        """Called after each optimizer step."""

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        """Called after each epoch's validation and commit, with the log's "epoch" row."""

    def on_end(self, result: FitResult) -> None:
        """Called with the result of a run that trained to its end."""


class Tracker(Callback):
    """Sends settings and epochs to TensorBoard, W&B or trackio, through Accelerate's tracker of that name.

    A resumed run may send an epoch again; the trackers take the later one.

    Args:
        name: one of `TRACKERS`.
        directory: TensorBoard writes into its folder `tensorboard`; None is the working directory.

    Raises:
        ValueError: there is no such tracker. ImportError: its package is missing; the message names the extra.
    """

    def __init__(self, name: str, directory: Path | None) -> None:
        if name not in TRACKERS:
            raise ArgumentError(
                "callbacks", f"must be Callback objects or names of {', '.join(TRACKERS)}, got {name!r}"
            )
        with needed(name, f"tracking by {name}"):
            import importlib

            importlib.import_module(name)
            from accelerate import PartialState
            from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        PartialState()  # Accelerate's trackers ask it which process they are in
        folder = Path() if directory is None else directory
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        where = {"logging_dir": folder} if kind.requires_logging_directory else {}
        self.tracker = kind(TRACKER_DIRECTORY if where else (folder.resolve().name or "fastprompt"), **where)

    def on_start(self, start: Mapping[str, Any]) -> None:
        """Open the tracker and store the settings."""
        self.tracker.start()
        settings = {**start["recipe"], "method": start["config"]["kind"], "device": start["device"]}
        plain = {
            name: value if isinstance(value, (bool, int, float)) else str(value) for name, value in settings.items()
        }
        self.tracker.store_init_configuration(plain)

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        """Send the numbers of an epoch."""
        numbers = {name: value for name, value in record.items() if isinstance(value, (int, float)) and name != "epoch"}
        self.tracker.log(numbers, step=record["epoch"])

    def on_end(self, result: FitResult) -> None:
        """Close the tracker."""
        self.tracker.finish()


def make_callbacks(callbacks: Sequence[Callback | str], directory: Path | None) -> list[Callback]:
    """Return callbacks, with a `Tracker` in place of each name.

    Raises:
        TypeError: an entry is neither a `Callback` nor a name.
    """
    if isinstance(callbacks, str) or not isinstance(callbacks, Sequence):
        raise ArgumentTypeError("callbacks", f"must be a list, got {type(callbacks).__name__} {callbacks!r}")
    found: list[Callback] = []
    for each in callbacks:
        if isinstance(each, str):
            found.append(Tracker(each, directory))
        elif isinstance(each, Callback):
            found.append(each)
        else:
            raise ArgumentTypeError("callbacks", f"{_TAKES}, got {type(each).__name__}")
    return found
