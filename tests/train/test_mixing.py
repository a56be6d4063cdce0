from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastprompt.train.fit import fit
from fastprompt.train.mixing import Mixing
from fastprompt.train.recipes import Recipe

LABELS = torch.tensor([0, 1, 2, 3, 0])


def mix(recipe: Recipe, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    np.random.seed(0)
    return Mixing(recipe, 4, lambda x: x.float() / 255, torch.device("cpu"))(images, LABELS)


def test_mixup_blends_images_and_targets_alike() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    before, plain = images.clone(), images.float() / 255
    mixed, targets = mix(Recipe(mixup=0.8), images)
    share = targets[0, 0]
    assert 0 < share < 1
    expected = torch.cat([share * plain[:4] + (1 - share) * plain[:4].flip(0), plain[4:]])  # the odd one stays
    torch.testing.assert_close(mixed, expected)
    one_hot = F.one_hot(LABELS, 4).float()
    torch.testing.assert_close(targets[:4], share * one_hot[:4] + (1 - share) * one_hot[:4].flip(0))
    assert torch.equal(targets[4], one_hot[4])
    assert torch.equal(images, before)


def test_cutmix_pastes_a_rectangle() -> None:
    images = torch.arange(5.0)[:, None, None, None].expand(5, 3, 16, 16)
    mixed, targets = mix(Recipe(cutmix=1.0), images * 255)
    pasted = (mixed[0, 0] == 3).float().mean()
    assert 0 < pasted < 1
    torch.testing.assert_close(targets[0, 3], pasted)
    assert set(mixed[0].unique().tolist()) == {0.0, 3.0}


def test_erasing_replaces_a_rectangle_by_noise() -> None:
    images = torch.zeros(5, 3, 16, 16)
    erased, labels = mix(Recipe(random_erasing=1.0), images)
    assert ((erased != 0).flatten(1).any(1)).all()
    assert (erased == 0).any()
    assert torch.equal(labels, LABELS)
    assert not images.any()


def test_nothing_is_done_where_nothing_is_asked() -> None:
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mixed, labels = mix(Recipe(), images)
    assert mixed is images
    assert labels is LABELS


@pytest.mark.parametrize("fields", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "loss": "bce"}])
def test_a_run_mixes_and_repeats_itself(
    fields: dict[str, Any], make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    recipe = Recipe(epochs=2, batch_size=16, lr=1e-2, warmup_epochs=0, dtype="float32").replace(**fields)
    train, val = colours(33), colours(16, seed=1)
    histories = [fit(make_model(), train, val, each, progress=False).history for each in (recipe, recipe)]
    losses = [[record["train_loss"] for record in history] for history in histories]
    assert losses[0] == losses[1]
    plain = recipe.replace(mixup=0.0, cutmix=0.0)
    assert losses[0] != [
        record["train_loss"] for record in fit(make_model(), train, val, plain, progress=False).history
    ]
