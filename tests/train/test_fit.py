from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fastprompt as fp
from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError
from fastprompt.kernels import dispatch
from fastprompt.train.checkpoint import load_state
from fastprompt.train.fit import TrainingDiverged, fit
from fastprompt.train.log import environment
from fastprompt.train.loop import Loop
from fastprompt.train.recipes import Recipe, default_recipe
from fastprompt.vit import linear

RECIPE = Recipe(epochs=3, batch_size=16, lr=1e-2, warmup_epochs=1)
V2APT = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16)
PGN = fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 8, 8))
CONFIGS = [
    PGN,
    V2APT,
    fp.VAPTConfig(num_prompts=2),
    fp.VPTConfig(num_prompts=2, prompt_dropout=0.1),
    fp.FreePromptsConfig(num_prompts=2),
    fp.PixelPromptConfig(border=4),
    fp.LinearProbeConfig(),
    fp.FullFineTuneConfig(),
]
TIMES = {"seconds", "images_per_second"}


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.adapter_state_dict().items()}


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in history]


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def read_log(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def every_file(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_learns_an_easy_problem_and_leaves_the_backbone_alone(
    config: Any, make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(config)
    frozen = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    recipe = RECIPE.replace(epochs=4, lr=1e-3 if config.kind == "full" else 1e-2)
    result = fit(model, colours(65), colours(40, seed=1), recipe, out_dir=tmp_path, progress=False)
    assert result.history[-1]["train_loss"] < 0.8 * result.history[0]["train_loss"]
    assert result.best_val_accuracy > 0.6  # chance is 0.25
    assert model.backbone.dtype == torch.float32
    if config.kind != "full":
        assert_same(frozen, dict(model.backbone.state_dict()))
    saved = fp.PromptedViT.from_pretrained(make_model().backbone, tmp_path / "best")
    assert_same(weights(saved), weights(model))


@pytest.mark.parametrize("config", [fp.VPTConfig(num_prompts=2), V2APT], ids=lambda config: config.kind)
def test_learns_on_a_swin_transformer(
    config: Any, tiny_swin: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = fp.FrozenViT(tiny_swin())
    model = fp.PromptedViT(backbone, config, num_classes=4)
    frozen = {name: tensor.clone() for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())}
    recipe = RECIPE.replace(epochs=4, lr=3e-2)
    result = fit(model, colours(64), colours(40, seed=1), recipe, out_dir=tmp_path, progress=False)
    assert result.best_val_accuracy > 0.6  # chance is 0.25
    assert_same(frozen, dict((*backbone.named_parameters(), *backbone.named_buffers())))
    saved = fp.PromptedViT.from_pretrained(backbone, tmp_path / "best")
    assert_same(weights(saved), weights(model))


def test_the_result_and_the_log_say_what_happened(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    result = fit(make_model(), colours(40), colours(20, seed=1), RECIPE, out_dir=tmp_path, progress=False)
    log = read_log(tmp_path)
    assert [event["event"] for event in log] == ["start", "epoch", "epoch", "epoch", "end"]
    assert log[0]["recipe"] == RECIPE.to_dict() == json.loads((tmp_path / "recipe.json").read_text())
    assert log[0]["num_train"] == 40
    assert result.history == log[1:4]
    for number, record in enumerate(result.history, 1):
        assert record["epoch"] == number
        assert record["lr"] == pytest.approx(RECIPE.lr * RECIPE.lr_factor(3 * number - 1, 3))
        assert 0 <= record["val_accuracy"] <= 1
        assert record["images_per_second"] > 0
    best = max(result.history, key=lambda record: (record["val_accuracy"], -record["val_loss"]))
    assert result.best_epoch == best["epoch"] == log[-1]["best_epoch"]
    assert result.best_val_accuracy == best["val_accuracy"]
    assert result.peak_memory_mib > 50
    assert result.out_dir == tmp_path


def test_the_best_epoch_is_restored(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    images, labels = colours(40, seed=1)
    val = images, (labels + 1) % 4  # the more is learned, the worse it gets
    model = make_model()
    result = fit(model, colours(32), val, RECIPE.replace(dtype="float32"), progress=False)
    losses = [record["val_loss"] for record in result.history]
    assert result.best_epoch == 1
    assert losses[0] < 0.9 * losses[-1]
    evaluation = fp.evaluate(model, val)
    assert evaluation.loss == pytest.approx(losses[0], rel=1e-5)
    assert evaluation.accuracy == result.best_val_accuracy


@pytest.mark.parametrize(("select_by", "epoch"), [("accuracy", 1), ("loss", 3)])
def test_the_best_epoch_is_chosen_by_accuracy_or_by_loss(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    select_by: str,
    epoch: int,
) -> None:
    validation = {1: (0.9, 0.8), 2: (0.5, 0.6), 3: (0.4, 0.7), 4: (0.4, 0.6)}  # loss, accuracy
    monkeypatch.setattr("fastprompt.train.loop.Loop.validate", lambda _, epoch, *rest: validation[epoch])
    recipe = RECIPE.replace(epochs=4, warmup_epochs=0.0, select_by=select_by)
    result = fit(make_model(), colours(16), colours(8, seed=1), recipe, progress=False)
    assert (result.best_epoch, result.best_val_loss, result.best_val_accuracy) == (epoch, *validation[epoch])


def test_equal_accuracies_are_decided_by_the_loss(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    result = fit(make_model(), colours(64), colours(20, seed=1), RECIPE.replace(epochs=6, lr=2e-2), progress=False)
    tied = [record for record in result.history if record["val_accuracy"] == result.best_val_accuracy]
    assert len(tied) > 1
    assert result.best_val_loss == min(record["val_loss"] for record in tied)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("config", [PGN, V2APT, fp.VAPTConfig(num_prompts=2)], ids=lambda config: config.kind)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_killed_run_ends_with_the_same_bits(
    config: Any,
    optimizer: str,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = RECIPE.replace(optimizer=optimizer, lr=3e-3, kl_warmup_epochs=2)
    train, val = colours(40), colours(20, seed=1)
    whole = make_model(config)
    expected = fit(whole, train, val, recipe, out_dir=tmp_path / "whole", progress=False)

    forward = fp.PromptedViT.forward
    for kills in (4, 8, 9):  # in every epoch once; 2 trial forwards, then 3 steps and 1 validation batch each

        def dying(self: Any, *args: Any, left: list[int] = [kills], **kwargs: Any) -> Any:  # noqa: B006
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(fp.PromptedViT, "forward", dying)
        # A rerun starts from other random numbers; the state file has those that count.
        model = make_model(config)
        torch.manual_seed(kills)
        with pytest.raises(Killed):
            fit(model, train, val, recipe, out_dir=tmp_path / "killed", progress=False)
    monkeypatch.setattr(fp.PromptedViT, "forward", forward)
    again = make_model(config)
    result = fit(again, train, val, recipe, out_dir=tmp_path / "killed", progress=False)

    assert_same(weights(again), weights(whole))
    assert without_times(result.history) == without_times(expected.history)
    assert result.best_epoch == expected.best_epoch
    best = [fp.PromptedViT.from_pretrained(make_model().backbone, tmp_path / run / "best") for run in
            ("whole", "killed")]  # fmt: skip
    assert_same(weights(best[0]), weights(best[1]))
    events = [event["event"] for event in read_log(tmp_path / "killed")]
    assert events == ["start", "resume", "epoch", "resume", "epoch", "resume", "epoch", "end"]


def test_a_kill_between_state_and_best_checkpoint_is_mended(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val = colours(40), colours(20, seed=1)

    def die(self: Any, directory: Path) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(fp.PromptedViT, "save_pretrained", die)
        with pytest.raises(Killed):
            fit(make_model(), train, val, RECIPE, out_dir=tmp_path, progress=False)
    assert not (tmp_path / "best").exists()
    model = make_model()
    fit(model, train, val, RECIPE, out_dir=tmp_path, progress=False)
    saved = fp.PromptedViT.from_pretrained(make_model().backbone, tmp_path / "best")
    assert_same(weights(saved), weights(model))


def test_a_finished_run_is_not_trained_again(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val = colours(40), colours(20, seed=1)
    first = make_model()
    expected = fit(first, train, val, RECIPE, out_dir=tmp_path, progress=False)

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(torch.optim.AdamW, "step", never)
    for model in (make_model(), first):  # a fresh one, and the one that holds the result
        before = every_file(tmp_path)
        assert fit(model, train, val, RECIPE, out_dir=tmp_path, progress=False) == expected
        assert_same(weights(model), weights(first))
        assert every_file(tmp_path) == before
    with pytest.raises(AssertionError, match="trained again"):
        fit(make_model(), train, val, RECIPE, out_dir=tmp_path, resume=False, progress=False)


@pytest.mark.parametrize("what", ["recipe", "config", "data", "backbone"])
def test_another_run_in_the_directory_is_refused(
    what: str, make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val, recipe = colours(40), colours(20, seed=1), RECIPE.replace(epochs=1)
    fit(make_model(), train, val, recipe, out_dir=tmp_path, progress=False)
    before = every_file(tmp_path)
    model = make_model(fp.VPTConfig(num_prompts=3)) if what == "config" else make_model()
    if what == "recipe":
        recipe = recipe.replace(lr=0.5)
    if what == "data":
        train = (train[0], train[1].flip(0))
    if what == "backbone":
        vit = make_model(fp.FullFineTuneConfig()).backbone
        with torch.no_grad():
            vit.cls_token.add_(1.0)
        vit._identity = None
        model = fp.PromptedViT(vit.requires_grad_(False), fp.VPTConfig(num_prompts=2), num_classes=4)
    message = {"recipe": r"recipe\.lr is 0\.5, was 0\.01", "config": "config", "data": r"train\.labels changed"}
    with pytest.raises(ValueError, match=message.get(what, "backbone")):
        fit(model, train, val, recipe, out_dir=tmp_path, progress=False)
    assert every_file(tmp_path) == before


def test_seeds(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    train, val = colours(40), colours(20, seed=1)
    ends = []
    for seed in (0, 0, 1):
        model = make_model(V2APT)
        torch.manual_seed(len(ends))  # what came before does not matter
        before = torch.get_rng_state()
        fit(model, train, val, RECIPE.replace(seed=seed), progress=False)
        assert torch.equal(torch.get_rng_state(), before)  # and nothing is left behind
        ends.append(weights(model))
    assert_same(ends[0], ends[1])
    assert any(not torch.equal(ends[0][name], ends[2][name]) for name in ends[0])


def test_the_kl_term_is_in_the_loss(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    train, val = colours(40), colours(20, seed=1)
    kls = {}
    for beta in (0.0, 1.0):
        config = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16, beta=beta)
        history = fit(make_model(config), train, val, RECIPE.replace(epochs=5), progress=False).history
        kls[beta] = [record["kl"] for record in history]
        assert history[-1]["beta"] == beta
        assert 0 <= history[-1]["active_units"] <= 8
    assert kls[1.0][0] > 0
    assert kls[1.0][-1] < 0.5 * kls[0.0][-1]


def test_the_reported_loss_is_cross_entropy_plus_the_warmed_up_kl(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = colours(16), colours(8, seed=1)
    config = fp.V2APTConfig(num_prompts=4, num_instance=2, latent=8, hidden=16, beta=0.5)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    recipe = RECIPE.replace(epochs=2, kl_warmup_epochs=2, label_smoothing=0.1, dtype="float32")
    seen: list[float] = []
    forward = fp.PromptedViT.forward

    def record(self: Any, images: torch.Tensor, return_aux: bool = False, **kwargs: Any) -> Any:
        output = forward(self, images, return_aux, **kwargs)
        if self.training:
            order = [next(i for i, one in enumerate(train[0]) if torch.equal(one, image)) for image in images]
            loss = torch.nn.functional.cross_entropy(output[0], train[1][order], label_smoothing=0.1)
            seen.append((loss + 0.5 * (len(seen) + 1) / 2 * output[1]["kl"].mean()).item())
        return output

    monkeypatch.setattr(fp.PromptedViT, "forward", record)
    history = fit(make_model(config), train, val, recipe, progress=False).history
    assert [epoch["train_loss"] for epoch in history] == pytest.approx(seen, rel=1e-6)
    assert [epoch["beta"] for epoch in history] == [0.25, 0.5]


def test_weight_decay_spares_biases_and_norms_and_the_head_has_its_own_rate(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def record(self: torch.optim.AdamW) -> None:
        groups[:] = [{**group, "params": list(group["params"])} for group in self.param_groups]
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", record)
    model = make_model(V2APT)
    recipe = RECIPE.replace(weight_decay=0.3, head_lr=1e-4, warmup_epochs=0, epochs=1, batch_size=64)
    fit(model, colours(64), colours(8, seed=1), recipe, progress=False)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    named = dict(model.trainable_parameters())
    assert len(found) == len(named)
    for name, parameter in named.items():
        rate = 1e-4 if name.startswith("head.") else 1e-2
        assert found[id(parameter)] == (rate, 0.3 if parameter.ndim > 1 else 0.0), name


def test_gradients_are_clipped(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []
    step = torch.optim.SGD.step

    def record(self: torch.optim.SGD) -> None:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.cat([g.flatten() for g in gradients]).norm()))
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", record)
    recipe = RECIPE.replace(optimizer="sgd", clip_grad=0.01, epochs=1)
    result = fit(make_model(), colours(32), colours(8, seed=1), recipe, progress=False)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert result.history[0]["grad_norm"] > 0.01  # as it was before clipping


def test_divergence_stops_with_the_last_good_checkpoint(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = fp.PromptedViT.forward
    steps = [0]

    def poisoned(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        if self.training:
            steps[0] += 1
            if steps[0] == 5:
                return output[0] * math.nan, output[1]
        return output

    monkeypatch.setattr(fp.PromptedViT, "forward", poisoned)
    model = make_model()
    with pytest.raises(TrainingDiverged, match=r"loss is nan at epoch 2, step 2.*lower learning rate") as raised:
        fit(model, colours(40), colours(20, seed=1), RECIPE, out_dir=tmp_path, progress=False)
    lr = RECIPE.lr * RECIPE.lr_factor(4, 3)
    assert (raised.value.epoch, raised.value.step, raised.value.lr) == (2, 2, lr)
    assert isinstance(raised.value, FloatingPointError)
    event = read_log(tmp_path)[-1]
    assert (event["event"], event["epoch"], event["step"], event["lr"]) == ("diverged", 2, 2, lr)
    saved = fp.PromptedViT.from_pretrained(make_model().backbone, tmp_path / "best")
    assert_same(weights(saved), weights(model))
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    assert model.backbone.dtype == torch.float32


def test_a_learning_rate_that_is_too_high_diverges(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    recipe = Recipe(epochs=3, batch_size=8, lr=1e38, optimizer="sgd", warmup_epochs=0, dtype="float32")
    with pytest.raises(TrainingDiverged):
        fit(make_model(fp.LinearProbeConfig()), colours(32), colours(8, seed=1), recipe, progress=False)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize(
    ("name", "write"),
    [("last.safetensors", 3), ("log.jsonl", 3), ("adapter_model.safetensors", 2), ("adapter_config.json", 2)],
)
def test_nothing_is_half_written_when_saving_fails(
    name: str,
    write: int,
    error: BaseException,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk or Ctrl-C while the second epoch's state, log or adapter is written."""
    train, val = colours(32), colours(20, seed=1)
    recipe = RECIPE.replace(epochs=2, lr=1e-3)
    fsync, calls = os.fsync, [0]

    def failing(descriptor: int) -> None:
        calls[0] += f".{name}." in os.readlink(f"/proc/self/fd/{descriptor}")
        if calls[0] == write:
            calls[0] = -100
            raise error
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(type(error), match=f"could not write .*{name}" if isinstance(error, OSError) else None):
        fit(make_model(), train, val, recipe, out_dir=tmp_path, progress=False)
    monkeypatch.setattr(os, "fsync", fsync)
    assert not [file for file in every_file(tmp_path) if file.endswith(".tmp")]
    read_log(tmp_path)
    fp.PromptedViT.from_pretrained(make_model().backbone, tmp_path / "best")
    model, whole = make_model(), make_model()
    fit(model, train, val, recipe, out_dir=tmp_path, progress=False)
    fit(whole, train, val, recipe, progress=False)
    assert_same(weights(model), weights(whole))


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda x, y: (x[:0], y[:0]), ValueError, "{} must not be empty"),
        (lambda x, y: (x, y + 1), ValueError, "{} must have labels from 0 to 3"),
        (lambda x, y: (x, y - 1), ValueError, "{} must have labels from 0 to 3 .*, got -1"),
        (lambda x, y: (x, y.float()), TypeError, "{} must have integer labels"),
        (lambda x, y: (x[:, :2], y), ValueError, "{} must have images of shape"),
        (lambda x, y: (x[:, :, :16], y), ValueError, "images must be 32 x 32 pixels"),
        (lambda x, y: (x.int(), y), TypeError, "{} must have uint8"),
        (lambda x, y: (x, y[:-1]), ValueError, "{} must have one label per image, got 40 images and 39 labels"),
        (
            lambda x, y: (torch.where(x == x[5, 0, 0, 0], math.nan, x.float()), y),
            ValueError,
            "{} must have finite pixels",
        ),
        (lambda x, y: x, TypeError, "{} must be a Dataset"),
        (lambda x, y: TensorDataset(x[:0], y[:0]), ValueError, "{} must not be empty"),
        (lambda x, y: TensorDataset(x, y + 1), ValueError, r"{}\[3\] must have a label from 0 to 3"),
        (lambda x, y: TensorDataset(x.double() * math.inf, y), ValueError, r"{}\[0\] must have finite pixels"),
        (lambda x, y: TensorDataset(x), TypeError, r"{}\[0\] must be an \(image, label\) pair"),
        (lambda x, y: TensorDataset(x, y.float()), TypeError, r"{}\[0\] must have an integer label"),
        (lambda x, y: Uneven(x, y), ValueError, r"{}\[7\] must have the shape and dtype"),
        (lambda x, y: DataLoader(TensorDataset(x, y), 64, drop_last=True), ValueError, "{} yields no batch"),
    ],
)
@pytest.mark.parametrize("which", ["train", "val"])
def test_bad_data_is_refused_before_training(
    which: str,
    damage: Callable[..., Any],
    error: type[Exception],
    message: str,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
) -> None:
    data = {"train": colours(40), "val": colours(40, seed=1)}
    data[which] = damage(*data[which])
    model = make_model()
    before = weights(model)
    with pytest.raises(error, match=message.format(which)):
        fit(model, data["train"], data["val"], RECIPE, out_dir=tmp_path / "run", progress=False)
    assert_same(weights(model), before)
    assert not (tmp_path / "run").exists()


class Uneven(Dataset[Any]):
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index, :, : 16 if index == 7 else 32], int(self.labels[index])


def test_other_wrong_arguments(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    data = colours(8)
    with pytest.raises(TypeError, match="recipe"):
        fit(make_model(), data, data, {"lr": 1e-3})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="num_classes"):
        fit(make_model(num_classes=None), data, data, RECIPE)
    text = fp.PromptedViT(make_model().backbone, fp.LinearProbeConfig(), num_classes=4, head="text",
                          class_embeddings=torch.randn(4, 48))  # fmt: skip
    with pytest.raises(ValueError, match="model must have trainable parameters"):
        fit(text, data, data, RECIPE)


class Augmented(Dataset[Any]):
    """Flips images by all three global generators, and remembers the epochs it was told."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels, self.epochs = images, labels, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = self.images[index]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        if np.random.rand() < 0.5:
            image = image.flip(-2)
        return image, int(self.labels[index])


def test_datasets_are_told_the_epoch_and_augmentation_resumes(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    val = colours(20, seed=1)
    train = Augmented(*colours(33))
    whole = make_model(fp.LinearProbeConfig())
    fit(whole, train, val, RECIPE, out_dir=tmp_path / "whole", progress=False)
    assert [epoch for epoch in train.epochs if epoch][-2:] == [1, 2]

    class Dying(Augmented):
        def set_epoch(self, epoch: int) -> None:
            if epoch == 2:
                raise Killed

    with pytest.raises(Killed):
        fit(make_model(fp.LinearProbeConfig()), Dying(*colours(33)), val, RECIPE, out_dir=tmp_path / "killed",
            progress=False)  # fmt: skip
    again = make_model(fp.LinearProbeConfig())
    fit(again, train, val, RECIPE, out_dir=tmp_path / "killed", progress=False)
    assert_same(weights(again), weights(whole))


def test_a_shuffling_loader_resumes(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    val = colours(20, seed=1)

    def loader() -> Any:
        return DataLoader(TensorDataset(*colours(33)), 16, shuffle=True)

    whole = make_model()
    fit(whole, loader(), val, RECIPE, out_dir=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        save = fp.PromptedViT.save_pretrained

        def die(self: Any, directory: Path) -> None:
            save(self, directory)
            raise Killed

        patch.setattr(fp.PromptedViT, "save_pretrained", die)
        with pytest.raises(Killed):
            fit(make_model(), loader(), val, RECIPE, out_dir=tmp_path / "killed", progress=False)
    again = make_model()
    fit(again, loader(), val, RECIPE, out_dir=tmp_path / "killed", progress=False)
    assert_same(weights(again), weights(whole))


def test_a_single_last_image_joins_the_batch_before(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    """33 images in batches of 16: BatchNorm of 1 x 1 maps cannot take the last one alone."""
    model = make_model(PGN)
    sizes: list[int] = []
    draw = model.draw

    def record(batch: int) -> Any:
        sizes.append(batch)
        return draw(batch)

    model.draw = record
    result = fit(model, colours(33), colours(8, seed=1), RECIPE.replace(epochs=1, dtype="float32"), progress=False)
    assert 17 in sizes
    assert math.isfinite(result.history[0]["train_loss"])


def test_the_linear_probe_reads_each_image_once(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = colours(40), colours(20, seed=1)
    recipe = RECIPE.replace(epochs=5, dtype="float32")
    counted = [0]
    features = fp.FrozenViT.check_images

    def count(self: Any, images: torch.Tensor) -> None:
        counted[0] += len(images)
        features(self, images)

    monkeypatch.setattr(fp.FrozenViT, "check_images", count)
    cached = make_model(fp.LinearProbeConfig())
    fit(cached, train, val, recipe, progress=False)
    assert counted[0] == 40 + 20 + 4  # and two trial images of each
    counted[0] = 0
    plain = make_model(fp.LinearProbeConfig())
    fit(plain, DataLoader(TensorDataset(*train), 16), val, recipe, progress=False)
    assert counted[0] > 5 * 60


def test_the_head_can_start_as_the_probe(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    train, val = colours(64), colours(40, seed=1)
    recipe = RECIPE.replace(epochs=1, lr=1e-9, dtype="float32")
    accuracies = {}
    for start in ("default", "probe"):
        result = fit(make_model(), train, val, recipe.replace(head_init=start), progress=False)
        accuracies[start] = result.best_val_accuracy
    assert accuracies["probe"] == 1.0
    assert accuracies["default"] < 0.8


def test_a_head_that_does_not_train_is_left_as_it_is_by_the_probe_start(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    model = fp.PromptedViT(make_model().backbone, fp.VPTConfig(num_prompts=2), num_classes=4, head="text",
                           class_embeddings=torch.randn(4, 48))  # fmt: skip
    before = {name: tensor.clone() for name, tensor in model.head.state_dict().items()}
    prompts = model.generator.static.embeddings.detach().clone()
    fit(model, colours(32), colours(8, seed=1), RECIPE.replace(epochs=1, head_init="probe"), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.head.state_dict().items())
    assert not torch.equal(model.generator.static.embeddings, prompts)


def test_other_validation_images_are_another_run(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = RECIPE.replace(epochs=1)
    fit(make_model(), colours(16), colours(8, seed=1), recipe, tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"\(val\.num_images is 12, was 8\)"):
        fit(make_model(), colours(16), colours(12, seed=1), recipe, tmp_path, progress=False)


def test_progress_shows_loss_accuracy_speed_and_time_left(
    make_model: Callable[..., Any], colours: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make_model(), colours(32), colours(8, seed=1), RECIPE.replace(epochs=2))
    shown = capsys.readouterr().err
    assert "64/64" in shown and "img/s" in shown and "epoch 2/2" in shown  # noqa: PT018
    assert "loss" in shown and "acc" in shown and "val" in shown  # noqa: PT018
    fit(make_model(), colours(32), colours(8, seed=1), RECIPE.replace(epochs=2), progress=False)
    assert capsys.readouterr().err == ""


def test_dtype_of_the_backbone_while_training(
    make_model: Callable[..., Any], colours: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[torch.dtype] = set()
    forward = fp.PromptedViT.forward

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(self.backbone.dtype)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(fp.PromptedViT, "forward", record)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        seen.clear()
        model = make_model()
        fit(model, colours(16), colours(8), RECIPE.replace(epochs=1, dtype=name), progress=False)
        assert seen == {dtype}
        assert {p.dtype for p in model.generator.parameters()} == {torch.float32}


def test_validation_counts_the_images_that_its_loader_gives(
    colours: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    """A loader that drops its last batch: the accuracy is over the others, not over the dataset."""
    data = TensorDataset(*colours(10))
    model = make_model()
    loader: Any = DataLoader(data, 4, drop_last=True)
    result = fit(model, data, loader, RECIPE.replace(dtype="float32"), progress=False)
    first = TensorDataset(*(part[:8] for part in colours(10)))
    assert result.best_val_accuracy == fp.evaluate(model, first).accuracy
    assert result.best_val_loss == pytest.approx(fp.evaluate(model, first).loss, rel=1e-5)


@pytest.mark.parametrize("form", ["pair", "loader", "recipe"])
def test_a_single_image_that_batch_norm_cannot_take_is_refused_before_any_work(
    colours: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path, form: str
) -> None:
    images, labels = colours(6)
    train: Any = {
        "pair": (images[:1], labels[:1]),
        "loader": DataLoader(TensorDataset(images, labels), 1),
        "recipe": (images, labels),
    }[form]
    recipe = RECIPE.replace(batch_size=1) if form == "recipe" else RECIPE
    with pytest.raises(ValueError, match=r"batch_size must be at least 2 .*'pgn'"):
        fit(make_model(PGN), train, (images, labels), recipe, out_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    assert fit(make_model(), train, (images, labels), recipe, progress=False).best_epoch > 0


def test_what_is_no_model_and_no_directory_is_named(
    colours: Callable[..., Any], make_model: Callable[..., Any], tmp_path: Path
) -> None:
    data = colours(4)
    with pytest.raises(TypeError, match="model must be a PromptedViT, got Linear"):
        fit(torch.nn.Linear(2, 2), data, data, progress=False)  # type: ignore[arg-type]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="out_dir must be a directory"):
        fit(make_model(), data, data, RECIPE, out_dir=tmp_path / "file", progress=False)


def test_an_adapter_knows_the_classes_and_the_preprocessing_of_its_data(
    make_model: Callable[..., Any], tmp_path: Path
) -> None:
    for name in ("cat", "dog", "emu", "fox"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (40, 32), (i, len(name), 99)).save(tmp_path / "data" / name / f"{i}.png")
    data = fp.load_data(tmp_path / "data", image_size=32, resize="squash")
    model = make_model(fp.VPTConfig(num_prompts=2))
    fit(model, data.train, data.val, RECIPE.replace(epochs=1), out_dir=tmp_path / "run", progress=False)
    saved = fp.PromptedViT.from_pretrained(model.backbone, tmp_path / "run" / "best")
    for found in (model, saved):
        assert found.class_names == ["cat", "dog", "emu", "fox"]
        assert found.preprocessing == Preprocessing("squash")


STEP = Recipe(epochs=1, batch_size=8, lr=0.5, optimizer="sgd", warmup_epochs=0, dtype="float32", select_by="last")


@pytest.mark.parametrize(
    ("decay", "left_out"),
    [
        ("matrices", lambda name, tensor: tensor.ndim < 2),
        ("all", lambda name, tensor: False),
        ("all but head bias", lambda name, tensor: name == "head.bias"),
    ],
)
def test_what_decays_is_what_the_recipe_says(
    decay: str, left_out: Callable[..., bool], make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    """One step of SGD moves a tensor that decays by lr · strength · tensor more."""
    trained = []
    for strength in (0.0, 0.1):
        torch.manual_seed(0)
        model = make_model(fp.VAPTConfig(num_prompts=2))
        with torch.no_grad():
            for name, parameter in sorted(model.trainable_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
        start = {name: tensor.detach().clone() for name, tensor in model.trainable_parameters()}
        recipe = STEP.replace(decay=decay, weight_decay=strength)
        fit(model, colours(8), colours(4, seed=1), recipe, progress=False)
        trained.append(dict(model.trainable_parameters()))
    assert {"head.bias", "generator.adaptive.0.norm.bias"} <= start.keys()
    for name, tensor in start.items():
        expected = torch.zeros_like(tensor) if left_out(name, tensor) else 0.5 * 0.1 * tensor
        torch.testing.assert_close(trained[0][name] - trained[1][name], expected, rtol=1e-3, atol=1e-5)


def test_the_first_epoch_of_vpts_recipe_runs_at_rate_0(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = fp.paper_recipe("vpt-paper", batch_size=8).adjusted({"epochs": 3, "warmup_epochs": 2})
    torch.manual_seed(0)
    model = make_model(fp.VPTConfig(num_prompts=2))
    prompts = model.generator.static.embeddings.detach().clone()
    result = fit(model, colours(16), colours(8, seed=1), recipe.replace(epochs=2), progress=False)
    assert [epoch["lr"] for epoch in result.history] == [0.0, recipe.lr / 2]
    assert result.best_epoch == 2
    assert not torch.equal(model.generator.static.embeddings, prompts)
    model = make_model(fp.VPTConfig(num_prompts=2))
    prompts = model.generator.static.embeddings.detach().clone()
    fit(model, colours(16), colours(8, seed=1), recipe.replace(epochs=1, warmup_epochs=1), progress=False)
    assert torch.equal(model.generator.static.embeddings, prompts)
    torch.testing.assert_close(model.head.bias, torch.full((4,), -math.log(99)))  # the head starts as theirs, too
    assert model.head.weight.std().item() == pytest.approx(math.sqrt(2 / 4), rel=0.15)


def test_the_last_epoch_is_kept_where_the_recipe_says_so(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    """At a rate that ruins the model the last epoch is not the best one."""
    recipe = STEP.replace(epochs=4, lr=30.0, batch_size=16)
    result = fit(make_model(), colours(32), colours(16, seed=1), recipe, tmp_path / "last", progress=False)
    losses = [epoch["val_loss"] for epoch in result.history]
    assert result.best_epoch == 4
    assert result.best_val_loss == losses[3]
    best = fit(make_model(), colours(32), colours(16, seed=1), recipe.replace(select_by="loss"), progress=False)
    assert best.best_epoch == 1 + losses.index(min(losses)) != 4


def test_head_and_backbone_have_rates_of_their_own(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    steps = {}
    for name, rates in {"one": {}, "own": {"head_lr": 0.05, "backbone_lr": 0.005}}.items():
        torch.manual_seed(0)
        model = make_model(fp.FullFineTuneConfig())
        start = {key: tensor.detach().clone() for key, tensor in model.trainable_parameters()}
        recipe = STEP.replace(weight_decay=0.0, **rates)
        fit(model, colours(8), colours(4, seed=1), recipe, progress=False)
        steps[name] = {key: tensor.detach() - start[key] for key, tensor in model.trainable_parameters()}
    for key, step in steps["one"].items():
        share = 0.1 if key.startswith("head.") else 0.01
        torch.testing.assert_close(steps["own"][key], share * step, rtol=2e-2, atol=1e-6)


SAVED = Path(__file__).parent.parent / "golden" / "saved"
"""`run-finished` and `run-interrupted` (after two of four epochs) are run directories that commit 5c9eef2 wrote."""


def saved_run(name: str, directory: Path) -> dict[str, Any]:
    """The arguments of the `fit` that wrote a run of `SAVED`, whose copy is in `directory`."""
    shutil.copytree(SAVED / name, directory)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0).eval()
    vit.load_state_dict(load_file(SAVED / "backbone.safetensors"))
    model = fp.PromptedViT(fp.FrozenViT(vit), fp.VPTConfig(num_prompts=2), 3, class_names=["ant", "bee", "cat"])
    with torch.no_grad():
        for p in (*model.generator.parameters(), *model.head.parameters()):
            p.copy_(torch.arange(p.numel()).reshape(p.shape).sin() / 10)

    def data(count: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 3
        images = torch.arange(count * 3 * 16 * 16).reshape(count, 3, 16, 16) * step
        return ((images + 60 * labels[:, None, None, None]) % 251).to(torch.uint8), labels

    return {
        "model": model, "train": data(24, 7), "val": data(12, 11), "out_dir": directory, "progress": False,
        "recipe": Recipe(epochs=4, batch_size=8, lr=0.01, head_lr=0.02, warmup_epochs=1.0, dtype="float32"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["run-finished", "run-interrupted"])
def test_a_run_of_an_earlier_version_is_returned_or_goes_on(name: str, tmp_path: Path) -> None:
    arguments = saved_run(name, tmp_path / "run")
    with pytest.warns(UserWarning, match="of an earlier version, which recorded neither its images nor its initial"):
        result = fit(**arguments)
    expected = [json.loads(line) for line in (SAVED / "run-finished" / "log.jsonl").read_text().splitlines()][1:-1]
    assert len(result.history) == 4
    for found, wanted in zip(result.history, expected, strict=True):
        for key in ("train_loss", "val_loss", "lr"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-4)
    assert fit(**arguments) == result
    if name == "run-interrupted":  # written by this version now, so that images count
        images, labels = arguments["train"]
        with pytest.raises(ValueError, match=r"train\.images changed"):
            fit(**{**arguments, "train": (images + 1, labels)})
    with pytest.raises(ValueError, match=r"recipe\.lr is 0\.5, was 0\.01"):
        fit(**{**saved_run(name, tmp_path / "other"), "lr": 0.5})


@contextlib.contextmanager
def killed_at(target: str, call: int, after: bool = False) -> Iterator[None]:
    """What runs inside ends with `Killed` at the `call`-th call of a method, before or after that did its work."""
    owner, _, name = target.rpartition(".")
    module, _, cls = owner.rpartition(".")
    found = getattr(importlib.import_module(module), cls)
    original, left = getattr(found, name), [call]

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not after:
            raise Killed
        result = original(self, *args, **kwargs)
        if left[0] == 0:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(found, name, dying)
        with pytest.raises(Killed):
            yield


CHANGED: dict[str, tuple[Callable[..., Any], str]] = {
    "train": (lambda a: {**a, "train": (a["train"][0].flip(3), a["train"][1])}, r"train\.images changed"),
    "val": (lambda a: {**a, "val": (a["val"][0].flip(3), a["val"][1])}, r"val\.images changed"),
    "weights": (lambda a: {**a, "model": a["make"](seed=3)}, "initial_weights changed"),
    "std": (lambda a: {**a, "std": (0.1, 0.1, 0.1)}, r"std is \[0\.1, 0\.1, 0\.1\], was \[0\.229"),
}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("finished", [True, False])
def test_what_changed_is_named_and_nothing_is_returned_trained_or_written(
    change: str,
    finished: bool,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(make: Any = None, std: Any = None, model: Any = None, resume: bool = True, **data: Any) -> Any:
        model = make_model() if model is None else model
        if std is not None:
            model.backbone.spec = dataclasses.replace(model.backbone.spec, std=std)
        return fit(model, recipe=RECIPE, out_dir=tmp_path, progress=False, resume=resume, **data)

    arguments = {"train": colours(16), "val": colours(8, seed=1)}
    if finished:
        run(**arguments)
    else:
        with killed_at("fastprompt.train.loop.Loop.train", 2):
            run(**arguments)
    before = every_file(tmp_path)
    alter, message = CHANGED[change]
    changed = alter({**arguments, "make": make_model})
    with pytest.raises(ValueError, match=rf"holds another run \({message}.*--no-resume"):
        run(**changed)
    assert every_file(tmp_path) == before
    changed = alter({**arguments, "make": make_model})
    assert len(run(**changed, resume=False).history) == 3


def test_images_that_cannot_be_compared_are_said_once_there_is_a_directory(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    class Noisy(Augmented):
        noise = np.random.default_rng(0)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return self.images[index] ^ int(self.noise.integers(255)), int(self.labels[index])

    train, val, recipe = Noisy(*colours(8)), colours(8, seed=1), RECIPE.replace(epochs=1, dtype="float32")
    fit(make_model(), train, val, recipe, progress=False)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="train yields different images each time it is read"):
        result = fit(make_model(), train, val, recipe, tmp_path, progress=False)
    with pytest.warns(UserWarning, match="train yields different images each time it is read"):
        assert fit(make_model(), train, val, recipe, tmp_path, progress=False) == result


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_continued_run_chooses_as_the_first_process_did(
    call: int,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """oneDNN's products are a little off here, so that weights tell which were taken; killed in each epoch."""
    train, val, recipe = colours(40), colours(20, seed=1), RECIPE.replace(dtype="float32")
    monkeypatch.setattr(linear, "_product", lambda x, w, b: torch.nn.functional.linear(x, w, b) * 1.001)
    monkeypatch.setattr(linear._OneDNNLinear, "apply", lambda x, w, b: torch.nn.functional.linear(x, w, b) * 1.001)

    def measured(product: str, kernels: float) -> None:
        """What the stopwatch finds in the process that starts now."""
        monkeypatch.setattr(linear, "faster_product", lambda: product)
        monkeypatch.setattr(dispatch, "measured", {})
        monkeypatch.setattr(dispatch, "seconds_on_cpu", lambda _: kernels if next(turn) % 2 == 0 else 1.0)

    ends = {}
    for first, second in (("oneDNN", "MKL"), ("MKL", "oneDNN")):
        turn = itertools.count()
        measured(first, 0.5 if first == "MKL" else 2.0)
        whole = make_model()
        fit(whole, train, val, recipe, out_dir=tmp_path / first / "whole", progress=False)
        measured(first, 0.5 if first == "MKL" else 2.0)
        with killed_at("fastprompt.train.loop.Loop.validate", call, after=True):
            fit(make_model(), train, val, recipe, out_dir=tmp_path / first / "killed", progress=False)
        measured(second, 2.0 if first == "MKL" else 0.5)
        again = make_model()
        fit(again, train, val, recipe, out_dir=tmp_path / first / "killed", progress=False)
        assert_same(weights(again), weights(whole))
        saved = load_state(tmp_path / first / "killed" / "last.safetensors")[1]["choices"]
        assert saved == load_state(tmp_path / first / "whole" / "last.safetensors")[1]["choices"]
        assert saved[linear.PRODUCTS] == first
        ends[first] = weights(whole)
    assert any(not torch.equal(ends["MKL"][name], tensor) for name, tensor in ends["oneDNN"].items())


def test_a_deterministic_run_needs_no_stopwatch(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(linear, "faster_product", never)
    monkeypatch.setattr(dispatch, "seconds_on_cpu", never)
    monkeypatch.setattr(dispatch, "measured", {})
    seen: list[bool] = []
    monkeypatch.setattr(
        fp.PromptedViT, "train", lambda self, mode=True: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    arguments: dict[str, Any] = {"out_dir": tmp_path, "progress": False, "dtype": "float32", "epochs": 1}
    fit(make_model(), colours(8), colours(8), deterministic=True, **arguments)
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert load_state(tmp_path / "last.safetensors")[1]["choices"] == {}
    with pytest.raises(AssertionError, match="something was measured"):
        fit(make_model(), colours(8), colours(8), resume=False, **arguments)


def test_a_run_that_goes_on_elsewhere_says_so(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    with killed_at("fastprompt.train.loop.Loop.train", 2):
        fit(make_model(), train, val, recipe, tmp_path, progress=False)
    elsewhere = {**environment(torch.device("cpu")), "threads": 64}
    monkeypatch.setattr("fastprompt.train.run.environment", lambda _: elsewhere)
    with pytest.warns(UserWarning, match="last bits may differ: threads is 64, was 1"):
        fit(make_model(), train, val, recipe, tmp_path, progress=False)
    assert read_log(tmp_path)[2] == {"event": "resume", "epoch": 1, "environment": elsewhere}


def test_a_damaged_state_stops_the_run_and_is_not_touched(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    result = fit(make_model(), train, val, recipe, tmp_path, progress=False)
    path = tmp_path / "last.safetensors"
    whole = path.read_bytes()
    for place in (9, len(whole) // 2, len(whole) - 3):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.safetensors cannot be read, it is damaged"):
            fit(make_model(), train, val, recipe, tmp_path, progress=False)
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    assert fit(make_model(), train, val, recipe, tmp_path, progress=False) == result


def test_rows_and_the_end_are_in_the_log_when_the_run_is_killed_between_state_and_log(
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    write = "fastprompt.train.directory.RunDirectory.write_log"
    for call in (2, 2):  # after the first epoch's state, then after that of the second
        with killed_at(write, call):
            fit(make_model(), train, val, recipe, tmp_path, progress=False)
    with killed_at(write, 3):  # its own "resume", the third epoch, the end
        fit(make_model(), train, val, recipe, tmp_path, progress=False)
    assert read_log(tmp_path)[-1]["event"] == "epoch"
    best = tmp_path / "best" / ".adapter_model.safetensors.1-ab.tmp"
    best.write_bytes(b"half")
    result = fit(make_model(), train, val, recipe, tmp_path, progress=False)
    events = [event["event"] for event in read_log(tmp_path)]
    assert events == ["start", "epoch", "resume", "epoch", "resume", "epoch", "end"]
    assert not best.exists()
    assert len(result.history) == 3


def test_rows_of_a_run_that_was_resumed_and_killed_again_stay(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    for call in (2, 1, 1):
        with killed_at("fastprompt.train.loop.Loop.train", call):
            fit(make_model(), train, val, recipe, tmp_path, progress=False)
    fit(make_model(), train, val, recipe, tmp_path, progress=False)
    events = [event["event"] for event in read_log(tmp_path)]
    assert events == ["start", "epoch", "resume", "resume", "resume", "epoch", "epoch", "end"]


@pytest.mark.parametrize("damage", ["nothing", "log", "best"])
def test_a_finished_run_on_a_read_only_file_system_is_returned(
    damage: str,
    make_model: Callable[..., Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    expected = fit(make_model(), train, val, recipe, tmp_path, progress=False)
    if damage == "log":
        (tmp_path / "log.jsonl").write_text("")
    if damage == "best":
        (tmp_path / "best" / "adapter_config.json").unlink()
    before = every_file(tmp_path)
    real = os.open, open

    def refuse(path: Any) -> None:
        if str(path).startswith(str(tmp_path)):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def read_only_os(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            refuse(path)
        return real[0](path, flags, *rest, **more)

    def read_only(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if set(mode) & set("wxa+"):
            refuse(path)
        return real[1](path, mode, *rest, **more)

    monkeypatch.setattr(os, "open", read_only_os)
    monkeypatch.setattr("builtins.open", read_only)
    assert fit(make_model(), train, val, recipe, tmp_path, progress=False) == expected
    said = [str(warning.message) for warning in recwarn.list]
    assert len(said) == (damage != "nothing")
    assert all("holds a finished run with an incomplete log or best/" in text for text in said)
    with pytest.raises(OSError, match=r"out_dir .* cannot be written, and holds no finished run"):
        fit(make_model(), train, val, recipe, tmp_path, resume=False, progress=False)
    assert every_file(tmp_path) == before


def test_a_second_run_in_the_directory_is_refused_while_the_first_writes(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val, recipe = colours(16), colours(8, seed=1), RECIPE.replace(dtype="float32")
    one_epoch, refused = Loop.train, []

    def contend(self: Loop, *args: Any) -> Any:
        with pytest.raises(fp.DirectoryInUse, match=f"process {os.getpid()}"):
            fit(make_model(fp.LinearProbeConfig()), train, val, recipe, tmp_path, resume=False, progress=False)
        refused.append(1)
        return one_epoch(self, *args)

    monkeypatch.setattr(Loop, "train", contend)
    model = make_model()
    fit(model, train, val, recipe, tmp_path, progress=False)
    assert len(refused) == 3
    assert_same(weights(fp.PromptedViT.from_pretrained(model.backbone, tmp_path / "best")), weights(model))


UNFROZEN: dict[str, Callable[[str], bool]] = {
    "last block": lambda name: name.startswith("blocks.1."),
    "norms": lambda name: "norm" in name,
    "biases": lambda name: name.endswith("bias"),
    "one": lambda name: name == "cls_token",
}


@pytest.mark.parametrize("part", UNFROZEN)
def test_an_unfrozen_part_of_the_backbone_is_refused_by_name(
    part: str, make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    model, data = make_model(), colours(8)
    picked = [name for name, p in model.backbone.named_parameters() if UNFROZEN[part](name)]
    for name in picked:
        model.backbone.get_parameter(name).requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = rf"got {len(picked)} such parameters: backbone\.{picked[0]}.*FullFineTuneConfig"
    with pytest.raises(ValueError, match=message):
        fit(model, data, data, RECIPE, tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match=rf"backbone\.{picked[0]}"):
        model.save_pretrained(tmp_path / "adapter")
    assert_same(dict(model.state_dict()), before)
    assert not list(tmp_path.iterdir())
    model.backbone.requires_grad_(False)
    fit(model, data, data, RECIPE.replace(epochs=1), tmp_path / "run", progress=False)


def test_a_module_that_the_adapter_does_not_know_is_refused(
    make_model: Callable[..., Any], colours: Callable[..., Any]
) -> None:
    model, data = make_model(), colours(8)
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"got 2 such parameters: extra\.weight, extra\.bias"):
        fit(model, data, data, RECIPE, progress=False)


def test_a_class_name_that_is_no_utf8_is_refused_before_training(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    names = ["ant", "bee", os.fsdecode(b"caf\xe9"), "dog"]
    model = fp.PromptedViT(make_model().backbone, fp.VPTConfig(num_prompts=2), 4, class_names=names)
    with pytest.raises(ValueError, match=r"class_names\[2\] must be text that UTF-8 can encode, got 'caf.udce9'"):
        fit(model, colours(8), colours(8), RECIPE, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_fields_of_the_recipe_change_the_methods_own(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    data = colours(16)
    fit(make_model(), data, data, out_dir=tmp_path, progress=False, epochs=2, lr=2e-3)
    own = default_recipe("vpt")
    expected = own.replace(epochs=2, lr=2e-3, warmup_epochs=own.warmup_epochs * 2 / own.epochs)
    assert (own.min_steps, expected.min_steps) == (200, 0)
    assert json.loads((tmp_path / "recipe.json").read_text()) == expected.to_dict()
    assert expected.label_smoothing > 0
    fit(make_model(), data, data, RECIPE, tmp_path, resume=False, progress=False, epochs=1)
    assert json.loads((tmp_path / "recipe.json").read_text()) == RECIPE.replace(epochs=1).to_dict()
    for wrong, error, message in (
        ({"epoch": 3}, ArgumentError, r"epoch must be a field of the recipe \(epochs, .*got 3; did you mean epochs\?"),
        ({"lr": -1}, ValueError, "lr must be in"),
        ({"epochs": "3"}, TypeError, "epochs must be an integer"),
    ):
        with pytest.raises(error, match=message):
            fit(make_model(), data, data, progress=False, **wrong)


def test_device_dtype_sizes_and_parameters_are_said_at_the_start(
    make_model: Callable[..., Any], colours: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model()
    fit(model, colours(32), colours(8, seed=1), epochs=1, dtype="float32")
    lines = capsys.readouterr().err.splitlines()
    trained = model.num_trainable()["total"]
    assert lines[0] == (
        f"training vpt on cpu in float32: 32 training and 8 validation images, {trained:,} trained parameters, "
        "1 epochs of 2 steps"
    )
    assert lines[1].startswith("chosen by timing and kept for this run: ")
    assert "float32 products by " in lines[1]


def test_the_number_format_is_the_one_that_the_processor_has(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = colours(8)
    for fast, expected in ((False, "float32"), (True, "bfloat16")):
        monkeypatch.setattr("fastprompt.train.evaluate.bfloat16_is_fast", lambda _, fast=fast: fast)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(make_model(), data, data, out_dir=tmp_path / expected, progress=False, epochs=1)
        assert read_log(tmp_path / expected)[0]["backbone_dtype"] == expected
    monkeypatch.setattr("fastprompt.train.evaluate.bfloat16_is_fast", lambda _: False)
    with pytest.warns(UserWarning, match="this CPU has no bfloat16 instructions"):
        fit(make_model(), data, data, progress=False, epochs=1, dtype="bfloat16")
    with pytest.raises(ValueError, match="backbone_dtype is 'float32', was 'bfloat16'"):
        fit(make_model(), data, data, out_dir=tmp_path / "bfloat16", progress=False, epochs=1)
