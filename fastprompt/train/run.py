"""A training run: what `fit` prepares, trains, commits and resumes."""

from __future__ import annotations

import copy
import json
import random
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastprompt.adapters import without_resampled
from fastprompt.files import atomic_write
from fastprompt.heads import LinearHead
from fastprompt.memory import peak_memory_mib, reset_peak_memory
from fastprompt.terminal import say
from fastprompt.train.callbacks import Callback, Step
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.directory import BEST_DIRECTORY, RECIPE_FILE, RunDirectory
from fastprompt.train.evaluate import compute_dtype, device_of
from fastprompt.train.identity import (
    as_recorded_here,
    not_covered,
    require_same,
    run_identity,
    weights_digest,
)
from fastprompt.train.log import choices_line, environment, epoch_line, progress_bar, start_line, whole_log
from fastprompt.train.loop import Loop, Totals, TrainingDiverged
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.prompt_init import prompts_from_data
from fastprompt.train.ranks import Ranks
from fastprompt.train.recipes import Recipe, checkpoint_interval
from fastprompt.train.result import FitResult
from fastprompt.train.sources import RunData
from fastprompt.train.state import Progress, RunState, best_weights, holds, recorded_identity
from fastprompt.train.termination import Terminated, polling, requested
from fastprompt.vit import linear

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

