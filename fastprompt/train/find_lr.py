"""Learning-rate range test: which rates train a model, found in a hundred steps."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.train.batches import grouped
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.evaluate import activation_bits
from fastprompt.train.fit import check_model, chosen_recipe
from fastprompt.train.identity import data_identities
from fastprompt.train.loop import Loop, Totals
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.recipes import Recipe
from fastprompt.train.sources import RunData
from fastprompt.train.through_int8 import backbone_of_run, prepare_int8

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

_MEMORY = 0.9
"""Share of the moving average that a new loss leaves as it is."""
_GIVE_UP = 4.0
"""The test ends when the averaged loss is this many times its lowest value."""


@dataclass(frozen=True)
class LearningRates:
    """The result of `find_lr`.

    Attributes:
        lrs: learning rates that were tried, increasing. losses: moving average of the training loss at each of them.
        suggestion: the rate at which the loss falls fastest.
        recipe: the recipe with this rate; rates of head and backbone are scaled with it.
    """

    lrs: list[float]
    losses: list[float]
    suggestion: float
    recipe: Recipe


def find_lr(
    model: PromptedViT,
    train: Any,
    recipe: Recipe | None = None,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    steps: int = 100,
    **fields: Any,
) -> LearningRates:
    """Train for a few steps with a rate that rises from `low` to `high`, and suggest one (Smith 2017, section 3.3).

    Step i of n has the rate low · (high / low)^(i / (n − 1)). The loss is averaged exponentially (0.9, without the bias
    of the start). The test ends early when the average is not finite or four times its lowest value. The suggestion is
    the rate at which the average falls fastest over the logarithm of the rate; choose among rates around it on
    validation. Rates of head and backbone keep their ratio to `lr`. Weights, modes and random states of the model are
    restored.

    Args:
        model, train: as in `fastprompt.fit`.
        recipe, fields: as in `fastprompt.fit`; the schedule is not used.
        low, high: first and last learning rate of the generator.
        steps: number of optimizer steps, at least 10.

    Raises:
        TypeError, ValueError: an argument or the data are wrong, or the loss never falls.
    """
    check_model(model)
    if not (0 < low < high < math.inf):
        raise ArgumentError("low", f"must be positive and below high, got low={low!r} and high={high!r}")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise ArgumentTypeError("steps", f"must be an integer, got {type(steps).__name__} {steps!r}")
    if steps < 10:
        raise ArgumentError("steps", f"must be at least 10, got {steps}")
    recipe = chosen_recipe(model, recipe, fields)
    states, weights = rng_state(), {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    try:
        lrs, losses = _sweep(model, train, recipe, [low * (high / low) ** (i / (steps - 1)) for i in range(steps)])
    finally:
        model.load_adapter_state_dict(weights)
        model.eval()
        set_rng_state(*states)
    slopes = np.gradient(losses, np.log(lrs)) if len(losses) > 1 else np.zeros(1)
    steepest = int(np.argmin(slopes))
    if slopes[steepest] >= 0:
        raise ArgumentError("low", f"must be a rate at which the loss falls for some time, got {low!r}")
    lr = lrs[steepest]
    others = {
        name: None if rate is None else rate * lr / recipe.lr
        for name in ("head_lr", "backbone_lr")
        for rate in (getattr(recipe, name),)
    }
    return LearningRates(lrs, losses, lr, recipe.replace(lr=lr, **others))


def _sweep(model: PromptedViT, train: Any, recipe: Recipe, rates: list[float]) -> tuple[list[float], list[float]]:
    """Take one step at each rate; return the rates that were taken, and the averaged losses."""
    flat = recipe.replace(warmup_epochs=0.0, min_lr_ratio=1.0)  # a factor of 1 in every step
    data = RunData(model, train, train, flat)
    data_identities(train, train, data.num_classes, data.kind)  # checks labels and images
    torch.manual_seed(recipe.seed)
    np.random.seed(recipe.seed % 2**32)
    random.seed(recipe.seed)
    lrs: list[float] = []
    losses: list[float] = []
    average = 0.0
    prepare_int8(model, train, recipe)
    with backbone_of_run(model, recipe), activation_bits(model, recipe.activation_bits):
        batches, _ = data.batches()
        loop = Loop(
            model, make_optimizer(model.trainable_parameters(), flat), flat, data.task, batches, batches, data.cached
        )
        model.train()
        epoch = 0
        while len(lrs) < len(rates):
            epoch += 1
            totals = Totals(data.device, rng_state())
            for group in grouped(batches.epoch(epoch - 1), recipe.accumulate):
                if len(lrs) == len(rates):
                    break
                loop.scale = rates[len(lrs)] / recipe.lr
                loss = float(loop.step(epoch, group, totals).loss)
                average = _MEMORY * average + (1 - _MEMORY) * loss
                unbiased = average / (1 - _MEMORY ** (len(lrs) + 1))
                if not math.isfinite(unbiased) or (losses and unbiased > _GIVE_UP * min(losses)):
                    return lrs, losses
                lrs.append(rates[len(lrs)])
                losses.append(unbiased)
    return lrs, losses
