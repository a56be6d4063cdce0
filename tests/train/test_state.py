from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastprompt as fp
from fastprompt.train.checkpoint import load_state, save_state
from fastprompt.train.optimizer import make_optimizer
from fastprompt.train.recipes import Recipe
from fastprompt.train.state import Progress, RunState, best_weights, holds, recorded_identity


def make_state(model: Any) -> RunState:
    optimizer = make_optimizer(model.trainable_parameters(), Recipe())
    return RunState(model, optimizer, {"recipe": {}}, {"threads": 1}, measure=True)


def test_a_state_survives_its_file(make_model: Callable[..., Any], tmp_path: Path) -> None:
    state = make_state(make_model())
    state.progress.events.append({"event": "start"})
    state.progress.epoch = 2
    state.choices.note("key", "fast")
    with torch.no_grad():
        for _, parameter in state.model.trainable_parameters():
            parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    save_state(tmp_path / "state", *state.saved())
    expected = torch.rand(3)
    again = make_state(make_model(seed=1))
    tensors, values = load_state(tmp_path / "state")
    again.restore(tensors, values)
    assert torch.equal(torch.rand(3), expected)
    assert again.name == state.name != make_state(make_model()).name
    assert again.progress == state.progress
    assert values["choices"] == {"key": "fast"}
    for name, tensor in state.weights().items():
        assert torch.equal(again.weights()[name], tensor)
        assert torch.equal(again.best[name], state.best[name])
        assert torch.equal(best_weights(tensors)[name], state.best[name])
    for each in (state, again):
        for _, parameter in each.model.trainable_parameters():
            parameter.grad = torch.ones_like(parameter)
        each.optimizer.step()
    assert all(torch.equal(again.weights()[name], tensor) for name, tensor in state.weights().items())


def test_a_run_is_finished_when_its_log_says_so() -> None:
    assert not Progress().finished
    assert not Progress(events=[{"event": "end"}, {"event": "resume"}]).finished
    assert Progress(events=[{"event": "start"}, {"event": "end"}]).finished


def test_an_earlier_versions_identity_has_what_it_recorded() -> None:
    recipe = {"epochs": 3, "lr": 0.1, "num_workers": 2}
    signature = {
        "recipe": recipe, "config": {"kind": "vpt"}, "num_classes": 4, "head": {"kind": "linear"}, "readout": "cls",
        "num_train": 40, "train_labels": "a", "val_labels": "b", "backbone": "c",
    }  # fmt: skip
    found = recorded_identity({"signature": signature})
    assert found["train"] == {"num_images": 40, "labels": "a"}
    assert found["val"] == {"labels": "b"}
    assert found["recipe"]["lr"] == 0.1
    assert found["recipe"]["deterministic"] is False  # a field that it did not have
    assert "num_workers" not in found["recipe"]
    assert not {"initial_weights", "class_names"} & set(found)


def test_an_adapter_on_disk_is_compared_tensor_by_tensor(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    assert not holds(tmp_path / "best", model.adapter_state_dict())
    model.save_pretrained(tmp_path / "best")
    assert holds(tmp_path / "best", model.adapter_state_dict())
    assert not holds(tmp_path / "best", make_model(seed=1).adapter_state_dict())
    assert not holds(tmp_path / "best", make_model(fp.LinearProbeConfig()).adapter_state_dict())
    path = tmp_path / "best" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    assert not holds(tmp_path / "best", model.adapter_state_dict())
