"""PGN's mixture at the paper's sizes: forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastprompt.kernels.library_prompts import library_prompts

SHAPES = [(1, 16, 256, 768), (32, 16, 256, 768), (32, 16, 128, 384)]  # (B, K, M, D)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_library_prompts(benchmark: BenchmarkFixture, shape: tuple[int, ...], backward: bool) -> None:
    b, k, m, d = shape
    logits = torch.randn(b, k, m, requires_grad=backward)
    library = torch.randn(m, d, requires_grad=backward)

    def run() -> torch.Tensor:
        prompts = library_prompts(logits, library)
        if backward:
            prompts.backward(torch.ones_like(prompts))
        return prompts

    assert benchmark(run).shape == (b, k, d)
