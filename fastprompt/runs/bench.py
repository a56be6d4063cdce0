"""Run methods on the tasks of a protocol: search on validation, train with every seed, compare.

A cell is one method on one task (and, for low-data curves, with so many images of each class). Its grid of learning
rates and weight decays is trained with the first seed and scored by validation accuracy. While the best point lies at
an end of an axis, the axis is widened. The best point is then trained with every seed: on the training images and
scored on validation or, in a final bench, as the protocol's final runs are, and tested once.

Everything is a run directory (`fastprompt.runs.execute`) below OUT/<task>/<method>, so the same call goes on where it
stopped, and several processes may work on the same OUT.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.files import atomic_write
from fastprompt.generators import get_method
from fastprompt.locks import DirectoryInUse
from fastprompt.runs.directory import RESULTS_FILE, read_json, write_json
from fastprompt.runs.execute import execute
from fastprompt.runs.settings import RunSettings

if TYPE_CHECKING:
    from fastprompt.generators.registry import Method
    from fastprompt.protocols import Protocol, Task

METHODS = ("linear", "vpt-shallow", "vpt-deep", "pgn", "free", "v2apt", "vapt")
RECIPES = ("paper", "default")
PLAN_FILE, RECORDS_FILE, SUMMARY_FILE, DIVERGED_FILE = "bench.json", "records.jsonl", "summary.json", "diverged.json"
AROUND = 3.0
"""Factor between the learning rates that are tried around a recipe's own, where nobody published a search."""
SAME_EVERYWHERE = ("backbone", "image_size", "recipe", "normalise", "changes", "widenings")
"""Parts of a plan that all runs of a directory share; methods, tasks and seeds may be added later."""


