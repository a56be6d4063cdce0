"""`fastprompt eval`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fastprompt.adapters import Preprocessing
from fastprompt.arguments import ArgumentError, argument_names
from fastprompt.cli.options import Plugins, announce, data_name, in_int8, load_adapter, set_threads
from fastprompt.runs.settings import RunSettings
from fastprompt.terminal import printable, say

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

_DATA_FLAGS = (
    "data",
    "num_train",
    "num_val",
    "num_test",
    "data_seed",
    "on_bad",
    "intensity_range",
    "max_decoded_bytes",
    "resize",
)


@dataclass
class Eval:
    """Evaluate an adapter: accuracy, mean per class, confusion matrix; mean average precision of several labels; R² of
    values.

    For a run directory of `adapt`, backbone, data and split default to those of the run. Different --data are split
    anew: the numbers of images and the seed are then not taken from the run.
    """

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory, or repository of the Hugging Face Hub, as owner/name."""
    data: str | None = None
    """Image folder or name of a data set; the run's if not given. For an adapter that predicts several labels or
    values: a .csv file with a column `file` and one per label."""
    backbone: str | None = None
    """Backbone; required if neither the adapter nor the run directory names it."""
    image_size: int | None = None
    """Image side in pixels; the one used in training if not given."""
    split: Literal["val", "test", "train"] = "val"
    """Part of the data to evaluate on."""
    num_train: int | None = None
    """Number of training images in the split."""
    num_val: int | None = None
    """Number of validation images in the split."""
    num_test: int | None = None
    """Number of test images in the split."""
    data_seed: int | None = None
    """Seed of the train/validation/test split."""
    data_root: Path | None = None
    """Folder of torchvision's data sets."""
    on_bad: Literal["error", "skip"] | None = None
    """What to do about image files that cannot be read."""
    intensity_range: tuple[float, float] | None = None
    """Black and white level of grey images with more than 8 bits; the adapter's if not given."""
    max_decoded_bytes: int | None = None
    """Maximum size of one decoded image in bytes; the run's if not given."""
    resize: Literal["crop", "squash"] | None = None
    """Crop or squash images to the backbone's size; as in training if not given."""
    dtype: Literal["auto", "bfloat16", "float32", "int8"] | None = None
    """Data type of the backbone; if not given, the run's, else auto. int8 runs on a CPU, with calibrated weights."""
    int8: Path | None = None
    """With --dtype int8: file of calibrated weights. If not given, those in the user cache; if there are none, they are
    calibrated on training images and kept there."""
    against: Literal["float32", "bfloat16"] | None = None
    """Also evaluate in this data type, on the same images, and print the paired difference."""
    keep_check: bool = False
    """With --dtype int8 --against float32: write the comparison into the adapter. If it passed, `fp.Engine` chooses
    int8 by itself on processors without bfloat16."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    batch_size: int = 64
    """Images per call."""
    corruptions: list[str] = field(default_factory=list)
    """Evaluate under these corruptions of ImageNet-C, or all, at five severities, instead of once."""
    reference: Path | None = None
    """With --corruptions: another adapter to compare with, such as the probe's; named like the first."""
    max_images: int = 1000
    """With --corruptions: number of images to use at most."""
    out: Path | None = None
    """JSON file to write; only a summary is printed if not given."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def evaluate_adapter(command: Eval) -> None:
    """Run `fastprompt eval`."""
    from fastprompt.runs.devices import find_device
    from fastprompt.runs.directory import adapter_dir, read_settings, write_json
    from fastprompt.runs.execute import evaluation_record, load_run_data, square_size
    from fastprompt.train.evaluate import evaluate_classes

    place = find_device(command.device)
    set_threads(command.threads)
    if command.keep_check and (command.dtype, command.against) != ("int8", "float32"):
        raise ArgumentError("keep_check", "must be given with --dtype int8 --against float32")
    directory = adapter_dir(command.adapter)
    settings = read_settings(command.adapter)
    if settings is None and command.data is None:
        raise ArgumentError("data", f"is required: {command.adapter} does not say which data the adapter is for")
    model = load_adapter(command, directory, settings, place)
    if model.predicts != "class":
        _evaluate_table(command, model)
        return
    if settings is None:
        settings = RunSettings(method="linear", data=str(command.data))
    changed = {name: getattr(command, name) for name in _DATA_FLAGS if getattr(command, name) is not None}
    if command.data_root is not None:
        changed["data_root"] = str(command.data_root)
    if command.data is not None and data_name(command.data) != settings.data:
        settings = RunSettings(method=settings.method, data=command.data)
    settings = replace(settings, **changed, augment="none")
    if settings.intensity_range is None and model.preprocessing is not None:
        settings = replace(settings, intensity_range=model.preprocessing.intensity_range)
    if command.resize is None and model.preprocessing is not None:
        settings = replace(settings, resize=model.preprocessing.resize)
    splits = load_run_data(settings, square_size(model.backbone))
    names = list(splits.class_names)
    split = getattr(splits, command.split)  # the test split can be read only once
    exact, what = model, f"{len(split):,} {command.split} images of {len(names)} classes"
    if command.dtype == "int8":
        model, what = in_int8(model, command.int8, splits.train), f"Linears in int8; {what}"
    announce(model, what)
    if command.reference is not None and not command.corruptions:
        raise ArgumentError("reference", "must be given with --corruptions")
    if command.against is not None and command.corruptions:
        raise ArgumentError("against", "must not be given with --corruptions")
    if command.corruptions:
        _evaluate_corrupted(command, model, split, place)
        return
    try:
        found = evaluate_classes(model, split, batch_size=command.batch_size)
    except ValueError as error:
        raise ArgumentError("data", f"must fit the adapter, got {settings.data}: {error}") from error
    record = evaluation_record(found, split)
    names = list(model.class_names or names)  # labels are counted by the model's classes
    record |= {
        "adapter": str(command.adapter),
        "split": command.split,
        "data": splits.summary(),
        "class_names": names,
    }
    say(f"{settings.data} {command.split}: {record['num_images']} images, {record['seconds']:.1f} s")
    say(f"accuracy        {record['accuracy']:.4f}")
    say(f"mean per class  {record['mean_per_class']:.4f}")
    say(f"macro F1        {record['macro_f1']:.4f}")
    say(f"top-5 accuracy  {record['top5_accuracy']:.4f}")
    say(f"calibration     {record['calibration_error']:.4f} (expected error, 15 bins)")
    say("confusion (rows: true class, columns: predicted)")
    width = max(len(str(n)) for row in record["confusion"] for n in row) + 1
    labels = [printable(name) for name in names]
    label_width = min(24, max(map(len, labels)))
    for name, row in zip(labels, record["confusion"], strict=True):
        say(f"  {name[:label_width]:<{label_width}}" + "".join(f"{n:>{width}}" for n in row))
    if command.against is not None:
        record["against"] = _compare(command, exact, split, found)
    if command.keep_check:
        _keep_check(command, directory, exact, record)
    if command.out is not None:
        write_json(command.out, record)
        say(f"written: {command.out}")


def _compare(command: Eval, model: Any, split: Any, found: Any) -> dict[str, Any]:
    """Evaluate the model in another data type on the same images; print and return the paired difference."""
    from fastprompt.runs.uncertainty import over_seeds_and_images
    from fastprompt.train.evaluate import backbone_precision, compute_dtype, evaluate_classes

    assert command.against is not None
    with backbone_precision(model, compute_dtype(command.against, model.backbone.device)):
        other = evaluate_classes(model, split, batch_size=command.batch_size)
    difference = over_seeds_and_images(found.correct.double()[None].numpy() - other.correct.double()[None].numpy())
    low, high = difference.interval
    agreement = float((found.predictions == other.predictions).double().mean())
    say(f"{command.against:<15} {other.accuracy:.4f}")
    say(f"difference      {difference.mean:+.4f} [{low:+.4f}, {high:+.4f}] over images")
    say(f"agreement       {agreement:.4f} of the images are predicted alike")
    return {
        "dtype": command.against,
        "accuracy": other.accuracy,
        "difference": difference.to_dict(),
        "agreement": agreement,
    }


def _keep_check(command: Eval, directory: Path, model: PromptedViT, record: dict[str, Any]) -> None:
    """Write the comparison with float32 into the adapter, and say whether int8 passed."""
    from fastprompt.adapters import Int8Check, keep_int8_check, state_digest
    from fastprompt.int8.weights import find_weights

    against, weights = record["against"], find_weights(model.backbone, command.int8)
    mean, low, high = (against["difference"][key] for key in ("mean", "low", "high"))
    if low is None or high is None:
        raise ArgumentError("keep_check", f"needs at least two images, got {record['num_images']}")
    digest = state_digest(model.adapter_state_dict())
    check = Int8Check(digest, weights.digest, record["num_images"], mean, low, high, against["agreement"])
    keep_int8_check(directory, check)
    verdict = (
        "passed: engines may choose int8" if check.passed else "not passed: engines choose int8 if they are told to"
    )
    say(f"kept in {directory}; {verdict}")


def _evaluate_table(command: Eval, model: PromptedViT) -> None:
    """Evaluate an adapter that predicts several labels or values on the images of a CSV file."""
    from fastprompt.data import LabelTable
    from fastprompt.data.images import decoded_limit
    from fastprompt.runs.directory import write_json
    from fastprompt.runs.execute import square_size
    from fastprompt.runs.tables import text_table
    from fastprompt.train.evaluate import LabelsEvaluation, ValuesEvaluation, evaluate

    what = "several labels" if model.predicts == "labels" else "values"
    if command.data is None or Path(command.data).suffix.lower() != ".csv":
        raise ArgumentError(
            "data", f"must be a .csv file for an adapter that predicts {what}, got {command.data or 'no data'}"
        )
    unused = {name: getattr(command, name) for name in ("num_train", "num_val", "num_test", "data_seed", "reference")}
    unused |= {"against": command.against, "corruptions": command.corruptions or None}
    unused |= {"dtype": command.dtype if command.dtype == "int8" else None}
    for name, value in unused.items():
        if value is not None:
            raise ArgumentError(name, f"must not be given for an adapter that predicts {what}")
    preprocessing = model.preprocessing or Preprocessing()
    for name in ("resize", "intensity_range"):
        if getattr(command, name) is not None:
            preprocessing = replace(preprocessing, **{name: getattr(command, name)})
    limit = decoded_limit(command.max_decoded_bytes)
    with argument_names(path="data", dataset="data"):
        data = LabelTable(command.data, square_size(model.backbone), model.class_names, preprocessing, limit)
        announce(model, f"{len(data):,} images, {what}")
        found = evaluate(model, data, batch_size=command.batch_size)
    names = [printable(name) for name in data.class_names]
    say(f"{command.data}: {len(data)} images, {found.seconds:.1f} s")
    record: dict[str, Any] = {"adapter": str(command.adapter), "data": str(command.data), "names": data.class_names}
    if isinstance(found, LabelsEvaluation):
        thresholds = found.best_thresholds()
        columns = {
            "average_precision": found.per_label,
            "f1": found.f1(),
            "best_threshold": thresholds,
            "best_f1": found.f1(thresholds),
        }
        record |= {"map": found.map, "loss": found.loss, "probabilities": found.probabilities.tolist()}
        say(f"mean average precision  {found.map:.4f}\nbinary cross-entropy    {found.loss:.4f}")
        header = ["label", "average precision", "F1 at 0.5", "best threshold", "F1 there"]
    else:
        assert isinstance(found, ValuesEvaluation)
        columns = {"r2": found.per_value}
        record |= {"mean_r2": found.r2, "mae": found.mae, "rmse": found.rmse, "predictions": found.predictions.tolist()}
        say(f"R²                   {found.r2:.4f}\nmean absolute error  {found.mae:.4f}")
        say(f"root mean square     {found.rmse:.4f}")
        header = ["value", "R²"]
    record |= {name: [v if math.isfinite(v) else None for v in column.tolist()] for name, column in columns.items()}
    rows = zip(names, *(column.tolist() for column in columns.values()), strict=True)
    say(text_table(header, [[name, *(f"{value:.4f}" for value in values)] for name, *values in rows]))
    if command.out is not None:
        write_json(command.out, {**record, "files": data.files})
        say(f"written: {command.out}")


def _evaluate_corrupted(command: Eval, model: Any, split: Any, place: Any) -> None:
    """Print accuracy and calibration under corruptions, and the difference to a reference on the same images."""
    from fastprompt.analysis import robustness, robustness_difference
    from fastprompt.analysis.corruptions import CORRUPTIONS
    from fastprompt.runs.directory import adapter_dir, read_settings, write_json
    from fastprompt.runs.tables import text_table

    corruptions = CORRUPTIONS if command.corruptions == ["all"] else tuple(command.corruptions)
    models = {str(command.adapter): model}
    if command.reference is not None:
        directory, settings = adapter_dir(command.reference), read_settings(command.reference)
        models[str(command.reference)] = load_adapter(command, directory, settings, place)
    found = robustness(
        models, split, corruptions=corruptions, max_images=command.max_images, batch_size=command.batch_size
    )
    header = ["corruption", *(f"{what} {name}" for name in found for what in ("accuracy", "calibration error"))]
    rows = [["none", *(f"{value:.4f}" for each in found.values() for value in each.clean)]]
    for corruption in corruptions:
        cells = []
        for each in found.values():
            of_severities = [values for (name, _), values in each.corrupted.items() if name == corruption]
            cells += [f"{sum(column) / len(column):.4f}" for column in zip(*of_severities, strict=True)]
        rows.append([corruption, *cells])
    rows.append(["mean", *(f"{value:.4f}" for each in found.values() for value in (each.accuracy, each.ece))])
    say(text_table(header, rows))
    say("each corruption: mean over severities 1 to 5")
    record: dict[str, Any] = {
        name: {
            "clean": each.clean,
            "corrupted": [[*key, *values] for key, values in each.corrupted.items()],
            "accuracy": each.accuracy,
            "calibration_error": each.ece,
        }
        for name, each in found.items()
    }
    if command.reference is not None:
        mine, theirs = found.values()
        difference = robustness_difference(mine, theirs)
        low, high = difference.interval
        say(f"accuracy minus {command.reference}'s: {difference.mean:+.4f} [{low:+.4f}, {high:+.4f}] over images")
        record["difference"] = difference.to_dict()
    if command.out is not None:
        write_json(command.out, record)
        say(f"written: {command.out}")
