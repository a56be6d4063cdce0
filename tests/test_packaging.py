"""What a user gets from `pip install`: the contents of wheel and sdist, and where imports come from."""

from __future__ import annotations

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from pathlib import Path

import pytest

import fastprompt

ROOT = Path(__file__).resolve().parent.parent
PACKAGED = [
    "fastprompt",
    "kernels",
    "csrc",
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "NOTICE",
]
IMPORT_NAMES = {
    "imagecorruptions-imaug": "imagecorruptions",
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-learn": "sklearn",
}


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in `cwd` with nothing of ours on its path but what `environment` adds."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )


def copy_tree(target: Path) -> Path:
    """The files a build reads, copied with the link `fastprompt/kernels` still a link."""
    target.mkdir()
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


def build(kind: str, tree: Path, **environment: str) -> Path:
    """Build the `kind` (wheel or sdist) of `tree` without network and return its path; without a compiler, unless
    `environment` names one.
    """
    out = tree / "dist"
    out.mkdir(exist_ok=True)
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}({str(out)!r}))"
    ran = python("-c", code, cwd=tree, **{"CC": "no-compiler", "CXX": "no-compiler", **environment})
    assert ran.returncode == 0, ran.stderr
    return out / ran.stdout.strip().splitlines()[-1]


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def metadata_of(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def sources() -> set[str]:
    """Every module of the package as a wheel names it, the ops under `fastprompt/kernels`."""
    files = {path.relative_to(ROOT) for path in (ROOT / "fastprompt").rglob("*.py")}
    ops = {Path("fastprompt") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    return {path.as_posix() for path in files | ops}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", copy_tree(tmp_path_factory.mktemp("wheel") / "tree"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", copy_tree(tmp_path_factory.mktemp("sdist") / "tree"))


def test_wheel_holds_every_module_and_nothing_beside_the_package(wheel: Path) -> None:
    names = names_in(wheel)
    assert {name for name in names if name.endswith(".py")} == sources()
    assert {"fastprompt/py.typed", "fastprompt/report/page.html.jinja"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"fastprompt"}
    assert wheel.name == f"fastprompt-{fastprompt.__version__}-py3-none-any.whl"
    assert not [name for name in names if name.endswith((".so", ".cpp", ".inc", ".h"))]
    licences = {name.split("/")[-1] for name in names if ".dist-info/licenses/" in name}
    assert licences == {"LICENSE", "NOTICE"}


def test_sdist_holds_the_native_sources(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").iterdir()} <= names
    assert {"LICENSE", "NOTICE", "README.md", "setup.py", "fastprompt/kernels/__init__.py"} <= names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.long
@pytest.mark.skipif(shutil.which(os.environ.get("CXX") or "g++") is None, reason="there is no C++ compiler")
def test_one_wheel_with_the_native_kernels_serves_every_python(tmp_path: Path) -> None:
    wheel = build(
        "wheel",
        copy_tree(tmp_path / "tree"),
        CC=os.environ.get("CC") or "gcc",
        CXX=os.environ.get("CXX") or "g++",
        FASTPROMPT_REQUIRE_NATIVE="1",
    )
    assert wheel.name.startswith(f"fastprompt-{fastprompt.__version__}-cp310-abi3-")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = "from fastprompt.kernels import native; print(repr(native.obstacle()), native.level(), native.PATH)"
    ran = python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert ran.stdout.split()[::2] == ["''", str(tmp_path / "site/fastprompt/kernels/_native.abi3.so")], ran.stderr


def test_without_a_compiler_a_build_fails_where_the_kernels_are_required(tmp_path: Path) -> None:
    tree, code = copy_tree(tmp_path / "tree"), "from setuptools.build_meta import build_wheel; build_wheel('.')"
    missing = {"CC": "no-compiler", "CXX": "no-compiler"}
    ran = python("-c", code, cwd=tree, **missing, FASTPROMPT_REQUIRE_NATIVE="1")
    assert ran.returncode != 0
    assert "no-compiler" in ran.stderr


def test_wheel_metadata(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert metadata["Version"] == fastprompt.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    base = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert {"torch>=2.10", "einops>=0.8", 'triton>=3.6; sys_platform == "linux"'} <= {*base}
    named = {re.split(r"[^A-Za-z0-9._-]", need)[0] for need in base}
    assert not named & {"scipy", "scikit-learn", "matplotlib", "onnx"}
    extras = {need for need in metadata.get_all("Requires-Dist", []) if "extra ==" in need}
    assert {"matplotlib", "scikit-learn", "scipy"} == {
        re.split(r"[^A-Za-z0-9._-]", need)[0] for need in extras if 'extra == "report"' in need
    }
    with zipfile.ZipFile(wheel) as archive:
        [entry_points] = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
        assert "fastprompt = fastprompt.cli:main" in archive.read(entry_points).decode()


def test_an_index_takes_both(wheel: Path, sdist: Path) -> None:
    ran = python("-m", "twine", "check", "--strict", str(wheel), str(sdist), cwd=wheel.parent)
    assert ran.returncode == 0, ran.stdout
    assert ran.stdout.count("PASSED") == 2


def test_a_wheel_from_the_sdist_is_the_same(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [tree] = tmp_path.iterdir()
    assert names_in(build("wheel", tree)) == names_in(wheel)


def test_installed_wheel_imports_from_its_own_files(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import importlib.util, fastprompt, fastprompt.kernels.library_prompts as op\n"
        "print(fastprompt.__file__, op.__file__, importlib.util.find_spec('kernels'))"
    )
    ran = python("-c", code, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path / "site"))
    assert ran.returncode == 0, ran.stderr
    package, op, top_level = ran.stdout.split()
    assert Path(package) == tmp_path / "site/fastprompt/__init__.py"
    assert Path(op) == tmp_path / "site/fastprompt/kernels/library_prompts/__init__.py"
    assert top_level == "None"


def test_runs_from_the_repository_root_without_an_install() -> None:
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "import fastprompt.kernels.library_prompts as op; print(op.__file__)"
    )
    ran = python("-c", code, cwd=ROOT)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()).resolve() == ROOT / "kernels/library_prompts/__init__.py"


def test_editable_install_makes_no_top_level_kernels(tmp_path: Path) -> None:
    names = ("kernels", "tests", "bench")
    code = f"import fastprompt, importlib.util as u; print([u.find_spec(name) for name in {names}])"
    ran = python("-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[None, None, None]"


def test_a_checkout_without_the_link_is_refused(tmp_path: Path) -> None:
    tree = copy_tree(tmp_path / "tree")
    (tree / "fastprompt" / "kernels").unlink()
    (tree / "fastprompt" / "kernels").write_text("../kernels")
    ran = python("setup.py", "--version", cwd=tree)
    assert ran.returncode != 0
    assert "must be a link to the folder kernels/" in ran.stderr


def test_console_script_is_installed_and_prints_help() -> None:
    script = Path(sys.executable).parent / "fastprompt"
    ran = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for command in ("adapt", "eval", "predict", "export", "info"):
        assert command in ran.stdout


def test_every_import_is_a_declared_dependency(wheel: Path) -> None:
    declared = set()
    for need in metadata_of(wheel).get_all("Requires-Dist", []):
        name = re.split(r"[^A-Za-z0-9._-]", need)[0].lower()
        declared.add(IMPORT_NAMES.get(name, name.replace("-", "_")))
    imported: dict[str, str] = {}
    for source in sources():
        for node in ast.walk(ast.parse((ROOT / source).read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                modules = [node.module or ""]
            else:
                continue
            imported.update({module.split(".")[0]: source for module in modules})
    ours = {"fastprompt", "triton", *sys.stdlib_module_names}
    missing = {name: source for name, source in imported.items() if name not in ours | declared}
    assert not missing


def test_the_oldest_versions_allowed_are_those_that_are_tested() -> None:
    """`make test-oldest` runs with constraints-oldest.txt."""
    project = (ROOT / "pyproject.toml").read_text()
    (dependencies,) = re.findall(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    allowed = dict(re.findall(r'"([\w.-]+)>=([\w.]+)', dependencies))
    tested = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))
    assert allowed.pop("psutil")  # on Windows alone
    assert allowed.keys() == tested.keys()
    for name, version in allowed.items():
        assert re.match(re.escape(version) + r"(\.\d+)*$", tested[name]), name
