from __future__ import annotations

from typing import Any

import pytest
import torch

from fastprompt.kernels.add_norm import add_norm


def test_matches_the_formula() -> None:
    x, branch = torch.randn(2, 3, 5, 7).double().unbind(0)
    added, normed = add_norm(x, branch, 1e-3)
    assert torch.equal(added, x + branch)
    mean, variance = added.mean(-1, keepdim=True), added.var(-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(normed, (added - mean) / (variance + 1e-3).sqrt(), rtol=1e-12, atol=1e-12)


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in torch.randn(2, 2, 3, 4).double().unbind(0)]
    assert torch.autograd.gradcheck(lambda x, branch: add_norm(x, branch, 1e-5), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_is_of_the_rounded_sum(dtype: torch.dtype) -> None:
    x, branch = torch.randn(2, 3, 16).to(dtype).unbind(0)
    added, normed = add_norm(x, branch, 1e-6)
    assert added.dtype == normed.dtype == dtype
    exact = torch.nn.functional.layer_norm((x + branch).double(), (16,), eps=1e-6)
    assert (normed.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    assert add_norm(x[:0], branch[:0], 1e-6)[1].shape == (0, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], torch.zeros(1), 1e-6), TypeError, "x must be a floating-point tensor, got <class 'list'>"),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(2), 1e-6), TypeError, r"x must be .* got torch\.int64"),
        ((torch.zeros(()), torch.zeros(()), 1e-6), ValueError, "x must have at least one dimension"),
        ((torch.zeros(2, 3), torch.zeros(3), 1e-6), ValueError, r"branch must be as x, \(2, 3\) in .* got \(3,"),
        ((torch.zeros(2, 3), torch.zeros(2, 3).double(), 1e-6), ValueError, r"branch must be as x, .* torch\.float64"),
    ],
)
def test_bad_input_is_named(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        add_norm(*arguments)
