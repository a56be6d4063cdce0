"""`fastprompt bench`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

from fastprompt.arguments import ArgumentError
from fastprompt.cli.options import Plugins, absolute, set_threads
from fastprompt.cli.words import read_config
from fastprompt.terminal import say


@dataclass
class Bench:
    """Compare methods on the data sets of a protocol, and write table and page.

    Each method searches learning rate and weight decay on validation images, and widens its grid while the best lies
    at an edge. Without --final, the comparison is on validation images too. Run the same command again to resume. Start
    it on several machines that share --out, and they share the runs. The settings of --config are those of the flags,
    with `methods` either a list or NAME: {method, options, recipe, lrs, weight_decays}.
    """

    protocol: tyro.conf.Positional[str]
    """vtab1k, fgvc, hta, pgn12, or a TOML file of your own."""
    data_root: Path
    """Folder with the protocol's data; `fastprompt protocols` says what belongs there."""
    out: Path
    """Directory for runs, records.jsonl, summary.json, table.md and report.html."""
    config: Path | None = None
    """YAML file with any of these settings; flags override it."""
    methods: list[str] | None = None
    """Methods to compare; linear, vpt-shallow, vpt-deep, pgn, free, v2apt and vapt if not given."""
    tasks: list[str] | None = None
    """Data sets to run; all if not given."""
    seeds: list[int] | None = None
    """Seeds of the compared runs, the first also that of the search; the protocol's if not given."""
    low_data: str | None = None
    """Numbers of training images of each class, such as 1,5,10, for low-data curves; all images if not given."""
    backbone: str | None = None
    """Backbone, as in `fastprompt adapt`; clip-vit-b16 if not given."""
    image_size: int | None = None
    """Image side in pixels; the protocol's if not given."""
    recipe: Literal["paper", "default"] | None = None
    """Train as the authors published (paper, if not given), or as this library does by default."""
    epochs: int | None = None
    """Passes over the training images; the recipe's if not given."""
    normalise: Literal["protocol", "backbone"] | None = None
    """Normalise pixels by the protocol's mean and std (if not given), or by those of the backbone's weights."""
    widenings: int | None = None
    """How often an axis of the search is widened at most; 4 if not given."""
    final: bool = False
    """Train as the protocol's final runs do and read the test split, once for each run."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; auto uses a GPU if there is one."""
    workers: int = 1
    """Number of processes that share the runs."""
    threads: int | None = None
    """Number of CPU threads of each worker; if not given, the workers share all cores."""
    plugin: Plugins = field(default_factory=list)
    """Module that registers your own methods, as a name or .py file; repeat for several."""
    debug: bool = False
    """Show the traceback of an error."""


def bench(command: Bench) -> None:
    """Run `fastprompt bench`."""
    import torch

    from fastprompt.report.bench import build_bench_report, markdown
    from fastprompt.runs.bench import run_bench

    if command.workers < 1:
        raise ArgumentError("workers", f"must be at least 1, got {command.workers}")
    set_threads(command.threads)
    if command.threads is None and command.workers > 1:
        set_threads(max(1, torch.get_num_threads() // command.workers))
    plan = bench_plan(command)
    summary = run_bench(
        plan,
        command.out,
        device=command.device,
        announce=lambda text: say(text, sys.stderr),
        workers=command.workers,
        plugins=command.plugin,
    )
    build_bench_report(summary, command.out)
    say(markdown(summary))
    say(f"written: {command.out / 'summary.json'}, {command.out / 'table.md'}, {command.out / 'report.html'}")


def bench_plan(command: Bench) -> Any:
    """Return the plan of the flags and the settings file."""
    from fastprompt.runs.bench import plan_from

    values = {} if command.config is None else read_config(command.config)
    for name in ("methods", "tasks", "seeds", "backbone", "image_size", "recipe", "normalise", "widenings"):
        if getattr(command, name) is not None:
            values[name] = getattr(command, name)
    low_data = values.pop("low_data", None) if command.low_data is None else command.low_data
    if low_data is not None:
        values["per_class"] = _numbers(low_data)
    epochs = values.pop("epochs", None) if command.epochs is None else command.epochs
    if epochs is not None:
        values["changes"] = {**values.get("changes", {}), "epochs": epochs}
    values.setdefault("backbone", "clip-vit-b16")
    protocol = absolute(command.protocol) if command.protocol.endswith(".toml") else command.protocol
    return plan_from(values, protocol=protocol, data_root=absolute(command.data_root), final=command.final)


def _numbers(text: Any) -> tuple[int, ...]:
    words = text.split(",") if isinstance(text, str) else text if isinstance(text, list) else [text]
    try:
        return tuple(int(word) for word in words)
    except (TypeError, ValueError):
        raise ArgumentError("low_data", f"must be numbers of images, such as 1,5,10, got {text!r}") from None
