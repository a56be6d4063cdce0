"""`fastprompt predict`."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from fastprompt.cli.options import Plugins, load_adapter, set_threads


@dataclass
class Predict:
    """Predict the classes of image files; CSV or JSON with the probability of every class."""

    adapter: tyro.conf.Positional[Path]
    """Adapter or run directory."""
    images: tyro.conf.Positional[list[Path]]
    """Image files, or folders that are searched for images."""
    backbone: str | None = None
    """Needed where neither the adapter nor the run directory says."""
    image_size: int | None = None
    out: Path | None = None
    """.csv or .json file; CSV on standard output if not given."""
    on_bad: Literal["error", "skip"] = "error"
    """What to do about image files that cannot be read."""
    dtype: Literal["bfloat16", "float32"] = "float32"
    batch_size: int = 32
    threads: int | None = None
    plugin: Plugins = field(default_factory=list)
    """Module that registers methods of your own: its name or its .py file; once for each."""
    debug: bool = False
    """Show the traceback of an error."""


def short(names: Sequence[str]) -> str:
    """How many names and the first five of them."""
    return f"{len(names)}: " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def predict(command: Predict) -> None:
    """Run `fastprompt predict`."""
    import torch

    from fastprompt.adapters import Preprocessing
    from fastprompt.data import list_images, read_images
    from fastprompt.data.images import bad_images, report_bad
    from fastprompt.files import atomic_write
    from fastprompt.runs.directory import read_settings
    from fastprompt.runs.execute import square_size

    if command.out is not None and command.out.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--out: takes a .csv or .json file, got {command.out}")
    if command.batch_size < 1:
        raise ValueError(f"--batch-size: takes a number from 1, got {command.batch_size}")
    set_threads(command.threads)
    files = list_images(command.images)
    bad = bad_images(files)
    report_bad([(files[i], reason) for i, reason in bad.items()], command.on_bad)
    files = [file for i, file in enumerate(files) if i not in bad]
    if not files:
        raise ValueError(f"images: none of the {len(bad)} files can be read")
    model = load_adapter(command, read_settings(command.adapter))
    image_size, preprocessing = square_size(model.backbone), model.preprocessing or Preprocessing()
    rows: list[list[float]] = []
    with torch.inference_mode():
        for start in range(0, len(files), command.batch_size):
            images, _ = read_images(files[start : start + command.batch_size], image_size, resize=preprocessing.resize)
            rows += model(images).double().softmax(-1).tolist()
    names = list(model.class_names or [str(i) for i in range(len(rows[0]))])
    best = [max(range(len(row)), key=row.__getitem__) for row in rows]
    if command.out is not None and command.out.suffix.lower() == ".json":
        entries = [
            {
                "file": f,
                "class": names[b],
                "probability": row[b],
                "probabilities": dict(zip(names, row, strict=True)),
            }
            for f, b, row in zip(files, best, rows, strict=True)
        ]
        text = json.dumps({"class_names": names, "images": entries}, indent=1, ensure_ascii=False) + "\n"
        content = text.encode("utf-8", "backslashreplace")  # a byte that is no UTF-8 in a file name: "\udcff"
    else:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(["file", "class", "probability", *(f"p({name})" for name in names)])
        for f, b, row in zip(files, best, rows, strict=True):
            writer.writerow([f, names[b], f"{row[b]:.6f}", *(f"{p:.6f}" for p in row)])
        text = buffer.getvalue()
        content = text.encode("utf-8", "surrogateescape")  # file names as the bytes they are
    if command.out is None:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
    else:
        atomic_write(command.out, content)
        print(f"{len(files)} images -> {command.out}")
