"""Any prompt generator inside a ViT of transformers, whose layers and norm run as they are.

python examples/drop_in_transformers.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

import fastprompt as fp

GENERATORS = (fp.PGN, fp.V2APT, fp.VAPT, fp.VPT, fp.FreePrompts, fp.PixelPrompt)


class Prompted(nn.Module):
    """A frozen `ViTModel`, whose layers read [class token, patches, prompts]; its class token is what leaves."""

    def __init__(self, vit: Any, generator: fp.PromptGenerator) -> None:
        super().__init__()
        self.vit, self.generator = vit.requires_grad_(False), generator

    def forward(self, images: Tensor) -> Tensor:
        vit, generator, draws = self.vit, self.generator, self.generator.draw(len(images))
        images = generator.prompt_images(images) if generator.changes_images else images
        x = vit.embeddings(images)  # (B, T, D)
        patches = slice(1, x.shape[1])
        context = generator.context({"image": images, "embeddings": x[:, patches]}.get(generator.known_at), draws)
        for i, layer in enumerate(vit.layers):
            if i in generator.layers:  # new prompts take the places of the former ones
                prompts = generator.prompts(i, context, x[:, patches], draws).expand(len(x), -1, -1)
                x = torch.cat([x[:, : patches.stop], prompts], dim=1)
            x = layer(x)
        return vit.layernorm(x)[:, 0]


class PromptedByPGN(Prompted):
    """The same for PGN alone, which writes mixture and sequence in one pass on a GPU."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.generator.sequence(images, self.vit.embeddings(images))
        for layer in self.vit.layers:
            x = layer(x)
        return self.vit.layernorm(x)[:, 0]


def main() -> None:
    """The gradients of one batch for each generator in a small random ViT."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64, patch_size=8
    )
    vit = ViTModel(config, add_pooling_layer=False).eval()
    sizes, images = fp.FrozenViT(vit), torch.randn(4, 3, 64, 64)
    for generator_class in GENERATORS:
        wrapped = PromptedByPGN if generator_class is fp.PGN else Prompted
        options = {"border": 6} if generator_class is fp.PixelPrompt else {}
        model = wrapped(vit, generator_class(geometry=sizes, **options))
        model(images).logsumexp(dim=1).mean().backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        print(f"{generator_class.__name__}: gradients of {sum(p.numel() for p in trained):,} parameters")


if __name__ == "__main__":
    main()
