"""A ViT-B's residual and LayerNorm in one pass beside the two in turn, eager and compiled."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import DTYPES, JOBS, compare, compiled, tensor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from fastprompt.kernels.add_norm import add_norm

EPS = 1e-6


def fused(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    return add_norm(x, branch, EPS)


def in_turn(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    added = x + branch
    return added, F.layer_norm(added, added.shape[-1:], None, None, EPS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("job", JOBS)
def test_add_norm(benchmark: BenchmarkFixture, job: str, batch: int, dtype: torch.dtype) -> None:
    arguments = [tensor(batch, 197, 768, dtype=dtype, grad=job != "forward") for _ in range(2)]
    ways = {"fastprompt": fused, "compiled": compiled(in_turn), "eager": in_turn}
    compare(benchmark, "add_norm", f"batch {batch}, {dtype}", ways, arguments, job)
