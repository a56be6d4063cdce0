"""Canonical tensors of a frozen vision transformer.

Every reader (`fastprompt/vit/readers/`) fills the same few containers, so each forward is written once. The
containers hold tensors and switches and compute nothing; `reference.py` computes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastprompt.vit.source import BackboneSource

if TYPE_CHECKING:
    from fastprompt.vit.folding import Folded

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": F.hardsigmoid,
    "hard_swish": F.hardswish,
    "identity": lambda x: x,
}


@overload
def frozen(tensor: Tensor) -> nn.Parameter: ...
@overload
def frozen(tensor: Tensor | None) -> nn.Parameter | None: ...
def frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """A detached copy of `tensor` that does not train."""
    return None if tensor is None else nn.Parameter(tensor.detach().clone(), requires_grad=False)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last axis: x̂ · weight + bias.

    `upcast` computes in float32 whatever the input's dtype (timm's `*Fp32` norms).
    """

    def __init__(
        self, kind: str, size: int, eps: float, weight: Tensor | None, bias: Tensor | None, upcast: bool = False
    ) -> None:
        super().__init__()
        if kind not in ("layernorm", "rmsnorm"):
            raise ValueError(f"kind must be 'layernorm' or 'rmsnorm', got {kind!r}")
        self.kind, self.size, self.eps, self.upcast = kind, size, eps, upcast
        self.weight, self.bias = frozen(weight), frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor | None = self.weight
        bias: Tensor | None = self.bias
        dtype = x.dtype
        if self.upcast and dtype in (torch.float16, torch.bfloat16):
            x = x.float()
            weight = weight.float() if weight is not None else None
            bias = bias.float() if bias is not None else None
        if self.kind == "layernorm":
            x = F.layer_norm(x, (self.size,), weight, bias, self.eps)
        else:
            x = F.rms_norm(x, (self.size,), weight, self.eps)
        return x.to(dtype)


