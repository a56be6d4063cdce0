"""Compare every method on the same small data set, with three seeds: `python experiments/table.py` or `make table`.

Protocol: a seed draws the training and validation images and determines everything random in the training. The test
images are the same for all seeds. Each learning rate of a method's grid is run with every seed, and the one with the
best validation accuracy, averaged over the seeds, is chosen. The test split is read once for each run at that rate,
after training, with the adapter that was best on validation.

Each run is a separate process with a run directory `OUT/<method>/lr<rate>-seed<seed>`. Finished runs are skipped and
interrupted ones resumed, so the command may be killed and restarted at any time, or started for some methods only
(`--methods pgn vapt`). The table is rebuilt from all runs in OUT whenever the command ends. `--dry-run` prints which
runs would start.

Without `--out`, the runs are in `runs/table/<data>`. Missing ones are unpacked from `experiments/records`, and finished
ones are packed there at the end (`experiments/records.py`). A table of another backbone, or of other sizes, needs a
`--name`, which stands for the data in these paths and in the name of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import records

from fastprompt.cli.main import recipe_values
from fastprompt.cli.options import load_plugins
from fastprompt.generators import get_method, list_methods
from fastprompt.locks import DirectoryInUse
from fastprompt.runs.directory import read_json, write_json
from fastprompt.runs.execute import execute
from fastprompt.runs.settings import RunSettings
from fastprompt.train.recipes import default_recipe


class Row(NamedTuple):
    """A row of the table: a method, its options, and the learning rates to try.

    A single rate is used directly. A method without rates needs none, like the L-BFGS probe, which chooses C on
    validation.
    """

    method: str
    options: dict[str, Any]
    title: str
    lrs: tuple[float, ...]


VARIANTS: dict[str, Row] = {
    "pgn-14": Row("pgn", {"num_prompts": 14}, "PGN, 14 prompts", (0.003, 0.01)),
    "pgn-small": Row("pgn", {"num_prompts": 14, "library_size": 54, "widths": [8, 16, 16, 16]}, "PGN, small", (0.003,)),
    "rgb-extend": Row("rgb-pgn", {"num_prompts": 14, "placement": "extend"}, "PGN in pixels, image extended", (0.003,)),
    "rgb-replace": Row("rgb-pgn", {"num_prompts": 14, "placement": "replace"}, "PGN in pixels, image shrunk", (0.003,)),
}
"""Rows that are a method with other options, for `experiments/pixels.py`."""
# The recipe of every method except the probes, apart from its learning rate. results/exploration.md explains it.
RECIPE: dict[str, Any] = {
    "batch_size": 16,
    "head_init": "default",
    "head_lr": 1e-3,
    "label_smoothing": 0.1,
    "select_by": "loss",
}
ROOT = Path(__file__).resolve().parents[1]
RUNS, RECORDS = ROOT / "runs" / "table", ROOT / "experiments" / "records"
# Epochs of the methods that train on features encoded once; these epochs cost almost nothing.
CACHED_EPOCHS = 100


def row_of(name: str) -> Row:
    """Return a row by its name: one of `VARIANTS`, or a registered method."""
    if name in VARIANTS:
        return VARIANTS[name]
    method = get_method(name)
    searched = method.lrs or (() if method.solver == "lbfgs" else (default_recipe(name).lr,))
    return Row(name, {}, method.title, searched)


def default_rows() -> list[str]:
    """Return the rows of `make table`: all methods registered with learning rates to try, and the L-BFGS probe."""
    methods = [get_method(name) for name in list_methods()]
    return [method.name for method in methods if method.lrs or method.solver == "lbfgs"]


def is_probe(name: str) -> bool:
    """Whether the row trains only the head."""
    return get_method(row_of(name).method).head_only


@dataclass(frozen=True)
class Plan:
    """What to run: the settings that all runs share, and methods, grids and seeds."""

    base: RunSettings
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    lrs: tuple[float, ...] | None
    out: Path
    plugins: tuple[str, ...] = ()
    cache_dir: Path | None = None

    def grid(self, method: str) -> tuple[float | None, ...]:
        """The learning rates to try; (None,) for the L-BFGS probe, which has none."""
        grid = row_of(method).lrs
        return (self.lrs or grid) if grid else (None,)


@dataclass(frozen=True)
class Job:
    """One run: a method at a learning rate with a seed; `test` says whether to read the test split."""

    method: str
    lr: float | None
    seed: int
    test: bool

    def directory(self, out: Path) -> Path:
        """Return the run's directory, the same with and without the test split."""
        rate = "default" if self.lr is None else f"{self.lr:g}"
        return out / self.method / f"lr{rate}-seed{self.seed}"

    def settings(self, base: RunSettings) -> RunSettings:
        """Return the run's settings. The seed draws the images and seeds the training; test images stay the same."""
        recipe = dict(base.recipe)
        row = row_of(self.method)
        method = get_method(row.method)
        if method.head_only:
            recipe = {key: value for key, value in recipe.items() if RECIPE.get(key) != value}
            recipe["epochs"] = CACHED_EPOCHS
        recipe["seed"] = self.seed
        if self.lr is not None:
            recipe["lr"] = self.lr
        on_features = method.head_only and method.solver == "gradient"
        constant = method.generator_class is not None and method.generator_class.role == "queries"
        augment = "none" if on_features or constant else base.augment  # frozen features are computed once
        options = {**base.options, **row.options}
        if "border" in method.free_options and base.image_size is not None:
            # The published border is 30 pixels of 224.
            options.setdefault("border", max(1, round(30 * base.image_size / 224)))
        return replace(base, method=row.method, options=options, recipe=recipe, data_seed=self.seed, augment=augment)


