"""The frozen vision transformer: a backbone as data, the readers that fill it, and the graphs that act on it."""

from __future__ import annotations

from fastprompt.vit.frozen import FrozenSwin, FrozenViT

__all__ = ["FrozenSwin", "FrozenViT"]
