"""The frozen vision transformer: the backbone's data, the readers that fill it, and the graphs that compute with it."""

from __future__ import annotations

from fastprompt.vit.frozen import FrozenSwin, FrozenViT

__all__ = ["FrozenSwin", "FrozenViT"]
