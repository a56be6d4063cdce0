"""Attention of a ViT-B/16 block over its tokens and prompts beside `cat` + PyTorch's fused attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import DTYPES, JOBS, compare, compiled, tensor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.prefix_attention import prefix_attention

SHAPES = [(16, 50, 10), (8, 197, 10), (8, 197, 50)]  # (B, T, P): 112 and 224 px
HEADS, WIDTH = 12, 64


def concatenated(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor) -> Tensor:
    keys, values = (torch.cat([p.expand(len(q), -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v)))
    return F.scaled_dot_product_attention(q, keys, values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("job", JOBS)
def test_attention(benchmark: BenchmarkFixture, job: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    b, t, p = shape
    grad = job != "forward"
    tokens = [tensor(b, HEADS, t, WIDTH, dtype=dtype, grad=grad) for _ in range(3)]
    prefix = [tensor(1, HEADS, p, WIDTH, dtype=dtype, grad=grad) for _ in range(2)]
    ways = {"fastprompt": prefix_attention, "compiled": compiled(concatenated), "eager": concatenated}
    compare(benchmark, "prefix_attention", f"{shape}, {dtype}", ways, (*tokens, *prefix), job)
