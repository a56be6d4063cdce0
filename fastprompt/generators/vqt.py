"""VQT: visual query tuning (Tu, Mai and Chao, CVPR 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.registry import register_method
from fastprompt.generators.vpt import StaticPrompts

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT

EPS = 1e-6
"""Added to the variance by `VQTConfig.normalise`."""


@dataclasses.dataclass(frozen=True)
class VQTConfig(PromptConfig):
    """Options of `VQT`.

    Attributes:
        num_queries: P per block.
        normalise: whether each of the queries' outputs is normalised over its channels before the head reads it.
        group_lasso: weight λ of the penalty λ Σ_f ‖W[:, f]‖₂ on a linear head's weights of each feature f; 0 is none.
        first_block: index of the first block with queries.
    """

    kind: ClassVar[str] = "vqt"
    num_queries: int = 1
    normalise: bool = True
    group_lasso: float = 0.0
    first_block: int = 0

    def __post_init__(self) -> None:
        self.require("num_queries", int, 1)
        self.require("normalise", bool)
        self.require("group_lasso", (float, int), 0, 1e6)
        self.require("first_block", int, 0)


def _cost(s: Sizes, config: VQTConfig, t: Tally) -> PromptCost:
    """The queries are a slice of one parameter; their outputs are normalised and joined with the frozen features."""
    p, layers = config.num_queries, range(config.first_block, s.depth)

    def make(t: Tally, i: int) -> None:
        t.call(0, 1 + (i > layers[0]))

    def gather(t: Tally, frozen: int) -> None:
        outputs = s.batch * p * len(layers)
        if config.normalise:
            t.call(len(layers), len(layers), s.tokens(outputs) + 2 * outputs * s.element)
        t.call(1, 0 if config.normalise else len(layers))  # without the norm, each part's gradient is copied

    return PromptCost(
        p, layers, s.depth, make, known=True, role="queries", features=s.width * (1 + p * len(layers)), gather=gather
    )


@register_method(
    "vqt",
    title="VQT",
    paper="Tu, Mai and Chao, CVPR 2023, arXiv 2212.03220",
    recipe={"lr": 5e-3},
    lrs=(0.002, 0.005, 0.01),
    cost=_cost,
)
class VQT(PromptGenerator):
    """VQT: in every block P learned tokens summarise the frozen features for the head (VQT §3).

    With Q' = W_q U for the learned queries U of a block, and K, V those of its own tokens alone,

        Z' = MLP-block(softmax(Q' Kᵀ / √d) V)

    and the head reads [z, Z'_1, ..., Z'_M], the frozen feature z and the outputs of all M blocks: (1 + M P) D numbers.
    The queries are neither keys nor values, so the frozen features are those of the backbone without prompts, whatever
    the queries are: training goes back through the queries' own rows alone.

    Our reading: as the paper's queries are tokens of the block, their outputs pass its norms, projection, both
    residuals and its MLP like any row; they have no place in the image, so a rotary embedding does not rotate them and
    a relative position bias adds nothing to their scores. Our choices: z is what the model's `readout` gives, the class
    token for most models. With `normalise`, each Z' is normalised over its channels, (Z' − mean) / √(variance + 1e-6),
    since the blocks' outputs differ in scale; z has passed the final norm. U is initialised like VPT's prompts.

    Selection of features, as the paper takes it from Head2Toe (Evci et al., ICML 2022): train with `group_lasso` λ,
    which adds λ Σ_f ‖W[:, f]‖₂ to the loss; keep the features with the largest norms, `model.select_features(keep)`;
    train again. The paper also trains without selection. Which λ and how many features is ours to leave open.

    `generator(layer=i)` → (1, P, D), the queries of block i.
    """

    known_at = "static"
    role = "queries"
    config_class = VQTConfig
    config: VQTConfig

    def __init__(
        self,
        config: VQTConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_queries: int = UNSET,
        normalise: bool = UNSET,
        group_lasso: float = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(
            config,
            geometry,
            num_queries=num_queries,
            normalise=normalise,
            group_lasso=group_lasso,
            first_block=first_block,
            **sizes,
        )
        self.num_prompts = self.config.num_queries
        self.layers = tuple(range(self.config.first_block, self.geometry.depth))
        self.queries = StaticPrompts(self.layers, self.num_prompts, self.geometry, None)

    def prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        return self.queries(layer, None)

    def free_tokens(self) -> dict[int, Tensor]:
        return self.queries.free_tokens(self.layers)

    def feature_width(self, width: int) -> int:
        return width + len(self.layers) * self.num_prompts * self.geometry.width

    def gather(self, features: Tensor, answers: Sequence[Tensor]) -> Tensor:
        """Return [z, Z'_1, ..., Z'_M], (B, D + M · P · D), in the dtype of `features`."""
        if self.config.normalise:
            answers = [F.layer_norm(rows, rows.shape[-1:], eps=EPS) for rows in answers]
        return torch.cat([features, *(rows.flatten(1) for rows in answers)], dim=1)

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """Return λ Σ_f ‖W[:, f]‖₂ over the features that a linear head reads; None without group lasso.

        Raises:
            ValueError: the head is not linear.
        """
        if self.config.group_lasso == 0:
            return None
        if weight is None:
            raise ArgumentError("VQTConfig.group_lasso", "must be 0 without a linear head, whose weights it groups")
        return self.config.group_lasso * torch.linalg.vector_norm(weight, dim=0).sum()

    def paper_num_parameters(self) -> int:
        """M · P · D, the queries of M blocks."""
        return len(self.layers) * self.num_prompts * self.geometry.width