Saved = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors and JSON values of a state file."""
LENGTH_FIELDS = ("epochs", "min_steps", "warmup_epochs", "kl_warmup_epochs", "patience")
"""Fields of the recipe that may differ if a finished run goes on for more epochs."""
EXTEND_HINT = ". To go on with it for more epochs, pass extend=True (--extend)"


@dataclass(frozen=True)
class Options:
    """What `fit` takes that changes neither recipe nor data; see there.

    compare_probe: None compares where that costs little (`fastprompt.train.probe.is_worth_comparing`).
    """

    extend: bool = False
    compare_probe: bool | None = False
    callbacks: Sequence[Callback | str] = ()
    cache_dir: Path | None = None


def checkpoint_due(recipe: Recipe, steps: int, last: float) -> bool:
    """Whether it is time for a checkpoint, after `steps` of the epoch, the `last` one being at that time."""
    number, unit = checkpoint_interval(recipe.checkpoint_every)
    return steps % number == 0 if unit == "steps" else monotonic() - last > 60 * number


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
        identities: Mapping[str, Any],
        announced: bool,
        callbacks: Sequence[Callback],
        options: Options,
        ranks: Ranks,
    ) -> None:
        self.ranks = ranks
        show_progress = show_progress and ranks.main
        self.announced, self.callbacks = announced, callbacks
        self.extend, self.compare_probe, self.cache_dir = options.extend, options.compare_probe, options.cache_dir
        self.model, self.recipe, self.directory, self.show_progress = model, recipe, directory, show_progress
        self.device = device_of(model)
        self.data = RunData(model, train, val, recipe, ranks)
        self.backbone_dtype = compute_dtype(recipe.computes_in, self.device)
        optimizer = make_optimizer(model.trainable_parameters(), recipe)
        identity = run_identity(model, recipe, self.backbone_dtype, identities)
        # on a CPU a resumed run ends in the same bits, but only the first process's choices are saved
        measure = not recipe.deterministic and (ranks.size == 1 or self.device.type != "cpu")
        self.state = RunState(model, optimizer, identity, environment(self.device), measure)
        self.last_commit = monotonic()
        self.good: Saved | None = None
        if directory is not None:
            for name in ("train", "val"):
                gap = not_covered(identity[name], name)
                if gap is not None:
                    warnings.warn(gap, stacklevel=4)

    def shared_state(self, resume: bool) -> Saved | None:
        """Return what `find_saved` finds in the first process, in all of them; None without `resume`."""
        saved, self.extend = self.ranks.of_main(lambda: (self.find_saved() if resume else None, self.extend))
        return saved

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
        recorded = as_recorded_here(recorded_identity(values), without_resampled(tensors)[1], self.model.backbone)
        more = self.is_finished(saved) and self.recipe.epochs > values["progress"]["epoch"]
        self.extend = self.extend and more
        require_same(
            self.state.identity,
            recorded,
            self.directory.path,
            except_for=["initial_weights"] * holds_result + [f"recipe.{name}" for name in LENGTH_FIELDS] * self.extend,
            hint=EXTEND_HINT if more and recorded["recipe"]["epochs"] < self.recipe.epochs else "",
        )
        if "identity" not in values:
            warnings.warn(
                f"{self.directory.path} holds a run of an earlier version, which recorded neither its images nor its "
                "initial weights, so these cannot be compared",
                stacklevel=7,
            )
        return saved

    @staticmethod
    def is_finished(saved: Saved) -> bool:
        """Whether the state is that of a finished run."""
        return bool(saved[1]["progress"]["events"][-1]["event"] == "end")

    def recall_choices(self, values: Mapping[str, Any]) -> None:
        """Take over the timing choices of the process that wrote the state."""

        def written() -> dict[str, str]:
            return self.directory.read_choices(values["run"]) if self.directory and "run" in values else {}

        self.state.choices.made |= {**values.get("choices", {}), **self.ranks.of_main(written)}

    def agree_on_choices(self) -> None:
        """On a CPU, take over the first process's choice of the library for float32 products; nothing else is timed."""
        if self.ranks.size > 1 and self.device.type == "cpu" and not self.recipe.deterministic:
            self.state.choices.made.setdefault(linear.PRODUCTS, self.ranks.of_main(linear.faster_product))

    def prepare_data(self, data: Mapping[str, Any], like: Run | None = None) -> None:
        """Prepare batches of images, or of what is computed once, after a trial forward.

        Args:
            data: result of `data_identities`.
            like: a run on the same data and backbone that has prepared them.
        """
        began = time.perf_counter()
        if like is None:
            self.data.try_out()
            began = time.perf_counter()
            self.plan = plan = self.data.make_plan(self.cache_dir, data)
            if plan.said:
                self._say(plan.said)
        else:
            self.plan = plan = like.plan
            self.data.share(like.data)
        self.train, self.val = self.data.batches()
        self.feature_seconds = time.perf_counter() - began if plan.reads != "images" else 0.0
        self.loop = Loop(
            self.model,
            self.state.optimizer,
            self.recipe,
            self.data.task,
            self.train,
            self.val,
            self.data.cached,
            self.ranks,
            plan.constants,
        )

    def start(self, files: Mapping[str, str]) -> None:
        """Start a new run: seed, initialise the head, and save a state so that the first epoch can be resumed."""
        seed = self.recipe.seed
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        if self.recipe.prompt_init == "data":
            prompts_from_data(self.model, self.data.sampled(), seed)
            self.state.best = self.state.weights()
        assert self.model.head is not None
        if self.recipe.head_init == "probe" and self.model.head.kind == "linear":
            self.state.progress.probe_accuracy = self._fit_probe()
            self.state.best = self.state.weights()
        elif self.compare_probe and isinstance(self.model.head, LinearHead):
            states, head = rng_state(), copy.deepcopy(self.model.head.state_dict())
            self.state.progress.probe_accuracy = self._fit_probe()
            self.model.head.load_state_dict(head)
            set_rng_state(*states)
        if self.recipe.head_init == "vpt" and isinstance(self.model.head, LinearHead):
            self.model.head.reset()
            self.state.best = self.state.weights()
        if self.ranks.size > 1:
            self.model.load_adapter_state_dict(self.ranks.of_main(self.state.weights))
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
        if self.directory is not None:
            self._keep_new_choices(self.directory)
        self._announce()

    def _fit_probe(self) -> float:
        """Fit the linear head to the features of the model as it is; return the probe's validation accuracy."""
        from fastprompt.train.probe import fit_linear_probe

        return fit_linear_probe(self.model, *self.data.features()).best_val_accuracy

    def go_on(self, saved: Saved, files: Mapping[str, str]) -> None:
        """Resume from the saved state; a run that is extended gets `files` anew, and its old results are removed."""
        tensors, values = saved
        where = None if self.directory is None else self.directory.path
        self.restore(tensors, values, where)
        progress = self.state.progress
        self._remember(saved)
        if self.directory is not None:
            progress.events = whole_log(progress.events, self.directory.read_log())
        row, place = self.here()
        if self.extend:
            before = recorded_identity(values)["recipe"]["epochs"]
            progress.events.append({"event": "extend", "before": before, "epochs": self.recipe.epochs, **row})
            self.commit()
            if self.directory is not None:
                self.directory.extend(files)
        else:
            progress.events.append({"event": "resume", **row})
        if self.directory is not None:
            self._make_up(self.directory, tensors)
            self._keep_new_choices(self.directory)
        self._announce()
        self._say(f"{'going on' if self.extend else 'resuming'} after {place} of {self.recipe.epochs}")

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any], where: Path | None) -> None:
        """Take up a state, and warn if it was written in another environment; `where` it was read from."""
        self.state.restore(tensors, values)
        changed = {
            name: (value, values["environment"].get(name))
            for name, value in self.state.environment.items()
            if "environment" in values and value != values["environment"].get(name)
        }
        if changed and where is not None:
            said = ", ".join(f"{name} is {new}, was {old}" for name, (new, old) in changed.items())
            warnings.warn(f"{where} is resumed in another environment, so last bits may differ: {said}", stacklevel=5)
        self.loop.scale = self.state.progress.scale

    def here(self) -> tuple[dict[str, Any], str]:
        """Where the run is: fields of a row of the log, and a phrase."""
        progress = self.state.progress
        row: dict[str, Any] = {"epoch": progress.epoch, "environment": self.state.environment}
        if self.state.part is None:
            return row, f"epoch {progress.epoch}"
        row["step"] = self.state.part.steps
        return row, f"step {row['step']} of epoch {progress.epoch + 1}"

    def write_into(self, directory: RunDirectory, files: Mapping[str, str]) -> None:
        """Write a run that had no directory into one, replacing what is there."""
        directory.begin(files)
        saved = self.state.saved()
        directory.commit(*saved)
        self._make_up(directory, saved[0])
        self.directory = directory

    def _make_up(self, directory: RunDirectory, tensors: Mapping[str, Tensor]) -> None:
        """Rebuild the files that follow from the state if they are lost or do not match it."""
        path, progress = directory.path, self.state.progress
        recipe = json.dumps(self.recipe.to_dict(), indent=2) + "\n"
        if not (path / RECIPE_FILE).exists() or (path / RECIPE_FILE).read_text() != recipe:
            atomic_write(path / RECIPE_FILE, recipe)
        if directory.read_log() != progress.events:
            directory.write_log(progress.events)
        if progress.best_epoch and not holds(path / BEST_DIRECTORY, best_weights(tensors)):
            now = self.state.weights()
            self.model.load_adapter_state_dict(self.state.best)
            directory.write_best(self.model)
            self.model.load_adapter_state_dict(now)

    def _keep_new_choices(self, directory: RunDirectory) -> None:
        """From now on, save every timing choice before it takes effect."""
        choices = self.state.choices
        choices.on_choice = lambda: directory.write_choices(self.state.name, choices.made)

    def _announce(self) -> None:
        """Say what starts, and tell the callbacks."""
        start = self.state.progress.events[0]
        if not self.announced:
            self._say(start_line(start, self.recipe.epochs, self.loop.steps))
        chosen = choices_line(self.state.choices.made)
        if chosen is not None:
            self._say(chosen)
        for callback in self.callbacks:
            callback.on_start(start)

    def _say(self, line: str) -> None:
        if self.show_progress:
            say(line, sys.stderr)

    def train_to_the_end(self) -> None:
        """Train the remaining epochs, then record the event that marks the run as finished."""
        recipe, progress = self.recipe, self.state.progress
        reset_peak_memory(self.device)
        total, done = recipe.epochs * self.train.num_images, self.images_done(self.state.part)
        with progress_bar(self.show_progress, total, done) as bar, polling():
            while not self.is_done():
                try:
                    self.one_epoch(self.state.progress.epoch + 1, bar)
                except TrainingDiverged as error:
                    self.log_divergence(error)
                    if self.good is None or progress.rollbacks >= recipe.rollbacks:
                        self.model.load_adapter_state_dict(self.state.best)
                        raise
                    progress = self._roll_back(error)
        self.finish()

    def finish(self) -> None:
        """Record the event that marks the run as finished, and warn if a probe was better."""
        recipe, progress = self.recipe, self.state.progress
        end = {
            "event": "end",
            "best_epoch": progress.best_epoch,
            "best_val_accuracy": progress.best_val_accuracy,
            "best_val_loss": progress.best_val_loss,
            "images_per_second": progress.train_images / progress.train_seconds,
            "seconds": progress.seconds,
            "peak_memory_mib": peak_memory_mib(self.device),
        }
        if progress.epoch < recipe.epochs:
            end["stopped_after"] = progress.epoch
            self._say(f"stopped after epoch {progress.epoch}: no better one for {recipe.patience} epochs")
        progress.events.append(end)
        self.commit()
        probe = progress.probe_accuracy
        if self.ranks.main and probe is not None and progress.best_val_accuracy < probe:
            warnings.warn(
                f"the validation accuracy of {progress.best_val_accuracy:.3f} is below that of a linear probe on the "
                f"same features, {probe:.3f}: train longer, with another learning rate or head_init='probe'",
                stacklevel=5,
            )

    def images_done(self, part: Totals | None) -> int:
        """Number of images that all epochs have trained on so far, with those of a part of one."""
        of_part = 0 if part is None else int(part.read()["images"])
        return self.state.progress.epoch * self.train.num_images + of_part

    def is_done(self) -> bool:
        """Whether all epochs are done, or none was better for `patience` epochs."""
        progress, patience = self.state.progress, self.recipe.patience
        return progress.epoch >= self.recipe.epochs or (
            patience is not None and progress.epoch - progress.best_epoch >= patience
        )

    def log_divergence(self, error: TrainingDiverged) -> None:
        """Add the error to the log."""
        row = {"event": "diverged", "epoch": error.epoch, "step": error.step, "lr": error.lr, "message": str(error)}
        self.state.progress.events.append(row)
        if self.directory is not None:
            self.directory.write_log(self.state.progress.events)

    def _roll_back(self, error: TrainingDiverged) -> Progress:
        """Go back to the last good state, at a third of the learning rate; return its progress."""
        before = self.state.progress
        good = self.ranks.of_main(lambda: self.good)
        assert good is not None
        self.state.restore(*copy.deepcopy(good))
        progress = self.state.progress
        progress.rollbacks, progress.scale = before.rollbacks + 1, before.scale / 3
        self.loop.scale = progress.scale
        steps = 0 if self.state.part is None else self.state.part.steps
        row = {"event": "rollback", "epoch": progress.epoch, "step": steps, "scale": progress.scale}
        progress.events = [*before.events, row]
        self.commit()
        after = f"step {steps} of epoch {progress.epoch + 1}" if steps else f"epoch {progress.epoch}"
        self._say(f"{error.what} at epoch {error.epoch}: back to the state after {after}, at a third of the rate")
        return progress

    def one_epoch(self, epoch: int, bar: Any) -> None:
        """Train and validate for one epoch, or the rest of it, then commit the result."""
        progress = self.state.progress
        totals = self.begin_epoch()
        bar.n = self.images_done(totals)
        said = f" val {progress.best_val_accuracy:.3f} (best)" if progress.epoch else ""
        record = self.loop.train(epoch, bar, said, totals, self._after_step)
        self._refuse_explosion(epoch, record)
        self.keep_time(totals)
        trained, after_training = totals.seconds, rng_state()

        def stop_if_asked() -> None:
            if requested() and self.ranks.main:
                set_rng_state(*after_training)
                self._save_and_stop(epoch, totals)

        val_loss, score = self.loop.validate(epoch, stop_if_asked)
        improved = self.end_epoch(epoch, record, trained, val_loss, score)
        self.commit()
        if improved and self.directory is not None:
            self.directory.write_best(self.model)
        if self.show_progress:
            with bar.external_write_mode(file=sys.stderr):
                say(epoch_line(progress.events[-1], self.recipe.epochs, self.data.task.metric, improved), sys.stderr)
        for callback in self.callbacks:
            callback.on_epoch(progress.events[-1])

    def begin_epoch(self) -> Totals:
        """Return what the epoch that begins, or goes on, has summed up so far."""
        totals = Totals(self.device, rng_state()) if self.state.part is None else self.state.part
        self.began, self.before = time.perf_counter(), totals.seconds
        return totals

    def end_epoch(self, epoch: int, record: Mapping[str, Any], trained: float, val_loss: float, score: float) -> bool:
        """Log a complete epoch, and keep its weights if they are the best so far; return whether they are.

        Args:
            record: result of `Loop.train`.
            trained: seconds of training, without validation.
        """
        state, progress = self.state, self.state.progress
        now, best = (score, -val_loss), (progress.best_val_accuracy, -progress.best_val_loss)
        improved = now[::-1] > best[::-1] if self.recipe.select_by == "loss" else now > best
        improved = improved or self.recipe.select_by == "last"
        if improved:
            progress.best_epoch, progress.best_val_accuracy, progress.best_val_loss = epoch, score, val_loss
            state.best = state.weights()
        progress.epoch = epoch
        progress.train_images += self.train.num_images
        progress.train_seconds += trained
        seconds = self.before + time.perf_counter() - self.began
        progress.seconds += seconds
        progress.events.append(
            {
                "event": "epoch",
                "epoch": epoch,
                **record,
                "val_loss": val_loss,
                f"val_{self.data.task.metric}": score,
                "images_per_second": self.train.num_images / trained,
                "seconds": seconds,
            }
        )
        state.part = None
        return improved

    def _refuse_explosion(self, epoch: int, record: Mapping[str, Any]) -> None:
        """Raise `TrainingDiverged` for an epoch's mean loss far above the first one's, where a rollback can mend it."""
        losses = [event["train_loss"] for event in self.state.progress.events if event["event"] == "epoch"]
        if self.recipe.rollbacks and losses and record["train_loss"] > 3 * losses[0]:
            what = f"mean loss is {record['train_loss']:.4g}, more than three times that of the first epoch"
            raise TrainingDiverged(what, epoch, 0, record["lr"], "as a whole")

    def keep_time(self, totals: Totals) -> None:
        """Let the totals know how long the epoch has taken."""
        totals.seconds = self.before + time.perf_counter() - self.began

    def _after_step(self, totals: Totals, step: Step) -> None:
        """Tell the callbacks, and save if it is time to or the process is asked to end."""
        for callback in self.callbacks:
            callback.on_step(step)
        if not self.ranks.main:
            return
        if requested():
            self._save_and_stop(step.epoch, totals)
        if checkpoint_due(self.recipe, totals.steps, self.last_commit):
            self._save_part(step.epoch, totals)

    def _save_part(self, epoch: int, totals: Totals) -> None:
        """Commit the state in the middle of an epoch."""
        if self.ranks.size == 1:
            self.loop.require_finite(epoch, totals)
        elif totals.read()["bad_step"]:  # all processes see that together, at the end of the epoch
            return
        self.keep_time(totals)
        self.state.part = totals
        self.commit()

    def _save_and_stop(self, epoch: int, totals: Totals) -> NoReturn:
        self._save_part(epoch, totals)
        raise Terminated(saved=self.directory is not None)

    def commit(self) -> None:
        """Write the state, then the files that follow from it; remember it if the run may go back to it."""
        self.last_commit = monotonic()
        if self.directory is None and not self.recipe.rollbacks:
            return
        saved = self.state.saved()
        self._remember(saved)
        if self.directory is not None:
            self.directory.commit(*saved)
            self.directory.write_log(self.state.progress.events)

    def _remember(self, saved: Saved) -> None:
        if self.recipe.rollbacks:
            self.good = copy.deepcopy(saved)

    def result(self, saved: Saved | None = None) -> FitResult:
        """Load the best weights into the model and return the finished run's result.

        Args:
            saved: the state of a run that an earlier call finished.
        """
        state = self.state
        if saved is not None:
            state.restore(*saved)
        if saved is not None and self.directory is not None:
            try:
                self._make_up(self.directory, saved[0])
            except OSError as error:
                warnings.warn(
                    f"{self.directory.path} holds a finished run with an incomplete log or best/, which could not be "
                    f"rebuilt: {error}",
                    stacklevel=4,
                )
        self.model.load_adapter_state_dict(state.best)
        self.model.eval()
        progress = state.progress
        end = progress.events[-1]
        result = FitResult(
            best_epoch=progress.best_epoch,
            best_val_accuracy=progress.best_val_accuracy,
            best_val_loss=progress.best_val_loss,
            history=[event for event in progress.events if event["event"] == "epoch"],
            images_per_second=end["images_per_second"],
            peak_memory_mib=end["peak_memory_mib"],
            seconds=progress.seconds,
            out_dir=None if self.directory is None else self.directory.path,
        )
        if saved is None:
            for callback in self.callbacks:
                callback.on_end(result)
        return result
