"""One model for several data sets, which it knows as domains.

python examples/multi_dataset.py
python examples/multi_dataset.py --data photos drawings --backbone clip-vit-b16 --image-size 112

Every folder of --data is a domain, with a folder for each class. One generator learns from all of them, with a head for
each, and is told no domain: it sees the picture. Without flags it takes a tiny random ViT and random pictures of two
domains, red and blue ones, with classes of their own.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

import fastprompt as fp

CLASSES = {"red": ("dark", "bright"), "blue": ("left", "right")}


def tiny_pictures(folder: Path) -> list[Path]:
    """Write two domains: red pictures that are dark or bright, and blue ones whose left or right half is bright."""
    for domain, names in CLASSES.items():
        for label, name in enumerate(names):
            (folder / domain / name).mkdir(parents=True)
            for i in range(24):
                pixels = torch.randint(0, 128, (64, 64, 3), dtype=torch.uint8)
                if domain == "red":
                    pixels[..., 0] += 127 * label
                    pixels[..., 2] = 0
                else:
                    pixels[:, 32 * label : 32 * label + 32] += 100
                    pixels[..., 0] = 0
                Image.fromarray(pixels.numpy()).save(folder / domain / name / f"{i}.png")
    return [folder / domain for domain in CLASSES]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on all domains, and evaluate on each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", type=Path, help="folders, one for each domain")
    parser.add_argument("--backbone", help="clip-vit-b16, vit-s14 or a timm name")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as made:
        folders = args.data or tiny_pictures(Path(made))
        data = fp.load_data(folders, image_size=args.image_size, labels="per-domain", sampling="balanced")
        if args.backbone is None:
            backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=args.image_size)
        else:
            backbone = fp.load_backbone(args.backbone, image_size=args.image_size)
        model = fp.PromptedViT(backbone, fp.PGNConfig(num_prompts=4, widths=(8, 16)), num_classes=data.num_classes)
        fp.fit(model, data.train, data.val, epochs=args.epochs, batch_size=16, lr=5e-3, head_lr=1e-2, progress=False)
        for name in data.val.domains.names:
            pictures = data.val.of(name)
            print(f"{name}: accuracy {fp.evaluate(model, pictures).accuracy:.2f} on {len(pictures)} pictures")


if __name__ == "__main__":
    main()
