"""`RGBPrompts`: whether prompts can be pixels on a backbone, and turning a trained model's prompts into pixels."""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastprompt.generators import PGN
from fastprompt.generators.rgb_pgn import PLACEMENTS, RGBPGN, RGBPGNConfig
from fastprompt.model import PromptedViT
from fastprompt.rgb.projection import Box, Projection, slot_positions
from fastprompt.vit import FrozenViT
from fastprompt.vit.weights import per_channel

EXACT = 1e-4


class Feasibility(NamedTuple):
    """What inversion would give at one placement; errors are ‖token − wanted‖ / ‖wanted‖ over all prompts.

    Attributes:
        placement: "latent", "extend" or "replace".
        low, high: the range of the pixels that give the wanted tokens; a picture's is 0 to 1.
        float_error: of these pixels in float32, as a host sees them that takes any float.
        picture_error: of the best pixels in [0, 1], rounded to 8 bits.
        shift: how much the host's resampled position embedding differs from the backbone's own over the image's
            patches, relative to it. 0: not at all.
        shrink: the part of the image's height that is left to it.
    """

    placement: str
    low: float
    high: float
    float_error: float
    picture_error: float
    shift: float
    shrink: float


@dataclasses.dataclass(frozen=True)
class Report:
    """What is possible on a backbone; `print(report)` says it in words.

    Attributes:
        name: of the backbone. width: D. pixels: 3p². rank, condition: of its patch embedding.
        prompts: K that were tried. placements: by placement.
    """

    name: str
    width: int
    pixels: int
    rank: int
    condition: float
    prompts: int
    placements: tuple[Feasibility, ...]

    @property
    def exact(self) -> bool:
        """Whether a trained PGN keeps its tokens to float32 rounding when they become (float) pixels."""
        return all(found.float_error < EXACT for found in self.placements)

    def __str__(self) -> str:
        lines = [f"{self.name}: a patch of {self.pixels} numbers becomes a token of {self.width}; the patch embedding "
                 f"has rank {self.rank} and condition number {self.condition:.3g}.",
                 f"{self.prompts} prompts as pixels, tokens like PGN's at the start:",
                 f"{'placement':<10}{'pixels from':>12}{'to':>10}{'error, float':>14}{'error, 8-bit picture':>22}"
                 f"{'position shift':>16}{'image height':>14}"]
        for found in self.placements:
            lines.append(f"{found.placement:<10}{found.low:>12.2f}{found.high:>10.2f}{found.float_error:>14.1e}"
                         f"{found.picture_error:>22.1%}{found.shift:>16.1%}{found.shrink:>14.0%}")
        return "\n".join([*lines, *self.verdict()])

    def verdict(self) -> list[str]:
        """What works here, a sentence each."""
        worst = max(found.picture_error for found in self.placements)
        if self.rank < self.width:
            lines = [f"Inversion loses part of every token ({self.rank} of {self.width} dimensions can be reached): a "
                     "PGN that was trained on tokens does not survive as pixels."]
        elif not self.exact:
            lines = ["Inversion is so ill-conditioned here that float32 pixels do not keep the tokens."]
        elif worst > 0.01:
            lines = ["Inversion is exact for a host that takes float images of any range.",
                     f"As 8-bit pictures the tokens are off by up to {worst:.0%}: measure accuracy first."]
        else:
            lines = [f"Inversion is exact in float, and 8-bit pictures keep the tokens to {worst:.2%}."]
        return [*lines, "Prompts that are trained as pixels (RGBPGNConfig) work on this backbone at every placement: "
                        "training sees what the host sees."]


