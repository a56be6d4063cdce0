"""`fastprompt predict`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from fastprompt.arguments import ArgumentError, argument_names
from fastprompt.cli.options import Plugins, announce, in_int8, load_adapter, set_threads
from fastprompt.terminal import say

if TYPE_CHECKING:
    from torch import Tensor

    from fastprompt.model import PromptedViT


@dataclass
class Predict:
    """Predict the classes of image files; write CSV or JSON with the probability of every class.

    An adapter that was trained on several labels per image gives those that reach --threshold and the probability of
    each; one that was trained on values gives these.

    In CSV, an apostrophe is put before text that a spreadsheet would read as a formula (text that begins with =, +,
    -, @, a tab or a line end). JSON keeps all text unchanged.
    """

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory, or repository of the Hugging Face Hub, as owner/name."""
    images: tyro.conf.Positional[list[Path]]
    """Image files, or folders to search for images."""
    backbone: str | None = None
    """Backbone; required if neither the adapter nor the run directory names it."""
    image_size: int | None = None
    """Image side in pixels; the one used in training if not given."""
    out: Path | None = None
    """.csv or .json file to write; CSV on standard output if not given."""
    domain: str | None = None
    """Domain of the images, for an adapter of several data sets; its classes alone are then predicted."""
    threshold: list[float] = field(default_factory=list)
    """For an adapter that predicts several labels: probability from which on a label is there, for all or for each; 0.5
    if not given. `fastprompt eval` finds the best on labelled images."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    intensity_range: tuple[float, float] | None = None
    """Black and white level of grey images with more than 8 bits; the adapter's if not given."""
    max_decoded_bytes: int | None = None
    """Maximum size of one decoded image in bytes; 2^29 if not given."""
    dtype: Literal["auto", "bfloat16", "float32", "int8"] | None = None
    """Data type of the backbone; if not given, the run's, else auto. int8 runs on a CPU, with calibrated weights."""
    int8: Path | None = None
    """With --dtype int8: file of calibrated weights; those in the user cache if not given."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    batch_size: int = 32
    """Images per call."""
    threads: int | None = None
    """Number of CPU threads; all cores if not given."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def short(names: Sequence[str]) -> str:
    """Format the number of names and the first five of them."""
    return f"{len(names)}: " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def probabilities(outputs: Tensor, predicts: str) -> Tensor:
    """Return the probabilities of classes or labels from outputs (B, C); values are the outputs themselves."""
    return {"class": lambda: outputs.softmax(-1), "labels": outputs.sigmoid, "values": lambda: outputs}[predicts]()


def _thresholds(command: Predict, model: PromptedViT) -> list[float]:
    """The threshold of each output."""
    count, given = model.num_classes or 0, command.threshold
    if given and model.predicts != "labels":
        raise ArgumentError("threshold", f"must not be given for an adapter that predicts {model.predicts}")
    if len(given) not in (0, 1, count) or not all(0 <= value <= 1 for value in given):
        raise ArgumentError("threshold", f"must be one probability, or {count}, one for each label, got {given}")
    return given if len(given) == count else (given or [0.5]) * count


def _entry(
    file: str, row: list[float], names: Sequence[str], predicts: str, thresholds: Sequence[float]
) -> dict[str, Any]:
    """What is predicted for an image, as in JSON."""
    named = dict(zip(names, row, strict=True))
    if predicts == "values":
        return {"file": file, "values": named}
    if predicts == "labels":
        there = [name for name, p, least in zip(names, row, thresholds, strict=True) if p >= least]
        return {"file": file, "labels": there, "probabilities": named}
    best = max(range(len(row)), key=row.__getitem__)
    return {"file": file, "class": names[best], "probability": row[best], "probabilities": named}


def _cell(value: Any) -> str | float:
    return "; ".join(value) if isinstance(value, list) else value


