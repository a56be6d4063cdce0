"""The HTML report: one self-contained file that opens without a network."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from fastprompt.arguments import ArgumentError, ArgumentPathError
from fastprompt.intervals import wilson
from fastprompt.report import plots
from fastprompt.runs.directory import read_json
from fastprompt.train.grid import summarise_seeds
from fastprompt.train.recipes import RUNTIME_FIELDS


def figure(png: bytes, alt: str, caption: str) -> dict[str, str]:
    """A picture for the page: its bytes in base64, alternative text and caption."""
    return {"data": base64.b64encode(png).decode("ascii"), "alt": alt, "caption": caption}


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """A table for the page. The first cell of each row is the row's heading."""
    return {"caption": caption, "header": header, "rows": rows}


def percent(value: float | None) -> str:
    """Format a share in per cent with one decimal, or a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}%"


def bounds(record: Mapping[str, Any]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of an accuracy, over images."""
    return wilson(sum(row[i] for i, row in enumerate(record["confusion"])), record["num_images"])


def interval(record: Mapping[str, Any]) -> str:
    """Format `bounds` in per cent."""
    low, high = bounds(record)
    return f"{100 * low:.1f}–{100 * high:.1f}%"


def load_results(run: Path | str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of a run, given as its directory or as the results themselves."""
    if isinstance(run, Mapping):
        return dict(run)
    path = Path(run) / "results.json"
    if not path.exists():
        raise ArgumentPathError("runs", f"must be directories of finished runs; {path} does not exist")
    results = read_json(path)
    missing = [key for key in ("title", "history", "validation", "data") if key not in results]
    if missing:
        raise ArgumentError("runs", f"must be directories of finished runs; {path} has no {missing[0]!r}")
    return results


def titles(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name each run by its method, with number and seed if the method occurs more than once."""
    names = [str(r["title"]) for r in results]
    return [
        name if names.count(name) == 1 else f"{name} ({number}, seed {results[number - 1]['recipe'].get('seed')})"
        for number, name in enumerate(names, 1)
    ]


def split_of(r: Mapping[str, Any]) -> str:
    """Return the split that a run's figures show: test if it was evaluated, else validation."""
    return "test" if r.get("test") else "validation"


def summary_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for each run: parameters, accuracy, speed and memory."""
    rows = []
    for name, r in zip(names, results, strict=True):
        parameters, paper = r["trained_parameters"], r.get("paper_parameter_count")
        rows.append(
            [
                name,
                f"{parameters['total']:,}",
                f"{parameters['generator']:,}",
                "–" if paper is None else f"{paper:,}",
                percent(r["validation"]["accuracy"]),
                percent(r["test"]["accuracy"]) if r.get("test") else "–",
                interval(r["test"]) if r.get("test") else "–",
                percent(r[split_of(r)].get("calibration_error")),
                f"{r['images_per_second']:.1f}",
                f"{r['peak_memory_mib']:,.0f}",
                f"{r['seconds']:.0f}",
            ]
        )
    header = [
        "Method",
        "Trained parameters",
        "in the generator",
        "by the paper",
        "Validation",
        "Test",
        "95 % interval",
        "Calibration error",
        "Images/s",
        "Peak MiB",
        "Seconds",
    ]
    return table(
        "Test accuracy is measured once, after training, at the epoch that was best on validation. The interval is "
        "over test images; the calibration error (15 bins) is on test images, or on validation without them. “By the "
        "paper” is the number of the generator's parameters by the paper's formula.",
        header,
        rows,
    )


def seeds_table(results: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """One row for each group of runs that differ in their seed alone; None if there is none."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        recipe = {name: value for name, value in r["recipe"].items() if name not in ("seed", *RUNTIME_FIELDS)}
        same = [r["method"], r["config"], recipe, r["backbone_fingerprint"], r["data"], r.get("head")]
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(r)
    rows = []
    for group in groups.values():
        if len(group) == 1:
            continue
        split = "test" if all(r.get("test") for r in group) else "validation"
        over_seeds = summarise_seeds([r[split]["accuracy"] for r in group])
        low, high = (percent(bound) for bound in over_seeds.interval)
        title, seeds = group[0]["title"], ", ".join(str(r["recipe"]["seed"]) for r in group)
        rows.append([title, seeds, split, percent(over_seeds.mean), percent(over_seeds.sd), f"{low}–{high}"])
    if not rows:
        return None
    return table(
        "Accuracy over runs that differ in their seed alone: mean, standard deviation, and Student's interval of the "
        "mean, which covers the choice of seeds for these images.",
        ["Method", "Seeds", "Split", "Mean", "Standard deviation", "95 % interval"],
        rows,
    )


def run_section(name: str, r: Mapping[str, Any], analyses: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """Build the page's section about one run: confusion, classes, library or latent, `analyses` and settings."""
    split = split_of(r)
    record, classes = r[split], r["class_names"]
    by_class = [
        [c, sum(row), percent(recall)]
        for c, row, recall in zip(classes, record["confusion"], record["per_class"], strict=True)
    ]
    settings = [[f"{group}.{key}", value] for group in ("config", "recipe") for key, value in r[group].items()]
    section: dict[str, Any] = {
        "name": name,
        "confusion": figure(
            plots.confusion_matrix(record["confusion"], classes, f"{name}: {split}"),
            f"Confusion matrix of {name} on the {split} images, {percent(record['accuracy'])} correct",
            f"Confusion on {record['num_images']} {split} images: rows are true classes, columns are predictions.",
        ),
        "by_class": table(
            f"Accuracy by class; the mean is {percent(record['mean_per_class'])}",
            ["Class", "Images", "Correct"],
            by_class,
        ),
        "settings": table("Method and recipe", ["Setting", "Value"], settings),
        "mistakes": _mistakes(name, split, record, classes),
        "library": None,
        "latent": None,
        "analyses": list(analyses),
    }
    if r.get("library"):
        usage = r["library"]
        section["library"] = figure(
            plots.library_tokens(usage, f"{name}: most-used library tokens"),
            f"Bar chart of the most-used library tokens of {name}",
            f"Mixture weights averaged over {usage['num_images']} validation images and all prompts. A prompt mixes "
            f"{usage['effective_tokens']:.1f} tokens (exponential of the mean entropy, {usage['entropy']:.2f} nats); "
            f"over all images and prompts, {usage['effective_library']:.1f} of {len(usage['mean_weight'])} tokens are "
            f"in use{_library_facts(usage)}.",
        )
    if any(entry.get("kl") is not None for entry in r["history"]):
        section["latent"] = figure(
            plots.latent_units({name: r["history"]}),
            f"KL and active latent units of {name} by epoch",
            "KL and active latent units during training. If both are near 0 the posterior has collapsed: the prompts "
            "no longer depend on the image.",
        )
    return section


def _mistakes(name: str, split: str, record: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any] | None:
    """The figure of the worst mistakes; None if there are none, or no pictures of them, as in earlier versions."""
    shown = [mistake for mistake in record.get("mistakes", ()) if mistake["picture"] is not None]
    if not shown:
        return None

    def short(label: int) -> str:
        text = classes[label]
        return text if len(text) <= 18 else f"{text[:17]}…"

    said = [f"{classes[each['label']]} as {classes[each['predicted']]}" for each in shown]
    pictures = [
        (
            base64.b64decode(each["picture"]),
            f"{short(each['label'])}\nas {short(each['predicted'])}, {percent(each['probability'])}",
        )
        for each in shown
    ]
    return figure(
        plots.pictures(pictures),
        f"The {len(shown)} worst mistakes of {name} on the {split} images: {'; '.join(said)}",
        f"The mistakes on {split} images with the highest probability of the wrong class: the true class, the "
        "predicted one and its probability. results.json names the files.",
    )


def _library_facts(usage: Mapping[str, Any]) -> str:
    """Describe dead tokens and effective rank, which earlier versions did not record."""
    if "dead_tokens" not in usage:
        return ""
    return f", {usage['dead_tokens']} are dead; the library's effective rank is {usage['effective_rank']:.1f}"


def data_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Build the table of the runs' data, listed once if all are equal, and of machine and versions."""
    first = results[0]
    if len({str(sorted(r["data"].items(), key=str)) for r in results}) == 1:
        rows = [[key, value] for key, value in first["data"].items()]
    else:
        rows = [
            [f"{name}: {key}", value]
            for name, r in zip(names, results, strict=True)
            for key, value in r["data"].items()
        ]
    rows += [
        ["backbone fingerprint", first["backbone_fingerprint"]],
        ["machine", first["machine"]],
        ["fastprompt, torch", f"{first['fastprompt_version']}, {first['torch_version']}"],
    ]
    return table("The seed fixes the split; the sha256 identifies which images are in which part.", ["", "Value"], rows)


def template(name: str) -> Template:
    """Return a template of this folder; it escapes all inserted text, and an undefined name is an error."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def render(
    results: Sequence[Mapping[str, Any]], heading: str, analyses: Sequence[Sequence[Mapping[str, Any]]] | None = None
) -> str:
    """Render the whole page. The template escapes all inserted text.

    `analyses`: the sections of `fastprompt.report.analysis.analyse` for each run; None has none.
    """
    names = titles(results)
    points = []
    for name, r in zip(names, results, strict=True):
        split = split_of(r)
        points.append((name, r["trained_parameters"]["total"], r[split]["accuracy"], *bounds(r[split]), split))
    parameters = figure(
        plots.accuracy_against_parameters(points),
        "Scatter plot of accuracy over trained parameters: "
        + "; ".join(f"{name} {percent(accuracy)} with {count:,}" for name, count, accuracy, *_ in points),
        "Accuracy over the number of trained parameters (generator and head); 95 % intervals over images.",
    )
    histories = {name: r["history"] for name, r in zip(names, results, strict=True) if r["history"]}
    curves = histories and figure(
        plots.curves(histories),
        "Line plots of loss and accuracy by epoch for " + ", ".join(histories),
        "Loss and accuracy by epoch. Training values are measured with dropout and while the weights change, so "
        "validation can be better than training.",
    )
    return template("page.html.jinja").render(
        heading=heading,
        backbone=results[0]["backbone"],
        image_size=results[0]["image_size"],
        summary=summary_table(names, results),
        seeds=seeds_table(results),
        parameters=parameters,
        curves=curves,
        runs=[
            run_section(name, r, sections)
            for name, r, sections in zip(names, results, analyses or [()] * len(results), strict=True)
        ],
        data=data_table(names, results),
    )


def build_report(
    runs: Sequence[Path | str | Mapping[str, Any]],
    out_file: Path | str,
    heading: str = "fastprompt report",
    analyses: Sequence[Sequence[Mapping[str, Any]]] | None = None,
) -> Path:
    """Write one self-contained HTML file about `runs`: run directories of `fastprompt adapt`, or their results.

    `analyses` are as in `render`.

    Raises:
        ValueError: `runs` is empty, or a results.json does not hold the results of a run.
        FileNotFoundError: a directory has no results.json.
    """
    from fastprompt.files import atomic_write

    if not runs:
        raise ArgumentError("runs", "must name at least one run directory, got none")
    results = [load_results(run) for run in runs]
    path = Path(out_file)
    atomic_write(path, render(results, heading, analyses))
    return path
