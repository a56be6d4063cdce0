"""Configurations of the baselines that have no prompts."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastprompt.generators.base import PromptConfig


@dataclasses.dataclass(frozen=True)
class LinearProbeConfig(PromptConfig):
    """Only the head trains, on frozen features."""

    kind: ClassVar[str] = "linear"


@dataclasses.dataclass(frozen=True)
class FullFineTuneConfig(PromptConfig):
    """Every tensor of the backbone trains together with the head."""

    kind: ClassVar[str] = "full"
