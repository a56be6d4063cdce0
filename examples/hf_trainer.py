"""A model of transformers, prompted, trained by transformers' own Trainer, and used in a pipeline.

python examples/hf_trainer.py

It runs on a tiny random ViT and random pictures; take `AutoModelForImageClassification.from_pretrained(...)` and a data
set of yours. Needs `pip install 'fastprompt[hf]' accelerate`.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_pil_image
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, pipeline

import fastprompt as fp

NAMES = ("dark", "bright")


class Pictures(Dataset[dict[str, Any]]):
    """`count` pictures as Trainer takes them: dark ones of class 0 and bright ones of class 1."""

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) % 2
        noise = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
        self.pictures = noise + 127 * self.labels.to(torch.uint8).view(-1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"pixel_values": self.pictures[i], "labels": self.labels[i]}  # uint8: the model normalises


def classifier() -> nn.Module:
    """A ViT of transformers with names for its classes."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    return ViTForImageClassification(ViTConfig(image_size=64, id2label=dict(enumerate(NAMES)), **sizes))


def train(vit: nn.Module, out: str, epochs: int) -> Any:
    """Prompt the model and train it; the checkpoints in `out` hold the adapter alone."""
    model = fp.get_prompted_model(vit, fp.VPTConfig(num_prompts=4))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        out,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=Pictures(64)).train()
    return model


def main() -> None:
    """Train, classify two pictures, and load the last checkpoint as an adapter."""
    torch.manual_seed(0)
    vit = classifier()
    with tempfile.TemporaryDirectory() as out:
        model = train(vit, out, epochs=4)
        classify = pipeline("image-classification", model=model, image_processor=model.image_processor())
        held_out = Pictures(8)
        found = [classify(to_pil_image(picture))[0]["label"] for picture in held_out.pictures]
        right = sum(name == NAMES[label] for name, label in zip(found, held_out.labels.tolist(), strict=True))
        again = fp.PromptedViT.from_pretrained(fp.FrozenViT(vit), f"{out}/checkpoint-16")
    with torch.inference_mode():
        pictures = held_out.pictures.to(model.device)
        same = torch.equal(again.to(model.device)(pictures), model.prompted(pictures))
    print(f"{right} of {len(found)} right, the checkpoint is the same adapter: {same}")


if __name__ == "__main__":
    main()
