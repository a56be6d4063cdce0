"""Evaluate a model on labelled images: classes, several labels per image, or values."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fastprompt.arguments import ArgumentError, ArgumentTypeError, argument_names
from fastprompt.train.batches import Batches
from fastprompt.vit.linear import bfloat16_is_fast

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate` over N images and C classes.

    Attributes:
        accuracy: share of images whose most probable class is the label.
        per_class: (C,) accuracy within each true class; NaN for a class without images.
        mean_per_class: mean of `per_class` over the classes that occur.
        confusion: (C, C) int64 counts; rows are true classes, columns predicted ones.
        loss: mean cross-entropy in nats.
        ece: expected calibration error of the top class, 15 equal-width bins (Guo et al. 2017).
        macro_f1: 2 TP / (2 TP + FP + FN), averaged over the classes that occur as label or prediction.
        top5_accuracy: share of images whose label is one of the five most probable classes.
        probabilities: (N, C) float32. labels: (N,) int64, in the order of the data.
        seconds: wall time, including reading the data.
    """

    accuracy: float
    per_class: Tensor
    mean_per_class: float
    confusion: Tensor
    loss: float
    ece: float
    macro_f1: float
    top5_accuracy: float
    probabilities: Tensor
    labels: Tensor
    seconds: float

    @property
    def predictions(self) -> Tensor:
        """(N,) the most probable class."""
        return self.probabilities.argmax(-1)

    @property
    def correct(self) -> Tensor:
        """(N,) bool, for `fastprompt.train.grid.paired_difference`."""
        return self.predictions == self.labels


@dataclass(frozen=True)
class LabelsEvaluation:
    """The result of `evaluate` for a model that predicts several labels per image, over N images and C labels.

    Attributes:
        map: mean average precision over the labels that occur (`fastprompt.train.tasks.mean_average_precision`).
        per_label: (C,) average precision of each; NaN for a label that no image has.
        loss: mean binary cross-entropy in nats.
        probabilities: (N, C) float32, each label's own. labels: (N, C) bool, in the order of the data.
        seconds: wall time, including reading the data.
    """

    map: float
    per_label: Tensor
    loss: float
    probabilities: Tensor
    labels: Tensor
    seconds: float

    def predictions(self, thresholds: float | Tensor = 0.5) -> Tensor:
        """(N, C) bool: the labels whose probability reaches one threshold, or the label's own (C,)."""
        return self.probabilities >= thresholds

    def f1(self, thresholds: float | Tensor = 0.5) -> Tensor:
        """(C,) 2 TP / (2 TP + FP + FN) at these thresholds; NaN for a label that is neither there nor predicted."""
        found = self.predictions(thresholds)
        both = (found & self.labels).sum(0).double()
        return 2 * both / (found.sum(0) + self.labels.sum(0))

    def best_thresholds(self) -> Tensor:
        """(C,) the thresholds with the highest F1 on these images: choose them on validation, not on the test split.

        Each is a probability that occurs, the highest of several with the same F1; 1 for a label that no image has.
        """
        order = self.probabilities.sort(dim=0, descending=True)
        hits = self.labels.gather(0, order.indices).double().cumsum(0)
        count = torch.arange(1, len(hits) + 1, dtype=torch.float64)[:, None]
        f1 = 2 * hits / (count + self.labels.sum(0))
        last = torch.ones_like(self.labels)  # of images with the same probability, which a threshold cannot part
        last[:-1] = order.values[:-1] != order.values[1:]
        best = f1.where(last, f1.new_tensor(-1.0)).argmax(0)
        found = order.values.gather(0, best[None])[0]
        return found.where(self.labels.any(0), torch.ones_like(found))


@dataclass(frozen=True)
class ValuesEvaluation:
    """The result of `evaluate` for a model that predicts values, over N images and C values each.

    Attributes:
        r2: coefficient of determination, averaged over the values. per_value: (C,) of each; NaN for a constant.
        mae, rmse: mean absolute error, and root of the mean squared error, over all values.
        predictions, targets: (N, C) float32, in the order of the data.
        seconds: wall time, including reading the data.
    """

    r2: float
    per_value: Tensor
    mae: float
    rmse: float
    predictions: Tensor
    targets: Tensor
    seconds: float


