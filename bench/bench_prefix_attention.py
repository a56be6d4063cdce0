"""Attention of a ViT-B/16 block over its tokens and 10 prompts, training step: the op and PyTorch's fused kernel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from fastprompt.kernels.prefix_attention import prefix_attention

SHAPES = [(16, 50), (8, 197)]  # (B, T): 112 and 224 px


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("way", ["prefix_attention", "fused on concatenated"])
def test_prefix_attention(benchmark: BenchmarkFixture, way: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    b, t = shape
    q, k, v = (torch.randn(b, 12, t, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    prefix_k, prefix_v = (torch.randn(1, 12, 10, 64, dtype=dtype, requires_grad=True) for _ in range(2))

    def attend() -> torch.Tensor:
        if way == "prefix_attention":
            return prefix_attention(q, k, v, prefix_k, prefix_v)
        keys, values = (torch.cat([p.expand(b, -1, -1, -1), x], 2) for p, x in ((prefix_k, k), (prefix_v, v)))
        return F.scaled_dot_product_attention(q, keys, values)

    def step() -> torch.Tensor:
        out = attend()
        out.backward(torch.ones_like(out))
        return out

    with torch.no_grad():
        exact = prefix_attention(q.double(), k.double(), v.double(), prefix_k.double(), prefix_v.double())
    assert (attend().double() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 2e-2)
    assert benchmark(step).shape == (b, 12, t, 64)
