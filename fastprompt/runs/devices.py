"""The device and data type that a command computes with."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from fastprompt.arguments import ArgumentError

if TYPE_CHECKING:
    import torch

DEVICES = "auto, cpu, cuda, cuda:N or mps"


def find_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" is the first CUDA GPU, else Apple's GPU, else the CPU.

    Raises:
        ValueError: there is no such device on this machine, or torch was built without support for it.
    """
    import torch

    found = re.fullmatch(r"(auto|cpu|mps|cuda)(?::(\d+))?", name)
    if found is None or (found[2] and found[1] != "cuda"):
        raise ArgumentError("device", f"must be {DEVICES}, got {name!r}")
    kind, count = found[1], torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "auto":
        kind = "cuda" if count else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ArgumentError("device", "must be available, got 'mps': this machine or this build of torch has no Metal")
    if kind != "cuda":
        return torch.device(kind)
    if not count:
        built = torch.version.cuda or torch.version.hip
        why = "no GPU was found" if built else f"torch {torch.__version__} is built without CUDA and ROCm"
        raise ArgumentError("device", f"must be available, got {name!r}: {why}; 'auto' and 'cpu' work")
    # torchrun numbers the processes of a machine.
    index = int(found[2] or os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise ArgumentError("device", f"must be at most cuda:{count - 1} on this machine, got {name!r}")
    return torch.device("cuda", index)


def describe(device: torch.device, dtype: torch.dtype, backbone: str = "float") -> str:
    """Describe device and data type in words: "cuda:0 (NVIDIA H200), bfloat16".

    Args:
        backbone: "int8" if the frozen Linears run in int8 (`Recipe.backbone`).
    """
    import torch

    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    name = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else name
    around = "int8 and " if backbone == "int8" else ""
    return f"{device}{name}, {around}{str(dtype).removeprefix('torch.')}"
