"""The baselines without prompts: linear probe and full fine-tuning."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.base import PromptConfig
from fastprompt.generators.registry import Published, Variant, register_method
from fastprompt.generators.vpt import VPT_RECIPE, VPT_SEARCH


def _no_prompts(s: Sizes, config: LinearProbeConfig, t: Tally) -> PromptCost:
    """No cost beside the backbone's and the head's."""
    return PromptCost(0, ())


@register_method(
    "linear",
    title="Linear probe (L-BFGS)",
    recipe={
        "epochs": 100,
        "batch_size": 32,
        "lr": 1e-2,
        "head_lr": None,
        "warmup_epochs": 5.0,
        "label_smoothing": 0.0,
        "select_by": "accuracy",
    },
    published={
        "linear-paper": Published(
            "none; VPT's settings for prompts", {**VPT_RECIPE, "lr": 1.0, "weight_decay": 1e-3}, **VPT_SEARCH
        )
    },
    cost=_no_prompts,
    solver="lbfgs",
    variants={
        "linear-sgd": Variant(
            "Linear probe (SGD)", recipe={"optimizer": "sgd"}, lrs=(0.001, 0.01, 0.1), solver="gradient"
        )
    },
)
@dataclasses.dataclass(frozen=True)
class LinearProbeConfig(PromptConfig):
    """Train only the head, on frozen features."""

    kind: ClassVar[str] = "linear"


@register_method(
    "full",
    title="Full fine-tuning",
    recipe={"lr": 1e-5, "weight_decay": 1e-2},
    lrs=(1e-5,),
    published={
        "full-paper": Published(
            "none; VPT's schedule with AdamW",
            {**VPT_RECIPE, "lr": 1e-3, "weight_decay": 1e-2, "optimizer": "adamw"},
            lr_per=256,
        )
    },
)
@dataclasses.dataclass(frozen=True)
class FullFineTuneConfig(PromptConfig):
    """Train every tensor of the backbone together with the head."""

    kind: ClassVar[str] = "full"
    trains_backbone: ClassVar[bool] = True
