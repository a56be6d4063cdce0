"""What a run does beyond training its epochs: stops early, goes on, rolls back, and is taken up within an epoch."""

from __future__ import annotations

import json
import math
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastprompt as fp
from fastprompt.train import probe
from fastprompt.train.checkpoint import load_state
from fastprompt.train.fit import TrainingDiverged, fit
from fastprompt.train.loop import Loop
from fastprompt.train.recipes import Recipe
from fastprompt.train.termination import Terminated, sigterm_handled

RECIPE = Recipe(epochs=3, batch_size=8, lr=1e-2, warmup_epochs=1, dtype="float32").replace()
TIMES = {"seconds", "images_per_second", "environment", "peak_memory_mib"}
V2APT = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16)
PGN = fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8))


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def log(directory: Path, without: tuple[str, ...] = ("resume",)) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows if row["event"] not in without]


class Killed(BaseException):
    pass


class KillAt(fp.Callback):
    """Ends the process's run after steps of these numbers, counted over the whole run."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step(self, step: Any) -> None:
        if (step.epoch - 1) * step.steps + step.step in self.steps:
            raise Killed


class Flipped(Dataset[Any]):
    """Draws from the three global generators."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return (image.flip(-2) if np.random.rand() < 0.5 else image), int(self.labels[index])


FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "pair": (lambda images, labels: (images, labels), {}),
    "accumulated": (lambda images, labels: (images, labels), {"accumulate": 2}),
    "mixed": (lambda images, labels: (images, labels), {"mixup": 0.8, "random_erasing": 0.5}),
    "balanced": (lambda images, labels: (images, labels), {"sampling": "balanced"}),
    "dataset": (Flipped, {}),
    "workers": (Flipped, {"num_workers": 1}),
    "loader": (lambda images, labels: DataLoader(Flipped(images, labels), 8, shuffle=True), {}),
}


@pytest.mark.filterwarnings("ignore:train yields different images")
@pytest.mark.parametrize(("config", "form"), [*((V2APT, form) for form in FORMS), (PGN, "pair"), (PGN, "accumulated")])
def test_a_run_killed_within_an_epoch_ends_with_the_same_bits(
    config: Any, form: str, make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    make, fields = FORMS[form]
    recipe = RECIPE.replace(epochs=2, checkpoint_every="2 steps", kl_warmup_epochs=1, **fields)
    train, val = make(*colours(50)), colours(20, seed=1)
    whole = make_model(config)
    fit(whole, train, val, recipe, tmp_path / "whole", progress=False)
    steps = 4 if form == "accumulated" else 7
    for kill in (3, steps + 1, steps + 3):
        model = make_model(config)
        torch.manual_seed(kill)
        with pytest.raises(Killed):
            fit(model, train, val, recipe, tmp_path / "killed", progress=False, callbacks=[KillAt(kill)])
    again = make_model(config)
    fit(again, train, val, recipe, tmp_path / "killed", progress=False)
    assert_same(weights(again), weights(whole))
    assert log(tmp_path / "killed") == log(tmp_path / "whole")
    resumed = [row for row in log(tmp_path / "killed", ()) if row["event"] == "resume"]
    assert [(row["epoch"], row.get("step")) for row in resumed] == [(0, 2), (1, None), (1, 2)]
    states = [load_state(tmp_path / run / "last.safetensors") for run in ("whole", "killed")]
    assert_same(states[0][0], states[1][0])


def test_checkpoints_are_written_by_steps_or_by_minutes(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int]] = []

    class Watch(fp.Callback):
        def on_step(self, step: Any) -> None:
            values = load_state(tmp_path / "run" / "last.safetensors")[1]
            written.append((values["progress"]["epoch"], values.get("epoch", {}).get("steps", 0)))

    def saved(every: str) -> list[tuple[int, int]]:
        written.clear()
        recipe = RECIPE.replace(epochs=1, checkpoint_every=every)
        fit(make_model(), colours(48), colours(8), recipe, tmp_path / "run", False, False, callbacks=[Watch()])
        return written

    assert saved("2 steps") == [(0, 0), (0, 0), (0, 2), (0, 2), (0, 4), (0, 4)]
    assert saved("epoch") == saved("10 minutes") == [(0, 0)] * 6
    now = [0.0]

    def clock() -> float:
        now[0] += 25.0
        return now[0]

    monkeypatch.setattr("fastprompt.train.run.monotonic", clock)
    assert saved("1 minutes")[3:] == [(0, 3)] * 3


