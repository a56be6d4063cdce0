"""Prompt Generation Networks (Loedeman et al., BMVC 2024)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptConfig, PromptGenerator
from fastprompt.generators.registry import Published, register_method
from fastprompt.kernels.library_prompts import ACTIVATIONS, PreNorm, library_prompts, reference as library_reference
from fastprompt.vit.prompts import Apart
from fastprompt.vit.slots import assembled, sums
from fastprompt.vit.weights import Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastprompt.vit import FrozenViT


@dataclasses.dataclass(frozen=True)
class PGNConfig(PromptConfig):
    """Options of `PGN`.

    Attributes:
        num_prompts: K per image. library_size: M tokens (the authors use 8 to 16 times K); None predicts the prompts
            themselves, without a library.
        activation: "softmax" over the library, or "sigmoid".
        trunk: "resnet10" (the authors' small network) or "resnet18" (torchvision's, with a new last layer).
        widths: channels of resnet10's groups.
        resolution: side in pixels that the generator's input is resized to (bilinear); None is the backbone's.
        resize: how the input is resized. "square" resizes both sides to `resolution`, with antialiasing. "short_side"
            resizes the short side to `resolution` and keeps the aspect ratio, without antialiasing, as the authors'
            version of torchvision (0.13) resizes tensors.
        stem_pool: whether resnet10 has a 3 × 3 max-pool after the first convolution.
        pretrained_trunk: whether resnet18 starts from torchvision's ImageNet weights (downloaded).
        first_block: index of the block that the prompts join before. Only block 0's pass the backbone's pre-norm.
    """

    kind: ClassVar[str] = "pgn"
    num_prompts: int = 16
    library_size: int | None = 256
    activation: str = "softmax"
    trunk: str = "resnet10"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    resolution: int | None = None
    stem_pool: bool = True
    pretrained_trunk: bool = False
    resize: str = "square"
    first_block: int = 0

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)
        if self.library_size is not None:
            self.require("library_size", int, 1)
        self.require_choice("activation", ACTIVATIONS)
        self.require_choice("trunk", ("resnet10", "resnet18"))
        self.require("widths", tuple)
        if not self.widths or any(not isinstance(w, int) or w < 1 for w in self.widths):
            raise ValueError(
                f"{type(self).__name__}.widths must be positive integers, one per group, got {self.widths!r}"
            )
        if self.resolution is not None:
            self.require("resolution", int, 1)
        self.require_choice("resize", ("square", "short_side"))
        self.require("stem_pool", bool)
        self.require("first_block", int, 0)
        self.require("pretrained_trunk", bool)
        if self.pretrained_trunk and self.trunk != "resnet18":
            raise ValueError(
                f"{type(self).__name__}.trunk must be 'resnet18' with pretrained_trunk, got {self.trunk!r}"
            )

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of what the trunk sees of images of this size."""
        if self.resolution is None:
            return height, width
        if self.resize == "square":
            return self.resolution, self.resolution
        short = min(height, width)
        return height * self.resolution // short, width * self.resolution // short

    def to_load(self) -> PGNConfig:
        return dataclasses.replace(self, pretrained_trunk=False)


