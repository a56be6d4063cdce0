"""Modules of the gates, which are scripts beside each other and no package."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

GATES = Path(__file__).resolve().parent / "gates"


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`gates(name)`: the module `tests/kernels/gates/<name>.py`, which imports others beside it."""

    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(GATES))
        spec = importlib.util.spec_from_file_location(f"gates_{name}", GATES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load
