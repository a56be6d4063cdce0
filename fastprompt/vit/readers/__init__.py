"""Readers turn a library's model into the canonical parts of `FrozenViT`; one file per library."""

from __future__ import annotations

from typing import Any

import torch.nn as nn


def read(module: nn.Module) -> dict[str, Any]:
    """The canonical parts of `module`, by the reader of the library it comes from.

    Raises:
        TypeError: `module` is no `nn.Module`.
        ValueError: no reader knows this class, or it has a part that cannot be represented.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    library = type(module).__module__.partition(".")[0]
    names = {cls.__module__.partition(".")[0] for cls in type(module).__mro__}
    if "timm" in names:
        from fastprompt.vit.readers import timm

        return timm.read(module)
    raise ValueError(f"module of class {type(module).__name__} (library {library!r}) is not supported; "
                     "timm's VisionTransformer is")
