"""V2APT's prompts of all 12 layers of a ViT-B: forward, and forward with backward."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastprompt.kernels.vae_prompts import Decoder, vae_prompts

LAYERS, PROMPTS, INSTANCE, WIDTH, LATENT, HIDDEN = 12, 10, 5, 768, 64, 64


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("decoders", [1, LAYERS], ids=["shared", "per_layer"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_vae_prompts(benchmark: BenchmarkFixture, batch: int, decoders: int, backward: bool) -> None:
    def leaf(*size: int) -> torch.Tensor:
        return torch.randn(size, requires_grad=backward)

    stats = leaf(batch, 2 * LATENT)
    weights = [
        Decoder(leaf(HIDDEN, LATENT), leaf(HIDDEN), leaf(INSTANCE * WIDTH, HIDDEN), leaf(INSTANCE * WIDTH))
        for _ in range(decoders)
    ]
    domain = leaf(LAYERS, PROMPTS - INSTANCE, WIDTH)
    seed = torch.tensor([1, 0])

    def run() -> torch.Tensor:
        prompts, kl = vae_prompts(stats, weights, domain, seed)
        if backward:
            (prompts.sum() + kl.sum()).backward()
        return kl

    assert benchmark(run).shape == (batch,)
