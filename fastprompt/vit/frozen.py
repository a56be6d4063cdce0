"""`FrozenViT`: a library's model, read once and frozen. It carries the functions that compute with it as `graph`."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.kept import Kept
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.graph import SWIN, VIT, Graph
from fastprompt.vit.readers import image_sides, is_swin, read
from fastprompt.vit.reference import Sequence as Tokens
from fastprompt.vit.source import BackboneSource
from fastprompt.vit.swin import Pair, SwinBlock
from fastprompt.vit.weights import Folded

COPIES = ("none", "folded", "packed")
"""What `FrozenViT.set_copies` takes."""


class FrozenViT(Backbone):
    """A vision transformer whose weights are constants.

    `FrozenViT(module)` reads a model of timm, torchvision, open_clip or transformers and copies its tensors.
    `backbone(images)` then equals that model's own forward. A model that cannot be represented raises a `ValueError`
    that names the part. `image_size` resamples the position embedding once, by the rule of the module's library.
    `mean` and `std` override the library's. A Swin transformer becomes a `FrozenSwin`, a subclass.

    Images are (B, C, H, W). Floating-point images are already normalised; uint8 images are raw pixels, which are
    normalised here with `mean` and `std` (never resized). C is 3, or what the module was built for (`in_chans=1`);
    libraries know `mean` and `std` of RGB alone, so they are 0 and 1 for other channels unless they are given.

    Attributes:
        width: token width D. depth: number of blocks. num_heads: attention heads of a block.
        patch_size: pixels. grid: (rows, columns) of patches. image_size: (height, width) in pixels.
        channels: C. num_prefix: class and register tokens. mean, std: per channel, of pixels in [0, 1].
        source: the call that loaded it by name with published weights; None if it was made in another way.
        fingerprint: sha256 of the structure, of the tensors as loaded (in float32, without the classifier, before any
            resampling) and of the resampling rule.
    """

    graph: ClassVar[Graph] = VIT
    source: BackboneSource | None = None

    def __new__(cls, module: nn.Module | None = None, **options: Any) -> FrozenViT:
        return super().__new__(FrozenSwin if cls is FrozenViT and is_swin(module) else cls)

    def __init__(
        self,
        module: nn.Module,
        *,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        with torch.inference_mode(False):  # PyTorch does not track changes of tensors created in inference mode
            parts = read(module, image_size)
            pixels = check_pixels(mean, std, len(parts["spec"].mean))
            parts["spec"] = dataclasses.replace(parts["spec"], **pixels)
            super().__init__(parts)
        self.register_load_state_dict_post_hook(_fold_again)

    @classmethod
    def from_timm(
        cls,
        name: str,
        pretrained: bool = False,
        image_size: int | tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> FrozenViT:
        """Build a timm model by name and freeze it.

        Args:
            name: a timm model name of `timm.models.vision_transformer`, `vision_transformer_relpos`, `deit`, `beit`,
                `eva`, `naflexvit`, `swin_transformer` or `swin_transformer_v2`.
            pretrained: load the published weights from the hub.
            image_size: pixels (or (height, width)); the position embedding is resampled by timm.
            mean, std: per channel; None: those that come with timm's weights.
            kwargs: passed to `timm.create_model`.

        Raises:
            TypeError, ValueError: `name` is not a timm model, `image_size` is not a size, or a part of the model
                cannot be represented.
        """
        import timm

        if not isinstance(name, str):
            raise ArgumentTypeError(
                "name", f"must be a timm model name, got {type(name).__name__}; a timm module goes to FrozenViT(module)"
            )
        if ":" not in name and not timm.is_model(name.partition(".")[0]):
            raise ArgumentError("name", f"must be a timm model name, got {name!r}; timm.list_models() lists them")
        check_pixels(mean, std, kwargs.get("in_chans", 3))
        sized = kwargs if image_sides(image_size) is None else {**kwargs, "img_size": image_size}
        try:
            model = timm.create_model(name, pretrained=pretrained, **sized)
        except TypeError as error:
            raise ValueError(f"timm does not build {name!r} with {sized}: {error}") from error
        # a NaFlexVit is not built for a size
        backbone = cls(model, image_size=None if is_swin(model) else image_size, mean=mean, std=std)
        options = {**kwargs, "mean": mean, "std": std}
        backbone.source = BackboneSource.of_call("timm", name, pretrained, image_size, options)
        return backbone

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        arch: str,
        image_size: int | tuple[int, int] | None = None,
        *,
        checkpoint_key: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> FrozenViT:
        """Freeze timm's model `arch` with the weights of a file as its authors publish it.

        Layouts: timm's own; MAE (pre-trained or fine-tuned), MoCo-v3 (encoder or linear), DINO (backbone or full
        checkpoint), DINOv2, CLIP, Swin, and Google's JAX `.npz`. Wrappers ("model", "state_dict", averaged weights)
        and prefixes ("module.", "backbone.", "base_encoder.") are stripped. A linear classifier becomes `head`.
        Decoders, projection heads and mask tokens are skipped, with a line in the log. All other tensors must fit.

        A file may have `norm` but no `fc_norm`, as MAE's pre-trained ones do. With `global_pool="avg"`, the norm after
        the mean is then a new one (weight 1, bias 0) and `norm` is skipped, as in the code of MAE, VPT and VAPT. A file
        with only `fc_norm` is read with `global_pool="avg"`.

        Args:
            path: a `.safetensors`, `.npz` or `torch.save` file; no code in it is run (`weights_only=True`).
            arch: a timm model name, "vit_base_patch16_224".
            image_size: pixels (or (height, width)); None: the size in the name of `arch`. A position embedding for
                another size is resampled as timm does: bicubic with antialiasing.
            checkpoint_key: which of several networks to read ("student", "momentum_encoder", "model"); None: averaged
                weights and teachers first, and MoCo-v3's base encoder.
            mean, std: per channel; None: those of timm's `arch`, which may differ from those of the file's authors.
            kwargs: passed to `timm.create_model`.

        Raises:
            FileNotFoundError: no such file.
            TypeError, ValueError: an argument is invalid, the file cannot be read, or it does not fit `arch`. The
                error names tensors that are missing or have no counterpart.
        """
        sides = image_sides(image_size)
        check_pixels(mean, std)
        from fastprompt.vit import checkpoints

        module, own = checkpoints.build(path, arch, sides, checkpoint_key, kwargs)
        backbone = cls(module, image_size=None if is_swin(module) else own, mean=mean, std=std)
        options = {**kwargs, "arch": arch, "checkpoint_key": checkpoint_key, "mean": mean, "std": std}
        backbone.source = BackboneSource.of_call("checkpoint", path, True, image_size, options)
        return backbone

    @classmethod
    def from_torchvision(
        cls,
        name: str,
        pretrained: bool | str = False,
        image_size: int | tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> FrozenViT:
        """Build a torchvision model by name and freeze it.

        Args:
            name: "vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32" or "vit_h_14".
            pretrained: load the default published weights, or those with this name ("IMAGENET1K_SWAG_E2E_V1").
            image_size: pixels (or (height, width)); the position embedding is resampled as torchvision does.
            mean, std: per channel; None: ImageNet's.
            kwargs: passed to `torchvision.models.get_model`.

        Raises:
            TypeError, ValueError: an argument is invalid, or a part of the model cannot be represented.
        """
        from fastprompt.vit.readers import torchvision

        image_sides(image_size)
        check_pixels(mean, std)
        module = torchvision.build(name, pretrained, **kwargs)
        backbone = cls(module, image_size=image_size, mean=mean, std=std)._named(name)
        options = {**kwargs, "mean": mean, "std": std}
        backbone.source = BackboneSource.of_call("torchvision", name, pretrained, image_size, options)
        return backbone

    @classmethod
    def from_open_clip(
        cls,
        model: str | nn.Module,
        pretrained: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> FrozenViT:
        """Build an open_clip model by name and freeze its image tower. The projection becomes `head`.

        Args:
            model: one of `open_clip.list_models()`, "hf-hub:...", "local-dir:...", a model or an image tower.
            pretrained: a tag of published weights ("openai", "laion2b_s34b_b88k") or a file; None: random weights.
            image_size: pixels (or (height, width)); the position embedding is resampled as open_clip does.
            mean, std: per channel; None: those that come with the weights, else CLIP's.
            kwargs: passed to `open_clip.create_model`.

        Raises:
            ImportError: open_clip is not installed.
            TypeError, ValueError: an argument is invalid, or a part of the model cannot be represented.
        """
        image_sides(image_size)
        check_pixels(mean, std)
        if isinstance(model, nn.Module):
            if pretrained is not None or kwargs:
                raise ArgumentError(
                    "pretrained", f"must be None for a model that is built, got {pretrained!r}, {kwargs}"
                )
            return cls(model, image_size=image_size, mean=mean, std=std)
        _require("open_clip", "openclip")
        from fastprompt.vit.readers import open_clip

        module = open_clip.build(model, pretrained, **kwargs)
        backbone = cls(module, image_size=image_size, mean=mean, std=std)._named(model)
        options = {**kwargs, "mean": mean, "std": std}
        backbone.source = BackboneSource.of_call("open_clip", model, pretrained, image_size, options)
        return backbone

    @classmethod
    def from_transformers(
        cls,
        model: Any,
        pretrained: bool = True,
        image_size: int | tuple[int, int] | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> FrozenViT:
        """Freeze the vision model of a transformers checkpoint.

        It is a ViT, DeiT, ViT-MAE, BEiT, CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3.

        Args:
            model: a hub name, a folder of `save_pretrained`, a config (random weights), or a model.
            pretrained: for a name or folder, load its weights; False: random ones.
            image_size: pixels (or (height, width)); the position embedding is resampled as transformers does.
            mean, std: per channel; None: those of the checkpoint's image processor, else the model family's.
            kwargs: passed to `from_pretrained` (revision, cache_dir, local_files_only, ...).

        Raises:
            ImportError: transformers is not installed.
            OSError: there is no such checkpoint, or the hub cannot be reached.
            TypeError, ValueError: an argument is invalid, or a part of the model cannot be represented.
        """
        image_sides(image_size)
        check_pixels(mean, std)
        if isinstance(model, nn.Module):
            if kwargs:
                raise ValueError(f"a model takes no options of from_pretrained, got {sorted(kwargs)}")
            return cls(model, image_size=image_size, mean=mean, std=std)
        _require("transformers", "hf")
        from fastprompt.vit.readers import transformers

        module, known = transformers.build(model, pretrained, **kwargs)
        backbone = cls(
            module,
            image_size=image_size,
            mean=known.get("mean") if mean is None else mean,
            std=known.get("std") if std is None else std,
        )
        options = {**kwargs, "mean": mean, "std": std}
        backbone.source = BackboneSource.of_call("transformers", model, pretrained, image_size, options)
        return backbone

    def normalising_by(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> FrozenViT:
        """Return the same backbone with another `mean` and `std` for raw (uint8) pixels.

        It shares this backbone's tensors. The fingerprint is unchanged, so the same adapters fit. None keeps
        this backbone's value.

        Raises:
            ValueError: `mean` or `std` is not one number for each channel.
        """
        spec = dataclasses.replace(self.spec, **check_pixels(mean, std, self.channels))
        if spec == self.spec:
            return self
        self.pin_fingerprint()
        other = copy.copy(self)
        other.spec, other.kept_fold = spec, Kept()  # mean and std are folded into the patch embedding
        if self.source is not None:
            options = {**self.source.options, "mean": list(spec.mean), "std": list(spec.std)}
            other.source = dataclasses.replace(self.source, options=options)
        return other

    def _named(self, name: str) -> FrozenViT:
        self.spec = dataclasses.replace(self.spec, name=name)
        return self

    @property
    def width(self) -> int | tuple[int, ...]:
        return self.feature_width

    @property
    def depth(self) -> int | tuple[int, ...]:
        return len(self.blocks)

    @property
    def num_heads(self) -> int | tuple[int, ...]:
        return self.spec.num_heads

    @property
    def grid(self) -> Pair | tuple[Pair, ...]:
        return self.spec.grid

    def folded(self) -> Folded | None:
        """The blocks with their constants folded; None while the weights train, and for a Swin transformer.

        They are computed at the first call, and again after tensors were cast, moved, loaded, replaced or changed in
        place. On a CPU, a write through `.data` is detected if it changes the whole tensor or a contiguous sixteenth of
        its rows or columns. After any other write through `.data`, or on a GPU, call `refold`. Inside `torch.compile`
        the blocks are those of the last call outside it.
        """
        return self.graph.rewritten.folded(self)

    def set_copies(self, kind: str) -> None:
        """Choose what is copied of the frozen blocks' weights, for all models on this backbone.

        Outputs and gradients are equal up to rounding. Engines and exports have copies of their own.

        Args:
            kind: "folded", the default: constants move into copies of half of the weights, or of all with LayerScale.
                "none": nothing is folded into weights. A training step takes the least memory and a few per cent more
                time. "packed": on a CPU folded, and also laid out for oneDNN's products, forward and backward, where
                that library is used. A step is the fastest and takes the memory of the weights twice more. A Swin
                transformer has no copies.

        Raises:
            ValueError: `kind` is none of these.
        """
        if kind not in COPIES:
            raise ArgumentError("kind", f"must be one of {COPIES}, got {kind!r}")
        self.copies = kind
        self._fold_again()

    def refold(self) -> None:
        """Fold the constants again, whether or not a change was detected."""
        self._fold_again()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenViT:
        super()._apply(fn, recurse)
        self._fold_again()
        return self

    def _fold_again(self) -> None:
        """Fold again now if folded blocks exist: a compiled model reads them and cannot see that they are stale."""
        if self.kept_fold.value is not None:
            self.kept_fold.clear()
            self.folded()

    def forward(self, images: Tensor) -> Tensor:
        """Run the model's own forward without prompts.

        Args:
            images: (B, C, H, W), float (normalised) or uint8.

        Returns:
            (B, C) outputs of the pretrained classifier or projection, or (B, D) features when it has none.
        """
        sequence = self._sequence(images)
        if self.head is not None and self.head_dist is not None:
            return (self.head(sequence.tokens[:, 0]) + self.head_dist(sequence.tokens[:, 1])) / 2
        features = self.graph.papers.read_out(self, sequence, self.spec.pool)
        return features if self.head is None else self.head(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """Compute (B, D): the input of the model's own classifier; for a distilled DeiT the mean of its two inputs."""
        return self.graph.papers.read_out(self, self._sequence(images), self.spec.pool)

    def _sequence(self, images: Tensor) -> Tokens:
        """Run images through all blocks."""
        self.check_images(images)
        return self.graph.papers.encode(self, self.normalise(images).to(self.dtype))

    def extra_repr(self) -> str:
        return (
            f"{self.spec.name}, width={self.width}, depth={self.depth}, heads={self.num_heads}, "
            f"patch={self.patch_size}, grid={self.grid}"
        )


