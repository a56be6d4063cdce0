"""VAPT: visual adaptive prompt tuning (Le et al., ICLR 2026)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
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
from fastprompt.generators.registry import Published, register_method
from fastprompt.generators.vpt import VPT_RECIPE, VPT_SEARCH, StaticPrompts, static_cost
from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import ACTIVATIONS, adaptive_prompts
from fastprompt.kernels.adaptive_prompts.reference import bottleneck, position_matrix

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class VAPTConfig(PromptConfig):
    """Options of `VAPT`; those from `activation` to `project` are the ablation switches of the released code.

    Attributes:
        num_prompts: P per block. hidden: r, width of the feature projector's bottleneck.
        kernel: side of the convolution over the patch grid (stride 1). padding: zero padding on each side of it.
        channel_dropout: dropout rate of whole channels after the convolution.
        hidden_dropout: dropout rate of the bottleneck's hidden units.
        prompt_dropout: dropout rate of the elements of static prompts.
        static_layers: number of blocks, from `first_block` on, with learned static prompts; later blocks are adaptive.
        activation: activation of the bottleneck; "attention" is a softmax over its hidden units, computed in PyTorch on
            every device.
        conv: whether there is a convolution; otherwise the token projector reads the patches themselves.
        channelwise: whether all channels share one kernel; otherwise each channel has its own.
        feature_projector: whether there is a bottleneck.
        share_projector: whether all blocks share the bottleneck; otherwise each block has its own.
        learnable_scale: whether the bottleneck's output is scaled by a learned number, initially 1.
        project: width in which static prompts are learned before they are projected to D; None does not project.
        first_block: index of the first block with prompts; the blocks before it run without them.
    """

    kind: ClassVar[str] = "vapt"
    num_prompts: int = 10
    hidden: int = 8
    kernel: int = 2
    padding: int = 0
    channel_dropout: float = 0.1
    hidden_dropout: float = 0.1
    prompt_dropout: float = 0.0
    static_layers: int = 1
    activation: str = "relu"
    conv: bool = True
    channelwise: bool = True
    feature_projector: bool = True
    share_projector: bool = True
    learnable_scale: bool = False
    project: int | None = None
    first_block: int = 0

    def __post_init__(self) -> None:
        for name in ("num_prompts", "hidden", "kernel"):
            self.require(name, int, 1)
        for name in ("padding", "static_layers", "first_block"):
            self.require(name, int, 0)
        for name in ("channel_dropout", "hidden_dropout", "prompt_dropout"):
            self.require(name, (float, int), 0, 0.999)
        for name in ("conv", "channelwise", "feature_projector", "share_projector", "learnable_scale"):
            self.require(name, bool)
        self.require_choice("activation", (*ACTIVATIONS, "attention"))
        if self.project is not None:
            self.require("project", int, 1)


class FeatureProjector(nn.Module):
    """g(p) = scale · W₂ σ(W₁ p) + p with W₁ (r, D), W₂ (D, r), no biases, and PyTorch's Linear initialisation."""

    def __init__(self, width: int, hidden: int, learnable_scale: bool) -> None:
        super().__init__()
        self.w1 = nn.Parameter(nn.Linear(width, hidden, bias=False).weight.detach().clone())
        self.w2 = nn.Parameter(nn.Linear(hidden, width, bias=False).weight.detach().clone())
        self.scale: nn.Parameter | float = nn.Parameter(torch.ones(())) if learnable_scale else 1.0

    def forward(self, prompts: Tensor, activation: str, mask: Tensor | None) -> Tensor:
        """g(p) for prompts p (B, P, D); `mask` (B, P, r): dropout of the hidden units."""
        if activation != "attention":
            return bottleneck(prompts, self.w1, self.w2, self.scale, activation, mask)
        hidden = F.linear(prompts, self.w1).softmax(dim=-1)  # (B, P, r)
        if mask is not None:
            hidden = hidden * mask
        return F.linear(hidden, self.w2) * self.scale + prompts


