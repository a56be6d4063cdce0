"""`Int8Weights`: the frozen Linears of a backbone in int8, calibrated once, kept in a file."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from fastprompt.adapters import state_digest
from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError
from fastprompt.fetch import cache_dir
from fastprompt.files import atomic_write
from fastprompt.generators import LinearProbeConfig
from fastprompt.int8 import native
from fastprompt.int8.arithmetic import BITS, Rounded
from fastprompt.int8.calibrate import round_blocks
from fastprompt.int8.linear import LINEARS, Int8Linear, linear_of, quantize_block
from fastprompt.model import PromptedViT
from fastprompt.vit.frozen import FrozenViT
from fastprompt.vit.weights import Block, Dense

GATE = 1.5
"""The features' relative error may be this many times that of bfloat16. Weights with a larger one are not run."""
LEAST_IMAGES = 8
CALIBRATION_IMAGES = 64
"""What commands calibrate on."""
HELD_OUT = 4
"""Every fourth image measures the error and does not calibrate, ..."""
MOST_MEASURED = 16
"""... up to this many: where bfloat16 is emulated, measuring takes most of the time."""
MARGIN = 0.93
"""Calibration gives activations 8 bits as long as the error stays below this share of the gate, ..."""
FORMAT = "2"
FIT = 0.1
"""Largest relative distance of rounded weights from the backbone's own."""


