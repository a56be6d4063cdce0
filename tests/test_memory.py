from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastprompt.memory import peak_memory_mib, reset_peak_memory


def test_peak_memory_is_that_of_the_process_alone() -> None:
    """A small program started by a large one does not report the large one's peak."""
    child = "from fastprompt.memory import peak_memory_mib; print(peak_memory_mib())"
    parent = (
        "import subprocess, sys; block = bytearray(b'x') * (400 << 20); "
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)"
    )
    found = float(subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout)
    assert 5 < found < 300
    before = peak_memory_mib()
    block = torch.ones(64 << 18)  # 64 MiB, touched
    assert peak_memory_mib() - before > -1
    reset_peak_memory()
    assert peak_memory_mib() > 60
    del block


def test_windows_has_the_peak_from_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=300 * 2**20))
    monkeypatch.setitem(sys.modules, "psutil", SimpleNamespace(Process=lambda: process))
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory_mib() == 300
