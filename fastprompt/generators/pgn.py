"""Prompt Generation Networks (Loedeman et al., BMVC 2024)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.generators.base import Draws, Geometry, PromptConfig, PromptGenerator
from fastprompt.kernels.library_prompts import ACTIVATIONS, PreNorm, library_prompts, reference as library_reference

if TYPE_CHECKING:
    from fastprompt.vit.weights import Norm


@dataclasses.dataclass(frozen=True)
class PGNConfig(PromptConfig):
    """Options of `PGN`.

    Attributes:
        num_prompts: K per image. library_size: M tokens (the authors use 8 to 16 times K).
        activation: "softmax" over the library, or "sigmoid".
        trunk: "resnet10" (the authors' small network) or "resnet18" (torchvision's, with a new last layer).
        widths: of resnet10's four groups.
        resolution: pixels the generator's input is resized to (bilinear); None: as the backbone's.
        stem_pool: resnet10's 3 × 3 max-pool after the first convolution.
        pretrained_trunk: start resnet18 from torchvision's ImageNet weights (downloaded).
    """

    kind: ClassVar[str] = "pgn"
    num_prompts: int = 16
    library_size: int = 256
    activation: str = "softmax"
    trunk: str = "resnet10"
    widths: tuple[int, ...] = (16, 32, 64, 128)
    resolution: int | None = None
    stem_pool: bool = True
    pretrained_trunk: bool = False

    def __post_init__(self) -> None:
        self.require("num_prompts", int, 1)
        self.require("library_size", int, 1)
        self.require_choice("activation", ACTIVATIONS)
        self.require_choice("trunk", ("resnet10", "resnet18"))
        self.require("widths", tuple)
        if not self.widths or any(not isinstance(w, int) or w < 1 for w in self.widths):
            raise ValueError(f"PGNConfig.widths must be positive integers, one per group, got {self.widths!r}")
        if self.resolution is not None:
            self.require("resolution", int, 1)
        self.require("stem_pool", bool)
        self.require("pretrained_trunk", bool)
        if self.pretrained_trunk and self.trunk != "resnet18":
            raise ValueError("PGNConfig.pretrained_trunk needs trunk='resnet18'")


class BasicBlock(nn.Module):
    """relu(conv-BN-ReLU-conv-BN (x) + skip(x)); the skip is a biased 1 × 1 stride-2 convolution, without norm."""

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

    (B, 3, h, w) → (B, outputs). Convolutions start Kaiming-normal (fan out), the Linear as PyTorch does.
    """

    def __init__(self, widths: tuple[int, ...], outputs: int, stem_pool: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
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


def _resnet18(outputs: int, pretrained: bool) -> nn.Module:
    from torchvision.models import ResNet18_Weights, resnet18

    trunk = resnet18(weights=ResNet18_Weights.IMAGENET1K_V1 if pretrained else None)
    trunk.fc = nn.Linear(trunk.fc.in_features, outputs)
    return trunk


class PGN(PromptGenerator):
    """PGN: prompts are per-image mixtures over a learned token library (PGN §3).

    A = softmax(g_θ(x)) over the library, A ∈ R^{K × M}; P = A L, with library L ∈ R^{M × D} ~ N(0, 0.02²).
    x is the backbone's own normalised image. The prompts join once, in block 0, behind the patches:
    [CLS, patches, prompts], without position embedding and before CLIP's pre-norm.

    `generator(images)` (B, 3, H, W) → (B, K, D).
    """

    known_at = "image"
    config_class = PGNConfig
    prompts_last = True
    before_pre_norm = True
    config: PGNConfig

    def __init__(self, config: PGNConfig | None = None, geometry: Geometry | None = None, **options: Any) -> None:
        super().__init__(config, geometry, **options)
        cfg = self.config
        self.num_prompts, self.layers = cfg.num_prompts, (0,)
        outputs = cfg.num_prompts * cfg.library_size
        self.trunk = (
            ResNet10(cfg.widths, outputs, cfg.stem_pool)
            if cfg.trunk == "resnet10"
            else _resnet18(outputs, cfg.pretrained_trunk)
        )
        self.library = nn.Parameter(torch.randn(cfg.library_size, self.geometry.width) * 0.02)

    def logits(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) → selection logits (B, K, M)."""
        self.check_input(images)
        images = images.to(self.library.dtype)
        r = self.config.resolution
        if r is not None and tuple(images.shape[2:]) != (r, r):
            images = F.interpolate(images, size=(r, r), mode="bilinear", align_corners=False, antialias=True)
        try:
            logits = self.trunk(images)
        except ValueError as error:
            raise ValueError(
                f"x has {images.shape[0]} image of {images.shape[2]} x {images.shape[3]} pixels, of which "
                "the trunk's batch norm has one value per channel; train PGN on batches of at least 2 "
                f"images ({error})"
            ) from error
        return logits.view(images.shape[0], self.config.num_prompts, self.config.library_size)

    def mixture(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, H, W) → weights of the library tokens (B, K, M)."""
        return library_reference.mixture(self.logits(images), self.config.activation)

    def context(self, x: Tensor | None, draws: Draws | None = None) -> Tensor:
        """The selection logits (B, K, M)."""
        assert x is not None
        return self.logits(x)

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        return library_prompts(context, self.library, self.config.activation)

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws | None, norm: Norm | None) -> Tensor:
        """`prompts` that leave the mixture with CLIP's pre-norm applied, if the backbone has one."""
        if norm is None or norm.kind != "layernorm" or norm.weight is None or norm.bias is None:
            return super().first_prompts(context, tokens, draws, norm)
        pre_norm = PreNorm(norm.weight, norm.bias, norm.eps)
        return library_prompts(context, self.library, self.config.activation, pre_norm=pre_norm).to(tokens.dtype)
