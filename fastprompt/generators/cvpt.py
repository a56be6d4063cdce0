"""CVPT: cross visual prompt tuning (Huang et al., ICCV 2025)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.registry import register_method
from fastprompt.generators.vpt import StaticPrompts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class CVPTConfig(PromptConfig):
    """Options of `CVPT`.

    Attributes:
        num_prompts: P per block.
        first_block: index of the first block with prompts; the blocks before it run without them.
    """

    kind: ClassVar[str] = "cvpt"
    num_prompts: int = 10
    first_block: int = 0

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)
        self.require("first_block", int, 0)


def _cost(s: Sizes, config: CVPTConfig, t: Tally) -> PromptCost:
    """Each block's prompts are a slice of one parameter."""
    layers = range(config.first_block, s.depth)

    def make(t: Tally, i: int) -> None:
        t.call(0, 1 + (i > layers[0]))

    return PromptCost(config.num_prompts, layers, s.depth, make, known=True, role="cross")


@register_method(
    "cvpt",
    title="CVPT",
    paper="Huang et al., ICCV 2025, arXiv 2408.14961",
    recipe={"lr": 5e-3},
    lrs=(0.002, 0.005, 0.01),
    cost=_cost,
)
class CVPT(PromptGenerator):
    """CVPT: in every block, tokens attend to P learned prompts apart from each other (CVPT §3).

        x₁ = x + SA(LN₁ x),   x₂ = x₁ + CA(LN₁ x₁, LN₁ P),   x₃ = x₂ + MLP(LN₂ x₂)
        CA(x, P) = softmax(Q(x) K(P)ᵀ / √d) V(P) W_o + b_o

    CA has a softmax of its own, so prompts do not take weight from the tokens' own attention. From the paper: the
    cross-attention after self-attention with a residual of its own, new prompts in every block, and weights shared with
    the block's self-attention. Our reading: these weights are all frozen, and so are norm and, where a backbone has it,
    LayerScale, which CA shares as well; between tokens and prompts there are no positions, so CA has neither rotary
    embedding nor relative position bias. Our choices: prompts are initialised like VPT's, and `first_block`.

    Sharing makes CA a function of frozen weights and prompts alone, so W_q Kᵀ and V W_o are computed once per adapter
    (in training, once per batch); see `fastprompt.vit.cross`.

    `generator(layer=i)` → (1, P, D), the prompts of block i.
    """

    known_at = "static"
    role = "cross"
    config_class = CVPTConfig
    config: CVPTConfig

    def __init__(
        self,
        config: CVPTConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(config, geometry, num_prompts=num_prompts, first_block=first_block, **sizes)
        self.num_prompts = self.config.num_prompts
        self.layers = tuple(range(self.config.first_block, self.geometry.depth))
        self.static = StaticPrompts(self.layers, self.num_prompts, self.geometry, None)

    def prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        return self.static(layer, None)

    def free_tokens(self) -> dict[int, Tensor]:
        return self.static.free_tokens(self.layers)

    def paper_num_parameters(self) -> int:
        """L · P · D."""
        return len(self.layers) * self.num_prompts * self.geometry.width
