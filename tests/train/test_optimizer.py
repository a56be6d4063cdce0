from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastprompt as fp
from fastprompt.train.optimizer import make_optimizer, set_learning_rates
from fastprompt.train.recipes import Recipe


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_it_is_pytorchs_own_with_the_papers_settings(name: str, make_model: Callable[..., Any]) -> None:
    """Bit for bit the steps of torch.optim's with its defaults."""
    recipe = Recipe(optimizer=name, lr=0.05, weight_decay=0.3, momentum=0.8, head_lr=0.01)
    ours, plain = make_model(), make_model()
    optimizer = make_optimizer(ours.trainable_parameters(), recipe)
    groups: list[dict[str, Any]] = [
        {"params": [p], "weight_decay": 0.3 if p.ndim > 1 else 0.0, "lr": 0.01 if name.startswith("head.") else 0.05}
        for name, p in plain.trainable_parameters()
    ]
    expected = torch.optim.AdamW(groups) if name == "adamw" else torch.optim.SGD(groups, momentum=0.8)
    set_learning_rates(optimizer, 1.0)
    for step in range(3):
        for model, each in ((ours, optimizer), (plain, expected)):
            each.zero_grad()
            torch.manual_seed(step)
            sum((p * torch.randn_like(p)).sum() for _, p in model.trainable_parameters()).backward()
            each.step()
    for (_, a), (_, b) in zip(ours.trainable_parameters(), plain.trainable_parameters(), strict=True):
        assert torch.equal(a, b)


def test_rates_are_scaled_from_each_groups_peak(make_model: Callable[..., Any]) -> None:
    optimizer = make_optimizer(make_model().trainable_parameters(), Recipe(lr=0.5, head_lr=0.1))
    set_learning_rates(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.05, 0.25]
    set_learning_rates(optimizer, 0.25)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.025, 0.125]


def test_a_model_in_which_nothing_trains_is_refused(make_model: Callable[..., Any]) -> None:
    model = make_model(fp.LinearProbeConfig())
    model.head.requires_grad_(False)
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        make_optimizer(model.trainable_parameters(), Recipe())
