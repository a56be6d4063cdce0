"""Pixel prompts: a learned border added to the image (Bahng et al., 2022)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.registry import Published, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class PixelPromptConfig(PromptConfig):
    """Options of `PixelPrompt`.

    Attributes:
        border: width in pixels of the frame.
    """

    kind: ClassVar[str] = "pixel"
    border: int = 30

    def __post_init__(self) -> None:
        self.require("border", int, 1)


def _cost(s: Sizes, config: PixelPromptConfig, t: Tally) -> PromptCost:
    """The frame, its sum with the images, and the gradients of its four strips."""
    t.call(4, 1 + 8, s.batch * s.channels * s.image_size[0] * s.image_size[1] * s.element)
    return PromptCost(0, (), changes_images=True)


@register_method(
    "pixel",
    title="Pixel prompt",
    paper="Bahng et al., 2022, arXiv 2203.17274",
    recipe={"lr": 1e-2, "weight_decay": 0.0},
    lrs=(0.01,),
    published={
        "pixel-paper": Published(
            "hjbahng/visual_prompting, for CLIP",
            {
                "epochs": 1000,
                "batch_size": 256,
                "lr": 40.0,
                "weight_decay": 0.0,
                "optimizer": "sgd",
                "momentum": 0.9,
                "dtype": "float32",
            },
            warmup_steps=1000,
        )
    },
    cost=_cost,
)
class PixelPrompt(PromptGenerator):
    """x + δ, where δ is learned on a frame of `border` pixels and zero inside it; initialised N(0, 1).

    The frame has four strips, top and bottom (1, 3, b, W), left and right (1, 3, H − 2b, b): 2·3·b·(W + H − 2b)
    parameters (69,840 for 30 px at 224). It is added to the normalised image. There are no prompt tokens:
    `generator(images)` returns prompted images (B, 3, H, W).
    """

    known_at = "image"
    config_class = PixelPromptConfig
    takes_stages, changes_images = True, True
    config: PixelPromptConfig

    def __init__(
        self,
        config: PixelPromptConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        border: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(config, geometry, border=border, **sizes)
        self.num_prompts, self.layers = 0, ()
        b, (h, w), c = self.config.border, self.geometry.image_size, self.geometry.channels
        if 2 * b >= min(h, w):
            raise ValueError(f"PixelPromptConfig.border must be less than half of the {h} x {w} image, got {b}")
        self.top, self.bottom = (nn.Parameter(torch.randn(1, c, b, w)) for _ in range(2))
        self.left, self.right = (nn.Parameter(torch.randn(1, c, h - 2 * b, b)) for _ in range(2))

    def frame(self) -> Tensor:
        """Return δ (1, C, H, W)."""
        rows, inside = self.left.shape[2], self.geometry.image_size[1] - 2 * self.config.border
        middle = torch.cat([self.left, self.left.new_zeros(1, self.geometry.channels, rows, inside), self.right], dim=3)
        return torch.cat([self.top, middle, self.bottom], dim=2)

    def prompt_images(self, images: Tensor) -> Tensor:
        """Return normalised images (B, 3, H, W) with the frame added, in the wider of the two dtypes."""
        self.check_input(images, "images")
        if tuple(images.shape[2:]) != tuple(self.geometry.image_size):
            raise ArgumentError(
                "images", f"must have {self.geometry.image_size} pixels like the frame, got {tuple(images.shape[2:])}"
            )
        return images + self.frame()

    def forward(self, x: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Return prompted images (B, 3, H, W)."""
        if layer is not None:
            raise ArgumentError("layer", f"must be None because pixel prompts have no layers, got {layer!r}")
        self.check_input(x)
        assert x is not None
        return self.prompt_images(x)

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        raise ValueError("a pixel prompt has no prompt tokens; call prompt_images")

    def paper_num_parameters(self) -> int:
        """2 · C · b · (W + H − 2b)."""
        b, (h, w) = self.config.border, self.geometry.image_size
        return 2 * self.geometry.channels * b * (w + h - 2 * b)
