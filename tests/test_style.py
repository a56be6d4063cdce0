"""House rules that a linter does not know: what imports what, what an import costs, names of files."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fastprompt as fp

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py"))
MODULES = sorted(
    path.relative_to(ROOT)
    for folder in ("fastprompt", "kernels", "client", "bench", "experiments", "examples", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if not (folder == "fastprompt" and "kernels" in path.parts)
)
LAYERS = [
    {"changes", "extras", "fetch", "files", "locks", "memory", "package_index"},
    {"vit", "kernels"},
    {"generators"},
    {"heads"},
    {"adapters"},
    {"model"},
]
LAYERS += [{"official", "cost"}, {"train", "engine", "pixels", "data"}, {"analysis", "report", "runs"}]
LAYERS += [{"serve"}, {"cli", "__main__"}]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Absolute names of what a source file imports from this project, leaving out imports for types alone."""
    package = path.with_suffix("").parts[:-1]
    found = set()
    nodes: list[ast.AST] = [ast.parse((ROOT / path).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("fastprompt", "kernels")}


def test_no_catch_all_modules() -> None:
    assert not [path for path in MODULES if path.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_annotations_are_postponed(path: Path) -> None:
    code = ast.parse((ROOT / path).read_text()).body
    if code and isinstance(code[0], ast.Expr):  # the docstring
        code = code[1:]
    assert not code or ast.unparse(code[0]) == "from __future__ import annotations"


def test_ops_know_nothing_of_the_package() -> None:
    upward = [
        f"{path} imports {name}"
        for path in MODULES
        if path.parts[0] == "kernels"
        for name in imports_of(path)
        if name.startswith("fastprompt") and not name.startswith("fastprompt.kernels")
    ]
    assert not upward


def test_imports_run_downwards() -> None:
    upward = []
    for path in MODULES:
        if path.parts[0] != "fastprompt" or path == Path("fastprompt/__init__.py"):
            continue
        layer = path.parts[1].removesuffix(".py")
        for name in imports_of(path):
            target = name.split(".")[1] if "." in name else ""
            if RANK.get(target, -1) > RANK[layer]:
                upward.append(f"{path} imports {name}")
    assert not upward


def test_importing_an_op_is_light_and_needs_no_triton() -> None:
    assert "library_prompts" in OPS
    code = (
        "import importlib, sys; sys.modules['triton'] = None\n"
        f"for op in {OPS}: getattr(importlib.import_module('fastprompt.kernels.' + op), op)\n"
        "print([name for name in ('timm', 'torchvision', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_every_module_imports_where_there_is_no_posix() -> None:
    """As on Windows: what the libraries import is there before, what our modules import on top is not."""
    libraries = ", ".join(
        "timm torch torch._dynamo torch.distributed torchvision PIL.Image filelock platformdirs.unix tqdm tyro numpy "
        "onnx litserve uvicorn matplotlib.figure sklearn.linear_model sklearn.metrics scipy.optimize".split()
    )
    code = (
        f"import importlib, os, pkgutil, sys, {libraries}\n"
        "for name in ('fcntl', 'resource', 'pwd', 'grp', 'termios', 'pty', 'tty', 'posix', 'syslog'):\n"
        "    sys.modules[name] = None\n"
        "for name in ('fork', 'getuid', 'geteuid', 'killpg', 'sysconf', 'uname', 'sched_getaffinity', 'mkfifo'):\n"
        "    delattr(os, name)\n"
        "import fastprompt\n"
        "names = [m.name for m in pkgutil.walk_packages(fastprompt.__path__, 'fastprompt.', lambda name: None)]\n"
        "names = [name for name in names if '.kernels.' not in name]\n"
        "names = sorted({*names} - {'fastprompt.__main__', 'fastprompt.serve.cluster'})\n"  # a command; needs Ray
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 80


def test_importing_what_commands_use_imports_no_compiler() -> None:
    """torch._dynamo takes seconds; timm brings it through torchvision, so what needs no backbone must not."""
    names = "cli, cost, adapters, model, generators, engine, runs.directory, runs.execute, train.fit, vit"
    code = "; ".join(f"import fastprompt.{name}" for name in names.split(", "))
    code += "; import sys; print([name for name in ('torch._dynamo', 'timm', 'torchvision') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, fastprompt; print(fastprompt.__version__, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.stdout.split() == [fp.__version__, "False"], ran.stderr


def test_public_names_resolve_and_have_docstrings() -> None:
    assert set(fp.__all__) <= set(dir(fp))
    bare = []
    for name in fp.__all__:
        value = getattr(fp, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        generated = inspect.isclass(value) and (value.__doc__ or "").startswith(f"{value.__name__}(")
        if generated or len((value.__doc__ or "").strip()) < 20:
            bare.append(name)
    assert not bare


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = fp.no_such_name
