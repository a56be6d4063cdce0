from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest

import fastprompt as fp
from fastprompt.train.recipes import Recipe, adjusted_recipe, default_recipe, paper_recipe

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
        ("head_init", "zeros", ValueError), ("num_workers", -1, ValueError),
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
    assert default_recipe(config).dtype == "bfloat16"
    assert paper_recipe(config, num_train=800).optimizer in ("sgd", "adamw")


def test_published_settings() -> None:
    pgn = paper_recipe(fp.PGNConfig())
    assert (pgn.optimizer, pgn.lr, pgn.weight_decay, pgn.warmup_epochs) == ("sgd", 0.1, 0.0, 50)
    vapt = paper_recipe(fp.VAPTConfig(), base_lr=50, batch_size=64, weight_decay=1e-4)
    assert (vapt.lr, vapt.momentum, vapt.warmup_epochs, vapt.epochs) == (12.5, 0.9, 10, 100)
    pixel = paper_recipe(fp.PixelPromptConfig(), num_train=25_600)
    assert (pixel.lr, pixel.warmup_epochs * 100) == (40, 1000)


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
