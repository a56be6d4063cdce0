"""Free input-independent prompts, PGN's control without the generator."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.pgn import PGN_PAPER
from fastprompt.generators.registry import register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class FreePromptsConfig(PromptConfig):
    """Options of `FreePrompts`.

    Attributes:
        num_prompts: K.
    """

    kind: ClassVar[str] = "free"
    num_prompts: int = 16

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)


def _cost(s: Sizes, config: FreePromptsConfig, t: Tally) -> PromptCost:
    """The prompts are a parameter and need no computation."""
    kept = s.tokens(config.num_prompts) * (s.cast or s.norm_pre)
    return PromptCost(config.num_prompts, range(1), 1, first=True, known=True, kept=kept)


@register_method(
    "free",
    title="Free prompts",
    paper="the input-independent control of Loedeman et al., BMVC 2024, arXiv 2210.06466",
    recipe={"lr": 1e-2},
    lrs=(0.01,),
    published={"free-paper": PGN_PAPER},
    cost=_cost,
)
class FreePrompts(PromptGenerator):
    """K learned vectors, the same for every image (PGN's input-independent baseline, "IIP").

    They are initialised N(0, 0.02²) and placed like PGN's prompts: last, before CLIP's pre-norm, in block 0 only. On a
    Swin transformer they flow through windows and patch merging like VPT-shallow's.
    """

    known_at = "static"
    config_class = FreePromptsConfig
    prompts_last = True
    before_pre_norm = True
    takes_stages = True
    config: FreePromptsConfig

    def __init__(
        self,
        config: FreePromptsConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(config, geometry, num_prompts=num_prompts, **sizes)
        self.num_prompts, self.layers = self.config.num_prompts, (0,)
        self.tokens = nn.Parameter(torch.randn(1, self.num_prompts, self.geometry.width) * 0.02)

    def prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        return self.tokens

    def free_tokens(self) -> dict[int, Tensor]:
        return {0: self.tokens[0]}

    def paper_num_parameters(self) -> int:
        """K · D."""
        return self.num_prompts * self.geometry.width
