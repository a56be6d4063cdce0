"""The Dockerfile, without Docker: what it copies is there, what it installs exists, and its command is one."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
from pathlib import Path

import pytest

from fastprompt.cli.main import parse
from fastprompt.cli.serve import Serve

try:
    import tomllib
except ModuleNotFoundError:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
KNOWN = {
    "ARG",
    "CMD",
    "COPY",
    "ENTRYPOINT",
    "ENV",
    "EXPOSE",
    "FROM",
    "HEALTHCHECK",
    "RUN",
    "STOPSIGNAL",
    "USER",
    "WORKDIR",
}


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each instruction, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line.strip()]


FOUND = instructions()


def every(name: str) -> list[str]:
    return [arguments for found, arguments in FOUND if found == name]


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves out a path: its last pattern that matches the path or a folder above decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        keep, pattern = line.startswith("!"), line.removeprefix("!")
        parts = path.split("/")
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        if pattern.startswith("**/"):
            matches = any(fnmatch.fnmatch(part, pattern.removeprefix("**/")) for part in parts)
        else:
            matches = any(fnmatch.fnmatch(each, pattern) for each in above)
        out = not keep if matches else out
    return out


def test_every_instruction_is_one_of_docker() -> None:
    assert {name for name, _ in FOUND} <= KNOWN
    assert FOUND[0][0] == "ARG"
    assert [name for name, _ in FOUND if name in ("FROM", "ENTRYPOINT")] == ["FROM", "FROM", "ENTRYPOINT"]


def test_variables_are_declared() -> None:
    names = {argument.partition("=")[0] for argument in every("ARG")}
    used = {name for _, arguments in FOUND for name in re.findall(r"\$\{(\w+)\}", arguments)}
    assert used == names == {"PYTHON", "TORCH_INDEX"}


def test_what_is_copied_is_there_and_not_ignored() -> None:
    copied = [word for line in every("COPY") if "--from=" not in line for word in line.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists(), name
        files = [ROOT / name] if (ROOT / name).is_file() else [p for p in (ROOT / name).iterdir() if p.is_file()]
        assert any(not ignored(file.relative_to(ROOT).as_posix()) for file in files), name
    stages = [line.split(" AS ")[1] for line in every("FROM") if " AS " in line]
    assert [line.split()[0] for line in every("COPY") if "--from=" in line] == [f"--from={stage}" for stage in stages]


def test_the_package_is_built_from_what_is_copied() -> None:
    """All that the manifest of the source distribution names."""
    copied = {word for line in every("COPY") for word in line.split()[:-1]}
    needs = {"pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "csrc", "kernels"}
    assert needs | {"fastprompt"} <= copied


@pytest.mark.parametrize(
    ("path", "out"),
    [
        (".git/config", True),
        (".venv/bin/python", True),
        ("runs/birds/best/adapter_model.safetensors", True),
        ("tests/test_model.py", True),
        ("kernels/_native.abi3.so", True),
        ("fastprompt/cli/__pycache__/main.pyc", True),
        ("fastprompt/cli/main.py", False),
        ("csrc/ops.cpp", False),
        ("kernels/dispatch.py", False),
    ],
)
def test_what_is_sent_to_the_builder(path: str, out: bool) -> None:
    assert ignored(path) == out


def test_pip_installs_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = {*project["optional-dependencies"]}
    installed = [shlex.split(line) for line in every("RUN") if "pip install" in line]
    named = [word for words in installed for word in words if word.startswith(".[")]
    [extras] = [set(word[2:-1].split(",")) for word in named]
    assert {"serve", "weights"} <= extras <= known
    build = {word for words in installed for word in words}
    assert "setuptools>=77" in build
    assert {"torch", "torchvision"} <= build
    assert "--no-build-isolation" in next(words for words in installed if named[0] in words)
    python = next(argument.partition("=")[2] for argument in every("ARG") if argument.startswith("PYTHON"))
    least = re.fullmatch(r">=(\d+)\.(\d+)", project["requires-python"])
    assert least is not None
    assert tuple(map(int, python.split("."))) >= tuple(map(int, least.groups()))


def test_entry_point_and_command_parse() -> None:
    [entry], [default] = (json.loads(text) for text in every("ENTRYPOINT")), (json.loads(every("CMD")[-1]),)
    assert entry[0] == "fastprompt"
    command = parse([*entry[1:], *default])
    assert isinstance(command, Serve)
    assert (command.host, str(command.port)) == ("0.0.0.0", every("EXPOSE")[0])
    assert command.backbone == "clip-vit-b16"


def test_the_health_check_asks_the_port_that_is_served() -> None:
    [check] = every("HEALTHCHECK")
    words = json.loads(check[check.index("[") :])
    assert words[:2] == ["python", "-c"]
    compile(words[2], "HEALTHCHECK", "exec")
    assert f"127.0.0.1:{every('EXPOSE')[0]}/health" in words[2]


def test_the_documented_calls_parse() -> None:
    """What follows the image's name in `docker run` replaces CMD."""
    texts = [(ROOT / "Dockerfile").read_text(), (ROOT / "docs" / "serving.md").read_text()]
    calls = [call for text in texts for call in re.findall(r"docker run .*? fastprompt(?::\w+)? (.*)$", text, re.M)]
    assert len(calls) >= 2
    for call in calls:
        assert isinstance(parse(["serve", *shlex.split(call, comments=True)]), Serve)
