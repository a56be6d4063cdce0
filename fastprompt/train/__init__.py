"""Training, evaluation and checkpoints; import from the modules of this package."""

from __future__ import annotations