def summarise_labels(logits: Tensor, labels: Tensor, seconds: float) -> LabelsEvaluation:
    """Compute a `LabelsEvaluation` from logits (N, C) and labels (N, C) of zeros and ones."""
    from fastprompt.train.tasks import average_precisions

    per_label = average_precisions(logits.double(), labels)
    present = per_label[per_label.isfinite()]
    return LabelsEvaluation(
        map=float(present.mean()) if len(present) else 0.0,
        per_label=per_label,
        loss=float(F.binary_cross_entropy_with_logits(logits.double(), labels.double())),
        probabilities=logits.double().sigmoid().float(),
        labels=labels > 0.5,
        seconds=seconds,
    )


def summarise_values(outputs: Tensor, targets: Tensor, seconds: float) -> ValuesEvaluation:
    """Compute a `ValuesEvaluation` from outputs (N, C) and targets (N, C) or (N,)."""
    from fastprompt.train.tasks import coefficients_of_determination

    targets = targets.double().reshape(outputs.shape)
    errors = outputs.double() - targets
    per_value = coefficients_of_determination(outputs.double(), targets)
    return ValuesEvaluation(
        r2=float(per_value.mean()),
        per_value=per_value,
        mae=float(errors.abs().mean()),
        rmse=float(errors.square().mean().sqrt()),
        predictions=outputs.float(),
        targets=targets.float(),
        seconds=seconds,
    )


def summarise(logits: Tensor, labels: Tensor, seconds: float) -> Evaluation:
    """Compute an `Evaluation` from logits (N, C) and labels (N,)."""
    # Imported here because torchmetrics imports torchvision, and transformers and matplotlib if they are installed.
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
        multiclass_f1_score,
    )

    num_classes = logits.shape[1]
    log_probabilities = logits.double().log_softmax(-1)
    probabilities = log_probabilities.exp().float()
    scores, size = probabilities.double(), num_classes
    if num_classes == 1:  # torchmetrics takes two classes or more
        scores, size = F.pad(scores, (0, 1)), 2
    confusion = multiclass_confusion_matrix(scores, labels, size)[:num_classes, :num_classes]
    counts = confusion.sum(1)
    per_class = confusion.diagonal().double() / counts  # NaN (0 / 0) for a class without images
    return Evaluation(
        accuracy=float(confusion.diagonal().sum() / len(labels)),
        per_class=per_class,
        mean_per_class=float(per_class[counts > 0].mean()),
        confusion=confusion,
        loss=float(F.nll_loss(log_probabilities, labels)),
        ece=float(multiclass_calibration_error(scores, labels, size, n_bins=15, norm="l1")),
        macro_f1=float(multiclass_f1_score(scores, labels, size, average="macro")),
        top5_accuracy=float(multiclass_accuracy(scores, labels, size, average="micro", top_k=min(5, size))),
        probabilities=probabilities,
        labels=labels,
        seconds=seconds,
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype that a recipe's `dtype` means on a device; warn if the device emulates bfloat16."""
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


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context with the model in eval mode and without gradients; restores the mode of every module."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def backbone_precision(model: PromptedViT, dtype: torch.dtype | None) -> Iterator[None]:
    """Context with the backbone in another dtype; frozen tensors are restored exactly at the end."""
    before = model.backbone_dtype
    if dtype is None or dtype == before:
        yield
        return
    backbone = model.backbone
    named = dict((*backbone.named_parameters(), *backbone.named_buffers()))
    frozen = {name: tensor.data for name, tensor in named.items() if not tensor.requires_grad}
    model.set_backbone_dtype(dtype)
    try:
        yield
    finally:
        model.set_backbone_dtype(before)
        for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers()):
            if name in frozen and frozen[name].device == tensor.device:
                tensor.data = frozen[name]


