"""`RGBPrompts`: check whether prompts can be pixels on a backbone, and turn a trained model's prompts into pixels."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators import PGN
from fastprompt.generators.rgb_pgn import PLACEMENTS, RGBPGN, RGBPGNConfig, placement_obstacle, round_pixels
from fastprompt.model import PromptedViT
from fastprompt.pixels.projection import Projection, is_normed, slot_positions
from fastprompt.vit import FrozenViT
from fastprompt.vit.weights import per_channel

EXACT = 1e-4


class Feasibility(NamedTuple):
    """The result of inversion at one placement. Errors are ‖token − wanted‖ / ‖wanted‖ at the worst place.

    Attributes:
        placement: "latent", "extend" or "replace".
        low, high: range of the pixels that give the wanted tokens; pictures have 0 to 1.
        float_error: error of these pixels in float32, for a host that takes any float.
        picture_error: error of the nearest 8-bit pictures.
        shift: relative difference between the host's resampled position embedding and the backbone's own over the
            image's patches; 0 if they are equal.
        shift_left: fraction of the shift that remains in 8-bit pictures of noise after compensation.
        shrink: fraction of the image's height that is left for the image.
        obstacle: why pixel prompts cannot be placed here, or empty. If not empty, all numbers are NaN.
        inversion: why a PGN that was trained on tokens cannot become pixels here, or empty.
    """

    placement: str
    low: float = math.nan
    high: float = math.nan
    float_error: float = math.nan
    picture_error: float = math.nan
    shift: float = math.nan
    shift_left: float = math.nan
    shrink: float = math.nan
    obstacle: str = ""
    inversion: str = ""


@dataclasses.dataclass(frozen=True)
class Report:
    """What is possible on a backbone; `print(report)` describes it in words.

    Attributes:
        name: name of the backbone. width: D. pixels: 3p².
        rank, condition: rank and condition number of its patch embedding.
        prompts: the number of prompts K that was tried. placements: the result for each placement.
    """

    name: str
    width: int
    pixels: int
    rank: int
    condition: float
    prompts: int
    placements: tuple[Feasibility, ...]

    @property
    def invertible(self) -> tuple[Feasibility, ...]:
        """The placements at which a trained PGN can become pixels."""
        return tuple(found for found in self.placements if not found.obstacle and not found.inversion)

    @property
    def exact(self) -> bool:
        """Whether a trained PGN keeps its tokens up to float32 rounding when they become (float) pixels."""
        return bool(self.invertible) and all(found.float_error < EXACT for found in self.invertible)

    def __str__(self) -> str:
        lines = [
            f"{self.name}: a patch of {self.pixels} numbers becomes a token of {self.width}; the patch embedding "
            f"has rank {self.rank} and condition number {self.condition:.3g}."
        ]
        rows = [
            f"{found.placement:<10}{found.low:>12.2f}{found.high:>10.2f}{found.float_error:>14.1e}"
            f"{found.picture_error:>22.1%}{found.shift:>16.1%}{found.shift_left:>8.0%}{found.shrink:>14.0%}"
            for found in self.placements
            if not math.isnan(found.low)
        ]
        if rows:
            lines += [
                f"{self.prompts} prompts as pixels, for the given tokens or PGN's initial ones:",
                f"{'placement':<10}{'pixels from':>12}{'to':>10}{'error, float':>14}{'error, 8-bit picture':>22}"
                f"{'position shift':>16}{'left':>8}{'image height':>14}",
                *rows,
            ]
        return "\n".join([*lines, *self.verdict()])

    def verdict(self) -> list[str]:
        """Return sentences about what works on this backbone."""
        lines = []
        if self.invertible:
            where = _listed([found.placement for found in self.invertible])
            worst = max(found.picture_error for found in self.invertible)
            if self.rank < self.width:
                lines = [
                    f"Inversion loses part of every token ({self.rank} of {self.width} dimensions can be "
                    "reached): a PGN that was trained on tokens does not survive as pixels."
                ]
            elif not self.exact:
                lines = ["Inversion is so ill-conditioned here that float32 pixels do not keep the tokens."]
            elif worst > 0.01:
                lines = [
                    f"Inversion is exact for a host that takes float images of any range, with {where}.",
                    f"As 8-bit pictures the tokens are off by up to {worst:.0%}: measure accuracy first.",
                ]
            else:
                lines = [
                    f"Inversion is exact in float, and 8-bit pictures keep the tokens to {worst:.2%}, with {where}."
                ]
        lines += [
            f"A PGN of tokens cannot be inverted: {reason}."
            if all(f.inversion for f in self.placements)
            else f"A PGN of tokens cannot be inverted with '{found.placement}': {reason}."
            for found in self.placements
            for reason in [found.inversion]
            if reason and not found.obstacle
        ]
        lines += [f"Not with '{found.placement}': {found.obstacle}." for found in self.placements if found.obstacle]
        placeable = [found.placement for found in self.placements if not found.obstacle]
        if placeable:
            lines.append(
                "Prompts that are trained as pixels (RGBPGNConfig) work on this backbone with "
                f"{_listed(placeable)}: training sees what the host sees."
            )
        return list(dict.fromkeys(lines))


class RGBPrompts(nn.Module):
    """The client's half of a model with pixel prompts: images in, pictures for the host out.

    The host runs the frozen backbone on the picture and returns `features`; `classify` applies the head to them.
    `RGBPrompts.invert` turns a model that was trained on tokens into one with pixel prompts. Generator and head are
    copies in eval mode, so the model can be trained further.

    Args:
        model: a `PromptedViT` with `RGBPGNConfig`, placement "extend" or "replace", or with `PixelPromptConfig`.

    Raises:
        TypeError, ValueError: the model's prompts are not pixels of an image.
    """

    def __init__(self, model: PromptedViT) -> None:
        super().__init__()
        if not isinstance(model, PromptedViT):
            raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
        if model.generator is None or not model.generator.changes_images:
            raise ArgumentError(
                "model",
                "must have pixel prompts (RGBPGNConfig with placement 'extend' or 'replace', or PixelPromptConfig), "
                f"got {model.config}; RGBPrompts.invert converts a PGN",
            )
        self.generator, self.head = copy.deepcopy((model.generator, model.head), {id(model.backbone): model.backbone})
        self._backbone = (model.backbone,)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to images for a host that takes normalised floats, (B, 3, H', W)."""
        backbone = self._backbone[0]
        backbone.check_images(images)
        return self.generator.prompt_images(backbone.normalise(images))

    @torch.no_grad()
    def pictures(self, images: Tensor) -> Tensor:
        """Map (B, 3, H, W) to rounded and clipped uint8 pictures (B, 3, H', W) for a host that takes files."""
        backbone = self._backbone[0]
        out = self.forward(images)
        mean, std = (per_channel(values, out, out.dtype) for values in (backbone.mean, backbone.std))
        return ((out * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Map the host's features (B, D) to logits (B, C); without a head, return the features."""
        if not isinstance(features, Tensor):
            raise ArgumentTypeError("features", f"must be a torch.Tensor, got {type(features).__name__}")
        width = self._backbone[0].feature_width
        if features.ndim != 2 or features.shape[1] != width or not features.is_floating_point():
            raise ArgumentError(
                "features",
                f"must be floats (B, {width}), as the host returns them, got {features.dtype} {tuple(features.shape)}",
            )
        return features if self.head is None else self.head(features)

    @staticmethod
    def report(
        backbone: FrozenViT, num_prompts: int | None = None, library: Tensor | None = None, seed: int = 0
    ) -> Report:
        """Report what pixel prompts would lose on this backbone, without training anything.

        Args:
            num_prompts: K; None is two rows of patches.
            library: (M, D) tokens to invert, for example those of a trained PGN; None draws 16 initial tokens of PGN,
                N(0, 0.02²).
            seed: seed of the drawn tokens.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        projection = Projection.of(backbone, before_norm=True)
        d, (height, columns) = len(projection.weight), backbone.spec.grid
        if num_prompts is None:
            num_prompts = min(2, max(1, height - 1)) * columns
        if not isinstance(num_prompts, int) or isinstance(num_prompts, bool) or num_prompts < 1:
            raise ArgumentError("num_prompts", f"must be a positive whole number, got {num_prompts!r}")
        tokens = _tokens(library, d, seed)
        found = tuple(_feasibility(backbone, projection, placement, num_prompts, tokens) for placement in PLACEMENTS)
        return Report(
            backbone.spec.name, d, projection.weight.shape[1], projection.rank, projection.condition, num_prompts, found
        )

    @staticmethod
    def invert(model: PromptedViT, placement: str = "extend", picture: bool = False) -> PromptedViT:
        """Return a model with the prompts of a trained PGN turned into pixels (PGN's prompt inversion).

        The mixture is linear, so the library is inverted once: patch = W⁺(L − b) − W⁺q, where q is the position
        embedding that the host adds at the prompt's place. If the mixture is convex (softmax), the null space of W is
        used to keep the pixels as close to [0, 1] as possible. With "extend", the host also resamples its position
        embedding for the image's own patches; a constant picture added to the image compensates for that.
        `inversion_error` measures the loss.

        Args:
            model: a `PromptedViT` with `PGNConfig`; it is not changed.
            placement: "latent", or "extend" for models that read the class token, with K a multiple of the patches in
                a row. ("replace" shrinks the image, so a model must be trained with it.)
            picture: whether to use the nearest pixels that fit into an 8-bit file, clipped to [0, 1] and rounded, at
                the expense of the tokens. False allows pixels of any range, for a host that takes float images.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        if not isinstance(model, PromptedViT):
            raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
        generator, backbone = model.generator, model.backbone
        if not isinstance(generator, PGN) or isinstance(generator, RGBPGN) or generator.library is None:
            raise ArgumentError("model", f"must have token prompts of PGNConfig from a library, got {model.config}")
        if placement not in ("latent", "extend"):
            raise ArgumentError(
                "placement",
                f"must be 'latent' or 'extend', got {placement!r}: a model for 'replace' is "
                "trained with the shrunk image (RGBPGNConfig)",
            )
        if picture and generator.config.activation != "softmax":
            raise ArgumentError(
                "picture", "must be False without activation 'softmax': only convex mixtures of pictures are pictures"
            )
        reason = _inversion_obstacle(backbone, placement, model.readout)
        if reason:
            raise ArgumentError("model", f"cannot be inverted with placement {placement!r}: {reason}")
        projection = Projection.of(backbone)
        options = {
            **generator.config.to_dict(),
            "placement": placement,
            "bounded": False,
            "round_pixels": picture,
            "offset": True,
            "compensate": placement == "extend",
            "pretrained_trunk": False,
        }
        options.pop("kind")
        head = "linear" if model.head is None else copy.deepcopy(model.head)
        inverted = PromptedViT(
            backbone, RGBPGNConfig(**options), head=head, readout=model.readout, class_names=model.class_names
        )
        inverted.preprocessing = model.preprocessing
        target = inverted.generator
        assert isinstance(target, RGBPGN)
        target.trunk.load_state_dict(generator.trunk.state_dict())
        wanted = generator.library.detach().double().cpu()  # (M, D)
        places = wanted.new_zeros(generator.num_prompts, backbone.patch_width)
        if placement == "extend":
            places, change = slot_positions(backbone, placement, target.prompt_rows)
            compensation = projection.undo(change, picture)  # (N, 3p²)
        if generator.config.activation == "softmax":  # the weights sum to 1, so the library can hold the bias
            library, offset = (projection.picture if picture else projection.pixels)(wanted, places)
        else:
            library, offset = wanted @ projection.inverse.T, -(places + projection.bias) @ projection.inverse.T
        with torch.no_grad():
            target.library.copy_(library)
            target.offset.copy_(offset)
            if placement == "extend":
                target.compensation.copy_(_assemble(compensation, backbone))
        return inverted.train(model.training)

    @staticmethod
    @torch.no_grad()
    def inversion_error(model: PromptedViT, inverted: PromptedViT, images: Tensor | None = None) -> float:
        """Return ‖token − wanted‖ / ‖wanted‖ over the whole library, at the worst of the prompts' places.

        The pixels are those that the host gets, clipped and rounded if `inverted` does so.

        Args:
            model, inverted: a model with PGN, and the result of `invert` for it.
            images: (B, 3, H, W). If given, the images' own patches, which "extend" shifts and compensates, are checked
                too, and the largest error is returned.

        Raises:
            TypeError, ValueError: an argument does not fit.
        """
        for name, given in (("model", model), ("inverted", inverted)):
            if not isinstance(given, PromptedViT):
                raise ArgumentTypeError(name, f"must be a PromptedViT, got {type(given).__name__}")
        tokens, generator, backbone = model.generator, inverted.generator, model.backbone
        if not isinstance(tokens, PGN) or isinstance(tokens, RGBPGN) or tokens.library is None:
            raise ArgumentError("model", f"must have token prompts of PGNConfig from a library, got {model.config}")
        if (
            not isinstance(generator, RGBPGN)
            or not generator.config.offset
            or not backbone.is_same(inverted.backbone)
            or any(
                getattr(tokens.config, name) != getattr(generator.config, name)
                for name in ("num_prompts", "library_size", "activation")
            )
        ):
            raise ArgumentError("inverted", f"must be the result of RGBPrompts.invert for model, got {inverted.config}")
        projection, places = Projection.of(backbone), torch.zeros(1, backbone.patch_width, dtype=torch.float64)
        if generator.config.placement == "extend":
            places, change = slot_positions(backbone, "extend", generator.prompt_rows)
        wanted, library, offset = (
            part.detach().double().cpu() for part in (tokens.library, generator.pixel_library(), generator.offset)
        )
        error = _worst(projection, wanted, places, library, offset[: len(places)], generator.config.round_pixels)
        if images is None or generator.config.placement == "latent":
            return error
        backbone.check_images(images)
        images, p = backbone.normalise(images), backbone.patch_size
        own = slot_positions(backbone, "replace", backbone.spec.grid[0])[0]
        prompted = generator.prompt_images(images)[:, :, : images.shape[2]]
        patches = (F.unfold(each.double().cpu(), p, stride=p).mT for each in (images, prompted))  # (B, N, 3p²)
        wanted, found = (projection.tokens(each * projection.std + projection.mean) for each in patches)
        return max(error, _relative(found + change - wanted, wanted + own))


def _feasibility(
    backbone: FrozenViT, projection: Projection, placement: str, num_prompts: int, tokens: Tensor
) -> Feasibility:
    """Compute the report of one placement; `tokens` (M, D)."""
    obstacle = placement_obstacle(backbone, placement, num_prompts)
    if obstacle:
        return Feasibility(placement, obstacle=obstacle)
    inversion = _inversion_obstacle(backbone, placement, backbone.spec.pool)
    if is_normed(backbone):
        return Feasibility(placement, inversion=inversion)
    places, shift, shift_left = torch.zeros(1, backbone.patch_width, dtype=torch.float64), 0.0, 0.0
    (height, columns), rows = backbone.spec.grid, 0
    if placement != "latent":
        rows = num_prompts // columns
        places, change = slot_positions(backbone, placement, rows)
        own = slot_positions(backbone, "replace", height)[0]  # all places of the backbone's own grid
        shift = float(change.norm() / own.norm().clamp_min(1e-30))
        shift_left = shift and projection.left_over(change, projection.undo(change, picture=True))
    library, offset = projection.pixels(tokens, places)
    ends = [(float((library + added).min()), float((library + added).max())) for added in offset]
    return Feasibility(
        placement,
        min(low for low, _ in ends),
        max(high for _, high in ends),
        _worst(projection, tokens, places, library, offset, in_float32=True),
        _worst(projection, tokens, places, *projection.picture(tokens, places), rounded=True),
        shift,
        shift_left,
        1 - rows / height if placement == "replace" else 1.0,
        inversion=inversion,
    )


def _inversion_obstacle(backbone: FrozenViT, placement: str, readout: str) -> str:
    """Return why a PGN that was trained on tokens cannot become pixels, or an empty string."""
    if is_normed(backbone):
        return f"{backbone.spec.name} norms its patch embedding, which has no linear inverse"
    if placement == "replace":
        return "it has not seen the shrunk image"
    if placement == "extend" and readout != "cls":
        return (
            f"readout {readout!r} would pool the prompts with the image's patches, which it does not with tokens; "
            "'latent' keeps them apart"
        )
    return ""


def _tokens(library: Tensor | None, width: int, seed: int) -> Tensor:
    """Return the tokens that a report tries, (M, D) in float64 on the CPU."""
    if library is None:
        if not isinstance(seed, int):
            raise ArgumentTypeError("seed", f"must be a whole number, got {seed!r}")
        return torch.randn(16, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
    if (
        not isinstance(library, Tensor)
        or not library.is_floating_point()
        or library.ndim != 2
        or library.shape[1] != width
        or not len(library)
    ):
        got = f"{library.dtype} {tuple(library.shape)}" if isinstance(library, Tensor) else type(library).__name__
        raise ArgumentError("library", f"must be a tensor of floats (M, {width}), got {got}")
    tokens = library.detach().double().cpu()
    if not tokens.isfinite().all() or not tokens.any():
        raise ArgumentError("library", "must be finite and not all zero")
    return tokens


def _worst(
    projection: Projection,
    wanted: Tensor,
    places: Tensor,
    library: Tensor,
    offset: Tensor,
    rounded: bool = False,
    in_float32: bool = False,
) -> float:
    """Return the relative error of the tokens (M, D) given by library[m] + offset[k], at the worst place k."""
    errors = []
    for place, added in zip(places, offset, strict=True):
        pixels = round_pixels(library + added) if rounded else library + added
        found = projection.tokens_in_float32(pixels) if in_float32 else projection.tokens(pixels)
        errors.append(_relative(found + place - wanted, wanted))
    return max(errors)


def _listed(names: Sequence[str]) -> str:
    """Join names as in "'latent', 'extend' and 'replace'"."""
    quoted = [f"'{name}'" for name in names]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]] if quoted[1:] else quoted)


def _assemble(patches: Tensor, backbone: FrozenViT) -> Tensor:
    """Assemble patches (N, 3p²) to an image (3, H, W)."""
    (rows, columns), p = backbone.spec.grid, backbone.patch_size
    pattern = "(rows columns) (channel y x) -> channel (rows y) (columns x)"
    return rearrange(patches, pattern, rows=rows, columns=columns, y=p, x=p)


def _relative(beside: Tensor, wanted: Tensor) -> float:
    return float(beside.norm() / wanted.norm())
