"""A prompted model in Lightning: checkpoints hold the adapter alone.

python examples/lightning_module.py

It runs on a tiny random ViT and random pictures. Needs `pip install 'fastprompt[hf]' lightning`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import fastprompt as fp


class Prompted(lightning.LightningModule):
    """Any prompted classifier, trained by AdamW with a rate for the head."""

    def __init__(self, model: Any, lr: float = 5e-3, head_lr: float = 1e-2) -> None:
        super().__init__()
        self.model, self.rates = model, (lr, head_lr)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        loss = self.model(pixel_values=images, labels=labels).loss
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for name, p in self.named_parameters() if p.requires_grad and (".head." in name) is head]}
            for head in (False, True)
        ]
        for group, lr in zip(groups, self.rates, strict=True):
            group["lr"] = lr
        return torch.optim.AdamW(groups, weight_decay=1e-4)


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures (count, 3, 64, 64), dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
    return images + 127 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels


def main() -> None:
    """Train, and load the checkpoint into a fresh model."""
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64)
    module = Prompted(fp.get_prompted_model(backbone, fp.VPTConfig(num_prompts=4), num_classes=2))
    loader = DataLoader(TensorDataset(*pictures(64)), batch_size=16, shuffle=True)
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(max_epochs=6, accelerator="cpu", **quiet)
    trainer.fit(module, loader)
    with tempfile.NamedTemporaryFile(suffix=".ckpt") as file:
        trainer.save_checkpoint(file.name)
        state = torch.load(file.name, weights_only=True)["state_dict"]
        fresh = Prompted(fp.get_prompted_model(backbone, fp.VPTConfig(num_prompts=4), num_classes=2))
        fresh.load_state_dict(state)
    images, labels = pictures(32)
    with torch.inference_mode():
        accuracy = (fresh.eval().model(images).logits.argmax(-1) == labels).float().mean()
    print(f"{len(state)} tensors in the checkpoint, accuracy {accuracy:.2f}")


if __name__ == "__main__":
    main()
