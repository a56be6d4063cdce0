"""A method of your own, from outside the package: each block's prompts are learned mixtures of its patch tokens.

python examples/own_method.py
fastprompt adapt --plugin examples/own_method.py --method pooled --data FOLDER --out runs/pooled
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import fastprompt as fp


@dataclass(frozen=True)
class PooledConfig(fp.PromptConfig):
    """Options of `Pooled`. num_prompts: P, of each block."""

    kind: ClassVar[str] = "pooled"
    num_prompts: int = 4

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)


def pooled_cost(sizes: Any, config: PooledConfig, tally: Any) -> fp.PromptCost:
    """In each block one product of (P, N) weights with (N, D) tokens, for each image."""
    flops = 2 * sizes.batch * config.num_prompts * sizes.patches * sizes.width
    return fp.PromptCost(config.num_prompts, range(sizes.depth), make=lambda tally, block: tally.product(flops, 2))


@fp.register_method("pooled", title="Pooled prompts", recipe={"lr": 5e-3}, lrs=(2e-3, 5e-3), cost=pooled_cost)
class Pooled(fp.PromptGenerator):
    """P = W X + b: X (N, D) are the patch tokens that enter the block, W (P, N) and b (P, D) are the block's own."""

    known_at, config_class = "layer", PooledConfig
    config: PooledConfig

    def __init__(self, config: Any = None, geometry: Any = None, **options: Any) -> None:
        super().__init__(config, geometry, **options)
        self.num_prompts, self.layers = self.config.num_prompts, tuple(range(self.geometry.depth))
        rows, columns = self.geometry.grid
        self.mix = nn.Parameter(0.02 * torch.randn(self.geometry.depth, self.num_prompts, rows * columns))
        self.bias = nn.Parameter(torch.zeros(self.geometry.depth, self.num_prompts, self.geometry.width))

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Any = None) -> Tensor:
        self.check_input(tokens, "tokens")
        assert tokens is not None
        return self.mix[layer] @ tokens.to(self.mix.dtype) + self.bias[layer]  # (B, P, D)


def main() -> None:
    """Adapt a tiny random ViT to tell bright pictures from dark ones."""
    torch.manual_seed(0)
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64)
    images = torch.randint(0, 128, (48, 3, 64, 64), dtype=torch.uint8)
    labels = torch.arange(48) % 2
    images += 127 * labels.to(torch.uint8).view(-1, 1, 1, 1)
    model = fp.PromptedViT(backbone, PooledConfig(), num_classes=2)
    recipe = fp.default_recipe(model.config).replace(dtype="float32")
    result = fp.fit(model, (images[:32], labels[:32]), (images[32:], labels[32:]), recipe, progress=False)
    print(f"{model.num_trainable()['total']:,} trained parameters, accuracy {result.best_val_accuracy:.2f}")


if __name__ == "__main__":
    main()
