from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tqdm import tqdm

import fastprompt as fp
from fastprompt.train.batches import Batches
from fastprompt.train.loop import Loop, TrainingDiverged
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.probe import extract_features
from fastprompt.train.recipes import Recipe

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0, dtype="float32")


def make_loop(model: Any, train: Any, val: Any, recipe: Recipe = RECIPE, features: bool = False) -> Loop:
    batches = [Batches(data, 8, name=name, num_classes=4) for name, data in (("train", train), ("val", val))]
    return Loop(model, make_optimizer(model.trainable_parameters(), recipe), recipe, *batches, features)


def test_an_epoch_reports_its_means_and_the_bar_shows_them(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    model, data = make_model(), colours(12)
    with torch.no_grad():
        losses = F.cross_entropy(model(data[0]), data[1], reduction="none")
    loop = make_loop(model, data, data, RECIPE.replace(lr=1e-12))
    with tqdm(total=12, disable=False) as bar:
        record = loop.train(1, bar, " val 0.500 (best)")
        assert bar.n == 12
        assert bar.postfix.startswith("epoch 1/2 loss ")
        assert bar.postfix.endswith(" val 0.500 (best)")
    assert record["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert record["lr"] == pytest.approx(1e-12 * RECIPE.lr_factor(1, 2))
    assert record["grad_norm"] > 0
    loss, accuracy = loop.validate(1)
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    assert accuracy == record["train_accuracy"]
    assert model.training


def test_cached_features_give_the_same_epoch_as_images(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    data, records = colours(16), []
    for features in (False, True):
        model = make_model(fp.LinearProbeConfig())
        source = extract_features(model, data) if features else data
        loop = make_loop(model, source, source, features=features)
        records.append((loop.train(1, tqdm(disable=True)), loop.validate(1)))
    assert records[0][0] == pytest.approx(records[1][0], rel=1e-4)
    assert records[0][1] == pytest.approx(records[1][1], rel=1e-4)


@pytest.mark.parametrize(("what", "step"), [("validation", 0), ("training", 2)])
def test_a_loss_that_is_no_number_says_where(
    what: str, step: int, make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    model = make_model(fp.LinearProbeConfig())
    loop = make_loop(model, colours(16), colours(8))

    def poison(*_: Any) -> None:
        with torch.no_grad():
            model.head.weight.fill_(float("nan"))

    if what == "training":
        loop.optimizer.step = poison  # type: ignore[method-assign]
        with pytest.raises(TrainingDiverged, match="loss is nan") as raised:
            loop.train(2, tqdm(disable=True))
    else:
        poison()
        with pytest.raises(TrainingDiverged, match="validation loss is nan at epoch 2, validation") as raised:
            loop.validate(2)
    assert (raised.value.epoch, raised.value.step) == (2, step)
