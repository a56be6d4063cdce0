"""The int8 product in C++ against its arithmetic in float64, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastprompt.int8 import native
from fastprompt.int8.arithmetic import (
    HIGHEST,
    MOST_INNER,
    packed,
    product,
    round_rows,
    round_weight,
    weight_scale,
)
from fastprompt.kernels import native as library
from fastprompt.vit.weights import ACTIVATIONS


@pytest.fixture(params=library.LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn, where the CPU has it."""
    assert not native.obstacle(), native.obstacle()
    before = library.level()
    if library.set_level(request.param) != request.param:
        library.set_level(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.set_level(before)


def weights(n: int, k: int) -> tuple[Tensor, Tensor]:
    weight = torch.randn(n, k)
    scale = weight_scale(weight)
    return round_weight(weight, scale), scale


@pytest.mark.parametrize(("rows", "k", "n"), [(5, 1, 20), (7, 33, 19), (13, 64, 16), (200, 515, 48), (2, 1030, 5)])
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_within_tolerance_of_float64(level: str, rows: int, k: int, n: int, activation: str) -> None:
    x, (weight, scale), bias = 3 * torch.randn(rows, k), weights(n, k), torch.randn(n)
    exact = product(x, weight, scale, bias)
    exact, plain = ACTIVATIONS[activation](exact), ACTIVATIONS[activation](product(x, weight, scale, bias).float())
    found = native.int8_linear(x, packed(weight), scale, bias, activation)
    bound = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= bound
    without = native.int8_linear(x, packed(weight), scale, None, activation)
    assert (without.double() - ACTIVATIONS[activation](product(x, weight, scale, None))).abs().max() <= bound


def integers(rows: int, k: int) -> Tensor:
    """Numbers that round to themselves: every row's largest is `HIGHEST`."""
    x = torch.randint(-HIGHEST, HIGHEST + 1, (rows, k)).float()
    x[:, 0] = HIGHEST
    return x


def test_sums_are_those_of_integers(level: str) -> None:
    x, weight = integers(9, 600), torch.randint(-128, 128, (20, 600), dtype=torch.int8)
    found = native.int8_linear(x, packed(weight), torch.ones(20), None)
    torch.testing.assert_close(found, (x.double() @ weight.double().t()).float(), rtol=0, atol=0)


@pytest.mark.parametrize("number", [-HIGHEST, HIGHEST])
@pytest.mark.parametrize("weight", [-128, 127])
def test_the_longest_rows_of_extremes_do_not_overflow(level: str, number: int, weight: int) -> None:
    x = torch.full((7, MOST_INNER), float(number))
    found = native.int8_linear(x, packed(torch.full((17, MOST_INNER), weight, dtype=torch.int8)), torch.ones(17), None)
    assert (found == torch.tensor(float(number * weight * MOST_INNER))).all()
    assert abs(number * weight * MOST_INNER) < 2**31


def test_longer_rows_are_refused() -> None:
    x, weight = torch.ones(1, MOST_INNER + 1), torch.ones(16, MOST_INNER + 1, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="at most 8192 columns"):
        native.int8_linear(x, packed(weight), torch.ones(16), None)


def test_rows_are_rounded_as_the_arithmetic_says(level: str) -> None:
    """With the identity as weight, the product is the rounded rows; halves show which way ties go."""
    x = torch.cat([torch.randn(50, 40) * torch.logspace(-30, 30, 50)[:, None], integers(1, 40) / 2])
    x[50, 0] = HIGHEST
    v, step = round_rows(x)
    found = native.int8_linear(x, packed(torch.eye(40, dtype=torch.int8)), torch.ones(40), None)
    torch.testing.assert_close(found, v * step, rtol=0, atol=0)


def test_rows_of_zeros_and_of_numbers_that_are_not_finite(level: str) -> None:
    x = torch.randn(6, 40)
    x[0], x[1], x[2, 3], x[3, 39], x[4, 0] = 0, 1e-40, torch.nan, torch.inf, -torch.inf
    (weight, scale), bias = weights(20, 40), torch.randn(20)
    found = native.int8_linear(x, packed(weight), scale, bias)
    assert torch.equal(found[0], bias)
    assert torch.equal(found[1], bias)
    assert found[2:5].isnan().all()
    assert found[5].isfinite().all()


def test_a_row_is_the_same_in_every_batch(level: str) -> None:
    x, (weight, scale) = torch.randn(300, 96), weights(50, 96)
    whole = native.int8_linear(x, packed(weight), scale, None, "gelu")
    for rows in (slice(0, 1), slice(7, 20), slice(150, 300)):
        assert torch.equal(native.int8_linear(x[rows], packed(weight), scale, None, "gelu"), whole[rows])


def test_shapes_and_arguments(level: str) -> None:
    weight, scale = weights(20, 40)
    assert native.int8_linear(torch.randn(2, 3, 40), packed(weight), scale, None).shape == (2, 3, 20)
    assert native.int8_linear(torch.ones(1, 1), packed(torch.ones(1, 1, dtype=torch.int8)), torch.ones(1), None) == 1
    assert native.int8_linear(torch.randn(0, 40), packed(weight), scale, None).shape == (0, 20)
    strided = torch.randn(40, 6).t()
    torch.testing.assert_close(
        native.int8_linear(strided, packed(weight), scale, None),
        native.int8_linear(strided.contiguous(), packed(weight), scale, None),
    )
    with pytest.raises(RuntimeError, match="weight has the wrong shape"):
        native.int8_linear(torch.randn(2, 42), packed(weight), scale, None)
    with pytest.raises(RuntimeError, match="x must be contiguous float32"):
        native.int8_linear(torch.randn(2, 40).double(), packed(weight), scale, None)
    torch.library.opcheck(native.OPERATOR, (torch.randn(3, 40), packed(weight), scale, torch.randn(20), 1))


def test_a_library_without_the_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    assert "without int8" in native.obstacle.__wrapped__()
