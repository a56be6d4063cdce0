"""The int8 product in C++ against its arithmetic in float64, on every instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastprompt.int8 import native
from fastprompt.int8.arithmetic import (
    BITS,
    HIGHEST,
    MOST_INNER,
    Rounded,
    packed,
    product,
    round_rows,
    round_weight,
    unpacked,
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


def weights(n: int, k: int, bits: int = 12) -> Rounded:
    weight, factor = torch.randn(n, k), 0.5 + torch.rand(k)
    scale = weight_scale(weight / factor)
    return Rounded(round_weight(weight / factor, scale), scale, factor, bits)


def of_integers(weight: Tensor, bits: int = 12) -> Rounded:
    return Rounded(weight, torch.ones(weight.shape[0]), torch.ones(weight.shape[1]), bits)


def run(
    x: Tensor, rounded: Rounded, bias: Tensor | None = None, activation: str = "identity", in_bfloat16: bool = False
) -> Tensor:
    return native.int8_linear(
        x,
        packed(rounded.weight),
        rounded.scale,
        bias,
        activation,
        bits=rounded.bits,
        factor=None if (rounded.factor == 1).all() else rounded.factor,
        sums=rounded.weight.sum(dim=1, dtype=torch.int32),
        in_bfloat16=in_bfloat16,
    )


SIZES = [(5, 1, 20), (7, 33, 19), (13, 64, 16), (200, 515, 48), (2, 1030, 5)]


@pytest.mark.parametrize(("rows", "k", "n"), SIZES)
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
@pytest.mark.parametrize("bits", BITS)
def test_within_tolerance_of_float64(level: str, rows: int, k: int, n: int, activation: str, bits: int) -> None:
    x, rounded, bias = 3 * torch.randn(rows, k), weights(n, k, bits), torch.randn(n)
    exact = product(x, rounded, bias)
    exact, plain = ACTIVATIONS[activation](exact), ACTIVATIONS[activation](product(x, rounded, bias).float())
    found = run(x, rounded, bias, activation)
    bound = 2 * (plain.double() - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= bound
    without = run(x, rounded, None, activation)
    assert (without.double() - ACTIVATIONS[activation](product(x, rounded, None))).abs().max() <= bound


@pytest.mark.parametrize("bits", BITS)
def test_bfloat16_rows_and_results(level: str, bits: int) -> None:
    """Rows of bfloat16 are those numbers, and a result in bfloat16 is the float32 one, rounded."""
    x, rounded, bias = torch.randn(29, 70).bfloat16(), weights(50, 70, bits), torch.randn(50)
    found = run(x, rounded, bias, "silu")
    assert found.dtype == torch.float32
    assert torch.equal(found, run(x.float(), rounded, bias, "silu"))
    narrow = run(x, rounded, bias, "silu", in_bfloat16=True)
    assert torch.equal(narrow, found.bfloat16())


def integers(rows: int, k: int, bits: int) -> Tensor:
    """Numbers that round to themselves: every row's range is that of the rounded numbers."""
    if bits == 8:
        x = torch.randint(-100, 156, (rows, k)).float()
        x[:, 0], x[:, 1] = -100, 155
    else:
        x = torch.randint(-HIGHEST, HIGHEST + 1, (rows, k)).float()
        x[:, 0] = HIGHEST
    return x


@pytest.mark.parametrize("bits", BITS)
def test_sums_are_those_of_integers(level: str, bits: int) -> None:
    x, weight = integers(9, 600, bits), torch.randint(-128, 128, (20, 600), dtype=torch.int8)
    found = run(x, of_integers(weight, bits))
    torch.testing.assert_close(found, (x.double() @ weight.double().t()).float(), rtol=0, atol=0)


@pytest.mark.parametrize("number", [-HIGHEST, HIGHEST])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("bits", BITS)
def test_the_longest_rows_of_extremes_do_not_overflow(level: str, number: int, weight: int, bits: int) -> None:
    x, step = torch.full((7, MOST_INNER), float(number)), HIGHEST if bits == 12 else 255
    found = run(x, of_integers(torch.full((17, MOST_INNER), weight, dtype=torch.int8), bits))
    exact = torch.tensor(float(number * weight * MOST_INNER))
    torch.testing.assert_close(found, exact.expand(7, 17), rtol=2e-7, atol=0)
    assert abs(step * weight * MOST_INNER) < 2**31
    x[:, ::2] *= -1  # at 8 bits both ends of the range
    weights = torch.full((17, MOST_INNER), weight, dtype=torch.int8)
    weights[:, ::2] = -127
    rounded = of_integers(weights, bits)
    torch.testing.assert_close(run(x, rounded).double(), product(x, rounded, None), rtol=2e-7, atol=0)


