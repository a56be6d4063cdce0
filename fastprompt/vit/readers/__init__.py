"""Readers turn a library's model into the canonical parts of `FrozenViT`; one file per library.

`timm.py` (with `eva.py`, `beit.py`, `naflex.py` and `timm_layers.py`, and `swin.py` for Swin), `torchvision.py`,
`open_clip.py` and `transformers.py` each import their library, and each is imported only when a model of that library
is read. `parts.py` reads the layers they share: torch's own.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentTypeError

LIBRARIES = ("timm", "open_clip", "transformers", "torchvision")


def read(module: nn.Module, image_size: int | tuple[int, int] | None = None) -> dict[str, Any]:
    """Read the canonical parts of `module` with the reader of the library it comes from.

    Args:
        image_size: pixels, or (height, width), if they differ from the module's. The position embedding is resampled
            once, by the rule of the module's library.

    Raises:
        TypeError: `module` is not an `nn.Module`.
        ValueError: no reader knows this class, a part of it cannot be represented, or `image_size` does not fit.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError("module", f"must be a torch.nn.Module, got {type(module).__name__}")
    sides = image_sides(image_size)
    if is_swin(module):
        return dict(importlib.import_module("fastprompt.vit.readers.swin").read(module, sides))
    names = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    for library in LIBRARIES:
        if library in names:
            parts = importlib.import_module(f"fastprompt.vit.readers.{library}").read(module)
            break
    else:
        library = type(module).__module__.partition(".")[0]
        raise ValueError(
            f"module of class {type(module).__name__} (library {library!r}) is not supported; vision "
            f"transformers of {', '.join(LIBRARIES)} are"
        )
    rule = parts.pop("resampling", {"antialias": True, "align_corners": False})
    own = parts.pop("own_size", None)  # of images, if not that of the position embedding
    sides = own if sides is None else sides
    if sides is not None and sides != parts["spec"].image_size:
        _resize(parts, sides, rule)
    parts["spec"] = dataclasses.replace(parts["spec"], antialias=rule["antialias"])
    channels = parts["patch_weight"].shape[1]
    if parts.get("stem") is None and channels != len(parts["spec"].mean):  # libraries know statistics of RGB alone
        parts["spec"] = dataclasses.replace(parts["spec"], mean=(0.0,) * channels, std=(1.0,) * channels)
    return parts


def is_swin(module: Any) -> bool:
    """Whether timm's Swin reader handles this module, even if only to reject it by name."""
    return any(cls.__module__.startswith("timm.models.swin_transformer") for cls in type(module).__mro__)


def image_sides(image_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return `image_size` as (height, width) in pixels; raise ValueError if it is not a size."""
    if image_size is None:
        return None
    sides = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(sides) != 2 or any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in sides):
        raise ArgumentError("image_size", f"must be pixels or (height, width), got {image_size!r}")
    return sides[0], sides[1]


def _resize(parts: dict[str, Any], sides: tuple[int, int], rule: dict[str, Any]) -> None:
    """Resample the position embedding of `parts` for images of `sides` pixels, at least in float32.

    The angles of a rotary embedding are computed for the new grid by its rule.
    """
    from fastprompt.vit.readers.parts import loaded_as

    spec, loaded = parts["spec"], parts.setdefault("loaded", {})
    if sides[0] % spec.patch_size or sides[1] % spec.patch_size:
        raise ArgumentError(
            "image_size",
            f"must have sides that are multiples of the patch size {spec.patch_size}, got {sides[0]} x {sides[1]}",
        )
    grid = (sides[0] // spec.patch_size, sides[1] // spec.patch_size)
    if grid != spec.grid and any(block.bias is not None for block in parts["blocks"]):
        raise ArgumentError(
            "image_size",
            f"must be {spec.image_size[0]} x {spec.image_size[1]} for this model with a relative position bias, got "
            f"{sides[0]} x {sides[1]}; build the model itself for other sizes",
        )
    if parts["pos_embed"] is not None and grid != spec.grid:
        prefix = int(spec.has_cls) + spec.num_registers if spec.pos_on_prefix else 0
        pos: Tensor = parts["pos_embed"].detach()  # (1, [prefix +] patches, D)
        loaded["pos_embed"] = loaded_as(pos, grid=spec.grid, to=grid, **rule)
        rows = rearrange(pos[:, prefix:], "one (rows columns) d -> one d rows columns", rows=spec.grid[0])
        how = {"mode": "bicubic", **rule}
        size = (max(grid), max(grid)) if how.pop("square", False) else grid  # a square's upper left part
        rows = F.interpolate(rows.to(torch.promote_types(pos.dtype, torch.float32)), size=size, **how)
        rows = rows[:, :, : grid[0], : grid[1]]
        patches = rearrange(rows, "one d rows columns -> one (rows columns) d").to(pos.dtype)
        parts["pos_embed"] = torch.cat([pos[:, :prefix], patches], dim=1)
    if parts.get("rotary") is not None and grid != spec.grid:
        parts["rotary"].move(grid)
        loaded |= {f"rotary.{name}": loaded_as(was=loaded[f"rotary.{name}"], to=grid) for name in ("sin", "cos")}
    parts["spec"] = dataclasses.replace(spec, image_size=sides, grid=grid)
