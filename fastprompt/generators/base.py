"""Base classes of prompt generators: configuration, geometry and module."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypedDict, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.changes import changing
from fastprompt.vit import FrozenViT
from fastprompt.vit.prompts import Apart, Draws as Draws
from fastprompt.vit.weights import Norm

Config = TypeVar("Config", bound="PromptConfig")


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """Options of one method: a frozen dataclass with a default for every option, checked on construction.

    Attributes:
        kind: the method's name in adapter files.
        trains_backbone: whether the backbone is trained too.
    """

    kind: ClassVar[str]
    trains_backbone: ClassVar[bool] = False

    def to_dict(self) -> dict[str, Any]:
        """Return all options and `kind` as JSON values."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """Build from a mapping; an unknown key raises `ValueError` naming it."""
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - fields)
        if unknown:
            raise ValueError(f"{cls.__name__} has no option {unknown[0]!r}; it takes {sorted(fields)}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def to_load(self) -> PromptConfig:
        """Return the configuration for a generator that tensors are loaded into, without options for initialisation."""
        return self

    def require(
        self, name: str, kind: type | tuple[type, ...], low: float | None = None, high: float | None = None
    ) -> None:
        """Raise TypeError or ValueError unless option `name` is of `kind` and within [low, high]."""
        value = getattr(self, name)
        label = f"{type(self).__name__}.{name}"
        kinds: tuple[type[Any], ...] = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ArgumentTypeError(label, f"must be {' or '.join(k.__name__ for k in kinds)}, got {value!r}")
        # `not >=` instead of `<`, so that NaN fails
        if low is not None and not value >= low:
            raise ArgumentError(label, f"must be at least {low}, got {value!r}")
        if high is not None and not value <= high:
            raise ArgumentError(label, f"must be at most {high}, got {value!r}")

    def require_choice(self, name: str, choices: tuple[Any, ...]) -> None:
        """Raise ValueError unless option `name` is one of `choices`."""
        value = getattr(self, name)
        if value not in choices:
            raise ValueError(f"{type(self).__name__}.{name} must be one of {choices}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """The sizes of a backbone that a generator's tensors depend on.

    Attributes:
        width: token width D. depth: number of blocks. grid: (rows, columns) of patches. patch_size: in pixels.
        image_size: (height, width) in pixels.
        stages: (width, blocks) of each stage of a Swin transformer; `width` and `grid` then describe its first stage.
            None for a ViT.
        channels: of images.
    """

    width: int = 768
    depth: int = 12
    grid: tuple[int, int] = (14, 14)
    patch_size: int = 16
    image_size: tuple[int, int] = (224, 224)
    stages: tuple[tuple[int, int], ...] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, pair = getattr(self, field.name), isinstance(field.default, tuple)
            if field.name != "stages" and not _is_size(value, pair):
                takes = "two positive integers" if pair else "a positive integer"
                raise ArgumentError(field.name, f"must be {takes}, got {value!r}")
            if pair:
                object.__setattr__(self, field.name, tuple(value))
        if self.stages is None:
            return
        if (
            not isinstance(self.stages, (tuple, list))
            or not self.stages
            or not all(_is_size(stage, True) for stage in self.stages)
        ):
            raise ArgumentError("stages", f"must be (width, blocks) for each stage or None, got {self.stages!r}")
        stages = tuple((width, blocks) for width, blocks in self.stages)
        if stages[0][0] != self.width or sum(blocks for _, blocks in stages) != self.depth:
            raise ArgumentError(
                "stages", f"must start with width {self.width} and have {self.depth} blocks in all, got {stages}"
            )
        object.__setattr__(self, "stages", stages)

    @property
    def widths(self) -> tuple[int, ...]:
        """The token width of each block."""
        return tuple(width for width, blocks in self.stages or ((self.width, self.depth),) for _ in range(blocks))

    @classmethod
    def of(cls, backbone: FrozenViT) -> Geometry:
        return cls(
            backbone.patch_width,
            len(backbone.blocks),
            backbone.spec.grid,
            backbone.patch_size,
            backbone.image_size,
            backbone.stage_sizes if backbone.staged else None,
            backbone.channels,
        )


class GeometryOptions(TypedDict, total=False):
    """The fields of `Geometry`, as keyword arguments of a generator."""

    width: int
    depth: int
    grid: tuple[int, int]
    patch_size: int
    image_size: tuple[int, int]
    stages: tuple[tuple[int, int], ...] | None
    channels: int


class _Unset:
    def __repr__(self) -> str:
        return "<as config>"


UNSET: Any = _Unset()
"""Default of a generator's keyword options: take the value of `config`. (None is a valid value of some options.)"""


def _is_size(value: Any, pair: bool) -> bool:
    sizes = tuple(value) if pair and isinstance(value, (tuple, list)) else (value,)
    return len(sizes) == 1 + pair and all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in sizes)


