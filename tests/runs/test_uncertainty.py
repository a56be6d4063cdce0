from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fastprompt.runs.uncertainty import average, holm, over_seeds, over_seeds_and_images


def test_one_seed_is_a_t_interval_over_images() -> None:
    values = np.random.default_rng(0).integers(0, 2, (1, 40)).astype(float)
    found = over_seeds_and_images(values)
    low, high = stats.t.interval(0.95, 39, values.mean(), stats.sem(values[0]))
    assert found.interval == pytest.approx((low, high))
    assert found.p_value == pytest.approx(stats.ttest_1samp(values[0], 0).pvalue)


def test_the_interval_covers_new_seeds_and_new_images() -> None:
    """Effects of seeds and images are drawn, the true mean is 0; an interval over images alone misses it often."""
    random = np.random.default_rng(0)
    both, images_alone = [], []
    for _ in range(400):
        x = random.normal(0, 0.5, (5, 1)) + random.normal(0, 1, (1, 60)) + random.normal(0, 1, (5, 60))
        low, high = over_seeds_and_images(x).interval
        both.append(low <= 0 <= high)
        low, high = over_seeds_and_images(x.mean(0, keepdims=True)).interval
        images_alone.append(low <= 0 <= high)
    assert 0.92 <= np.mean(both) <= 0.99
    assert np.mean(images_alone) < 0.85


def test_no_interval_is_shorter_than_that_of_one_source_alone() -> None:
    random = np.random.default_rng(1)
    for _ in range(20):
        x = random.normal(0, 1, (3, 10))
        found = over_seeds_and_images(x)
        assert found.variance >= x.mean(0).var(ddof=1) / 10 - 1e-12
        assert found.variance >= x.mean(1).var(ddof=1) / 3 - 1e-12


def test_equal_methods_differ_by_nothing() -> None:
    found = over_seeds_and_images(np.zeros((3, 5)))
    assert found.interval == (0, 0)
    assert found.p_value == 1
    assert over_seeds_and_images(np.ones((3, 5))).p_value == 0


def test_over_seeds_alone() -> None:
    assert over_seeds([0.1, 0.3, 0.2]).interval == pytest.approx(stats.t.interval(0.95, 2, 0.2, 0.1 / math.sqrt(3)))
    single = over_seeds([0.4])
    assert single.to_dict() == {"mean": 0.4, "low": None, "high": None, "p": None}


def test_the_average_of_tasks() -> None:
    random = np.random.default_rng(2)
    estimates = [over_seeds_and_images(random.normal(i, 1, (1, 30))) for i in range(4)]
    found = average(estimates)
    assert found.mean == pytest.approx(sum(e.mean for e in estimates) / 4)
    assert found.variance == pytest.approx(sum(e.variance for e in estimates) / 16)
    assert 29 < found.df <= 4 * 29


def test_holm_on_his_example_of_three() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    corrected = holm([0.5, math.nan, 0.001])
    assert corrected[0] == 0.5
    assert math.isnan(corrected[1])
    assert corrected[2] == pytest.approx(0.002)


@pytest.mark.parametrize("values", [np.ones((2, 1)), [[0.0, math.nan]], np.ones((2, 2, 2))])
def test_wrong_values(values: object) -> None:
    with pytest.raises(ValueError, match="values must be finite numbers"):
        over_seeds_and_images(values)
    with pytest.raises(ValueError, match="estimates must hold"):
        average([])
