"""Execute a run: turn settings into a run directory with results."""

from __future__ import annotations

import contextlib
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastprompt.adapters import read_adapter, without_resampled
from fastprompt.analysis.library import has_library, library_usage
from fastprompt.arguments import ArgumentError, ArgumentPathError, argument_names
from fastprompt.generators import get_method
from fastprompt.memory import peak_memory_mib, reset_peak_memory
from fastprompt.runs.devices import describe, find_device
from fastprompt.runs.directory import (
    RESULTS_FILE,
    SETTINGS_FILE,
    adapter_dir,
    inputs_stamp,
    json_text,
    read_json,
    require_same_settings,
    write_json,
)
from fastprompt.runs.settings import RunSettings

if TYPE_CHECKING:
    import torch

    from fastprompt.data import DataSplits
    from fastprompt.model import PromptedViT
    from fastprompt.protocols import Protocol, Task
    from fastprompt.train.callbacks import Callback
    from fastprompt.train.directory import RunDirectory
    from fastprompt.train.evaluate import Evaluation
    from fastprompt.train.plan import Plan
    from fastprompt.train.ranks import Ranks
    from fastprompt.train.recipes import Recipe
    from fastprompt.train.run import Options
    from fastprompt.vit import FrozenViT

PROBE_VIEWS = 4
"""Number of augmented views of each training image that the L-BFGS probe is fitted to."""


def load_run_data(settings: RunSettings, image_size: int) -> DataSplits:
    """Load the run's train, validation and test images at `image_size` pixels."""
    from fastprompt.data import load_data
    from fastprompt.protocols import named_task

    named = named_task(settings.data)
    if named is not None and settings.more_data:
        raise ArgumentError("more_data", f"must not be given for {settings.data}, a task of a protocol")
    if named is not None:
        return _load_task_data(settings, *named, image_size)
    for name in ("final", "per_class"):
        if getattr(settings, name):
            raise ArgumentError(name, f"must not be given for {settings.data}, which is no task of a protocol")
    with argument_names(name="data", root="data_root", seed="data_seed"):
        return load_data(
            [settings.data, *settings.more_data] if settings.more_data else settings.data,
            image_size=image_size,
            num_train=settings.num_train,
            num_val=settings.num_val,
            num_test=settings.num_test,
            seed=settings.data_seed,
            root=settings.data_root,
            augment=settings.augment,
            resize=settings.resize,
            on_bad=settings.on_bad,
            intensity_range=settings.intensity_range,
            max_decoded_bytes=settings.max_decoded_bytes,
            labels=settings.labels,
            sampling=settings.sampling,
        )


def _load_task_data(settings: RunSettings, protocol: Protocol, task: Task, image_size: int) -> DataSplits:
    """Load a task of a protocol, which fixes splits and resizing."""
    for name in ("num_train", "num_val", "num_test", "intensity_range", "max_decoded_bytes"):
        if getattr(settings, name) is not None:
            raise ArgumentError(name, f"must not be given for {settings.data}: the protocol fixes its images")
    if settings.data_root is None:
        raise ArgumentError("data_root", f"is required for {settings.data}: the folder with the protocol's data")
    with argument_names(root="data_root", seed="data_seed"):
        return protocol.load(
            task.name,
            settings.data_root,
            image_size=image_size,
            final=settings.final,
            per_class=settings.per_class,
            seed=settings.data_seed,
            augment=settings.augment,
            on_bad=settings.on_bad,
        )


def evaluation_record(evaluation: Evaluation, images: Any) -> dict[str, Any]:
    """Convert an `Evaluation` of `images` to JSON values, with the worst mistakes.

    The mean per class is over the classes that occur.
    """
    from fastprompt.runs.mistakes import worst_mistakes

    confusion = [[int(n) for n in row] for row in evaluation.confusion]
    return {
        "accuracy": float(evaluation.accuracy),
        "mean_per_class": float(evaluation.mean_per_class),
        "loss": float(evaluation.loss),
        "calibration_error": float(evaluation.ece),
        "macro_f1": float(evaluation.macro_f1),
        "top5_accuracy": float(evaluation.top5_accuracy),
        "per_class": [row[i] / sum(row) if sum(row) else None for i, row in enumerate(confusion)],
        "confusion": confusion,
        "num_images": len(evaluation.labels),
        "labels": [int(label) for label in evaluation.labels],
        "predictions": [int(prediction) for prediction in evaluation.predictions],
        "mistakes": worst_mistakes(evaluation, images),
        "seconds": float(evaluation.seconds),
    }


