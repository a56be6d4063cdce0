"""Adapt a frozen ViT to a folder of pictures, and write what it says of the test pictures.

python examples/adapt_folder.py birds --out birds-adapter
python examples/adapt_folder.py birds --method pgn --backbone clip-vit-b16 --image-size 112 --out birds-adapter

The folder has a folder for each class, or `train`, `val` and `test` with these in them.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

import fastprompt as fp
from fastprompt.generators import get_method


def adapt(folder: Path, out: Path, method: str, backbone_name: str, image_size: int, epochs: int | None) -> float:
    """Train, save the adapter and `predictions.csv` in `out`; returns the accuracy on the test pictures."""
    data = fp.load_data(folder, image_size=image_size, augment="flip")
    backbone = fp.load_backbone(backbone_name, image_size=image_size)
    model = fp.PromptedViT(backbone, get_method(method).config(), num_classes=data.num_classes)
    model.print_trainable_parameters()

    changes = {} if epochs is None else {"epochs": epochs}
    result = fp.fit(model, data.train, data.val, out_dir=out / "run", **changes)
    print(
        f"best of {len(result.history)} epochs: {result.best_epoch}, validation accuracy {result.best_val_accuracy:.3f}"
    )

    model.save_pretrained(out)
    test = fp.evaluate(model, data.test)  # the test pictures are read once, here
    with open(out / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["class", "predicted", "probability"])
        for label, probabilities in zip(test.labels.tolist(), test.probabilities, strict=True):
            best = int(probabilities.argmax())
            rows.writerow([data.class_names[label], data.class_names[best], f"{probabilities[best]:.4f}"])
    return test.accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and adapt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="pictures, a folder for each class")
    parser.add_argument("--out", type=Path, default=Path("adapter"), help="folder of the adapter")
    parser.add_argument("--method", default="vpt-deep", choices=fp.list_methods())
    parser.add_argument("--backbone", default="vit_base_patch16_224", help="clip-vit-b16, vit-s14 or a timm name")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, help="the method's own number if not given")
    args = parser.parse_args(arguments)
    accuracy = adapt(args.folder, args.out, args.method, args.backbone, args.image_size, args.epochs)
    print(f"test accuracy {accuracy:.3f}; the adapter is in {args.out}")


if __name__ == "__main__":
    main()
