"""A training loop of your own: V²APT with its KL term, a rate for the head, and the adapter that comes out.

python examples/own_loop.py

It runs on a tiny random ViT and random pictures; take a backbone with weights and a DataLoader of yours.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fastprompt as fp


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures (count, 3, 64, 64), dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
    return images + 127 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels


def train(model: fp.PromptedViT, loader: DataLoader, epochs: int) -> list[float]:
    """Train generator and head; returns the mean loss of each epoch."""
    groups = [
        {"params": [p for name, p in model.trainable_parameters() if name.startswith("head.") is head], "lr": lr}
        for head, lr in ((False, 5e-3), (True, 1e-2))
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    losses = []
    for _ in range(epochs):
        model.train()  # the backbone stays in eval mode
        total = 0.0
        for images, labels in loader:
            logits, aux = model(images, return_aux=True)
            loss = cross_entropy(logits, labels)
            if "kl" in aux:  # (B,), in nats: of V²APT alone
                loss = loss + model.config.beta * aux["kl"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / len(loader))
    return losses


def main() -> None:
    """Train, save, load again and compare."""
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64)
    model = fp.PromptedViT(backbone, fp.V2APTConfig(num_prompts=4, num_instance=2), num_classes=2)
    losses = train(model, DataLoader(TensorDataset(*pictures(64)), batch_size=16, shuffle=True), epochs=6)
    held_out = pictures(32)
    accuracy = fp.evaluate(model, held_out).accuracy
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "adapter")
        again = fp.PromptedViT.from_pretrained(backbone, Path(folder) / "adapter")
    with torch.inference_mode():
        same = torch.equal(model.eval()(held_out[0]), again.eval()(held_out[0]))
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f}, accuracy {accuracy:.2f}, the same after loading: {same}")


if __name__ == "__main__":
    main()