def read_rows(path: Path, argument: str) -> torch.Tensor:
    """Read the array of a .npy file as float32; errors name `argument`."""
    import numpy as np
    import torch

    if not path.is_file():
        raise ArgumentPathError(argument, f"must be a file that exists, got {path}")
    try:
        return torch.from_numpy(np.load(path, allow_pickle=False)).float()
    except (ValueError, TypeError, AttributeError, EOFError) as error:
        raise ArgumentError(argument, f"must be a .npy file with one array of numbers, got {path} ({error})") from error


def by_domain(model: PromptedViT, data: Any) -> dict[str, dict[str, float | int]]:
    """Evaluate a model on each domain of a `DomainSet` alone, with the domain unknown (in a union) and given."""
    from fastprompt.train.evaluate import evaluate_classes

    assert model.domains is not None
    found: dict[str, dict[str, float | int]] = {}
    for name in model.domains.names:
        of_domain = data.of(name)
        found[name] = {
            "accuracy": float(evaluate_classes(model, of_domain).accuracy),
            "accuracy_with_domain": float(evaluate_classes(model, of_domain, domain=name).accuracy),
            "num_images": len(of_domain),
        }
    return found


def build_model(settings: RunSettings, backbone: FrozenViT, class_names: Sequence[str], seed: int) -> PromptedViT:
    """Build the untrained model; `seed` sets its initial values."""
    import torch

    import fastprompt as fp

    config = get_method(settings.method).config(settings.options)
    arguments: dict[str, Any] = {}
    if settings.class_embeddings is not None:
        argument = {"text": "class_embeddings", "prototypes": "prototypes"}.get(settings.head)
        if argument is None:
            raise ArgumentError(
                "class_embeddings", f"must be None unless head is 'text' or 'prototypes', got head {settings.head!r}"
            )
        arguments[argument] = read_rows(Path(settings.class_embeddings), "class_embeddings")
    torch.manual_seed(seed)
    return fp.PromptedViT(
        backbone,
        config,
        num_classes=len(class_names),
        head=settings.head,
        readout=settings.readout,
        class_names=list(class_names),
        train_backbone=settings.train_backbone,
        **arguments,
    )


def backbone_at(name: str, image_size: int | None, weights: bool = True) -> FrozenViT:
    """Load the named backbone for square images of `image_size` pixels; None keeps its own size.

    With `weights=False`, weights from a hub are left random, which suffices if only sizes are needed.
    """
    from fastprompt.vit.assets import backbone_structure, load_backbone

    if image_size is not None and image_size < 1:
        raise ArgumentError("image_size", f"must be a positive number of pixels, got {image_size}")
    with argument_names(name="backbone"):
        return (load_backbone if weights else backbone_structure)(name, image_size)


def square_size(backbone: FrozenViT) -> int:
    """Return the side of the backbone's square input in pixels; raise `ValueError` if it is not square."""
    height, width = backbone.image_size
    if height != width:
        raise ArgumentError("image_size", f"must be square, got a backbone for {height} x {width} images")
    return height


