"""`Int8Linear`: what prompts read of it, and its backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprompt.int8.arithmetic import BITS, Rounded, product, round_weight, weight_scale
from fastprompt.int8.linear import Int8Linear
from fastprompt.vit.weights import ACTIVATIONS


def rounded(n: int, k: int, bits: int) -> Rounded:
    weight, factor = torch.randn(n, k), 0.5 + torch.rand(k)
    scale = weight_scale(weight / factor)
    return Rounded(round_weight(weight / factor, scale), scale, factor, bits)


def relative(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("bits", BITS)
def test_the_weight_is_what_the_int8_weight_stands_for(bits: int) -> None:
    given, bias, kept = rounded(21, 34, bits), torch.randn(21), torch.randn(21, 34)
    linear = Int8Linear(given, bias)
    torch.testing.assert_close(linear.weight, given.plain)
    assert linear.num_outputs == 21
    assert Int8Linear(given, bias, kept).weight.equal(kept)
    x = torch.randn(5, 34)
    torch.testing.assert_close(linear.part(x, slice(3, 9)), x @ given.plain[3:9].t() + bias[3:9])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["identity", "gelu", "quick_gelu"])
def test_the_backward_is_that_of_the_int8_weight(bits: int, dtype: torch.dtype, act: str) -> None:
    given, bias = rounded(40, 64, bits), torch.randn(40)
    linear = Int8Linear(given, bias, act=act).to(dtype)
    assert linear.scale.dtype == torch.float32
    x = torch.randn(2, 30, 64).to(dtype).requires_grad_()
    y = linear(x)
    assert y.dtype == dtype
    ahead = ACTIVATIONS[act](product(x.detach().float(), given, linear.bias.detach().float()))
    assert relative(y, ahead) < (1e-6 if dtype == torch.float32 else 1e-2)
    with torch.no_grad():
        assert relative(linear(x), ahead) < (1e-6 if dtype == torch.float32 else 1e-2)
    grad = torch.randn(2, 30, 40).to(dtype)
    (found,) = torch.autograd.grad(y, x, grad)
    plain = x.detach().double().requires_grad_()
    exact = ACTIVATIONS[act](plain @ given.plain.double().t() + linear.bias.double())
    (expected,) = torch.autograd.grad(exact, plain, grad.double())
    assert found.dtype == dtype
    assert relative(found, expected) < (2e-3 if dtype == torch.float32 and bits == 12 else 2e-2)


def test_parts_have_gradients_and_keep_no_weight() -> None:
    given, x = rounded(40, 64, 12), torch.randn(7, 64, requires_grad=True)
    linear, kept = Int8Linear(given, torch.randn(40)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = linear.part(x, slice(10, 30))
    assert not kept
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(found, torch.ones(7, 20) @ given.plain[10:30])