class BasicBlock(nn.Module):
    """relu(conv-BN-ReLU-conv-BN (x) + skip(x)), where skip is a biased 1 × 1 stride-2 convolution without norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class ResNet10(nn.Module):
    """The authors' generator network: stem, one `BasicBlock` per width, global average pool, Linear.

    (B, C, h, w) → (B, outputs). Convolutions are initialised Kaiming-normal (fan out), the Linear by PyTorch's default.
    """

    def __init__(self, widths: tuple[int, ...], outputs: int, stem_pool: bool, channels: int = 3) -> None:
        super().__init__()
        stem = nn.Conv2d(channels, widths[0], 3, 2, 1, bias=False)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1) if stem_pool else nn.Identity()
        inputs = (widths[0], *widths)
        self.blocks = nn.ModuleList(BasicBlock(inputs[i], w, 1 if i == 0 else 2) for i, w in enumerate(widths))
        self.fc = nn.Linear(widths[-1], outputs)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


def _start_small(layer: nn.Module) -> None:
    """Initialise a Linear that predicts prompts, so that they start as large as the tokens of a library."""
    assert isinstance(layer, nn.Linear)
    nn.init.normal_(layer.weight, std=0.02 / layer.in_features**0.5)
    nn.init.normal_(layer.bias, std=0.02)


def _resnet18(outputs: int, pretrained: bool) -> nn.Module:
    from torchvision.models import ResNet18_Weights, resnet18

    trunk = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1 if pretrained else None)
    trunk.fc = nn.Linear(trunk.fc.in_features, outputs)
    return trunk


def _cost(s: Sizes, config: PGNConfig, t: Tally) -> PromptCost:
    """ResNet-10, the mixture's weights and the mixture, all in float32."""
    if config.trunk != "resnet10":
        raise ValueError(f"the cost of PGNConfig.trunk {config.trunk!r} has no formula")
    if config.library_size is None:
        raise ValueError("the cost of PGNConfig.library_size None has no formula")
    plain = s.graph == "papers"
    b, k, m = s.batch, config.num_prompts, config.library_size
    height, width = s.image_size
    if config.resized(height, width) != s.image_size:
        height, width = config.resized(height, width)
        t.call(1, 0, 4 * b * s.channels * height * width)

    def convolution(inputs: int, outputs: int, kernel: int, positions: int, gradients: int = 2) -> None:
        t.product(2 * b * positions * outputs * inputs * kernel**2, gradients, backward=1)

    def batch_norm(channels: int, positions: int) -> None:
        t.call(2 + s.training, 1, 4 * b * channels * positions + 8 * channels)

    def kept(channels: int, positions: int) -> int:
        return 4 * b * channels * positions

    height, width = (height + 1) // 2, (width + 1) // 2
    channels = config.widths[0]
    convolution(s.channels, channels, 3, height * width, 1)
    batch_norm(channels, height * width)
    t.call(1, 1, kept(channels, height * width))
    if config.stem_pool:
        height, width = (height + 1) // 2, (width + 1) // 2
        t.call(1, 1, 3 * kept(channels, height * width))  # its output and the int64 index of each maximum
    for i, outputs in enumerate(config.widths):
        if i > 0:
            height, width = (height + 1) // 2, (width + 1) // 2
        positions = height * width
        convolution(channels, outputs, 3, positions)
        batch_norm(outputs, positions)
        t.call(1, 1, kept(outputs, positions))
        convolution(outputs, outputs, 3, positions)
        batch_norm(outputs, positions)
        if i > 0 or channels != outputs:
            convolution(channels, outputs, 1, positions)
        t.call(2, 2, kept(outputs, positions))  # sum and ReLU; in the backward, the sum of the two paths
        channels = outputs
    t.call(1, 1, 4 * b * channels)  # mean over positions
    t.product(2 * b * channels * k * m, 2)
    t.call(0, 1)  # the last Linear's bias
    wide, first = 4 * b * k * s.width, config.first_block == 0
    copied = plain and not s.cast  # the gradient is a slice of the sequence's, which a cast would have copied

    def mixture(t: Tally) -> None:
        t.call(1 + 1, 1, 4 * b * k * m)  # the op's dtype; softmax or sigmoid, which save their output
        t.product(2 * b * k * m * s.width, 2, backward=2 + copied)
        t.saved += wide * (not s.cast and not (s.norm_pre and first) and not plain)

    def make(t: Tally, i: int) -> None:
        if not first:
            mixture(t)

    held = 4 * b * k * m  # the logits
    if first:  # the prompts are made before the first block, which keeps them
        mixture(t)
        held += s.tokens(b * k) * (s.cast or s.norm_pre)
    layers = range(config.first_block, config.first_block + 1)
    return PromptCost(k, layers, make=make, first=first, kept=held, norms=first)


