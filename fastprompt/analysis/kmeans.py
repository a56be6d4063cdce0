"""Mutual information of features with the labels (PGN, Fig. 3)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprompt.analysis.features import collect
from fastprompt.analysis.library import has_library
from fastprompt.arguments import ArgumentError
from fastprompt.extras import needed

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


@dataclass(frozen=True)
class Information:
    """Mutual information of a clustering with the labels, in nats.

    Attributes:
        raw: the plug-in estimate I(cluster; label).
        bias: its mean over random permutations of the labels, where the truth is 0.
        corrected: raw − bias.
        std: standard deviation over the permutations; a corrected value of 2 of them is noise.
        entropy: H(label), the largest value that `raw` can take.
        clusters: number of clusters of k-means.
    """

    raw: float
    bias: float
    corrected: float
    std: float
    entropy: float
    clusters: int


def mutual_information(
    features: Any, labels: Any, *, clusters: int | None = None, permutations: int = 20, seed: int = 0
) -> Information:
    """Estimate the mutual information of features with labels by k-means.

    The features are standardised and clustered by k-means; the plug-in estimate of I(cluster; label) is biased upwards
    by about (clusters − 1)(classes − 1) / 2N, so the mean under permuted labels is subtracted. A clustering only loses
    information, so the value is a lower bound on that of the features. PGN's Fig. 3 uses k-means too; its number of
    clusters and a correction are not known to us, so values compare with each other, not with the paper's.

    Args:
        features: (N, D) numbers.
        labels: (N,) classes.
        clusters: number of clusters; None is the number of classes.
        permutations: number of permutations of the labels for bias and spread.
        seed: of k-means and the permutations.

    Raises:
        ValueError: shapes do not fit, or there are fewer images than clusters.
        ImportError: scikit-learn is not installed; it comes with the extra `report`.
    """
    with needed("report", "the mutual information"):
        from sklearn.cluster import KMeans

    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    if x.ndim != 2 or y.shape != (len(x),):
        raise ArgumentError("features", f"must be (N, D) with N labels, got {x.shape} and {y.shape}")
    if not np.isfinite(x).all():
        raise ArgumentError("features", "must be finite, got NaN or infinity")
    clusters = len(np.unique(y)) if clusters is None else clusters
    for name, value, low in (("clusters", clusters, 1), ("permutations", permutations, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ArgumentError(name, f"must be an integer of at least {low}, got {value!r}")
    if clusters > len(x):
        raise ArgumentError("clusters", f"must be at most the number of images, {len(x)}, got {clusters}")
    scale = x.std(0)
    x = (x - x.mean(0)) / np.where(scale > 1e-12, scale, 1)
    assigned = KMeans(clusters, n_init=4, random_state=seed).fit_predict(x)
    random = np.random.default_rng(seed)
    permuted = [_plug_in(assigned, random.permutation(y)) for _ in range(permutations)]
    raw, bias = _plug_in(assigned, y), float(np.mean(permuted))
    _, counts = np.unique(y, return_counts=True)
    shares = counts / len(y)
    entropy = float(-(shares * np.log(shares)).sum())
    std = float(np.std(permuted, ddof=1)) if permutations > 1 else math.nan
    return Information(raw, bias, raw - bias, std, entropy, clusters)


def _plug_in(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mutual information of two labellings by their counts, in nats."""
    from sklearn.metrics import mutual_info_score

    return float(mutual_info_score(a, b))


def information(model: PromptedViT, data: Any, *, batch_size: int = 64, **options: Any) -> dict[str, Information]:
    """Estimate `mutual_information` with the labels of what a prompted model computes (PGN, Fig. 3).

    Returns:
        "generator" (its prompts, for methods whose prompts depend on the image), "mixture" (with a token library),
        "backbone" and "prompted" features.

    Args:
        data: as in `fastprompt.evaluate`.
        options: as in `mutual_information`.
    """
    generator = model.generator
    sources = ["backbone", "prompted"]
    if has_library(model):
        sources.insert(0, "mixture")
    if generator is not None and generator.num_prompts and generator.known_at != "static":
        sources.insert(0, "generator")
    found = {}
    for source in sources:
        features, labels = collect(model, data, source, batch_size)
        found[source] = mutual_information(features.numpy(), labels.numpy(), **options)
    return found
