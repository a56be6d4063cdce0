"""Ranks of methods over several tasks, and which of them differ (Demšar 2006)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastprompt.extras import needed

LEVEL = 0.05
LEAST_TASKS = 5
"""With fewer tasks the test hardly ever finds a difference."""


@dataclass(frozen=True)
class Ranking:
    """Methods by their mean rank over tasks; 1 is the best accuracy, and equal ones share the mean of their ranks.

    Attributes:
        ranks: method -> mean rank, the best first.
        critical: mean ranks that differ by at least this much differ significantly (Nemenyi's test, level 0.05).
        p: of Friedman's test that all methods are alike; None for two methods.
        alike: the largest groups of methods whose mean ranks are closer than `critical`, each from best to worst.
    """

    ranks: Mapping[str, float]
    critical: float
    p: float | None
    alike: tuple[tuple[str, ...], ...]


def ranking(accuracies: Mapping[str, Sequence[float]]) -> Ranking:
    """Rank methods by their accuracies on the same tasks, (tasks,) for each of at least two methods."""
    with needed("report", "ranks"):
        from scipy.stats import friedmanchisquare, rankdata
    table = np.array(list(accuracies.values()), dtype=np.float64).T  # (tasks, methods)
    means = rankdata(-table, axis=1).mean(axis=0)
    ranks = dict(sorted(zip(accuracies, map(float, means), strict=True), key=lambda pair: pair[1]))
    critical = critical_difference(len(ranks), len(table))
    different = bool((table != table[:, :1]).any())
    p = float(friedmanchisquare(*table.T).pvalue) if len(ranks) > 2 and different else None
    names, groups = list(ranks), list[tuple[str, ...]]()
    for i, first in enumerate(names):
        group = tuple(name for name in names[i:] if ranks[name] - ranks[first] < critical)
        if len(group) > 1 and not (groups and set(group) <= set(groups[-1])):
            groups.append(group)
    return Ranking(ranks, critical, p, tuple(groups))


def critical_difference(methods: int, tasks: int) -> float:
    """Return by how much two of so many mean ranks must differ, q √(k (k + 1) / (6 n)), with Nemenyi's q."""
    with needed("report", "ranks"):
        from scipy.stats import studentized_range
    q = float(studentized_range.ppf(1 - LEVEL, methods, math.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * tasks))
