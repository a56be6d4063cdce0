"""Intervals over seeds and images, differences of methods on the same images, and many comparisons at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastprompt.arguments import ArgumentError
from fastprompt.extras import needed


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty.

    Attributes:
        mean: the estimate.
        variance: of the mean; NaN if it cannot be estimated.
        df: degrees of freedom of the variance.
        level: confidence level of `interval`.
    """

    mean: float
    variance: float
    df: float
    level: float = 0.95

    @property
    def half(self) -> float:
        """Half the width of the t interval."""
        with needed("report", "confidence intervals"):
            from scipy.stats import t

        return float(t.ppf((1 + self.level) / 2, self.df)) * math.sqrt(self.variance)

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high), a t interval."""
        return self.mean - self.half, self.mean + self.half

    @property
    def p_value(self) -> float:
        """Two-sided p-value of a mean of 0 (t test); NaN without a variance."""
        with needed("report", "confidence intervals"):
            from scipy.stats import t

        if math.isnan(self.variance):
            return math.nan
        if self.variance == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * t.sf(abs(self.mean) / math.sqrt(self.variance), self.df))

    def to_dict(self) -> dict[str, float | None]:
        """Return mean, ends of the interval and p-value as JSON values; None for NaN."""
        low, high = self.interval
        values = {"mean": self.mean, "low": low, "high": high, "p": self.p_value}
        return {key: None if math.isnan(value) else value for key, value in values.items()}


def over_seeds_and_images(values: Any, level: float = 0.95) -> Estimate:
    """Estimate the mean of one number per seed and image, when both are samples.

    With seeds s = 1 ... S and images n = 1 ... N crossed, the variance of the mean is (MS_s + MS_n − MS_e) / (S N), the
    mean squares of a two-way analysis of variance without replication; its degrees of freedom are Satterthwaite's
    (1946). It is at least the variance over images alone and that over seeds alone, which covers a negative estimate of
    a component. A single seed leaves the variance over images.

    Args:
        values: (S, N) numbers, such as whether an image was classified correctly, or a difference of two methods.

    Raises:
        ValueError: there are fewer than two images, or numbers are not finite.
    """
    x = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if x.ndim != 2 or x.shape[1] < 2 or not np.isfinite(x).all():
        raise ArgumentError("values", f"must be finite numbers (seeds, at least 2 images), got shape {x.shape}")
    seeds, images = x.shape
    mean, of_seeds, of_images = x.mean(), x.mean(1), x.mean(0)
    ms_images = seeds * of_images.var(ddof=1)
    if seeds == 1:
        return Estimate(float(mean), float(ms_images / images), images - 1, level)
    ms_seeds = images * of_seeds.var(ddof=1)
    rest = x - of_seeds[:, None] - of_images[None, :] + mean
    ms_rest = (rest**2).sum() / ((seeds - 1) * (images - 1))
    total = ms_seeds + ms_images - ms_rest
    parts = ((ms_seeds, seeds - 1), (ms_images, images - 1))
    floor, df = max(parts)
    if total > floor:
        squares = sum(ms**2 / free for ms, free in (*parts, (ms_rest, (seeds - 1) * (images - 1))))
        floor, df = total, total**2 / squares
    return Estimate(float(mean), float(floor / x.size), float(df), level)


def over_seeds(values: Sequence[float], level: float = 0.95) -> Estimate:
    """Estimate the mean of one number per seed; a single seed leaves its variance unknown (NaN)."""
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return Estimate(float(x.mean()), math.nan, math.nan, level)
    return Estimate(float(x.mean()), float(x.var(ddof=1) / len(x)), len(x) - 1, level)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """Average independent estimates, such as those of different tasks; the tasks themselves are no sample."""
    if not estimates:
        raise ArgumentError("estimates", "must hold at least one, got none")
    count = len(estimates)
    variances = [each.variance for each in estimates]
    total = sum(variances)
    squares = sum(each.variance**2 / each.df for each in estimates)
    df = total**2 / squares if squares > 0 else min(each.df for each in estimates)
    return Estimate(sum(each.mean for each in estimates) / count, total / count**2, df, estimates[0].level)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's (1979) adjusted p-values, in the order given; NaN ones are no comparisons and stay NaN."""
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[i] = largest
    return adjusted
