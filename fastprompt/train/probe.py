"""The linear probe: multinomial logistic regression on frozen features by L-BFGS, with C chosen on validation."""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fastprompt.arguments import ArgumentError
from fastprompt.domains import Domains
from fastprompt.extras import needed
from fastprompt.heads import LinearHead
from fastprompt.train.batches import Batches, as_tensor_pair, check_data, check_labels, is_tensor_pair, num_images
from fastprompt.train.evaluate import backbone_precision, device_of, evaluation_mode

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT
    from fastprompt.train.recipes import Recipe

LONG, FEW = 10, 5000
"""Epochs from which on, and training images up to which a probe costs little beside the run."""
C_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-12, 7))
"""Inverse regularisation strengths to try: 1e-6 to 1e3, two per decade."""

ABSENT_CLASS_MARGIN = 10.0
"""A class without training images gets weight 0 and a bias this far (nats) below the lowest one."""


@dataclass(frozen=True)
class ProbeResult:
    """The result of `fit_linear_probe`.

    Attributes:
        C: the chosen inverse regularisation strength.
        best_val_accuracy, best_val_loss: of the chosen C (loss: mean cross-entropy, nats).
        grid: one dict per C: C, train_accuracy, val_accuracy, val_loss, converged.
        at_edge: whether the chosen C is the first or last of the grid, so that a wider grid might do better.
        weight (C, width), bias (C,): float64, for the original features (standardisation is folded in).
        seconds: time for feature extraction and all fits. feature_seconds: time for extraction alone.
    """

    C: float
    best_val_accuracy: float
    best_val_loss: float
    grid: list[dict[str, Any]]
    at_edge: bool
    weight: Tensor
    bias: Tensor
    seconds: float
    feature_seconds: float


def is_worth_comparing(model: PromptedViT, train: Any, recipe: Recipe) -> bool:
    """Whether a linear probe can be fitted to compare a run with, and costs little beside it.

    That is from `LONG` epochs and up to `FEW` training images, for a linear head of one label space whose training is
    not a probe itself, if scikit-learn is installed.
    """
    from fastprompt.generators import method_of
    from fastprompt.model import stated_by

    domains, labels = stated_by(train, "domains"), getattr(train, "labels", None)
    return (
        recipe.epochs >= LONG
        and num_images(train, "train") <= FEW
        and isinstance(model.head, LinearHead)
        and not method_of(model.config).head_only
        and not (isinstance(domains, Domains) and domains.labels == "per-domain")
        and (labels is None or len({int(label) for label in labels}) > 1)
        and importlib.util.find_spec("sklearn") is not None
    )


def logistic_regression() -> type[Any]:
    """Return scikit-learn's `LogisticRegression`, or raise an ImportError that names the missing extra."""
    with needed("report", "the L-BFGS probe"):
        from sklearn.linear_model import LogisticRegression
    return LogisticRegression


def extract_features(
    model: nn.Module,
    data: Any,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    *,
    num_workers: int = 0,
    epoch: int = 0,
    kind: str = "class",
) -> tuple[Tensor, Tensor]:
    """Compute the features of every image in eval mode, in the order of the data.

    Args:
        model: a PromptedViT (its `forward_features`, which the head reads) or a backbone (its own features).
        data: a Dataset yielding (image, label), an (images, labels) pair of tensors, or a DataLoader.
        batch_size: images per forward.
        dtype: dtype of a PromptedViT's frozen backbone during extraction; None keeps the current one.
        num_workers: number of processes that load a Dataset.
        epoch: epoch that selects the augmented view of the images, if the data have `set_epoch`.
        kind: of labels (`fastprompt.train.tasks.kind_of_labels`).

    Returns:
        features (N, width), float32 or wider, and labels (N,) int64, or float32 of other kinds, both on the CPU.
    """
    batches = Batches(
        data,
        batch_size,
        name="data",
        num_classes=getattr(model, "num_classes", None) or 2**62,
        kind=kind,
        device=device_of(model),
        num_workers=num_workers,
    )
    forward = getattr(model, "forward_features", model)
    features, labels = [], []
    prompted: Any = model
    precision = backbone_precision(prompted, dtype) if hasattr(model, "backbone") else contextlib.nullcontext()
    with precision, evaluation_mode(model):
        for images, targets in batches.epoch(epoch):
            of_batch = forward(images)
            features.append(of_batch.to("cpu", torch.promote_types(of_batch.dtype, torch.float32)))
            labels.append(targets.cpu())
    return torch.cat(features), torch.cat(labels)


