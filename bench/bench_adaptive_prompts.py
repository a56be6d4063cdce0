"""VAPT's prompts of one layer of a ViT-B/16 at 224 px beside LayerNorm + mix + MLP, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import DTYPES, JOBS, compare, compiled, tensor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.adaptive_prompts import adaptive_prompts

SHAPES = [(1, 196, 10, 768), (32, 196, 10, 768), (32, 196, 50, 768)]  # (B, N, P, D)
HIDDEN = 8


def unfused(
    tokens: Tensor, weight: Tensor, bias: Tensor, mix: Tensor, offset: Tensor, w1: Tensor, w2: Tensor
) -> Tensor:
    prompts = mix @ F.layer_norm(tokens, weight.shape, weight, bias, 1e-5) + offset[:, None]
    return F.linear(F.relu(F.linear(prompts, w1)), w2) + prompts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("job", JOBS)
def test_prompts(benchmark: BenchmarkFixture, job: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, n, p, d = shape
    grad = job != "forward"
    sizes = [(b, n, d), (d,), (d,), (p, n), (p,), (HIDDEN, d), (d, HIDDEN)]
    arguments = [tensor(*size, dtype=dtype, grad=grad) for size in sizes]
    ways = {"fastprompt": adaptive_prompts, "compiled": compiled(unfused), "eager": unfused}
    compare(benchmark, "adaptive_prompts", f"{shape}, {dtype}", ways, arguments, job)
