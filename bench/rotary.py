"""Time the rewritten graph against timm's DINOv3 ViT-B/16 with VPT-deep, whose blocks rotate queries and keys.

The baseline is what an author runs: timm's own blocks and rotary code, with new prompts put behind the class token and
the registers before every block. Float32 with random weights, both by turns in one process, checked against each other
and against `reference_forward` first. Beside the measured ratio stands the ratio of FLOPs that `fastprompt.cost` gives,
and the share of it that is reached. The goal is `GOAL`. `make bench-rotary` writes results/rotary.md. With `--cpu`, one
thread is timed by the processor seconds that it gets, for a machine that does other work too.

    python bench/rotary.py [--prompts 10 50 100] [--batch 8] [--rounds 7] [--cpu] [--out results/rotary.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cpuinfo
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.cost import cost
from fastprompt.files import atomic_write

NAME = "vit_base_patch16_dinov3"
SIDE = 224
GOAL = 0.97


def random_vit() -> Any:
    """Build timm's model with random weights and non-zero biases, as after pretraining."""
    torch.manual_seed(0)
    vit = timm.create_model(NAME, img_size=SIDE, num_classes=0, global_pool="token")
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return vit.eval().requires_grad_(False)


class Baseline(nn.Module):
    """VPT-deep on timm's model, with the prompts (blocks, 1, P, D) and the head of `model`."""

    def __init__(self, vit: Any, model: fp.PromptedViT) -> None:
        super().__init__()
        self.vit, self.head = vit, model.head
        assert model.generator is not None
        self.generator, self.count = model.generator, model.generator.num_prompts

    def forward(self, images: Tensor) -> Tensor:
        x, rope = self.vit._pos_embed(self.vit.patch_embed(images))
        x, first = self.vit.norm_pre(x), self.vit.num_prefix_tokens
        for i, block in enumerate(self.vit.blocks):
            prompts = self.generator(layer=i).expand(len(x), -1, -1)
            x = torch.cat([x[:, :first], prompts, x[:, first + (self.count if i else 0) :]], dim=1)
            block.attn.num_prefix_tokens = first + self.count  # timm rotates the rows behind these
            x = block(x, rope=rope)
        logits: Tensor = self.head(self.vit.norm(x)[:, 0])
        return logits


def ratios(
    model: fp.PromptedViT, baseline: Baseline, training: bool, batch: int, rounds: int, clock: Callable[[], float]
) -> list[float]:
    """Return the baseline's seconds over the rewritten graph's, for each round."""
    images, labels = torch.randn(batch, 3, SIDE, SIDE), torch.randint(0, 10, (batch,))
    model.train(training)

    def run(forward: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(training):
            logits, gradient = forward(images), torch.zeros(())
            if training:
                F.cross_entropy(logits, labels).backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                model.zero_grad()
            return logits, gradient

    ours, theirs, papers = run(model.forward), run(baseline), run(model.reference_forward)
    for expected in (theirs, papers):
        for found, wanted in zip(ours, expected, strict=True):
            assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    found_ratios = []
    for _ in range(rounds):
        seconds = []
        for forward in (baseline, model.forward):
            began = clock()
            run(forward)
            seconds.append(clock() - began)
        found_ratios.append(seconds[0] / seconds[1])
    return sorted(found_ratios)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, nargs="+", default=[10, 50, 100])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cpu", action="store_true", help="one thread, processor seconds")
    parser.add_argument("--out", type=Path, help="write a page")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 3:
        parser.error("argument --rounds: must be at least 3")
    clock, flag, timed = time.perf_counter, "", ""
    if arguments.cpu:
        torch.set_num_threads(1)
        clock, flag, timed = time.process_time, " --cpu", " by processor seconds, beside other work"
    vit = random_vit()
    backbone = fp.FrozenViT(vit)
    info = cpuinfo.get_cpu_info()
    flags = ", ".join(flag for flag in ("avx2", "avx512f", "amx_tile") if flag in info.get("flags", ()))
    lines = [
        "# The rewritten graph on DINOv3's ViT-B/16",
        "",
        f"`python bench/rotary.py --batch {arguments.batch} --rounds {arguments.rounds}{flag}` on "
        f"{info.get('brand_raw', 'an unknown processor')} ({flags}), {torch.get_num_threads()} threads{timed}, torch "
        f"{torch.__version__}, timm {timm.__version__}. VPT-deep, {SIDE} px, float32, random weights, a head of 10 "
        "classes that reads the class token. × is times as fast as the papers' graph, in timm's own blocks: the median "
        f"over interleaved rounds; in brackets the rounds but the lowest and the highest. The goal is {GOAL:g} of the "
        "ratio of FLOPs.",
        "",
        "| prompts | job | × the papers' graph | × by FLOPs | share |",
        "|---:|---|---:|---:|---:|",
    ]
    for count in arguments.prompts:
        model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=count), num_classes=10, readout="cls")
        baseline = Baseline(vit, model)
        for training in (False, True):
            found = ratios(model, baseline, training, arguments.batch, arguments.rounds, clock)
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
