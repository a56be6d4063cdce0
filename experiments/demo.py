"""Adapt a frozen ViT-S/14 to 400 digits in a few minutes: `python experiments/demo.py` or `make demo`.

It compares VPT-deep, V²APT and the linear probe on MNIST at 98 px. The prompts enter at the ninth of 12 blocks, so
the blocks before it are computed once per image. Each method is one `fastprompt adapt` command in its own process, so
that peak memory is measured per method. The demo ends with a table, what each method gains over the probe with an
interval, and an HTML report.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt.generators import list_methods
from fastprompt.generators.registry import get_method
from fastprompt.runs.directory import read_json
from fastprompt.runs.tables import results_table
from fastprompt.train.grid import paired_difference

PROBE = "linear"
METHODS = (PROBE, "vpt-deep", "v2apt")


def fetch(data: str, backbone: str, image_size: int) -> None:
    """Fetch data and backbone."""
    from fastprompt.data import load_data
    from fastprompt.vit.assets import load_backbone

    load_data(data, image_size=image_size, num_train=10, num_val=10, num_test=10)
    load_backbone(backbone, image_size=image_size)


def command(method: str, args: argparse.Namespace) -> list[str]:
    """Return the words of the `fastprompt` command that adapts with one method."""
    words = [
        "adapt",
        "--method",
        method,
        "--backbone",
        args.backbone,
        "--image-size",
        str(args.image_size),
        "--data",
        args.data,
    ]
    words += [
        "--num-train",
        str(args.num_train),
        "--num-val",
        str(args.num_val),
        "--num-test",
        str(args.num_test),
    ]
    words += ["--seed", str(args.seed), "--augment", "none", "--test", "--out", str(args.out / method)]
    if method != PROBE:
        words += ["--epochs", str(args.epochs), "--compare-probe", "no"]  # the table does
    if "first_block" in {field.name for field in dataclasses.fields(get_method(method).config())}:
        words += ["--set", f"first_block={args.first_block}"]
    return words + (["--threads", str(args.threads)] if args.threads else []) + (["--no-resume"] if args.fresh else [])


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(prog="experiments/demo.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list_methods(), metavar="METHOD")
    p.add_argument("--data", default="mnist5k")
    p.add_argument("--backbone", default="vit-s14")
    p.add_argument("--image-size", type=int, default=98)
    p.add_argument("--num-train", type=int, default=400)
    p.add_argument("--num-val", type=int, default=100)
    p.add_argument("--num-test", type=int, default=500)
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--first-block", type=int, default=8, help="first block with prompts, counted from 0")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, help="number of CPU threads; all cores if not given")
    p.add_argument("--out", type=Path, default=Path("runs/demo"))
    p.add_argument("--fresh", action="store_true", help="start over instead of keeping finished methods")
    return p


def gains(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say what each method gains over the probe on the same test images, and what that does not show."""
    correct = {
        each["method"]: [p == y for p, y in zip(each["test"]["predictions"], each["test"]["labels"], strict=True)]
        for each in results
    }
    if PROBE not in correct:
        return []
    lines = []
    for method, hits in correct.items():
        if method != PROBE:
            found = paired_difference(hits, correct[PROBE])
            low, high = (100 * bound for bound in found.image_interval)
            lines.append(
                f"{method}: {100 * found.difference:+.1f} points over the probe [{low:+.1f}, {high:+.1f}], "
                f"McNemar p = {found.p_value:.2g}"
            )
    lines.append(
        "The interval (95 %) is over test images. One seed and one draw of the training images: it does not say which "
        "method is better elsewhere. `make table` compares all of them with three seeds."
    )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Fetch, adapt, print the table and write the report; return the exit code of the first failure, else 0."""
    from fastprompt.report.html import build_report

    args = parser().parse_args(arguments)
    began = time.perf_counter()
    try:
        print(f"fetching {args.backbone} and the images", flush=True)
        fetch(args.data, args.backbone, args.image_size)
        for method in args.methods:
            words = command(method, args)
            print(f"\n$ fastprompt {shlex.join(words)}", flush=True)
            code = subprocess.run([sys.executable, "-m", "fastprompt", *words]).returncode
            if code:
                return code
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to resume", file=sys.stderr)
        return 130
    results = [read_json(args.out / method / "results.json") for method in args.methods]
    report = build_report(results, args.out / "report.html", f"Adapting a frozen {args.backbone} on {args.data}")
    print(f"\n{results_table(results)}\n")
    for line in gains(results):
        print(line)
    print(f"{args.num_train} training, {args.num_val} validation, {args.num_test} test images")
    print(f"{time.perf_counter() - began:.0f} s in total. Report: {report.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
