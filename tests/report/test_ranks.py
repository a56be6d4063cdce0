"""Ranks over tasks, against numbers of Demšar (2006)."""

from __future__ import annotations

import math

import pytest
from scipy.stats import friedmanchisquare

from fastprompt.report import plots
from fastprompt.report.ranks import critical_difference, ranking


@pytest.mark.parametrize(
    ("methods", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (10, 3.164)]
)
def test_critical_values_are_those_of_the_paper(methods: int, q: float) -> None:
    """Table 5a of Demšar (2006)."""
    for tasks in (10, 14):
        expected = q * math.sqrt(methods * (methods + 1) / (6 * tasks))
        assert critical_difference(methods, tasks) == pytest.approx(expected, rel=5e-4)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=5e-3)  # section 3.2.4


def test_ranks_ties_and_groups() -> None:
    accuracies = {
        "worst": [0.1] * 12,
        "best": [0.9] * 12,
        "second": [0.5] * 6 + [0.6] * 6,
        "alike": [0.6] * 6 + [0.5] * 6,
        "tied": [0.1] * 12,
    }
    found = ranking(accuracies)
    assert found.ranks == {"best": 1.0, "second": 2.5, "alike": 2.5, "worst": 4.5, "tied": 4.5}
    assert next(iter(found.ranks)) == "best"
    assert found.critical == pytest.approx(1.76, abs=0.01)
    assert found.alike == (("best", "second", "alike"), ("worst", "tied"))
    assert found.p == pytest.approx(friedmanchisquare(*accuracies.values()).pvalue)
    assert found.p < 1e-6


def test_two_methods_and_methods_that_never_differ() -> None:
    found = ranking({"a": [0.5] * 6, "b": [0.4] * 6})
    assert found.p is None
    assert found.alike == ()
    same = ranking({name: [0.5] * 6 for name in "abc"})
    assert same.p is None
    assert same.alike == (("a", "b", "c"),)


def test_the_plot_is_a_picture_whatever_the_names() -> None:
    found = ranking({"$a$": [0.1, 0.2, 0.3, 0.4, 0.5], "_b": [0.2] * 5, "c" * 40: [0.3, 0.1, 0.1, 0.1, 0.2]})
    assert plots.critical_differences(found).startswith(b"\x89PNG")