def execute(
    settings: RunSettings,
    out_dir: Path | str,
    *,
    test: bool = False,
    resume: bool = True,
    progress: bool = True,
    device: str = "auto",
    announce: Callable[[str], None] | None = None,
    extend: bool = False,
    compare_probe: bool | None = False,
    callbacks: Sequence[Callback | str] = (),
    cache_dir: Path | str | None = None,
) -> dict[str, Any]:
    """Adapt, evaluate on validation and, with `test`, once on the test split.

    If settings, backbone and images are unchanged, a finished run in `out_dir` is not repeated and an interrupted one
    is resumed. With `test`, the adapter that was best on validation is evaluated on the test split after training,
    unless the results already have a test record.

    Args:
        device: a name that `fastprompt.runs.devices.find_device` takes.
        announce: called once before training with a line about the run: device, data type, sizes of the splits,
            parameters.
        resume: False starts over and replaces what is in `out_dir`.
        compare_probe: as in `fastprompt.fit`; None compares where that costs little.
        extend, callbacks, cache_dir: as in `fastprompt.fit`. With `extend`, settings may differ in the
            length of the run.

    Returns:
        The contents of `results.json`; in the other processes of a job, which only help to train, an empty dictionary.

    Raises:
        ValueError, TypeError: the settings are wrong, or `out_dir` holds another run; the message says what differs.
        DirectoryInUse: another process writes into `out_dir`.
    """
    from fastprompt.protocols import named_task
    from fastprompt.train.directory import open_run
    from fastprompt.train.ranks import find_ranks
    from fastprompt.train.recipes import adjusted_recipe
    from fastprompt.train.run import LENGTH_FIELDS, Options
    from fastprompt.train.tasks import REGRESSION

    out_dir, place = Path(out_dir), find_device(device)
    if out_dir.exists() and not out_dir.is_dir():
        raise ArgumentError("out", f"must be a directory, got the file {out_dir}")
    method = get_method(settings.method)
    method.config(settings.options)
    recipe = adjusted_recipe(settings.method, settings.recipe, train_backbone=settings.train_backbone)
    if settings.final:
        recipe = recipe.replace(select_by="last")
    if test and not settings.final and named_task(settings.data) is not None:
        raise ArgumentError("test", f"must not be given for {settings.data} unless the run is final (--final)")
    if (settings.probe_C is None) != (not settings.final or method.solver != "lbfgs"):
        raise ArgumentError("probe_C", "must be given for a final run of the L-BFGS probe, and for no other run")
    if recipe.loss in REGRESSION:
        raise ArgumentError("loss", f"must be 'cross_entropy' or 'bce' for images of classes, got {recipe.loss!r}")
    options = Options(extend, compare_probe, callbacks, None if cache_dir is None else Path(cache_dir))
    if method.solver == "lbfgs":
        from fastprompt.train.probe import logistic_regression

        logistic_regression()  # fail before anything is written
    ranks = find_ranks(place)
    if not ranks.main:
        _follow(ranks, settings, recipe, resume, place, options)
        return {}
    with _followers(ranks) as begin:
        if resume:
            require_same_settings(settings, out_dir, LENGTH_FIELDS if extend else ())
        stamp = inputs_stamp(settings)
        results = _finished(out_dir) if resume and not extend else None
        if results is not None and results.get("identity", {}).get("stamp") == stamp and (not test or results["test"]):
            return results
        with open_run(out_dir) as directory:
            return _execute_in(
                directory, settings, recipe, stamp, test, resume, progress, place, announce, options, begin
            )


@contextlib.contextmanager
def _followers(ranks: Ranks) -> Iterator[Callable[[], None]]:
    """Context of the first process of a job, with a function that tells the others to train with it.

    At the end, the others are told that there is nothing to train, if they have not been told to.
    """
    from fastprompt.train.ranks import RankLost

    waiting = True

    def tell(train: bool) -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            ranks.of_main(lambda: train)

    try:
        yield lambda: tell(True)
    except BaseException:
        with contextlib.suppress(RankLost):  # they may have met the same error
            tell(False)
        raise
    tell(False)


