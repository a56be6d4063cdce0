"""Prompts as pixels on a real backbone, over data sets and seeds: `python experiments/pixels.py`, `make pixels`.

On each data set, every row of `experiments/table.py` that involves pixels runs with the table's protocol: the linear
probe, PGN with as many prompts as the pixel rows, PGN as small as the published border, PGN in pixels with either
placement, and the pixel border. Then each run's test images are classified again as a host would see them:

* in pixels: the prompted image in floats, as it leaves the client;
* as a PNG: rounded to 8 bits, written to a PNG file, read again, and passed to the frozen backbone as bytes.

For a PGN that was trained on tokens, the library is inverted first (`fp.RGBPrompts.invert`, placement "extend"): once
to pixels of any range, once to patches that are pictures. The results are kept in each run's `pictures.json`, and
finished parts are not repeated. A run is repeated if its adapter is lost before its pictures were classified. Run
directories and kept records are in the same places as for `experiments/table.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import records
import table

from fastprompt.runs.directory import read_json, write_json
from fastprompt.runs.settings import RunSettings

if TYPE_CHECKING:
    from torch import Tensor

    from fastprompt.model import PromptedViT

ROWS = ("linear", "pgn-14", "pgn-small", "rgb-extend", "rgb-replace", "pixel")
DATA: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"augment": "flip", "num_train": 800, "num_val": 200, "num_test": 2000},
    "mnist5k": {"augment": "none", "num_train": 320, "num_val": 80, "num_test": 500},  # a mirrored digit is not a digit
}
"""Settings of each data set, in addition to the shared ones."""
EPOCHS = 6


def plan_of(data: str, out: Path, seeds: Sequence[int]) -> table.Plan:
    """Return the runs on one data set; those on Fashion-MNIST are shared with `make table`."""
    base = RunSettings(
        method="pgn",
        data=data,
        backbone="clip-vit-b16",
        image_size=112,
        recipe={**table.RECIPE, "epochs": EPOCHS},
        **DATA[data],
    )
    return table.Plan(base, ROWS, tuple(seeds), None, out)


def through_png(pictures: Tensor) -> Tensor:
    """Write uint8 pictures (B, 3, H, W) to PNG files and return what a host reads from them, uint8 (B, 3, H, W)."""
    import numpy as np
    import torch
    from PIL import Image

    read = []
    for picture in pictures:
        file = io.BytesIO()
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG")
        with Image.open(file) as image:
            read.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return torch.stack(read)


def in_pixels(model: PromptedViT) -> tuple[PromptedViT, PromptedViT]:
    """Return (model for prompted images in floats, model for 8-bit PNG files)."""
    import copy

    from fastprompt.generators import PGN
    from fastprompt.generators.rgb_pgn import RGBPGN
    from fastprompt.pixels.prompts import RGBPrompts

    if isinstance(model.generator, PGN) and not isinstance(model.generator, RGBPGN):
        return RGBPrompts.invert(model, "extend").eval(), RGBPrompts.invert(model, "extend", picture=True).eval()
    floats = copy.deepcopy(model, {id(model.backbone): model.backbone})
    if isinstance(floats.generator, RGBPGN):
        floats.generator.config = dataclasses.replace(floats.generator.config, round_pixels=False)
    return floats.eval(), model.eval()


def classify_pictures(model: PromptedViT, dataset: Any, batch_size: int = 50) -> dict[str, list[int]]:
    """Predict a data set's classes from floats and from PNG files, with the frozen backbone and the head."""
    import torch

    from fastprompt.pixels.prompts import RGBPrompts

    floats, pictures = (RGBPrompts(each) for each in in_pixels(model))
    backbone = model.backbone
    found: dict[str, list[int]] = {"float": [], "png": []}
    with torch.inference_mode():
        for start in range(0, len(dataset), batch_size):
            images = torch.stack([dataset[i][0] for i in range(start, min(start + batch_size, len(dataset)))])
            seen = {"float": floats(images), "png": through_png(pictures.pictures(images))}
            for kind, prompted in seen.items():
                features = host(backbone, prompted, model.readout)
                found[kind] += pictures.classify(features.float()).argmax(-1).tolist()
    return found


