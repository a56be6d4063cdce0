"""Swin-T at 224 px with 50 deep prompts, random weights, batch 8: the rewritten graph and VPT's own.

Both sides run the same prompts, dtype, threads and matrix library in interleaved rounds; `extra_info` has their ratio.
The readout is VPT's, the mean of patches and prompts.
"""

from __future__ import annotations

import statistics
import time

import pytest
import timm
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

import fastprompt as fp

ROUNDS = 9


@pytest.fixture(scope="module")
def backbone() -> fp.FrozenViT:
    torch.manual_seed(0)
    return fp.FrozenViT(timm.create_model("swin_tiny_patch4_window7_224", num_classes=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("job", ["inference", "training"])
def test_vpt_deep(benchmark: BenchmarkFixture, backbone: fp.FrozenViT, job: str, dtype: torch.dtype) -> None:
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=50), num_classes=10)
    model.train(job == "training")
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(0, 10, (8,))
    model.set_backbone_dtype(dtype)

    def run(forward: object) -> torch.Tensor:
        with torch.set_grad_enabled(job == "training"):
            logits = forward(images)  # type: ignore[operator]
            if job == "training":
                F.cross_entropy(logits, labels).backward()
            return logits

    sides = {"rewritten": model, "published": model.reference_forward}
    a, b = (run(forward) for forward in sides.values())
    assert (a - b).norm() / b.norm() < (1e-4 if dtype == torch.float32 else 5e-2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, forward in sides.items():
            began = time.perf_counter()
            run(forward)
            seconds[name].append(time.perf_counter() - began)
    ratios = sorted(p / r for r, p in zip(seconds["rewritten"], seconds["published"], strict=True))
    benchmark.extra_info |= {"ratio": statistics.median(ratios), "ratio_low": ratios[1], "ratio_high": ratios[-2]}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    print(
        f"\n{job}, 50 prompts, {dtype}: {statistics.median(ratios):.2f} x VPT's graph ({ratios[1]:.2f} to "
        f"{ratios[-2]:.2f} over {ROUNDS} rounds), {8 / median['rewritten']:.1f} and {8 / median['published']:.1f} "
        "images/s"
    )
    benchmark.pedantic(run, args=(model,), rounds=1)
    model.set_backbone_dtype(torch.float32)
