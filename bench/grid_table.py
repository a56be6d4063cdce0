"""Time grids in one batch against separate runs: `python bench/grid_table.py` writes results/grid.md.

Both are calls of `fp.fit_grid` and `fp.fit`, of which the images per second of the second epoch count, validation and
first pass aside. A round trains one adapter alone, then grids of several, for every case; a ratio is that of two speeds
of the same round, and is above 1 where the grid gains. The first adapter of a grid has the settings of the one alone,
and must train with its losses.

    python bench/grid_table.py [--batch 8] [--minutes 8] [--sizes 2 4] [--cases vpt ...] [--out results/grid.md]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cpuinfo
import timm
import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastprompt as fp
from fastprompt.files import atomic_write
from fastprompt.generators import PromptConfig

ROUNDING = 1e-3
"""How far the loss of an epoch in a grid may be from that of the same run alone, relative to it."""


class Flipped(Dataset[Any]):
    """Images that are flipped at random each time, so that nothing of them can be kept."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index]
        return image.flip(-1) if torch.rand(()) < 0.5 else image, int(self.labels[index])


class Case(NamedTuple):
    """What is trained: configuration, backbone, whether images change each epoch, and what the adapters share."""

    title: str
    config: PromptConfig
    backbone: str
    augmented: bool
    shared: str


CASES = {
    "vpt": Case("VPT-deep, 10 prompts", fp.VPTConfig(10), "small", True, "patch embedding"),
    "pgn": Case("PGN, 10 prompts", fp.PGNConfig(10), "small", True, "patch embedding"),
    "late": Case("VPT from block 9, 10 prompts", fp.VPTConfig(10, first_block=9), "small", True, "blocks 0 to 8"),
    "late-kept": Case("the same, rows kept", fp.VPTConfig(10, first_block=9), "small", False, "(kept by both)"),
    "vqt": Case("VQT, 10 queries", fp.VQTConfig(10), "small", True, "all frozen rows"),
    "vqt-kept": Case("the same, inputs kept", fp.VQTConfig(10), "small", False, "(kept by both)"),
    "linear": Case("linear probe", fp.LinearProbeConfig(), "small", True, "the features"),
    "tiny": Case("VPT-deep, 10 prompts", fp.VPTConfig(10), "tiny", True, "patch embedding"),
}
BACKBONES: dict[str, tuple[str, Callable[[], Any]]] = {
    "small": (
        "ViT-S/14, 224 px",
        lambda: timm.create_model("vit_small_patch14_dinov2", img_size=224, num_classes=0),
    ),
    "tiny": ("ViT-Ti/16, 64 px", lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0)),
}


def processor() -> str:
    """The processor's name and instruction set."""
    name = cpuinfo.get_cpu_info().get("brand_raw", "an unknown processor")
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def speeds(case: Case, vit: fp.FrozenViT, batch: int, sizes: tuple[int, ...]) -> dict[int, float]:
    """Return adapters × images per second by number of adapters; 1 is a run of its own."""
    side = vit.image_size[0]
    images, labels = torch.randint(0, 256, (2 * batch, 3, side, side), dtype=torch.uint8), torch.arange(2 * batch) % 2
    train: Any = Flipped(images, labels) if case.augmented else (images, labels)
    lrs = [1e-3 * (1 + i) for i in range(max(sizes))]
    recipe = fp.default_recipe(case.config).replace(
        epochs=2, batch_size=batch, dtype="float32", warmup_epochs=0, lr=lrs[0]
    )

    def make(seed: int) -> fp.PromptedViT:
        torch.manual_seed(seed)
        return fp.PromptedViT(vit, case.config, num_classes=10)

    alone = fp.fit(make(recipe.seed), train, (images[:2], labels[:2]), recipe, progress=False)
    found = {1: alone.history[-1]["images_per_second"]}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            asked = {"lr": lrs[:size]}
            grid = fp.fit_grid(make, train, (images[:2], labels[:2]), recipe, asked, folder, progress=False)
            log = [json.loads(line) for line in (grid[0].directory / "log.jsonl").read_text().splitlines()]
            epochs = [row for row in log if row["event"] == "epoch"]
            check(case, [each["train_loss"] for each in alone.history], [each["train_loss"] for each in epochs])
            found[size] = size * epochs[-1]["images_per_second"]
    return found


def check(case: Case, alone: list[float], together: list[float]) -> None:
    """End the run if an adapter of a grid had other losses than the one trained alone, beyond rounding."""
    for own, found in zip(alone, together, strict=True):
        if not abs(found - own) <= ROUNDING * abs(own):
            raise SystemExit(f"{case.title}: the loss of an epoch is {found} in the grid, {own} alone")


def row(case: Case, rounds: list[dict[int, float]]) -> str:
    """A line of the table: the speed of a run of its own, then of each grid with the ratio of the two."""
    cells = [case.title, BACKBONES[case.backbone][0], "yes" if case.augmented else "no", case.shared]
    cells.append(f"{statistics.median(each[1] for each in rounds):.2f}")
    for size in [size for size in rounds[0] if size > 1]:
        ratios = [each[size] / each[1] for each in rounds]
        spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
        cells.append(
            f"{statistics.median(each[size] for each in rounds):.2f}, {statistics.median(ratios):.2f} ×{spread}"
        )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--minutes", type=float, default=8, help="no round begins that would end later")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--out", type=Path, default=Path("results/grid.md"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="train yields different images")
    torch.manual_seed(0)
    names = {CASES[name].backbone for name in arguments.cases}
    backbones = {name: fp.FrozenViT(BACKBONES[name][1]()) for name in names}
    rounds: dict[str, list[dict[int, float]]] = {name: [] for name in arguments.cases}
    began = time.perf_counter()
    for number in range(1, arguments.rounds + 1):
        passed = (time.perf_counter() - began) / 60
        if passed * number > arguments.minutes * (number - 1) and number > 1:
            break
        for name in arguments.cases:
            case = CASES[name]
            rounds[name].append(speeds(case, backbones[case.backbone], arguments.batch, tuple(arguments.sizes)))
            print(f"round {number} of {arguments.rounds}: {name} {rounds[name][-1]}", flush=True)
    titles = ["Method", "backbone", "augmented", "shared by the adapters", "one run, images/s"]
    titles += [f"{size} adapters" for size in arguments.sizes]
    lines = [
        "# Grids in one batch against separate runs",
        "",
        f"`python bench/grid_table.py --batch {arguments.batch} --minutes {arguments.minutes:g}`, "
        f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, float32, random weights. "
        "Adapters × images per second in training, in the second epoch, and how many times those of separate runs, one "
        f"after the other, they are: the median over {len(rounds[arguments.cases[0]])} rounds, in brackets the lowest "
        "and the highest.",
        "",
        f"| {' | '.join(titles)} |",
        f"|{'---|' * 4}{'---:|' * (len(titles) - 4)}",
        *(row(CASES[name], rounds[name]) for name in arguments.cases),
        "",
    ]
    atomic_write(arguments.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