PGN_PAPER = Published(
    "pgn/scripts and pgn/lr_schedulers of jochemloedeman/PGN; the batch size of the paper's runs is not known",
    {
        "epochs": 100,
        "batch_size": 64,
        "lr": 0.1,
        "weight_decay": 0.0,
        "optimizer": "sgd",
        "momentum": 0.9,
        "decay": "all",
        "schedule": "epoch",
        "warmup_epochs": 50,
        "warmup_floor": 1 / 50,
        "min_lr_ratio": 0.01,
        "select_by": "last",
        "dtype": "float32",
    },
    augment="pgn",
)
PGN_PAPER_ADAMW = dataclasses.replace(
    PGN_PAPER, recipe={**PGN_PAPER.recipe, "optimizer": "adamw", "weight_decay": 0.01}
)
"""The scripts' `--optimizer adam`: AdamW with PyTorch's weight decay. The learning rate must be searched."""


def _pre_norm(norm: Norm | None) -> PreNorm | None:
    """The norm as `library_prompts` takes it; None: there is none, or no LayerNorm with weight and bias."""
    if norm is None or norm.kind != "layernorm" or norm.weight is None or norm.bias is None:
        return None
    return PreNorm(norm.weight, norm.bias, norm.eps)


@register_method(
    "pgn",
    title="PGN",
    paper="Loedeman et al., BMVC 2024, arXiv 2210.06466",
    recipe={"lr": 3e-3},
    lrs=(0.003, 0.01),
    published={"pgn-paper": PGN_PAPER, "pgn-paper-adamw": PGN_PAPER_ADAMW},
    cost=_cost,
)
class PGN(PromptGenerator):
    """PGN: prompts are per-image mixtures over a learned token library (PGN §3).

    A = softmax(g_θ(x)) over the library, A ∈ R^{K × M}; P = A L, with library L ∈ R^{M × D} ~ N(0, 0.02²).
    x is the backbone's own normalised image. The prompts join once, in block 0, after the patches:
    [CLS, patches, prompts], without position embedding and before CLIP's pre-norm. With `first_block` k (our option)
    they join before block k instead, behind the pre-norm.

    With `library_size=None`, the network's last Linear gives the K · D numbers of the prompts themselves, the direct
    prediction that the paper compares the library with (Fig. 4). Its initialisation is our choice: weights N(0, 0.02² /
    C) of C inputs, and biases N(0, 0.02²), so that prompts start as large as tokens of a library.

    `generator(images)` (B, 3, H, W) → (B, K, D). `generator.sequence(images, tokens)` → (B, T + K, D) for a
    transformer of one's own.
    """

    known_at = "image"
    config_class = PGNConfig
    prompts_last = True
    config: PGNConfig

    def __init__(
        self,
        config: PGNConfig | None = None,
        geometry: Geometry | FrozenViT | None = None,
        *,
        num_prompts: int = UNSET,
        library_size: int | None = UNSET,
        activation: str = UNSET,
        trunk: str = UNSET,
        widths: tuple[int, ...] = UNSET,
        resolution: int | None = UNSET,
        stem_pool: bool = UNSET,
        pretrained_trunk: bool = UNSET,
        resize: str = UNSET,
        first_block: int = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        super().__init__(
            config,
            geometry,
            num_prompts=num_prompts,
            library_size=library_size,
            activation=activation,
            trunk=trunk,
            widths=widths,
            resolution=resolution,
            stem_pool=stem_pool,
            pretrained_trunk=pretrained_trunk,
            resize=resize,
            first_block=first_block,
            **sizes,
        )
        cfg = self.config
        self.num_prompts, self.layers = cfg.num_prompts, (cfg.first_block,)
        self.before_pre_norm = cfg.first_block == 0
        outputs = cfg.num_prompts * (cfg.library_size or self.geometry.width)
        if cfg.trunk == "resnet18" and self.geometry.channels != 3:
            raise ValueError(
                f"{type(cfg).__name__}.trunk 'resnet18' reads images of three channels, these have "
                f"{self.geometry.channels}"
            )
        self.trunk = (
            ResNet10(cfg.widths, outputs, cfg.stem_pool, self.geometry.channels)
            if cfg.trunk == "resnet10"
            else _resnet18(outputs, cfg.pretrained_trunk)
        )
        self.library: nn.Parameter | None
        if cfg.library_size is None:
            self.register_parameter("library", None)
            _start_small(self.trunk.get_submodule("fc"))
        else:
            self.library = nn.Parameter(torch.randn(cfg.library_size, self.geometry.width) * 0.02)

    def logits(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to selection logits (B, K, M); without a library, to prompts (B, K, D)."""
        self.check_input(images, "images")
        images = images.to(next(self.trunk.parameters()).dtype)
        size = self.config.resized(*images.shape[2:])
        if size != tuple(images.shape[2:]):
            antialias = self.config.resize == "square"
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=antialias)
        try:
            logits = self.trunk(images)
        except ValueError as error:
            raise ArgumentError(
                "images",
                f"must be at least 2 while PGN trains, got {images.shape[0]} of {images.shape[2]} x "
                f"{images.shape[3]} pixels, which gives the trunk's batch norm one value per channel ({error})",
            ) from error
        return logits.view(images.shape[0], self.config.num_prompts, logits.shape[1] // self.config.num_prompts)

    def mixture(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to weights of the library tokens (B, K, M).

        Raises:
            ValueError: there is no library (`library_size=None`).
        """
        if self.config.library_size is None:
            raise ValueError("PGNConfig.library_size must be a number of tokens for a mixture of them, got None")
        return library_reference.mixture(self.logits(images), self.config.activation)

    def context(self, x: Tensor | None, draws: Draws | None = None) -> Tensor:
        """Return what `logits` returns."""
        assert x is not None
        return self.logits(x)

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        return context if self.library is None else library_prompts(context, self.library, self.config.activation)

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws | None, norm: Norm | None) -> Tensor:
        """Return `prompts` with the backbone's pre-norm, such as CLIP's, fused into the mixture."""
        pre_norm = _pre_norm(norm)
        if pre_norm is None or self.library is None:
            return super().first_prompts(context, tokens, draws, norm)
        return library_prompts(context, self.library, self.config.activation, pre_norm=pre_norm).to(tokens.dtype)

    def first_sequence(self, context: Any, apart: Apart, draws: Draws | None, norm: Norm | None) -> Tensor | None:
        """Mixture, position embedding and pre-norm in one pass over the rows of the sequence."""
        if self.library is None:
            return None
        pre_norm = _pre_norm(norm)
        constants = (*apart, *(pre_norm or ()))
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in constants):
            room = assembled(apart, room=self.num_prompts)
            slot = room.shape[1] - self.num_prompts
            sequence = library_prompts(context, self.library, self.config.activation, out=room, slot=slot)
            return sequence if norm is None else norm(sequence)
        sequence = library_prompts(context, self.library, self.config.activation, **apart._asdict(), pre_norm=pre_norm)
        return sequence if norm is None or pre_norm is not None else norm(sequence)

    def sequence(self, images: Tensor, tokens: Tensor) -> Tensor:
        """The token sequence of any transformer with the prompts in their slots: [tokens, prompts], as PGN places them.

        The softmax over the library, the mixture and the place in the sequence are one pass on a GPU; no concatenation
        follows. What reads the sequence next is block 0, or a norm before it, as CLIP's `ln_pre`.

        Args:
            images: (B, 3, H, W), normalised as the transformer's own are.
            tokens: (B, T, D), class token and patches with position embedding.

        Returns:
            (B, T + K, D) in the dtype of `tokens`, a fresh tensor. Gradients reach the generator, and `tokens` where
            these ask for one.

        Raises:
            TypeError, ValueError: an argument does not fit; it is named.
        """
        if self.changes_images:
            raise ValueError(f"{type(self).__name__} makes other images, not prompt tokens: use prompt_images(images)")
        self.check_input(images, "images")
        if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
            found = getattr(tokens, "dtype", type(tokens).__name__)
            raise TypeError(f"tokens must be a floating-point tensor (B, T, {self.geometry.width}), got {found}")
        if tokens.ndim != 3 or len(tokens) != len(images) or tokens.shape[2] != self.geometry.width:
            raise ValueError(
                f"tokens must be ({len(images)}, T, {self.geometry.width}), one sequence for each image, "
                f"got {tuple(tokens.shape)}"
            )
        if tokens.device != images.device:
            raise ValueError(f"tokens must be on {images.device}, where the images are, got {tokens.device}")
        context = self.context(images)
        sequence = self.first_sequence(context, Apart(tokens, None, None), None, None)
        if sequence is None:
            sequence = sums(tokens, None, self.prompts(0, context).to(tokens.dtype), None)
        return sequence