class AdaptiveLayer(nn.Module):
    """One block's LayerNorm (eps 1e-5), kernel F ~ N(0, 1) and zero-initialised token projector A."""

    def __init__(self, config: VAPTConfig, geometry: Geometry, positions: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(geometry.width, eps=1e-5)
        channels = 1 if config.channelwise else geometry.width
        self.kernel = nn.Parameter(torch.randn(channels, 1, config.kernel, config.kernel)) if config.conv else None
        self.projector = nn.Linear(positions, config.num_prompts)
        nn.init.zeros_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)


def _cost(s: Sizes, config: VAPTConfig, t: Tally) -> PromptCost:
    """Static prompts in the first blocks; in the others M · LN(X), the bottleneck and its residual, in float32."""
    for name, plainest in (
        ("conv", True),
        ("channelwise", True),
        ("feature_projector", True),
        ("share_projector", True),
        ("learnable_scale", False),
        ("project", None),
        ("activation", "relu"),
    ):
        if getattr(config, name) != plainest:
            raise ValueError(f"the cost of VAPTConfig.{name} = {getattr(config, name)!r} has no formula")
    plain = s.graph == "papers"
    b, d, n, p, r = s.batch, s.width, s.patches, config.num_prompts, config.hidden
    layers = range(config.first_block, s.depth)
    first, adaptive = layers[: config.static_layers], layers[config.static_layers :]
    grow = 2 * config.padding - config.kernel + 1
    windows = (s.grid[0] + grow) * (s.grid[1] + grow)
    channels, hidden = (s.training and rate > 0 for rate in (config.channel_dropout, config.hidden_dropout))
    static = static_cost(s, t, p, first, config.prompt_dropout) if first else None
    for masked, size in ((channels, b * d), (hidden, b * p * r)):
        t.call(3 * masked, 0, 4 * len(adaptive) * size * masked)

    def make(t: Tally, i: int) -> None:
        if static is not None and i in first:
            static.make(t, i)
            return
        taps = config.kernel**2
        trains = i > layers[0]  # whether the tokens carry a gradient
        tokens = s.own + p * (trains and plain)
        sliced = plain or s.prefix > 0
        t.call(s.cast, (s.cast + sliced + 1) * trains)
        t.call(1, 1)
        if plain:
            t.saved += 4 * b * d * (n if s.cast else tokens) + 8 * b * n + 4 * b * n * d  # the norm's input and output
            t.product(2 * b * d * windows * taps, 2)
            t.call(channels + 1, channels + 1, 4 * b * d * windows)  # mask and copy
            t.product(2 * b * d * windows * p, 2)
            t.call(1 + 1, 1)  # bias and copy
        else:
            t.product(2 * p * windows * taps, 2, backward=1)
            t.product(2 * b * d * n * p, 2, calls=3 if s.training else 1, backward=5)
            t.call(channels + 1, channels + 1, 4 * p * n + s.element * b * tokens * d * (not trains))
            t.call(0, 1 + s.cast)  # the norm is computed again
            t.saved += 4 * b * p * d * (not s.cast)
        t.saved += 4 * b * p * d
        t.product(2 * b * p * d * r, 2)
        t.call(1 + hidden, 1 + hidden, 4 * b * p * r * (1 + hidden))
        t.product(2 * b * p * r * d, 2)
        t.call(2, 2 + 2 * (i > adaptive[0]))  # scale and residual; the gradients of the bottleneck add up

    return PromptCost(p, layers, 0 if static is None else static.shared, make)


