"""The HTML report: one file with everything in it, so that it can be mailed, archived and opened without a
network.
"""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastprompt.report import plots
from fastprompt.runs.directory import read_json

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1b1b1b; --paper: #fdfdfc; --line: #d5d5d0; --soft: #f1f1ee; --link: #0b5cad;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e3; --paper: #17181a; --line: #3b3d41; --soft: #222428; --link: #7db7f0; }
}
* { box-sizing: border-box; }
body {
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 68rem; padding: 1.5rem;
}
h1 { font-size: 1.7rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; list-style: none; padding: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0; }
caption { text-align: left; font-size: .88rem; padding: .2rem 0 .4rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; white-space: nowrap; }
table.settings td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.settings th { vertical-align: top; }
figure { margin: .8rem 0; }
figcaption { font-size: .88rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.pair { display: flex; flex-wrap: wrap; gap: 0 1.5rem; align-items: flex-start; }
.pair figure { flex: 5 1 26rem; }
.pair .scroll { flex: 2 1 14rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; }
"""


def figure(png: bytes, alt: str, caption: str) -> str:
    """A picture inside the page, with what it says in words."""
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(alt, quote=True)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "numbers") -> str:
    """A table whose first cell of each row is the row's heading. All cells are escaped.

    `kind` "settings" sets all cells flush left.
    """
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="{kind}"><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def percent(value: float | None) -> str:
    """A share in per cent with one decimal, a dash for none."""
    return "–" if value is None else f"{100 * value:.1f}%"


def bounds(record: Mapping[str, Any]) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy, over images."""
    n, p, z = record["num_images"], record["accuracy"], 1.96
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Rounding must not push an end past an accuracy of 0 or 1.
    return min(centre - half, p), max(centre + half, p)


def interval(record: Mapping[str, Any]) -> str:
    """`bounds` in per cent."""
    low, high = bounds(record)
    return f"{100 * low:.1f}–{100 * high:.1f}%"


def load_results(run: Path | str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A run's results, from its directory or as they are."""
    if isinstance(run, Mapping):
        return dict(run)
    path = Path(run) / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"runs: {path} does not exist; is {run} the directory of a finished run?")
    results = read_json(path)
    missing = [key for key in ("title", "history", "validation", "data") if key not in results]
    if missing:
        raise ValueError(f"runs: {path} is not the results of a run: it has no {missing[0]!r}")
    return results


def titles(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run, with its seed and number where a method occurs more than once."""
    names = [str(r["title"]) for r in results]
    return [
        name if names.count(name) == 1 else f"{name} ({number}, seed {results[number - 1]['recipe'].get('seed')})"
        for number, name in enumerate(names, 1)
    ]


def summary_table(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """One row a run: parameters, accuracy, speed and memory."""
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
        "Images/s",
        "Peak MiB",
        "Seconds",
    ]
    return table(
        "Test accuracy is measured once, after training, with the epoch that was best on validation; the "
        "interval is over test images. By the paper: the generator's parameters by the paper's own formula.",
        header,
        rows,
    )


def run_section(number: int, name: str, r: Mapping[str, Any]) -> str:
    """Confusion, classes, library or latent, and settings of one run."""
    split = "test" if r.get("test") else "validation"
    record = r[split]
    classes = r["class_names"]
    parts = [f'<section id="run-{number}"><h2>{escape(name)}</h2>']
    matrix = figure(
        plots.confusion_matrix(record["confusion"], classes, f"{name}: {split}"),
        f"Confusion matrix of {name} on the {split} images, {percent(record['accuracy'])} correct",
        f"Confusion on {record['num_images']} {split} images: rows are true classes, columns predictions.",
    )
    rows = [
        [c, sum(row), percent(recall)]
        for c, row, recall in zip(classes, record["confusion"], record["per_class"], strict=True)
    ]
    mean = percent(record["mean_per_class"])
    by_class = table(f"Accuracy by class; their mean is {mean}", ["Class", "Images", "Correct"], rows)
    parts.append(f'<div class="pair">{matrix}{by_class}</div>')
    if r.get("library"):
        usage = r["library"]
        parts.append("<h3>Most-used library tokens</h3>")
        parts.append(
            figure(
                plots.library_tokens(usage, f"{name}: most-used library tokens"),
                f"Bar chart of the most used tokens of the library of {name}",
                f"Mixture weights averaged over {usage['num_images']} validation images and all prompts. "
                f"A prompt is made of {usage['effective_tokens']:.1f} tokens (exponential of the mean "
                f"entropy, {usage['entropy']:.2f} nats); over all images and prompts "
                f"{usage['effective_library']:.1f} of {len(usage['mean_weight'])} tokens are in use.",
            )
        )
    if any(entry.get("kl") is not None for entry in r["history"]):
        parts.append("<h3>Latent</h3>")
        parts.append(
            figure(
                plots.latent_units({name: r["history"]}),
                f"KL and active latent units of {name} by epoch",
                "KL and active latent units in training. Both near 0 mean posterior collapse: "
                "the prompts have stopped depending on the image.",
            )
        )
    settings = [[f"{group}.{key}", value] for group in ("config", "recipe") for key, value in r[group].items()]
    parts.append(
        "<details><summary>Settings</summary>"
        + table("Method and recipe", ["Setting", "Value"], settings, "settings")
        + "</details>"
    )
    parts.append("</section>")
    return "".join(parts)


def render(results: Sequence[Mapping[str, Any]], heading: str) -> str:
    """The whole page. Class names, paths and all other text are escaped."""
    names = titles(results)
    first = results[0]
    histories = {name: r["history"] for name, r in zip(names, results, strict=True) if r["history"]}
    points = []
    for name, r in zip(names, results, strict=True):
        split = "test" if r.get("test") else "validation"
        low, high = bounds(r[split])
        points.append((name, r["trained_parameters"]["total"], r[split]["accuracy"], low, high, split))
    links = [("summary", "Summary"), ("parameters", "Accuracy and parameters")]
    links += [("curves", "Curves")] if histories else []
    links += [(f"run-{number}", name) for number, name in enumerate(names)]
    links += [("data", "Data and machine")]
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head><body><header><h1>{escape(heading)}</h1>",
        f"<p>{escape(str(first['backbone']))} at {first['image_size']} px, frozen unless a method says "
        f"otherwise; {len(results)} {'run' if len(results) == 1 else 'runs'}.</p>",
        '<nav aria-label="Sections"><ul>',
        *[f'<li><a href="#{anchor}">{escape(text)}</a></li>' for anchor, text in links],
        '</ul></nav></header><main><section id="summary"><h2>Summary</h2>',
        summary_table(names, results),
        '</section><section id="parameters"><h2>Accuracy and parameters</h2>',
        figure(
            plots.accuracy_against_parameters(points),
            "Scatter plot of accuracy over trained parameters: "
            + "; ".join(f"{name} {percent(accuracy)} with {count:,}" for name, count, accuracy, *_ in points),
            "Accuracy over the number of trained parameters (generator and head); 95 % intervals over images.",
        ),
        "</section>",
    ]
    if histories:
        parts += [
            '<section id="curves"><h2>Curves</h2>',
            figure(
                plots.curves(histories),
                "Line plots of loss and accuracy by epoch for " + ", ".join(histories),
                "Loss and accuracy by epoch. Training numbers are taken while the weights change and "
                "with dropout on, so validation can be the better one.",
            ),
            "</section>",
        ]
    parts += [run_section(number, name, r) for number, (name, r) in enumerate(zip(names, results, strict=True))]
    data = {(name, key): value for name, r in zip(names, results, strict=True) for key, value in r["data"].items()}
    same = len({str(sorted(r["data"].items(), key=str)) for r in results}) == 1
    rows = (
        [[key, value] for key, value in first["data"].items()]
        if same
        else [[f"{n}: {k}", v] for (n, k), v in data.items()]
    )
    rows += [
        ["backbone fingerprint", first["backbone_fingerprint"]],
        ["machine", first["machine"]],
        ["fastprompt, torch", f"{first['fastprompt_version']}, {first['torch_version']}"],
    ]
    parts += [
        '<section id="data"><h2>Data and machine</h2>',
        table(
            "The split is fixed by its seed; the sha256 says which images are in which part.",
            ["", "Value"],
            rows,
            "settings",
        ),
        "<p>Images/s counts training images seen by the method's own loop (for the L-BFGS probe: images "
        "encoded, over encoding and fitting). Peak memory is the resident set of the process that ran the "
        "method.</p>",
        "</section></main></body></html>",
    ]
    return "\n".join(parts)


def build_report(
    runs: Sequence[Path | str | Mapping[str, Any]], out_file: Path | str, heading: str = "fastprompt report"
) -> Path:
    """Write one self-contained HTML file about `runs` (run directories of `fastprompt adapt`, or their
    results).

    Raises `ValueError` without runs and `FileNotFoundError` for a directory without results.json.
    """
    from fastprompt.files import atomic_write

    if not runs:
        raise ValueError("runs: got none, takes at least one run directory")
    results = [load_results(run) for run in runs]
    path = Path(out_file)
    atomic_write(path, render(results, heading))
    return path
