"""PGN's prompts, alone and in CLIP's sequence, beside `softmax @ library` and `cat`, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import DTYPES, JOBS, compare, compiled, tensor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.library_prompts import PreNorm, library_prompts

SHAPES = [(1, 16, 256, 768), (32, 16, 256, 768), (32, 16, 128, 384)]  # (B, K, M, D)
TOKENS, EPS = 197, 1e-5


def mixed(logits: Tensor, library: Tensor) -> Tensor:
    return torch.softmax(logits, -1) @ library


def sequence(
    logits: Tensor, library: Tensor, patches: Tensor, cls: Tensor, position: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """[CLS, patches] with their position embedding, then the prompts, through CLIP's `ln_pre`."""
    tokens = torch.cat([cls.expand(len(patches), -1, -1), patches], 1) + position
    return F.layer_norm(torch.cat([tokens, mixed(logits, library)], 1), weight.shape, weight, bias, EPS)


def fused(
    logits: Tensor, library: Tensor, patches: Tensor, cls: Tensor, position: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    norm = PreNorm(weight, bias, EPS)
    return library_prompts(logits, library, patches=patches, prefix=cls, position=position, pre_norm=norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("job", JOBS)
def test_prompts(benchmark: BenchmarkFixture, job: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    b, k, m, d = shape
    grad = job != "forward"
    arguments = tensor(b, k, m, dtype=dtype, grad=grad), tensor(m, d, dtype=dtype, grad=grad)
    ways = {"fastprompt": library_prompts, "compiled": compiled(mixed), "eager": mixed}
    compare(benchmark, "library_prompts", f"{shape}, {dtype}", ways, arguments, job)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("job", JOBS)
def test_whole_sequence(benchmark: BenchmarkFixture, job: str, batch: int, dtype: torch.dtype) -> None:
    """CLIP's ViT-B/16: class token, 196 patches and 16 prompts."""
    k, m, d, grad = 16, 256, 768, job != "forward"
    learned = tensor(batch, k, m, dtype=dtype, grad=grad), tensor(m, d, dtype=dtype, grad=grad)
    frozen = tensor(batch, TOKENS - 1, d, dtype=dtype), tensor(1, 1, d, dtype=dtype), tensor(1, TOKENS, d, dtype=dtype)
    norm = tensor(d, dtype=dtype), tensor(d, dtype=dtype)
    ways = {"fastprompt": fused, "compiled": compiled(sequence), "eager": sequence}
    case = f"into CLIP's sequence, batch {batch}, {dtype}"
    compare(benchmark, "library_prompts", case, ways, (*learned, *frozen, *norm), job)