def test_a_step_that_is_not_finite_is_not_saved(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where nobody has looked at the loss yet."""
    monkeypatch.setattr("fastprompt.train.loop.Totals.peek", lambda self: None)
    poison_after(monkeypatch, 3)
    with pytest.raises(TrainingDiverged, match="loss is nan at epoch 1, step 3") as raised:
        fit(make_model(), colours(40), colours(8), RECIPE.replace(checkpoint_every="2 steps"), tmp_path, progress=False)
    assert raised.value.lr == RECIPE.lr * RECIPE.lr_factor(2, 5)
    tensors, values = load_state(tmp_path / "last.safetensors")
    assert values["epoch"]["steps"] == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values() if tensor.is_floating_point())


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_sigterm_writes_a_checkpoint(
    moment: str,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val, recipe = colours(40), colours(20, seed=1), RECIPE.replace(epochs=2)
    whole = make_model(V2APT)
    fit(whole, train, val, recipe, tmp_path / "whole", progress=False)

    class Terminate(fp.Callback):
        def on_step(self, step: Any) -> None:
            if (step.epoch, step.step) == (2, 3):
                os.kill(os.getpid(), signal.SIGTERM)

    if moment == "validation":
        validate = Loop.validate

        def terminated(self: Any, epoch: int, *rest: Any) -> Any:
            if epoch == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(self, epoch, *rest)

        monkeypatch.setattr(Loop, "validate", terminated)
    callbacks = [Terminate()] if moment == "step" else []
    before = signal.getsignal(signal.SIGTERM)
    with sigterm_handled(), pytest.raises(Terminated) as ended:
        fit(make_model(V2APT), train, val, recipe, tmp_path / "run", progress=False, callbacks=callbacks)
    assert signal.getsignal(signal.SIGTERM) is before
    assert (ended.value.code, ended.value.saved) == (143, True)
    assert load_state(tmp_path / "run" / "last.safetensors")[1]["epoch"]["steps"] == (3 if moment == "step" else 5)
    monkeypatch.undo()
    again = make_model(V2APT)
    fit(again, train, val, recipe, tmp_path / "run", progress=False)
    assert_same(weights(again), weights(whole))
    assert log(tmp_path / "run") == log(tmp_path / "whole")


def test_sigterm_ends_at_once_what_has_no_state() -> None:
    with sigterm_handled(), pytest.raises(Terminated) as ended:
        signal.raise_signal(signal.SIGTERM)
    assert ended.value.saved is False


def test_k_batches_take_the_step_of_one_k_times_as_large(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    """57 images in steps of 24, 24 and 9, the last one of which joins the batch of 8 before it."""
    train, val = colours(57), colours(20, seed=1)
    ends = []
    recipe = RECIPE.replace(label_smoothing=0.1, class_weights=(1.0, 2.0, 3.0, 0.5), clip_grad=0.5)
    recipe = recipe.replace(optimizer="sgd", lr=0.1)
    for size, accumulate in ((24, 1), (8, 3)):
        model = make_model(fp.VAPTConfig(num_prompts=2, channel_dropout=0.0, hidden_dropout=0.0))
        result = fit(model, train, val, recipe.replace(batch_size=size, accumulate=accumulate), progress=False)
        ends.append((weights(model), result.history))
    for name, tensor in ends[0][0].items():
        torch.testing.assert_close(ends[1][0][name], tensor, rtol=1e-5, atol=1e-6)
    for one, many in zip(ends[0][1], ends[1][1], strict=True):
        for key in ("train_loss", "grad_norm", "lr", "val_loss"):
            assert many[key] == pytest.approx(one[key], rel=1e-5)


def test_patience_ends_a_run_that_gets_no_better(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = colours(16, seed=1)
    val = images, (labels + 1) % 4  # the more is learned, the worse it gets
    recipe = RECIPE.replace(epochs=20, patience=2, select_by="loss")
    result = fit(make_model(), colours(32), val, recipe, tmp_path)
    assert len(result.history) == result.best_epoch + 2 < 20
    assert log(tmp_path)[-1]["stopped_after"] == len(result.history)
    assert f"stopped after epoch {len(result.history)}: no better one for 2 epochs" in capsys.readouterr().err
    assert fit(make_model(), colours(32), val, recipe, tmp_path, progress=False).history == result.history


def test_a_finished_run_goes_on_for_more_epochs(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(40), colours(20, seed=1)
    first = fit(make_model(), train, val, RECIPE, tmp_path, progress=False)
    more = RECIPE.replace(epochs=5)
    with pytest.raises(ValueError, match=r"recipe\.epochs is 5, was 3.* for more epochs, pass extend=True"):
        fit(make_model(), train, val, more, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"\(recipe\.lr is 0\.5, was 0\.01\)"):
        fit(make_model(), train, val, more.replace(lr=0.5), tmp_path, progress=False, extend=True)
    with pytest.raises(Killed):
        fit(make_model(), train, val, more, tmp_path, progress=False, extend=True, callbacks=[KillAt(21)])
    result = fit(make_model(), train, val, more, tmp_path, progress=False, extend=True)
    assert result.history[:3] == first.history
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5]
    assert result.history[3]["lr"] == more.lr * more.lr_factor(19, 5)
    events = [row["event"] for row in log(tmp_path, ())]
    assert events == ["start", "epoch", "epoch", "epoch", "end", "extend", "epoch", "resume", "epoch", "end"]
    assert json.loads((tmp_path / "recipe.json").read_text())["epochs"] == 5
    assert fit(make_model(), train, val, more, tmp_path, progress=False, extend=True) == result
    assert fit(make_model(), train, val, more, tmp_path, progress=False) == result
    with pytest.raises(ValueError, match=r"recipe\.epochs is 3, was 5"):
        fit(make_model(), train, val, RECIPE, tmp_path, progress=False, extend=True)


def poison_after(monkeypatch: pytest.MonkeyPatch, *bad: int) -> None:
    """Make the logits of these training forwards NaN, counted over the process."""
    forward, count = fp.PromptedViT.forward, [0]

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            count[0] += 1
            if count[0] in bad:
                return output[0] * math.nan, output[1]
        return output

    monkeypatch.setattr(fp.PromptedViT, "forward", poisoned)


@pytest.mark.parametrize("kept", ["memory", "files"])
def test_a_diverged_run_goes_back_and_on_at_a_third_of_the_rate(
    kept: str,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train, val = colours(40), colours(20, seed=1)
    recipe = RECIPE.replace(rollbacks=2, checkpoint_every="2 steps")
    poison_after(
        monkeypatch, 9, 10
    )  # step 4 of epoch 2 at the first attempt, the step after its checkpoint at the next
    out = tmp_path if kept == "files" else None
    result = fit(make_model(), train, val, recipe, out)
    rates = [record["lr"] / recipe.lr / recipe.lr_factor(5 * n + 4, 5) for n, record in enumerate(result.history)]
    assert rates == pytest.approx([1, 1 / 9, 1 / 9])
    said = capsys.readouterr().err
    assert "loss is nan at epoch 2: back to the state after step 2 of epoch 2, at a third of the rate" in said
    if kept == "files":
        rows = [(row["event"], row.get("step")) for row in log(tmp_path)]
        assert rows == [
            ("start", None), ("epoch", None), ("diverged", 4), ("rollback", 2), ("diverged", 3), ("rollback", 2),
            ("epoch", None), ("epoch", None), ("end", None),
        ]  # fmt: skip
        monkeypatch.undo()
        assert fit(make_model(), train, val, recipe, out, progress=False).history == result.history


def test_rollbacks_come_to_an_end(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_after(monkeypatch, 7, 8, 9)
    with pytest.raises(TrainingDiverged, match="epoch 2, step 1"):
        fit(make_model(), colours(40), colours(8), RECIPE.replace(rollbacks=1), tmp_path, progress=False)
    assert [row["event"] for row in log(tmp_path)] == ["start", "epoch", "diverged", "rollback", "diverged"]


def test_a_loss_that_explodes_counts_as_diverged_where_it_can_be_mended(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    train = Loop.train

    def exploding(self: Loop, epoch: int, *rest: Any) -> dict[str, Any]:
        record = train(self, epoch, *rest)
        return record | {"train_loss": record["train_loss"] * (100 if epoch == 2 and self.scale == 1 else 1)}

    monkeypatch.setattr(Loop, "train", exploding)
    assert len(fit(make_model(), colours(16), colours(8), RECIPE, progress=False).history) == 3
    fit(make_model(), colours(16), colours(8), RECIPE.replace(rollbacks=1), tmp_path, progress=False)
    assert "more than three times that of the first epoch" in log(tmp_path)[2]["message"]
    assert [row["event"] for row in log(tmp_path)][1:5] == ["epoch", "diverged", "rollback", "epoch"]


def test_a_rolled_back_run_that_is_killed_resumes_at_the_lower_rate(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, recipe = colours(40), colours(20, seed=1), RECIPE.replace(rollbacks=1)
    ends = []
    for name in ("whole", "killed"):
        poison_after(monkeypatch, 7)
        model = make_model()
        if name == "killed":
            with pytest.raises(Killed):
                fit(model, train, val, recipe, tmp_path / name, progress=False, callbacks=[KillAt(11)])
            monkeypatch.undo()
            model = make_model()
        fit(model, train, val, recipe, tmp_path / name, progress=False)
        monkeypatch.undo()
        ends.append(weights(model))
    assert_same(ends[0], ends[1])
    assert log(tmp_path / "killed") == log(tmp_path / "whole")


def test_a_result_below_the_linear_probe_is_said(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(64), colours(40, seed=1)
    recipe = RECIPE.replace(epochs=1, lr=1e-9)
    plain = make_model()
    fit(plain, train, val, recipe, progress=False)
    compared = make_model()
    with pytest.warns(UserWarning, match=r"validation accuracy of 0\.\d+ is below that of a linear probe .* 1\.000"):
        fit(compared, train, val, recipe, tmp_path, progress=False, compare_probe=True)
    assert_same(weights(compared), weights(plain))  # the comparison changes nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make_model(), train, val, recipe.replace(head_init="probe"), progress=False)  # not below: 1.0 as well


def test_where_a_probe_costs_little(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, recipe = colours(12), RECIPE.replace(epochs=probe.LONG)
    assert probe.is_worth_comparing(make_model(), train, recipe)
    assert not probe.is_worth_comparing(make_model(), train, RECIPE.replace(epochs=probe.LONG - 1))
    assert not probe.is_worth_comparing(make_model(fp.LinearProbeConfig()), train, recipe)
    monkeypatch.setattr(probe, "FEW", 11)
    assert not probe.is_worth_comparing(make_model(), train, recipe)


def test_a_recipe_that_drops_the_methods_own_settings_is_said(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    data = colours(8)
    with pytest.warns(UserWarning, match=r"the defaults of Recipe where 'vpt' has other ones: .*head_lr=None"):
        fit(make_model(), data, data, Recipe(epochs=1, warmup_epochs=0), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(make_model(), data, data, fp.default_recipe("vpt").replace(epochs=1), progress=False)
        fit(make_model(), data, data, epochs=1, progress=False)


def test_a_small_set_gets_enough_steps(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = RECIPE.replace(epochs=2, min_steps=9)
    result = fit(make_model(), colours(16), colours(8), recipe, tmp_path, progress=False)
    assert len(result.history) == 5  # of two steps
    # the same run, whatever floor led to its epochs
    same = recipe.replace(epochs=5, warmup_epochs=2.5)
    assert fit(make_model(), colours(16), colours(8), same, tmp_path, progress=False) == result


def test_balanced_sampling_draws_each_class_alike(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    images, labels = colours(400)
    rare = torch.cat([torch.nonzero(labels != 0)[:, 0], torch.nonzero(labels == 0)[:10, 0]])
    seen: list[int] = []
    forward = fp.PromptedViT.forward

    class Counted(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            seen.append(int(labels[rare][index]))
            return super().__getitem__(index)

    data = Counted(images[rare], labels[rare])
    recipe = RECIPE.replace(epochs=1, batch_size=64, sampling="balanced")
    fit(make_model(), data, colours(8), recipe, progress=False)
    drawn = np.bincount(seen[-len(rare):], minlength=4) / len(rare)  # fmt: skip
    assert forward is fp.PromptedViT.forward
    assert abs(drawn - 0.25).max() < 0.08  # 10 of 310 are of class 0


def test_options_are_part_of_the_identity(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val, recipe = colours(16), colours(8), RECIPE.replace(epochs=1)
    fit(make_model(), train, val, recipe, tmp_path, progress=False)
    changes: Mapping[str, Any] = {
        "accumulate": 2, "mixup": 0.1, "cutmix": 0.1, "random_erasing": 0.1, "rollbacks": 1, "patience": 3,
        "loss": "bce", "class_weights": "balanced", "sampling": "balanced",
    }  # fmt: skip
    for name, value in changes.items():
        with pytest.raises(ValueError, match=rf"recipe\.{name} "):
            fit(make_model(), train, val, recipe.replace(**{name: value}), tmp_path, progress=False)
    fit(make_model(), train, val, recipe.replace(checkpoint_every="3 steps"), tmp_path, progress=False)