class FrozenSwin(FrozenViT):
    """A Swin transformer whose weights are constants; `FrozenViT(module)` returns it for timm's `swin_*`, `swinv2_*`.

    `width`, `depth`, `num_heads` and `grid` are tuples with one entry per stage. There is no class token: the
    model's own head reads the mean over patches. timm's continuous position bias (v2) is read as the table it yields.
    """

    graph: ClassVar[Graph] = SWIN

    def __init__(self, module: nn.Module, **options: Any) -> None:
        if isinstance(module, nn.Module) and not is_swin(module):
            raise ArgumentError(
                "module",
                f"must be a Swin transformer for FrozenSwin, got {type(module).__name__}; "
                "FrozenViT(module) takes either kind",
            )
        super().__init__(module, **options)

    @property
    def width(self) -> tuple[int, ...]:
        return tuple(width for width, _ in self.stage_sizes)

    @property
    def depth(self) -> tuple[int, ...]:
        return tuple(depth for _, depth in self.stage_sizes)

    @property
    def num_heads(self) -> tuple[int, ...]:
        return tuple(block.num_heads for block in self._first_blocks())

    @property
    def grid(self) -> tuple[Pair, ...]:
        return tuple(block.grid for block in self._first_blocks())

    def _first_blocks(self) -> list[SwinBlock]:
        """The first block of each stage."""
        stages = self.stages
        return [cast(SwinBlock, self.blocks[stages.index(stage)]) for stage in range(len(self.stage_sizes))]


def _fold_again(vit: FrozenViT, keys: Any) -> None:
    """Fold again after `load_state_dict`: with `assign=True` the folded tensors are no longer the backbone's."""
    vit._fold_again()


def _require(library: str, extra: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{library} is not installed: pip install 'fastprompt[{extra}]'")


def check_pixels(mean: Sequence[float] | None, std: Sequence[float] | None, channels: int = 3) -> dict[str, Any]:
    """Return the given fields of a `ViTSpec`; raise ValueError if one is not a number for each channel."""
    given = {"mean": mean, "std": std}
    return {name: _of_channels(name, value, channels) for name, value in given.items() if value is not None}


def _of_channels(name: str, value: Sequence[float], channels: int) -> tuple[float, ...]:
    try:
        values = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        values = ()
    if len(values) != channels or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        count, positive = "three" if channels == 3 else str(channels), "positive " if name == "std" else ""
        raise ArgumentError(name, f"must be {count} {positive}numbers, got {value!r}")
    return values