@register_method(
    "vapt",
    title="VAPT",
    paper="Le et al., ICLR 2026, arXiv 2501.18936",
    recipe={"lr": 5e-3},
    lrs=(0.002, 0.005, 0.01),
    published={
        "vapt-paper": Published(
            "src/configs of Minhchuyentoancbn/VAPT, for CIFAR-100; base rate and weight decay are searched for every "
            "other task",
            {**VPT_RECIPE, "lr": 2.5, "weight_decay": 1e-2},
            **VPT_SEARCH,
        )
    },
    cost=_cost,
)
class VAPT(PromptGenerator):
    """VAPT: block i's prompts are a function of the patch tokens X that enter it (VAPT §4).

    X_conv = F ∗ LN(X) on the patch grid, one k × k kernel F for all channels;
    pⱼ = Σ_k α_{j,k} x_k^conv (+ bias), the token projector of the block;
    P = W₂ σ(W₁ p) + p, the feature projector shared by all blocks.

    The residual, the projector's bias, the LayerNorm's affine and the static prompts of the first block come from the
    released code; the paper's g has no residual. Prompts are placed like VPT-deep's, [CLS, prompts, patches], and
    replaced in every block, from `first_block` (our option) on. Any patch grid is supported. With one shared kernel, F
    and α are applied as one (P, N) matrix.
    """

    known_at = "layer"
    read_with_patches = True
    config_class = VAPTConfig
    config: VAPTConfig

    def __init__(
        self,
        config: VAPTConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        hidden: int = UNSET,
        kernel: int = UNSET,
        padding: int = UNSET,
        channel_dropout: float = UNSET,
        hidden_dropout: float = UNSET,
        prompt_dropout: float = UNSET,
        static_layers: int = UNSET,
        activation: str = UNSET,
        conv: bool = UNSET,
        channelwise: bool = UNSET,
        feature_projector: bool = UNSET,
        share_projector: bool = UNSET,
        learnable_scale: bool = UNSET,
        project: int | None = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(
            config,
            geometry,
            num_prompts=num_prompts,
            hidden=hidden,
            kernel=kernel,
            padding=padding,
            channel_dropout=channel_dropout,
            hidden_dropout=hidden_dropout,
            prompt_dropout=prompt_dropout,
            static_layers=static_layers,
            activation=activation,
            conv=conv,
            channelwise=channelwise,
            feature_projector=feature_projector,
            share_projector=share_projector,
            learnable_scale=learnable_scale,
            project=project,
            first_block=first_block,
            **sizes,
        )
        cfg, g = self.config, self.geometry
        room = g.depth - cfg.first_block
        if cfg.static_layers > room:
            raise ValueError(f"VAPTConfig.static_layers must be at most the {room} blocks, got {cfg.static_layers}")
        grow = 2 * cfg.padding - cfg.kernel + 1 if cfg.conv else 0
        self.conv_grid = (g.grid[0] + grow, g.grid[1] + grow)
        if min(self.conv_grid) < 1:
            raise ValueError(
                f"VAPTConfig.kernel {cfg.kernel} with padding {cfg.padding} does not fit the "
                f"{g.grid[0]} x {g.grid[1]} patch grid"
            )
        self.num_prompts, self.layers = cfg.num_prompts, tuple(range(cfg.first_block, g.depth))
        adaptive, static = room - cfg.static_layers, self.layers[: cfg.static_layers]
        self.static = StaticPrompts(static, cfg.num_prompts, g, cfg.project) if static else None
        self.adaptive = nn.ModuleList(
            AdaptiveLayer(cfg, g, self.conv_grid[0] * self.conv_grid[1]) for _ in range(adaptive)
        )
        projectors = 0 if not cfg.feature_projector or not adaptive else 1 if cfg.share_projector else adaptive
        self.feature_projectors = nn.ModuleList(
            FeatureProjector(g.width, cfg.hidden, cfg.learnable_scale) for _ in range(projectors)
        )

    def draw(self, batch: int) -> Draws:
        """Draw dropout masks "prompts" (static, B, P, D), "channels" (adaptive, B, D), "hidden" (adaptive, B, P, r)."""
        cfg, like = self.config, next(self.parameters())
        draws: dict[str, Tensor] = {}
        if not self.training:
            return draws
        width, adaptive = self.geometry.width, len(self.adaptive)
        shapes = {
            "prompts": (cfg.prompt_dropout, (cfg.static_layers, batch, self.num_prompts, width)),
            "channels": (cfg.channel_dropout if cfg.conv else 0.0, (adaptive, batch, width)),
            "hidden": (
                cfg.hidden_dropout if self.feature_projectors else 0.0,
                (adaptive, batch, self.num_prompts, cfg.hidden),
            ),
        }
        for name, (p, shape) in shapes.items():
            if p > 0 and shape[0]:
                draws[name] = dropout_mask(shape, p, like)
        return draws

    def forward(self, x: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Return the prompts (1 or B, P, D) of block `layer`; only adaptive blocks read `x` (B, N, D)."""
        static = self.config.static_layers
        if layer is None:
            layer = self.layers[static if x is not None and static < len(self.layers) else 0]
        if layer in self.layers[:static]:
            return self.prompts(layer, None, None, self.draw(1 if x is None else x.shape[0]))
        return super().forward(x, layer)

    def check_input(self, x: Tensor | None, name: str = "x") -> None:
        """Check `x` as every generator does, and that it has as many patch tokens as the grid."""
        super().check_input(x, name)
        rows, columns = self.geometry.grid
        if x is not None and x.shape[1] != rows * columns:
            raise ArgumentError(name, f"must have the {rows} x {columns} patch tokens of the grid, got {x.shape[1]}")

    def prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        return self._prompts(layer, tokens, draws, plain=not self.config.channelwise)

    def plain_prompts(
        self, layer: int, context: Any = None, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Compute `prompts` as released: depthwise convolution, channel dropout, Linear over positions, bottleneck."""
        return self._prompts(layer, tokens, draws, plain=True)

    def _prompts(self, layer: int, tokens: Tensor | None, draws: Draws | None, plain: bool) -> Tensor:
        draws, cfg = draws or {}, self.config
        index = layer - cfg.first_block
        if self.static is not None and index < cfg.static_layers:
            return self.static(layer, draws["prompts"][index] if "prompts" in draws else None)
        self.check_input(tokens, "tokens")
        assert tokens is not None
        j = index - cfg.static_layers
        parts: AdaptiveLayer = self.adaptive[j]  # type: ignore[assignment]
        channels = draws["channels"][j] if "channels" in draws else None
        hidden = draws["hidden"][j] if "hidden" in draws else None
        g: FeatureProjector | None = None
        if self.feature_projectors:
            g = self.feature_projectors[0 if cfg.share_projector else j]  # type: ignore[assignment]
        weight, bias, norm = parts.projector.weight, parts.projector.bias, parts.norm
        if not plain:
            mix = weight
            if parts.kernel is not None:
                mix = position_matrix(parts.kernel, weight, self.geometry.grid, cfg.padding)
            within = g is not None and cfg.activation in ACTIVATIONS  # the op computes the bottleneck, too
            w1, w2, scale = (g.w1, g.w2, g.scale) if g is not None and within else (None, None, 1.0)
            prompts = adaptive_prompts(
                tokens,
                norm.weight,
                norm.bias,
                mix,
                bias,
                w1,
                w2,
                scale,
                eps=norm.eps,
                activation=cfg.activation if within else "relu",
                channel_mask=channels,
                hidden_mask=hidden if within else None,
            )
            if g is None or within:
                return prompts
            if not torch.compiler.is_compiling():
                dispatch.choices["bottleneck"] = dispatch.Choice(
                    "reference", "the kernels of adaptive_prompts know no softmax over hidden units"
                )
            return g(prompts, cfg.activation, hidden)
        x = norm(tokens.to(norm.weight.dtype)).transpose(1, 2)  # (B, D, N)
        b, d, _ = x.shape
        if parts.kernel is not None:
            x = F.conv2d(
                x.reshape(b, d, *self.geometry.grid), parts.kernel.expand(d, -1, -1, -1), padding=cfg.padding, groups=d
            ).flatten(2)
            if channels is not None:
                x = x * channels[:, :, None]
        x = F.linear(x, weight, bias).transpose(1, 2)  # (B, P, D)
        return x if g is None else g(x, cfg.activation, hidden)

    def paper_num_parameters(self) -> int:
        """Return L · P · H'W' + L · K² + 2 r D. The code also has LayerNorms, biases and static prompts."""
        cfg, depth = self.config, len(self.layers)
        positions = self.conv_grid[0] * self.conv_grid[1]
        return depth * cfg.num_prompts * positions + depth * cfg.kernel**2 + 2 * cfg.hidden * self.geometry.width