@contextlib.contextmanager
def activation_bits(model: PromptedViT, bits: int | None) -> Iterator[None]:
    """Context in which activations are kept in `bits` bits (`Recipe.activation_bits`)."""
    before = model.activation_bits
    with argument_names(bits="activation_bits"):
        model.set_activation_bits(bits)
    try:
        yield
    finally:
        model.set_activation_bits(before)


@contextlib.contextmanager
def latent_samples(model: PromptedViT, num_samples: int | None) -> Iterator[None]:
    """Context with the configuration's `inference_samples` (V²APT) set to `num_samples`, unless that is None."""
    generator: Any = model.generator
    if num_samples is None:
        yield
        return
    config = generator.config
    generator.config = dataclasses.replace(config, inference_samples=num_samples)
    try:
        yield
    finally:
        generator.config = config


@dataclass(frozen=True)
class _Classes:
    """Maps the labels of a data set to the classes of a model.

    Attributes:
        names: names of the labels. index: (labels,) int64, the model's class, or -1 if it has none of that name.
    """

    names: list[str]
    index: Tensor

    def of(self, labels: Tensor) -> Tensor:
        """Convert labels (N,) to the model's classes; raise `ValueError` for a class that it does not have."""
        found = self.index[labels]
        unknown = sorted({self.names[label] for label in labels[found < 0].tolist()})
        if unknown:
            raise ArgumentError(
                "dataset",
                f"must have images of the model's classes only, got images of {', '.join(unknown[:10])}; pass "
                "class_names=model.class_names if labels are the model's class numbers",
            )
        return found


def _matched_classes(model: PromptedViT, dataset: Any, class_names: Sequence[str] | None) -> _Classes | None:
    """Match the labels to the model's classes by name; return None if labels are its class numbers."""
    from fastprompt.model import class_names_of, stated_by

    names = class_names_of(dataset) if class_names is None else list(class_names)
    if names is None or model.class_names is None or names == model.class_names:
        return None
    for whose, each in (("dataset", names), ("the model", model.class_names)):
        twice = [name for name in each if each.count(name) > 1]
        if twice:
            raise ValueError(f"classes are matched by name, but {whose} has several named {twice[0]!r}")
    own = {name: number for number, name in enumerate(model.class_names)}
    classes = _Classes(names, torch.tensor([own.get(name, -1) for name in names]))
    labels = stated_by(dataset, "labels", "targets")
    if not own.keys() & set(names):
        labels = range(len(names))  # not one class in common
    if labels is not None and not isinstance(dataset.dataset if isinstance(dataset, DataLoader) else dataset, Subset):
        classes.of(torch.as_tensor(list(labels)))
    missing = [name for name in model.class_names if name not in names]
    if missing:
        warnings.warn(
            f"the dataset lacks {', '.join(missing[:10])}{', ...' if len(missing) > 10 else ''} of the model's "
            f"{len(own)} classes; its {len(names)} classes are matched by name",
            stacklevel=3,
        )
    return classes


