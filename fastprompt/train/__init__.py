"""Training, evaluation and checkpoints. Import from the modules; the model imports ``checkpoint`` from here."""

from __future__ import annotations
