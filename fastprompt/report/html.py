"""The HTML report: one file with everything in it, so that it can be mailed, archived and opened without a
network.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fastprompt.report import plots
from fastprompt.report.runs import read_json

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
  color: var(--ink); background: var(--paper); margin: 0 auto; max-width: 64rem; padding: 1.5rem;
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
td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
thead th { background: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; }
td.text { text-align: left; overflow-wrap: anywhere; }
figure { margin: .8rem 0; }
figcaption { font-size: .88rem; margin-top: .3rem; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
.pair {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; align-items: start;
}
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


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first cell of each row is the row's heading. All cells are escaped."""
    head = "".join(f'<th scope="col">{escape(str(cell))}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(
            f"<td{'' if is_number(cell) else ' class=text'}>{escape(str(cell))}</td>" for cell in row[1:]
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def is_number(cell: Any) -> bool:
    """Whether a cell is set flush right: a number, a percentage or the dash that stands for neither."""
    return re.fullmatch(r"–|[+-]?[\d,.]+(e[+-]?\d+)?%?", str(cell)) is not None


def percent(value: float | None) -> str:
    """A share in per cent with one decimal, a dash for none."""
    return "–" if value is None else f"{100 * value:.1f}%"


def load_results(run: Path | str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """A run's results, from its directory or as they are."""
    if isinstance(run, Mapping):
        return dict(run)
    path = Path(run) / "results.json"
    if not path.exists():
        raise FileNotFoundError(f"runs: {path} does not exist; is {run} the directory of a finished run?")
    return dict(read_json(path))


def titles(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run, with its seed and number where a method occurs more than once."""
    names = [str(r["title"]) for r in results]
    return [
        name
        if names.count(name) == 1
        else f"{name} ({number}, seed {results[number - 1]['recipe'].get('seed')})"
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
                percent(r["test"]["mean_per_class"]) if r.get("test") else "–",
                f"{r['images_per_second']:.1f}",
                f"{r['peak_memory_mib']:,.0f}",
                f"{r['seconds']:.0f}",
            ]
        )
    header = [
        "Method",
        "Trained parameters",
        "of these in the generator",
        "Generator by the paper's formula",
        "Validation",
        "Test",
        "Test, mean per class",
        "Images/s",
        "Peak MiB",
        "Seconds",
    ]
    return table(
        "Test accuracy is measured once, after training, with the epoch that was best on validation.",
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
    parts.append(
        f'<div class="pair">{matrix}{table("Accuracy by class", ["Class", "Images", "Correct"], rows)}</div>'
    )
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
    settings = [
        [f"{group}.{key}", value] for group in ("config", "recipe") for key, value in r[group].items()
    ]
    parts.append(
        "<details><summary>Settings</summary>"
        + table("Method and recipe", ["Setting", "Value"], settings)
        + "</details>"
    )
    parts.append("</section>")
    return "".join(parts)


def render(results: Sequence[Mapping[str, Any]], heading: str) -> str:
    """The whole page. Class names, paths and all other text are escaped."""
    names = titles(results)
    first = results[0]
    histories = {name: r["history"] for name, r in zip(names, results, strict=True) if r["history"]}
    points = [
        (
            name,
            r["trained_parameters"]["total"],
            r["test"]["accuracy"] if r.get("test") else r["validation"]["accuracy"],
            "test" if r.get("test") else "validation",
        )
        for name, r in zip(names, results, strict=True)
    ]
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
            + "; ".join(f"{name} {percent(accuracy)} with {count:,}" for name, count, accuracy, _ in points),
            "Accuracy over the number of trained parameters (generator and head).",
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
    parts += [
        run_section(number, name, r) for number, (name, r) in enumerate(zip(names, results, strict=True))
    ]
    data = {
        (name, key): value for name, r in zip(names, results, strict=True) for key, value in r["data"].items()
    }
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
            "The split is fixed by its seed; the sums are those of the split's indices.", ["", "Value"], rows
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
