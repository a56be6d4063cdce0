from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fastprompt.train import checkpoint
from fastprompt.train.checkpoint import (
    load_state,
    optimizer_state,
    rng_state,
    save_state,
    set_optimizer_state,
    set_rng_state,
)  # fmt: skip


def draws() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), float(np.random.randn()), random.gauss(0, 1)


def test_random_states_survive_a_file(tmp_path: Path) -> None:
    np.random.randn()  # leaves a second normal waiting
    random.gauss(0, 1)
    save_state(tmp_path / "state", *rng_state())
    expected = [draws() for _ in range(3)]
    set_rng_state(*load_state(tmp_path / "state"))
    assert [draws() for _ in range(3)] == expected


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_an_optimizer_goes_on_where_it_was_saved(tmp_path: Path, kind: str) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 2)
        if kind == "sgd":
            return module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1)

    def step(module: torch.nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    module, optimizer = make()
    step(module, optimizer)
    save_state(tmp_path / "state", *optimizer_state(optimizer))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    step(module, optimizer)
    again, restored = make()
    again.load_state_dict(weights)
    set_optimizer_state(restored, *load_state(tmp_path / "state"))
    step(again, restored)
    assert torch.equal(again.weight, module.weight)
    assert torch.equal(again.bias, module.bias)


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    with pytest.raises(FileNotFoundError, match=r"last\.safetensors"):
        load_state(path)
    save_state(path, {"x": torch.arange(100.0)}, {"epoch": 3})
    assert load_state(path)[1] == {"epoch": 3}
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"last\.safetensors.*resume=False"):
        load_state(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"last\.safetensors"):
        load_state(path)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    tensors = {"model.w": torch.randn(3, 5), "rng.torch": torch.arange(16, dtype=torch.uint8)}
    save_state(path, tensors, {"progress": {"epoch": 3, "note": '"sha256":"' + "0" * 64 + '"'}})
    whole = path.read_bytes()
    assert load_state(path)[1]["progress"]["epoch"] == 3
    for bit in range(0, 8 * len(whole), 7):  # in every byte, and each of the eight bits
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"last\.safetensors.*damaged.*--no-resume"):
            load_state(path)


def test_a_state_of_an_earlier_version_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    path.write_bytes(save({"x": torch.arange(4.0)}, metadata={"state": json.dumps({"epoch": 2})}))
    tensors, values = load_state(path)
    assert tensors["x"].tolist() == [0, 1, 2, 3]
    assert values == {"epoch": 2}


def test_a_state_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_FORMAT", "3")
        save_state(path, {"x": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="has format 3, this version reads 2"):
        load_state(path)
