"""Compare the rewritten graph with the papers' graph on one model per method.

The models are ViT-S/16 at 224 px with random weights, batch 4. Compiling one takes minutes on a CPU, so that only one
forward is also compared with the compiled graph; `bench_engine.py` and `bench_forward.py` measure a ViT-B in detail.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from peers import DEVICE, DTYPES, JOBS, compiled, gradients, take_turns
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastprompt as fp

BATCH = 4
METHODS = {
    "PGN 16": fp.PGNConfig(num_prompts=16),
    "V2APT 10": fp.V2APTConfig(num_prompts=10),
    "VAPT 10": fp.VAPTConfig(num_prompts=10),
    "VPT-deep 50": fp.VPTConfig(num_prompts=50),
}


COMPILED = ("VPT-deep 50", "forward")
"""Method and job that are compared with the compiled graph on a CPU, too."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("job", JOBS)
def test_model(benchmark: BenchmarkFixture, job: str, method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    backbone = fp.FrozenViT(timm.create_model("vit_small_patch16_224", num_classes=0)).to(DEVICE)
    model = fp.PromptedViT(backbone, METHODS[method], num_classes=10)
    model.set_backbone_dtype(dtype)
    model.train(job != "forward")
    images = torch.randn(BATCH, 3, 224, 224, device=DEVICE)
    draws = model.draw(BATCH) if model.training else None
    leaves = [p for _, p in model.trainable_parameters()]

    def step(forward: Callable[..., Tensor]) -> list[Tensor]:
        with torch.set_grad_enabled(model.training):
            logits = forward(images, draws=draws)
            return [logits, *gradients(logits, leaves)] if model.training else [logits]

    ways = {"fastprompt": model.forward, "papers' graph, eager": model.reference_forward}
    if DEVICE == "cuda" or (method, job) == COMPILED:
        ways["papers' graph, compiled"] = compiled(model.reference_forward)
    expected = step(model.reference_forward)[0]
    for name, forward in ways.items():
        error = (step(forward)[0] - expected).norm() / expected.norm()
        assert error < (1e-4 if dtype == torch.float32 else 5e-2), f"{name}: {error}"
    runs = {name: lambda forward=forward: step(forward) for name, forward in ways.items()}
    take_turns(benchmark, "ViT-S/16", f"{method}, batch {BATCH}, {dtype}, {job}", runs)
