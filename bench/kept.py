"""Measure what a call of a ViT-S-sized model pays to detect changed tensors: `python bench/kept.py`.

Forward and engine calls run with and without the check in turn, in one process; times are CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastprompt as fp

METHODS: dict[str, fp.PromptConfig] = {
    "linear": fp.LinearProbeConfig(),
    "vpt": fp.VPTConfig(num_prompts=10),
    "vapt": fp.VAPTConfig(num_prompts=10),
    "pgn": fp.PGNConfig(),
}


def seconds(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("vit_small_patch16_224", num_classes=0)
    images = torch.randn(arguments.batch, 3, 224, 224)
    for name, config in METHODS.items():
        model = fp.PromptedViT(backbone, config, 100).eval()
        engine = fp.Engine(model, dtype=torch.float32, backend="eager")
        ratios, looks, shares = [], [], []
        for _ in range(arguments.rounds + 1):
            times = []
            for checks in (True, False):
                backbone.private = model.private = not checks
                with torch.no_grad():
                    times.append(seconds(lambda m=model: m(images)))
            backbone.private = model.private = False
            ratios.append(times[0] / times[1])
            looks.append(seconds(backbone.folded))
            shares.append(seconds(engine._change) / seconds(lambda e=engine: e(images)))
        ratios = sorted(ratios[1:])  # the first round fills the caches
        print(
            f"{name:8} forward with / without {statistics.median(ratios):.4f} "
            f"({ratios[len(ratios) // 4]:.4f} to {ratios[-len(ratios) // 4]:.4f})   "
            f"look at the backbone {1e6 * statistics.median(looks):.0f} us   "
            f"engine: {100 * statistics.median(shares):.2f} % of a call"
        )


if __name__ == "__main__":
    main()
