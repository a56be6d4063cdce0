"""Visual prompt tuning (Jia et al., ECCV 2022), shallow and deep."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.generators.base import Draws, Geometry, PromptConfig, PromptGenerator, dropout_mask


@dataclasses.dataclass(frozen=True)
class VPTConfig(PromptConfig):
    """Options of `VPT`.

    Attributes:
        num_prompts: P per block.
        deep: new prompts in every block; else only in block 0.
        prompt_dropout: rate of dropout on prompt elements, drawn per image (0.1 in the authors' deep runs).
        project: width k the prompts are learned in and projected from, by one Linear; None: none.
    """

    kind: ClassVar[str] = "vpt"
    num_prompts: int = 10
    deep: bool = True
    prompt_dropout: float = 0.0
    project: int | None = None

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)
        self.require("deep", bool)
        self.require("prompt_dropout", (float, int), 0, 0.999)
        if self.project is not None:
            self.require("project", int, 1)


def uniform_bound(patch_size: int, dim: int) -> float:
    """v = √(6 / (3 p² + dim)): the authors' Xavier-like bound for prompts U(−v, v)."""
    return math.sqrt(6 / (3 * patch_size**2 + dim))


class StaticPrompts(nn.Module):
    """Learned prompts (L, P, k), U(−v, v), with VPT's optional projection k → D."""

    def __init__(self, layers: int, num_prompts: int, geometry: Geometry, project: int | None) -> None:
        super().__init__()
        dim = project or geometry.width
        bound = uniform_bound(geometry.patch_size, dim)
        self.embeddings = nn.Parameter(torch.empty(layers, num_prompts, dim).uniform_(-bound, bound))
        self.projection: nn.Linear | None = None
        if project is not None:
            self.projection = nn.Linear(project, geometry.width)
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")

    def forward(self, layer: int, mask: Tensor | None) -> Tensor:
        """(1, P, D), or (B, P, D) with a dropout mask of that shape."""
        prompts = self.embeddings[layer:layer + 1]
        if self.projection is not None:
            prompts = self.projection(prompts)
        return prompts if mask is None else prompts * mask


class VPT(PromptGenerator):
    """VPT: [CLS, prompts, patches]; deep blocks drop the former prompts' outputs and insert their own.

    Shallow: x₀ = [c, P, E₀]. Deep: block i reads [cᵢ₋₁, Pᵢ₋₁, Eᵢ₋₁] (VPT eq. 4–6). Prompts carry no position
    embedding and enter behind a pre-norm, where the block reads them.
    """

    known_at = "static"
    config_class = VPTConfig
    config: VPTConfig

    def __init__(self, config: VPTConfig | None = None, geometry: Geometry | None = None, **options: Any) -> None:
        super().__init__(config, geometry, **options)
        self.num_prompts = self.config.num_prompts
        self.layers = tuple(range(self.geometry.depth)) if self.config.deep else (0,)
        self.static = StaticPrompts(len(self.layers), self.num_prompts, self.geometry, self.config.project)

    def draw(self, batch: int) -> Draws:
        """"prompts": (layers, B, P, D) dropout masks."""
        if not self.training or self.config.prompt_dropout == 0:
            return {}
        shape = (len(self.layers), batch, self.num_prompts, self.geometry.width)
        return {"prompts": dropout_mask(shape, self.config.prompt_dropout, self.static.embeddings)}

    def prompts(self, layer: int, context: Any = None, tokens: Tensor | None = None,
                draws: Draws | None = None) -> Tensor:
        return self.static(layer, draws["prompts"][layer] if draws else None)

    def paper_num_parameters(self) -> int:
        """L · P · D for deep, P · D for shallow."""
        return len(self.layers) * self.num_prompts * self.geometry.width
