"""Execute a grid: many runs in one batch, each with the directory of a run of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.arguments import ArgumentError
from fastprompt.generators import get_method
from fastprompt.runs.devices import find_device
from fastprompt.runs.directory import (
    RESULTS_FILE,
    SETTINGS_FILE,
    inputs_stamp,
    read_json,
    require_same_settings,
    write_json,
)
from fastprompt.runs.execute import (
    add_test,
    build_model,
    load_best,
    load_run_data,
    on_device,
    results_of,
    square_size,
    summary,
)
from fastprompt.runs.settings import RunSettings
from fastprompt.train.directory import GRID_RESULT_FILE, LOG_FILE

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT
    from fastprompt.train.grid import RunResult

Results = dict[str, dict[str, Any] | None]


def execute_grid(
    settings: RunSettings,
    grid: Mapping[str, Sequence[Any]],
    out_dir: Path | str,
    *,
    together: int | None = None,
    test: bool = False,
    resume: bool = True,
    progress: bool = True,
    device: str = "auto",
    announce: Callable[[str], None] | None = None,
    cache_dir: Path | str | None = None,
) -> tuple[Results, list[str]]:
    """Adapt with every combination of the grid's values in one batch, and evaluate each on validation.

    Every adapter becomes a run directory below `out_dir`, with the files of `fastprompt.runs.execute.execute`. With
    `test`, those that are best on validation, averaged over the seeds, are evaluated once on the test split.

    Args:
        settings: of each run, whose recipe the grid changes.
        grid, together, resume, cache_dir: as in `fastprompt.fit_grid`.
        test, progress, device, announce: as in `execute`.

    Returns:
        The contents of each run's `results.json` by the name of its directory, None for one that diverged; and the
        names of the best, one per seed, the best seed first.

    Raises:
        ValueError, TypeError: the settings are wrong, or a directory holds another run.
        DirectoryInUse: another process writes into one of the directories.
    """
    from fastprompt.protocols import named_task
    from fastprompt.train.grid import best_of_grid, fit_grid, grid_recipes
    from fastprompt.train.recipes import adjusted_recipe
    from fastprompt.train.tasks import REGRESSION

    out_dir, place = Path(out_dir), find_device(device)
    if out_dir.exists() and not out_dir.is_dir():
        raise ArgumentError("out", f"must be a directory, got the file {out_dir}")
    method = get_method(settings.method)
    method.config(settings.options)
    if method.solver == "lbfgs":
        raise ArgumentError("grid", f"must not be given for {settings.method!r}, which is solved without a recipe")
    for name in grid:
        if name in settings.recipe:
            raise ArgumentError(name, "must not be given in --grid as well")
    if settings.final and {*grid} != {"seed"}:
        raise ArgumentError("grid", "must vary the seed alone in a final run, which may train on validation images")
    if test and not settings.final and named_task(settings.data) is not None:
        raise ArgumentError("test", f"must not be given for {settings.data} unless the run is final (--final)")
    recipe = adjusted_recipe(settings.method, settings.recipe, train_backbone=settings.train_backbone)
    if settings.final:
        recipe = recipe.replace(select_by="last")
    if recipe.loss in REGRESSION:
        raise ArgumentError("loss", f"must be 'cross_entropy' or 'bce' for images of classes, got {recipe.loss!r}")
    of_runs = {}
    for name, of_run in grid_recipes(recipe, grid).items():
        of_runs[name] = replace(settings, recipe={**settings.recipe, **{key: getattr(of_run, key) for key in grid}})
        if resume:
            require_same_settings(of_runs[name], out_dir / name)
    stamp = inputs_stamp(settings)
    backbone = on_device(place, settings)
    splits = load_run_data(settings, square_size(backbone))

    def make_model(seed: int) -> PromptedViT:
        return build_model(settings, backbone, splits.class_names, seed)

    if announce is not None:
        first = make_model(recipe.seed)
        announce(summary(first, splits, recipe))
    found = fit_grid(
        make_model,
        splits.train,
        splits.val,
        recipe,
        grid,
        out_dir,
        together=together,
        resume=resume,
        progress=progress,
        cache_dir=cache_dir,
    )
    results: Results = {}
    for run in found:
        directory, own = run.directory, of_runs[run.name]
        if not (directory / SETTINGS_FILE).exists():
            write_json(directory / SETTINGS_FILE, own.to_dict())
        if run.diverged:
            results[run.name] = None
        elif (directory / RESULTS_FILE).exists():
            results[run.name] = read_json(directory / RESULTS_FILE)
        else:
            model = make_model(run.seed)
            record = results_of(own, model, backbone, splits, run.recipe, _training(run), directory)
            record["identity"] = {"stamp": stamp, "run": read_json(directory / GRID_RESULT_FILE)["identity"]}
            write_json(directory / RESULTS_FILE, record)
            results[run.name] = record
    best = [] if all(run.diverged for run in found) else best_of_grid(found)
    if test and best:
        test_split = None
        for run in best:
            known = results[run.name]
            if known is not None and known["test"] is None:
                test_split = splits.test if test_split is None else test_split
                add_test(known, run.directory, load_best(backbone, run.directory, run.recipe), test_split, stamp)
    return results, [run.name for run in best]


def _training(run: RunResult) -> dict[str, Any]:
    """What the results of a run say of its training."""
    log = [json.loads(line) for line in (run.directory / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    return {
        "best_epoch": run.best_epoch,
        "best_val_loss": run.best_val_loss,
        "history": [row for row in log if row["event"] == "epoch"],
        "seconds": run.seconds,
        "images_per_second": run.images_per_second,
        "peak_memory_mib": run.peak_memory_mib,
    }
