"""Compare the C++ kernels with PyTorch: each op at the sizes of ViT-B/16 at 224 px, batch 8, and a whole engine call.

    pytest bench/bench_native.py --benchmark-only -s

Native and PyTorch take turns on the same inputs. The benchmark prints the minima of the process's CPU time, which are
the most reliable on a shared machine, and their ratio.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastprompt as fp
from fastprompt.kernels import native
from fastprompt.kernels.adaptive_prompts import adaptive_prompts
from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.prefix_attention import prefix_attention

BATCH, HEADS, TOKENS, WIDTH = 8, 12, 197, 768
ROUNDS = 15
METHODS = {
    "VPT-deep 50": fp.VPTConfig(num_prompts=50),
    "VAPT 50": fp.VAPTConfig(num_prompts=50),
    "PGN 16": fp.PGNConfig(num_prompts=16),
}


def attention(prompts: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    """Queries, keys and values as views of their packed product, and a prefix that all images share."""

    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        packed = torch.randn(BATCH, TOKENS, 3, HEADS, WIDTH // HEADS, dtype=dtype).permute(2, 0, 3, 1, 4)
        return *packed.unbind(0), *torch.randn(2, 1, HEADS, prompts, WIDTH // HEADS, dtype=dtype).unbind(0)

    return inputs


def adaptive(prompts: int) -> Callable[[torch.dtype], tuple[Any, ...]]:
    def inputs(dtype: torch.dtype) -> tuple[Any, ...]:
        tokens = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype)[:, 1:]
        sizes = (WIDTH,), (WIDTH,), (prompts, TOKENS - 1), (prompts,), (8, WIDTH), (WIDTH, 8)
        return tokens, *(torch.randn(size) for size in sizes)

    return inputs


def rows(dtype: torch.dtype) -> tuple[Any, ...]:
    return *torch.randn(2, BATCH, TOKENS, WIDTH, dtype=dtype).unbind(0), 1e-6


def joined(*inputs: Any) -> Tensor:
    """With what the projection reads."""
    return prefix_attention(*inputs).transpose(1, 2).flatten(2)


OPS: dict[str, tuple[Callable[..., Any], Callable[[torch.dtype], tuple[Any, ...]]]] = {
    **{f"prefix_attention, {p} prompts": (joined, attention(p)) for p in (10, 50, 100)},
    **{f"adaptive_prompts, {p} prompts": (adaptive_prompts, adaptive(p)) for p in (10, 50, 100)},
    "add_norm": (add_norm, rows),
}


def compare(benchmark: BenchmarkFixture, name: str, ways: dict[str, Callable[[], Any]]) -> None:
    """Time two ways in turn; pytest-benchmark reports the first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, call in ways.items():
            began = time.process_time()
            call()
            seconds[way].append(time.process_time() - began)
    first, second = (1e3 * min(seconds[way]) for way in ways)
    benchmark.extra_info |= {"seconds": seconds, "level": native.level(), "threads": torch.get_num_threads()}
    benchmark.pedantic(next(iter(ways.values())), rounds=1)
    print(f"\n{name}, {native.level()}: {' '.join(ways)} {first:.2f} {second:.2f} ms, {second / first:.2f} x")


def by(backend: str, call: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad(), fp.use_backend(backend):
            return call(*inputs)

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("op", OPS)
def test_op(benchmark: BenchmarkFixture, op: str, dtype: torch.dtype) -> None:
    assert native.obstacle() == ""
    call, inputs_of = OPS[op]
    inputs = inputs_of(dtype)
    compare(
        benchmark, f"{op}, {dtype}", {"native": by("native", call, *inputs), "PyTorch": by("reference", call, *inputs)}
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_engine(benchmark: BenchmarkFixture, method: str, dtype: torch.dtype, batch: int) -> None:
    """Compare an eager engine with the kernels that "auto" chose and one in plain PyTorch."""
    assert native.obstacle() == ""
    torch.manual_seed(0)
    backbone = fp.FrozenViT(timm.create_model("vit_base_patch16_224", num_classes=0))
    model = fp.PromptedViT(backbone, METHODS[method], 10).eval()
    engine, images = fp.Engine(model, (batch,), dtype, "eager"), torch.randn(batch, 3, 224, 224)
    ways = {"auto": by("auto", engine, images), "PyTorch": by("reference", engine, images)}
    found, expected = (call() for call in ways.values())
    assert (found - expected).norm() <= (5e-2 if dtype == torch.bfloat16 else 1e-3) * expected.norm()
    compare(benchmark, f"{method}, batch {batch}, {dtype}", ways)
    print(fp.explain(engine))
