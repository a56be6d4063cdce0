"""`python experiments/shrunk_probe.py [--data mnist5k] [--seeds 0 1 2]`: measure the cost of shrinking images alone.

The placement "replace" squeezes an image to make room for rows of prompts. Here these rows are grey, and a linear probe
(L-BFGS, with C chosen on validation) is fitted to features of the original and of the squeezed images, with the data of
`make pixels`, without augmentation, on CLIP ViT-B/16 at 112 px. The script prints both test accuracies.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pixels
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.runs.execute import backbone_at, load_run_data
from fastprompt.train.probe import extract_features, fit_linear_probe


def images_of(dataset: torch.utils.data.Dataset) -> tuple[Tensor, Tensor]:
    """Return uint8 images (n, 3, H, W) and labels (n,)."""
    items = [dataset[i] for i in range(len(dataset))]  # type: ignore[arg-type]
    return torch.stack([image for image, _ in items]), torch.tensor([int(label) for _, label in items])


def squeezed(generator: fp.RGBPGN, normalised: Tensor) -> Tensor:
    """Return normalised images as "replace" makes them, with grey rows at the bottom."""
    small = generator.shrink(normalised)
    rows = normalised.shape[2] - small.shape[2]
    grey = generator.normalised(torch.full((len(small), 3, rows, small.shape[3]), 0.5))
    return torch.cat([small, grey], dim=2)


def accuracy(backbone: fp.FrozenViT, parts: list[TensorDataset], classes: int) -> float:
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig(), classes).eval()
    train, val, (features, labels) = (extract_features(model, part) for part in parts)
    fit_linear_probe(model, train, val)
    with torch.no_grad():
        return float((model.head(features.to(model.head.weight.dtype)).argmax(-1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", default="mnist5k", choices=list(pixels.DATA))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    plan = pixels.plan_of(args.data, Path("results"), args.seeds)
    backbone = backbone_at(plan.base.backbone, plan.base.image_size).to(torch.bfloat16)
    config = fp.RGBPGNConfig(num_prompts=14, placement="replace")
    generator = fp.PromptedViT(backbone, config, 2).generator
    assert isinstance(generator, fp.RGBPGN)
    for seed in args.seeds:
        settings = pixels.table.Job("rgb-replace", 0.003, seed, True).settings(plan.base)
        splits = load_run_data(settings, 112)
        found = [images_of(part) for part in (splits.train, splits.val, splits.test)]
        whole = [(backbone.normalise(images).float(), labels) for images, labels in found]
        small = [(squeezed(generator, images), labels) for images, labels in whole]
        classes = int(max(labels.max() for _, labels in found)) + 1
        plain, shrunk = (
            accuracy(backbone, [TensorDataset(*part) for part in parts], classes) for parts in (whole, small)
        )
        print(f"{args.data}, seed {seed}: whole {plain:.3f}, squeezed {shrunk:.3f}", flush=True)


if __name__ == "__main__":
    main()
