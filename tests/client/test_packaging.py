"""`fastprompt-client` is a distribution of its own: what its wheel holds, and that it runs without torch."""

from __future__ import annotations

import ast
import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

NEEDED = {"numpy", "onnxruntime", "PIL"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("client") / "tree"
    source = Path(__file__).resolve().parents[2] / "client"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return tree / ran.stdout.strip().splitlines()[-1]


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        [metadata] = [name for name in names if name.endswith("/METADATA")]
        fields = email.message_from_bytes(archive.read(metadata))
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastprompt_client"}
    assert {"fastprompt_client/py.typed", "fastprompt_client/client.py"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needs = {need.split(">")[0] for need in fields.get_all("Requires-Dist", [])}
    assert needs == {"numpy", "onnxruntime", "pillow"}


def test_it_imports_nothing_else(repository: Path) -> None:
    for path in (repository / "client").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                root = module.split(".")[0]
                assert root in NEEDED | {"fastprompt_client"} | sys.stdlib_module_names, f"{path} imports {module}"


def test_the_wheel_runs_without_torch(wheel: Path, folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'fastprompt', 'scipy', 'onnx'): sys.modules[name] = None\n"
        "import fastprompt_client, numpy\n"
        "client = fastprompt_client.Client(sys.argv[1])\n"
        "print(fastprompt_client.__file__, len(client.png(numpy.zeros((50, 60, 3), numpy.uint8))))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith(str(tmp_path / "site"))
