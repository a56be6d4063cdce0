"""Any prompt generator inside a timm ViT of your own, whose blocks, norms and head run as they are.

python examples/drop_in_timm.py
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import Tensor, nn

import fastprompt as fp

GENERATORS = (fp.PGN, fp.V2APT, fp.VAPT, fp.VPT, fp.FreePrompts, fp.PixelPrompt)


class Prompted(nn.Module):
    """A frozen timm ViT with a class token, whose blocks read [class token, patches, prompts]."""

    def __init__(self, vit: Any, generator: fp.PromptGenerator) -> None:
        super().__init__()
        self.vit, self.generator = vit.requires_grad_(False), generator

    def forward(self, images: Tensor) -> Tensor:
        vit, generator, draws = self.vit, self.generator, self.generator.draw(len(images))
        images = generator.prompt_images(images) if generator.changes_images else images
        x = vit._pos_embed(vit.patch_embed(images))  # (B, T, D)
        patches = slice(vit.num_prefix_tokens, x.shape[1])
        context = generator.context({"image": images, "embeddings": x[:, patches]}.get(generator.known_at), draws)
        for i, block in enumerate(vit.blocks):
            if i in generator.layers:  # new prompts take the places of the former ones
                prompts = generator.prompts(i, context, x[:, patches], draws).expand(len(x), -1, -1)
                x = torch.cat([x[:, : patches.stop], prompts], dim=1)
            x = block(x)
        return vit.forward_head(vit.norm(x))


class PromptedByPGN(Prompted):
    """The same for PGN alone, which writes mixture and sequence in one pass on a GPU."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.vit._pos_embed(self.vit.patch_embed(images))
        x = self.generator.sequence(images, x)
        return self.vit.forward_head(self.vit.norm(self.vit.blocks(x)))


def main() -> None:
    """The gradients of one batch for each generator in a small random ViT."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", pretrained=False, num_classes=10).eval()
    sizes, images = fp.FrozenViT(vit), torch.randn(4, 3, 160, 160)
    for generator_class in GENERATORS:
        wrapped = PromptedByPGN if generator_class is fp.PGN else Prompted
        model = wrapped(vit, generator_class(geometry=sizes))
        model(images).logsumexp(dim=1).mean().backward()
        trained = [p for p in model.parameters() if p.grad is not None]
        print(f"{generator_class.__name__}: gradients of {sum(p.numel() for p in trained):,} parameters")


if __name__ == "__main__":
    main()
