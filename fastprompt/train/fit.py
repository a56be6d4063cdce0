"""Trains what a `PromptedViT` trains: generator and head (and the backbone in full fine-tuning)."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import random
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from fastprompt.files import atomic_write, remove_stale_temporaries
from fastprompt.generators.v2apt import ACTIVE_UNIT_NATS
from fastprompt.heads import LinearHead
from fastprompt.memory import peak_memory_mib, reset_peak_memory
from fastprompt.train.batches import Batches, check_data, is_tensor_pair
from fastprompt.train.checkpoint import (
    load_state,
    optimizer_state,
    rng_state,
    save_state,
    set_optimizer_state,
    set_rng_state,
)
from fastprompt.train.evaluate import backbone_precision, device_of, evaluation_mode
from fastprompt.train.recipes import Recipe, default_recipe
from fastprompt.vit.linear import bfloat16_is_fast

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

STATE_FILE, LOG_FILE, RECIPE_FILE, BEST_DIRECTORY = "last.safetensors", "log.jsonl", "recipe.json", "best"


class TrainingDiverged(FloatingPointError):
    """The loss or the gradient became NaN or infinite.

    Attributes:
        epoch: counted from 1. step: within the epoch, counted from 1 (0: while validating). lr: at that step.
    """

    def __init__(self, what: str, epoch: int, step: int, lr: float) -> None:
        self.what, self.epoch, self.step, self.lr = what, epoch, step, lr
        place = f"step {step}" if step else "validation"
        super().__init__(
            f"training diverged: the {what} at epoch {epoch}, {place}, with lr={lr:g}. Use a lower learning "
            f"rate (for example a third of it), a longer warm-up or clip_grad=1.0; the model holds the best "
            f"weights of the epochs before"
        )


@dataclass
class FitResult:
    """What `fit` did.

    Attributes:
        best_epoch: epoch (counted from 1) with the highest validation accuracy, of equals the lower
            validation loss; or by ``recipe.select_by`` the other way round.
        best_val_accuracy, best_val_loss: of that epoch.
        history: one dict per epoch, as in the log.
        images_per_second: training images over training time (validation and saving excluded).
        peak_memory_mib: CUDA: highest allocation; CPU: highest resident size of the process while fitting.
        seconds: wall time of all epochs, interrupted runs included.
        out_dir: where log and checkpoints are, or None.
    """

    best_epoch: int
    best_val_accuracy: float
    history: list[dict[str, Any]]
    images_per_second: float
    peak_memory_mib: float
    seconds: float
    out_dir: Path | None
    best_val_loss: float = float("nan")


@dataclass
class _Progress:
    """What a run remembers besides tensors; written into the state file as JSON."""

    epoch: int = 0
    best_epoch: int = 0
    best_val_accuracy: float = -1.0
    best_val_loss: float = float("inf")
    events: list[dict[str, Any]] = field(default_factory=list)
    train_images: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0


def fit(
    model: PromptedViT,
    train: Any,
    val: Any,
    recipe: Recipe | None = None,
    out_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> FitResult:
    """Trains the model and leaves it with the weights that were best on validation.

    The loss is cross-entropy, plus beta · mean(KL) where the generator returns a KL (V²APT; beta from its
    configuration). The frozen backbone runs in ``recipe.dtype`` and gets its own tensors back at the end, bit
    for bit; in full fine-tuning its weights stay float32 and bfloat16 is autocast. A linear probe on data
    without augmentation computes its features once.

    With ``out_dir`` it writes ``log.jsonl`` (one JSON object a line: start, epoch, end, resume, diverged),
    ``recipe.json``, ``last.safetensors`` (everything needed to go on) and ``best/``
    (`PromptedViT.save_pretrained`), each whole or not at all. A run that was killed goes on after its last
    complete epoch and ends with the same bits as if it had not been (on CPU, and wherever the operations are
    deterministic); a finished run returns its result at once.

    Args:
        model: built with num_classes. Without class names it takes those of the data set (`describe_data`).
        train, val: a Dataset yielding (image (3, H, W), label), an (images, labels) pair of tensors, or a
            DataLoader. uint8 images are raw pixels, floating-point ones are normalised. All images are
            checked before training (of more than 20,000: a sample; the others in their batch). A last batch
            of one image joins the one before.
        recipe: None is `default_recipe(model.config)`.
        out_dir: None keeps everything in memory.
        resume: False starts anew and replaces what is in ``out_dir``.
        progress: show a bar with loss, accuracy, images per second and remaining time (stderr).

    Raises:
        TypeError, ValueError: a wrong argument, wrong data, or an ``out_dir`` that holds another run; nothing
            is trained.
        TrainingDiverged: loss or gradient became NaN or infinite; the log has the event.
        OSError: a file could not be written; what was written before is intact.
    """
    from fastprompt.model import PromptedViT

    if not isinstance(model, PromptedViT):
        raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
    if recipe is None:
        recipe = default_recipe(model.config)
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a fastprompt Recipe or None, got {type(recipe).__name__}")
    if model.num_classes is None or model.head is None:
        raise ValueError("model must have a head to be trained: build it with num_classes=")
    if recipe.head_init == "probe" and model.head.kind == "linear":
        from fastprompt.train.probe import logistic_regression

        logistic_regression()  # before anything is written
    num_classes = model.num_classes
    train_labels = check_data(train, "train", num_classes)
    val_labels = check_data(val, "val", num_classes)
    model.describe_data(train)
    directory = None if out_dir is None else Path(out_dir)
    if directory is not None and directory.exists() and not directory.is_dir():
        raise ValueError(f"out_dir must be a directory, {directory} is a file")
    before = rng_state()
    try:
        run = _Run(model, train, val, recipe, directory, progress)
        signature = run.signature(train_labels, val_labels)
        saved = run.find_saved(signature) if resume and directory is not None else None
        with backbone_precision(model, run.backbone_dtype):
            if saved is not None and saved[1]["progress"]["events"][-1]["event"] == "end":
                run.restore(*saved)
                return run.result()
            run.prepare_data()
            if saved is None:
                run.start(signature)
            else:
                run.restore(*saved)
            run.train_to_the_end()
            return run.result()
    finally:
        set_rng_state(*before)


class _Run:
    def __init__(
        self,
        model: PromptedViT,
        train: Any,
        val: Any,
        recipe: Recipe,
        directory: Path | None,
        show_progress: bool,
    ) -> None:
        self.model, self.recipe, self.directory = model, recipe, directory
        self.device = device_of(model)
        self.train_source, self.val_source = train, val
        self.show_progress = show_progress
        assert model.head is not None
        self.num_classes, self.head = model.head.num_classes, model.head
        self.beta = float(getattr(model.config, "beta", 0.0))
        self.progress = _Progress()
        named = list(model.trainable_parameters())
        self.parameters = [parameter for _, parameter in named]
        self.backbone_dtype = compute_dtype(recipe.dtype, self.device)
        self.optimizer = _make_optimizer(named, recipe)
        self.best: dict[str, Tensor] = self._weights()
        self.feature_seconds = 0.0
        head_only = model.generator is None and not model.full
        self.cached = head_only and _same_every_epoch(train) and _same_every_epoch(val)

    def signature(self, train_labels: Tensor, val_labels: Tensor) -> dict[str, Any]:
        """What must be the same for a run to be resumed."""
        return {
            "recipe": self.recipe.to_dict(),
            "config": {"kind": self.model.config.kind, **self.model.config.to_dict()},
            "num_classes": self.num_classes,
            "head": self.head.describe(),
            "readout": self.model.readout,
            "num_train": Batches(self.train_source, 1, name="train", num_classes=self.num_classes).num_images,
            "train_labels": hashlib.sha256(train_labels.numpy().tobytes()).hexdigest(),
            "val_labels": hashlib.sha256(val_labels.numpy().tobytes()).hexdigest(),
            "backbone": self.model.backbone.fingerprint,
        }

    def find_saved(self, signature: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        assert self.directory is not None
        if not (self.directory / STATE_FILE).exists():
            return None
        tensors, values = load_state(self.directory / STATE_FILE)
        found = values["signature"]
        differences = {
            f"recipe.{name}": pair for name, pair in self.recipe.differences(Recipe.from_dict(found["recipe"])).items()
        }
        mine = json.loads(json.dumps(signature))
        differences |= {
            name: (mine[name], found[name])
            for name in mine
            if name in found and name != "recipe" and mine[name] != found[name]
        }
        if differences:
            text = ", ".join(f"{name} is {new!r}, there {old!r}" for name, (new, old) in differences.items())
            raise ValueError(
                f"out_dir {self.directory} holds another run ({text}); choose another directory, or "
                f"resume=False to replace it"
            )
        return tensors, values

    def prepare_data(self) -> None:
        """Batches of images, or of a linear probe's features; a trial forward before anything is written."""
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

    def _check_single_images(self) -> None:
        """Raises where batches of one image come and the generator's batch norm cannot take them."""
        generator, train = self.model.generator, self.train_source
        size = train.batch_size if isinstance(train, DataLoader) else self.recipe.batch_size
        first = Batches(train, 1, name="train", num_classes=self.num_classes, device=self.device)
        if generator is None or generator.known_at != "image" or 1 not in (size, first.num_images):
            return
        images, _ = next(iter(first.epoch()))
        try:
            copy.deepcopy(generator).train()(self.model.backbone.normalise(images[:1]).float())
        except ValueError as error:
            raise ValueError(
                f"batch_size must be at least 2 and train must hold at least 2 images for {self.model.config.kind!r} "
                f"here, got {size} and {first.num_images}: its batch norm cannot take a single image ({error})"
            ) from error

    def start(self, signature: dict[str, Any]) -> None:
        """A new run: seeds, the head's start, and a state file, so that the first epoch can be resumed."""
        self._signature = signature
        seed = self.recipe.seed
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        if self.recipe.head_init == "probe" and self.head.kind == "linear":
            from fastprompt.train.probe import extract_features, fit_linear_probe

            pairs = [
                extract_features(self.model, data, self.recipe.batch_size, num_workers=self.recipe.num_workers)
                for data in (self.train_source, self.val_source)
            ]
            fit_linear_probe(self.model, pairs[0], pairs[1])
            self.best = self._weights()
        if self.recipe.head_init == "vpt" and isinstance(self.head, LinearHead):
            self.head.reset()
            self.best = self._weights()
        self.progress.seconds = self.progress.train_seconds = self.feature_seconds
        self.progress.events = [
            {
                "event": "start",
                "recipe": self.recipe.to_dict(),
                "config": signature["config"],
                "num_train": self.train.num_images,
                "num_val": self.val.num_images,
                "trained_parameters": sum(parameter.numel() for parameter in self.parameters),
                "device": str(self.device),
                "backbone_dtype": str(self.backbone_dtype).removeprefix("torch."),
                "torch": torch.__version__,
                "seed": seed,
            }
        ]
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_stale_temporaries(self.directory)
            atomic_write(self.directory / RECIPE_FILE, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            self._save_state()
            self._write_log()
            if (self.directory / BEST_DIRECTORY).exists():
                shutil.rmtree(self.directory / BEST_DIRECTORY)

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Goes on where the state file was written."""
        assert self.directory is not None
        remove_stale_temporaries(self.directory)
        self._signature = values["signature"]
        self.progress = _Progress(**values["progress"])
        self.best = _under(tensors, "best.")
        if self.progress.best_epoch:
            self.model.load_adapter_state_dict(self.best)
            self.model.save_pretrained(self.directory / BEST_DIRECTORY)
        self.model.load_adapter_state_dict(_under(tensors, "model."))
        set_optimizer_state(self.optimizer, _under(tensors, "optimizer."), values["optimizer"])
        set_rng_state(_under(tensors, "rng."), values["rng"])
        if self.progress.epoch < self.recipe.epochs:
            self.progress.events.append({"event": "resume", "epoch": self.progress.epoch})
            self._write_log()

    def train_to_the_end(self) -> None:
        """All epochs that are left, then the event that marks the run as finished."""
        recipe, state = self.recipe, self.progress
        total, done = (epochs * self.train.num_images for epochs in (recipe.epochs, state.epoch))
        reset_peak_memory(self.device)
        with _bar(self.show_progress, total, done) as bar:
            try:
                while state.epoch < recipe.epochs:
                    self._one_epoch(state.epoch + 1, bar)
            except TrainingDiverged as error:
                state.events.append(
                    {
                        "event": "diverged",
                        "epoch": error.epoch,
                        "step": error.step,
                        "lr": error.lr,
                        "message": str(error),
                    }
                )
                self._write_log()
                self.model.load_adapter_state_dict(self.best)
                raise
        state.events.append(
            {
                "event": "end",
                "best_epoch": state.best_epoch,
                "best_val_accuracy": state.best_val_accuracy,
                "best_val_loss": state.best_val_loss,
                "images_per_second": state.train_images / state.train_seconds,
                "seconds": state.seconds,
                "peak_memory_mib": peak_memory_mib(self.device),
            }
        )
        self._save_state()
        self._write_log()

    def result(self) -> FitResult:
        """The finished run's result; the model gets the best weights."""
        state = self.progress
        self.model.load_adapter_state_dict(self.best)
        self.model.eval()
        end = state.events[-1]
        return FitResult(
            best_epoch=state.best_epoch,
            best_val_accuracy=state.best_val_accuracy,
            best_val_loss=state.best_val_loss,
            history=[event for event in state.events if event["event"] == "epoch"],
            images_per_second=end["images_per_second"],
            peak_memory_mib=end["peak_memory_mib"],
            seconds=state.seconds,
            out_dir=self.directory,
        )

    def _one_epoch(self, epoch: int, bar: Any) -> None:
        state = self.progress
        began = time.perf_counter()
        record = self._train(epoch, bar)
        trained = time.perf_counter() - began
        val_loss, val_accuracy = self._validate(epoch)
        now, best = (val_accuracy, -val_loss), (state.best_val_accuracy, -state.best_val_loss)
        improved = now[::-1] > best[::-1] if self.recipe.select_by == "loss" else now > best
        improved = improved or self.recipe.select_by == "last"
        if improved:
            state.best_epoch, state.best_val_accuracy, state.best_val_loss = epoch, val_accuracy, val_loss
            self.best = self._weights()
        state.epoch = epoch
        state.train_images += self.train.num_images
        state.train_seconds += trained
        seconds = time.perf_counter() - began
        state.seconds += seconds
        state.events.append(
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
        if self.directory is not None:
            self._save_state()
            self._write_log()
            if improved:
                self.model.save_pretrained(self.directory / BEST_DIRECTORY)

    def _train(self, epoch: int, bar: Any) -> dict[str, Any]:
        recipe, steps = self.recipe, len(self.train)
        self.model.train()
        total_loss = total_kl = total_norm = 0.0
        correct = seen = 0
        lr = recipe.lr
        has_kl = False
        units: Tensor | None = None
        for index, (images, labels) in enumerate(self.train.epoch(epoch - 1)):
            step = (epoch - 1) * steps + index
            factor = recipe.lr_factor(step, steps)
            lr = recipe.lr * factor
            for group in self.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            logits, aux = self._forward(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            if "kl" in aux:
                has_kl = True
                kl = aux["kl"].float().mean()
                loss = loss + self.beta * recipe.kl_factor(step, steps) * kl
                total_kl += float(kl.detach()) * len(labels)
            if "kl_units" in aux:
                of_batch = aux["kl_units"].detach().sum(0).cpu().double()
                units = of_batch if units is None else units + of_batch
            value = float(loss.detach())
            if not np.isfinite(value):
                raise TrainingDiverged(f"loss is {value}", epoch, index + 1, lr)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = float(
                torch.nn.utils.clip_grad_norm_(
                    self.parameters, float("inf") if recipe.clip_grad is None else recipe.clip_grad
                )
            )
            if not np.isfinite(norm):
                raise TrainingDiverged(f"gradient norm is {norm}", epoch, index + 1, lr)
            self.optimizer.step()
            total_loss += value * len(labels)
            total_norm += norm
            correct += int((logits.detach().argmax(-1) == labels).sum())
            seen += len(labels)
            bar.set_postfix_str(
                f"epoch {epoch}/{recipe.epochs} loss {total_loss / seen:.3f} acc {correct / seen:.3f}"
                + (f" val {self.progress.best_val_accuracy:.3f} (best)" if self.progress.epoch else ""),
                refresh=False,
            )
            bar.update(len(labels))
        self.optimizer.zero_grad(set_to_none=True)
        record = {
            "train_loss": total_loss / seen,
            "train_accuracy": correct / seen,
            "lr": lr,
            "grad_norm": total_norm / steps,
        }
        if has_kl:
            record["kl"] = total_kl / seen
            record["beta"] = self.beta * recipe.kl_factor(epoch * steps - 1, steps)
        if units is not None:
            record["active_units"] = int((units / seen > ACTIVE_UNIT_NATS).sum())
        return record

    def _forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Float32 logits and what the loss needs besides; a cached linear probe's ``images`` are features."""
        if self.cached:
            return self.head(images).float(), {}
        logits, aux = self.model(images, return_aux=True)
        return logits.float(), aux

    def _validate(self, epoch: int) -> tuple[float, float]:
        """Mean cross-entropy and accuracy on the validation data, in eval mode."""
        total, correct, seen = 0.0, 0, 0
        with evaluation_mode(self.model):
            for images, labels in self.val.epoch(epoch - 1):
                logits, _ = self._forward(images)
                total += float(F.cross_entropy(logits, labels, reduction="sum"))
                correct += int((logits.argmax(-1) == labels).sum())
                seen += len(labels)
        loss = total / seen
        if not np.isfinite(loss):
            raise TrainingDiverged(f"validation loss is {loss}", epoch, 0, self.optimizer.param_groups[0]["lr"])
        return loss, correct / seen

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.adapter_state_dict().items()}

    def _save_state(self) -> None:
        if self.directory is None:
            return
        optimizer_tensors, optimizer_values = optimizer_state(self.optimizer)
        rng_tensors, rng_values = rng_state()
        tensors = {
            **{f"model.{name}": tensor for name, tensor in self.model.adapter_state_dict().items()},
            **{f"best.{name}": tensor for name, tensor in self.best.items()},
            **{f"optimizer.{name}": tensor for name, tensor in optimizer_tensors.items()},
            **{f"rng.{name}": tensor for name, tensor in rng_tensors.items()},
        }
        save_state(
            self.directory / STATE_FILE,
            tensors,
            {
                "signature": self._signature,
                "progress": vars(self.progress),
                "optimizer": optimizer_values,
                "rng": rng_values,
            },
        )

    def _write_log(self) -> None:
        if self.directory is not None:
            atomic_write(self.directory / LOG_FILE, "".join(json.dumps(event) + "\n" for event in self.progress.events))


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _make_optimizer(named: list[tuple[str, torch.nn.Parameter]], recipe: Recipe) -> torch.optim.Optimizer:
    """Parameter groups by part and by weight decay (`Recipe.part_of`, `Recipe.decays`)."""
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        decays = recipe.decays(name, parameter.ndim)
        group = groups.setdefault(
            (recipe.part_of(name), decays),
            {
                "params": [],
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "peak_lr": recipe.peak_lr(name),
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("model has no parameter that trains")
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(list(groups.values()), lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(list(groups.values()), lr=recipe.lr)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that a recipe's ``dtype`` means on a device; warns where bfloat16 is emulated there."""
    if device.type == "cpu" and name != "float32":
        fast = bfloat16_is_fast(device)
        if name == "auto":
            return torch.bfloat16 if fast else torch.float32
        if not fast:
            warnings.warn(
                "this CPU has no bfloat16 instructions: dtype='bfloat16' is emulated and slow here, "
                "dtype='float32' or 'auto' is faster",
                stacklevel=4,
            )
    return torch.float32 if name == "float32" else torch.bfloat16


def _same_every_epoch(data: Any) -> bool:
    """Whether the data is known to give the same images in every epoch (no augmentation)."""
    if is_tensor_pair(data) or isinstance(data, TensorDataset):
        return True
    return not isinstance(data, DataLoader) and getattr(data, "augment", "unknown") in ("none", None, False)


@contextlib.contextmanager
def _bar(show: bool, total: int, initial: int) -> Iterator[Any]:
    from tqdm import tqdm

    # A file or a pipe gets a line every ten seconds, a terminal ten a second.
    interval = 0.1 if sys.stderr.isatty() else 10.0
    with tqdm(
        total=total, initial=initial, unit="img", disable=not show, mininterval=interval, dynamic_ncols=True
    ) as bar:
        yield bar
