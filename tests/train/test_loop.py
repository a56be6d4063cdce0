from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

import fastprompt as fp
from fastprompt.train.batches import Batches, grouped
from fastprompt.train.checkpoint import rng_state
from fastprompt.train.loop import Loop, Totals, TrainingDiverged
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.probe import extract_features
from fastprompt.train.recipes import Recipe
from fastprompt.train.tasks import make_task

RECIPE = Recipe(epochs=2, batch_size=8, lr=1e-2, warmup_epochs=0, dtype="float32")


def make_loop(model: Any, train: Any, val: Any, recipe: Recipe = RECIPE, features: bool = False) -> Loop:
    batches = [Batches(data, 8, name=name, num_classes=4) for name, data in (("train", train), ("val", val))]
    task = make_task(recipe, "class", 4, None, torch.device("cpu"))
    return Loop(model, make_optimizer(model.trainable_parameters(), recipe), recipe, task, *batches, features)


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


class NoSync(TorchDispatchMode):
    """Raises at whatever makes a program wait for a GPU: reading a number, a shape that depends on values, a copy home.

    On a CPU, these are the same operators. `allowed` holds tensors that live on the host whatever the device is.
    """

    def __init__(self, allowed: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.allowed = {tensor.data_ptr() for tensor in allowed}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"):
            if args[0].data_ptr() not in self.allowed:
                raise RuntimeError(f"{name} waits for the device")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise RuntimeError(f"{name} by a mask waits for the device")
        if waits_for_copy(name, args, kwargs or {}):
            raise RuntimeError(f"{name} to the host waits for the device")
        return func(*args, **(kwargs or {}))


def waits_for_copy(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operator copies from a device to the host and does not say `non_blocking`."""
    if name == "_to_copy":
        target, blocking = kwargs.get("device"), not kwargs.get("non_blocking", False)
        return target is not None and torch.device(target).type == "cpu" != args[0].device.type and blocking
    if name in ("copy_", "copy"):
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        return args[0].device.type == "cpu" != args[1].device.type and blocking
    return False


def epoch_without_sync(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Train an epoch in which only what comes before the first step and after the last one may wait."""
    record, totals = loop.train(1, tqdm(disable=True)), Totals(torch.device("cpu"), rng_state())  # states exist now
    steps = [state["step"] for state in loop.optimizer.state.values() if "step" in state]  # on the host by design
    read = [(x.clone(), y.clone()) for x, y in loop.train_batches.epoch(1)]  # the loader checks its pixels on the host
    monkeypatch.setattr(loop.train_batches, "epoch", lambda *_: iter(read))
    monkeypatch.setattr("fastprompt.vit.backbone.is_finite", lambda _: True)  # asked on a CPU alone
    loop.model.train()
    with NoSync(steps):
        for group in grouped(iter(read), loop.recipe.accumulate):
            loop.step(2, group, totals)
            loop._show(2, totals, tqdm(disable=True), "")
    assert totals.read()["images"] == sum(len(labels) for _, labels in read)
    return record


@pytest.mark.parametrize("name", ["vpt-deep", "vapt", "v2apt", "pgn", "free", "pixel"])
def test_nothing_within_an_epoch_waits_for_the_device(
    name: str,
    configs: dict[str, Any],
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = RECIPE.replace(clip_grad=1.0, accumulate=2, mixup=0.5, random_erasing=0.5, class_weights=(1, 2, 3, 4))
    record = epoch_without_sync(make_loop(make_model(configs[name]), colours(40), colours(8), recipe), monkeypatch)
    assert record["train_loss"] > 0


@pytest.mark.parametrize(
    "wait", [lambda x: float(x.sum()), lambda x: x[x > 0], lambda x: torch.nonzero(x), lambda x: bool((x > 0).any())]
)
def test_a_wait_within_an_epoch_is_found(
    wait: Callable[[torch.Tensor], Any],
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop = make_loop(make_model(), colours(16), colours(8))
    forward = loop._forward

    def waiting(images: torch.Tensor) -> Any:
        logits, aux = forward(images)
        wait(logits.detach())
        return logits, aux

    loop._forward = waiting  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="waits for the device"):
        epoch_without_sync(loop, monkeypatch)


def test_a_copy_to_the_host_is_found() -> None:
    here, there = torch.zeros(2), torch.zeros(2, device="meta")
    assert waits_for_copy("_to_copy", (there,), {"device": torch.device("cpu")})
    assert waits_for_copy("copy_", (here, there), {})
    assert not waits_for_copy("_to_copy", (here,), {"device": torch.device("meta")})
    assert not waits_for_copy("copy_", (there, here), {})
    assert not waits_for_copy("copy_", (here, there, True), {})
    assert not waits_for_copy("_to_copy", (there,), {"dtype": torch.float64})


def test_the_first_step_that_is_not_finite_is_kept() -> None:
    totals = Totals(torch.device("cpu"), rng_state())
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    for loss, norm in ((1.0, 2.0), (math.nan, 3.0), (math.inf, math.inf), (4.0, 5.0)):
        totals.add(torch.tensor(loss), zero, torch.tensor(norm), one, one)
    known = totals.read()
    assert (known["bad_step"], known["bad_norm"], known["images"], known["correct"]) == (2, 3.0, 4, 4)
    assert math.isnan(known["bad_loss"])
