"""A training run: what `fit` prepares, trains, commits and resumes."""

from __future__ import annotations

import copy
import json
import random
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.adapters import without_resampled
from fastprompt.arguments import ArgumentError
from fastprompt.files import atomic_write
from fastprompt.heads import LinearHead
from fastprompt.memory import peak_memory_mib, reset_peak_memory
from fastprompt.terminal import say
from fastprompt.train.batches import Batches, is_tensor_pair
from fastprompt.train.directory import BEST_DIRECTORY, RECIPE_FILE, RunDirectory
from fastprompt.train.evaluate import compute_dtype, device_of, evaluation_mode
from fastprompt.train.identity import (
    as_recorded_here,
    not_covered,
    require_same,
    run_identity,
    weights_digest,
)
from fastprompt.train.log import choices_line, environment, progress_bar, start_line, whole_log
from fastprompt.train.loop import Loop, TrainingDiverged
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.recipes import Recipe
from fastprompt.train.state import RunState, best_weights, holds, recorded_identity

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and JSON values of a state file."""


@dataclass
class FitResult:
    """The result of `fit`.

    Attributes:
        best_epoch: the epoch, counted from 1, that `recipe.select_by` selects: by default the one with the highest
            validation accuracy and, among equals, the lowest validation loss.
        best_val_accuracy, best_val_loss: of that epoch.
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


