"""Run all gates of every op and write what they found to results/gates.json: `make gates`.

    python tests/kernels/gates/run.py [--if-changed]

The file holds the digest of the kernels and gates that were run, so that anybody sees whether it is of this tree: with
`--if-changed` nothing runs where it is and all was well. The exit code is 1 where a gate is red; the file then says
which.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import verdict
from spec import ROOT

from fastprompt.files import atomic_write

RESULTS = ROOT / "results" / "gates.json"
COVERED = ("kernels", "tests/kernels/gates")
CPU_ONLY = ("native.py", "recompute.py")
"""Files that no Triton kernel and no gate reads."""


def digest(root: Path = ROOT) -> str:
    """sha256 of the names and contents of all Python files of the kernels and of the gates, but for `CPU_ONLY`."""
    found = hashlib.sha256()
    sources = [path for folder in COVERED for path in (root / folder).rglob("*.py") if path.name not in CPU_ONLY]
    for path in sorted(path.relative_to(root).as_posix() for path in sources):
        content = (root / path).read_bytes()
        found.update(f"{path} {len(content)}\n".encode() + content)
    return found.hexdigest()


def ops() -> list[str]:
    """The ops that have Triton kernels."""
    return sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))


def up_to_date() -> bool:
    """Whether the results are of this tree's kernels and gates, and nothing was red."""
    if not RESULTS.exists():
        return False
    found = json.loads(RESULTS.read_text())
    return found["digest"] == digest() and not any(op["problems"] for op in found["ops"].values())


def gate(script: str, op: str) -> Any:
    """What `<script>.py <op>` reports; a process of its own, since Triton's interpreter and compiler share none."""
    environment = {**os.environ, "TRITON_INTERPRET": "0" if script == "compile" else "1", "OMP_NUM_THREADS": "1"}
    environment.setdefault("MKL_CBWR", "COMPATIBLE")  # as the suite has it: sums in one order on every processor
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name(f"{script}.py")), op]
    began = time.monotonic()
    ran = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if ran.returncode:
        raise SystemExit(f"{script}.py {op} ended with status {ran.returncode}")
    print(f"{script:9} {op} ({time.monotonic() - began:.0f} s)", flush=True)
    return json.loads(ran.stdout)


def outcome(interpreted: Any, compiled: Any, mutated: Any) -> dict[str, Any]:
    """One op's part of the results: its problems, what was looked at, and what each mutation turned red."""
    problems = verdict.of_interpreter(interpreted) + verdict.of_compiler(compiled) + verdict.of_mutations(mutated)
    return {
        "problems": problems,
        "compared": len(interpreted["parity"]),
        "launches": len(interpreted["launches"]),
        "checks": list(interpreted["checks"]),
        "builds": len(compiled["builds"]),
        "mutations": mutated,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("--if-changed", action="store_true", help="run nothing where the results are of this tree")
    args = p.parse_args(arguments)
    if args.if_changed and up_to_date():
        print("results/gates.json is of these kernels and gates")
        return 0
    before = digest()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the other two share the processors themselves
        interpreted = dict(zip(ops(), pool.map(lambda op: gate("interpret", op), ops()), strict=True))
    found = {op: outcome(interpreted[op], gate("compile", op), gate("mutate", op)) for op in ops()}
    if digest() != before:
        raise SystemExit("kernels or gates changed while the gates ran: run them again")
    results = {
        "digest": before,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "triton")},
        "ops": found,
    }
    atomic_write(RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    problems = [f"{op}: {problem}" for op, of_op in found.items() for problem in of_op["problems"]]
    print("\n".join(problems) or f"{len(found)} ops, all gates green")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
