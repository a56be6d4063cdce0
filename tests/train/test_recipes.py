from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise

import pytest
import torch

import fastprompt as fp
from fastprompt.generators import published_recipes
from fastprompt.train.recipes import Recipe, adjusted_recipe, checkpoint_interval, default_recipe, paper_recipe

CONFIGS = [
    fp.PGNConfig(), fp.V2APTConfig(), fp.VAPTConfig(), fp.VPTConfig(), fp.FreePromptsConfig(),
    fp.PixelPromptConfig(), fp.LinearProbeConfig(), fp.FullFineTuneConfig(),
]  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("epochs", 0, ValueError), ("epochs", 2.0, TypeError), ("batch_size", 0, ValueError),
        ("batch_size", True, TypeError), ("lr", 0.0, ValueError), ("lr", float("nan"), ValueError),
        ("lr", float("inf"), ValueError), ("lr", "1e-3", TypeError), ("head_lr", -1.0, ValueError),
        ("weight_decay", -1e-4, ValueError), ("momentum", 1.0, ValueError), ("optimizer", "adam", ValueError),
        ("warmup_epochs", -1, ValueError), ("warmup_epochs", 31, ValueError),
        ("min_lr_ratio", 1.5, ValueError),
        ("clip_grad", 0.0, ValueError), ("label_smoothing", 1.0, ValueError),
        ("kl_warmup_epochs", -1, ValueError),
        ("seed", -1, ValueError), ("seed", 0.5, TypeError), ("dtype", "float16", ValueError),
        ("head_init", "zeros", ValueError), ("decay", "bias", ValueError), ("schedule", "batch", ValueError),
        ("warmup_floor", 1.5, ValueError), ("backbone_lr", 0.0, ValueError),
        ("select_by", "first", ValueError), ("num_workers", -1, ValueError),
        ("min_steps", -1, ValueError), ("patience", 0, ValueError), ("accumulate", 0, ValueError),
        ("loss", "hinge", ValueError), ("sampling", "random", ValueError), ("class_weights", "inverse", ValueError),
        ("class_weights", (1.0, -1.0), ValueError), ("class_weights", (), ValueError), ("mixup", -0.1, ValueError),
        ("cutmix", float("nan"), ValueError), ("random_erasing", 1.1, ValueError), ("rollbacks", -1, ValueError),
        ("checkpoint_every", "often", ValueError), ("checkpoint_every", "0 steps", ValueError),
        ("checkpoint_every", "1.5 steps", ValueError), ("checkpoint_every", 5, TypeError),
    ],
)  # fmt: skip
def test_every_field_is_checked(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=field):
        Recipe(**{field: value})


def test_dict_round_trip_and_unknown_key() -> None:
    recipe = Recipe(lr=0.3, optimizer="sgd", head_lr=0.1, clip_grad=1.0)
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(ValueError, match="'learning_rate'"):
        Recipe.from_dict({"learning_rate": 0.1})
    with pytest.raises(ValueError, match="'learning_rate'"):
        recipe.replace(learning_rate=0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.lr = 1.0  # type: ignore[misc]


def test_differences_leave_out_what_does_not_change_the_result() -> None:
    assert Recipe(num_workers=2).differences(Recipe()) == {}
    assert Recipe(lr=0.1).differences(Recipe(lr=0.2)) == {"lr": (0.1, 0.2)}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"select_by": "last", "patience": 3}, "patience must be None with select_by='last'"),
        ({"loss": "bce", "label_smoothing": 0.1}, "label_smoothing must be 0.0 with loss='bce'"),
        ({"loss": "bce", "class_weights": "balanced"}, "class_weights must be 'none' with loss='bce'"),
        ({"loss": "mse", "mixup": 0.2}, "mixup must be 0 with loss='mse'"),
        ({"loss": "l1", "sampling": "balanced"}, "sampling must be 'shuffle' with loss='l1'"),
    ],
)
def test_fields_that_do_not_fit_each_other_are_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        Recipe(**fields)  # type: ignore[arg-type]


def test_the_interval_of_checkpoints_is_in_steps_or_minutes() -> None:
    assert checkpoint_interval("epoch") == (math.inf, "steps")
    for text in ("20 steps", "20steps", "20 step"):
        assert checkpoint_interval(text) == (20, "steps")
    for text in ("1.5 minutes", "1.5min", "1.5 minute"):
        assert checkpoint_interval(text) == (1.5, "minutes")


def test_a_small_set_gets_more_epochs_unless_a_number_is_asked_for() -> None:
    recipe = Recipe(epochs=10, min_steps=200, warmup_epochs=1, kl_warmup_epochs=2)
    raised = recipe.with_enough_steps(batches=3)
    assert (raised.epochs, raised.warmup_epochs, raised.kl_warmup_epochs, raised.min_steps) == (67, 6.7, 13.4, 0)
    assert recipe.with_enough_steps(batches=20) == recipe.replace(min_steps=0)
    assert recipe.replace(accumulate=4).with_enough_steps(batches=20).epochs == 40
    assert recipe.replace(epochs=3).with_enough_steps(batches=3).epochs == 3
    assert recipe.adjusted({"epochs": 3}).min_steps == 0
    assert recipe.replace(epochs=3, min_steps=30).with_enough_steps(batches=3).epochs == 10
    assert recipe.replace(lr=0.1).min_steps == 200
    assert default_recipe("vpt").with_enough_steps(batches=2).epochs == 100