def read_run(directory: Path) -> dict[str, Any] | None:
    """Return a run's results, with `diverged` if training ended in NaN; None if it is not finished."""
    for name in ("results.json", "diverged.json"):
        if (directory / name).exists():
            return read_json(directory / name)
    return None


def validation_score(runs: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the score to choose learning rates by: mean validation accuracy over the seeds, then the lower loss.

    A rate that diverged with any seed is worst.
    """
    if any(results.get("diverged") for results in runs):
        return -1.0, -math.inf
    return (
        statistics.fmean(results["validation"]["accuracy"] for results in runs),
        -statistics.fmean(results["validation"]["loss"] for results in runs),
    )


def runs_at(plan: Plan, method: str, lr: float | None) -> list[dict[str, Any]] | None:
    """Return the results of all seeds at one learning rate; None if one is missing."""
    runs = [read_run(Job(method, lr, seed, False).directory(plan.out)) for seed in plan.seeds]
    return None if None in runs else [results for results in runs if results is not None]


def choose_lr(plan: Plan, method: str) -> tuple[float | None, ...] | None:
    """Return the chosen learning rate in a 1-tuple; None if the grid is not finished."""
    if len(plan.grid(method)) == 1:
        return plan.grid(method)
    scores: list[tuple[tuple[float, float], float | None]] = []
    for lr in plan.grid(method):
        runs = runs_at(plan, method, lr)
        if runs is None:
            return None
        scores.append((validation_score(runs), lr))
    return (max(scores, key=lambda entry: entry[0])[1],)


def next_jobs(plan: Plan, busy: Sequence[Job], failed: Sequence[Job]) -> list[Job]:
    """Return the jobs that could start now, in the order of methods and a method's grid before its test records."""
    jobs = []
    taken = {(job.method, job.lr, job.seed) for job in [*busy, *failed]}
    for method in plan.methods:
        grid = plan.grid(method)
        for lr, seed in itertools.product(grid if len(grid) > 1 else (), plan.seeds):
            job = Job(method, lr, seed, test=False)
            if (method, lr, seed) not in taken and read_run(job.directory(plan.out)) is None:
                jobs.append(job)
        chosen = choose_lr(plan, method)
        if chosen is None:
            continue
        for seed in plan.seeds:
            job = Job(method, chosen[0], seed, test=True)
            results = read_run(job.directory(plan.out))
            done = results is not None and (results.get("diverged") or results.get("test") is not None)
            if (method, chosen[0], seed) not in taken and not done:
                jobs.append(job)
    return jobs


def stop_with(parent: int) -> None:
    """Interrupt this process when its parent, with the id `parent`, is gone, so that a killed table stops its runs."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


def run_single(
    settings: RunSettings,
    directory: Path,
    test: bool,
    threads: int,
    parent: int | None = None,
    cache_dir: Path | None = None,
) -> int:
    """Execute one run in this process. NaN is recorded, not raised; a second process on the directory is refused.

    Ctrl-C stops it even if a background shell started the table. Otherwise its children would start with SIGINT
    ignored, and the table would wait for them forever.
    """
    import torch

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if parent is not None:
        stop_with(parent)
    torch.set_num_threads(threads)
    try:
        execute(settings, directory, test=test, progress=False, cache_dir=cache_dir)
    except DirectoryInUse as error:
        print(error, file=sys.stderr)
        return 3
    except FloatingPointError as error:
        write_json(
            directory / "diverged.json",
            {"diverged": True, "error": str(error), "method": settings.method},
        )
    return 0


def start(job: Job, plan: Plan, threads: int) -> subprocess.Popen[bytes]:
    """Start a job in its own process, with its output in `output.txt` in its directory."""
    directory = job.directory(plan.out)
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        __file__,
        "--single",
        json.dumps(job.settings(plan.base).to_dict()),
    ]
    command += ["--out", str(directory), "--threads", str(threads), "--parent", str(os.getpid())]
    command += ["--with-test"] if job.test else []
    command += [] if plan.cache_dir is None else ["--cache-dir", str(plan.cache_dir)]
    command += [word for module in plan.plugins for word in ("--plugin", module)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with (directory / "output.txt").open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def run_all(plan: Plan, workers: int, threads: int) -> list[Job]:
    """Run all jobs and return those that failed.

    Ctrl-C interrupts the running jobs, which can be resumed.
    """
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: list[Job] = []
    try:
        while True:
            for job, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[job]
                directory = job.directory(plan.out)
                results = read_run(directory)
                if code != 0 or results is None:
                    failed.append(job)
                    print(f"failed ({code})  {directory}: see output.txt there", flush=True)
                elif results.get("diverged"):
                    print(f"diverged    {directory}", flush=True)
                else:
                    accuracy, seconds = results["validation"]["accuracy"], results["seconds"]
                    print(f"val {accuracy:.4f}  {directory}  {seconds:.0f} s", flush=True)
            jobs = next_jobs(plan, list(running), failed)
            while jobs and len(running) < workers:
                job = jobs.pop(0)
                running[job] = start(job, plan, threads)
                print(f"start       {job.directory(plan.out)}", flush=True)
            if not running:
                return failed
            time.sleep(0.5)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()


def seed_interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of the mean over seeds (Student's t); None for a single run."""
    from scipy.stats import t

    if len(values) < 2:
        return None
    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def correct(run: Mapping[str, Any]) -> list[bool]:
    """Whether each test image was classified correctly."""
    return [p == y for p, y in zip(run["test"]["predictions"], run["test"]["labels"], strict=True)]


def difference_to(runs: Mapping[int, Mapping[str, Any]], reference: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return accuracy minus the reference's on the same test images, over the seeds (training images) of both."""
    from fastprompt.train.grid import paired_difference

    seeds = [seed for seed in runs if seed in reference]
    if not seeds:
        raise ValueError(f"seeds must overlap, got {sorted(runs)} and {sorted(reference)}")
    for seed in seeds:
        if runs[seed]["test"]["labels"] != reference[seed]["test"]["labels"]:
            raise ValueError(f"seed {seed}: the two methods were tested on different images")
    pair = paired_difference([correct(runs[s]) for s in seeds], [correct(reference[s]) for s in seeds])
    return {
        "mean": pair.difference,
        "image_interval": list(pair.image_interval),
        "seed_interval": list(pair.seed_interval) if len(seeds) > 1 else None,
        "num_images": pair.num_images,
        "seeds": seeds,
    }


def rates_on_disk(plan: Plan, method: str) -> tuple[float, ...]:
    """Return the learning rates with finished runs for every seed, from any grid."""
    rates = []
    for directory in (plan.out / method).glob(f"lr*-seed{plan.seeds[0]}"):
        rate = directory.name.removeprefix("lr").removesuffix(f"-seed{plan.seeds[0]}")
        if rate != "default" and runs_at(plan, method, float(rate)) is not None:
            rates.append(float(rate))
    return tuple(sorted(rates))


def tested_runs(plan: Plan, method: str, lr: float | None) -> dict[int, dict[str, Any]]:
    """Return seed -> results of the runs at the chosen learning rate that have a test record."""
    runs = {}
    for seed in plan.seeds:
        results = read_run(Job(method, lr, seed, True).directory(plan.out))
        if results is not None and not results.get("diverged") and results.get("test") is not None:
            runs[seed] = results
    return runs


def aggregate(plan: Plan, methods: Sequence[str] | None = None) -> dict[str, Any]:
    """Build the table of `methods` from the finished runs in `plan.out`; None is the `default_rows`.

    Only methods with a finished grid and a test record are included.
    """
    rows: list[dict[str, Any]] = []
    tested: dict[str, dict[int, dict[str, Any]]] = {}
    for method in default_rows() if methods is None else methods:
        here = replace(plan, lrs=rates_on_disk(plan, method) or plan.lrs)
        chosen = choose_lr(here, method)
        runs = {} if chosen is None else tested_runs(here, method, chosen[0])
        if chosen is None or not runs:
            continue
        tested[method] = runs
        rows.append(summarise(method, chosen[0], runs) | grid_record(here, method, chosen[0]))
    probes = [row for row in rows if is_probe(row["method"])]
    best_probe = max(probes, key=lambda row: row["validation_accuracy"])["method"] if probes else None
    for row in rows:
        compared = best_probe is not None and row["method"] != best_probe
        row["difference_to_probe"] = difference_to(tested[row["method"]], tested[str(best_probe)]) if compared else None
    one = next((run for runs in tested.values() for run in runs.values()), None)
    shared = ("backbone", "backbone_fingerprint", "image_size", "data", "machine", "torch_version")
    return {
        "protocol": {} if one is None else {key: one[key] for key in shared},
        "seeds": list(plan.seeds),
        "best_probe": best_probe,
        "rows": rows,
    }


def grid_record(plan: Plan, method: str, chosen: float | None) -> dict[str, Any]:
    """Return validation accuracy by learning rate (None if diverged), and whether the chosen rate ends the grid."""
    grid: dict[str, float | None] = {}
    for lr in plan.grid(method):
        runs = runs_at(plan, method, lr)
        if lr is not None and runs is not None:
            accuracy = validation_score(runs)[0]
            grid[f"{lr:g}"] = None if accuracy < 0 else accuracy
    at_edge = chosen is not None and len(grid) > 1 and f"{chosen:g}" in (min(grid, key=float), max(grid, key=float))
    return {"grid": grid, "at_edge_of_grid": at_edge}


def speed(run: Mapping[str, Any]) -> float:
    """Return training images per second of the median epoch, so that a delayed epoch does not count.

    For a probe it is that of the whole run, because its epochs read features instead of images.
    """
    if is_probe(run["method"]):
        return float(run["images_per_second"])
    return statistics.median(epoch["images_per_second"] for epoch in run["history"])


def summarise(method: str, lr: float | None, runs: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Build one row of the table, with means over seeds."""
    one = next(iter(runs.values()))
    test = [r["test"]["accuracy"] for r in runs.values()]
    return {
        "method": method,
        "title": row_of(method).title,
        "config": one["config"],
        "recipe": one["recipe"],
        "lr": lr,
        "seeds": list(runs),
        "trained_parameters": one["trained_parameters"],
        "paper_parameter_count": one["paper_parameter_count"],
        "validation_accuracy": statistics.fmean(r["validation"]["accuracy"] for r in runs.values()),
        "test_accuracy": statistics.fmean(test),
        "test_accuracy_by_seed": test,
        "test_interval_over_seeds": seed_interval(test),
        "images_per_second": statistics.fmean(speed(r) for r in runs.values()),
        "peak_memory_mib": max(r["peak_memory_mib"] for r in runs.values()),
    }


def markdown(table: Mapping[str, Any]) -> str:
    """Format the table as Markdown, followed by an explanation of the numbers."""
    protocol = table["protocol"]
    data = protocol.get("data", {})
    lines = [
        f"# {protocol.get('backbone')} at {protocol.get('image_size')} px on {data.get('name')}",
        "",
        "| Method | Trained parameters | of these head | Learning rate | Validation | Test, ± over seeds "
        "| Minus the best probe [over images] | [over seeds] | Images/s | Peak MiB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in sorted(table["rows"], key=lambda row: -row["test_accuracy"]):
        half, difference = row["test_interval_over_seeds"], row["difference_to_probe"]
        lr = "C by L-BFGS" if row["lr"] is None else f"{row['lr']:g}" + (" (edge)" if row["at_edge_of_grid"] else "")
        over_images, over_seeds = "the best probe" if row["method"] == table["best_probe"] else "–", "–"
        if difference is not None:
            over_images = f"{difference['mean']:+.4f} {bracket(difference['image_interval'])}"
            over_seeds = bracket(difference["seed_interval"])
        cells = [
            row["title"],
            f"{row['trained_parameters']['total']:,}",
            f"{row['trained_parameters']['head']:,}",
            lr,
            f"{row['validation_accuracy']:.4f}",
            f"{row['test_accuracy']:.4f} {'(one run)' if half is None else f'± {half:.4f}'}",
            over_images,
            over_seeds,
            f"{row['images_per_second']:.1f}",
            f"{row['peak_memory_mib']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Learning rates tried (validation accuracy, mean over the seeds):", ""]
    for row in table["rows"]:
        tried = ", ".join(f"{lr}: {'diverged' if a is None else f'{a:.4f}'}" for lr, a in row["grid"].items())
        if tried:
            lines.append(f"* {row['title']} ({recipe_words(row['recipe'])}): {tried}")
    sizes = ", ".join(f"{data[key]} {key}" for key in ("train", "val", "test") if key in data)
    seeds = ", ".join(str(seed) for seed in table["seeds"])
    machine = protocol.get("machine")
    queries = any(row["method"] == "vqt" for row in table["rows"])
    constant = " and VQT, whose frozen features are computed once" if queries else ""
    lines += [
        "",
        f"Images: {sizes}; augmentation of the training images, but for the SGD probe{constant}: "
        f"{data.get('augment')}. "
        f"A seed ({seeds}) draws the training and validation images and sets initial values, batch order and "
        "dropout; it is the same for every method. The test images are the same for all seeds.",
        "The learning rate is the one with the best validation accuracy, averaged over the seeds; a method with one "
        "rate was run at that. The test split is read once a run, after training, from the epoch that was best on "
        "validation.",
        "All intervals are 95 %. ± is Student's t over the seeds' test accuracies. The difference to the "
        "probe with the better validation accuracy is taken image by image and seed by seed; its first "
        "interval is over test images (differences averaged over seeds), its second over seeds.",
        f"Images/s (the median epoch) and peak resident memory are those of one process ({machine}) on a machine "
        "that other runs shared: they are no benchmark and do not compare methods.",
        "",
    ]
    return "\n".join(lines)


def recipe_words(recipe: Mapping[str, Any]) -> str:
    """Describe a method's recipe, apart from its learning rate, in a few words."""
    words = [recipe["optimizer"], f"{recipe['epochs']} epochs", f"batch {recipe['batch_size']}"]
    if recipe["head_init"] == "probe":
        words.append("the head starts as the probe")
    if recipe["head_lr"] is not None:
        words.append(f"head {recipe['head_lr']:g}")
    if recipe["label_smoothing"]:
        words.append(f"label smoothing {recipe['label_smoothing']:g}")
    return ", ".join(words)


def bracket(interval: Sequence[float] | None) -> str:
    """Format an interval; a dash for None."""
    return "–" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def write_table(plan: Plan, results: Path, name: str = "table") -> dict[str, Any]:
    """Write `name`.json and `name`.md into the directory `results`."""
    from fastprompt.files import atomic_write

    table = aggregate(plan)
    write_json(results / f"{name}.json", table)
    atomic_write(results / f"{name}.md", markdown(table))
    return table


def name_of(data: str) -> str:
    """Turn a data set's name into one part of a path; an image folder is called by its name."""
    return re.sub(r"[^\w.-]+", "-", data).strip("-.")


def restore(name: str) -> None:
    """Unpack the records called `name` that have no run directory."""
    if (RECORDS / f"{name}.jsonl").exists():
        records.unpack(RECORDS / name, RUNS / name)


def fetch(base: RunSettings) -> None:
    """Fetch backbone and data once before parallel runs start."""
    from fastprompt.runs.execute import backbone_at, load_run_data, square_size

    load_run_data(base, square_size(backbone_at(base.backbone, base.image_size)))


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(prog="experiments/table.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument(
        "--methods",
        nargs="+",
        default=default_rows(),
        choices=[*list_methods(), *VARIANTS],
        metavar="METHOD",
        help="default: %(default)s",
    )
    p.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE", help="module that registers your own methods"
    )
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--lrs", nargs="+", type=float, help="learning rates to use instead of the methods' own grids")
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another recipe field, for every method",
    )
    p.add_argument("--backbone", default="clip-vit-b16")
    p.add_argument("--image-size", type=int, default=112)
    p.add_argument("--data", default="fashion-mnist")
    p.add_argument("--num-train", type=int, default=800)
    p.add_argument("--num-val", type=int, default=200)
    p.add_argument("--num-test", type=int, default=2000)
    p.add_argument(
        "--augment",
        default="flip",
        help="augmentation of training images; the SGD probe and VQT train on frozen features without any",
    )
    p.add_argument("--workers", type=int, default=2, help="number of parallel runs")
    p.add_argument("--threads", type=int, default=1, help="threads of each run")
    p.add_argument("--name", help="of the runs' folder, the kept records and the table-NAME; default: DATA, and table")
    p.add_argument(
        "--out", type=Path, help="parent of the run directories; default: runs/table/NAME, with the kept records"
    )
    p.add_argument("--cache-dir", type=Path, help="folder for VQT's frozen features, which its runs share")
    p.add_argument("--results", type=Path, default=Path("results"), help="folder of the table's .json and .md")
    p.add_argument("--aggregate-only", action="store_true", help="rebuild the table; run nothing")
    p.add_argument("--dry-run", action="store_true", help="print which runs would start; run nothing")
    p.add_argument("--single", help=argparse.SUPPRESS)
    p.add_argument("--with-test", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    p.add_argument("--fetch", action="store_true", help=argparse.SUPPRESS)
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing and write the table; return 1 if a run failed, 130 after Ctrl-C."""
    load_plugins(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(arguments)
    if args.single is not None:
        settings = RunSettings.from_dict(json.loads(args.single))
        return run_single(settings, args.out, args.with_test, args.threads, args.parent, args.cache_dir)
    base = RunSettings(
        method=args.methods[0],
        data=args.data,
        backbone=args.backbone,
        image_size=args.image_size,
        num_train=args.num_train,
        num_val=args.num_val,
        num_test=args.num_test,
        augment=args.augment,
        recipe={**RECIPE, "epochs": args.epochs, **recipe_values(args.recipe)},
    )
    if args.fetch:
        try:
            fetch(base)
        except (ValueError, TypeError, OSError, RuntimeError) as error:
            print(f"table: error: {error}", file=sys.stderr)
            return 1
        return 0
    name = name_of(args.name or args.data)
    written = f"table-{name}" if args.name else "table"
    out = args.out or RUNS / name
    plan = Plan(
        base,
        tuple(args.methods),
        tuple(args.seeds),
        tuple(args.lrs) if args.lrs else None,
        out,
        tuple(args.plugin),
        args.cache_dir,
    )
    if args.out is None:
        restore(name)
    if args.dry_run:
        left = [f"would run   {job.directory(plan.out)}" for job in next_jobs(plan, [], [])]
        print("\n".join(left) or "nothing is left to run")
        return 0
    failed: list[Job] = []
    if not args.aggregate_only:
        if args.workers > 1:
            words = list(sys.argv[1:] if arguments is None else arguments)
            if subprocess.run([sys.executable, __file__, *words, "--fetch"]).returncode:
                return 1
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            failed = run_all(plan, args.workers, args.threads)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to resume", file=sys.stderr)
            return 130
    if args.out is None:
        records.pack(out, RECORDS / name)
    write_table(plan, args.results, written)
    print((args.results / f"{written}.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
