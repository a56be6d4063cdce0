"""Save and load the state that a training run resumes from."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import load as tensors_from_bytes, save as tensors_to_bytes

from fastprompt.files import atomic_write

RandomStates = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Random states as tensors and JSON values."""


def rng_state() -> RandomStates:
    """Return the random states of torch (CPU and CUDA), numpy and Python as tensors and JSON values."""
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
    """Restore the random states that `rng_state` returned."""
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


_FORMAT = "2"
_BLANK = "0" * 64


def save_state(path: str | os.PathLike[str], tensors: Mapping[str, torch.Tensor], values: Mapping[str, Any]) -> None:
    """Write tensors and JSON values atomically into one safetensors file.

    The file's header holds the JSON values and a sha256 of the whole file, computed with zeros in place of the digest.

    Raises:
        OSError: the file could not be written; the old file is intact.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": _FORMAT, "state": json.dumps(values), "sha256": _BLANK}
    content = memoryview(tensors_to_bytes(plain, metadata=metadata))
    place = _digest_place(content, _BLANK)

    def write(file: BinaryIO) -> None:
        file.write(content[: place.start])
        file.write(_digest_of(content, place).encode())
        file.write(content[place.stop :])

    atomic_write(path, write)


def load_state(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read and verify a file of `save_state`. The whole file is read before it is checked.

    Files of earlier versions, which have no sha256, are read without that check.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a training state, or is from a later version; the message says what
            to do.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no training state at {path}")
    content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if set(metadata) != {"state"}:  # earlier versions wrote nothing else
            digest = metadata["sha256"]
            if digest != _digest_of(memoryview(content), _digest_place(memoryview(content), digest)):
                raise ValueError("its contents do not match the sha256 saved with it")
            if metadata["format"] != _FORMAT:
                raise ValueError(f"it has format {metadata['format']}, this version reads {_FORMAT}")
        return tensors_from_bytes(content), json.loads(metadata["state"])
    except Exception as error:  # safetensors and JSON raise several kinds of errors for damaged bytes
        raise ValueError(
            f"{path} cannot be read, it is damaged or not a training state ({error}): restore it from a copy, or start "
            f"over with resume=False (--no-resume)"
        ) from error


def _digest_place(content: memoryview, digest: str) -> slice:
    """Find `digest` in the header. Quotes inside the JSON values are escaped, so no value can match."""
    header = bytes(content[: 8 + int.from_bytes(content[:8], "little")])
    start = header.index(f'"sha256":"{digest}"'.encode()) + len('"sha256":"')
    return slice(start, start + len(_BLANK))


def _digest_of(content: memoryview, place: slice) -> str:
    digest = hashlib.sha256(content[: place.start])
    digest.update(_BLANK.encode())
    digest.update(content[place.stop :])
    return digest.hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the optimizer's per-parameter state as tensors and JSON values, both named `<index>.<name>`."""
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
    """Restore what `optimizer_state` returned; the optimizer must have the same parameters in the same order."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in (*tensors.items(), *values.items()):
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
