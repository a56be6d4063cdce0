"""Grids of recipes, in one batch or one after the other, and the significance of the difference of two methods."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import DataLoader

from fastprompt.adapters import without_resampled
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.extras import needed
from fastprompt.files import atomic_write, remove
from fastprompt.kernels import stopwatch
from fastprompt.train.checkpoint import rng_state, set_rng_state
from fastprompt.train.directory import (
    BEST_DIRECTORY,
    CHOICES_FILE,
    GRID_RESULT_FILE,
    RECIPE_FILE,
    RunDirectory,
    open_run,
)
from fastprompt.train.evaluate import activation_bits, backbone_precision, compute_dtype, device_of
from fastprompt.train.fit import (
    FitResult,
    TrainingDiverged,
    check_model,
    describe_data,
    deterministic_algorithms,
    fit_in,
    recipe_for,
)
from fastprompt.train.identity import as_recorded_here, data_identities, require_same, run_identity
from fastprompt.train.joint import check_joint
from fastprompt.train.ranks import Ranks, find_ranks
from fastprompt.train.recipes import GRID_FIELDS, Recipe
from fastprompt.train.run import Options, Run
from fastprompt.train.state import recorded_identity
from fastprompt.train.tasks import kind_of_labels
from fastprompt.train.together import GRID_STATE_FILE, SavedGrid, Together, read_grid

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


@dataclass(frozen=True)
class RunResult:
    """One run of a grid.

    Attributes:
        lr, seed: learning rate and seed of the run.
        diverged: whether the loss became NaN or infinite; the accuracy is then 0 and the loss infinite.
        best_epoch, best_val_accuracy, best_val_loss, images_per_second, peak_memory_mib, seconds: as in
            `FitResult`.
        trained_parameters: number of trained parameters.
        directory: the run's directory, with `best/` (the adapter), `log.jsonl` and `result.json`.
        recipe: that of the run.
    """

    lr: float
    seed: int
    diverged: bool
    best_epoch: int
    best_val_accuracy: float
    best_val_loss: float
    images_per_second: float
    peak_memory_mib: float
    seconds: float
    trained_parameters: int
    directory: Path
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of the run's directory, such as "lr-0.001_seed-0"."""
        return self.directory.name

    @property
    def adapter(self) -> Path:
        """The directory to pass to `PromptedViT.from_pretrained`."""
        return self.directory / BEST_DIRECTORY


def run_grid(
    make_model: Callable[[int], PromptedViT],
    train: Any,
    val: Any,
    recipe: Recipe,
    lrs: Sequence[float],
    seeds: Sequence[int],
    out_dir: str | Path,
    progress: bool = True,
    cache_dir: str | Path | None = None,
) -> list[RunResult]:
    """Train one model for every learning rate and seed, one after the other; finished runs are not repeated.

    `fit_grid` trains them together. This trains models that cannot be, such as those of full fine-tuning.

    Each run has its own directory `lr-<lr>_seed-<seed>`. Its `result.json` is written last and marks the run as
    finished. An interrupted run resumes after its last epoch. A run that diverges is recorded as diverged, and the
    grid continues. The result of a finished run is returned only if data, model and recipe are unchanged.

    Args:
        make_model: seed -> a freshly initialised model. Its initialisation should depend on the seed.
        train, val: as in `fastprompt.fit`. Choose learning rates on validation data only.
        recipe: the recipe; the grid sets `lr` and `seed`.
        lrs, seeds: the grid.
        out_dir: parent directory of the runs.
        progress: show a progress bar for every run.
        cache_dir: as in `fastprompt.fit`: what is constant in training is then computed once for all runs.

    Returns:
        One result per learning rate and seed, learning rates outermost.

    Raises:
        ValueError: the grid is empty, or a directory holds another run.
        DirectoryInUse: another process writes into one of the directories.
    """
    if len(lrs) == 0 or len(seeds) == 0:
        raise ValueError(f"lrs and seeds must not be empty, got {list(lrs)} and {list(seeds)}")
    recipe = recipe_for(recipe, train)
    recipes = [recipe.replace(lr=float(lr), seed=int(seed)) for lr in lrs for seed in seeds]
    data: dict[str, Any] = {}
    options = Options(cache_dir=None if cache_dir is None else Path(cache_dir))
    return [_one_run(make_model, train, val, each, Path(out_dir), progress, data, options) for each in recipes]


