"""One case of every op, seconds in all: `[TRITON_INTERPRET=1] python tests/kernels/gates/quick.py`, for `make test`.

In the interpreter the first case of each specification, forward and backward, and that every mutation still applies;
else the forward kernel at the papers' size, compiled in float16 for one part. Prints one JSON object, by op.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

import torch
from spec import ROOT, load_spec

from fastprompt.kernels.dispatch import interpreting

PART = "sm_90"


def interpreted(op: str) -> dict[str, Any]:
    """The report of the first case, and the number of mutations."""
    from interpret import failures
    from mutate import mutants

    spec = load_spec(op)
    report = failures(spec, importlib.import_module(spec.MODULE), stop_early=False, names=[spec.CASES[0].name])
    return report | {"mutations": len(mutants(spec))}


def compiled(op: str) -> dict[str, Any]:
    """The build of the first launch."""
    import compile as compiler

    spec = load_spec(op)
    launch = compiler.capture(spec.at_size(32)[0], importlib.import_module(spec.MODULE), torch.float16, PART)[0]
    compiler.JOBS.append((PART, "float16", launch))
    return {"builds": [compiler.build(len(compiler.JOBS) - 1)]}


def main() -> None:
    torch.set_num_threads(1)
    look = interpreted if interpreting() else compiled
    ops = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton.py"))
    json.dump({op: look(op) for op in ops}, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