def test_a_recipe_of_ones_own_leaves_out_what_the_methods_has() -> None:
    own = default_recipe("vpt")
    left_out = Recipe(epochs=3, label_smoothing=0.2).left_out(own)
    assert left_out["head_lr"] == (None, own.head_lr)
    assert left_out["select_by"] == ("accuracy", "loss")
    assert not {"label_smoothing", "epochs", "min_steps", "num_workers"} & set(left_out)
    assert "min_steps" in Recipe(lr=0.3).left_out(own)
    for derived in (own.replace(lr=0.3), paper_recipe("vpt"), Recipe().replace(lr=0.3), default_recipe("pgn")):
        assert derived.left_out(own) == {}


def test_schedule_warms_up_per_step_and_ends_at_the_minimum() -> None:
    recipe = Recipe(epochs=10, warmup_epochs=2, min_lr_ratio=0.1)
    factors = [recipe.lr_factor(step, steps_per_epoch=5) for step in range(51)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[30] == pytest.approx(0.1 + 0.9 / 2)  # half-way through the cosine
    assert factors[20] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert factors[50] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(factors[10:]))


def test_without_warmup_the_first_step_is_at_the_peak() -> None:
    assert Recipe(warmup_epochs=0).lr_factor(0, 7) == 1.0


def test_kl_factor_rises_linearly() -> None:
    recipe = Recipe(kl_warmup_epochs=2)
    assert [recipe.kl_factor(step, 2) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Recipe().kl_factor(0, 2) == 1.0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_every_method_has_recipes(config: object) -> None:
    assert default_recipe(config).dtype == "auto"
    assert paper_recipe(config, num_train=800).optimizer in ("sgd", "adamw")


def factors(recipe: Recipe, steps_per_epoch: int = 3) -> list[float]:
    """The rate of every epoch as a share of the peak; the same for all its steps."""
    of_steps = [recipe.lr_factor(step, steps_per_epoch) for step in range(recipe.epochs * steps_per_epoch)]
    of_epochs = of_steps[::steps_per_epoch]
    assert of_steps == [factor for factor in of_epochs for _ in range(steps_per_epoch)]
    return of_epochs


@pytest.mark.parametrize("name", ["vpt-paper", "vapt-paper"])
def test_the_schedule_of_vpt_and_vapt_epoch_by_epoch(name: str) -> None:
    found = factors(paper_recipe(name))
    assert found[:11] == [0.0, 0.1, 0.2, pytest.approx(0.3), 0.4, 0.5, 0.6, pytest.approx(0.7), 0.8, 0.9, 1.0]
    assert found[10:] == pytest.approx([(1 + math.cos(math.pi * t / 90)) / 2 for t in range(90)], abs=1e-15)
    assert found[55] == pytest.approx(0.5)
    assert found[99] == pytest.approx(0.00030458649)  # (1 + cos(89 pi / 90)) / 2


@pytest.mark.parametrize("name", ["pgn-paper", "pgn-paper-adamw", "free-paper"])
def test_the_schedule_of_pgn_is_that_of_torchs_schedulers(name: str) -> None:
    """Warm-up e / 50 but 1 / 50 at first, then torch's cosine to 1 / 100, which their scheduler steps."""
    recipe = paper_recipe(name)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50, recipe.lr / 100)
    expected = [0.02, *(e / 50 for e in range(1, 50))]
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"] / recipe.lr)
        optimizer.step()
        cosine.step()
    assert factors(recipe) == pytest.approx(expected, rel=1e-12)
    assert expected[0] == expected[1] == 0.02
    assert expected[50] == 1.0


def test_published_settings() -> None:
    pgn = paper_recipe(fp.PGNConfig())
    assert (pgn.optimizer, pgn.momentum, pgn.lr, pgn.weight_decay) == ("sgd", 0.9, 0.1, 0.0)
    assert (pgn.epochs, pgn.warmup_epochs, pgn.head_init, pgn.label_smoothing) == (100, 50, "default", 0.0)
    adamw = paper_recipe("pgn-paper-adamw")
    assert adamw == pgn.replace(optimizer="adamw", weight_decay=0.01)
    assert adamw.decay == "all"  # one group, with PyTorch's default
    vapt = paper_recipe(fp.VAPTConfig(), base_lr=50, batch_size=64, weight_decay=1e-4)
    assert (vapt.optimizer, vapt.lr, vapt.momentum, vapt.warmup_epochs, vapt.epochs) == ("sgd", 12.5, 0.9, 10, 100)
    assert (vapt.head_init, vapt.head_lr, vapt.decay, vapt.select_by) == ("vpt", None, "all but head bias", "last")
    assert paper_recipe("vapt-paper").lr == 2.5 * 64 / 256
    assert paper_recipe("vapt-paper").weight_decay == 0.01
    assert paper_recipe("vpt-paper").replace(lr=1, weight_decay=0) == vapt.replace(lr=1, weight_decay=0)
    assert (paper_recipe("vpt-paper", batch_size=128).lr, paper_recipe("vpt-paper").weight_decay) == (0.5, 1e-3)
    pixel = paper_recipe(fp.PixelPromptConfig(), num_train=25_600)
    assert (pixel.lr, pixel.warmup_epochs * 100) == (40, 1000)
    assert [pixel.lr_factor(step, 100) for step in (0, 499, 999)] == [0.001, 0.5, 1.0]


