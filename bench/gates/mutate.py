"""Breaks an op's kernels on purpose: `TRITON_INTERPRET=1 python bench/gates/mutate.py <op> [mutation ...]`.

Each mutation of the specification is one edit of the source. It is applied to a copy, the cases and checks run on the
copy in a process of its own, and one of them has to turn red. A copy without an edit has to stay green.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
from interpret import failures
from spec import load_spec

from fastprompt.kernels.dispatch import interpreting

SECONDS = 60  # of processor time


def module_from(source: str, name: str, folder: str) -> ModuleType:
    """The module `name` made from other source text; the interpreter reads kernels from their file."""
    path = Path(folder) / "triton.py"
    path.write_text(source)
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    parent, _, child = name.rpartition(".")
    setattr(importlib.import_module(parent), child, module)
    return module


def red(spec: ModuleType, source: str) -> str:
    """What turned red for the kernels in `source`; empty: nothing."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            module = module_from(source, spec.MODULE, folder)
        except Exception as problem:
            return f"import: {problem!r}"
        report = failures(spec, module, stop_early=True)
    bad = [f"{row['case']} {row['dtype']} {row.get('tensor', 'raised')}" for row in report["parity"] if not row["ok"]]
    return (bad + [name for name, problem in report["checks"].items() if problem] + [""])[0]


def in_a_fork(spec: ModuleType, source: str) -> str:
    """`red` in a child process: a broken kernel may crash it or never end."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with os.fdopen(write, "w") as pipe:
            pipe.write(red(spec, source))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    status = os.waitpid(child, 0)[1]
    return found if status == 0 else f"the process ended with status {status}"


def main(op: str, *names: str) -> None:
    if not interpreting():
        raise SystemExit("set TRITON_INTERPRET=1")
    torch.set_num_threads(1)
    spec = load_spec(op)
    path = importlib.util.find_spec(spec.MODULE)
    assert path is not None
    source = Path(str(path.origin)).read_text()
    result = {}
    unharmed = in_a_fork(spec, source)
    if unharmed:
        raise SystemExit(f"red without a mutation: {unharmed}")
    for name, old, new in spec.MUTATIONS:
        if names and name not in names:
            continue
        if source.count(old) < 1 or old == new:
            raise SystemExit(f"mutation {name!r}: its text is not in the source")
        result[name] = in_a_fork(spec, source.replace(old, new, 1))
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