def fit_grid(
    make_model: Callable[[int], PromptedViT],
    train: Any,
    val: Any,
    recipe: Recipe,
    grid: Mapping[str, Sequence[Any]],
    out_dir: str | os.PathLike[str],
    *,
    together: int | None = None,
    resume: bool = True,
    progress: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[RunResult]:
    """Train one adapter for every combination of the grid's values, all of them together on one frozen backbone.

    Every adapter has its own generator, head, optimizer, schedule and batch norm statistics, and ends as a separate run
    of `fastprompt.fit` with its recipe would, up to rounding: with the same batches, augmentations and draws, which
    adapters of one seed share. What does not depend on the adapters is computed once per image: its patch embedding,
    the blocks in front of late prompts, and for VQT and linear probes the whole backbone. An adapter that diverges is
    dropped and recorded, and the others go on.

    Each adapter becomes a run directory `out_dir/<field>-<value>_...` with the files of a separate run and
    `result.json`, once it has ended. Until then `out_dir` holds the state of all, from which the same call resumes.
    Finished runs are not repeated, so that a grid may grow. Their times are those of the whole batch.

    Args:
        make_model: seed -> a freshly initialised model; all on one backbone. Its initialisation should depend on the
            seed.
        train, val: as in `fastprompt.fit`. Choose on validation data only.
        recipe: the recipe; the grid sets the fields that it names.
        grid: field of the recipe -> its values, such as {"lr": [1e-3, 3e-3], "seed": [0, 1]}. Fields that change the
            batches, the data types or the number of epochs cannot differ (`recipes.GRID_FIELDS` can).
        together: number of adapters that share a batch; the others follow. None: all. Each takes the memory of a run of
            its own.
        resume: False starts over and replaces the runs of the grid.
        progress: show a progress bar, and a line per epoch with the best adapter.
        cache_dir: as in `fastprompt.fit`.

    Returns:
        One result per combination, the values of the last field innermost.

    Raises:
        TypeError, ValueError: an argument is wrong, the models cannot be trained together (full fine-tuning, pixel
            prompts, several backbones), or a directory holds another run. Nothing is trained.
        DirectoryInUse: another process writes into one of the directories.
        OSError: a file could not be written.
    """
    recipes = grid_recipes(recipe, grid)
    if together is not None and (isinstance(together, bool) or not isinstance(together, int) or together < 1):
        raise ArgumentError("together", f"must be a positive integer or None, got {together!r}")
    if isinstance(train, DataLoader) and len({each.seed for each in recipes.values()}) > 1:
        raise ArgumentError("train", "must be a Dataset or a pair of tensors for several seeds, got a DataLoader")
    first = next(iter(recipes.values()))
    model = make_model(first.seed)
    check_model(model)
    check_joint({"the first": model})
    if find_ranks(device_of(model)).size > 1:
        raise ArgumentError("grid", "must be trained in one process, got a job of several")
    assert model.num_classes is not None
    kind = kind_of_labels(recipe.loss, train)
    if recipe.head_init == "probe":
        if kind != "class":
            raise ArgumentError("head_init", "must not ask for a linear probe unless labels are classes")
        from fastprompt.train.probe import logistic_regression

        logistic_regression()  # fail before anything is read or written
    data = data_identities(train, val, model.num_classes, kind)
    before = rng_state()
    try:
        with open_run(out_dir) as directory:
            found = _Grid(directory, make_model, train, val, data, progress, cache_dir, resume)
            return found.results(recipes, together)
    finally:
        set_rng_state(*before)


def grid_recipes(recipe: Recipe, grid: Mapping[str, Sequence[Any]]) -> dict[str, Recipe]:
    """Return the recipe of each combination of a grid's values, by the name of its directory.

    Raises:
        TypeError, ValueError: a field cannot differ, it has no values or one twice, or a value is wrong.
    """
    if recipe.rollbacks:
        raise ArgumentError("rollbacks", f"must be 0 in a grid, whose adapters keep in step, got {recipe.rollbacks}")
    if recipe.compile:
        raise ArgumentError("compile", "must be False in a grid, whose adapters share their steps, got True")
    if recipe.backbone != "float":
        raise ArgumentError("backbone", f"must be 'float' in a grid, got {recipe.backbone!r}")
    if not grid:
        raise ArgumentError("grid", f"must name at least one field of the recipe ({', '.join(GRID_FIELDS)})")
    for name, values in grid.items():
        if name not in GRID_FIELDS:
            raise ArgumentError("grid", f"must name fields among {', '.join(GRID_FIELDS)}, got {name!r}")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ArgumentTypeError("grid", f"must have a sequence of values for {name!r}, got {values!r}")
        if len(set(values)) < len(values):
            raise ArgumentError("grid", f"must have different values for {name!r}, got {', '.join(map(str, values))}")
    found = {}
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        try:
            found["_".join(f"{name}-{_said(value)}" for name, value in point.items())] = recipe.replace(**point)
        except (TypeError, ValueError) as error:
            raise ArgumentError("grid", f"must have valid values: {error}") from error
    return found


def _said(value: Any) -> str:
    """A value as part of a directory's name."""
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


class _Grid:
    """What the runs of `fit_grid` have in common; see there."""

    def __init__(
        self,
        directory: RunDirectory,
        make_model: Callable[[int], PromptedViT],
        train: Any,
        val: Any,
        data: Mapping[str, Any],
        progress: bool,
        cache_dir: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        self.directory, self.make_model, self.train, self.val, self.data = directory, make_model, train, val, data
        self.options = Options(cache_dir=None if cache_dir is None else Path(cache_dir))
        self.progress, self.resume = progress, resume

    def results(self, recipes: Mapping[str, Recipe], together: int | None) -> list[RunResult]:
        """Train what is not finished, at most `together` at once, and return the results of all."""
        recipes = {name: recipe_for(recipe, self.train) for name, recipe in recipes.items()}
        saved = read_grid(self.directory.path) if self.resume else None
        if not self.resume:
            remove(self.directory.path, (GRID_STATE_FILE, CHOICES_FILE))
        begun = [] if saved is None else [*saved.runs]
        if unknown := [name for name in begun if name not in recipes]:
            raise ArgumentError(
                "grid",
                f"must have the runs that {self.directory.path} has begun to train, {', '.join(unknown)} among them; "
                "choose another out_dir, or pass resume=False (--no-resume)",
            )
        runs = {name: self._run(recipe) for name, recipe in recipes.items()}
        check_joint({name: run.model for name, run in runs.items()})
        found = {name: result for name in recipes if name not in begun and (result := self._known(name, runs[name]))}
        left = [name for name in recipes if name not in found and name not in begun]
        size = len(recipes) if together is None else together
        if begun:
            self._train({name: runs[name] for name in begun}, saved)
        for start in range(0, len(left), size):
            self._train({name: runs[name] for name in left[start : start + size]}, None)
        for name in [*begun, *left]:
            place = self.directory.path / name
            record = _read_record(place, recipes[name])
            assert record is not None
            found[name] = _result(record, place)
        return [found[name] for name in recipes]

    def _run(self, recipe: Recipe) -> Run:
        """An untrained run."""
        model = self.make_model(recipe.seed)
        check_model(model)
        describe_data(model, self.train)
        model.predicts = kind_of_labels(recipe.loss, self.train)
        return Run(model, self.train, self.val, recipe, None, False, self.data, True, (), self.options, Ranks())

    def _known(self, name: str, run: Run) -> RunResult | None:
        """Return the result of a run that an earlier call finished; None if there is none.

        Raises:
            ValueError: the directory holds another run.
        """
        place = self.directory.path / name
        if not place.exists():
            return None
        with open_run(place) as directory:
            if not self.resume:
                directory.begin({})
                return None
            if (saved := directory.read_state()) is not None:
                recorded = recorded_identity(saved[1])
                recorded = as_recorded_here(recorded, without_resampled(saved[0])[1], run.model.backbone)
                require_same(run.state.identity, recorded, place)
            record = _read_record(place, run.recipe)
            if record is None:
                return None
            _require_same_record(record, run.state.identity, directory)
            return _result(record, place)

    def _train(self, runs: Mapping[str, Run], saved: SavedGrid | None) -> None:
        first = next(iter(runs.values()))
        if saved is not None:
            for name, run in runs.items():
                recorded = recorded_identity(saved.runs[name][1])
                recorded = as_recorded_here(recorded, without_resampled(saved.runs[name][0])[1], run.model.backbone)
                require_same(run.state.identity, recorded, self.directory.path / name)
        grid = Together(runs, self.directory, self.data, self._write, self.progress)
        with (
            deterministic_algorithms(first.recipe.deterministic),
            backbone_precision(first.model, first.backbone_dtype),
            stopwatch.kept(first.state.choices),
            contextlib.ExitStack() as of_models,
        ):
            for run in runs.values():
                of_models.enter_context(activation_bits(run.model, run.recipe.activation_bits))
            grid.train(saved)

    def _write(self, name: str, run: Run, diverged: bool) -> None:
        """Write the directory of a run that has ended; its result is the last file."""
        with open_run(self.directory.path / name) as directory:
            run.write_into(directory, {RECIPE_FILE: json.dumps(run.recipe.to_dict(), indent=2) + "\n"})
            _write_record(directory.path, run.model, run.recipe, run.state.identity, None if diverged else run.result())


def _one_run(
    make_model: Callable[[int], PromptedViT],
    train: Any,
    val: Any,
    recipe: Recipe,
    out_dir: Path,
    progress: bool,
    data: dict[str, Any],
    options: Options,
) -> RunResult:
    """Run one point of the grid or return its earlier result; the first call fills `data`."""
    directory = out_dir / f"lr-{recipe.lr:g}_seed-{recipe.seed}"
    with open_run(directory) as run:
        record = _read_record(directory, recipe)
        model = make_model(recipe.seed)
        check_model(model)
        if not data:
            assert model.num_classes is not None
            data |= data_identities(train, val, model.num_classes, kind_of_labels(recipe.loss, train))
        describe_data(model, train)
        identity = run_identity(model, recipe, compute_dtype(recipe.computes_in, device_of(model)), data)
        if record is not None:
            _require_same_record(record, identity, run)
            return _result(record, directory)
        fitted = None
        with contextlib.suppress(TrainingDiverged):
            fitted = fit_in(run, model, train, val, recipe, progress=progress, data=data, options=options)
        return _result(_write_record(directory, model, recipe, identity, fitted), directory)


def _write_record(
    directory: Path, model: PromptedViT, recipe: Recipe, identity: Mapping[str, Any], fitted: FitResult | None
) -> dict[str, Any]:
    """Write the `result.json` of a run, and return it. `fitted` is None for a run that diverged."""
    values: dict[str, Any] = {
        "diverged": True,
        "best_epoch": 0,
        "best_val_accuracy": 0.0,
        "best_val_loss": None,
        "images_per_second": 0.0,
        "peak_memory_mib": 0.0,
        "seconds": 0.0,
    }
    if fitted is not None:
        values = {"diverged": False, **{name: getattr(fitted, name) for name in values if name != "diverged"}}
    record = {
        "lr": recipe.lr,
        "seed": recipe.seed,
        "trained_parameters": model.num_trainable()["total"],
        "directory": directory.name,
        **values,
        "recipe": recipe.to_dict(),
        "identity": identity,
    }
    atomic_write(directory / GRID_RESULT_FILE, json.dumps(record, indent=2) + "\n")
    return record


def _read_record(directory: Path, recipe: Recipe) -> dict[str, Any] | None:
    """Return the `result.json` of a finished run, or None if the run is not finished."""
    path = directory / GRID_RESULT_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        differences = recipe.differences(Recipe.from_dict(record["recipe"]))
        _result(record, directory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a run's result ({error}); delete {directory} to run it again") from error
    if differences:
        text = ", ".join(f"{name} is {new!r}, was {old!r}" for name, (new, old) in differences.items())
        raise ValueError(f"{directory} holds a finished run with another recipe ({text}); choose another out_dir")
    return record


def _require_same_record(record: dict[str, Any], identity: dict[str, Any], run: RunDirectory) -> None:
    """Raise `ValueError` if a finished run is another one; records of earlier versions are compared by their state."""
    if "identity" in record:
        require_same(identity, record["identity"], run.path)
        return
    saved = run.read_state()
    if saved is not None:
        require_same(identity, recorded_identity(saved[1]), run.path)
    warnings.warn(
        f"{run.path} holds the result of an earlier version, which recorded neither its images nor its initial "
        "weights, so these cannot be compared",
        stacklevel=5,
    )


def _result(record: Mapping[str, Any], directory: Path) -> RunResult:
    names = {each.name for each in dataclasses.fields(RunResult)}
    values = {name: value for name, value in record.items() if name in names}
    if values["best_val_loss"] is None:
        values["best_val_loss"] = math.inf
    return RunResult(**{**values, "directory": directory, "recipe": Recipe.from_dict(record["recipe"])})


def best_learning_rate(results: Sequence[RunResult]) -> float:
    """Return the learning rate with the highest validation accuracy, averaged over its seeds.

    Ties are broken by the lower mean validation loss, then by the smaller learning rate.
    """
    if not results:
        raise ArgumentError("results", "must hold at least one run, got none")

    def score(lr: float) -> tuple[float, float, float]:
        runs = [run for run in results if run.lr == lr]
        return (
            sum(run.best_val_accuracy for run in runs) / len(runs),
            -sum(run.best_val_loss for run in runs) / len(runs),
            -lr,
        )

    return max({run.lr for run in results}, key=score)


def best_of_grid(results: Sequence[RunResult]) -> list[RunResult]:
    """Return the runs of the recipe with the highest validation accuracy, averaged over its seeds, the best one first.

    Ties are broken by the lower mean validation loss. Runs that diverged count with an accuracy of 0.
    """
    if not results:
        raise ArgumentError("results", "must hold at least one run, got none")
    of_recipes: dict[str, list[RunResult]] = {}
    for run in results:
        of_recipes.setdefault(json.dumps(run.recipe.replace(seed=0).to_dict()), []).append(run)

    def score(runs: Sequence[RunResult]) -> tuple[float, float]:
        return sum(run.best_val_accuracy for run in runs) / len(runs), -sum(run.best_val_loss for run in runs)

    best = max(of_recipes.values(), key=score)
    return sorted((run for run in best if not run.diverged), key=lambda run: score([run]), reverse=True)


def select_learning_rate(
    make_model: Callable[[int], PromptedViT],
    train: Any,
    val: Any,
    recipe: Recipe,
    lrs: Sequence[float],
    out_dir: str | Path,
    seeds: Sequence[int] = (0,),
    progress: bool = True,
    cache_dir: str | Path | None = None,
) -> tuple[float, list[RunResult]]:
    """Run the grid and pick the learning rate on validation (`run_grid`, `best_learning_rate`).

    Returns:
        The learning rate, and all runs to report with it.

    Raises:
        TrainingDiverged: every run diverged.
    """
    results = run_grid(make_model, train, val, recipe, lrs, seeds, out_dir, progress, cache_dir)
    if all(run.diverged for run in results):
        raise TrainingDiverged(f"loss of every run in {out_dir}", 0, 0, min(run.lr for run in results))
    return best_learning_rate(results), results


@dataclass(frozen=True)
class SeedSummary:
    """The results of several seeds.

    Attributes:
        mean: mean over seeds. sd: sample standard deviation; NaN of a single seed.
        interval: (low, high), t interval of the mean; NaN of a single seed.
        num_seeds: number of seeds. level: confidence level of the interval.
    """

    mean: float
    sd: float
    interval: tuple[float, float]
    num_seeds: int
    level: float

    def __str__(self) -> str:
        """Mean ± half of the interval, or the mean alone of a single seed."""
        if self.num_seeds == 1:
            return f"{self.mean:.4f}"
        half = (self.interval[1] - self.interval[0]) / 2
        return f"{self.mean:.4f} ± {half:.4f} (sd {self.sd:.4f}, {self.num_seeds} seeds)"


def summarise_seeds(values: Sequence[float], level: float = 0.95) -> SeedSummary:
    """Return mean, standard deviation and Student's t interval of the results of several seeds.

    Args:
        values: one number per seed, such as test accuracies.
        level: confidence level of the interval, between 0 and 1.

    Raises:
        ValueError: there are no values, one is not finite, or the level is out of range.
    """
    if not 0 < level < 1:
        raise ArgumentError("level", f"must be between 0 and 1, got {level!r}")
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ArgumentError("values", f"must be finite numbers, one per seed, got {values!r}")
    sd = float(found.std(ddof=1)) if len(found) > 1 else math.nan
    return SeedSummary(float(found.mean()), sd, _t_interval(found, level), len(found), level)


def _t_interval(samples: np.ndarray, level: float) -> tuple[float, float]:
    """Return the t interval of the mean of samples (N,); NaN if there are fewer than two."""
    with needed("report", "an interval over seeds or images"):
        from scipy import stats

    if len(samples) < 2:
        return math.nan, math.nan
    half = stats.t.ppf((1 + level) / 2, len(samples) - 1) * samples.std(ddof=1) / math.sqrt(len(samples))
    return float(samples.mean() - half), float(samples.mean() + half)


@dataclass(frozen=True)
class PairedDifference:
    """Accuracy of a minus accuracy of b on the same images.

    Attributes:
        difference: mean over images and seeds.
        image_interval: (low, high), t interval over images of the per-image difference, averaged over seeds. It
            covers the choice of test images, given these trained models.
        seed_interval: (low, high), t interval over seeds of the difference. It covers the choice of seeds, given
            these images. NaN with a single seed.
        p_value: exact two-sided McNemar test on the images that only one of the two gets right; NaN with several
            seeds.
        num_images, num_seeds: N and S.
        level: confidence level of both intervals.
    """

    difference: float
    image_interval: tuple[float, float]
    seed_interval: tuple[float, float]
    p_value: float
    num_images: int
    num_seeds: int
    level: float


def paired_difference(correct_a: Any, correct_b: Any, level: float = 0.95) -> PairedDifference:
    """Compare the accuracies of a and b on the same test images, with intervals.

    Args:
        correct_a, correct_b: (N,) or (seeds, N) booleans: whether each image was classified correctly, in the
            same order (`Evaluation.correct`). One of the two may have a single row if the other has several (a
            deterministic probe against several seeds).
        level: confidence level of the intervals, between 0 and 1.

    Raises:
        ValueError: the shapes do not pair up, there are fewer than two images, or values are not booleans.
    """
    with needed("report", "the comparison of two methods"):
        from scipy import stats

    if not 0 < level < 1:
        raise ArgumentError("level", f"must be between 0 and 1, got {level!r}")
    a, b = (np.atleast_2d(np.asarray(each, dtype=np.float64)) for each in (correct_a, correct_b))
    for name, values in (("correct_a", a), ("correct_b", b)):
        if values.ndim != 2 or values.shape[1] < 2:
            raise ArgumentError(name, f"must have shape (N,) or (seeds, N) with at least 2 images, got {values.shape}")
        if not np.isin(values, (0, 1)).all():
            raise ArgumentError(name, "must hold booleans")
    if a.shape[1] != b.shape[1] or (a.shape[0] != b.shape[0] and 1 not in (a.shape[0], b.shape[0])):
        raise ValueError(f"correct_a and correct_b must pair up, got shapes {a.shape} and {b.shape}")
    differences = a - b  # (seeds, N)
    seeds, images = differences.shape

    p_value = math.nan
    if seeds == 1:
        only_a, only_b = int((differences > 0).sum()), int((differences < 0).sum())
        p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return PairedDifference(
        difference=float(differences.mean()),
        image_interval=_t_interval(differences.mean(0), level),
        seed_interval=_t_interval(differences.mean(1), level),
        p_value=p_value,
        num_images=images,
        num_seeds=seeds,
        level=level,
    )
