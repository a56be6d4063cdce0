"""The frozen vision transformer as data: its tensors, the readers that fill them, and the plain forward."""

from __future__ import annotations

from fastprompt.vit.swin import FrozenSwin
from fastprompt.vit.weights import FrozenViT

__all__ = ["FrozenSwin", "FrozenViT"]
