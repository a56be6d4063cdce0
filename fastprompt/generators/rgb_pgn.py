"""PGN with picture prompts: a library of RGB patches, trained as pixels or from PGN's prompt inversion."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators.base import UNSET, Draws, Geometry, GeometryOptions, PromptGenerator
from fastprompt.generators.pgn import PGN, PGNConfig
from fastprompt.generators.registry import register_method
from fastprompt.kernels.library_prompts import library_prompts
from fastprompt.vit import FrozenViT
from fastprompt.vit.prompts import Apart
from fastprompt.vit.weights import Norm, per_channel

if TYPE_CHECKING:
    from typing_extensions import Unpack

PLACEMENTS = ("latent", "extend", "replace")
SWIN = "a Swin transformer, which has no class token to read more patches; use a ViT, or PixelPromptConfig"

TIE = 1e-3 / 255
"""Subtracted from the pixels of a shrunk image before rounding. Many of them lie half way between two levels, where
float noise would decide; with this they are rounded down on every device and in every client.
"""


@dataclasses.dataclass(frozen=True)
class RGBPGNConfig(PGNConfig):
    """Options of `RGBPGN`, beside those of `PGNConfig`.

    Attributes:
        placement: where the K patches go. K must fill whole rows, except for "latent".
            "latent": after the image's own patches, without position embedding, like PGN's tokens; needs a host that
            takes more tokens.
            "extend": whole rows of patches below the image; needs a host that takes taller images and resamples its
            position embedding.
            "replace": the bottom rows of an image of the backbone's own size; the image is shrunk into the remaining
            rows. Any host takes it.
        bounded: whether the library holds pixels in [0, 1], the sigmoid of its parameters, so that every mixture is a
            picture. False allows any value, as inversion gives.
        round_pixels: whether mixed patches and shrunk images are clipped to [0, 1] and rounded to 8 bits, with a
            straight-through gradient.
        offset: whether a constant is added to the patch at each of the K places; inversion uses it to compensate for
            the position embedding there.
        compensate: whether a constant picture is added to the image (only with "extend") to undo the effect of
            resampling the position embedding.
    """

    kind: ClassVar[str] = "rgb-pgn"
    num_prompts: int = 14
    placement: str = "extend"
    bounded: bool = True
    round_pixels: bool = True
    offset: bool = False
    compensate: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("library_size", int, 1)
        self.require_choice("placement", PLACEMENTS)
        for name in ("bounded", "round_pixels", "offset", "compensate"):
            self.require(name, bool)
        if self.bounded and self.activation != "softmax":
            raise ValueError(
                "RGBPGNConfig.activation must be 'softmax' with bounded: only convex mixtures of pictures "
                f"are pictures, got {self.activation!r}"
            )
        if self.first_block and self.placement != "latent":
            raise ArgumentError(
                "RGBPGNConfig.first_block", f"must be 0 unless placement is 'latent', got {self.first_block}"
            )
        if self.compensate and self.placement != "extend":
            raise ValueError(f"RGBPGNConfig.placement must be 'extend' with compensate, got {self.placement!r}")


@register_method(
    "rgb-pgn",
    title="PGN in pixels",
    paper="prompts born as pixels, after the prompt inversion of Loedeman et al., BMVC 2024, arXiv 2210.06466",
    recipe={"lr": 3e-3},
)
class RGBPGN(PGN):
    """PGN with a library of RGB patches, R ∈ R^{M × 3p²}: patches = round(softmax(g_θ(x)) R), each a p × p picture.

    Trunk and mixture are those of `PGN`, but pixels in [0, 1] are mixed, and the frozen patch embedding turns them into
    tokens: token = W norm(patch) + b. Nothing is inverted afterwards: a host that gets the picture sees exactly what
    training saw, including 8-bit rounding and placement. (The paper inverts a library of tokens; `fastprompt.pixels`
    does that if W allows it.)

    `generator(images)` maps normalised images (B, 3, H, W) to normalised prompted images (B, 3, H', W), or with
    placement "latent" to prompt tokens (B, K, D). `patches(images)` returns (B, K, 3, p, p) pixels in [0, 1].
    """

    config_class = RGBPGNConfig
    config: RGBPGNConfig

    def __init__(
        self,
        config: RGBPGNConfig | None = None,
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
        placement: str = UNSET,
        bounded: bool = UNSET,
        round_pixels: bool = UNSET,
        offset: bool = UNSET,
        compensate: bool = UNSET,
        **sizes: Unpack[GeometryOptions],
    ) -> None:
        if not isinstance(geometry, FrozenViT):
            raise ArgumentTypeError(
                "geometry",
                f"must be the FrozenViT that reads the pixels, got {type(geometry).__name__}: RGBPGN(config, backbone)",
            )
        if geometry.staged:
            raise ValueError(f"RGBPGNConfig is not defined on {SWIN}")
        if geometry.channels != 3:
            raise ValueError(
                f"RGBPGNConfig needs a backbone that reads RGB images, this one reads {geometry.channels} channels"
            )
        if geometry.stem is not None:
            raise ValueError("RGBPGNConfig is not defined on a ViT with a convolutional stem, whose patches overlap")
        super().__init__(  # type: ignore[call-arg]  # PGN passes on what it does not name
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
            placement=placement,
            bounded=bounded,
            round_pixels=round_pixels,
            offset=offset,
            compensate=compensate,
            **sizes,
        )
        cfg, g = self.config, self.geometry
        self._backbone = (
            geometry,
        )  # a tuple, so that it is not a submodule: its tensors belong to the model, not to the adapter
        obstacle = placement_obstacle(geometry, cfg.placement, cfg.num_prompts)
        if obstacle:
            raise ValueError(f"RGBPGNConfig.{obstacle}")
        self.changes_images, self.changes_size = cfg.placement != "latent", cfg.placement == "extend"
        self.prompt_rows = 0
        if self.changes_images:
            self.prompt_rows = cfg.num_prompts // g.grid[1]
            self.num_prompts, self.layers = 0, ()
        pixels = 3 * g.patch_size**2
        assert cfg.library_size is not None  # checked by the configuration
        self.library: nn.Parameter = nn.Parameter(torch.randn(cfg.library_size, pixels))
        if cfg.offset:
            self.offset = nn.Parameter(torch.zeros(cfg.num_prompts, pixels))
        if cfg.compensate:
            self.compensation = nn.Parameter(torch.zeros(3, *g.image_size))

    def pixel_library(self) -> Tensor:
        """Return the patches (M, 3p²), ordered by channel, then by row; 0 is black and 1 is white."""
        return torch.sigmoid(self.library) if self.config.bounded else self.library

    def patches(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to their mixed patches (B, K, 3, p, p); 0 is black and 1 is white."""
        mixed = library_prompts(self.logits(images), self.pixel_library(), self.config.activation)  # (B, K, 3p²)
        if self.config.offset:
            mixed = mixed + self.offset
        if self.config.round_pixels:
            mixed = round_pixels(mixed)
        return mixed.unflatten(-1, (3, self.geometry.patch_size, self.geometry.patch_size))

    def prompt_images(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to the normalised images that the host gets, (B, 3, H', W).

        Raises:
            TypeError, ValueError: `images` do not fit, or the placement is "latent".
        """
        self.check_input(images, "images")
        if not self.changes_images:
            raise ValueError("RGBPGNConfig.placement must be 'extend' or 'replace' for prompt_images, got 'latent'")
        if tuple(images.shape[2:]) != tuple(self.geometry.image_size):
            raise ArgumentError(
                "images",
                f"must have {self.geometry.image_size} pixels like the backbone's, got {tuple(images.shape[2:])}",
            )
        rows = rearrange(
            self.patches(images), "b (rows columns) c h w -> b c (rows h) (columns w)", rows=self.prompt_rows
        )
        rows = self.normalised(rows)
        if self.config.compensate:
            images = self.compensated(images)
        if self.config.placement == "replace":
            images = self.shrink(images)
        return torch.cat([images.to(rows.dtype), rows], dim=2)

    def compensated(self, images: Tensor) -> Tensor:
        """Add the constant picture to normalised images; round if prompts are rounded."""
        mean, std = self._channels(images)
        if not self.config.round_pixels:
            return images + self.compensation / std  # a difference of pixels has no mean
        return self.normalised(round_pixels(images * std + mean + self.compensation))

    def shrink(self, images: Tensor) -> Tensor:
        """Shrink normalised images to the rows without prompts; round if prompts are rounded."""
        mean, std = self._channels(images)
        height, width = self.geometry.image_size
        size = (height - self.prompt_rows * self.geometry.patch_size, width)
        pixels = images * std + mean
        if pixels.device.type != "mps":  # MPS has no float64
            pixels = pixels.double()  # float32 weights would be off by thousandths of a level
        small = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)
        if self.config.round_pixels:
            small = round_pixels(small - TIE)
        return (small.to(images.dtype) - mean) / std

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise pixels (..., 3, h, w), where 0 is black and 1 is white, for the backbone."""
        mean, std = self._channels(pixels)
        return (pixels - mean) / std

    def _channels(self, like: Tensor) -> tuple[Tensor, Tensor]:
        backbone = self._backbone[0]
        return per_channel(backbone.mean, like, like.dtype), per_channel(backbone.std, like, like.dtype)

    def context(self, x: Tensor | None, draws: Draws | None = None) -> Tensor:
        """Return the prompt tokens (B, K, D): the patch embedding of the mixed patches, without position embedding."""
        assert x is not None
        backbone = self._backbone[0]
        weight, bias = backbone.patch_weight, backbone.patch_bias
        tokens = F.linear(self.normalised(self.patches(x)).flatten(2).to(weight.dtype), weight.flatten(1), bias)
        return tokens if backbone.patch_norm is None else backbone.patch_norm(tokens)

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        return context

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws | None, norm: Norm | None) -> Tensor:
        return PromptGenerator.first_prompts(self, context, tokens, draws, norm)  # there is no mixture to fuse it with

    def first_sequence(self, context: Any, apart: Apart, draws: Draws | None, norm: Norm | None) -> None:
        """None: as for `first_prompts`."""

    def forward(self, x: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Return prompted images, or prompt tokens with placement "latent"."""
        if not self.changes_images:
            return super().forward(x, layer)
        if layer is not None:
            raise ArgumentError("layer", f"must be None because pixel prompts have no layers, got {layer!r}")
        self.check_input(x)
        assert x is not None
        return self.prompt_images(x)

    def paper_num_parameters(self) -> int | None:
        return None


def placement_obstacle(backbone: FrozenViT, placement: str, num_prompts: int) -> str:
    """Return why K pixel prompts cannot be placed on a backbone in this way, or an empty string."""
    if backbone.staged:
        return f"placement must be on a ViT, got {SWIN}"
    if placement == "latent":
        return ""
    (rows, columns), p = backbone.spec.grid, backbone.patch_size
    if num_prompts % columns or (num_prompts >= rows * columns and placement == "replace"):
        room = f" and leave one of {rows} to the image" if placement == "replace" else ""
        return (
            f"num_prompts must fill whole rows of {columns} patches{room} with placement {placement!r}, "
            f"got {num_prompts}"
        )
    if (rows * p, columns * p) != tuple(backbone.image_size):
        height, width = backbone.image_size
        return (
            f"placement {placement!r} needs images of whole patches, but this backbone takes {height} x {width} pixels "
            f"in patches of {p}; FrozenViT(module, image_size=({rows * p}, {columns * p})) has the same patches"
        )
    return ""


def round_pixels(pixels: Tensor) -> Tensor:
    """Round pixels to the nearest of 256 levels from 0 to 1, with a straight-through gradient."""
    return pixels + ((pixels * 255).round().clamp(0, 255) / 255 - pixels).detach()