def test_longer_rows_are_refused() -> None:
    x, weight = torch.ones(1, MOST_INNER + 1), torch.ones(16, MOST_INNER + 1, dtype=torch.int8)
    with pytest.raises(RuntimeError, match="at most 8192 columns"):
        native.int8_linear(x, packed(weight), torch.ones(16), None)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_rounded_as_the_arithmetic_says(level: str, bits: int) -> None:
    """With the identity as weight, the product is the rounded rows; halves show which way ties go."""
    x = torch.cat([torch.randn(50, 40) * torch.logspace(-30, 30, 50)[:, None], integers(1, 40, bits) / 2])
    x[7], x[8] = x[7].abs(), -x[8].abs()  # the range begins, or ends, with 0
    x[50, 0] = integers(1, 40, bits)[0, 0]
    v, step = round_rows(x, bits)
    found = run(x, of_integers(torch.eye(40, dtype=torch.int8), bits))
    torch.testing.assert_close(found, v * step, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_zeros_and_of_numbers_that_are_not_finite(level: str, bits: int) -> None:
    x = torch.randn(7, 40)
    x[0], x[1], x[2, 3], x[3, 39], x[4, 0] = 0, 1e-40, torch.nan, torch.inf, -torch.inf
    x[6] = 3e38 * torch.randn(40).sign()  # as large as float32 goes
    rounded, bias = weights(20, 40, bits)._replace(factor=torch.ones(40)), torch.randn(20)
    found = run(x, rounded, bias)
    assert torch.equal(found[0], bias)
    assert torch.equal(found[1], bias)
    assert found[2:5].isnan().all()
    assert found[5].isfinite().all()
    assert not found[6].isnan().any()


@pytest.mark.parametrize("bits", BITS)
def test_a_row_is_the_same_in_every_batch(level: str, bits: int) -> None:
    x, rounded = torch.randn(300, 96), weights(50, 96, bits)
    whole = run(x, rounded, None, "gelu")
    for rows in (slice(0, 1), slice(7, 20), slice(150, 300)):
        assert torch.equal(run(x[rows], rounded, None, "gelu"), whole[rows])


@pytest.mark.parametrize("bits", BITS)
def test_all_levels_compute_the_same_sums(bits: int) -> None:
    """Without an activation the results are equal bit for bit, as sums are exact."""
    x, rounded, before = torch.randn(31, 130), weights(40, 130, bits), library.level()
    found = []
    for name in library.LEVELS:
        if library.set_level(name) == name:
            found.append(run(x, rounded))
    library.set_level(before)
    assert all(torch.equal(each, found[0]) for each in found)


def test_shapes_and_arguments(level: str) -> None:
    rounded = weights(20, 40)
    weight, scale = rounded.weight, rounded.scale
    assert torch.equal(unpacked(packed(weight), 20, 40), weight)
    assert run(torch.randn(2, 3, 40), rounded).shape == (2, 3, 20)
    assert run(torch.ones(1, 1), of_integers(torch.ones(1, 1, dtype=torch.int8))) == 1
    assert run(torch.randn(0, 40), rounded).shape == (0, 20)
    strided = torch.randn(40, 6).t()
    torch.testing.assert_close(run(strided, rounded), run(strided.contiguous(), rounded))
    with pytest.raises(RuntimeError, match="weight has the wrong shape"):
        native.int8_linear(torch.randn(2, 47), packed(weight), scale, None)
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16"):
        native.int8_linear(torch.randn(2, 40).double(), packed(weight), scale, None)
    with pytest.raises(RuntimeError, match="bits must be 12, or 8 with sums"):
        native.int8_linear(torch.randn(2, 40), packed(weight), scale, None, bits=8)
    sums = weight.sum(dim=1, dtype=torch.int32)
    for bits, in_bfloat16 in ((8, False), (12, True)):
        arguments = (torch.randn(3, 40), packed(weight), scale, torch.randn(20), 1, bits, rounded.factor, sums)
        torch.library.opcheck(native.OPERATOR, (*arguments, in_bfloat16))


def test_a_library_without_the_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *names: False)
    assert "without int8" in native.obstacle.__wrapped__()
