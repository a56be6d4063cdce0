"""VAPT's prompts of one layer of a ViT-B/16 at 224 px: forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastprompt.kernels.adaptive_prompts import adaptive_prompts

SHAPES = [(1, 196, 10, 768), (32, 196, 10, 768), (32, 196, 50, 768)]  # (B, N, P, D)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_adaptive_prompts(benchmark: BenchmarkFixture, shape: tuple[int, ...], backward: bool) -> None:
    b, n, p, d = shape
    hidden = 8
    tokens = torch.randn(b, n, d)
    sizes = [(d,), (d,), (p, n), (p,), (hidden, d), (d, hidden)]
    weights = [torch.randn(size, requires_grad=backward) for size in sizes]

    def run() -> torch.Tensor:
        prompts = adaptive_prompts(tokens, *weights)
        if backward:
            prompts.backward(torch.ones_like(prompts))
        return prompts

    assert benchmark(run).shape == (b, p, d)
