"""Time training steps whose constants are kept: `python bench/constants_table.py` writes results/vqt.md.

A step is a forward, cross-entropy, backward and AdamW's update of generator and head. The steps of VQT and of late
prompts read the records that `fp.fit` keeps (`fastprompt.train.constants`), from memory and in a random order, as every
epoch after the first does. All ways take turns, and a ratio is that of two times of the same round.

    python bench/constants_table.py [--batch 8] [--images 32] [--rounds 7] [--dtype float32] [--out results/vqt.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cost import random_backbone
from torch import Tensor

import fastprompt as fp
from fastprompt.cost import cost
from fastprompt.files import atomic_write
from fastprompt.generators import PromptConfig
from fastprompt.train.batches import Batches
from fastprompt.train.constants import Constants
from fastprompt.train.identity import data_identities
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.recipes import default_recipe

BASELINE = "VPT-deep, 10 prompts"
GOAL = 15.0
"""Goal: × the images per second of the baseline, for one query."""

WAYS: dict[str, tuple[PromptConfig, str, str]] = {
    BASELINE: (fp.VPTConfig(10), "none", "auto"),
    "VQT, 1 query, inputs kept": (fp.VQTConfig(1), "inputs", "auto"),
    "VQT, 1 query, inputs kept in bfloat16": (fp.VQTConfig(1), "inputs", "bfloat16"),
    "VQT, 1 query, keys and values kept": (fp.VQTConfig(1), "keys", "auto"),
    "VQT, 10 queries, inputs kept": (fp.VQTConfig(10), "inputs", "auto"),
    "VQT, 10 queries, keys and values kept": (fp.VQTConfig(10), "keys", "auto"),
    "VQT, 1 query, nothing kept": (fp.VQTConfig(1), "none", "auto"),
    "VPT-deep from block 9, 10 prompts, rows kept": (fp.VPTConfig(10, first_block=9), "inputs", "auto"),
}


class Way:
    """A model with its optimizer, and what its steps read.

    Attributes:
        bytes: of an image's record; 0: nothing is kept. first: seconds that an image's record takes.
    """

    def __init__(
        self,
        backbone: fp.FrozenViT,
        config: PromptConfig,
        keep: str,
        dtype: str,
        data: tuple[Tensor, Tensor],
        batch: int,
    ) -> None:
        torch.manual_seed(0)
        self.model = fp.PromptedViT(backbone, config, num_classes=10, readout="cls").train()
        recipe = default_recipe(config).replace(cache=keep, cache_dtype=dtype, batch_size=batch)
        self.optimizer = make_optimizer(self.model.trainable_parameters(), recipe)
        self.constants: Constants | None = None
        self.bytes, self.first = 0, 0.0
        if keep != "none":
            self.constants = Constants(self.model, recipe, None, data_identities(data, data, 10))
            assert not self.constants.prepare({"train": data})
            began = time.perf_counter()
            data = self.constants.kept("train", data)
            self.first, self.bytes = (time.perf_counter() - began) / len(data[1]), self.constants.bytes
        self.batches = Batches(data, batch, name="train", num_classes=10, seed=0)

    def step(self, images: Tensor, labels: Tensor) -> None:
        if self.constants is None:
            logits, _ = self.model(images, return_aux=True)
        else:
            logits, _ = self.constants.forward(images)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        self.optimizer.step()

    def seconds(self, epoch: int, steps: int) -> float:
        """Seconds an image of `steps` steps of one epoch."""
        began, images = time.perf_counter(), 0
        for step, (inputs, labels) in enumerate(self.batches.epoch(epoch)):
            if step == steps:
                break
            self.step(inputs, labels)
            images += len(labels)
        return (time.perf_counter() - began) / images


def interval(values: list[float]) -> str:
    """The median of a ratio over rounds, and the rounds but the lowest and the highest."""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.1f} ({ordered[1]:.1f}–{ordered[-2]:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=Path("results/vqt.md"))
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("argument --rounds: must be at least 3")
    backbone = random_backbone().to(getattr(torch, arguments.dtype))
    data = torch.randn(arguments.images, 3, 224, 224), torch.arange(arguments.images) % 10
    ways = {name: Way(backbone, *way, data, arguments.batch) for name, way in WAYS.items()}
    long = {name for name, (config, keep, _) in WAYS.items() if keep == "none" or isinstance(config, fp.VPTConfig)}
    for name, way in ways.items():
        way.seconds(0, 1)
        print(f"ready: {name}", flush=True)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(1, arguments.rounds + 1):
        for name, way in ways.items():
            steps = 1 if name in long else arguments.images // arguments.batch
            rounds[name].append(way.seconds(epoch, steps))
        print(f"round {epoch} of {arguments.rounds}", flush=True)
    lines = [
        "# Training steps whose constants are kept",
        "",
        f"`python bench/constants_table.py --batch {arguments.batch} --images {arguments.images} --rounds "
        f"{arguments.rounds} --dtype {arguments.dtype}`, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        "ViT-B/16 with random weights, 224 px, a linear head of 10 classes, steps of AdamW after the first epoch. × is "
        "times as many images a second as VPT-deep's step, the median over interleaved rounds; in brackets the rounds "
        f"but the lowest and the highest. The goal for one query is {GOAL:g} ×.",
        "",
        "| Step | images/s | × | kept, MB an image | to keep it, s an image |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, way in ways.items():
        ratios = [slow / fast for slow, fast in zip(rounds[BASELINE], rounds[name], strict=True)]
        kept = (f"{way.bytes / 1e6:.1f}", f"{way.first:.2f}") if way.bytes else ("", "")
        speed = 1 / statistics.median(rounds[name])
        lines.append(f"| {name} | {speed:.2f} | {interval(ratios)} | {kept[0]} | {kept[1]} |")
    reached = [name for name in ways if "1 query" in name and "nothing" not in name]
    best = max(reached, key=lambda name: statistics.median(rounds[BASELINE]) / statistics.median(rounds[name]))
    flops = cost(backbone, fp.VPTConfig(10), training=True, dtype=arguments.dtype, batch=arguments.batch).flops
    lines += [
        "",
        f"Fastest with one query: {best}. By formula, VPT-deep's step takes {flops / 1e9:.1f} GFLOPs an image.",
        "",
    ]
    atomic_write(arguments.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
