"""Many adapters on one frozen backbone, each picture of a batch by its own.

python examples/many_adapters.py

It trains three adapters of different methods for different tasks on a tiny random ViT and random pictures, and serves
them from one engine, which computes the frozen part once for all pictures of a batch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

import fastprompt as fp

METHODS = {
    "brightness": fp.VPTConfig(num_prompts=4),
    "colour": fp.VAPTConfig(num_prompts=2, hidden=4),
    "half": fp.PGNConfig(num_prompts=4, library_size=8, widths=(8, 16)),
}


def pictures(task: str, count: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures (count, 3, 64, 64) of two classes: all of it, its red channel, or its left half is bright."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
    part = {"brightness": images, "colour": images[:, :1], "half": images[..., :32]}[task]  # a view
    part += 127 * labels.to(torch.uint8).view(-1, 1, 1, 1)
    return images, labels


def main() -> None:
    """Train the adapters, save them, and classify a mixed batch."""
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64)
    with tempfile.TemporaryDirectory() as folder:
        for task, config in METHODS.items():
            model = fp.PromptedViT(backbone, config, num_classes=2)
            train, val = TensorDataset(*pictures(task, 64)), TensorDataset(*pictures(task, 16))
            fp.fit(model, train, val, epochs=6, batch_size=16, lr=5e-3, head_lr=1e-2, progress=False)
            model.save_pretrained(Path(folder) / task)
            size = sum(file.stat().st_size for file in (Path(folder) / task).iterdir())
            print(f"{task}: {size:,} bytes beside a backbone of {4 * sum(p.numel() for p in backbone.parameters()):,}")
        with fp.Engine(backbone, batch_sizes=(1, 24)) as engine:
            for task in METHODS:
                engine.add_adapter(task, Path(folder) / task)
            batch = [(task, *pictures(task, 8)) for task in METHODS]
            images = torch.cat([of_task for _, of_task, _ in batch])
            names = [task for task, of_task, _ in batch for _ in of_task]
            outputs = engine(images, adapter_names=names)  # logits of each picture by its own adapter
    labels = torch.cat([of_task for _, _, of_task in batch])
    right = sum(int(output.argmax()) == int(label) for output, label in zip(outputs, labels, strict=True))
    print(f"{right} of {len(outputs)} right in one batch of {len(METHODS)} adapters")


if __name__ == "__main__":
    main()
