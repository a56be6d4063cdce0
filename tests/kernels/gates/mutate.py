"""Breaks an op's kernels on purpose: `TRITON_INTERPRET=1 python tests/kernels/gates/mutate.py <op> [mutation ...]`.

Each mutation of the specification is one edit of the source, written against the layout that `ast.unparse` gives it:
one statement a line, single quotes, no comments. So a formatter changes no mutation. The edit is applied to a copy, the
cases and checks run on the copy in a process of its own, and one of them has to turn red. A copy without an edit has to
stay green.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import resource
import sys
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch
from interpret import failures
from spec import load_spec

from fastprompt.kernels.dispatch import interpreting

FORKING = threading.Lock()
SECONDS = 30  # of processor time, beside twice what the unharmed kernels take: who needs more never ends


def source_of(spec: ModuleType) -> str:
    """The source of an op's kernels in the layout that mutations are written against."""
    found = importlib.util.find_spec(spec.MODULE)
    assert found is not None
    return ast.unparse(ast.parse(Path(str(found.origin)).read_text()))


def mutants(spec: ModuleType, names: Sequence[str] = ()) -> dict[str, str]:
    """The broken sources by the name of their mutation: all of them, or those in `names`.

    Raises:
        ValueError: the text of a mutation is not in the source, or it changes nothing; or there is no such mutation.
    """
    source = source_of(spec)
    known = {name: (old, new) for name, old, new in spec.MUTATIONS}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"no mutation is named {', '.join(map(repr, unknown))}")
    lost = [name for name, (old, new) in known.items() if old not in source or old == new]
    if lost:
        raise ValueError(f"mutations whose text is not in the source or is not changed: {', '.join(map(repr, lost))}")
    return {name: source.replace(*known[name], 1) for name in names or known}


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


def in_a_fork(spec: ModuleType, source: str, seconds: int) -> str:
    """`red` in a child process of at most so many seconds of processor time: a broken kernel may crash or never end."""
    with FORKING:  # no other child inherits the writing end
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
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
    broken = mutants(spec, names)
    unharmed = in_a_fork(spec, source_of(spec), resource.RLIM_INFINITY)
    if unharmed:
        raise SystemExit(f"red without a mutation: {unharmed}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = SECONDS + int(2 * (used.ru_utime + used.ru_stime))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda text: in_a_fork(spec, text, seconds), broken.values()))
    json.dump(dict(zip(broken, found, strict=True)), sys.stdout, indent=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