def plan_of(settings: RunSettings, device: str = "auto", cache_dir: Path | None = None) -> Plan:
    """Return what a run with these settings computes once (`fastprompt.plan`); nothing is trained or written.

    Args:
        device: a name that `fastprompt.runs.devices.find_device` takes.
        cache_dir: as in `fastprompt.fit`.

    Raises:
        ValueError, TypeError: the settings are wrong.
    """
    from fastprompt.train.fit import plan
    from fastprompt.train.recipes import adjusted_recipe

    get_method(settings.method).config(settings.options)
    recipe = adjusted_recipe(settings.method, settings.recipe, train_backbone=settings.train_backbone)
    backbone = on_device(find_device(device), settings)
    splits = load_run_data(settings, square_size(backbone))
    model = build_model(settings, backbone, splits.class_names, recipe.seed)
    return plan(model, splits.train, splits.val, recipe, cache_dir=cache_dir)


def _follow(
    ranks: Ranks, settings: RunSettings, recipe: Recipe, resume: bool, place: torch.device, options: Options
) -> None:
    """Train as one of the other processes of a job, which write nothing, if the first one does."""
    from fastprompt.train.fit import fit_in

    backbone = on_device(place, settings)
    splits = load_run_data(settings, square_size(backbone))
    model = build_model(settings, backbone, splits.class_names, recipe.seed)
    if ranks.of_main(lambda: False):
        fit_in(None, model, splits.train, splits.val, recipe, resume, progress=False, options=options)


def on_device(place: torch.device, settings: RunSettings) -> FrozenViT:
    """Load the run's backbone on a device, with the run's normalisation."""
    backbone = backbone_at(settings.backbone, settings.image_size).to(place)
    if settings.mean is None and settings.std is None:
        return backbone
    return backbone.normalising_by(settings.mean, settings.std)


def _finished(out_dir: Path) -> dict[str, Any] | None:
    """Return the results of a finished run, or None."""
    return read_json(out_dir / RESULTS_FILE) if (out_dir / RESULTS_FILE).exists() else None


def _execute_in(
    directory: RunDirectory,
    settings: RunSettings,
    recipe: Recipe,
    stamp: str,
    test: bool,
    resume: bool,
    progress: bool,
    place: torch.device,
    announce: Callable[[str], None] | None,
    options: Options,
    begin: Callable[[], None],
) -> dict[str, Any]:
    """Run `execute` in a directory that is already locked."""
    from fastprompt.adapters import CONFIG_FILE
    from fastprompt.train.fit import check_model, describe_data, recipe_for
    from fastprompt.train.identity import data_identities, data_identity, run_identity
    from fastprompt.train.through_int8 import prepare_int8

    out_dir = directory.path
    results = _finished(out_dir) if resume else None
    if results is not None and options.extend and results["recipe"]["epochs"] < recipe.epochs:
        results = None
    backbone = on_device(place, settings)
    splits = load_run_data(settings, square_size(backbone))
    num_classes, recipe = len(splits.class_names), recipe_for(recipe, splits.train)
    model = build_model(settings, backbone, splits.class_names, recipe.seed)
    check_model(model)
    data = data_identities(splits.train, splits.val, num_classes)
    describe_data(model, splits.train)
    prepare_int8(model, splits.train, recipe)
    identity = run_identity(model, recipe, backbone_dtype(recipe, backbone), data)
    if results is not None:
        tested = None if results["test"] is None else data_identity(splits.test, "test", num_classes)
        _require_same_inputs(results, identity, tested, splits, backbone, out_dir)
        if not test or results["test"] is not None:
            if directory.writable and "identity" in results:  # inputs were copied or touched
                results["identity"]["stamp"] = stamp
                write_json(out_dir / RESULTS_FILE, results)
            return results
        if not any((out_dir / place / CONFIG_FILE).is_file() for place in (".", "best")):
            results = None  # only the record was kept, not the adapter: train again
    if results is None:
        if announce is not None:
            announce(summary(model, splits, recipe))
        if get_method(settings.method).solver != "lbfgs":
            begin()
        results = _train(
            directory, settings, model, backbone, splits, recipe, data, resume, progress, announce is not None, options
        )
        results["identity"] = {"stamp": stamp, "run": identity}
        write_json(out_dir / RESULTS_FILE, results)
    if test:
        add_test(results, out_dir, load_best(backbone, out_dir, recipe), splits.test, stamp)
    return results