class Dense(nn.Module):
    """A frozen Linear: weight (out, in), optional bias (out,)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = frozen(weight)
        self.bias = frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Mlp(nn.Module):
    """fc2(norm(gate(fc1 x))). `glu` says how fc1's output is gated.

    `glu`: "none" act(h); "first" act(h₁)·h₂ (SwiGLU); "last" h₁·act(h₂) (GLU), with h = [h₁, h₂].
    """

    def __init__(self, fc1: Dense, fc2: Dense, act: str, norm: Norm | None = None, glu: str = "none") -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = fc1, fc2, norm
        self.act, self.glu = act, glu


class Block(nn.Module):
    """One encoder block.

    `post_norm` False: x + ls1·attn(norm1(x)), then x + ls2·mlp(norm2(x)).
    `post_norm` True:  x + norm1(attn(x)), then x + norm2(mlp(x)) (timm's ResPostBlock).
    `qkv` stacks q, k, v; `q_norm`, `k_norm` act per head, `attn_norm` on the heads' joined output. `scale` multiplies
    the attention scores; None: 1/√d.
    """

    def __init__(
        self,
        *,
        norm1: Norm,
        qkv: Dense,
        proj: Dense,
        norm2: Norm,
        mlp: Mlp,
        num_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
        attn_norm: Norm | None = None,
        ls1: Tensor | None = None,
        ls2: Tensor | None = None,
        post_norm: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.qkv, self.proj, self.norm2, self.mlp = norm1, qkv, proj, norm2, mlp
        self.q_norm, self.k_norm, self.attn_norm = q_norm, k_norm, attn_norm
        self.ls1, self.ls2 = frozen(ls1), frozen(ls2)
        self.num_heads, self.post_norm = num_heads, post_norm
        self.head_dim = qkv.weight.shape[0] // (3 * num_heads)
        self.scale = self.head_dim**-0.5 if scale is None else scale


class MapPool(nn.Module):
    """Attention pooling with one learned query (timm's AttentionPoolLatent, SigLIP's head)."""

    def __init__(
        self,
        *,
        latent: Tensor,
        q: Dense | None,
        kv: Dense,
        proj: Dense,
        norm: Norm | None,
        mlp: Mlp,
        num_heads: int,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        super().__init__()
        self.latent = frozen(latent)
        self.q, self.kv, self.proj, self.norm, self.mlp = q, kv, proj, norm, mlp
        self.q_norm, self.k_norm, self.num_heads = q_norm, k_norm, num_heads


@dataclasses.dataclass(frozen=True)
class ViTSpec:
    """What a ViT's tensors do not say by themselves.

    Attributes:
        image_size: (height, width) in pixels the position embedding is for.
        grid: (rows, columns) of patches.
        pool: "cls", "patches" or "map": the readout of the model's own head.
        pos_on_prefix: the position embedding has rows for class and register tokens.
        pool_prefix: the model's own pooling also reads class and register tokens.
        dynamic_size: images of other sizes are taken and the position embedding is resampled.
        dynamic_pad: images are zero-padded to whole patches.
        antialias: how the model's library resamples the position embedding for images of other sizes.
    """

    name: str
    image_size: tuple[int, int]
    grid: tuple[int, int]
    patch_size: int
    num_heads: int
    has_cls: bool
    num_registers: int
    pool: str
    pos_on_prefix: bool = True
    pool_prefix: bool = False
    dynamic_size: bool = False
    dynamic_pad: bool = False
    antialias: bool = True
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def obstacle(self, height: int, width: int) -> str:
        """Why images of `height` x `width` pixels are not taken; empty: they are."""
        p = self.patch_size
        if not self.dynamic_size:
            if (height, width) != self.image_size:
                return (
                    f"images must be {self.image_size[0]} x {self.image_size[1]} pixels for this backbone, got "
                    f"{height} x {width}; resize them, or build the backbone with image_size="
                )
        elif not self.dynamic_pad and (height % p or width % p or not height or not width):
            return f"images must have sides that are multiples of the patch size {p}, got {height} x {width}"
        return ""


class _KeptFold(NamedTuple):
    """Folded blocks, the tensors they were made of, and the sum of their versions then."""

    tensors: tuple[nn.Parameter, ...]
    version: int
    folded: Folded


class FrozenViT(nn.Module):
    """A vision transformer whose weights are constants.

    `FrozenViT(module)` reads a model of timm, torchvision, open_clip or transformers and copies its tensors;
    `backbone(images)` is then that model's own forward. Models it cannot represent are refused with a `ValueError`
    that names the part. `image_size` resamples the position embedding once, by the rule of the module's library;
    `mean` and `std` override the ones the library gives. A Swin transformer becomes a `FrozenSwin`, a subclass.

    Images are (B, 3, H, W): floating point = already normalised, uint8 = raw pixels, normalised here with
    `mean` and `std` (never resized).

    Attributes:
        width: token width D. depth: number of blocks. num_heads: attention heads of a block.
        patch_size: pixels. grid: (rows, columns) of patches. image_size: (height, width) in pixels.
        num_prefix: class and register tokens. mean, std: per channel, of pixels in [0, 1].
        source: the call that loaded it by name, with published weights; None: it was made otherwise.
        fingerprint: sha256 of the tensors (in float32, without the classifier) and the structure.
    """

    source: BackboneSource | None = None

    def __new__(cls, module: nn.Module | None = None, **options: Any) -> FrozenViT:
        if cls is FrozenViT and module is not None:
            from fastprompt.vit.readers import is_swin

            if is_swin(module):
                from fastprompt.vit.swin import FrozenSwin

                return super().__new__(FrozenSwin)
        return super().__new__(cls)

    def __init__(
        self,
        module: nn.Module,
        *,
        image_size: int | tuple[int, int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        from fastprompt.vit.readers import read

        parts = read(module, image_size)
        spec: ViTSpec = parts.pop("spec")
        for key, value in (("mean", mean), ("std", std)):
            if value is not None:
                change: dict[str, Any] = {key: _channel_triple(key, value)}
                spec = dataclasses.replace(spec, **change)
        self.spec = spec
        self._take(parts)
        if parts:
            raise ValueError(f"the reader returned unknown parts: {sorted(parts)}")
        self._fingerprint: str | None = None
        self._folded: _KeptFold | None = None
        self.register_load_state_dict_post_hook(_fold_again)
        self.eval()

    def _take(self, parts: dict[str, Any]) -> None:
        """Make the reader's parts this module's."""
        self.patch_weight: nn.Parameter = frozen(parts.pop("patch_weight"))  # (D, 3, p, p)
        self.patch_bias: nn.Parameter | None = frozen(parts.pop("patch_bias"))
        self.patch_norm: Norm | None = parts.pop("patch_norm", None)
        self.cls_token: nn.Parameter | None = frozen(parts.pop("cls_token"))  # (1, 1, D)
        self.registers: nn.Parameter | None = frozen(parts.pop("registers"))  # (1, R, D)
        self.pos_embed: nn.Parameter | None = frozen(parts.pop("pos_embed"))  # (1, [prefix +] patches, D)
        self.norm_pre: Norm | None = parts.pop("norm_pre", None)
        self.blocks = cast("Sequence[Block]", nn.ModuleList(parts.pop("blocks")))
        self.norm: Norm | None = parts.pop("norm", None)
        self.map_pool: MapPool | None = parts.pop("map_pool", None)
        self.fc_norm: Norm | None = parts.pop("fc_norm", None)
        self.head: Dense | None = parts.pop("head", None)

    @classmethod
    def from_timm(
        cls, name: str, pretrained: bool = False, image_size: int | tuple[int, int] | None = None, **kwargs: Any
    ) -> FrozenViT:
        """Build a timm model by name and freeze it.

        Args:
            name: a timm model name of `timm.models.vision_transformer`, `swin_transformer` or `swin_transformer_v2`.
            pretrained: load the published weights from the hub.
            image_size: pixels (or (height, width)); the position embedding is resampled by timm.
            kwargs: passed to `timm.create_model`.

        Raises:
            TypeError, ValueError: `name` is no timm model, `image_size` no size, or the model has a part that cannot
                be represented.
        """
        import timm

        from fastprompt.vit.readers import image_sides

        if not isinstance(name, str):
            raise TypeError(
                f"name must be a timm model name, got {type(name).__name__}; a timm module goes to FrozenViT(module)"
            )
        if ":" not in name and not timm.is_model(name.partition(".")[0]):
            raise ValueError(f"name must be a timm model name, got {name!r}; timm.list_models() lists them")
        sized = kwargs if image_sides(image_size) is None else {**kwargs, "img_size": image_size}
        try:
            model = timm.create_model(name, pretrained=pretrained, **sized)
        except TypeError as error:
            raise ValueError(f"timm does not build {name!r} with {sized}: {error}") from error
        backbone = cls(model)
        backbone.source = BackboneSource.of_call("timm", name, pretrained, image_size, kwargs)
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
            pretrained: load the default published weights, or those of this name ("IMAGENET1K_SWAG_E2E_V1").
            image_size: pixels (or (height, width)); the position embedding is resampled as torchvision does.
            mean, std: per channel; None: ImageNet's.
            kwargs: passed to `torchvision.models.get_model`.

        Raises:
            TypeError, ValueError: an argument does not fit, or the model has a part that cannot be represented.
        """
        from fastprompt.vit.readers import image_sides, torchvision

        image_sides(image_size)
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
        """Build an open_clip model by name and freeze its image tower; its projection is `head`.

        Args:
            model: one of `open_clip.list_models()`, "hf-hub:...", "local-dir:...", a model or an image tower.
            pretrained: a tag of published weights ("openai", "laion2b_s34b_b88k") or a file; None: random weights.
            image_size: pixels (or (height, width)); the position embedding is resampled as open_clip does.
            mean, std: per channel; None: those that come with the weights, else CLIP's.
            kwargs: passed to `open_clip.create_model`.

        Raises:
            ImportError: open_clip is not installed.
            TypeError, ValueError: an argument does not fit, or the model has a part that cannot be represented.
        """
        from fastprompt.vit.readers import image_sides

        image_sides(image_size)
        if isinstance(model, nn.Module):
            if pretrained is not None or kwargs:
                raise ValueError(f"pretrained must be None for a model that is built, got {pretrained!r}, {kwargs}")
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
        """Freeze the vision model of a transformers checkpoint: ViT, CLIP, SigLIP or DINOv2.

        Args:
            model: a hub name, a folder of `save_pretrained`, a config (random weights), or a model.
            pretrained: of a name or folder: load its weights; False: random ones.
            image_size: pixels (or (height, width)); the position embedding is resampled as transformers does.
            mean, std: per channel; None: those of the checkpoint's image processor, else the model family's.
            kwargs: passed to `from_pretrained` (revision, cache_dir, local_files_only, ...).

        Raises:
            ImportError: transformers is not installed.
            OSError: there is no such checkpoint, or the hub cannot be reached.
            TypeError, ValueError: an argument does not fit, or the model has a part that cannot be represented.
        """
        from fastprompt.vit.readers import image_sides

        image_sides(image_size)
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

    def _named(self, name: str) -> FrozenViT:
        self.spec = dataclasses.replace(self.spec, name=name)
        return self

    @property
    def width(self) -> int:
        return self.patch_weight.shape[0]

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def num_heads(self) -> int:
        return self.spec.num_heads

    @property
    def patch_size(self) -> int:
        return self.spec.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        return self.spec.grid

    @property
    def feature_width(self) -> int:
        """Width of the features that a head reads."""
        return self.width

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
    def mean(self) -> tuple[float, float, float]:
        return self.spec.mean

    @property
    def std(self) -> tuple[float, float, float]:
        return self.spec.std

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_weight.device

    @property
    def fingerprint(self) -> str:
        """sha256 over structure and float32 tensors; the classifier is left out, since adapters rarely read it."""
        if self._fingerprint is None:
            structure = dataclasses.asdict(self.spec)
            for key in ("name", "mean", "std", "antialias"):  # an image of the backbone's own size depends on none
                del structure[key]
            structure["blocks"] = [(b.mlp.act, b.mlp.glu, b.post_norm, b.norm1.kind, b.norm1.eps) for b in self.blocks]
            structure |= self._structure()
            digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
            for name, tensor in sorted(self.state_dict().items()):
                if not name.startswith("head."):
                    digest.update(f"{name}{tuple(tensor.shape)}".encode())
                    digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _structure(self) -> dict[str, Any]:
        """What else the fingerprint depends on."""
        return {}

    def pin_fingerprint(self) -> None:
        """Compute the fingerprint now, before the tensors are cast or trained."""
        if not self.device.type == "meta":
            self.fingerprint  # noqa: B018

    def folded(self) -> Folded | None:
        """The blocks with their constants folded; None while the weights train.

        Made at the first call and again when tensors were cast, moved, loaded or changed in place. A write through
        `.data` and a parameter that is replaced go unnoticed; inside `torch.compile`, so does a change in place.
        """
        if torch.compiler.is_compiling():
            return None if self._folded is None else self._folded.folded
        known = self._folded
        if (
            known is None
            or known.version != sum(p._version for p in known.tensors)
            or any(p.requires_grad for p in known.tensors)
        ):
            self._folded = known = self._fold()
        return None if known is None else known.folded

    def _fold(self) -> _KeptFold | None:
        from fastprompt.vit.folding import fold_backbone

        tensors = tuple(self.parameters())
        if any(p.requires_grad for p in tensors) or self.device.type == "meta":
            return None
        tensors = tuple(p for p in tensors if not p.is_inference())  # others have no version, and cannot change
        with torch.inference_mode(False), torch.no_grad():
            return _KeptFold(tensors, sum(p._version for p in tensors), fold_backbone(self))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenViT:
        if fn(torch.empty(0, dtype=self.dtype, device=self.device)).dtype != self.dtype:
            self.pin_fingerprint()
        super()._apply(fn, recurse)
        if self._folded is not None:
            self._folded = None
            self.folded()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if not any(p.requires_grad for p in self.parameters()):  # a fine-tuned copy stays that of its original
            given = ((tensor, state_dict.get(prefix + name)) for name, tensor in self.state_dict().items())
            if self.device.type == "meta" or any(
                isinstance(new, Tensor) and not torch.equal(new.to(old), old) for old, new in given
            ):
                self._fingerprint = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> FrozenViT:
        """A frozen backbone has no training mode: it stays in eval mode whatever `mode` is."""
        return super().train(False)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) → (x / 255 − mean) / std; floating-point images pass unchanged."""
        if images.dtype != torch.uint8:
            return images
        dtype = torch.promote_types(self.dtype, torch.float32)
        mean, std = per_channel(self.mean, images, dtype), per_channel(self.std, images, dtype)
        return (images.to(dtype) / 255 - mean) / std

    def check_images(self, images: Tensor) -> None:
        """Raise TypeError or ValueError, naming `images`, where this backbone cannot take them."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(images).__name__}")
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(f"images must be floating point (normalised) or uint8 (raw pixels), got {images.dtype}")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if images.device != self.device:
            raise ValueError(f"images are on {images.device}, the backbone is on {self.device}")
        reason = self.spec.obstacle(images.shape[2], images.shape[3])
        if reason:
            raise ValueError(reason)
        if (
            images.device.type == "cpu"
            and images.is_floating_point()
            and not torch.compiler.is_compiling()
            and not math.isfinite(images.detach().sum().item())  # one pass; a sum of finite numbers can overflow
            and not torch.isfinite(images).all()
        ):
            raise ValueError("images contain NaN or infinite values")

    def any_size(self) -> FrozenViT:
        """The same backbone, on the same tensors, for images of any whole number of patches.

        Its position embedding is resampled to the images' grid, by its library's rule. A host of pictures that
        are taller than its own images (`RGBPGNConfig` with placement "extend") is one. It has the same fingerprint, so
        the same adapters fit.
        """
        self.pin_fingerprint()
        other = copy.copy(self)
        other.spec = dataclasses.replace(self.spec, dynamic_size=True)
        return other

    def forward(self, images: Tensor) -> Tensor:
        """The model's own forward without prompts.

        Args:
            images: (B, 3, H, W), float (normalised) or uint8.

        Returns:
            (B, C) outputs of the pretrained classifier or projection, or (B, D) features when it has none.
        """
        features = self.forward_features(images)
        return features if self.head is None else self.head(features)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, D): the readout of the model's own head, before the classifier."""
        from fastprompt.vit import reference

        self.check_images(images)
        sequence = reference.encode(self, self.normalise(images).to(self.dtype))
        return reference.read_out(self, sequence, self.spec.pool)

    def extra_repr(self) -> str:
        return (
            f"{self.spec.name}, width={self.width}, depth={self.depth}, heads={self.num_heads}, "
            f"patch={self.patch_size}, grid={self.grid}"
        )


def _fold_again(vit: FrozenViT, keys: Any) -> None:
    """A compiled model reads the folded blocks and cannot see that they are out of date.

    With `assign=True` the backbone has other tensors than they were made of, so that no version tells.
    """
    if vit._folded is not None:
        vit._folded = None
        vit.folded()


def per_channel(values: tuple[float, float, float], images: Tensor, dtype: torch.dtype) -> Tensor:
    """(3, 1, 1) beside the images, filled there: a CUDA graph cannot capture a copy from the host."""
    return torch.cat([images.new_full((1, 1, 1), value, dtype=dtype) for value in values])


def _require(library: str, extra: str) -> None:
    if importlib.util.find_spec(library) is None:
        raise ImportError(f"{library} is not installed: pip install 'fastprompt[{extra}]'")


def _channel_triple(name: str, value: Sequence[float]) -> tuple[float, float, float]:
    try:
        triple = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        triple = ()
    if len(triple) != 3 or not all(map(math.isfinite, triple)) or (name == "std" and min(triple) <= 0):
        raise ValueError(f"{name} must be three {'positive ' if name == 'std' else ''}numbers, got {value!r}")
    return triple
