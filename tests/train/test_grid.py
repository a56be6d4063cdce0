from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastprompt as fp
from fastprompt.train import grid
from fastprompt.train.fit import TrainingDiverged
from fastprompt.train.grid import (
    best_learning_rate,
    paired_difference,
    run_grid,
    select_learning_rate,
    summarise_seeds,
)
from fastprompt.train.recipes import Recipe

RECIPE = Recipe(epochs=2, batch_size=16, warmup_epochs=0, dtype="float32", optimizer="sgd")
LRS, SEEDS = (1e-6, 0.3), (0, 1)


@pytest.fixture
def make_probe(make_model: Callable[..., Any]) -> Callable[[int], Any]:
    return lambda seed: make_model(fp.LinearProbeConfig(), seed=seed)


def test_every_run_is_made_and_kept(
    make_probe: Callable[[int], Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(64), colours(40, seed=1)
    results = run_grid(make_probe, train, val, RECIPE, LRS, SEEDS, tmp_path, progress=False)
    assert [(run.lr, run.seed) for run in results] == [(1e-6, 0), (1e-6, 1), (0.3, 0), (0.3, 1)]
    assert best_learning_rate(results) == 0.3
    for run in results:
        record = json.loads((run.directory / "result.json").read_text())
        assert record["best_val_accuracy"] == run.best_val_accuracy
        assert run.trained_parameters == 4 * 48 + 4
        saved = fp.PromptedViT.from_pretrained(make_probe(0).backbone, run.adapter)
        assert fp.evaluate(saved, val).accuracy == pytest.approx(run.best_val_accuracy)


def test_a_grid_computes_what_is_constant_once(
    make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = colours(20), colours(12, seed=1)
    encoded: list[int] = []
    constants = fp.PromptedViT.constants

    def counted(model: Any, images: Any, *rest: Any) -> Any:
        encoded.append(len(images))
        return constants(model, images, *rest)

    monkeypatch.setattr(fp.PromptedViT, "constants", counted)

    def run(out: str, **options: Any) -> list[Any]:
        encoded.clear()
        return run_grid(
            lambda seed: make_model(fp.VQTConfig(), seed=seed),
            *(train, val, RECIPE, (0.01, 0.1, 0.3), (0, 1), tmp_path / out),
            progress=False,
            **options,
        )

    shared = run("shared", cache_dir=tmp_path / "cache")
    assert sum(encoded) < 2 * (20 + 12)  # the first run, and one image of each other one to know what is kept
    own = run("own")
    assert sum(encoded) >= 6 * (20 + 12)
    assert [one.best_val_loss for one in shared] == [one.best_val_loss for one in own]
    assert len(list((tmp_path / "cache").glob("*.constants"))) == 2


def test_finished_runs_are_skipped_and_the_interrupted_one_goes_on(
    make_probe: Callable[[int], Any],
    colours: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, val = colours(64), colours(40, seed=1)
    made: list[int] = []

    def interrupted(seed: int) -> Any:
        made.append(seed)
        if len(made) == 3:
            raise KeyboardInterrupt
        return make_probe(seed)

    with pytest.raises(KeyboardInterrupt):
        run_grid(interrupted, train, val, RECIPE, LRS, SEEDS, tmp_path, progress=False)
    trained: list[Any] = []
    fit_in = grid.fit_in
    monkeypatch.setattr(
        grid, "fit_in", lambda run, *rest, **more: (trained.append(run.path), fit_in(run, *rest, **more))[1]
    )
    results = run_grid(make_probe, train, val, RECIPE, LRS, SEEDS, tmp_path, progress=False)
    assert trained == [run.directory for run in results[2:]]
    assert run_grid(make_probe, train, val, RECIPE, LRS, SEEDS, tmp_path, progress=False) == results
    assert len(trained) == 2


def test_a_diverged_run_is_recorded_and_loses(
    make_probe: Callable[[int], Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(64), colours(40, seed=1)
    lr, results = select_learning_rate(make_probe, train, val, RECIPE, (1e-6, 1e38), tmp_path, progress=False)
    assert lr == 1e-6
    assert [run.diverged for run in results] == [False, True]
    again = select_learning_rate(make_probe, train, val, RECIPE, (1e-6, 1e38), tmp_path, progress=False)
    assert again == (lr, results)
    with pytest.raises(TrainingDiverged):
        select_learning_rate(make_probe, train, val, RECIPE, (1e38,), tmp_path, progress=False)


def test_finished_runs_of_another_recipe_and_bad_files_are_refused(
    make_probe: Callable[[int], Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(32), colours(16, seed=1)
    run = run_grid(make_probe, train, val, RECIPE, (0.1,), (0,), tmp_path, progress=False)[0]
    with pytest.raises(ValueError, match="epochs is 3, was 2"):
        run_grid(make_probe, train, val, RECIPE.replace(epochs=3), (0.1,), (0,), tmp_path, progress=False)
    (run.directory / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is not a run's result"):
        run_grid(make_probe, train, val, RECIPE, (0.1,), (0,), tmp_path, progress=False)
    with pytest.raises(ValueError, match="must not be empty"):
        run_grid(make_probe, train, val, RECIPE, (), (0,), tmp_path)


@pytest.mark.parametrize("rate", [0.1, 1e38])
def test_finished_runs_on_other_data_or_models_are_refused(
    make_probe: Callable[[int], Any], make_model: Callable[..., Any], colours: Callable[..., Any], tmp_path: Path,
    rate: float,
) -> None:  # fmt: skip
    train, val = colours(32), colours(16, seed=1)
    arguments: dict[str, Any] = {"lrs": (rate,), "seeds": (0,), "out_dir": tmp_path, "progress": False}
    results = run_grid(make_probe, train, val, RECIPE, **arguments)
    assert results[0].diverged == (rate > 1)
    for changed, data in (("train", (colours(32, seed=2), val)), ("val", (train, colours(16, seed=2)))):
        with pytest.raises(ValueError, match=rf"holds another run \({changed}\.images changed\)"):
            run_grid(make_probe, *data, RECIPE, **arguments)
    with pytest.raises(ValueError, match=r"config\.kind is 'vpt', was 'linear'"):
        run_grid(lambda seed: make_model(fp.VPTConfig(num_prompts=2), seed=seed), train, val, RECIPE, **arguments)
    with pytest.raises(ValueError, match=r"\(initial_weights changed\)"):
        run_grid(lambda seed: make_probe(seed + 1), train, val, RECIPE, **arguments)
    assert run_grid(make_probe, train, val, RECIPE, **arguments) == results


def test_a_finished_run_of_an_earlier_version_is_returned_with_a_warning(
    make_probe: Callable[[int], Any], colours: Callable[..., Any], tmp_path: Path
) -> None:
    train, val = colours(32), colours(16, seed=1)
    arguments: dict[str, Any] = {"lrs": (0.1,), "seeds": (0,), "out_dir": tmp_path, "progress": False}
    results = run_grid(make_probe, train, val, RECIPE, **arguments)
    path = results[0].directory / "result.json"
    record = json.loads(path.read_text())
    del record["identity"]
    path.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="the result of an earlier version"):
        assert run_grid(make_probe, train, val, RECIPE, **arguments) == results


def test_paired_difference_of_one_run() -> None:
    a = torch.tensor([True] * 90 + [False] * 10)
    b = torch.tensor([True] * 80 + [False] * 20)
    found = paired_difference(a, b)
    assert found.difference == pytest.approx(0.1)
    assert found.p_value == pytest.approx(2 * 0.5**10)  # ten images against none
    d = (a.double() - b.double()).numpy()
    half = 1.984217 * d.std(ddof=1) / 10  # t, 99 degrees of freedom
    assert found.image_interval == pytest.approx((0.1 - half, 0.1 + half), abs=1e-6)
    assert all(map(math.isnan, found.seed_interval))
    same = paired_difference(a, a)
    assert (same.difference, same.p_value, same.image_interval) == (0.0, 1.0, (0.0, 0.0))


def test_paired_difference_over_seeds_against_one_probe() -> None:
    generator = np.random.default_rng(0)
    a = generator.random((3, 200)) < 0.9
    b = generator.random(200) < 0.7
    found = paired_difference(a, b)
    per_seed = a.mean(1) - b.mean()
    half = 4.302653 * per_seed.std(ddof=1) / math.sqrt(3)  # t, 2 degrees of freedom
    assert found.difference == pytest.approx(per_seed.mean())
    assert found.seed_interval == pytest.approx((per_seed.mean() - half, per_seed.mean() + half), abs=1e-6)
    assert found.image_interval[0] > 0
    assert (found.num_seeds, found.num_images) == (3, 200)
    assert math.isnan(found.p_value)


def test_the_interval_covers_the_truth() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        easy = generator.random(150) < 0.5  # what makes the two agree
        a = easy | (generator.random(150) < 0.6)
        b = easy | (generator.random(150) < 0.4)
        low, high = paired_difference(a, b).image_interval
        covered += low <= 0.1 <= high
    assert 0.91 < covered / 300 < 0.985


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([True] * 3, [True] * 4, "pair up"),
        ([[True] * 4] * 2, [[True] * 4] * 3, "pair up"),
        ([True], [True], "at least 2 images"),
        ([0.5, 1.0], [1, 0], "correct_a must hold booleans"),
    ],
)
def test_paired_difference_refuses(a: Any, b: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired_difference(a, b)


def test_seeds_are_summed_up_by_student() -> None:
    found = summarise_seeds([0.5, 0.7, 0.9])
    assert (found.mean, found.sd, found.num_seeds) == (pytest.approx(0.7), pytest.approx(0.2), 3)
    half = 4.302652729749464 * 0.2 / math.sqrt(3)  # the table of Student's t with 2 degrees of freedom
    assert found.interval == pytest.approx((0.7 - half, 0.7 + half))
    assert str(found) == "0.7000 ± 0.4968 (sd 0.2000, 3 seeds)"
    narrow = summarise_seeds([0.5, 0.7, 0.9], level=0.5).interval
    assert found.interval[0] < narrow[0] < narrow[1] < found.interval[1]
    one = summarise_seeds([0.5])
    assert (one.mean, str(one)) == (0.5, "0.5000")
    assert math.isnan(one.sd)
    for wrong in ([], [0.5, math.nan], [[0.5]]):
        with pytest.raises(ValueError, match="values must be finite numbers, one per seed"):
            summarise_seeds(wrong)
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        summarise_seeds([0.5], level=95)
