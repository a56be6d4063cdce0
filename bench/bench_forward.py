"""ViT-B/16 at 224 px with 10 and 50 deep prompts, random weights, batch 8: the rewritten graph and the papers'.

The two sides run the same prompts, dtype and threads in interleaved rounds; `extra_info` has their ratio.
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

ROUNDS = 7


@pytest.fixture(scope="module")
def backbone() -> fp.FrozenViT:
    torch.manual_seed(0)
    return fp.FrozenViT(timm.create_model("vit_base_patch16_224", num_classes=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_prompts", [10, 50])
@pytest.mark.parametrize("job", ["inference", "training"])
def test_vpt_deep(benchmark: BenchmarkFixture, backbone: fp.FrozenViT, job: str, num_prompts: int,
                  dtype: torch.dtype) -> None:
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=num_prompts), num_classes=10)
    model.train(job == "training")
    images, labels = torch.randn(8, 3, 224, 224), torch.randint(0, 10, (8,))
    model.set_backbone_dtype(dtype)

    def run(forward: object) -> torch.Tensor:
        with torch.set_grad_enabled(job == "training"):
            logits = forward(images)  # type: ignore[operator]
            if job == "training":
                F.cross_entropy(logits, labels).backward()
            return logits

    sides = {"rewritten": model, "papers' graph": model.reference_forward}
    a, b = (run(forward) for forward in sides.values())
    assert (a - b).norm() / b.norm() < (1e-4 if dtype == torch.float32 else 5e-2)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, forward in sides.items():
            began = time.perf_counter()
            run(forward)
            seconds[name].append(time.perf_counter() - began)
    ratios = sorted(p / r for r, p in zip(seconds["rewritten"], seconds["papers' graph"], strict=True))
    benchmark.extra_info |= {"ratio": statistics.median(ratios), "ratio_low": ratios[1], "ratio_high": ratios[-2]}
    print(f"\n{job}, {num_prompts} prompts, {dtype}: {statistics.median(ratios):.2f} x the papers' graph "
          f"({ratios[1]:.2f} to {ratios[-2]:.2f} over {ROUNDS} rounds)")
    benchmark.pedantic(run, args=(model,), rounds=1)
    model.set_backbone_dtype(torch.float32)