def add_test(results: dict[str, Any], out_dir: Path, best: PromptedViT, test_split: Any, stamp: str) -> None:
    """Evaluate the best adapter on the test split, and write its record into the run's results."""
    from fastprompt.train.evaluate import evaluate_classes
    from fastprompt.train.identity import data_identity

    assert best.num_classes is not None
    results["test"] = evaluation_record(evaluate_classes(best, test_split), test_split)
    if best.domains is not None:
        results["domains"]["test"] = by_domain(best, test_split)
    if "identity" in results:
        results["identity"] |= {"stamp": stamp, "test": data_identity(test_split, "test", best.num_classes)}
    write_json(out_dir / RESULTS_FILE, results)


def summary(model: PromptedViT, splits: DataSplits, recipe: Recipe) -> str:
    """Describe a run in one line before it starts."""
    data = splits.summary()  # the test split itself may be read only once
    sizes = ", ".join(f"{data[name]:,} {name}" for name in ("train", "val", "test"))
    trained, total = model.num_trainable()["total"], sum(p.numel() for p in model.parameters())
    where = describe(model.backbone.device, backbone_dtype(recipe, model.backbone), recipe.backbone)
    return f"{where}; {sizes} images of {len(splits.class_names)} classes; {trained:,} of {total:,} parameters train"


def _require_same_inputs(
    results: dict[str, Any],
    identity: dict[str, Any],
    tested: dict[str, Any] | None,
    splits: DataSplits,
    backbone: FrozenViT,
    out_dir: Path,
) -> None:
    """Raise `ValueError` if a finished run had a different backbone, images or model.

    Of the images, earlier versions recorded only their assignment to splits.
    """
    from fastprompt.train.identity import as_recorded_here, require_same

    told_by_tensors = bool(backbone.identity.resampled)
    resampled = without_resampled(read_adapter(adapter_dir(out_dir))[1])[1] if told_by_tensors else {}
    if "identity" not in results:
        there = {"backbone": results["backbone_fingerprint"], "data": results["data"]}
        there = as_recorded_here(there, resampled, backbone)
        require_same({"backbone": backbone.fingerprint, "data": splits.summary()}, there, out_dir)
        warnings.warn(
            f"{out_dir} holds the results of an earlier version, which recorded the names of the images but not their "
            "contents, so these cannot be compared",
            stacklevel=4,
        )
        return
    mine, theirs = dict(identity), as_recorded_here(results["identity"]["run"], resampled, backbone)
    if tested is not None and "test" in results["identity"]:
        mine["test"], theirs["test"] = tested, results["identity"]["test"]
    require_same(mine, theirs, out_dir)


def _train(
    directory: RunDirectory,
    settings: RunSettings,
    model: PromptedViT,
    backbone: FrozenViT,
    splits: DataSplits,
    recipe: Recipe,
    data: dict[str, Any],
    resume: bool,
    progress: bool,
    announced: bool,
    options: Options,
) -> dict[str, Any]:
    """Train or resume, evaluate the best adapter on validation, and return the results without a test record.

    `backbone` must be unmodified; full fine-tuning trains a copy of it.
    """
    from fastprompt.train.fit import fit_in

    method, out_dir = get_method(settings.method), directory.path
    files = {SETTINGS_FILE: json_text(settings.to_dict())}
    if method.solver == "lbfgs":
        grid = None if settings.probe_C is None else [settings.probe_C]
        training = run_probe(model, splits, recipe, directory, files, grid)
    else:
        fitted = fit_in(
            directory, model, splits.train, splits.val, recipe, resume, progress, files, data, announced, options
        )
        training = {
            "best_epoch": fitted.best_epoch,
            "best_val_loss": fitted.best_val_loss,
            "history": fitted.history,
            "seconds": fitted.seconds,
            "images_per_second": fitted.images_per_second,
            "peak_memory_mib": fitted.peak_memory_mib,
        }
    if not (out_dir / SETTINGS_FILE).exists():  # the run was started by `fp.fit`
        write_json(out_dir / SETTINGS_FILE, settings.to_dict())
    return results_of(settings, model, backbone, splits, recipe, training, out_dir)