def host(backbone: Any, images: Tensor, readout: str) -> Tensor:
    """Compute features (B, D) of the images with the frozen ViT, without prompts."""
    from fastprompt.generators import LinearProbeConfig
    from fastprompt.model import PromptedViT

    return PromptedViT(backbone.any_size(), LinearProbeConfig(), readout=readout).eval()(images)


def classify_run(directory: Path) -> None:
    """Write a finished run's `pictures.json`, if it has none.

    Raises:
        FileNotFoundError: the run's adapter is missing.
    """
    from fastprompt.runs.execute import backbone_at, load_best, load_run_data
    from fastprompt.train.recipes import Recipe

    settings, results = RunSettings.from_dict(read_json(directory / "run.json")), read_json(directory / "results.json")
    backbone = backbone_at(settings.backbone, settings.image_size)
    model = load_best(backbone, directory, Recipe(**results["recipe"]))
    write_json(directory / "pictures.json", classify_pictures(model, load_run_data(settings, 112).test))


def lost_adapters(plan: table.Plan) -> list[Path]:
    """Return the finished runs with neither `pictures.json` nor the adapter to make it with."""
    found = []
    for method in ROWS[1:]:
        for lr in table.choose_lr(plan, method) or ():
            for seed in plan.seeds:
                directory = table.Job(method, lr, seed, True).directory(plan.out)
                parts = {part.name for part in directory.glob("*")}
                if "results.json" in parts and not parts & {"pictures.json", "best"}:
                    found.append(directory)
    return found


def unclassified(plan: table.Plan) -> list[Path]:
    """Return the tested runs without classified pictures."""
    tested = [
        table.Job(method, lr, seed, True).directory(plan.out)
        for method in ROWS[1:]
        for lr in table.choose_lr(plan, method) or ()
        for seed in table.tested_runs(plan, method, lr)
    ]
    return [directory for directory in tested if not (directory / "pictures.json").exists()]


def rows_of(plan: table.Plan) -> list[dict[str, Any]]:
    """Return one data set's rows: those of the table, plus accuracies in floats and as PNG for rows with pictures."""
    found = table.aggregate(plan, ROWS)
    runs = {row["method"]: table.tested_runs(plan, row["method"], row["lr"]) for row in found["rows"]}
    for row in found["rows"]:
        own = runs[row["method"]]
        latent, border = runs.get("pgn-14"), runs.get("pixel")
        row["as_trained"] = row.pop("difference_to_probe")
        row["pictures"] = {}
        for kind in ("float", "png"):
            seen = {}
            for seed, run in own.items():
                file = table.Job(row["method"], row["lr"], seed, True).directory(plan.out) / "pictures.json"
                if file.exists():
                    seen[seed] = {"test": {"labels": run["test"]["labels"], "predictions": read_json(file)[kind]}}
            if seen:
                row["pictures"][kind] = summarised(seen, own, latent, border)
    return found["rows"]


def summarised(
    seen: Mapping[int, Mapping[str, Any]],
    trained: Mapping[int, Mapping[str, Any]],
    latent: Mapping[int, Mapping[str, Any]] | None,
    border: Mapping[int, Mapping[str, Any]] | None,
) -> dict[str, Any]:
    """Return the accuracy over seeds of predictions from pictures, and how it differs from three others.

    These are the test as trained, PGN on tokens, and the border.
    """
    import statistics

    accuracies = [statistics.fmean(table.correct(run)) for run in seen.values()]
    changed = [
        sum(
            p != q for p, q in zip(seen[seed]["test"]["predictions"], trained[seed]["test"]["predictions"], strict=True)
        )
        for seed in seen
    ]
    return {
        "accuracy": statistics.fmean(accuracies),
        "interval": table.seed_interval(accuracies),
        "changed": changed,
        "to_latent": None if latent is None else table.difference_to(seen, latent),
        "to_border": None if border is None else table.difference_to(seen, border),
    }


