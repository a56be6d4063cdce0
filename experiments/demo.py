"""Adapt a frozen CLIP ViT-B/16 to a few hundred images in a few minutes: `python experiments/demo.py` or `make demo`.

It compares PGN, VPT-deep and the linear probe on Fashion-MNIST at 112 px (MNIST if that is not available). Each method
is one `fastprompt adapt` command in its own process, so that peak memory is measured per method. The demo ends with a
table, what each method gains over the probe with an interval, and an HTML report.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastprompt.generators import list_methods
from fastprompt.runs.directory import read_json
from fastprompt.runs.tables import results_table
from fastprompt.train.grid import paired_difference

PROBE = "linear"
METHODS = (PROBE, "vpt-deep", "pgn")
# A few dozen steps do not train a new head, so the head starts as the probe.
RECIPE = ("head_init=probe",)


def fetch(data: str | None, backbone: str, image_size: int) -> str:
    """Fetch data and backbone and return the data set's name.

    If no data set is requested, MNIST replaces Fashion-MNIST if that cannot be fetched.
    """
    from fastprompt.data import load_data
    from fastprompt.fetch import FetchError
    from fastprompt.vit.assets import load_backbone

    if data is None:
        try:
            load_data("fashion-mnist", image_size=image_size, num_train=10, num_val=10, num_test=10)
            data = "fashion-mnist"
        except FetchError as error:
            print(f"Fashion-MNIST cannot be fetched ({error}); using MNIST instead", flush=True)
            data = "mnist5k"
    load_data(data, image_size=image_size, num_train=10, num_val=10, num_test=10)
    load_backbone(backbone, image_size=image_size)
    return data


def command(method: str, args: argparse.Namespace, data: str) -> list[str]:
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
        data,
    ]
    words += [
        "--num-train",
        str(args.num_train),
        "--num-val",
        str(args.num_val),
        "--num-test",
        str(args.num_test),
    ]
    words += [
        "--epochs",
        str(args.epochs),
        "--seed",
        str(args.seed),
        "--augment",
        "flip",
        "--recipe",
        *RECIPE,
        "--test",
        "--out",
        str(args.out / method),
    ]
    return words + (["--threads", str(args.threads)] if args.threads else []) + (["--no-resume"] if args.fresh else [])


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command's flags."""
    p = argparse.ArgumentParser(prog="experiments/demo.py", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--methods", nargs="+", default=list(METHODS), choices=list_methods(), metavar="METHOD")
    p.add_argument("--data", help="data set; fashion-mnist, else mnist5k, if not given")
    p.add_argument("--backbone", default="clip-vit-b16")
    p.add_argument("--image-size", type=int, default=112)
    p.add_argument("--num-train", type=int, default=256)
    p.add_argument("--num-val", type=int, default=128)
    p.add_argument("--num-test", type=int, default=500)
    p.add_argument("--epochs", type=int, default=4)
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
        data = fetch(args.data, args.backbone, args.image_size)
        for method in args.methods:
            words = command(method, args, data)
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
    report = build_report(results, args.out / "report.html", f"Adapting a frozen {args.backbone} on {data}")
    print(f"\n{results_table(results)}\n")
    for line in gains(results):
        print(line)
    print(f"{args.num_train} training, {args.num_val} validation, {args.num_test} test images")
    print(f"{time.perf_counter() - began:.0f} s in total. Report: {report.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