def results_of(
    settings: RunSettings,
    model: PromptedViT,
    backbone: FrozenViT,
    splits: DataSplits,
    recipe: Recipe,
    training: Mapping[str, Any],
    out_dir: Path,
) -> dict[str, Any]:
    """Evaluate the best adapter of `out_dir` on validation, and return the results without a test record.

    Args:
        model: as it was trained.
        training: what the results say of its training: history, speed and so on.
    """
    import torch

    import fastprompt as fp
    from fastprompt.train.evaluate import evaluate_classes

    method, trainable = get_method(settings.method), model.num_trainable()
    paper_count = model.paper_parameter_count()
    model = load_best(backbone, out_dir, recipe)
    results = {
        "fastprompt_version": fp.__version__,
        "torch_version": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "device": describe(backbone.device, backbone_dtype(recipe, backbone), recipe.backbone),
        "method": settings.method,
        "title": method.title,
        "config": model.config.to_dict(),
        "recipe": recipe.to_dict(),
        "backbone": settings.backbone,
        "backbone_fingerprint": backbone.fingerprint,
        "image_size": square_size(backbone),
        "data": splits.summary(),
        "class_names": list(splits.class_names),
        "head": settings.head,
        "trained_parameters": trainable,
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "paper_parameter_count": paper_count,
        **training,
        "validation": evaluation_record(evaluate_classes(model, splits.val), splits.val),
        "test": None,
    }
    if has_library(model):
        results["library"] = library_usage(model, splits.val)
    if model.domains is not None:
        results["domains"] = {"validation": by_domain(model, splits.val), "test": None}
    return results


def run_probe(
    model: PromptedViT,
    splits: DataSplits,
    recipe: Recipe,
    directory: RunDirectory,
    files: Mapping[str, str],
    grid: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Fit the L-BFGS probe and save it to `best/`.

    With an augmentation, it is fitted to `PROBE_VIEWS` augmented views of every training image. Its speed is the
    number of encoded images over the time for encoding and fitting.

    Args:
        directory: replaced once the probe is fitted.
        files: name -> text of the files that the run writes first.
        grid: inverse regularisation strengths to try; None is the probe's own grid.
    """
    import torch

    from fastprompt.train.probe import extract_features, fit_linear_probe
    from fastprompt.train.through_int8 import backbone_of_run

    reset_peak_memory()
    began = time.perf_counter()
    views = 1 if splits.train.augment is None else PROBE_VIEWS
    with backbone_of_run(model, recipe):
        train = [extract_features(model, splits.train, epoch=view) for view in range(views)]
        val = extract_features(model, splits.val)
    features, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    probe = fit_linear_probe(model, (features, labels), val, grid)
    seconds = time.perf_counter() - began
    directory.begin(files)
    directory.write_best(model)
    return {
        "best_epoch": None,
        "best_val_loss": probe.best_val_loss,
        "history": [],
        "seconds": seconds,
        "images_per_second": (len(features) + len(val[0])) / seconds,
        "peak_memory_mib": peak_memory_mib(),
        "probe": {"C": probe.C, "at_edge": probe.at_edge, "grid": probe.grid},
    }


def backbone_dtype(recipe: Recipe, backbone: FrozenViT) -> torch.dtype:
    """Return the dtype in which `fastprompt.fit` computes the backbone."""
    from fastprompt.train.evaluate import compute_dtype

    return compute_dtype(recipe.computes_in, backbone.device)


def load_best(backbone: FrozenViT, out_dir: Path, recipe: Recipe) -> PromptedViT:
    """Load the adapter that was best on validation, on the backbone as it was trained on, in its dtype or in int8."""
    import fastprompt as fp

    model = fp.PromptedViT.from_pretrained(backbone, adapter_dir(out_dir))
    if recipe.backbone == "int8":
        return fp.Engine(model, dtype="int8", backend="eager").model
    model.set_backbone_dtype(backbone_dtype(recipe, backbone))
    return model
