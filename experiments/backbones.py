"""Try every pretrained timm name of the supported families: `make backbones` writes results/backbones.md.

Nothing is downloaded. Each architecture is built at its full size without memory (on the meta device), with its own
configuration, and read whole. If it is read, a small copy (its configuration at two blocks, 64 channels and 4 x 4
patches) with random parameters and buffers is compared with timm's own forward in float64. Otherwise the refusal is
recorded. Buffers that a rule fills (rotary tables, indices) keep their values.

    python experiments/backbones.py [--out results/backbones.md] [--only "vit_*rope*"]
"""

from __future__ import annotations

import argparse
import fnmatch
import multiprocessing
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

import fastprompt as fp
from fastprompt.files import atomic_write

PATTERNS = ["vit_*", "eva*", "deit*", "beit*", "swin*", "*dinov3*"]
TOLERANCE = 1e-10
PATCHES = 4
FREE = ("k_bias", "running_mean", "running_var")
"""Buffers that no rule fills."""


class Outcome(NamedTuple):
    """What became of one architecture: its class in timm, why it is refused, or how far its copy's outputs are off."""

    kind: str
    refused: str
    error: float | None


def architectures() -> Counter[str]:
    """Return each architecture among the names, with how many pretrained weights it has."""
    return Counter(name.partition(".")[0] for name in timm.list_models(PATTERNS, pretrained=True))


def small(arch: str, whole: Any) -> nn.Module:
    """Build a small copy of an architecture, with its own options where they do not set a size."""
    if arch.startswith("swin"):
        options: dict[str, Any] = {
            "img_size": 64,
            "embed_dim": 12,
            "depths": (2, 2, 1),
            "num_heads": (1, 2, 4),
            "window_size": 4,
        }
        if re.search(r"window\d+to\d+", arch):
            options["pretrained_window_sizes"] = (6, 6, 6)
    else:
        patch = whole.patch_embed.feat_ratio(as_scalar=True)
        options = {"img_size": PATCHES * patch, "embed_dim": 64, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
        attn = whole.blocks[0].attn
        if hasattr(attn, "num_kv_heads") and attn.qkv is None:
            options["num_kv_heads"] = (4, 2)  # grouped in the second block
        if isinstance(getattr(whole.patch_embed, "proj", None), nn.Identity):
            options |= {"embed_dim": whole.embed_dim, "num_heads": 8}  # its stem has that width
        if "pe_core" in arch:
            options["attn_pool_num_heads"] = 4
    return timm.create_model(arch, num_classes=5, **options)


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter and free buffer random values: fresh biases, bias tables and norms hide mistakes."""
    torch.manual_seed(0)
    buffers = [(name, value) for name, value in model.named_buffers() if name.rpartition(".")[2] in FREE]
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *buffers]:
            noise = torch.randn_like(value)
            if name.endswith("running_var"):
                value.copy_(1 + noise.abs())
            elif value.dim() < 2:
                value.copy_(1 + 0.2 * noise if name.endswith("weight") else 0.2 * noise)
            else:
                value.copy_(noise * max(1, value.shape[1:].numel()) ** -0.5)
    return model.double().eval()


@torch.no_grad()
def attempt(arch: str) -> Outcome:
    """Read one architecture, and compare a small copy of it with timm."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        whole = timm.create_model(arch)
    kind = type(whole).__name__
    try:
        fp.FrozenViT(whole)
    except ValueError as error:
        return Outcome(kind, str(error).partition(": ")[2].partition("; supported")[0], None)
    model: Any = randomise(small(arch, whole))
    backbone = fp.FrozenViT(model)
    images = torch.randn(1, 3, *backbone.image_size, dtype=torch.float64)
    expected, found = model(images), backbone(images)
    assert expected.std() > 0
    return Outcome(kind, "", float((found - expected).norm() / expected.norm()))


def table(outcomes: dict[str, Outcome], names: Counter[str]) -> str:
    """Write the page: the share that is read, the refusals, and every architecture."""
    read = sum(names[arch] for arch, outcome in outcomes.items() if not outcome.refused)
    total, worst = sum(names[arch] for arch in outcomes), max(outcome.error or 0 for outcome in outcomes.values())
    lines = [
        "# Pretrained backbones of timm",
        "",
        f"`python experiments/backbones.py`, timm {timm.__version__}: every name of "
        f"`timm.list_models({PATTERNS}, pretrained=True)`.",
        "",
        f"**{read} of {total} names are read, {read / total:.1%}**; they belong to {len(outcomes)} architectures. Each "
        "architecture is read whole, without memory, and a copy of two blocks with random parameters and buffers "
        f"equals timm's own forward in float64 (relative, at most {worst:.0e}; {TOLERANCE:.0e} is allowed).",
        "",
        "| architecture | class in timm | names | read |",
        "|---|---|---|---|",
    ]
    for arch, outcome in sorted(outcomes.items(), key=lambda item: (item[1].kind, item[0])):
        said = "yes" if not outcome.refused else f"no: {outcome.refused}"
        lines.append(f"| `{arch}` | {outcome.kind} | {names[arch]} | {said} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/backbones.md"))
    parser.add_argument("--only", default="*", help="pattern of the architectures to try")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    args = parser.parse_args(argv)
    names = architectures()
    archs = [arch for arch in sorted(names) if fnmatch.fnmatch(arch, args.only)]
    outcomes: dict[str, Outcome] = {}
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for arch, outcome in zip(archs, pool.imap(attempt, archs), strict=True):
            outcomes[arch] = outcome
            print(f"{arch}: {outcome.refused or f'{outcome.error:.1e}'}", flush=True)
    off = [arch for arch, outcome in outcomes.items() if outcome.error is not None and not outcome.error <= TOLERANCE]
    if off:
        print(f"outputs differ from timm's: {', '.join(off)}", file=sys.stderr)
        return 1
    atomic_write(args.out, table(outcomes, names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
