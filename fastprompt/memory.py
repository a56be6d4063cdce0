"""Peak memory of this process, or of a GPU."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def reset_peak_memory(device: torch.device | None = None) -> None:
    """Restart the measurement of `peak_memory_mib`. On a CPU this works only on Linux; elsewhere the peak remains."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mib(device: torch.device | None = None) -> float:
    """Return in MiB PyTorch's peak allocation on a CUDA device, else the peak resident memory of this process.

    psutil reports the peak only on Windows. Linux has it in /proc as `VmHWM`, which covers the current program.
    `ru_maxrss` starts at the parent's peak in a spawned process, so it is only the last resort.
    """
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
