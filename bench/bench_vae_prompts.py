"""V²APT's prompts of all 12 layers of a ViT-B beside reparameterise + MLP + `cat`, eager and compiled.

Every way decodes the same latents: fastprompt draws its noise from a seed, and the peers are given that noise.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import DEVICE, DTYPES, JOBS, compare, compiled, tensor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.vae_prompts import LOGVAR_RANGE, Decoder, vae_prompts
from fastprompt.kernels.vae_prompts.reference import philox_normal

LAYERS, PROMPTS, INSTANCE, WIDTH, LATENT, HIDDEN = 12, 10, 5, 768, 64, 64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("decoders", [1, LAYERS], ids=["shared", "per layer"])
@pytest.mark.parametrize("job", JOBS)
def test_prompts(benchmark: BenchmarkFixture, job: str, decoders: int, batch: int, dtype: torch.dtype) -> None:
    grad = job != "forward"
    seed = torch.tensor([1, 0], device=DEVICE)
    noise = philox_normal(seed, batch * LATENT, torch.float32).view(batch, LATENT)

    def parts(weights: tuple[Tensor, ...]) -> list[Decoder]:
        return [Decoder(*weights[i : i + 4]) for i in range(0, len(weights), 4)]

    def fused(stats: Tensor, domain: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return vae_prompts(stats, parts(weights), domain, seed)

    def unfused(stats: Tensor, domain: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = stats.chunk(2, -1)
        logvar = logvar.clamp(*LOGVAR_RANGE)
        z = mean + (0.5 * logvar).exp() * noise.to(mean.dtype)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1)
        made = [F.linear(F.gelu(F.linear(z, d.w1, d.b1)), d.w2, d.b2).view(-1, INSTANCE, WIDTH) for d in parts(weights)]
        layers = [
            torch.cat([own.expand(len(z), -1, -1), made[i % len(made)].to(own.dtype)], 1)
            for i, own in enumerate(domain)
        ]
        return torch.stack(layers), kl

    stats = tensor(batch, 2 * LATENT, dtype=dtype, grad=grad)
    domain = tensor(LAYERS, PROMPTS - INSTANCE, WIDTH, dtype=dtype, grad=grad)
    sizes = [(HIDDEN, LATENT), (HIDDEN,), (INSTANCE * WIDTH, HIDDEN), (INSTANCE * WIDTH,)] * decoders
    weights = [tensor(*size, dtype=dtype, grad=grad) for size in sizes]
    ways = {"fastprompt": fused, "compiled": compiled(unfused), "eager": unfused}
    case = f"{'shared' if decoders == 1 else 'per layer'}, batch {batch}, {dtype}"
    compare(benchmark, "vae_prompts", case, ways, (stats, domain, *weights), job)
