"""House rules that a linter does not know: what imports what, what an import costs, names of files."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
from collections.abc import Collection
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
    {"kernels"},
    {
        "arguments",
        "changes",
        "domains",
        "extras",
        "fetch",
        "files",
        "intervals",
        "kept",
        "locks",
        "memory",
        "package_index",
        "streams",
        "terminal",
    },
    {"vit"},
    {"generators"},
    {"heads"},
    {"adapters"},
    {"hub"},
    {"model"},
]
LAYERS += [{"official", "cost", "huggingface", "int8"}, {"train", "engine", "export", "pixels", "data", "protocols"}]
LAYERS += [{"analysis", "report", "runs"}]
LAYERS += [{"serve", "webdemo"}, {"cli", "__main__"}]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """The dotted name under which a source file is imported."""
    parts = path.with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("fastprompt", *parts) if parts[0] == "kernels" else parts)


def imports_of(name: str, is_package: bool, source: str, modules: Collection[str]) -> set[str]:
    """Those of `modules` that the source of module `name` imports, anywhere in it and for types too.

    `from package import x` imports module `package.x` where there is one, else the package. `fastprompt` itself is an
    index of public names: what reads `fp.Engine` imports the module that defines it.
    """
    package = name if is_package else name.rpartition(".")[0]
    found, index, nodes = set(), set(), list(ast.walk(ast.parse(source)))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            index |= {alias.asname or alias.name for alias in node.names if alias.name == "fastprompt"}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                public = fp._PUBLIC.get(alias.name, module) if module == "fastprompt" else module
                found.add(inner if inner in modules else public)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in index:
            found.add(fp._PUBLIC.get(node.attr, ""))
    return {target for target in found if target in modules and target not in (name, "fastprompt")}


def import_graph(sources: dict[str, tuple[bool, str]]) -> dict[str, set[str]]:
    """Module → the modules that it imports; `sources`: module → (is a package, its text)."""
    return {
        name: set() if name == "fastprompt" else imports_of(name, is_package, text, sources)
        for name, (is_package, text) in sources.items()
    }


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, the first again at the end; [] where there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def upward_in(graph: dict[str, set[str]]) -> list[str]:
    """The imports of a module that lies in a higher layer."""

    def rank(module: str) -> int:
        return RANK[module.split(".")[1]]

    return [f"{a} imports {b}" for a, targets in graph.items() for b in targets if rank(b) > rank(a)]


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = [path for path in MODULES if path.parts[0] in ("fastprompt", "kernels")]
    return import_graph({module_name(p): (p.stem == "__init__", (ROOT / p).read_text()) for p in paths})


def test_no_catch_all_modules() -> None:
    assert not [path for path in MODULES if path.stem in ("utils", "helpers", "misc", "common")]


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_annotations_are_postponed(path: Path) -> None:
    code = ast.parse((ROOT / path).read_text()).body
    if code and isinstance(code[0], ast.Expr):  # the docstring
        code = code[1:]
    assert not code or ast.unparse(code[0]) == "from __future__ import annotations"


def test_nothing_is_printed_but_through_the_terminal() -> None:
    """Text of files and hosts may hold what a terminal obeys; `fastprompt.terminal.say` takes it out."""
    printing = [
        str(path)
        for path in MODULES
        if path.parts[0] == "fastprompt" and path != Path("fastprompt/terminal.py")
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "traceback.print_exc", "sys.stderr.write")
    ]
    assert printing == ["fastprompt/model.py"]  # print_trainable_parameters, numbers alone


def test_no_import_circles(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 100
    assert circle_in(graph) == []


def test_imports_run_downwards(graph: dict[str, set[str]]) -> None:
    assert upward_in(graph) == []


@pytest.mark.parametrize(
    "source",
    [
        "from fastprompt.vit.graph import VIT",
        "from fastprompt.vit import graph",
        "from .graph import VIT",
        "import fastprompt.vit.graph",
        "if TYPE_CHECKING:\n    from fastprompt.vit.graph import Graph",
        "def late():\n    from fastprompt.vit.graph import VIT",
        "graph = importlib.import_module('fastprompt.vit.graph')",
        "from fastprompt.vit import FrozenViT",
        "from fastprompt import FrozenViT",
        "import fastprompt as fp\ndef late():\n    return fp.FrozenViT",
    ],
)
def test_a_circle_is_found(graph: dict[str, set[str]], source: str) -> None:
    """Each way to import from `vit/weights.py`, which everything there imports, what stands above it."""
    found = imports_of("fastprompt.vit.weights", False, source, graph)
    circle = circle_in({**graph, "fastprompt.vit.weights": found})
    assert circle[0] == circle[-1]
    assert "fastprompt.vit.weights" in circle


def test_an_upward_import_is_found(graph: dict[str, set[str]]) -> None:
    source = "if TYPE_CHECKING:\n    from fastprompt.generators.base import Draws"
    found = imports_of("fastprompt.vit.weights", False, source, graph)
    expected = ["fastprompt.vit.weights imports fastprompt.generators.base"]
    assert upward_in({**graph, "fastprompt.vit.weights": found}) == expected
    source = "import fastprompt as fp\nfp.fit"
    found = imports_of("fastprompt.kernels.tiles", False, source, graph)
    assert upward_in({"fastprompt.kernels.tiles": found}) == ["fastprompt.kernels.tiles imports fastprompt.train.fit"]


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
    """As on Windows: what the libraries import is there before, what our modules import on top is not.

    Ray, transformers and Gradio are left out.
    """
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
        "needs = {'fastprompt.serve.cluster', 'fastprompt.huggingface.model', 'fastprompt.webdemo.page'}\n"
        "names = sorted({*names} - needs - {'fastprompt.__main__'})\n"
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


def test_what_acts_on_a_backbone_comes_from_its_graph(graph: dict[str, set[str]]) -> None:
    """Outside `fastprompt/vit/` nobody asks which kind a backbone is, nor picks a graph for it."""
    outside = [path for path in MODULES if path.parts[0] == "fastprompt" and path.parts[1] != "vit"]
    assert not [path for path in outside if "FrozenSwin" in (ROOT / path).read_text()]
    swin = {"fastprompt.vit.swin", "fastprompt.vit.swin_forward", "fastprompt.vit.swin_reference"}
    assert not [a for a, targets in graph.items() if targets & swin and not a.startswith("fastprompt.vit.")]
