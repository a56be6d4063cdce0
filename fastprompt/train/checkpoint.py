"""The state a training run resumes from."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_to_bytes

from fastprompt.files import atomic_write, atomic_write_many, remove_stale_temporaries

__all__ = [
    "atomic_write",
    "atomic_write_many",
    "load_state",
    "optimizer_state",
    "remove_stale_temporaries",
    "rng_state",
    "save_state",
    "set_optimizer_state",
    "set_rng_state",
]


def rng_state() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The random states of torch (CPU and CUDA), numpy and Python, as tensors and JSON values."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, gauss_next = random.getstate()
    return tensors, {
        "numpy": [kind, int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), gauss_next],
    }


def set_rng_state(tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    torch.set_rng_state(tensors["torch"].cpu())
    for name, state in tensors.items():
        if name.startswith("cuda.") and torch.cuda.is_available():
            index = int(name.removeprefix("cuda."))
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state.cpu(), index)
    kind, position, has_gauss, gauss = values["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, gauss_next = values["python"]
    random.setstate((version, tuple(words), gauss_next))


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Writes tensors and JSON values into one safetensors file, atomically (the JSON is in its header).

    Raises:
        OSError: the file could not be written; the old one is intact.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, tensors_to_bytes(plain, metadata={"state": json.dumps(values)}))


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Reads what `save_state` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated or not a training state.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training state at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a readable training state ({error}); delete it or start anew with resume=False"
        ) from error
    return tensors, values


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's per-parameter state: tensors under ``<index>.<name>``, the rest as JSON values."""
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, Any] = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                values[f"{index}.{name}"] = value
    return tensors, values


def set_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]
) -> None:
    """Puts back what `optimizer_state` returned; the optimizer has the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *values.items()):
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
