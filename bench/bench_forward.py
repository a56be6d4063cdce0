"""Compare the rewritten graph with the papers' graph: VPT-deep on ViT-B/16 at 224 px, random weights, batch 8.

All ways run the same prompts and images on the same threads, one after the other in every round, and each is checked
against the papers' graph in float32 before it is timed. The baseline is that graph in float32, eager, as the authors
run it. `make bench-forward` writes the ratios to results/forward.md.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import fastprompt as fp

ROUNDS, BATCH = 9, 8
BASELINE = "papers' graph, float32 eager"


@pytest.fixture(scope="module")
def backbones() -> dict[torch.dtype, fp.FrozenViT]:
    torch.manual_seed(0)
    vit = fp.FrozenViT(timm.create_model("vit_base_patch16_224", num_classes=0))
    return {torch.float32: vit, torch.bfloat16: copy.deepcopy(vit).to(torch.bfloat16)}


@pytest.mark.parametrize("num_prompts", [10, 50, 100])
@pytest.mark.parametrize("job", ["inference", "training"])
def test_vpt_deep(
    benchmark: BenchmarkFixture, backbones: dict[torch.dtype, fp.FrozenViT], job: str, num_prompts: int
) -> None:
    torch.manual_seed(0)
    plain = fp.PromptedViT(backbones[torch.float32], fp.VPTConfig(num_prompts=num_prompts), num_classes=10)
    half = fp.PromptedViT(backbones[torch.bfloat16], plain.config, head=copy.deepcopy(plain.head))
    half.generator.load_state_dict(plain.generator.state_dict())
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(0, 10, (BATCH,))
    lean = copy.deepcopy(half)
    lean.set_grad_checkpointing()
    for model in (plain, half, lean):
        model.train(job == "training")

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(job == "training"):
            logits = forward(images)
            if job == "training":
                F.cross_entropy(logits, labels).backward()
            return logits

    torch._dynamo.reset()
    frozen = {"freezing": True} if job == "inference" else {}
    ways = {
        BASELINE: plain.reference_forward,
        "rewritten, float32 eager": plain.forward,
        "papers' graph, bfloat16 eager": half.reference_forward,
        "rewritten, bfloat16 eager": half.forward,
        "papers' graph, bfloat16 compiled": torch.compile(half.reference_forward),
        "rewritten, bfloat16 compiled": torch.compile(half.forward),
    }
    if job == "training":
        ways["rewritten, bfloat16 eager, blocks recomputed"] = lean.forward
    with torch._inductor.config.patch(**frozen):
        expected = run(ways[BASELINE])
        for name, forward in ways.items():
            error = (run(forward).float() - expected).norm() / expected.norm()
            assert error < (1e-4 if "float32" in name else 5e-2), f"{name}: {error}"
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, forward in ways.items():
                began = time.perf_counter()
                run(forward)
                seconds[name].append(time.perf_counter() - began)
        benchmark.pedantic(run, args=(ways["rewritten, bfloat16 eager"],), rounds=1)
    benchmark.extra_info |= {
        "job": job,
        "num_prompts": num_prompts,
        "batch": BATCH,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    base = statistics.median(seconds[BASELINE])
    print(f"\n{job}, {num_prompts} prompts: {BATCH / base:.1f} images/s as the authors run it; × that:")
    for name, times in seconds.items():
        print(f"  {name:<45} {base / statistics.median(times):.2f}")
