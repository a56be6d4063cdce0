"""Confidence intervals of shares."""

from __future__ import annotations

import math

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


def wilson(hits: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of the share `hits` / `total` of independent images.

    With p the share, n the total and z = 1.96, it is (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n) (Wilson 1927).
    """
    share, extra = hits / total, _Z**2 / total
    centre, half = share + extra / 2, _Z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    return max(0.0, (centre - half) / (1 + extra)), min(1.0, (centre + half) / (1 + extra))