def test_published_searches_and_images() -> None:
    for name in ("vpt-paper", "vapt-paper"):
        found = published_recipes()[name]
        assert found.lrs == (50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05)
        assert found.weight_decays == (0.01, 0.001, 0.0001, 0)
        assert (found.augment, found.resize) == ("none", "squash")
    pgn = published_recipes()["pgn-paper"]
    assert (pgn.lrs, pgn.weight_decays, pgn.augment, pgn.resize) == ((), (), "pgn", "crop")


def test_what_decays() -> None:
    names = {"head.weight": 2, "head.bias": 1, "generator.norm.bias": 1, "generator.mix": 3}
    assert [name for name, axes in names.items() if Recipe().decays(name, axes)] == ["head.weight", "generator.mix"]
    assert all(Recipe(decay="all").decays(name, axes) for name, axes in names.items())
    kept = [name for name, axes in names.items() if not Recipe(decay="all but head bias").decays(name, axes)]
    assert kept == ["head.bias"]


def test_rates_of_parts() -> None:
    names = ("head.weight", "backbone.blocks.0.norm1.bias", "generator.library")
    assert [Recipe(lr=1.0).peak_lr(name) for name in names] == [1.0, 1.0, 1.0]
    recipe = Recipe(lr=1.0, head_lr=2.0, backbone_lr=3.0)
    assert [recipe.peak_lr(name) for name in names] == [2.0, 3.0, 1.0]
    both = default_recipe("pgn", train_backbone=True)
    assert both == default_recipe("pgn").replace(backbone_lr=default_recipe("full").lr)
    assert default_recipe("full", train_backbone=True) == default_recipe("full")


def test_warm_up_by_step_has_a_floor_too() -> None:
    recipe = Recipe(epochs=4, warmup_epochs=2, warmup_floor=0.3)
    assert [recipe.lr_factor(step, 2) for step in range(4)] == [0.3, 0.5, 0.75, 1.0]


def test_a_name_has_the_recipe_of_its_method_and_what_it_changes() -> None:
    assert default_recipe("linear") == default_recipe(fp.LinearProbeConfig())
    assert default_recipe("linear-sgd") == default_recipe("linear").replace(optimizer="sgd")
    assert default_recipe("vpt-shallow") == default_recipe("vpt") == default_recipe(fp.VPTConfig(deep=False))


def test_warm_up_keeps_its_share_of_fewer_epochs() -> None:
    default, short = default_recipe("v2apt"), adjusted_recipe("v2apt", {"epochs": 2})
    assert short.warmup_epochs == pytest.approx(default.warmup_epochs * 2 / default.epochs)
    assert short.kl_warmup_epochs == pytest.approx(default.kl_warmup_epochs * 2 / default.epochs)
    assert adjusted_recipe("v2apt", {"epochs": 2, "warmup_epochs": 1}).warmup_epochs == 1
    with pytest.raises(ValueError, match="learning_rate"):
        adjusted_recipe("v2apt", {"learning_rate": 1})


def test_a_published_recipe_has_a_name() -> None:
    assert paper_recipe("vapt-paper") == paper_recipe("vapt") == paper_recipe(fp.VAPTConfig())
    assert paper_recipe("vpt-paper", batch_size=128, base_lr=25, seed=3) == paper_recipe(
        fp.VPTConfig(deep=False), batch_size=128, base_lr=25, seed=3
    )


def test_what_has_no_recipe_is_refused() -> None:
    with pytest.raises(ValueError, match=r"config must be .* got 'lora'"):
        default_recipe("lora")
    with pytest.raises(TypeError, match=r"config must be one of .* got int"):
        default_recipe(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"published recipe, got 'rgb-pgn'; there are .*pgn-paper"):
        paper_recipe(fp.RGBPGNConfig())
    with pytest.raises(ValueError, match="num_train"):
        paper_recipe(fp.PixelPromptConfig())


def test_the_number_format_is_the_processors_own_and_runs_measure_unless_told_not_to() -> None:
    assert Recipe().dtype == "auto"
    assert Recipe().deterministic is False
    assert Recipe.from_dict({"epochs": 3, "warmup_epochs": 0}).deterministic is False  # of a file without the field
    with pytest.raises(TypeError, match="deterministic must be True or False, got 'yes'"):
        Recipe(deterministic="yes")  # type: ignore[arg-type]