@dataclasses.dataclass(frozen=True)
class Int8Weights:
    """The Linears of a frozen ViT's blocks, rounded to int8 with one scale for each output.

    `Int8Weights.calibrate` makes them, once for each backbone; `fp.Engine(model, dtype="int8")` runs them. They hold
    for every adapter on the backbone at its image size.

    Attributes:
        fingerprint: the backbone's. blocks: of each block its rounded Linears, by name.
        num_images: images that calibrated. image_size: their (height, width).
        error: mean of ‖f₈ − f₃₂‖ / ‖f₃₂‖ of the features f over images that did not calibrate.
        bfloat16_error: the same for the backbone in bfloat16. Weights with `error` above 1.5 times this are refused.
    """

    fingerprint: str
    blocks: tuple[dict[str, Rounded], ...]
    num_images: int
    image_size: tuple[int, int]
    error: float
    bfloat16_error: float

    @classmethod
    def calibrate(
        cls, backbone: FrozenViT, images: Tensor, batch_size: int = 16, activation_bits: int | None = None
    ) -> Int8Weights:
        """Round the weights on images like those that the engine will see; a few dozen are enough.

        The result is the same for the same images on the same machine.

        Args:
            backbone: a ViT on the CPU; it is not changed.
            images: (N, C, H, W), N ≥ 8, float (normalised) or uint8 (raw pixels). Every fourth one only measures the
                error.
            batch_size: images per forward; it bounds the memory.
            activation_bits: 12, or 8 for as many Linears as the gate permits, the others having 12; None: 8 where the
                CPU multiplies bytes twice as fast (AVX-512 with VNNI), else 12, which are more exact and cost the same.

        Raises:
            TypeError, ValueError: an argument is invalid, the backbone is a Swin transformer, trains, or is not on the
                CPU, or the images do not fit it.
            RuntimeError: the C++ kernels are not built.
        """
        check_backbone(backbone)
        backbone.check_images(images)
        if len(images) < LEAST_IMAGES:
            raise ArgumentError("images", f"must be at least {LEAST_IMAGES}, got {len(images)}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ArgumentError("batch_size", f"must be a positive integer, got {batch_size!r}")
        if activation_bits is not None and (activation_bits not in BITS or isinstance(activation_bits, bool)):
            raise ArgumentError("activation_bits", f"must be 8, 12 or None, got {activation_bits!r}")
        if reason := native.obstacle():
            raise RuntimeError(f"int8 cannot run: {reason}")
        bits = activation_bits or (8 if native.has_bytes() else 12)
        backbone.pin_fingerprint()
        measured = torch.arange(len(images)) % HELD_OUT == HELD_OUT - 1
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            images = images if images.dtype == torch.uint8 else images.float()
            held = images[measured][:MOST_MEASURED].split(batch_size)
            calibrating = images[~measured]
            exact = _features(_private(backbone), held)
            of_half = relative_error(_features(_private(backbone, torch.bfloat16), held), exact)

            def rounded_to(bits: int) -> tuple[float, list[dict[str, Rounded]]]:
                """Round for activations of these bits, as far as the gate permits; return the error, too."""
                blocks, in_int8 = (
                    round_blocks(_private(backbone), calibrating.split(batch_size), bits),
                    _private(backbone),
                )
                for block, rounded in zip(_blocks(in_int8), blocks, strict=True):
                    quantize_block(block, rounded)

                def measure() -> float:
                    return relative_error(_features(in_int8, held), exact)

                if bits == 8:
                    _widen(_blocks(in_int8), blocks, measure, MARGIN * GATE * of_half)
                return measure(), blocks

            error, blocks = rounded_to(bits)
            if bits == 8 and not error <= MARGIN * GATE * of_half:  # the factors cost the weights too much
                error, blocks = min((error, blocks), rounded_to(12), key=lambda found: found[0])
        size = (images.shape[2], images.shape[3])
        return cls(backbone.fingerprint, tuple(blocks), len(calibrating), size, error, of_half)

    @property
    def digest(self) -> str:
        """sha256 of the rounded weights and of the backbone that they are for."""
        return hashlib.sha256(f"{self.fingerprint} {state_digest(self._tensors())}".encode()).hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        """What is rounded, under the names that it has in a file."""
        return {
            f"{i}.{name}.{kind}": tensor.contiguous()
            for i, block in enumerate(self.blocks)
            for name, rounded in block.items()
            for kind, tensor in (rounded._asdict() | {"bits": torch.tensor(rounded.bits)}).items()
        }

    def save(self, path: str | os.PathLike[str] | None = None) -> Path:
        """Write a safetensors file and return its path.

        Args:
            path: None: the user cache, where `fp.Engine(model, dtype="int8")` looks for the backbone's weights.

        Raises:
            OSError: the file cannot be written.
        """
        path = cached(self.fingerprint) if path is None else Path(path)
        facts = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "blocks"
        } | {"depth": len(self.blocks)}
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, tensors_to_bytes(self._tensors(), {"format": FORMAT, "facts": json.dumps(facts)}))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Int8Weights:
        """Read a file written by `save`.

        Raises:
            FileNotFoundError: there is no such file. ValueError: it is damaged, or is no file of int8 weights.
        """
        path = Path(path)
        if not path.is_file():
            raise ArgumentPathError("path", f"{path} does not exist")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')!r}")
            facts: dict[str, Any] = json.loads(metadata["facts"])
            blocks: list[dict[str, Rounded]] = [{} for _ in range(facts.pop("depth"))]
            for key in tensors:
                i, name, kind = key.split(".")
                if kind == "weight":
                    scale, factor, bits = (tensors[f"{i}.{name}.{other}"] for other in ("scale", "factor", "bits"))
                    rounded = Rounded(tensors[key], scale, factor, int(bits))
                    _check_rounded(name, rounded)
                    blocks[int(i)][name] = rounded
            facts["image_size"] = tuple(facts["image_size"])
            return cls(blocks=tuple(blocks), **facts)
        except (SafetensorError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ArgumentError("path", f"must be a file of Int8Weights.save, {path} is not: {error}") from error

    def fits(self, backbone: FrozenViT) -> str:
        """Return why an engine does not run these weights on this backbone; empty if it does."""
        if not backbone.fits(self.fingerprint, backbone.identity.resampled):
            return (
                f"are for the backbone with fingerprint {self.fingerprint[:12]}; this one is {backbone.spec.name} with "
                f"{backbone.fingerprint[:12]}"
            )
        if not self.error <= GATE * self.bfloat16_error:
            return (
                f"move the features by {self.error:.2g} of their norm, more than {GATE} times the "
                f"{self.bfloat16_error:.2g} of bfloat16; calibrate them with more images, or with images like those "
                "that the engine sees"
            )
        return ""

    def put_into(self, backbone: FrozenViT, serving: bool = True) -> None:
        """Replace the Linears of a private backbone's folded blocks; see `quantize_block`."""
        blocks = _blocks(backbone)
        for i, (block, rounded) in enumerate(zip(blocks, self.blocks, strict=True)):
            for name, of_linear in rounded.items():
                weight = linear_of(block, name).weight
                fits = of_linear.weight.shape == weight.shape
                if not fits or (of_linear.plain - weight).norm() > FIT * weight.norm():
                    raise ArgumentError("int8", f"must be the backbone's own weights, {name} of block {i} is another")
            quantize_block(block, rounded, serving)

    @property
    def num_bytes(self) -> int:
        """Number of Linears whose activations have 8 bits."""
        return sum(rounded.bits == 8 for block in self.blocks for rounded in block.values())


def _widen(
    blocks: Sequence[Block], rounded: list[dict[str, Rounded]], measure: Callable[[], float], most: float
) -> None:
    """Give activations of some Linears 12 bits instead of 8, until the error is at most `most`.

    The errors of Linears are about independent, so their squares add. First come the Linears whose 8 bits cost most
    error for the time they save.
    """
    linears = [(i, name, linear_of(block, name)) for i, block in enumerate(blocks) for name in rounded[i]]
    eight = [each for each in linears if isinstance(each[2], Int8Linear) and each[2].bits == 8]
    if measure() <= most:
        return
    _set_bits(eight, rounded, 12)
    least, costs = measure() ** 2, []
    for each in eight:
        _set_bits([each], rounded, 8)
        costs.append(max(measure() ** 2 - least, 0.0))
        _set_bits([each], rounded, 12)
    order = sorted(range(len(eight)), key=lambda j: costs[j] / rounded[eight[j][0]][eight[j][1]].weight.numel())
    left, total = 0, least
    while left < len(order) and total + costs[order[left]] <= most**2:
        total += costs[order[left]]
        left += 1
    _set_bits([eight[j] for j in order[:left]], rounded, 8)
    while left and measure() > most:
        left -= 1
        _set_bits([eight[order[left]]], rounded, 12)


def _set_bits(linears: Sequence[tuple[int, str, Dense]], rounded: list[dict[str, Rounded]], bits: int) -> None:
    for i, name, linear in linears:
        assert isinstance(linear, Int8Linear)
        linear.bits = bits
        rounded[i][name] = rounded[i][name]._replace(bits=bits)


def relative_error(features: Tensor, exact: Tensor) -> float:
    """Return the mean over images of ‖f − e‖ / ‖e‖ of features f and exact ones e, both (N, D)."""
    features, exact = features.double(), exact.double()
    return float(((features - exact).norm(dim=1) / exact.norm(dim=1).clamp_min(1e-30)).mean())


def cached(fingerprint: str) -> Path:
    """The file in the user cache that holds a backbone's weights."""
    return cache_dir() / "int8" / f"{fingerprint}.safetensors"


def find_weights(backbone: FrozenViT, given: Int8Weights | str | os.PathLike[str] | None) -> Int8Weights:
    """Return the weights that an engine is given, else those in the user cache, and check that they can run.

    Raises:
        TypeError, ValueError: there are none, or they are not for this backbone or fail the gate, or the backbone is
            none that runs in int8. FileNotFoundError: no such file. RuntimeError: the C++ kernels are not built.
    """
    check_backbone(backbone)
    if reason := native.obstacle():
        raise RuntimeError(f"dtype 'int8' cannot run: {reason}")
    if given is None:
        path = cached(backbone.fingerprint)
        if not path.is_file():
            raise ArgumentError(
                "int8",
                "is required: this backbone has not been calibrated here; run "
                "fp.Int8Weights.calibrate(backbone, images).save() once",
            )
        given = Int8Weights.load(path)
    elif isinstance(given, (str, os.PathLike)):
        given = Int8Weights.load(given)
    if not isinstance(given, Int8Weights):
        raise ArgumentTypeError("int8", f"must be Int8Weights or a file of them, got {type(given).__name__}")
    if reason := given.fits(backbone):
        raise ArgumentError("int8", reason)
    return given


def check_backbone(backbone: FrozenViT) -> None:
    """Raise TypeError or ValueError if a backbone is none that runs in int8."""
    if not isinstance(backbone, FrozenViT):
        raise ArgumentTypeError("backbone", f"must be a FrozenViT, got {type(backbone).__name__}")
    if backbone.staged:
        raise ArgumentError("backbone", "must be a ViT: int8 is not defined for Swin transformers")
    if backbone.device.type != "cpu":
        raise ArgumentError("backbone", f"must be on the CPU, where int8 runs, it is on {backbone.device}")
    if any(p.requires_grad for p in backbone.parameters()):
        raise ArgumentError("backbone", "must be frozen: the weights of this one train")


def _features(backbone: FrozenViT, batches: Sequence[Tensor]) -> Tensor:
    model = PromptedViT(backbone, LinearProbeConfig()).eval()
    return torch.cat([model(images) for images in batches])


def _private(backbone: FrozenViT, dtype: torch.dtype = torch.float32) -> FrozenViT:
    copied = copy.deepcopy(backbone).requires_grad_(False).to(dtype)
    copied.set_copies("folded")
    copied.folded()
    copied.private = True
    return copied


def _blocks(backbone: FrozenViT) -> tuple[Block, ...]:
    parts = backbone.folded()
    if parts is None:
        raise ArgumentError("backbone", "must have tensors that were not made in inference mode")
    return parts.blocks


def _check_rounded(name: str, rounded: Rounded) -> None:
    if name not in LINEARS:
        raise ValueError(f"no Linear of a block is called {name!r}")
    weight, scale, factor, bits = rounded
    if weight.dtype != torch.int8 or weight.ndim != 2 or {scale.dtype, factor.dtype} != {torch.float32}:
        raise ValueError(f"{name} must be int8 with float32 scales and factors")
    if (*scale.shape, *factor.shape) != weight.shape or not torch.isfinite(torch.cat([scale, factor])).all():
        raise ValueError(f"{name} must have a finite scale for each output and a finite factor for each input")
    if bits not in BITS:
        raise ValueError(f"{name} must have activations of 8 or 12 bits, got {bits}")
