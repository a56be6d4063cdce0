"""PGN's mixture at the paper's sizes: forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastprompt.kernels.library_prompts import PreNorm, library_prompts

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


@pytest.mark.parametrize("batch", [1, 32])
def test_whole_sequence_with_pre_norm(benchmark: BenchmarkFixture, batch: int) -> None:
    """CLIP's ViT-B/16: class token, 196 patches and 16 prompts."""
    logits, library, patches = torch.randn(batch, 16, 256), torch.randn(256, 768), torch.randn(batch, 196, 768)
    prefix, position = torch.randn(1, 1, 768), torch.randn(1, 197, 768)
    norm = PreNorm(torch.ones(768), torch.zeros(768), 1e-5)
    sequence = benchmark(
        lambda: library_prompts(logits, library, patches=patches, prefix=prefix, position=position, pre_norm=norm)
    )
    assert sequence.shape == (batch, 213, 768)
