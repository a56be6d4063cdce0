"""The optimizer of a training run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastprompt.arguments import ArgumentError
from fastprompt.train.recipes import Recipe

_NAMES_IN_TIMM = {"adamw": "adamw", "sgd": "momentum"}  # timm's "sgd" is Nesterov's


def make_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], recipe: Recipe) -> torch.optim.Optimizer:
    """Create the recipe's optimizer, with parameters grouped by part and weight decay.

    See `Recipe.part_of` and `Recipe.decays`. The groups are built here because timm's grouping has no learning rates
    per part and takes its parameters from a module. Each group stores its peak rate as "peak_lr", which
    `set_learning_rates` scales.

    Raises:
        ValueError: there are no trainable parameters.
    """
    from timm.optim import create_optimizer_v2

    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in named:
        decays = recipe.decays(name, parameter.ndim)
        group = groups.setdefault(
            (recipe.part_of(name), decays),
            {
                "params": [],
                "weight_decay": recipe.weight_decay if decays else 0.0,
                "peak_lr": recipe.peak_lr(name),
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ArgumentError("model", "must have trainable parameters, got none")
    return create_optimizer_v2(
        list(groups.values()),
        opt=_NAMES_IN_TIMM[recipe.optimizer],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's learning rate to `factor` times its peak (`Recipe.lr_factor`).

    timm's schedulers are not used: they end at one absolute rate for all groups, while `min_lr_ratio` is relative to
    each group's peak, and their cosine is one step ahead. This schedule depends on the step only, so it has no state
    to save.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
