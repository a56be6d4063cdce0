from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import fastprompt as fp
from fastprompt.train.callbacks import Step, make_callbacks
from fastprompt.train.fit import fit
from fastprompt.train.recipes import Recipe

RECIPE = Recipe(epochs=2, batch_size=16, warmup_epochs=1, dtype="float32").replace()


class Recorder(fp.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, start: Mapping[str, Any]) -> None:
        self.seen.append(("start", start["num_train"]))

    def on_step(self, step: Step) -> None:
        self.seen.append(("step", step.epoch, step.step, step.steps, step.lr, float(step.loss) > 0))

    def on_epoch(self, record: Mapping[str, Any]) -> None:
        self.seen.append(("epoch", record["epoch"]))

    def on_end(self, result: fp.FitResult) -> None:
        self.seen.append(("end", result.best_epoch))


def test_callbacks_are_told_in_order(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    recorder, plain = Recorder(), fp.Callback()
    result = fit(make_model(), colours(32), colours(8), RECIPE, progress=False, callbacks=[recorder, plain])
    rates = [RECIPE.lr * RECIPE.lr_factor(step, 2) for step in range(4)]
    assert recorder.seen == [
        ("start", 32),
        ("step", 1, 1, 2, rates[0], True),
        ("step", 1, 2, 2, rates[1], True),
        ("epoch", 1),
        ("step", 2, 1, 2, rates[2], True),
        ("step", 2, 2, 2, rates[3], True),
        ("epoch", 2),
        ("end", result.best_epoch),
    ]


def test_a_run_whose_callback_raised_can_be_resumed(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    class Stop(fp.Callback):
        def on_epoch(self, record: Mapping[str, Any]) -> None:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        fit(make_model(), colours(32), colours(8), RECIPE, tmp_path, progress=False, callbacks=[Stop()])
    recorder = Recorder()
    fit(make_model(), colours(32), colours(8), RECIPE, tmp_path, progress=False, callbacks=[recorder])
    assert [each[:2] for each in recorder.seen if each[0] != "step"] == [("start", 32), ("epoch", 2), ("end", 2)]
    again = Recorder()  # a finished run tells nothing
    fit(make_model(), colours(32), colours(8), RECIPE, tmp_path, progress=False, callbacks=[again])
    assert again.seen == []


def test_what_is_no_callback_is_refused(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    for wrong, error in (([len], TypeError), ("tensorboard", TypeError), (["comet"], ValueError)):
        with pytest.raises(error, match="callbacks must"):
            fit(make_model(), colours(8), colours(8), RECIPE, callbacks=wrong)


def test_tensorboard_gets_settings_and_epochs(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # another run in the directory leaves nothing of the first
        arguments: dict[str, Any] = {"progress": False, "callbacks": ["tensorboard"], "resume": False}
        result = fit(make_model(), colours(32), colours(8), RECIPE, tmp_path, **arguments)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        found = [(event.step, event.value) for event in events.Scalars("val_loss")]
        assert found == [(n, pytest.approx(record["val_loss"])) for n, record in enumerate(result.history, 1)]
    assert (tmp_path / "tensorboard").is_dir()


def test_a_missing_tracker_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"by wandb needs the package wandb: pip install 'fastprompt\[wandb\]'"):
        make_callbacks(["wandb"], None)
