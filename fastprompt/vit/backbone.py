"""The frozen backbone as data: its tensors, its sizes, and the images it takes."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError, NotFiniteError
from fastprompt.kept import Kept
from fastprompt.vit import swin
from fastprompt.vit.swin import Merge, SwinBlock
from fastprompt.vit.weights import (
    Block,
    Dense,
    Folded,
    MapPool,
    Norm,
    Rotary,
    Stem,
    Turns,
    ViTSpec,
    frozen,
    is_finite,
    per_channel,
)

Same = TypeVar("Same", bound="Backbone")
RESAMPLED_TOLERANCE = 1e-6
"""Tolerance between processors of tensors that another library resampled, relative to their largest value."""


class Identity(NamedTuple):
    """Identifies a backbone, whatever happens to its tensors later.

    Attributes:
        fingerprint: sha256 of the structure and of the float32 tensors as loaded. A tensor that was resampled on
            reading contributes its original values, the resampling rule and the new size.
        earlier: the fingerprint that earlier versions took, over the resampled tensors themselves.
        resampled: tensors that another library had already resampled, in float32. Their last bits differ between
            processors, so they are compared instead of hashed into the fingerprint.
        tolerance: how far they may differ, relative to their largest value.
    """

    fingerprint: str
    earlier: str
    resampled: dict[str, Tensor]
    tolerance: float


class Backbone(nn.Module):
    """The frozen tensors of a vision transformer or Swin transformer.

    The modules that compute with them import this class: `reference.py` and `forward.py`, `swin_reference.py` and
    `swin_forward.py`, `folding.py`. `FrozenViT` fills it from a model.

    Args:
        parts: a reader's result, keyed by attribute name.

    Attributes:
        spec: properties that the tensors do not show.
        stem: a convolutional network before the patch embedding, or None.
        patch_weight: (D, C, p, p), or with a stem over its channels and pixels. patch_bias: (D,).
        patch_norm: follows the patch embedding.
        cls_token: (1, 1, D). registers: (1, R, D). pos_embed: (1, [prefix +] patches, D). norm_pre: precedes block 0.
        rotary: rotates the queries and keys of patches, or None.
        blocks: in order; a Swin transformer has `SwinBlock`s. norm: follows the last block. map_pool, fc_norm: pooling.
        merges: for each block, the patch merging before it, or None.
        staged: whether the width changes between stages, as in a Swin transformer.
        kept_fold: the cached result of `folding.folded`.
        copies: of the blocks' weights: "none", "folded" or "packed" (`FrozenViT.set_copies`).
        private: only the owner changes this backbone, and the owner discards cached results when it does
            (`FrozenViT.refold`). Nothing else checks it for changes.
        head: the pretrained classifier or projection. head_dist: the second one of a distilled DeiT, which reads the
            distillation token; the model's logits are the mean of both.
    """

    def __init__(self, parts: dict[str, Any]) -> None:
        super().__init__()
        self.spec: ViTSpec = parts.pop("spec")
        self.stem: Stem | None = parts.pop("stem", None)
        self.patch_weight: nn.Parameter = frozen(parts.pop("patch_weight"))
        self.patch_bias: nn.Parameter | None = frozen(parts.pop("patch_bias"))
        self.patch_norm: Norm | None = parts.pop("patch_norm", None)
        self.cls_token: nn.Parameter | None = frozen(parts.pop("cls_token"))
        self.registers: nn.Parameter | None = frozen(parts.pop("registers"))
        self.pos_embed: nn.Parameter | None = frozen(parts.pop("pos_embed"))
        self.rotary: Rotary | None = parts.pop("rotary", None)
        self.norm_pre: Norm | None = parts.pop("norm_pre", None)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(parts.pop("blocks")))
        self.norm: Norm | None = parts.pop("norm", None)
        self.map_pool: MapPool | None = parts.pop("map_pool", None)
        self.fc_norm: Norm | None = parts.pop("fc_norm", None)
        self.head: Dense | None = parts.pop("head", None)
        self.head_dist: Dense | None = parts.pop("head_dist", None)
        self._loaded: dict[str, str | None] = parts.pop("loaded", {})  # hashes of computed tensors; None: resampled
        merges: list[Any] | None = parts.pop("merges", None)
        self.staged = merges is not None
        self.merges: Sequence[Merge | None]
        if merges is None:
            self.merges = (None,) * len(self.blocks)
        else:
            self.merges = cast("Sequence[Merge | None]", nn.ModuleList(merges))
            swin.keep_layouts(self.blocks, self.merges)
        if parts:
            raise ValueError(f"the reader returned unknown parts: {sorted(parts)}")
        self._pixels_known = False  # whether floating-point images were distinguished from raw pixels
        self._identity: Identity | None = None
        self.kept_fold: Kept[Folded] = Kept()
        self.copies = "folded"
        self.private = False
        self.eval()
        _check_weights("module", self.state_dict())

    @property
    def patch_width(self) -> int:
        """Width of a patch embedding."""
        return self.patch_weight.shape[0]

    @property
    def feature_width(self) -> int:
        """Width of the features that the head reads."""
        return self.blocks[-1].width

    @property
    def stages(self) -> tuple[int, ...]:
        """The stage index of each block, from 0."""
        stages, stage = [], 0
        for merge in self.merges:
            stage += merge is not None
            stages.append(stage)
        return tuple(stages)

    @property
    def stage_sizes(self) -> tuple[tuple[int, int], ...]:
        """(width, blocks) of each stage; a ViT has one."""
        stages, widths = self.stages, [block.width for block in self.blocks]
        return tuple((widths[stages.index(stage)], stages.count(stage)) for stage in range(stages[-1] + 1))

    @property
    def patch_size(self) -> int:
        return self.spec.patch_size

    @property
    def num_patches(self) -> int:
        return self.spec.grid[0] * self.spec.grid[1]

    @property
    def image_size(self) -> tuple[int, int]:
        return self.spec.image_size

    @property
    def num_prefix(self) -> int:
        return int(self.spec.has_cls) + self.spec.num_registers

    @property
    def channels(self) -> int:
        """C of images (B, C, H, W)."""
        return len(self.spec.mean)

    @property
    def mean(self) -> tuple[float, ...]:
        return self.spec.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.spec.std

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_weight.device

    @property
    def fingerprint(self) -> str:
        """sha256 of the structure and of the float32 tensors as loaded, before any resampling, and of the resampling
        rule. It leaves out the classifier, since adapters rarely read it.
        """
        return self.identity.fingerprint

    @property
    def identity(self) -> Identity:
        """The backbone's identity, computed once and again when other tensors are loaded."""
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    def _identify(self) -> Identity:
        structure = dataclasses.asdict(self.spec)
        for key in ("name", "mean", "std", "antialias"):  # none of them affects an image of the backbone's own size
            del structure[key]
        structure["blocks"] = [(b.mlp.act, b.mlp.glu, b.post_norm, b.norm1.kind, b.norm1.eps) for b in self.blocks]
        if self.rotary is not None:
            structure["rotary"] = self.rotary.rule
        if self.staged:
            windowed = cast("Sequence[SwinBlock]", self.blocks)
            structure |= {"windows": [(b.grid, b.window, b.shift) for b in windowed], "stages": self.stages}
        digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
        earlier, resampled = digest.copy(), dict[str, Tensor]()
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(("head.", "head_dist.")):
                continue
            described = f"{name}{tuple(tensor.shape)}".encode()
            values = tensor.detach().to("cpu", torch.float32).contiguous()
            digest.update(described)
            if name not in self._loaded:
                digest.update(values.numpy().data)
            elif (loaded := self._loaded[name]) is None:
                resampled[name] = values.clone()
                digest.update(b" resampled")
            else:
                digest.update(f" {loaded}".encode())
            if self._loaded:
                earlier.update(described)
                earlier.update(values.numpy().data)
        eps = torch.finfo(self.dtype).eps if self.dtype in (torch.float16, torch.bfloat16) else 0.0
        fingerprint = digest.hexdigest()
        return Identity(
            fingerprint, earlier.hexdigest() if self._loaded else fingerprint, resampled, max(RESAMPLED_TOLERANCE, eps)
        )

    def fits(self, fingerprint: str, resampled: Mapping[str, Tensor]) -> bool:
        """Whether this backbone has that fingerprint, in this version's or an earlier version's form, and matches the
        tensors that another library had resampled (`Identity.resampled`).
        """
        own = self.identity
        if fingerprint == own.earlier:
            return True
        if fingerprint != own.fingerprint or own.resampled.keys() != resampled.keys():
            return False
        pairs = [(tensor, resampled[name]) for name, tensor in own.resampled.items()]
        return all(
            ours.shape == theirs.shape
            and bool((ours - theirs.to(ours)).abs().max() <= own.tolerance * ours.abs().max())
            for ours, theirs in pairs
        )

    def is_same(self, other: Backbone) -> bool:
        """Whether the other backbone is the same, in any dtype, so that an adapter of one fits the other."""
        return self.fits(other.identity.fingerprint, other.identity.resampled)

    def pin_fingerprint(self) -> None:
        """Compute the fingerprint now, before the tensors are cast or trained."""
        if not self.device.type == "meta":
            self.identity  # noqa: B018

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        if fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype != self.dtype:
            self.pin_fingerprint()
        with torch.inference_mode(False):  # PyTorch does not track changes of tensors created in inference mode
            super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        _check_weights("state_dict", {name: state_dict.get(prefix + name) for name in self.state_dict()})
        if not any(p.requires_grad for p in self.parameters()):  # a fine-tuned copy keeps its original's identity
            other = [
                name
                for name, old in self.state_dict().items()
                if isinstance(new := state_dict.get(prefix + name), Tensor)
                and (old.is_meta or not torch.equal(new.to(old), old))
            ]
            if other or self.device.type == "meta":
                self._identity = None
                self._loaded = {name: loaded for name, loaded in self._loaded.items() if name not in other}
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.staged:
            swin.keep_layouts(self.blocks, self.merges)

    def train(self, mode: bool = True) -> Backbone:
        """Keep the backbone in eval mode whatever `mode` is: a frozen backbone has no training mode."""
        return super().train(False)

    def turns(self, grid: tuple[int, int], dtype: torch.dtype) -> list[Turns | None]:
        """Return for each block the rotation of [prefix, patches] on a grid of patches; None: it rotates nothing."""
        rotary = self.rotary
        if rotary is None:
            return [None] * len(self.blocks)
        if grid == self.spec.grid:
            sin, cos = rotary.sin, rotary.cos
        else:
            angles = rotary.angles(grid)
            sin, cos = angles.sin(), angles.cos()
        sin, cos = sin.to(dtype), cos.to(dtype)
        own = len(sin) > 1 or len(self.blocks) == 1  # whether each block has its own angles
        return [Turns(sin[i * own], cos[i * own], self.num_prefix) for i in range(len(self.blocks))]

    def normalise(self, images: Tensor) -> Tensor:
        """Map uint8 (B, C, H, W) to (x / 255 − mean) / std; return floating-point images unchanged."""
        if images.dtype != torch.uint8:
            return images
        dtype = torch.promote_types(self.dtype, torch.float32)
        mean, std = per_channel(self.mean, images, dtype), per_channel(self.std, images, dtype)
        return (images.to(dtype) / 255 - mean) / std

    def check_images(self, images: Tensor) -> None:
        """Raise TypeError or ValueError, naming `images`, if this backbone cannot take them."""
        if not isinstance(images, Tensor):
            raise ArgumentTypeError("images", f"must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ArgumentTypeError(
                "images", f"must be floating point (normalised) or uint8 (raw pixels), got {images.dtype}"
            )
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ArgumentError("images", f"must have shape (B, {self.channels}, H, W), got {tuple(images.shape)}")
        if images.device != self.device:
            raise ArgumentError("images", f"are on {images.device}, the backbone is on {self.device}")
        reason = self.spec.obstacle(images.shape[2], images.shape[3])
        if reason:
            raise ValueError(reason)
        if images.device.type == "cpu" and not torch.compiler.is_compiling() and not is_finite(images):
            raise NotFiniteError("images", "contain NaN or infinite values")
        if not torch.compiler.is_compiling() and images.is_floating_point() and not self._pixels_known:
            self._pixels_known = self._tells_of_raw_pixels(images)

    def _tells_of_raw_pixels(self, images: Tensor) -> bool:
        """Warn if floating-point images lie in [0, 1] or [0, 255], as pixels do before normalisation.

        Returns whether the check is finished: the warning was given, or a value is below zero, as in normalised
        images. Until then, each call reads the minimum and maximum of its images.
        """
        if images.numel() == 0 or images.is_meta or (images.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        low, high = (value.item() for value in torch.aminmax(images.detach()))
        black = min(-mean / std for mean, std in zip(self.mean, self.std, strict=True))
        raw = low >= 0 and (high > 16 or (black < -0.1 and low + 0.5 < high <= 1))
        if raw:
            warnings.warn(
                f"images are floating point from {low:.3g} to {high:.3g}, and taken as normalised: raw pixels must be "
                "uint8, or normalised as (x / 255 - backbone.mean) / backbone.std",
                stacklevel=4,
            )
        return raw or low < 0

    def any_size(self: Same) -> Same:
        """Return the same backbone, sharing its tensors, for images of any whole number of patches.

        The position embedding is resampled to the images' grid by the rule of its library. This serves pictures that
        are taller than the backbone's own images (`RGBPGNConfig` with placement "extend"). The fingerprint is
        unchanged, so the same adapters fit.
        """
        if any(getattr(block, "bias", None) is not None for block in self.blocks):
            raise ValueError(f"{self.spec.name} takes images of one size: it has a relative position bias")
        self.pin_fingerprint()
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, dynamic_size=True)
        return other


def _check_weights(argument: str, state: Mapping[str, Any]) -> None:
    """Raise `ValueError`, naming the tensor, if a weight is NaN or infinite."""
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and not is_finite(tensor):
            raise NotFiniteError(argument, f"must have finite weights, got NaN or infinite values in {name}")
