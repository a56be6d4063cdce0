"""Graphs see parameters that change in place, and are captured again where tensors were exchanged."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from recorded_graphs import (
    change,
    close,
    eager,
    graphed_of,
)
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.train.evaluate import latent_samples

Build = Callable[..., fp.PromptedViT]


def test_changed_in_place(build: Build, images: Tensor, method: str) -> None:
    model = build(method)
    graphed, _ = graphed_of(model)
    before = graphed(images[:3])
    change(model)
    found = graphed(images[:3])
    assert not torch.allclose(found, before)
    close(found, eager(model, images[:3]))
    assert graphed.captures == 3


def test_an_optimizer_and_a_loaded_adapter_change_in_place(build: Build, images: Tensor) -> None:
    model, other = build("vpt-deep"), build("vpt-deep", seed=5)
    graphed, _ = graphed_of(model)
    graphed(images[:2])
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=0.1)
    F.cross_entropy(model(images[:2]), torch.tensor([0, 1])).backward()
    optimizer.step()
    close(graphed(images[:2]), eager(model, images[:2]))
    model.load_adapter_state_dict(other.adapter_state_dict())
    close(graphed(images[:2]), eager(other, images[:2]))
    assert graphed.captures == 3


def test_prompts_get_keys_and_values_once_for_an_adapter(
    build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain, calls = build("vpt-deep"), fp.PromptedViT.static_prefixes, []
    monkeypatch.setattr(fp.PromptedViT, "static_prefixes", lambda self: calls.append(self) or plain(self))
    graphed, _ = graphed_of(model)
    for expected in (1, 2):
        for count in (2, 4, 2, 11):
            graphed(images[:count])
            assert len(calls) == expected
        change(model)


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt"])
def test_written_through_data(build: Build, images: Tensor, method: str) -> None:
    model = build(method)
    graphed, _ = graphed_of(model)
    before = graphed(images[:2])
    for tensor in model.generator.parameters():
        tensor.data.copy_(1.5 * tensor.data + 0.1)
    found = graphed(images[:2])
    assert not torch.allclose(found, before)
    close(found, eager(model, images[:2]))
    assert graphed.captures == 3


def test_prompts_whose_memory_is_used_again(build: Build, images: Tensor) -> None:
    """Neither address nor version tells the third tensor from the first."""
    model = build("vpt-deep")
    graphed, _ = graphed_of(model, (2,))
    for scale in (1.0, 2.0, 3.0):
        model.generator.static.embeddings.data = scale * torch.ones_like(model.generator.static.embeddings)
        close(graphed(images[:2]), eager(model, images[:2]))


def test_a_backbone_written_through_data_is_captured_again(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model, (2,))
    before = graphed(images[:2])
    for tensor in model.backbone.parameters():
        tensor.data.mul_(1.1)
    found = graphed(images[:2])
    assert not torch.allclose(found, before)
    with torch.no_grad():
        close(found, model.reference_forward(images[:2]))


@pytest.mark.parametrize("method", ["vpt-deep", "pgn", "vapt", "v2apt", "linear"])
@pytest.mark.parametrize("how", ["data", "assign", "setattr"])
def test_rebound(build: Build, images: Tensor, method: str, how: str) -> None:
    model = build(method)
    graphed, capturer = graphed_of(model)
    graphed(images[:2])
    old = list(capturer.graphs)
    state = {
        name: 1.5 * tensor + 0.1 if tensor.is_floating_point() else tensor.clone()
        for name, tensor in model.adapter_state_dict().items()
    }
    if how == "data":
        for name, parameter in model.trainable_parameters():
            parameter.data = state[name]
    elif how == "assign":
        model.load_state_dict(state, strict=False, assign=True)
    else:
        for name, tensor in state.items():
            if name.startswith("head."):
                setattr(model.head, name.removeprefix("head."), nn.Parameter(tensor))
    found = graphed(images[:2])
    close(found, eager(model.train(), images[:2]))
    assert graphed.captures == 6
    assert not any(graph.calls for graph in old)
    assert capturer.synchronized == 1
    assert len(capturer.pools) == 2
    graphed(images[:2])
    assert graphed.captures == 6


def test_statistics_of_a_batch_norm_are_read_like_parameters(build: Build, images: Tensor) -> None:
    model = build("pgn")
    graphed, _ = graphed_of(model)
    graphed(images[:2])
    norm = next(module for module in model.generator.modules() if isinstance(module, nn.BatchNorm2d))
    norm.running_mean.add_(0.5)
    close(graphed(images[:2]), eager(model, images[:2]))
    assert graphed.captures == 3
    norm.running_mean = norm.running_mean + 1
    close(graphed(images[:2]), eager(model, images[:2]))
    assert graphed.captures == 6


def test_a_parameter_that_goes_and_comes(build: Build, images: Tensor) -> None:
    model = build("linear")
    graphed, _ = graphed_of(model)
    graphed(images[:2])
    model.head.bias = None
    close(graphed(images[:2]), eager(model, images[:2]))
    model.head.bias = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
    close(graphed(images[:2]), eager(model, images[:2]))


@pytest.mark.parametrize("assign", [False, True])
def test_a_backbone_that_is_loaded_is_folded_and_captured_again(build: Build, images: Tensor, assign: bool) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model)
    before = graphed(images[:2])
    state = {name: 1.1 * tensor for name, tensor in model.backbone.state_dict().items()}
    model.backbone.load_state_dict(state, assign=assign)
    found = graphed(images[:2])
    assert not torch.allclose(found, before)
    with torch.no_grad():
        close(found, model.reference_forward(images[:2]))


def test_another_head_and_another_number_of_samples(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model, (2,))
    graphed(images[:2])
    assert model.head is not None
    model.head = copy.deepcopy(model.head)
    change(model)
    close(graphed(images[:2]), eager(model, images[:2]))
    with latent_samples(model, 5):
        close(graphed(images[:2]), eager(model, images[:2]))
        assert graphed.captures == 3


def test_another_dtype(build: Build, images: Tensor) -> None:
    model = build("vpt-deep")
    graphed, _ = graphed_of(model, (2,))
    with fp.use_backend("reference"):  # as what is recorded: in these dtypes a CPU may have faster kernels
        graphed(images[:2].float())
        model.float()
        close(graphed(images[:2].float()), eager(model, images[:2].float()))
        model.set_backbone_dtype(torch.bfloat16)
        close(graphed(images[:2].float()), eager(model, images[:2].float()))
    assert graphed.captures == 3


def test_a_model_whose_parameters_keep_moving_is_told_once(build: Build, images: Tensor) -> None:
    model = build("linear")
    graphed, _ = graphed_of(model, (2,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            graphed(images[:2])
            model.head.weight.data = model.head.weight.data.clone()
    assert [str(w.message) for w in caught if "captured again 3 times" in str(w.message)].__len__() == 1
