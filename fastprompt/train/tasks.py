"""What a run learns: the loss of a batch and the score of a validation, for classes, several labels, and values.

Nothing here reads a number from the device, except `Score.result`, after the last batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from fastprompt.arguments import ArgumentError
from fastprompt.domains import Domains
from fastprompt.train.batches import as_tensor_pair, check_labels, is_tensor_pair, num_images
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.ranks import Ranks
from fastprompt.train.recipes import Recipe

REGRESSION = ("mse", "l1")
METRICS = {"class": "accuracy", "labels": "map", "values": "r2"}
"""Score of a validation, by kind of labels: accuracy, mean average precision, coefficient of determination."""


def wide(device: torch.device) -> torch.dtype:
    """Return the dtype in which sums over many images are kept: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def kind_of_labels(loss: str, data: Any) -> str:
    """Return what the labels are: "class" (N,) indices, "labels" (N, C) of zeros and ones, or "values" (N, C) or (N,).

    Args:
        loss: `Recipe.loss`. For "bce", the first label of the data decides.
        data: as in `fastprompt.fit`. Random states are restored.
    """
    if loss in REGRESSION:
        return "values"
    if loss == "cross_entropy":
        return "class"
    source = data.dataset if isinstance(data, DataLoader) else data
    num_images(data, "train")
    if is_tensor_pair(source):
        first = as_tensor_pair(source)[1][:1]
    else:
        before = rng_state()
        try:
            item = source[0]
        finally:
            set_rng_state(*before)
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            return "class"  # refused by `check_data`, which says why
        first = torch.as_tensor(item[1])[None]
    return "labels" if first.ndim > 1 else "class"


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Return class indices (B,) as float32 rows (B, num_classes); unlike PyTorch's, this never looks at the labels."""
    return torch.zeros(len(labels), num_classes, device=labels.device).scatter_(1, labels[:, None], 1.0)


