"""Time training whose constants are kept: `python bench/constants_table.py steps` and `grid` write results/vqt.md.

`steps`: a step is a forward, cross-entropy, backward and AdamW's update of generator and head. The steps of VQT and of
late prompts read the records that `fp.fit` keeps (`fastprompt.train.constants`), from memory and in a random order, as
every epoch after the first does. All ways take turns, and a ratio is that of two times of the same round.

`grid`: the seconds that `run_grid` takes for a grid of learning rates, from images to results: VQT's 20 rates, which
share a folder of what is constant, and VPT-deep's three.

    python bench/constants_table.py steps [--batch 8] [--images 32] [--rounds 7] [--dtype float32]
    python bench/constants_table.py grid [--batch 8] [--images 32] [--epochs 6]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cpuinfo
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
from fastprompt.train.grid import run_grid
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

GRID = {"VQT, 1 query": (fp.VQTConfig(1), 20), "VPT-deep, 10 prompts": (fp.VPTConfig(10), 3)}
"""Configuration and number of learning rates of each grid."""


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


def images_of(count: int) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, 224, 224) and labels (N,) of 10 classes."""
    return torch.randn(count, 3, 224, 224), torch.arange(count) % 10


def machine() -> str:
    """Processor, threads and PyTorch, as a page names them."""
    info = cpuinfo.get_cpu_info()
    return (
        f"{info.get('brand_raw', 'an unknown processor')}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )


def steps(arguments: argparse.Namespace) -> list[str]:
    """Time the steps of all ways by turns; return the lines of their section."""
    backbone = random_backbone().to(getattr(torch, arguments.dtype))
    data = images_of(arguments.images)
    ways = {name: Way(backbone, *way, data, arguments.batch) for name, way in WAYS.items()}
    long = {name for name, (config, keep, _) in WAYS.items() if keep == "none" or isinstance(config, fp.VPTConfig)}
    for name, way in ways.items():
        way.seconds(0, 1)
        print(f"ready: {name}", flush=True)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for epoch in range(1, arguments.rounds + 1):
        for name, way in ways.items():
            count = 1 if name in long else arguments.images // arguments.batch
            rounds[name].append(way.seconds(epoch, count))
        print(f"round {epoch} of {arguments.rounds}", flush=True)
    lines = [
        f"`python bench/constants_table.py steps --batch {arguments.batch} --images {arguments.images} --rounds "
        f"{arguments.rounds} --dtype {arguments.dtype}` on {machine()}. "
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
    return [
        *lines,
        "",
        f"Fastest with one query: {best}. By formula, VPT-deep's step takes {flops / 1e9:.1f} GFLOPs an image.",
    ]


def grid(arguments: argparse.Namespace) -> list[str]:
    """Time a whole grid of each method; return the lines of their section."""
    backbone = random_backbone().float()
    train, val = images_of(arguments.images), images_of(arguments.images // 2)
    options = f"--batch {arguments.batch} --images {arguments.images} --epochs {arguments.epochs}"
    lines = [
        f"`python bench/constants_table.py grid {options}` on {machine()}. `run_grid` on ViT-B/16 with random weights, "
        f"224 px, float32: {arguments.images} training and {arguments.images // 2} validation images, "
        f"{arguments.epochs} epochs a run, everything from the images to the results. VQT's runs share a `cache_dir`.",
        "",
        "| Grid | learning rates | s | s a rate |",
        "|---|---:|---:|---:|",
    ]
    for name, (config, rates) in GRID.items():

        def make(seed: int, config: PromptConfig = config) -> fp.PromptedViT:
            torch.manual_seed(seed)
            return fp.PromptedViT(backbone, config, num_classes=10, readout="cls")

        recipe = default_recipe(config).replace(batch_size=arguments.batch, epochs=arguments.epochs, warmup_epochs=0)
        tried = [10 ** (-4 + 3 * i / (rates - 1)) for i in range(rates)]
        with tempfile.TemporaryDirectory() as place:
            began = time.perf_counter()
            runs = run_grid(
                make, train, val, recipe, tried, (0,), Path(place) / "runs", progress=False, cache_dir=f"{place}/kept"
            )
            seconds = time.perf_counter() - began
        assert len(runs) == rates
        lines.append(f"| {name} | {rates} | {seconds:.0f} | {seconds / rates:.1f} |")
        print(lines[-1], flush=True)
    return lines


SECTIONS: dict[str, tuple[str, Callable[[argparse.Namespace], list[str]]]] = {
    "steps": ("## Steps", steps),
    "grid": ("## A grid of learning rates", grid),
}


def page_with(page: str, heading: str, lines: list[str]) -> str:
    """Return the page with these lines under the heading, and its other sections as they are."""
    kept = {part.partition("\n")[0]: part.rstrip() for part in page.split("\n## ")[1:]}
    kept[heading.removeprefix("## ")] = "\n".join([heading.removeprefix("## "), "", *lines])
    order = [known.removeprefix("## ") for known, _ in SECTIONS.values()]
    sections = [f"## {kept[name]}" for name in order if name in kept]
    return "\n\n".join(["# Training steps whose constants are kept", *sections]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="of steps")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of steps")
    parser.add_argument("--epochs", type=int, default=6, help="of each run of a grid")
    parser.add_argument("--out", type=Path, default=Path("results/vqt.md"))
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error("argument --rounds: must be at least 3")
    heading, measured = SECTIONS[arguments.section]
    lines = measured(arguments)
    before = arguments.out.read_text(encoding="utf-8") if arguments.out.exists() else ""
    atomic_write(arguments.out, page_with(before, heading, lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