class RGBPrompts(nn.Module):
    """The client's half of a model whose prompts are pixels: images in, pictures for the host out.

    The host runs the frozen backbone on the picture and returns `features`; `classify` applies the head to them. A
    model that was trained on tokens becomes one of pixels with `RGBPrompts.invert`.

    Args:
        model: a `PromptedViT` with `RGBPGNConfig`, placement "extend" or "replace", or with `PixelPromptConfig`.

    Raises:
        TypeError, ValueError: the model's prompts are no pixels of an image.
    """

    def __init__(self, model: PromptedViT) -> None:
        super().__init__()
        if not isinstance(model, PromptedViT):
            raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
        if model.generator is None or not model.generator.changes_images:
            raise ValueError("model must make other images (RGBPGNConfig with placement 'extend' or 'replace', or "
                             f"PixelPromptConfig), its method is {model.config}; RGBPrompts.invert makes one of a PGN")
        self.generator, self.head = model.generator, model.head
        self._backbone = (model.backbone,)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → the images for a host that takes normalised floats, (B, 3, H', W)."""
        backbone = self._backbone[0]
        backbone.check_images(images)
        return self.generator.prompt_images(backbone.normalise(images))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → uint8 pictures (B, 3, H', W) for a host that takes files: cut off at 0 and 255, rounded."""
        backbone = self._backbone[0]
        out = self.forward(images)
        mean, std = (per_channel(values, out, out.dtype) for values in (backbone.mean, backbone.std))
        return ((out * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """(B, D) what the host returned → logits (B, C); without a head the features themselves."""
        return features if self.head is None else self.head(features)

    @staticmethod
    def report(backbone: FrozenViT, num_prompts: int | None = None, library: Tensor | None = None,
               seed: int = 0) -> Report:
        """What prompts as pixels would cost on this backbone, before anything is trained.

        Args:
            num_prompts: K, a whole number of rows of patches; None: two rows.
            library: (M, D) tokens to invert; None: 16 tokens as PGN's start, N(0, 0.02²).
            seed: of those.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        projection = Projection.of(backbone)
        (height, columns), d = backbone.grid, backbone.width
        num_prompts = min(2, height - 1) * columns if num_prompts is None else num_prompts
        rows, rest = divmod(num_prompts, columns) if isinstance(num_prompts, int) and num_prompts > 0 else (0, 1)
        if rest or rows >= height:
            raise ValueError(f"num_prompts must fill whole rows of {columns} patches and leave one of {height} to the "
                             f"image, got {num_prompts!r}")
        if library is None:
            library = torch.randn(16, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
        if not isinstance(library, Tensor) or library.ndim != 2 or library.shape[1] != d:
            raise ValueError(f"library must be a tensor (M, {d}), got {getattr(library, 'shape', type(library))}")
        tokens = library.detach().double().cpu()
        found = []
        for placement in PLACEMENTS:
            wanted, shift = tokens, 0.0
            if placement != "latent":
                slots, change = slot_positions(backbone, placement, rows)
                own = slot_positions(backbone, "replace", height)[0]  # every place of the backbone's own
                wanted = tokens - slots[torch.arange(len(tokens)) % num_prompts]
                shift = float(change.norm() / own.norm().clamp_min(1e-30))
            pixels = projection.pixels(wanted)
            picture = (projection.picture(wanted) * 255).round() / 255
            found.append(Feasibility(placement, float(pixels.min()), float(pixels.max()),
                                     _relative(projection.tokens_in_float32(pixels) - wanted, tokens),
                                     _relative(projection.tokens(picture) - wanted, tokens), shift,
                                     1 - rows / height if placement == "replace" else 1.0))
        return Report(backbone.spec.name, d, projection.weight.shape[1], projection.rank, projection.condition,
                      num_prompts, tuple(found))

    @staticmethod
    def invert(model: PromptedViT, placement: str = "extend", picture: bool = False) -> PromptedViT:
        """A model with the same prompts as a trained PGN, made of pixels (PGN's prompt inversion).

        The mixture is linear, so the library is inverted once: patch = W⁺(L − b − q), with q the position embedding
        that the host adds at the prompt's place. The null space of W keeps the pixels as near to [0, 1] as it can. With
        "extend" the host resamples its position embedding for the image's own patches, too: a constant picture,
        added to the image, takes that back. `inversion_error` tells what is lost.

        Args:
            model: a `PromptedViT` with `PGNConfig`; it is not changed.
            placement: "latent", or "extend" with K a multiple of the patches in a row. ("replace" shrinks the image,
                which a model has to be trained with.)
            picture: keep every patch in [0, 1] and round it to 8 bits, as a file does, at the price of the tokens;
                False: pixels of any range, for a host that takes float images.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if not isinstance(model, PromptedViT):
            raise TypeError(f"model must be a PromptedViT, got {type(model).__name__}")
        generator, backbone = model.generator, model.backbone
        if not isinstance(generator, PGN) or isinstance(generator, RGBPGN):
            raise ValueError(f"model must have token prompts of PGNConfig, its method is {model.config}")
        if placement not in ("latent", "extend"):
            raise ValueError(f"placement must be 'latent' or 'extend', got {placement!r}: a model for 'replace' is "
                             "trained with the shrunk image (RGBPGNConfig)")
        if picture and generator.config.activation != "softmax":
            raise ValueError("picture needs activation 'softmax': only convex mixtures of pictures are pictures")
        projection = Projection.of(backbone)
        options = {**generator.config.to_dict(), "placement": placement, "bounded": False, "round_pixels": picture,
                   "offset": True, "compensate": placement == "extend"}
        options.pop("kind")
        head = "linear" if model.head is None else copy.deepcopy(model.head)
        inverted = PromptedViT(backbone, RGBPGNConfig(**options), head=head, readout=model.readout,
                               class_names=model.class_names)
        target = inverted.generator
        assert isinstance(target, RGBPGN)
        target.trunk.load_state_dict(generator.trunk.state_dict())
        wanted = generator.library.detach().double().cpu()  # (M, D)
        places = wanted.new_zeros(generator.num_prompts, backbone.width)
        if placement == "extend":
            places, change = slot_positions(backbone, placement, target.prompt_rows)
            undo = -change @ projection.inverse.T  # (N, 3p²)
        if generator.config.activation == "softmax":  # the weights sum to 1: the library can hold the bias
            offset = -places @ projection.inverse.T  # (K, 3p²)
            box = _common_box(offset)
            library = (projection.picture if picture else projection.pixels)(wanted, box)
        else:
            offset = -(places + projection.bias) @ projection.inverse.T
            library = wanted @ projection.inverse.T
        with torch.no_grad():
            target.library.copy_(library)
            target.offset.copy_(offset)
            if placement == "extend":
                target.compensation.copy_(_assemble(undo, backbone))
        return inverted.train(model.training)

    @staticmethod
    def inversion_error(model: PromptedViT, inverted: PromptedViT) -> float:
        """‖token − wanted‖ / ‖wanted‖ over the whole library, at the worst of the prompts' places."""
        tokens, generator = model.generator, inverted.generator
        if not isinstance(tokens, PGN) or not isinstance(generator, RGBPGN):
            raise TypeError("model must have a PGN and inverted what RGBPrompts.invert made of it")
        projection = Projection.of(model.backbone)
        wanted, pixels, offsets = (t.detach().double().cpu() for t in
                                   (tokens.library, generator.pixel_library(), generator.offset))
        places = wanted.new_zeros(len(offsets), wanted.shape[1])
        if generator.config.placement == "extend":
            places = slot_positions(model.backbone, "extend", generator.prompt_rows)[0]
        if generator.config.activation == "softmax":
            found = projection.tokens(pixels[None] + offsets[:, None]) + places[:, None]  # (K, M, D)
        else:
            found = (pixels @ projection.weight.T)[None]
        return max(_relative(of_place - wanted, wanted) for of_place in found)


def _common_box(offset: Tensor) -> Box:
    """Where a library patch x has to lie for x + offset to be a picture at every place; the middle where none is."""
    low, high = -offset.amin(dim=0), 1 - offset.amax(dim=0)
    middle = (low + high) / 2
    return torch.minimum(low, middle), torch.maximum(high, middle)


def _assemble(patches: Tensor, backbone: FrozenViT) -> Tensor:
    """(N, 3p²) patches → (3, H, W)."""
    (rows, columns), p = backbone.grid, backbone.patch_size
    return patches.view(rows, columns, 3, p, p).permute(2, 0, 3, 1, 4).reshape(3, rows * p, columns * p)


def _relative(beside: Tensor, wanted: Tensor) -> float:
    return float(beside.norm() / wanted.norm())