@dataclass(frozen=True)
class Task:
    """What the outputs (B, C) of a model are compared with.

    Attributes:
        loss: `Recipe.loss`.
        kind: result of `kind_of_labels`.
        num_outputs: C.
        label_smoothing: of the training loss.
        class_weights: (C,) for the training loss, or None.
        compared: (C, C), True where class j is compared with label i, if there is a head for each domain
            (`Domains.compared`); None compares all classes.
    """

    loss: str
    kind: str
    num_outputs: int
    label_smoothing: float = 0.0
    class_weights: Tensor | None = None
    compared: Tensor | None = None

    @property
    def metric(self) -> str:
        """Name of the score: "accuracy", "map" or "r2"."""
        return METRICS[self.kind]

    def divisor(self, targets: Tensor) -> Tensor:
        """Return what divides the summed training loss, a 0-dimensional tensor: images, or the sum of their weights."""
        if self.class_weights is None or targets.is_floating_point():
            return torch.full((), len(targets), dtype=torch.float32, device=targets.device)
        return self.class_weights[targets].sum()

    def training_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the summed loss of a batch, with smoothing and class weights; `divisor` makes it a mean.

        Args:
            targets: labels, or (B, C) probabilities of mixed images.
        """
        if self.loss == "cross_entropy":
            return self._cross_entropy(outputs, targets, self.class_weights, self.label_smoothing)
        return self._plain_loss(outputs, targets)

    def validation_loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the summed loss of a batch without smoothing and weights."""
        if self.loss == "cross_entropy":
            return self._cross_entropy(outputs, labels)
        return self._plain_loss(outputs, labels)

    def _cross_entropy(
        self, outputs: Tensor, targets: Tensor, weights: Tensor | None = None, smoothing: float = 0.0
    ) -> Tensor:
        """Return PyTorch's cross-entropy, summed: over all classes, or over those of each label's domain."""
        if self.compared is None:
            return F.cross_entropy(outputs, targets, weight=weights, label_smoothing=smoothing, reduction="sum")
        own = self.compared[targets]  # (B, C)
        log_p = outputs.masked_fill(~own, float("-inf")).log_softmax(-1)
        losses = -log_p if weights is None else -log_p * weights
        loss = losses.gather(1, targets[:, None])[:, 0]
        if smoothing:
            even = losses.masked_fill(~own, 0.0).sum(-1) / own.sum(-1)
            loss = (1 - smoothing) * loss + smoothing * even
        return loss.sum()

    def _plain_loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if self.kind == "class" and not targets.is_floating_point():
            targets = one_hot(targets, self.num_outputs)
        targets = self.as_outputs(targets, outputs)
        if self.loss == "bce":
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum") / self.num_outputs
        of_all = F.mse_loss if self.loss == "mse" else F.l1_loss
        return of_all(outputs, targets, reduction="sum") / self.num_outputs

    def as_outputs(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Return targets (B,) or (B, C) in the shape and dtype of the outputs (B, C)."""
        return targets.to(outputs.dtype).reshape(outputs.shape)

    def num_correct(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return how many images have their class on top, a 0-dimensional tensor; 0 for other kinds of labels."""
        if self.kind != "class":
            return torch.zeros((), device=outputs.device)
        if self.compared is not None:
            outputs = outputs.masked_fill(~self.compared[targets], float("-inf"))
        return (outputs.argmax(-1) == (targets.argmax(-1) if targets.ndim > 1 else targets)).sum()


def make_task(
    recipe: Recipe,
    kind: str,
    num_outputs: int,
    counts: Tensor | None,
    device: torch.device,
    domains: Domains | None = None,
) -> Task:
    """Return the task of a run.

    Args:
        counts: (C,) training images per class, if `needs_counts`.
        domains: of the model.

    Raises:
        ValueError: the number of class weights is wrong, they need a class that has no images, or the recipe does not
            fit the labels.
    """
    weights = None
    if recipe.class_weights == "balanced":
        assert counts is not None
        missing = [index for index, count in enumerate(counts.tolist()) if count == 0]
        if missing:
            raise ArgumentError(
                "class_weights", f"must not be 'balanced' without training images of class {missing[0]}"
            )
        weights = counts.sum() / (num_outputs * counts.double())
    elif not isinstance(recipe.class_weights, str):
        weights = torch.tensor(recipe.class_weights, dtype=torch.float64)
        if len(weights) != num_outputs:
            raise ArgumentError("class_weights", f"must be {num_outputs} numbers, one per class, got {len(weights)}")
    if kind != "class":
        for name in ("mixup", "cutmix"):
            if getattr(recipe, name):
                raise ArgumentError(name, f"must be 0 with several labels per image, got {getattr(recipe, name)}")
    compared = None
    if domains is not None and domains.labels == "per-domain":
        unfit = {"loss": recipe.loss != "cross_entropy", "mixup": bool(recipe.mixup), "cutmix": bool(recipe.cutmix)}
        for name in (name for name, is_unfit in unfit.items() if is_unfit):
            takes = "'cross_entropy'" if name == "loss" else "0"
            raise ArgumentError(name, f"must be {takes} with a head for each domain, got {getattr(recipe, name)!r}")
        compared = domains.compared().to(device)
    weights = None if weights is None else weights.to(device, torch.float32)
    return Task(recipe.loss, kind, num_outputs, recipe.label_smoothing, weights, compared)


def needs_counts(recipe: Recipe) -> bool:
    """Whether the recipe depends on the number of training images per class."""
    return recipe.class_weights == "balanced" or recipe.sampling == "balanced"


def class_labels(data: Any, num_classes: int) -> Tensor:
    """Return the labels (N,) int64 of all images of a data set.

    They are read from the data set's `labels` or `targets` if it has one per image; otherwise every item is read.

    Raises:
        TypeError, ValueError: a DataLoader, or labels that are not class indices.
    """
    if isinstance(data, DataLoader):
        raise ArgumentError(
            "train", "must be a Dataset or a pair of tensors for balanced class weights or sampling, got a DataLoader"
        )
    count = num_images(data, "train")
    if is_tensor_pair(data):
        labels = as_tensor_pair(data)[1].cpu()
    else:
        stated = next((v for name in ("labels", "targets") if (v := getattr(data, name, None)) is not None), None)
        if not isinstance(stated, (Sequence, Tensor)) or len(stated) != count:
            before = rng_state()
            try:
                stated = [int(data[index][1]) for index in range(count)]
            finally:
                set_rng_state(*before)
        labels = torch.as_tensor(stated)
    check_labels(labels, "train", num_classes)
    return labels.to(torch.int64)


class Score:
    """Sums up a validation: its mean loss and its score, `Task.metric`."""

    def __init__(self, task: Task, device: torch.device, ranks: Ranks | None = None) -> None:
        self.task, self.ranks = task, Ranks() if ranks is None else ranks
        self.sums = torch.zeros(3, dtype=wide(device), device=device)  # loss, images, correct
        self.outputs: list[Tensor] = []
        self.labels: list[Tensor] = []

    def add(self, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch: outputs (B, C), labels (B,) or (B, C)."""
        loss, correct = self.task.validation_loss(outputs, labels), self.task.num_correct(outputs, labels)
        images = torch.full((), len(labels), device=outputs.device)
        self.sums += torch.stack([part.to(self.sums.dtype) for part in (loss, images, correct)])
        if self.task.kind != "class":
            self.outputs.append(outputs)
            self.labels.append(self.task.as_outputs(labels, outputs))

    def result(self) -> tuple[float, float]:
        """Return the mean loss, and accuracy, mean average precision or R².

        Mean average precision is over the classes with positive labels. R² is 1 − Σ (y − ŷ)² / Σ (y − ȳ)², averaged
        over the values that are predicted.
        """
        loss, images, correct = self.ranks.sum(self.sums).tolist()
        if self.task.kind == "class":
            return loss / images, correct / images
        empty = torch.empty(0, self.task.num_outputs, device=self.sums.device)
        outputs, labels = (
            self.ranks.gather(torch.cat([empty, *rows])).double() for rows in (self.outputs, self.labels)
        )
        if self.task.kind == "values":
            return loss / images, float(coefficients_of_determination(outputs, labels).mean())
        return loss / images, mean_average_precision(outputs, labels)


def mean_average_precision(outputs: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the area under precision over recall (VOC 2010's AP, without interpolation).

    Args:
        outputs: (N, C), higher for more certain labels. labels: (N, C) zeros and ones. A class without positive labels
            does not count.
    """
    each = average_precisions(outputs, labels)
    present = each[each.isfinite()]
    return float(present.mean()) if len(present) else 0.0


def average_precisions(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return (C,) what `mean_average_precision` averages; NaN for a class without positive labels."""
    from torchmetrics.functional.classification import binary_average_precision

    found = torch.full(labels.shape[1:], math.nan, dtype=torch.float64)
    for c in range(labels.shape[1]):
        if bool((labels[:, c] > 0.5).any()):
            found[c] = binary_average_precision(outputs[:, c].sigmoid(), (labels[:, c] > 0.5).long())
    return found


def coefficients_of_determination(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return (C,) R² = 1 − Σ (y − ŷ)² / Σ (y − ȳ)² of each value, from (N, C); NaN or −inf for a constant one."""
    return 1 - (targets - outputs).square().sum(0) / (targets - targets.mean(0)).square().sum(0)
