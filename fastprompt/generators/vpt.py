"""Visual prompt tuning (Jia et al., ECCV 2022), shallow and deep."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import (
    UNSET,
    Draws,
    Geometry,
    GeometryOptions,
    PromptConfig,
    PromptGenerator,
    dropout_mask,
)
from fastprompt.generators.registry import Published, Variant, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class VPTConfig(PromptConfig):
    """Options of `VPT`.

    Attributes:
        num_prompts: P per block.
        deep: whether every block has its own prompts; otherwise only block 0 has prompts.
        prompt_dropout: dropout rate of prompt elements (0.1 in the authors' deep runs).
        project: width k in which prompts are learned before one Linear projects them to D; None does not project.
        deep_layers: number of blocks, from `first_block` on, with their own prompts if `deep`; None is all. The prompts
            of the last one flow on through the other blocks as tokens (the authors' NUM_DEEP_LAYERS).
        dropout_per: "image" (default) draws a dropout mask for each image, as the authors' ViT does. "batch" shares one
            mask among all images of a batch from block 1 on, as their Swin does.
        first_block: index of the first block with prompts; the blocks before it run without them, so that what enters
            it is a constant of each image.
    """

    kind: ClassVar[str] = "vpt"
    num_prompts: int = 10
    deep: bool = True
    prompt_dropout: float = 0.0
    project: int | None = None
    deep_layers: int | None = None
    dropout_per: str = "image"
    first_block: int = 0

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)
        self.require("deep", bool)
        self.require("prompt_dropout", (float, int), 0, 0.999)
        if self.project is not None:
            self.require("project", int, 1)
        if self.deep_layers is not None:
            self.require("deep_layers", int, 1)
            if not self.deep:
                raise ArgumentError("VPTConfig.deep_layers", f"must be None without deep, got {self.deep_layers}")
        self.require_choice("dropout_per", ("image", "batch"))
        self.require("first_block", int, 0)

    def blocks(self, depth: int) -> range:
        """The blocks with prompts of their own, on a backbone of `depth` blocks."""
        last = depth if self.deep_layers is None else self.first_block + self.deep_layers
        return range(self.first_block, last if self.deep else self.first_block + 1)


def uniform_bound(patch_size: int, dim: int) -> float:
    """Return v = √(6 / (3 p² + dim)), the authors' Xavier-like bound for prompts U(−v, v)."""
    return math.sqrt(6 / (3 * patch_size**2 + dim))


class StaticPrompts(nn.Module):
    """Learned prompts (L, P, k) of L blocks, initialised U(−v, v), with VPT's optional projection k → D.

    `layers` are the indices of the blocks, which are consecutive. If the blocks belong to several stages, `embeddings`
    is a list with (blocks, P, width) per stage, and v depends on the stage's width.
    """

    embeddings: nn.Parameter | nn.ParameterList

    def __init__(self, layers: Sequence[int], num_prompts: int, geometry: Geometry, project: int | None) -> None:
        super().__init__()
        self.first = layers[0]
        widths = [geometry.widths[layer] for layer in layers]
        self.stages = [(width, len(list(blocks))) for width, blocks in itertools.groupby(widths)]
        if len(self.stages) > 1 and project is not None:
            raise ArgumentError(
                "project",
                f"must be None if prompts have several widths "
                f"{tuple(width for width, _ in self.stages)}, got {project}",
            )
        embeddings = []
        for width, blocks in self.stages:
            dim = project or width
            bound = uniform_bound(geometry.patch_size, dim)
            embeddings.append(nn.Parameter(torch.empty(blocks, num_prompts, dim).uniform_(-bound, bound)))
        self.embeddings = embeddings[0] if len(embeddings) == 1 else nn.ParameterList(embeddings)
        self.projection: nn.Linear | None = None
        if project is not None:
            self.projection = nn.Linear(project, self.stages[0][0])
            nn.init.kaiming_normal_(self.projection.weight, a=0, mode="fan_out")

    def place(self, layer: int) -> tuple[int, int]:
        """Return (stage, index within the stage) of block `layer`."""
        layer, stage = layer - self.first, 0
        while layer >= self.stages[stage][1]:
            layer, stage = layer - self.stages[stage][1], stage + 1
        return stage, layer

    def of_stage(self, stage: int) -> Tensor:
        """Return the embeddings (blocks, P, k) of one stage."""
        return self.embeddings[stage] if isinstance(self.embeddings, nn.ParameterList) else self.embeddings

    def free_tokens(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return the embeddings (P, D) of each block, as views; {} with a projection."""
        if self.projection is not None:
            return {}
        return {layer: self.of_stage(stage)[index] for layer in layers for stage, index in [self.place(layer)]}

    def forward(self, layer: int, mask: Tensor | None) -> Tensor:
        """Return the prompts (1, P, D) of block `layer`, or (B, P, D) with a dropout mask of that shape."""
        stage, index = self.place(layer)
        prompts = self.of_stage(stage)[index : index + 1]
        if self.projection is not None:
            prompts = self.projection(prompts)
        return prompts if mask is None else prompts * mask


def static_cost(s: Sizes, t: Tally, count: int, layers: range, dropout: float) -> PromptCost:
    """The cost of `StaticPrompts`: each layer's slice of one parameter, masked for each image if there is dropout."""
    masked = s.training and dropout > 0
    mask = 4 * s.batch * count * s.width * masked
    t.call(3 * masked, 0, len(layers) * mask)

    def make(t: Tally, i: int) -> None:
        t.call(
            int(masked), 1 + (i > layers[0]) + masked * (1 + (s.batch > 1)), mask * (not s.cast and s.graph != "papers")
        )

    return PromptCost(count, layers, 0 if masked else layers.stop, make, known=not masked)


def _cost(s: Sizes, config: VPTConfig, t: Tally) -> PromptCost:
    """`static_cost` of the blocks with prompts of their own."""
    if config.project is not None:
        raise ValueError("the cost of VPTConfig.project has no formula")
    if config.dropout_per != "image":
        raise ValueError(f"the cost of VPTConfig.dropout_per = {config.dropout_per!r} has no formula")
    return static_cost(s, t, config.num_prompts, config.blocks(s.depth), config.prompt_dropout)


VPT_SEARCH: dict[str, Any] = {
    "lr_per": 256,
    "resize": "squash",
    "lrs": (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
    "weight_decays": (0.01, 0.001, 0.0001, 0.0),
}
"""VPT's and VAPT's code: scaling of the learning rates, search space on VTAB-1k (tune_vtab.py, "prompt"; the five
fine-grained sets omit base rate 0.05), and resizing of VTAB-1k's images, which are not augmented.
"""

VPT_RECIPE: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 64,
    "optimizer": "sgd",
    "momentum": 0.9,
    "decay": "all but head bias",
    "schedule": "epoch",
    "warmup_epochs": 10,
    "head_init": "vpt",
    "select_by": "last",
    "dtype": "float32",
}
"""The recipe of VPT's and VAPT's code for every task. The first epoch has learning rate 0."""


@register_method(
    "vpt-deep",
    title="VPT-deep",
    paper="Jia et al., ECCV 2022, arXiv 2203.12119",
    options={"deep": True},
    recipe={"lr": 5e-3},
    lrs=(0.005, 0.01),
    published={
        "vpt-paper": Published(
            "src/configs and demo.ipynb of KMnP/vpt; base rate and weight decay are searched for every task",
            {**VPT_RECIPE, "lr": 1.0, "weight_decay": 1e-3},
            **VPT_SEARCH,
        )
    },
    cost=_cost,
    variants={"vpt-shallow": Variant("VPT-shallow", {"deep": False}, lrs=(0.01,))},
)
class VPT(PromptGenerator):
    """VPT: [CLS, prompts, patches]; deep blocks drop the outputs of earlier prompts and insert their own.

    Shallow: x₀ = [c, P, E₀]. Deep: block i reads [cᵢ₋₁, Pᵢ₋₁, Eᵢ₋₁] (VPT eq. 4–6), in all blocks or the first
    `deep_layers`. With `first_block` k (our option), VPT starts at block k, as if the blocks before it embedded the
    image. Prompts have no position embedding and are inserted after a pre-norm (such as CLIP's), directly before the
    block.

    Swin: every window attends to the prompts, which have the width of the block's stage; see
    `fastprompt.vit.swin_reference`.
    """

    known_at = "static"
    read_with_patches = True
    config_class = VPTConfig
    takes_stages = True
    config: VPTConfig

    def __init__(
        self,
        config: VPTConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        deep: bool = UNSET,
        prompt_dropout: float = UNSET,
        project: int | None = UNSET,
        deep_layers: int | None = UNSET,
        dropout_per: str = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(
            config,
            geometry,
            num_prompts=num_prompts,
            deep=deep,
            prompt_dropout=prompt_dropout,
            project=project,
            deep_layers=deep_layers,
            dropout_per=dropout_per,
            first_block=first_block,
            **sizes,
        )
        cfg, depth = self.config, self.geometry.depth
        room = depth - cfg.first_block
        if cfg.deep_layers is not None and cfg.deep_layers > room:
            raise ArgumentError("VPTConfig.deep_layers", f"must be at most the {room} blocks, got {cfg.deep_layers}")
        self.num_prompts, self.layers = cfg.num_prompts, tuple(cfg.blocks(depth))
        self.static = StaticPrompts(self.layers, self.num_prompts, self.geometry, self.config.project)

    def draw(self, batch: int) -> Draws:
        """Draw dropout masks "prompts" (layers, B, P, D), or "prompts.s" for each stage s if there are several.

        With `dropout_per` "batch" the masks are (layers, 1, P, D), and "first" (1, B, P, D) holds those of the first
        prompted block.
        """
        rate, static, shared = self.config.prompt_dropout, self.static, self.config.dropout_per == "batch"
        if not self.training or rate == 0:
            return {}
        draws = {
            _mask_name(static, stage): dropout_mask(
                (blocks, 1 if shared else batch, self.num_prompts, width), rate, static.of_stage(stage)
            )
            for stage, (width, blocks) in enumerate(static.stages)
        }
        if shared:
            shape = (1, batch, self.num_prompts, static.stages[0][0])
            draws["first"] = dropout_mask(shape, rate, static.of_stage(0))
        return draws

    def prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        if not draws:
            return self.static(layer, None)
        if layer == self.layers[0] and "first" in draws:
            return self.static(layer, draws["first"][0])
        stage, index = self.static.place(layer)
        return self.static(layer, draws[_mask_name(self.static, stage)][index])

    def free_tokens(self) -> dict[int, Tensor]:
        return self.static.free_tokens(self.layers)

    def paper_num_parameters(self) -> int:
        """Return L · P · D for deep, P · D for shallow, or the sum over blocks if their widths D differ."""
        return self.num_prompts * sum(self.geometry.widths[layer] for layer in self.layers)


def _mask_name(static: StaticPrompts, stage: int) -> str:
    return "prompts" if len(static.stages) == 1 else f"prompts.{stage}"
