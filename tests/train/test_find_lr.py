from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastprompt as fp
from fastprompt.train.recipes import Recipe

RECIPE = Recipe(epochs=3, batch_size=16, head_lr=2e-3, dtype="float32", optimizer="sgd").replace()


def test_a_rate_that_trains_is_found_and_nothing_is_changed(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    model, train = make_model(), colours(64)
    before = {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}
    random = torch.get_rng_state()
    found = fp.find_lr(model, train, RECIPE, low=1e-4, high=1e6, steps=40)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.adapter_state_dict().items())
    assert model.backbone.dtype == torch.float32
    assert found.lrs[0] == pytest.approx(1e-4)
    assert found.lrs[1] / found.lrs[0] == pytest.approx(1e10 ** (1 / 39))
    assert len(found.lrs) == len(found.losses) < 40  # it ends where the loss explodes
    assert found.suggestion in found.lrs
    assert found.recipe == RECIPE.replace(lr=found.suggestion, head_lr=2e-3 * found.suggestion / RECIPE.lr)
    trained = fp.fit(model, train, colours(32, seed=1), found.recipe.replace(warmup_epochs=0), progress=False)
    assert trained.best_val_accuracy > 0.9


def test_fields_and_wrong_arguments(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    model, train = make_model(), colours(16)
    found = fp.find_lr(model, train, steps=12, low=1e-4, high=0.1, batch_size=4, dtype="float32")
    assert found.recipe.batch_size == 4
    assert len(found.lrs) == 12
    for arguments, message in (
        ({"low": 0.0}, "low must be positive and below high"),
        ({"low": 1.0, "high": 0.1}, "low must be positive and below high"),
        ({"steps": 9}, "steps must be at least 10"),
        ({"steps": 10.0}, "steps must be an integer"),
        ({"learning_rate": 1}, "learning_rate must be a field of the recipe"),
    ):
        with pytest.raises(ValueError, match=message):
            fp.find_lr(model, train, **arguments)
    with pytest.raises(ValueError, match="low must be a rate at which the loss falls"):
        fp.find_lr(make_model(), (train[0], train[1]), RECIPE, low=1e4, high=1e5, steps=10)
