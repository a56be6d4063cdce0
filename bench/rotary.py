"""Time the rewritten graph against the papers' graph on the shape of DINOv3 ViT-B/16, which rotates queries and keys.

VPT-deep in float32 with random weights, both graphs by turns in one process, checked against each other first. Beside
the measured ratio stands the ratio of FLOPs that `fastprompt.cost` gives, and the share of it that is reached. The goal
is `GOAL`. `make bench-rotary` writes results/rotary.md. With `--cpu`, one thread is timed by the processor seconds that
it gets, for a machine that does other work too.

    python bench/rotary.py [--prompts 10 50 100] [--batch 8] [--rounds 5] [--cpu] [--out results/rotary.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cpuinfo
import torch
import torch.nn.functional as F
from cost import random_backbone
from torch import Tensor

import fastprompt as fp
from fastprompt.cost import cost
from fastprompt.files import atomic_write

NAME = "vit_base_patch16_dinov3"
SIDE = 224
GOAL = 0.97


def ratios(model: fp.PromptedViT, training: bool, batch: int, rounds: int, clock: Callable[[], float]) -> list[float]:
    """Return the papers' graph's seconds over the rewritten graph's, for each round."""
    images, labels = torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, 10, (batch,))
    model.train(training)

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.set_grad_enabled(training):
            logits = forward(images)
            if training:
                F.cross_entropy(logits, labels).backward()
            return logits

    ours, theirs = run(model.forward), run(model.reference_forward)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
    found = []
    for _ in range(rounds):
        seconds = []
        for forward in (model.reference_forward, model.forward):
            began = clock()
            run(forward)
            seconds.append(clock() - began)
        found.append(seconds[0] / seconds[1])
    return sorted(found)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="one thread, processor seconds")
    parser.add_argument("--out", type=Path, help="write a page")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 3:
        parser.error("argument --rounds: must be at least 3")
    clock, flag, timed = time.perf_counter, "", ""
    if arguments.cpu:
        torch.set_num_threads(1)
        clock, flag, timed = time.process_time, " --cpu", " by processor seconds, beside other work"
    backbone = random_backbone(NAME, img_size=SIDE, global_pool="token").float()
    info = cpuinfo.get_cpu_info()
    flags = ", ".join(flag for flag in ("avx2", "avx512f", "amx_tile") if flag in info.get("flags", ()))
    lines = [
        "# The rewritten graph on DINOv3's ViT-B/16",
        "",
        f"`python bench/rotary.py --batch {arguments.batch} --rounds {arguments.rounds}{flag}` on "
        f"{info.get('brand_raw', 'an unknown processor')} ({flags}), {torch.get_num_threads()} threads{timed}, torch "
        f"{torch.__version__}. VPT-deep, {SIDE} px, float32, random weights, a head of 10 classes that reads the class "
        "token. × is times as fast as the papers' graph, the median over interleaved rounds; in brackets the rounds "
        f"but the lowest and the highest. The goal is {GOAL:g} of the ratio of FLOPs.",
        "",
        "| prompts | job | × the papers' graph | × by FLOPs | share |",
        "|---:|---|---:|---:|---:|",
    ]
    for count in arguments.prompts:
        model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=count), num_classes=10, readout="cls")
        for training in (False, True):
            found = ratios(model, training, arguments.batch, arguments.rounds, clock)
            middle = statistics.median(found)
            papers, ours = (
                cost(backbone, model.config, "cls", graph, training, "float32", arguments.batch).flops
                for graph in ("papers", "rewritten")
            )
            job, spread = "training step" if training else "inference", f"{found[1]:.2f}–{found[-2]:.2f}"
            wanted = papers / ours
            lines.append(f"| {count} | {job} | {middle:.2f} ({spread}) | {wanted:.2f} | {middle / wanted:.2f} |")
            print(lines[-1], flush=True)
    if arguments.out is not None:
        atomic_write(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
