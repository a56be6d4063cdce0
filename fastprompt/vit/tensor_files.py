"""Read files of tensors: safetensors, NumPy, and torch pickles, without running any code in them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError, ArgumentPathError, ArgumentTypeError

_PLAIN: list[Any] = [
    argparse.Namespace,
    *((PurePosixPath, f"pathlib.{module}PosixPath") for module in ("", "_local.")),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("float16", "float32", "float64", "int64")),
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]
"""Classes that published files refer to besides tensors: settings, and NumPy arrays and scalars. None of them runs code
from a file."""


def read_file(path: str | os.PathLike[str], name: str) -> Any:
    """Read a file of tensors: `.safetensors`, `.npz`, or a torch pickle, without running any code in it.

    Args:
        name: the caller's name for the file, used in errors.

    Raises:
        FileNotFoundError: no such file. ValueError: it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ArgumentPathError(name, f"{path} does not exist")
    how = {".safetensors": "a whole safetensors file", ".npz": "arrays of numbers (NumPy)"}.get(
        path.suffix, "plain tensors (weights_only=True)"
    )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {key: arrays[key] for key in arrays.files}
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken file can make the unpickler raise almost anything
        raise ArgumentError(name, f"{path} cannot be read as {how}: {error}") from error


def named_tensors(content: Any, name: str) -> dict[str, Tensor]:
    """Return the tensors and NumPy arrays of a state dict by name, skipping its other entries.

    Raises:
        TypeError: it is not a state dict, or has no tensors. ValueError: a tensor has NaN or infinite values.
    """
    if not isinstance(content, Mapping) or not content or not all(isinstance(k, str) for k in content):
        raise ArgumentTypeError(name, f"must be a path or a state dict of named tensors, got {type(content).__name__}")
    state = {
        key: torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value
        for key, value in content.items()
    }
    state = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not state:
        raise ArgumentTypeError(name, "must be a state dict of tensors, it holds none")
    for key, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name}: {key} contains NaN or infinite values")
    return state