def fit_linear_probe(
    model: PromptedViT,
    train: Any,
    val: Any,
    C_grid: Sequence[float] | None = None,
    *,
    standardize: bool = True,
    batch_size: int = 64,
    max_iter: int = 1000,
    dtype: torch.dtype | None = None,
    num_workers: int = 0,
) -> ProbeResult:
    """Fit the model's linear head on its current features and choose C on validation.

    Solves min_{W, b} ½ ‖W‖² + C Σ_i CE(W x_i + b, y_i) in float64 (scikit-learn's LogisticRegression, L-BFGS) for
    every C of the grid. The highest validation accuracy wins, then the lower validation loss. The features are
    standardised with the training set's mean m and standard deviation s, which are folded into the head: W / s and
    b − W (m / s).

    Args:
        model: a model with `head="linear"`. Its head is overwritten; nothing else changes.
        train, val: as in `fastprompt.fit`, or (features (N, width), labels (N,)) pairs from
            `extract_features`.
        C_grid: positive numbers; None is `C_GRID`, 1e-6 to 1e3, two per decade.
        standardize: False fits on the original features.
        batch_size, dtype, num_workers: passed to `extract_features`.
        max_iter: maximum number of L-BFGS iterations per C (`converged` in the result says whether they sufficed).

    Raises:
        TypeError, ValueError: the head is not linear, the data are wrong or have a head for each domain, or the
            training set has a single class.
        ImportError: scikit-learn is not installed; it comes with the extra `report`.
    """
    from fastprompt.model import stated_by

    logistic_regression()  # fail before features are computed
    head = model.head
    if not isinstance(head, LinearHead):
        kind = None if head is None else head.kind
        raise ArgumentError(
            "model", f"must have a linear head, got {kind!r}: build it with num_classes= and head='linear'"
        )
    num_classes, width = head.num_classes, head.width
    grid = tuple(float(c) for c in (C_GRID if C_grid is None else C_grid))
    if not grid or not all(np.isfinite(c) and c > 0 for c in grid):
        raise ValueError(f"C_grid must hold positive finite numbers, got {C_grid!r}")
    domains = stated_by(train, "domains")
    if isinstance(domains, Domains) and domains.labels == "per-domain":
        raise ArgumentError(
            "train", "must have one label space for the probe's L-BFGS (labels='union'), got a head for each domain"
        )
    began = time.perf_counter()
    pairs = []
    for name, data in (("train", train), ("val", val)):
        if is_tensor_pair(data) and data[0].ndim == 2:
            features, labels = as_tensor_pair(data)
            check_labels(labels, name, num_classes)
            if len(features) != len(labels) or len(labels) == 0 or features.shape[1] != width:
                raise ArgumentError(
                    name,
                    f"must have features (N, {width}) and N > 0 labels, got "
                    f"{tuple(features.shape)} and {tuple(labels.shape)}",
                )
        else:
            check_data(data, name, num_classes)
            features, labels = extract_features(model, data, batch_size, dtype, num_workers=num_workers)
        if not torch.isfinite(features).all():
            raise ArgumentError(name, "must have finite features, got NaN or infinity")
        pairs.append((head.chosen(features).double().cpu().numpy(), labels.cpu().numpy()))
    feature_seconds = time.perf_counter() - began
    (x, y), (x_val, y_val) = pairs
    if len(np.unique(y)) < 2:
        raise ArgumentError("train", f"must have images of at least two classes, got only class {int(y[0])}")

    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if standardize:
        mean, scale = x.mean(0), x.std(0)
        scale[scale < 1e-12 * max(1.0, scale.max())] = 1.0
    rows: list[dict[str, Any]] = []
    best: tuple[tuple[float, float], np.ndarray, np.ndarray] | None = None
    for c, weight, bias, converged in _regularisation_path((x - mean) / scale, y, sorted(grid), num_classes, max_iter):
        weight = weight / scale
        bias = bias - weight @ mean
        accuracy, loss = _score(x_val @ weight.T + bias, y_val)
        rows.append(
            {
                "C": c,
                "train_accuracy": _score(x @ weight.T + bias, y)[0],
                "val_accuracy": accuracy,
                "val_loss": loss,
                "converged": converged,
            }
        )
        if best is None or (accuracy, -loss) > best[0]:
            best = ((accuracy, -loss), weight, bias)
            chosen = c
    assert best is not None
    (accuracy, negative_loss), weight, bias = best
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return ProbeResult(
        C=chosen,
        best_val_accuracy=accuracy,
        best_val_loss=-negative_loss,
        grid=rows,
        at_edge=len(grid) > 1 and chosen in (min(grid), max(grid)),
        weight=torch.from_numpy(weight),
        bias=torch.from_numpy(bias),
        seconds=time.perf_counter() - began,
        feature_seconds=feature_seconds,
    )


def _regularisation_path(
    x: np.ndarray, y: np.ndarray, grid: Sequence[float], num_classes: int, max_iter: int
) -> Iterator[tuple[float, np.ndarray, np.ndarray, bool]]:
    """Yield (C, weight (num_classes, width), bias (num_classes,), converged), with C increasing.

    Each fit is warm-started from the one before. With two classes, scikit-learn fits a single row w; the rows ∓w / 2
    give the same probabilities.
    """
    from sklearn.exceptions import ConvergenceWarning

    solver = logistic_regression()(solver="lbfgs", max_iter=max_iter, tol=1e-6, warm_start=True)
    for c in grid:
        solver.set_params(C=c)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            solver.fit(x, y)
        rows, bias = solver.coef_, solver.intercept_
        if len(solver.classes_) == 2:
            rows, bias = np.concatenate([-rows, rows]) / 2, np.concatenate([-bias, bias]) / 2
        weight = np.zeros((num_classes, x.shape[1]))
        full_bias = np.full(num_classes, bias.min() - ABSENT_CLASS_MARGIN)
        weight[solver.classes_], full_bias[solver.classes_] = rows, bias
        yield c, weight, full_bias, bool((solver.n_iter_ < max_iter).all())


def _score(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy of float64 logits (N, C)."""
    logits = logits - logits.max(1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return (
        float((logits.argmax(1) == labels).mean()),
        float(-log_probabilities[np.arange(len(labels)), labels].mean()),
    )
