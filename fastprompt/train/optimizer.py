"""The optimizer of a training run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from fastprompt.arguments import ArgumentError
from fastprompt.train.recipes import Recipe

_NAMES_IN_TIMM = {"adamw": "adamw", "sgd": "momentum"}  # timm's "sgd" is Nesterov's


def make_optimizer(named: Iterable[tuple[str, torch.nn.Parameter]], recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over groups by part and by weight decay (`Recipe.part_of`, `Recipe.decays`).

    timm's own grouping knows no rate for a part, and takes its parameters from a module: the groups are made here.
    Each has its peak rate as "peak_lr", which `set_learning_rates` scales.

    Raises:
        ValueError: nothing trains.
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
        raise ArgumentError("model", "has no parameter that trains")
    return create_optimizer_v2(
        list(groups.values()),
        opt=_NAMES_IN_TIMM[recipe.optimizer],
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        momentum=recipe.momentum,
    )


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak (`Recipe.lr_factor`).

    timm's schedulers end at one absolute rate for all groups, where `min_lr_ratio` is of each group's own peak, and
    their cosine is one step ahead of ours. A schedule that is a function of the step alone leaves nothing to save.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