class PromptGenerator(nn.Module, abc.ABC):
    """Computes prompt tokens. Can be used alone: `generator(x=None, layer=None)` → (1 or B, P, D).

    `known_at` determines `x`:

    * "static": None, because the prompts are parameters;
    * "image": normalised images (B, 3, H, W);
    * "embeddings": patch embeddings (B, N, D) with position embedding and after the backbone's pre-norm, if it has
      one, without the class token;
    * "layer": the patch tokens (B, N, D) that enter block `layer`.

    A model calls `draw` and `context` once per forward pass and `prompts` once for each block in `layers`.

    Attributes:
        role: what the prompts do in a block. "sequence": they are tokens of the sequence, which all others attend to.
            "queries": they only query. They attend to the block's tokens, which do not see them; the head reads what
            they become (`gather`), and the frozen features stay as they are. "cross": they are apart. After its
            self-attention every token attends to them, with a softmax of its own and the block's projections.
        layers: indices of the blocks whose prompts this generator sets; in other blocks, prompts flow on as tokens.
        num_prompts: P.
        prompts_last: whether prompts come after the patches ([CLS, patches, prompts]) instead of before them.
        read_with_patches: whether a head that reads the mean of the patches reads the mean of patches and prompts.
        before_pre_norm: whether block 0's prompts pass the backbone's pre-norm (CLIP's `ln_pre`), if it has one.
        takes_stages: whether the method is defined on backbones with a width per stage (Swin).
        changes_images: whether the method changes the images (`prompt_images`) instead of making tokens.
        changes_size: whether the changed images have another size.
    """

    known_at: ClassVar[str]
    config_class: ClassVar[type[PromptConfig]]
    role: ClassVar[str] = "sequence"
    prompts_last: ClassVar[bool] = False
    read_with_patches: ClassVar[bool] = False
    before_pre_norm: bool = False
    takes_stages: ClassVar[bool] = False
    changes_images: bool = False
    changes_size: bool = False
    num_prompts: int
    layers: tuple[int, ...]

    def __init__(
        self, config: PromptConfig | None = None, geometry: Geometry | FrozenViT | None = None, **options: Any
    ) -> None:
        """Initialise the generator.

        Args:
            config: the options; None uses the defaults.
            geometry: sizes of the backbone, or the backbone itself; None is ViT-B/16 at 224 px.
            options: single options of the configuration (num_prompts=16) or sizes (width=384) by name. `UNSET` ones are
                ignored. Subclasses name their own.

        Raises:
            TypeError, ValueError: an argument does not fit; the message names it.
        """
        super().__init__()
        if config is not None and type(config) is not self.config_class:
            raise ArgumentTypeError("config", f"must be {self.config_class.__name__}, got {type(config).__name__}")
        if geometry is None:
            geometry = Geometry()
        elif isinstance(geometry, FrozenViT):
            geometry = Geometry.of(geometry)
        elif not isinstance(geometry, Geometry):
            raise ArgumentTypeError("geometry", f"must be a Geometry or a FrozenViT, got {type(geometry).__name__}")
        options = {name: value for name, value in options.items() if value is not UNSET}
        sizes = {k: options.pop(k) for k in [f.name for f in dataclasses.fields(Geometry)] if k in options}
        known = {f.name for f in dataclasses.fields(self.config_class)}
        for key in options:
            if key not in known:
                raise ValueError(f"{type(self).__name__} has no option {key!r}; it takes {sorted(known)}")
        self.config = dataclasses.replace(config or self.config_class(), **options)
        self.geometry = dataclasses.replace(geometry, **sizes)
        first, depth = getattr(self.config, "first_block", 0), self.geometry.depth
        if first >= depth:
            label = f"{self.config_class.__name__}.first_block"
            raise ArgumentError(label, f"must be less than the {depth} blocks, got {first}")
        if self.geometry.stages is not None and not self.takes_stages:
            raise ValueError(
                f"{self.config_class.__name__} is not defined on Swin transformers, where the token width changes "
                "between stages; fp.list_methods(on_swin=True) lists the methods that are"
            )

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        """Load as torch does, as one atomic change for an engine that follows the model."""
        with changing(self, [self]):
            return super().load_state_dict(*args, **options)

    def draw(self, batch: int) -> Draws:
        """Draw the random tensors of one training step for `batch` images, in a fixed order; {} in eval mode.

        They come from torch's default generator of the parameters' device. They are passed to `context` and `prompts`,
        so that two forwards can use the same ones.
        """
        return {}

    def inference_draws(self) -> list[Draws]:
        """Return the draws of each forward to average class probabilities over at inference; [{}] for one forward."""
        return [{}]

    def context(self, x: Tensor | None, draws: Draws | None = None) -> Any:
        """Compute what is needed once per forward pass from `x` (None if `known_at` is "static" or "layer")."""
        return None

    def prompt_images(self, images: Tensor) -> Tensor:
        """Map normalised images (B, 3, H, W) to the images that the backbone gets instead, if `changes_images`."""
        raise ValueError(f"{type(self).__name__} makes prompt tokens, not images")

    @abc.abstractmethod
    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None) -> Tensor:
        """Return the prompts (1 or B, P, D) of block `layer`, which must be in `layers`.

        `tokens`: the patch tokens (B, N, D) entering the block, read if `known_at` is "layer".
        """

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws | None, norm: Norm | None) -> Tensor:
        """Return block 0's `prompts` as they enter it: in the dtype of the patch tokens, after the backbone's pre-norm.

        Called if `before_pre_norm`. Generators with an op that can apply the norm itself override this.
        """
        first = self.prompts(0, context, tokens, draws).to(tokens.dtype)
        return first if norm is None else norm(first)

    def first_sequence(self, context: Any, apart: Apart, draws: Draws | None, norm: Norm | None) -> Tensor | None:
        """Block 0's whole sequence (B, R + N + P, D), class token, registers, patches and prompts, in one pass over its
        rows, with position embedding and behind the backbone's pre-norm.

        Asked for on a GPU where `before_pre_norm` and the prompts stay rows of the sequence. None, the default: the
        graph asks for `first_prompts`.
        """
        return None

    def plain_prompts(
        self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws | None = None
    ) -> Tensor:
        """Return `prompts` computed by the paper's own graph; override this if `prompts` computes them differently."""
        return self.prompts(layer, context, tokens, draws)

    def free_tokens(self) -> dict[int, Tensor]:
        """Return the parameters (P, D) that are the prompts of each block themselves, as views; {}: there are none."""
        return {}

    def feature_width(self, width: int) -> int:
        """Return the width F of the head's input, for frozen features of width D."""
        return width

    def gather(self, features: Tensor, answers: Sequence[Tensor]) -> Tensor:
        """Return the head's input (B, F). Called if `role` is "queries".

        Args:
            features: (B, D), the frozen features that the readout selects.
            answers: (B, P, D) for each block in `layers`: what its prompts are where they leave it.
        """
        raise NotImplementedError(f"{type(self).__name__}.gather must be defined for role 'queries'")

    def penalty(self, weight: Tensor | None) -> Tensor | None:
        """Return a term of the training loss, (), that depends on parameters alone; None: no term.

        `weight`: (C, F), that of a linear head; None: the model's head is of another kind.
        """
        return None

    def aux(self, context: Any) -> dict[str, Tensor]:
        """Return what a training loss needs beside the logits, from a `context`."""
        return {}

    def forward(self, x: Tensor | None = None, layer: int | None = None) -> Tensor:
        """Return the prompts (1 or B, P, D) of block `layer`; None is the first block that this generator sets.

        Raises:
            TypeError, ValueError: `x` or `layer` does not fit.
        """
        layer = self.layers[0] if layer is None else layer
        if layer not in self.layers:
            raise ArgumentError("layer", f"must be one of {self.layers}, got {layer!r}")
        if self.known_at != "static":
            self.check_input(x)
        draws = self.draw(x.shape[0] if isinstance(x, Tensor) else 1)
        context = self.context(x if self.known_at in ("image", "embeddings") else None, draws)
        return self.prompts(layer, context, x if self.known_at == "layer" else None, draws)

    def check_input(self, x: Tensor | None, name: str = "x") -> None:
        """Raise TypeError or ValueError unless `x` fits `known_at`; errors call it `name`."""
        what = {
            "image": f"normalised images (B, {self.geometry.channels}, H, W)",
            "embeddings": f"(B, N, {self.geometry.width})",
            "layer": f"(B, N, {self.geometry.width})",
        }[self.known_at]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            found = getattr(x, "dtype", type(x).__name__)
            raise ArgumentTypeError(name, f"must be a floating-point tensor, {what}, got {found}")
        if self.known_at == "image":
            fits = x.ndim == 4 and x.shape[1] == self.geometry.channels
        else:
            fits = x.ndim == 3 and x.shape[2] == self.geometry.width
        if not fits:
            raise ArgumentError(name, f"must be {what}, got {tuple(x.shape)}")
        device = next(self.parameters()).device
        if x.device != device:
            raise ArgumentError(name, f"must be on {device}, where the generator is, got {x.device}")

    def num_parameters(self) -> int:
        """Return the number of trained parameters of this generator."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def paper_num_parameters(self) -> int | None:
        """Return that number by the paper's formula; None if the paper prints none."""
        return None


def dropout_mask(shape: tuple[int, ...], p: float, like: Tensor) -> Tensor:
    """Draw a dropout mask: 0 with probability p, else 1 / (1 − p), in the dtype and on the device of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)