def predict(command: Predict) -> None:
    """Run `fastprompt predict`."""
    import torch

    from fastprompt.adapters import Preprocessing
    from fastprompt.data import list_images
    from fastprompt.data.files import check_files, read_checked
    from fastprompt.data.images import decoded_limit
    from fastprompt.files import atomic_write
    from fastprompt.runs.devices import find_device
    from fastprompt.runs.directory import adapter_dir, read_settings
    from fastprompt.runs.execute import square_size
    from fastprompt.runs.tables import csv_table

    if command.out is not None and command.out.suffix.lower() not in (".csv", ".json"):
        raise ArgumentError("out", f"must end in .csv or .json, got {command.out}")
    if command.batch_size < 1:
        raise ArgumentError("batch_size", f"must be at least 1, got {command.batch_size}")
    place = find_device(command.device)
    directory = adapter_dir(command.adapter)
    set_threads(command.threads)
    limit = decoded_limit(command.max_decoded_bytes)
    with argument_names(paths="images"):
        found = list_images(command.images)
    model = load_adapter(command, directory, read_settings(command.adapter), place)
    if command.domain is not None and model.domains is None:
        raise ArgumentError("domain", "must not be given: the adapter was trained on one data set")
    if model.domains is not None:
        if command.domain is not None:
            model.domains.index(command.domain)
        elif model.domains.labels == "per-domain":
            raise ArgumentError("domain", f"must be given, one of {', '.join(model.domains.names)}")
    thresholds = _thresholds(command, model)
    preprocessing = model.preprocessing or Preprocessing()
    if command.intensity_range is not None:
        preprocessing = replace(preprocessing, intensity_range=command.intensity_range)
    size = 2 * (square_size(model.backbone),)
    with argument_names(paths="images"):
        whole = check_files(found, size, preprocessing, command.on_bad, limit)
    what = f"{len(whole):,} images"
    if command.dtype == "int8":
        model, what = in_int8(model, command.int8), f"Linears in int8; {what}"
    announce(model, what)
    files: list[str] = []
    rows: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(whole), command.batch_size):
            batch = whole[start : start + command.batch_size]
            images, read = read_checked(batch, size, preprocessing, command.on_bad, limit)
            if read:
                files += read
                logits = model(images.to(place)).cpu()
                model.check_outputs(images, logits)
                if command.domain is not None and model.domains is not None:
                    logits = model.domains.only(logits, command.domain)
                rows += probabilities(logits.double(), model.predicts).tolist()
    if not files:
        raise ArgumentError("images", f"must name at least one readable image, got {len(found)} unreadable files")
    skipped = sorted(set(found) - set(files))
    names = list(model.class_names or [str(i) for i in range(len(rows[0]))])
    entries = [_entry(f, row, names, model.predicts, thresholds) for f, row in zip(files, rows, strict=True)]
    if command.out is not None and command.out.suffix.lower() == ".json":
        answer = {"class_names": names, "images": entries, "skipped": skipped}
        text = json.dumps(answer, indent=1, ensure_ascii=False) + "\n"
        content = text.encode("utf-8", "backslashreplace")  # a byte of a file name that is not UTF-8 becomes "\udcff"
    else:
        first = {"class": ["class", "probability"], "labels": ["labels"], "values": []}[model.predicts]
        header = ["file", *first, *(names if model.predicts == "values" else (f"p({name})" for name in names))]
        lines: list[list[str | float]] = [
            [f, *(_cell(entry[key]) for key in first), *row] for f, entry, row in zip(files, entries, rows, strict=True)
        ]
        text = csv_table(header, lines)
        content = text.encode("utf-8", "surrogateescape")  # keeps the bytes of file names
    if command.out is None and sys.stdout.isatty():
        say(text.removesuffix("\n"))
    elif command.out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
    else:
        atomic_write(command.out, content)
        say(f"{len(files)} images -> {command.out}" + (f", {len(skipped)} skipped" if skipped else ""))