@dataclass(frozen=True)
class Entry:
    """A row of the comparison: a method with options and recipe of its own.

    Attributes:
        name: name of the row and of its directories.
        method: a registered method.
        options, recipe: options of the method, and changes to its recipe.
        lrs, weight_decays: the grid; None is the authors' search or, with the default recipe, the method's.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    lrs: tuple[float, ...] | None = None
    weight_decays: tuple[float, ...] | None = None

    @property
    def title(self) -> str:
        """The method's title, with the row's name if that is another."""
        title = get_method(self.method).title
        return title if self.name == self.method else f"{title} ({self.name})"


@dataclass(frozen=True)
class BenchPlan:
    """What to run.

    Attributes:
        protocol: a protocol's name or TOML file. data_root: the folder with its data.
        backbone, image_size: as in `RunSettings`; an image_size of None is the protocol's.
        entries: the rows.
        tasks: names of tasks; () is all of them.
        seeds: seeds of the compared runs; () is the protocol's. The first is that of the search.
        recipe: "paper" trains as a method's authors published, where they did; "default" as this library does.
        normalise: "protocol" normalises pixels as the protocol says, "backbone" as the backbone's weights ask for.
        changes: fields of `Recipe` to change for every method.
        per_class: numbers of training images of each class, for low-data curves; None is all of them.
        widenings: how often an axis of the grid is widened at most.
        final: train as the protocol's final runs do and test.
    """

    protocol: str
    data_root: str
    backbone: str
    entries: tuple[Entry, ...] = tuple(Entry(name, name) for name in METHODS)
    tasks: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    recipe: str = "paper"
    normalise: str = "protocol"
    image_size: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    per_class: tuple[int | None, ...] = (None,)
    widenings: int = 4
    final: bool = False

    def __post_init__(self) -> None:
        for name, choices in (("recipe", RECIPES), ("normalise", ("protocol", "backbone"))):
            if getattr(self, name) not in choices:
                raise ArgumentError(name, f"must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("entries", "per_class"):
            values = [getattr(each, "name", each) for each in getattr(self, name)]
            if not values or len({*values}) < len(values):
                raise ArgumentError(name, f"must be different and at least one, got {values}")
        for entry in self.entries:
            get_method(entry.method).config(entry.options)
        for few in self.per_class:
            if few is not None and few < 1:
                raise ArgumentError("per_class", f"must be positive numbers of images, got {few}")
        if self.widenings < 0:
            raise ArgumentError("widenings", f"must be at least 0, got {self.widenings}")


Point = tuple[float | None, float | None]
"""A learning rate (the authors' base rate with their recipe) and a weight decay; (None, None) for the L-BFGS probe."""


@dataclass(frozen=True)
class Job:
    """One run of a cell. `stage` is "search", "seeds" or "final"."""

    cell: Cell
    stage: str
    point: Point
    seed: int

    @property
    def directory(self) -> Path:
        """The run's directory; a run of the search is also the first of the compared ones."""
        lr, decay = ("own" if value is None else f"{value:g}" for value in self.point)
        folder = "final" if self.stage == "final" else "validation"
        return self.cell.directory / folder / f"lr{lr}-wd{decay}-seed{self.seed}"


@dataclass(frozen=True)
class Cell:
    """One entry on one task with so many images of each class (None: all)."""

    plan: BenchPlan
    protocol: Protocol
    task: Task
    entry: Entry
    per_class: int | None
    out: Path

    @property
    def method(self) -> Method:
        """The registration of the entry's method."""
        return get_method(self.entry.method)

    @property
    def directory(self) -> Path:
        """The directory of the cell's runs."""
        few = "" if self.per_class is None else f"-{self.per_class}-per-class"
        return self.out / self.task.name / f"{self.entry.name}{few}"

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of the compared runs."""
        return self.plan.seeds or self.protocol.seeds

    def published(self) -> str | None:
        """Return the name of the authors' recipe if the plan asks for it and they published one."""
        return next(iter(self.method.published), None) if self.plan.recipe == "paper" else None

    def axes(self) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return the learning rates and weight decays to start from; None for a method without any."""
        from fastprompt.train.recipes import default_recipe

        if self.method.solver == "lbfgs":
            return None
        name = self.published()
        rates: tuple[float, ...]
        decays: tuple[float, ...]
        if name is None:
            own = default_recipe(self.entry.method)
            rate, decay, rates, decays = own.lr, own.weight_decay, self.method.lrs, ()
        else:
            published = self.method.published[name]
            rate, decay = published.recipe["lr"], published.recipe.get("weight_decay", 0.0)
            searched = published.lr_per is not None
            rates = (self.protocol.base_lrs or published.lrs) if searched else ()
            decays = (self.protocol.weight_decays or published.weight_decays) if searched else ()
        rates = self.entry.lrs or rates or (rate / AROUND, rate, rate * AROUND)
        return tuple(sorted({*rates})), tuple(sorted({*(self.entry.weight_decays or decays or (decay,))}))

    def settings(self, job: Job, probe_C: float | None = None) -> RunSettings:
        """Return the settings of one run."""
        from fastprompt.train.recipes import named_recipe

        lr, decay = job.point
        changes = {**self.plan.changes, **self.entry.recipe}
        if decay is not None:
            changes["weight_decay"] = decay
        name = None if self.method.solver == "lbfgs" else self.published()
        if name is not None:
            recipe = named_recipe(name, {**changes, "base_lr": lr}, self.images(job.stage))
        else:
            recipe = {**changes, **({} if lr is None else {"lr": lr})}
        method, protocol = self.method, self.protocol
        size = self.plan.image_size or protocol.size
        options = dict(self.entry.options)
        if "border" in method.free_options:  # the published border is 30 pixels of 224
            options.setdefault("border", max(1, round(30 * size / 224)))
        on_features = method.head_only and method.solver == "gradient"  # computed once, without augmentation
        pixels = self.plan.normalise == "protocol"
        return RunSettings(
            method=self.entry.method,
            data=f"{self.plan.protocol}:{self.task.name}",
            data_root=self.plan.data_root,
            backbone=self.plan.backbone,
            options=options,
            recipe={**recipe, "seed": job.seed},
            image_size=size,
            data_seed=0 if self.per_class is None else job.seed,  # otherwise it only orders images
            augment="none" if on_features else protocol.augment,
            resize=protocol.resize,
            mean=protocol.mean if pixels else None,
            std=protocol.std if pixels else None,
            final=job.stage == "final",
            per_class=self.per_class,
            probe_C=probe_C,
        )

    def images(self, stage: str) -> int:
        """Return the number of training images of a stage, by the protocol."""
        if self.per_class is not None:
            return min(self.per_class * self.task.classes, self.task.train)
        together = stage == "final" and self.protocol.final_train == "train+val"
        return self.task.train + (self.task.val if together else 0)


class Finished:
    """The results of finished runs by directory, each read once.

    Of each evaluation it keeps "correct", (N,) bool, in place of labels, predictions and confusion.
    """

    def __init__(self) -> None:
        self._known: dict[Path, dict[str, Any]] = {}

    def of(self, job: Job) -> dict[str, Any] | None:
        """Return a run's results, with `diverged` if training ended in NaN; None if it is not finished."""
        directory = job.directory
        if directory not in self._known:
            for name in (RESULTS_FILE, DIVERGED_FILE):
                if (directory / name).exists():
                    found = read_json(directory / name)
                    if job.stage == "final" and not found.get("diverged") and found.get("test") is None:
                        return None
                    self._known[directory] = _compact(found)
        return self._known.get(directory)


def _compact(results: dict[str, Any]) -> dict[str, Any]:
    for name in ("validation", "test"):
        if results.get(name):
            record = dict(results[name])
            labels, predictions = record.pop("labels"), record.pop("predictions")
            del record["confusion"]
            results[name] = {**record, "correct": np.asarray(predictions) == np.asarray(labels)}
    return results


def score(results: Mapping[str, Any]) -> tuple[float, float]:
    """Return what a point of the grid is chosen by: validation accuracy, then the lower loss; divergence is worst."""
    if results.get("diverged"):
        return -1.0, -math.inf
    return results["validation"]["accuracy"], -results["validation"]["loss"]


@dataclass(frozen=True)
class Search:
    """Where the search of a cell stands.

    Attributes:
        jobs: runs that are needed now; [] when the search is over.
        best: the best point so far, None before the first grid is finished.
        tried: the points that were trained, with their scores.
        at_edge: whether the best point still lies at an end of an axis that was widened as often as it may be.
    """

    jobs: list[Job]
    best: Point | None
    tried: dict[Point, tuple[float, float]]
    at_edge: bool


def wider(values: Sequence[float], best: float) -> float | None:
    """Return the next value beyond `best` if it ends the axis, at the distance of its neighbour; else None.

    Nothing lies beyond a smallest value of 0, and an axis of one value is fixed.
    """
    ordered = sorted({*values})
    if len(ordered) < 2 or best not in (ordered[0], ordered[-1]):
        return None
    neighbour = ordered[1] if best == ordered[0] else ordered[-2]
    if best == 0:
        return None
    return float(f"{best * (best / neighbour if neighbour else 10.0):.6g}")


def search(cell: Cell, finished: Finished) -> Search:
    """Return the next runs of a cell's search, or its result; it depends on the finished runs only."""
    axes, seed = cell.axes(), cell.seeds[0]
    if axes is None:
        job = Job(cell, "search", (None, None), seed)
        results = finished.of(job)
        edge = results is not None and bool(results.get("probe", {}).get("at_edge"))
        return Search([job] if results is None else [], (None, None), {}, edge)
    points: list[Point] = list(itertools.product(*axes))
    widened = [0, 0]
    while True:
        jobs = [Job(cell, "search", point, seed) for point in points]
        missing = [job for job in jobs if finished.of(job) is None]
        done = {job.point: score(results) for job in jobs if (results := finished.of(job)) is not None}
        if missing:
            return Search(missing, None, done, False)
        best = max(points, key=lambda point: done[point])
        further: list[Point] = []
        at_edge = False
        for axis in (0, 1):
            tried = [value for point in points if (value := point[axis]) is not None]
            value = wider(tried, float(best[axis] or 0.0))
            if value is None:
                continue
            if widened[axis] == cell.plan.widenings:
                at_edge = True
                continue
            widened[axis] += 1
            further.append((value, best[1]) if axis == 0 else (best[0], value))
        if not further:
            return Search([], best, done, at_edge)
        points += [point for point in further if point not in points]


def cells_of(plan: BenchPlan, out: Path) -> list[Cell]:
    """Return every cell of a plan, task by task."""
    from fastprompt.protocols import load_protocol

    protocol = load_protocol(plan.protocol)
    tasks = [protocol.task(name) for name in plan.tasks] or list(protocol.tasks)
    return [
        Cell(plan, protocol, task, entry, few, out)
        for task, entry, few in itertools.product(tasks, plan.entries, plan.per_class)
    ]


def compared(cell: Cell, point: Point) -> list[Job]:
    """Return the runs that are compared: the chosen point with every seed."""
    return [Job(cell, "final" if cell.plan.final else "seeds", point, seed) for seed in cell.seeds]


def jobs_of(cell: Cell, finished: Finished) -> list[Job]:
    """Return the runs that a cell needs now; [] if it is complete."""
    found = search(cell, finished)
    if found.jobs or found.best is None:
        return found.jobs
    return [job for job in compared(cell, found.best) if finished.of(job) is None]


def run_bench(
    plan: BenchPlan,
    out: Path | str,
    *,
    device: str = "auto",
    announce: Callable[[str], None] | None = None,
    workers: int = 1,
    plugins: Sequence[str] = (),
) -> dict[str, Any]:
    """Run what is missing of a plan, and return the comparison (`summarise`).

    After every run OUT/records.jsonl is written, one line for each finished run. A run that diverges is recorded as
    worst and the bench goes on. A run that another process works on is left to it.

    Args:
        device: as in `execute`; with several workers, "auto" and "cuda" give each the next GPU.
        announce: called with a line before and after each run of this process.
        workers: number of processes that share the runs, this one included. Each has as many threads as this one, which
            should be set before.
        plugins: modules that the other workers import first (`load_plugin`).

    Raises:
        FileNotFoundError: tasks are not below the data root; the message names them and says how to get the data.
        ValueError, TypeError: the plan is wrong, `out` holds a bench with other settings, or data are damaged.
    """
    out = Path(out)
    cells = cells_of(plan, out)
    _check_data(plan, cells)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ArgumentError("workers", f"must be a positive integer, got {workers!r}")
    _check_plan(plan, out)
    finished = Finished()
    with _other_workers(workers - 1, plan, out, device, plugins):
        _work(plan, out, cells, finished, device, announce or (lambda text: None))
    write_records(out, cells, finished)
    summary = summarise(plan, cells, finished)
    write_json(out / SUMMARY_FILE, summary)
    return summary


@contextlib.contextmanager
def _other_workers(count: int, plan: BenchPlan, out: Path, device: str, plugins: Sequence[str]) -> Iterator[None]:
    """Context in which further processes work on the plan; they are ended if this one fails, and awaited if not.

    Raises:
        RuntimeError: one of them failed, at the end of the context. What it printed says why.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    threads = torch.get_num_threads()
    others = [
        context.Process(target=_other_worker, args=(number, plan, out, device, threads, list(plugins)))
        for number in range(1, count + 1)
    ]
    try:
        for process in others:
            process.start()
        yield
        for process in others:
            process.join()
    finally:
        for process in others:
            if process.is_alive():
                process.terminate()
    failed = [number for number, process in enumerate(others, 1) if process.exitcode]
    if failed:
        raise RuntimeError(
            f"worker {failed[0]} failed, as it says above, but all runs are complete: run the bench again to compare"
        )


def _other_worker(number: int, plan: BenchPlan, out: Path, device: str, threads: int, plugins: Sequence[str]) -> None:
    """Work on a plan as one of several processes."""
    import torch

    from fastprompt.generators import load_plugin
    from fastprompt.terminal import say

    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(number % torch.cuda.device_count())  # which GPU "auto" and "cuda" are
    for plugin in plugins:
        load_plugin(plugin)
    _work(plan, out, cells_of(plan, out), Finished(), device, lambda text: say(f"worker {number} {text}", sys.stderr))


def _work(
    plan: BenchPlan,
    out: Path,
    cells: Sequence[Cell],
    finished: Finished,
    device: str,
    said: Callable[[str], None],
) -> None:
    """Run what is missing until every cell is complete, leaving to other processes what they work on."""
    number, began = 0, time.monotonic()
    while True:
        waiting = [job for cell in cells for job in jobs_of(cell, finished)]
        if not waiting:
            break
        ran = False
        for job in waiting:
            where = job.directory.relative_to(out)
            said(f"[{number + 1}] {where}, {sum(not jobs_of(cell, finished) for cell in cells)} of {len(cells)} cells")
            if not _run(job, finished, device):
                said(f"    {where}: another process works on it")
                continue
            ran, number = True, number + 1
            results = finished.of(job)
            assert results is not None
            accuracy = "diverged" if results.get("diverged") else f"validation {results['validation']['accuracy']:.4f}"
            said(f"    {accuracy}; {(time.monotonic() - began) / number:.0f} s a run")
            write_records(out, cells, finished)
            break  # what is needed next depends on this run
        if not ran:
            time.sleep(1)


def _check_data(plan: BenchPlan, cells: Sequence[Cell]) -> None:
    protocol = cells[0].protocol
    root = Path(plan.data_root).expanduser()
    missing = {c.task.name for c in cells if c.task.layout != "torchvision" and c.task.place(root) is None}
    if missing:
        raise ArgumentPathError(
            "data_root",
            f"must hold the tasks of {protocol.name}; {root} lacks {', '.join(sorted(missing))}. {protocol.get} "
            f"--tasks NAME ... runs some of them",
        )


def _check_plan(plan: BenchPlan, out: Path) -> None:
    """Write the plan's shared settings into `out`; raise ValueError if other ones are there."""
    wanted = {name: getattr(plan, name) for name in ("protocol", *SAME_EVERYWHERE)}
    wanted["entries"] = {entry.name: dataclasses.asdict(entry) for entry in plan.entries}
    wanted = json.loads(json.dumps(wanted))
    path = out / PLAN_FILE
    if path.exists():
        there = read_json(path)
        entries = {**there["entries"], **wanted["entries"]}
        changed = [name for name in entries if there["entries"].get(name, entries[name]) != entries[name]]
        changed = [f"entry {name}" for name in changed] + [
            name for name in wanted if name != "entries" and there.get(name) != wanted[name]
        ]
        if changed:
            raise ArgumentError(
                "out",
                f"must be a new directory or hold the same bench; {out} holds one with other {', '.join(changed)}",
            )
        wanted["entries"] = entries
    write_json(path, wanted)


def _run(job: Job, finished: Finished, device: str) -> bool:
    """Execute one run; False if another process works on it."""
    cell, probe_C = job.cell, None
    if job.stage == "final" and cell.method.solver == "lbfgs":
        chosen = finished.of(Job(cell, "search", job.point, cell.seeds[0]))
        assert chosen is not None
        probe_C = chosen["probe"]["C"]
    try:
        execute(cell.settings(job, probe_C), job.directory, test=job.stage == "final", progress=False, device=device)
    except DirectoryInUse:
        return False
    except FloatingPointError as error:
        write_json(job.directory / DIVERGED_FILE, {"diverged": True, "error": str(error), "method": cell.entry.method})
    return True


def record_of(job: Job, results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the line of records.jsonl of a finished run."""
    cell, (lr, decay) = job.cell, job.point
    record: dict[str, Any] = {
        "protocol": cell.protocol.name,
        "task": cell.task.name,
        "name": cell.entry.name,
        "method": cell.entry.method,
        "per_class": cell.per_class,
        "stage": job.stage,
        "lr": lr,
        "weight_decay": decay,
        "seed": job.seed,
        "diverged": bool(results.get("diverged")),
    }
    if record["diverged"]:
        return record
    evaluated = results["test"] or results["validation"]
    return record | {
        "validation_accuracy": results["validation"]["accuracy"],
        "test_accuracy": None if results["test"] is None else results["test"]["accuracy"],
        "calibration_error": evaluated["calibration_error"],
        "num_images": evaluated["num_images"],
        "correct": np.packbits(evaluated["correct"]).tobytes().hex(),
        "probe_C": results.get("probe", {}).get("C"),
        "trained_parameters": results["trained_parameters"]["total"],
        "total_parameters": results["total_parameters"],
        "images_per_second": results["images_per_second"],
        "peak_memory_mib": results["peak_memory_mib"],
        "seconds": results["seconds"],
        "device": results["device"],
        "machine": results["machine"],
        "fastprompt_version": results["fastprompt_version"],
    }


def write_records(out: Path, cells: Sequence[Cell], finished: Finished) -> None:
    """Write a line for every finished run into OUT/records.jsonl; "correct" is a bit per image, in hexadecimal."""
    lines = []
    for cell in cells:
        found = search(cell, finished)
        jobs = [Job(cell, "search", point, cell.seeds[0]) for point in found.tried or [(None, None)]]
        if found.best is not None:
            jobs += [job for job in compared(cell, found.best) if job.directory not in [j.directory for j in jobs]]
        for job in jobs:
            results = finished.of(job)
            if results is not None:
                lines.append(json.dumps(record_of(job, results)) + "\n")
    atomic_write(out / RECORDS_FILE, "".join(lines))


def summarise(plan: BenchPlan, cells: Sequence[Cell], finished: Finished) -> dict[str, Any]:
    """Compare the rows of a complete bench.

    Returns, as JSON values: "rows", one for each entry and number of images, with "tasks" (accuracy with an interval,
    chosen point), "groups" and "mean" (means over tasks), and "differences" to the probe and VPT-deep where these are
    rows. Intervals are over seeds and images at 95 % (`over_seeds_and_images`), with images drawn anew for every seed
    over seeds alone. "p_holm" is corrected for all comparisons of means, or of single tasks, with one reference.
    """
    from fastprompt.runs.uncertainty import Estimate, average, holm, over_seeds, over_seeds_and_images

    protocol = cells[0].protocol
    right: dict[tuple[str, int | None], dict[str, np.ndarray]] = {}
    rows: list[dict[str, Any]] = []

    def estimate(values: np.ndarray, few: int | None) -> Estimate:
        same_images = few is None or plan.final
        return over_seeds_and_images(values) if same_images else over_seeds(values.mean(1).tolist())

    for entry, few in itertools.product(plan.entries, plan.per_class):
        mine = [cell for cell in cells if cell.entry is entry and cell.per_class == few]
        tasks: dict[str, dict[str, Any]] = {}
        estimates: dict[str, Estimate] = {}
        runs: list[dict[str, Any]] = []
        for cell in mine:
            found = search(cell, finished)
            assert found.best is not None
            results = [finished.of(job) for job in compared(cell, found.best)]
            kept = [r for r in results if r is not None and not r.get("diverged")]
            runs += kept
            shown = [r["test"] or r["validation"] for r in kept]
            diverged = len(results) - len(kept)
            # A run that diverged classifies no image correctly.
            bits = [record["correct"] for record in shown]
            bits += [np.zeros_like(bits[0], dtype=bool)] * diverged if bits else []
            tasks[cell.task.name] = {
                "lr": found.best[0],
                "weight_decay": found.best[1],
                "at_edge": found.at_edge,
                "points": len(found.tried),
                "diverged": diverged,
                "accuracy": None,
                "calibration_error": None,
            }
            if bits:
                values = np.stack(bits).astype(np.float64)
                right.setdefault((entry.name, few), {})[cell.task.name] = values
                estimates[cell.task.name] = estimate(values, few)
                tasks[cell.task.name] |= {
                    "accuracy": estimates[cell.task.name].to_dict(),
                    "by_seed": values.mean(1).tolist(),
                    "calibration_error": statistics.fmean(record["calibration_error"] for record in shown),
                }
        groups = {}
        for group in dict.fromkeys(cell.task.group for cell in mine if cell.task.group):
            of_group = [estimates[c.task.name] for c in mine if c.task.group == group and c.task.name in estimates]
            groups[group] = average(of_group).to_dict() if of_group else None
        complete = len(estimates) == len(mine)
        rows.append(
            {
                "name": entry.name,
                "method": entry.method,
                "title": entry.title,
                "per_class": few,
                "tasks": tasks,
                "groups": groups,
                "mean": average(list(estimates.values())).to_dict() if complete else None,
                "trained_parameters": statistics.fmean(r["trained_parameters"]["total"] for r in runs)
                if runs
                else None,
                "trained_share": (
                    statistics.fmean(r["trained_parameters"]["total"] / r["total_parameters"] for r in runs)
                    if runs
                    else None
                ),
                "images_per_second": statistics.fmean(r["images_per_second"] for r in runs) if runs else None,
                "peak_memory_mib": max((r["peak_memory_mib"] for r in runs), default=None),
                "differences": {},
            }
        )
    for reference in (e.name for e in plan.entries if e.method in ("linear", "vpt-deep")):
        means: list[dict[str, Any]] = []
        singles: list[dict[str, Any]] = []
        for row in rows:
            mine_right = right.get((row["name"], row["per_class"]), {})
            theirs = right.get((reference, row["per_class"]), {})
            shared = [name for name in row["tasks"] if name in mine_right and name in theirs]
            if row["name"] == reference or len(shared) < len(row["tasks"]):
                continue
            by_task = {name: estimate(mine_right[name] - theirs[name], row["per_class"]) for name in shared}
            mean: dict[str, Any] = average(list(by_task.values())).to_dict()
            of_tasks: dict[str, dict[str, Any]] = {name: each.to_dict() for name, each in by_task.items()}
            row["differences"][reference] = {"mean": mean, "tasks": of_tasks}
            means.append(mean)
            singles += of_tasks.values()
        for family in (means, singles):
            p_values = [math.nan if each["p"] is None else each["p"] for each in family]
            for each, p in zip(family, holm(p_values), strict=True):
                each["p_holm"] = None if math.isnan(p) else p
    return {
        "protocol": protocol.name,
        "title": protocol.title,
        "backbone": plan.backbone,
        "split": "test" if plan.final else "validation",
        "recipe": plan.recipe,
        "image_size": plan.image_size or protocol.size,
        "seeds": list(cells[0].seeds),
        "tasks": {cell.task.name: cell.task.title for cell in cells},
        "rows": rows,
    }


def _mean(values: Iterable[float]) -> float | None:
    """Return the mean, or None of no values."""
    found = list(values)
    return statistics.fmean(found) if found else None


def plan_from(values: Mapping[str, Any], **arguments: Any) -> BenchPlan:
    """Build a plan from a settings file's values, which `arguments` complete.

    The keys are those of `BenchPlan`, with "methods" for the rows: a list of names, or name -> {method, options,
    recipe, lrs, weight_decays}.

    Raises:
        ValueError, TypeError: a key is unknown or a value is wrong; the message names it.
    """
    known = {f.name for f in dataclasses.fields(BenchPlan)} - {"entries"} | {"methods"}
    for key in values:
        if key not in known:
            raise ArgumentError(str(key), f"is no setting of a bench; known are {', '.join(sorted(known))}")
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in {**values, **arguments}.items()}
    methods = fields.pop("methods", None)
    if methods is not None:
        fields["entries"] = tuple(_entries(methods))
    return BenchPlan(**fields)


def _entries(methods: Any) -> list[Entry]:
    named = methods if isinstance(methods, Mapping) else {name: {} for name in methods}
    known = [f.name for f in dataclasses.fields(Entry) if f.name != "name"]
    entries = []
    for name, values in named.items():
        values = values or {}
        for key in values:
            if key not in known:
                raise ArgumentError("methods", f"must have known keys for {name}, got {key!r}; known are {known}")
        plain = {key: tuple(map(float, v)) if key in ("lrs", "weight_decays") else v for key, v in values.items()}
        entries.append(Entry(**{"name": name, "method": name, **plain}))
    return entries