def evaluate(
    model: PromptedViT,
    dataset: Any,
    batch_size: int = 64,
    *,
    num_samples: int | None = None,
    num_workers: int = 0,
    class_names: Sequence[str] | None = None,
    domain: str | None = None,
) -> Evaluation | LabelsEvaluation | ValuesEvaluation:
    """Evaluate the model once over the data, in eval mode; the modes of its modules are restored.

    What the labels are is what the model predicts (`PromptedViT.predicts`, which `fit` sets): classes, (N,) integers,
    give an `Evaluation`; several labels per image, (N, C) zeros and ones, a `LabelsEvaluation`; floating-point values,
    (N, C), or (N,) if C is 1, a `ValuesEvaluation`.

    Classes are matched by name if both model and data have class names: a model of `bird`, `cat` and `dog` can be
    evaluated on a folder with only `cat` and `dog`, and the result uses the model's classes. If either has no names,
    label i is the model's class i.

    Args:
        model: a model with a head (num_classes given).
        dataset: a Dataset yielding (image, label), an (images, labels) pair of tensors, or a DataLoader.
        batch_size: images per forward; ignored for a DataLoader.
        num_samples: for a method with `inference_samples` (V²APT), number of latent samples over which class
            probabilities are averaged; None uses the configured number.
        num_workers: number of processes that load a Dataset.
        class_names: names of the data's labels; None uses those of the data set (`class_names` or torchvision's
            `classes`). Pass `model.class_names` if labels are the model's own class numbers.
        domain: for a model of several domains, the domain of all images, to which predictions are then limited. None
            leaves a union of labels open; with a head for each domain, every image is given to the head of its label.

    Raises:
        TypeError, ValueError: the model has no head, or the data are empty or have wrong images, wrong labels, or
            images of a class that the model does not have; or a logit is NaN or infinite.
    """
    if model.num_classes is None:
        raise ArgumentError("model", "must have a head to be evaluated: build it with num_classes=")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int):
        raise ArgumentTypeError("batch_size", f"must be an integer, got {type(batch_size).__name__}")
    if batch_size < 1:
        raise ArgumentError("batch_size", f"must be at least 1, got {batch_size}")
    if num_samples is not None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ArgumentError("num_samples", f"must be a positive integer or None, got {num_samples!r}")
        if not hasattr(model.config, "inference_samples"):
            raise ArgumentError(
                "num_samples",
                f"must be None for a method that draws no samples at inference, got {num_samples}: "
                f"{model.config.kind!r} has no option inference_samples, unlike V²APT",
            )
    if model.predicts != "class":
        return _evaluate_rows(model, dataset, batch_size, num_samples, num_workers)
    if domain is not None and model.domains is None:
        raise ArgumentError("domain", f"must be None: the model was trained on one data set, got {domain!r}")
    if domain is not None and model.domains is not None:
        model.domains.index(domain)
    classes = _matched_classes(model, dataset, class_names)
    batches = Batches(
        dataset,
        batch_size,
        name="dataset",
        num_classes=model.num_classes if classes is None else len(classes.index),
        device=device_of(model),
        num_workers=num_workers,
    )
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    began = time.perf_counter()
    with evaluation_mode(model), latent_samples(model, num_samples):
        for images, targets in batches.epoch():
            of_model = targets.cpu() if classes is None else classes.of(targets.cpu())
            logits.append(model(images).float().cpu())
            model.check_outputs(images, logits[-1])
            labels.append(of_model)
            if domain is not None and model.domains is not None:
                logits[-1] = model.domains.only(logits[-1], domain)
            elif model.domains is not None:
                logits[-1] = model.domains.of_its_domain(logits[-1], of_model)
    return summarise(torch.cat(logits), torch.cat(labels), time.perf_counter() - began)


def evaluate_classes(model: PromptedViT, dataset: Any, batch_size: int = 64, **options: Any) -> Evaluation:
    """`evaluate` a model that predicts classes.

    Raises:
        TypeError, ValueError: as `evaluate`, or the model predicts something else.
    """
    found = evaluate(model, dataset, batch_size, **options)
    if not isinstance(found, Evaluation):
        raise ArgumentError("model", f"must predict classes, got one that predicts {model.predicts}")
    return found


def _evaluate_rows(
    model: PromptedViT, dataset: Any, batch_size: int, num_samples: int | None, num_workers: int
) -> LabelsEvaluation | ValuesEvaluation:
    """`evaluate` a model that predicts several labels or values."""
    assert model.num_classes is not None
    batches = Batches(
        dataset,
        batch_size,
        name="dataset",
        num_classes=model.num_classes,
        kind=model.predicts,
        device=device_of(model),
        num_workers=num_workers,
    )
    outputs: list[Tensor] = []
    labels: list[Tensor] = []
    began = time.perf_counter()
    with evaluation_mode(model), latent_samples(model, num_samples):
        for images, targets in batches.epoch():
            outputs.append(model(images).float().cpu())
            model.check_outputs(images, outputs[-1])
            labels.append(targets.cpu())
    summarised = summarise_labels if model.predicts == "labels" else summarise_values
    return summarised(torch.cat(outputs), torch.cat(labels), time.perf_counter() - began)
