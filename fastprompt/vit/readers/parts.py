"""Convert torch's own layers to canonical parts; shared by the readers of torchvision, open_clip and transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import Tensor

from fastprompt.vit.weights import Dense, Norm, RelativeBias

IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
CLIP: dict[str, Any] = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

_ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.ELU: "elu",
    nn.CELU: "celu",
    nn.SELU: "selu",
    nn.Mish: "mish",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hard_sigmoid",
    nn.Hardswish: "hard_swish",
    nn.Identity: "identity",
}


def refuse(part: str, got: str, takes: str) -> NoReturn:
    """Raise the ValueError for a model that cannot be represented; it names the part."""
    raise ValueError(f"this model cannot be frozen: {part} is {got}; supported: {takes}")


def loaded_as(*tensors: Tensor, **rule: Any) -> str:
    """Return what a fingerprint hashes for a tensor that was computed from `tensors` by `rule`.

    The computed tensor's last bits differ between processors; the loaded ones are the same everywhere.
    """
    digest = hashlib.sha256(repr(sorted(rule.items())).encode())
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        if tensor.device.type == "meta":  # a structure without values
            continue
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def patch_size(conv: Any) -> int:
    """Return the side in pixels of a patch embedding's patches."""
    if type(conv) is not nn.Conv2d:
        refuse("patch embedding", type(conv).__name__, "one Conv2d")
    size = tuple(conv.kernel_size)
    if (
        size[0] != size[1]
        or tuple(conv.stride) != size
        or conv.padding not in ((0, 0), "valid")
        or tuple(conv.dilation) != (1, 1)
        or conv.groups != 1
    ):
        refuse("patch embedding", f"{conv}", "square patches that do not overlap")
    return int(size[0])


def layer_norm(module: Any, upcast: bool = False) -> Norm:
    """Convert a LayerNorm; the caller has checked its class."""
    return Norm("layernorm", module.normalized_shape[0], module.eps, module.weight, module.bias, upcast=upcast)


def torch_norm(module: Any) -> Norm:
    """Convert torch's LayerNorm or RMSNorm."""
    if type(module) is nn.LayerNorm:
        return layer_norm(module)
    if type(module) is nn.RMSNorm:
        dtype = torch.float32 if module.weight is None else module.weight.dtype
        eps = torch.finfo(dtype).eps if module.eps is None else module.eps
        return Norm("rmsnorm", module.normalized_shape[0], eps, module.weight, None)
    refuse("norm layer", type(module).__name__, "LayerNorm, RMSNorm")


def dense(module: Any) -> Dense:
    """Convert torch's Linear."""
    if type(module) is not nn.Linear:
        refuse("linear layer", type(module).__name__, "nn.Linear")
    return Dense(module.weight, module.bias)


def stacked(*modules: Any) -> Dense:
    """Stack Linears that share one input into one, in order. Those without a bias get one of 0 if others have one."""
    parts = [dense(module) for module in modules]
    weights: list[Tensor] = [part.weight for part in parts]
    if all(part.bias is None for part in parts):
        return Dense(torch.cat(weights), None)
    biases = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
    return Dense(torch.cat(weights), torch.cat(biases))


def relative_bias(*tables: Tensor, grid: tuple[int, int]) -> RelativeBias:
    """Convert BEiT's tables (places [+ 3], H), of which several add up; the last 3 rows are the class token's."""
    rows, columns = 2 * grid[0] - 1, 2 * grid[1] - 1
    table = torch.stack(tables).sum(dim=0)
    patches, prefix = table.split([rows * columns, len(table) - rows * columns])
    return RelativeBias(patches.t().unflatten(1, (rows, columns)), prefix.t() if len(prefix) else None)


def halves(
    qkv: Dense, num_heads: int, q_norm: Norm | None, k_norm: Norm | None
) -> tuple[Dense, Norm | None, Norm | None]:
    """Reorder the channels of queries and keys, and of their norms: each head's even channels, then its odd ones.

    A rotation of neighbouring channels then rotates channels i and i + d / 2, as `Rotary` does.
    """

    def reordered(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        parts = rows.unflatten(0, (3, num_heads, -1, 2))  # (3, heads, pairs, 2, ...)
        q_and_k = parts[:2].transpose(2, 3)
        return torch.cat([q_and_k.reshape(-1, *rows.shape[1:]), parts[2].flatten(0, 2)])

    def of(norm: Norm | None) -> Norm | None:
        if norm is None:
            return None
        weight, bias = (None if x is None else torch.cat([x[::2], x[1::2]]) for x in (norm.weight, norm.bias))
        return Norm(norm.kind, norm.size, norm.eps, weight, bias, norm.upcast)

    weight = reordered(qkv.weight)
    assert weight is not None
    return Dense(weight, reordered(qkv.bias)), of(q_norm), of(k_norm)


def classifier(module: Any) -> Dense | None:
    """Convert a Linear, or return None for an Identity."""
    return None if isinstance(module, nn.Identity) else dense(module)


def activation(module: Any, more: Mapping[type[nn.Module], str] = MappingProxyType({})) -> str:
    """Return the canonical name of an activation layer: one of torch's, or of `more`."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    known = {**_ACTIVATIONS, **more}
    name = known.get(type(module))
    if (
        name is None
        or (name == "leaky_relu" and module.negative_slope != 0.01)
        or (name in ("elu", "celu") and module.alpha != 1.0)
    ):
        refuse("activation", repr(module), ", ".join(sorted({"gelu", "gelu_tanh", *known.values()})))
    return name


def attention(module: Any) -> dict[str, Any]:
    """Return qkv, proj and num_heads of torch's MultiheadAttention."""
    if type(module) is not nn.MultiheadAttention:
        refuse("attention layer", type(module).__name__, "MultiheadAttention")
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        refuse("attention layer", "MultiheadAttention with other keys and values", "self-attention without extra keys")
    return {
        "qkv": Dense(module.in_proj_weight, module.in_proj_bias),
        "num_heads": module.num_heads,
        "proj": Dense(module.out_proj.weight, module.out_proj.bias),
    }
