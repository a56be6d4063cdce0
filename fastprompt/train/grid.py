"""Grids of learning rates and seeds, and the significance of the difference between two methods."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprompt.arguments import ArgumentError
from fastprompt.extras import needed
from fastprompt.files import atomic_write
from fastprompt.train.directory import BEST_DIRECTORY, GRID_RESULT_FILE, RunDirectory, open_run
from fastprompt.train.evaluate import compute_dtype, device_of
from fastprompt.train.fit import TrainingDiverged, check_model, describe_data, fit_in, recipe_for
from fastprompt.train.identity import data_identities, require_same, run_identity
from fastprompt.train.recipes import Recipe
from fastprompt.train.run import Options
from fastprompt.train.state import recorded_identity
from fastprompt.train.tasks import kind_of_labels

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
    """Train one model for every learning rate and seed; runs that an earlier call finished are not repeated.

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
        identity = run_identity(model, recipe, compute_dtype(recipe.dtype, device_of(model)), data)
        if record is not None:
            _require_same_record(record, identity, run)
            return _result(record, directory)
        try:
            fitted = fit_in(run, model, train, val, recipe, progress=progress, data=data, options=options)
            values: dict[str, Any] = {
                "diverged": False,
                "best_epoch": fitted.best_epoch,
                "best_val_accuracy": fitted.best_val_accuracy,
                "best_val_loss": fitted.best_val_loss,
                "images_per_second": fitted.images_per_second,
                "peak_memory_mib": fitted.peak_memory_mib,
                "seconds": fitted.seconds,
            }
        except TrainingDiverged:
            values = {
                "diverged": True,
                "best_epoch": 0,
                "best_val_accuracy": 0.0,
                "best_val_loss": None,
                "images_per_second": 0.0,
                "peak_memory_mib": 0.0,
                "seconds": 0.0,
            }
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
        return _result(record, directory)


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
    return RunResult(**{**values, "directory": directory})


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