def markdown(rows: Mapping[str, Sequence[Mapping[str, Any]]], seeds: Sequence[int]) -> str:
    """Format the tables of all data sets."""
    lines = [
        "# Prompts as pixels: clip-vit-b16 at 112 px",
        "",
        f"`make pixels`: {EPOCHS} epochs, batch 16, seeds {', '.join(map(str, seeds))}; the protocol is that of "
        'table.md. "As trained" is the test that the run made itself, '
        '"floats" the prompted images in floats before any rounding, "PNG" after writing them to '
        "8-bit files and reading them again, by the backbone in bfloat16; a PGN of tokens is inverted for both "
        "(its pixels reach some hundreds, of which bfloat16 keeps too little). The last two columns are "
        "differences of the PNG's accuracy, in points, with 95 % intervals over test images and over seeds. "
        '"Changed" counts the predictions that differ between PNG and test as trained, of the seeds that were '
        "classified as pictures: those whose adapters were at hand.",
        "",
    ]
    for data, of_data in rows.items():
        settings = DATA[data]
        lines += [
            f"## {data}: {settings['num_train']} training, {settings['num_val']} validation and "
            f"{settings['num_test']:,} test images",
            "",
            "| Row | Trained parameters | of these prompts | Learning rate | As trained | Floats | PNG | Changed "
            "| PNG − PGN on tokens | PNG − pixel border |",
            "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        for row in sorted(of_data, key=lambda row: -row["test_accuracy"]):
            png, floats = row["pictures"].get("png"), row["pictures"].get("float")
            cells = [
                row["title"],
                f"{row['trained_parameters']['total']:,}",
                f"{row['trained_parameters']['generator']:,}",
                "–" if row["lr"] is None else f"{row['lr']:g}",
                accuracy(row["test_accuracy"], row["test_interval_over_seeds"]),
                *("–" if each is None else accuracy(each["accuracy"], each["interval"]) for each in (floats, png)),
                "–" if png is None else f"{sum(png['changed'])} of {settings['num_test'] * len(png['changed']):,}",
                *("–" if png is None else points(png[key]) for key in ("to_latent", "to_border")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def accuracy(value: float, half: float | None) -> str:
    """Format an accuracy with its interval over seeds."""
    return f"{value:.4f}" + ("" if half is None else f" ± {half:.4f}")


def points(difference: Mapping[str, Any] | None) -> str:
    """Format a difference of accuracies in points, with its intervals."""
    if difference is None:
        return "–"
    intervals = [difference["image_interval"], difference["seed_interval"]]
    brackets = " ".join("–" if i is None else f"[{100 * i[0]:+.1f}, {100 * i[1]:+.1f}]" for i in intervals)
    return f"{100 * difference['mean']:+.1f} {brackets}"


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(prog="experiments/pixels.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--data", nargs="+", default=list(DATA), choices=list(DATA))
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--workers", type=int, default=2, help="number of parallel runs, with one thread each")
    p.add_argument(
        "--out", type=Path, help="parent of the run directories OUT/DATA of each data set; default: as in table.py"
    )
    p.add_argument("--results", type=Path, default=Path("results"), help="folder for pixels.json and pixels.md")
    p.add_argument("--tables-only", action="store_true", help="write the tables of finished runs; run nothing")
    p.add_argument("--dry-run", action="store_true", help="print which runs would start; run nothing")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write pixels.md and pixels.json; return 1 if a run failed, 130 after Ctrl-C."""
    from fastprompt.files import atomic_write

    args = parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: list[table.Job] = []
    rows: dict[str, Any] = {}
    left: list[str] = []
    for data in args.data:
        plan = plan_of(data, (args.out or table.RUNS) / data, args.seeds)
        if args.out is None:
            table.restore(data)
        if args.dry_run:
            left += [f"would run         {job.directory(plan.out)}" for job in table.next_jobs(plan, [], [])]
            lost = lost_adapters(plan)
            left += [f"would run again   {directory}" for directory in lost]
            left += [f"would classify    {directory}" for directory in unclassified(plan) if directory not in lost]
            continue
        if not args.tables_only:
            try:
                table.fetch(plan.base)
                for directory in lost_adapters(plan):
                    print(f"run again   {directory}: its adapter is gone", flush=True)
                    shutil.rmtree(directory)
                failed += table.run_all(plan, args.workers, 1)
                for directory in unclassified(plan):
                    classify_run(directory)
            except KeyboardInterrupt:
                print("interrupted; run the same command again to resume", file=sys.stderr)
                return 130
        if args.out is None:
            records.pack(plan.out, table.RECORDS / data)
        rows[data] = rows_of(plan)
    if args.dry_run:
        print("\n".join(left) or "nothing is left to run")
        return 0
    write_json(args.results / "pixels.json", rows)
    atomic_write(args.results / "pixels.md", markdown(rows, args.seeds))
    print((args.results / "pixels.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