class Run:
    """A training run of `fit`, from its saved state or its start to its result."""

    def __init__(
        self,
        model: PromptedViT,
        train: Any,
        val: Any,
        recipe: Recipe,
        directory: RunDirectory | None,
        show_progress: bool,
        data: Mapping[str, Any],
        announced: bool,
    ) -> None:
        self.announced = announced
        self.model, self.recipe, self.directory, self.show_progress = model, recipe, directory, show_progress
        self.device = device_of(model)
        self.train_source, self.val_source = train, val
        assert model.head is not None
        self.num_classes = model.head.num_classes
        self.backbone_dtype = compute_dtype(recipe.dtype, self.device)
        optimizer = make_optimizer(model.trainable_parameters(), recipe)
        identity = run_identity(model, recipe, self.backbone_dtype, data)
        self.state = RunState(model, optimizer, identity, environment(self.device), measure=not recipe.deterministic)
        self.feature_seconds = 0.0
        head_only = model.generator is None and not model.full
        self.cached = head_only and _same_every_epoch(train) and _same_every_epoch(val)
        if directory is not None:
            for name in ("train", "val"):
                gap = not_covered(identity[name], name)
                if gap is not None:
                    warnings.warn(gap, stacklevel=4)

    def find_saved(self) -> Saved | None:
        """Return the saved state of this run, or None; raise `ValueError` if it belongs to another run."""
        saved = None if self.directory is None else self.directory.read_state()
        if saved is None or self.directory is None:
            return None
        tensors, values = saved
        # A model that already holds the result of the finished run may differ in its initial weights.
        holds_result = self.is_finished(saved) and weights_digest(best_weights(tensors)) == weights_digest(
            self.state.best
        )
        require_same(
            self.state.identity,
            as_recorded_here(recorded_identity(values), without_resampled(tensors)[1], self.model.backbone),
            self.directory.path,
            except_for=["initial_weights"] if holds_result else [],
        )
        if "identity" not in values:
            warnings.warn(
                f"{self.directory.path} holds a run of an earlier version, which recorded neither its images nor its "
                "initial weights, so these cannot be compared",
                stacklevel=4,
            )
        return saved

    @staticmethod
    def is_finished(saved: Saved) -> bool:
        """Whether the state is that of a finished run."""
        return bool(saved[1]["progress"]["events"][-1]["event"] == "end")

    def recall_choices(self, values: Mapping[str, Any]) -> None:
        """Take over the timing choices of the process that wrote the state."""
        assert self.directory is not None
        made = self.state.choices.made
        made |= values.get("choices", {})
        made |= self.directory.read_choices(values["run"]) if "run" in values else {}

    def prepare_data(self) -> None:
        """Prepare batches of images, or of features for a linear probe, after a trial forward."""
        train, val = self.train_source, self.val_source
        for name, data in (("train", train), ("val", val)):
            images, _ = next(
                iter(Batches(data, 2, name=name, num_classes=self.num_classes, device=self.device).epoch())
            )
            with evaluation_mode(self.model):
                self.model(images[:2])
        self._check_single_images()
        if self.cached:
            from fastprompt.train.probe import extract_features

            began = time.perf_counter()
            train = extract_features(self.model, train, self.recipe.batch_size, num_workers=self.recipe.num_workers)
            val = extract_features(self.model, val, self.recipe.batch_size, num_workers=self.recipe.num_workers)
            self.feature_seconds = time.perf_counter() - began
        self.train = Batches(
            train,
            self.recipe.batch_size,
            name="train",
            num_classes=self.num_classes,
            device=self.device,
            seed=self.recipe.seed,
            merge_single=True,
            num_workers=self.recipe.num_workers,
        )
        self.val = Batches(
            val,
            max(64, self.recipe.batch_size),
            name="val",
            num_classes=self.num_classes,
            device=self.device,
            num_workers=self.recipe.num_workers,
        )
        self.loop = Loop(self.model, self.state.optimizer, self.recipe, self.train, self.val, self.cached)

    def _check_single_images(self) -> None:
        """Raise an error if there are batches of one image and the generator's batch norm cannot process them."""
        generator, train = self.model.generator, self.train_source
        size = train.batch_size if isinstance(train, DataLoader) else self.recipe.batch_size
        first = Batches(train, 1, name="train", num_classes=self.num_classes, device=self.device)
        if generator is None or generator.known_at != "image" or 1 not in (size, first.num_images):
            return
        images, _ = next(iter(first.epoch()))
        try:
            copy.deepcopy(generator).train()(self.model.backbone.normalise(images[:1]).float())
        except ValueError as error:
            raise ArgumentError(
                "batch_size",
                f"must be at least 2 and train must hold at least 2 images for {self.model.config.kind!r} "
                f"here, got {size} and {first.num_images}: its batch norm cannot process a single image ({error})",
            ) from error

    def start(self, files: Mapping[str, str]) -> None:
        """Start a new run: seed, initialise the head, and save a state so that the first epoch can be resumed."""
        seed = self.recipe.seed
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        assert self.model.head is not None
        if self.recipe.head_init == "probe" and self.model.head.kind == "linear":
            from fastprompt.train.probe import extract_features, fit_linear_probe

            pairs = [
                extract_features(self.model, data, self.recipe.batch_size, num_workers=self.recipe.num_workers)
                for data in (self.train_source, self.val_source)
            ]
            fit_linear_probe(self.model, pairs[0], pairs[1])
            self.state.best = self.state.weights()
        if self.recipe.head_init == "vpt" and isinstance(self.model.head, LinearHead):
            self.model.head.reset()
            self.state.best = self.state.weights()
        progress = self.state.progress
        progress.seconds = progress.train_seconds = self.feature_seconds
        progress.events = [
            {
                "event": "start",
                "recipe": self.recipe.to_dict(),
                "config": self.state.identity["config"],
                "num_train": self.train.num_images,
                "num_val": self.val.num_images,
                "trained_parameters": self.model.num_trainable()["total"],
                "device": str(self.device),
                "backbone_dtype": str(self.backbone_dtype).removeprefix("torch."),
                "torch": torch.__version__,
                "environment": self.state.environment,
                "seed": seed,
            }
        ]
        if self.directory is not None:
            self.directory.begin(files)
            self.commit()
            self._keep_new_choices(self.directory)
        self._say_start()

    def go_on(self, saved: Saved) -> None:
        """Resume from the saved state."""
        assert self.directory is not None
        tensors, values = saved
        self.state.restore(tensors, values)
        changed = {
            name: (value, values["environment"].get(name))
            for name, value in self.state.environment.items()
            if "environment" in values and value != values["environment"].get(name)
        }
        if changed:
            said = ", ".join(f"{name} is {new}, was {old}" for name, (new, old) in changed.items())
            warnings.warn(
                f"{self.directory.path} is resumed in another environment, so last bits may differ: {said}",
                stacklevel=4,
            )
        progress = self.state.progress
        progress.events = whole_log(progress.events, self.directory.read_log())
        progress.events.append({"event": "resume", "epoch": progress.epoch, "environment": self.state.environment})
        self._make_up(tensors)
        self._keep_new_choices(self.directory)
        self._say_start()
        self._say(f"resuming after epoch {progress.epoch} of {self.recipe.epochs}")

    def _make_up(self, tensors: Mapping[str, Tensor]) -> None:
        """Rebuild the files that follow from the state if they are lost or do not match it."""
        assert self.directory is not None
        path, progress = self.directory.path, self.state.progress
        recipe = json.dumps(self.recipe.to_dict(), indent=2) + "\n"
        if not (path / RECIPE_FILE).exists() or (path / RECIPE_FILE).read_text() != recipe:
            atomic_write(path / RECIPE_FILE, recipe)
        if self.directory.read_log() != progress.events:
            self.directory.write_log(progress.events)
        if progress.best_epoch and not holds(path / BEST_DIRECTORY, best_weights(tensors)):
            now = self.state.weights()
            self.model.load_adapter_state_dict(self.state.best)
            self.directory.write_best(self.model)
            self.model.load_adapter_state_dict(now)

    def _keep_new_choices(self, directory: RunDirectory) -> None:
        """From now on, save every timing choice before it takes effect."""
        choices = self.state.choices
        choices.on_choice = lambda: directory.write_choices(self.state.name, choices.made)

    def _say_start(self) -> None:
        if not self.announced:
            self._say(start_line(self.state.progress.events[0]))
        chosen = choices_line(self.state.choices.made)
        if chosen is not None:
            self._say(chosen)

    def _say(self, line: str) -> None:
        if self.show_progress:
            say(line, sys.stderr)

    def train_to_the_end(self) -> None:
        """Train the remaining epochs, then record the event that marks the run as finished."""
        recipe, progress = self.recipe, self.state.progress
        total, done = (epochs * self.train.num_images for epochs in (recipe.epochs, progress.epoch))
        reset_peak_memory(self.device)
        with progress_bar(self.show_progress, total, done) as bar:
            try:
                while progress.epoch < recipe.epochs:
                    self.one_epoch(progress.epoch + 1, bar)
            except TrainingDiverged as error:
                progress.events.append(
                    {
                        "event": "diverged",
                        "epoch": error.epoch,
                        "step": error.step,
                        "lr": error.lr,
                        "message": str(error),
                    }
                )
                if self.directory is not None:
                    self.directory.write_log(progress.events)
                self.model.load_adapter_state_dict(self.state.best)
                raise
        progress.events.append(
            {
                "event": "end",
                "best_epoch": progress.best_epoch,
                "best_val_accuracy": progress.best_val_accuracy,
                "best_val_loss": progress.best_val_loss,
                "images_per_second": progress.train_images / progress.train_seconds,
                "seconds": progress.seconds,
                "peak_memory_mib": peak_memory_mib(self.device),
            }
        )
        self.commit()

    def one_epoch(self, epoch: int, bar: Any) -> None:
        """Train and validate for one epoch, then commit the result."""
        progress = self.state.progress
        began = time.perf_counter()
        said = f" val {progress.best_val_accuracy:.3f} (best)" if progress.epoch else ""
        record = self.loop.train(epoch, bar, said)
        trained = time.perf_counter() - began
        val_loss, val_accuracy = self.loop.validate(epoch)
        now, best = (val_accuracy, -val_loss), (progress.best_val_accuracy, -progress.best_val_loss)
        improved = now[::-1] > best[::-1] if self.recipe.select_by == "loss" else now > best
        improved = improved or self.recipe.select_by == "last"
        if improved:
            progress.best_epoch, progress.best_val_accuracy, progress.best_val_loss = epoch, val_accuracy, val_loss
            self.state.best = self.state.weights()
        progress.epoch = epoch
        progress.train_images += self.train.num_images
        progress.train_seconds += trained
        seconds = time.perf_counter() - began
        progress.seconds += seconds
        progress.events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                **record,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "images_per_second": self.train.num_images / trained,
                "seconds": seconds,
            }
        )
        bar.set_postfix_str(bar.postfix.rsplit(" val ", 1)[0] + f" val {val_accuracy:.3f}" if bar.postfix else "")
        self.commit()
        if improved and self.directory is not None:
            self.directory.write_best(self.model)

    def commit(self) -> None:
        """Write the state, then the files that follow from it."""
        if self.directory is not None:
            self.directory.commit(*self.state.saved())
            self.directory.write_log(self.state.progress.events)

    def result(self, saved: Saved | None = None) -> FitResult:
        """Load the best weights into the model and return the finished run's result.

        Args:
            saved: the state of a run that an earlier call finished.
        """
        state = self.state
        if saved is not None:
            state.restore(*saved)
            try:
                self._make_up(saved[0])
            except OSError as error:
                assert self.directory is not None
                warnings.warn(
                    f"{self.directory.path} holds a finished run with an incomplete log or best/, which could not be "
                    f"rebuilt: {error}",
                    stacklevel=4,
                )
        self.model.load_adapter_state_dict(state.best)
        self.model.eval()
        progress = state.progress
        end = progress.events[-1]
        return FitResult(
            best_epoch=progress.best_epoch,
            best_val_accuracy=progress.best_val_accuracy,
            best_val_loss=progress.best_val_loss,
            history=[event for event in progress.events if event["event"] == "epoch"],
            images_per_second=end["images_per_second"],
            peak_memory_mib=end["peak_memory_mib"],
            seconds=progress.seconds,
            out_dir=None if self.directory is None else self.directory.path,
        )


def _same_every_epoch(data: Any) -> bool:
    """Whether the data are known to yield the same images in every epoch (no augmentation)."""
    if is_tensor_pair(data) or isinstance(data, TensorDataset):
        return True
    return not isinstance(data, DataLoader) and getattr(data, "augment", "unknown") in ("none", None, False)
