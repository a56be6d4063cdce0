"""A training step as a graph: parameters, losses and gradients are those of the eager step."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recorded_graphs import (
    RecordingCapturer,
    close,
    graphed_of,
    plain_step,
    sgd,
)
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine.cuda_graph import WARM_UPS, GraphedTrainStep

Build = Callable[..., fp.PromptedViT]


def adamw(model: fp.PromptedViT, **options: Any) -> torch.optim.Optimizer:
    """With a tensor as learning rate, as the graph has it: the same arithmetic."""
    parameters = [p for _, p in model.trainable_parameters()]
    return torch.optim.AdamW(parameters, lr=torch.tensor(0.125), capturable=True, **options)


def test_trains_as_eager_does(build: Build, images: Tensor, labels: Tensor, variant: str) -> None:
    model = build(variant).train()
    plain = copy.deepcopy(model)
    optimizer = sgd(plain, momentum=0.9, weight_decay=0.01)
    step = GraphedTrainStep(model, sgd(model, momentum=0.9, weight_decay=0.01), capturer=RecordingCapturer())
    losses: list[list[Tensor]] = []
    for run in (step, lambda x, y: plain_step(plain, optimizer, x, y)):
        torch.manual_seed(5)
        losses.append([run(images[i : i + 4], labels[i : i + 4]) for i in range(WARM_UPS + 4)])
    for found, wanted in zip(*losses, strict=True):
        close(found, wanted)
    for (name, found), wanted in zip(model.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, msg=name)
    assert step.captures == 1
    assert not step.eager


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "dampening": 0.25},
        {"momentum": 0.5, "nesterov": True},
        {"momentum": 0.5, "maximize": True, "foreach": True},
    ],
)
def test_sgd(build: Build, images: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
    compare(build, images, labels, lambda model: sgd(model, **options))


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"amsgrad": True}])
@pytest.mark.usefixtures("capturable_on_cpu")
def test_adamw(build: Build, images: Tensor, labels: Tensor, options: dict[str, Any]) -> None:
    compare(build, images, labels, lambda model: adamw(model, **options))


def compare(
    build: Build,
    images: Tensor,
    labels: Tensor,
    make: Callable[[fp.PromptedViT], torch.optim.Optimizer],
) -> None:
    model = build("vpt-deep").train()
    plain = copy.deepcopy(model)
    optimizer = make(plain)
    step = GraphedTrainStep(model, make(model), capturer=RecordingCapturer())
    for i in range(WARM_UPS + 3):
        x, y = images[i : i + 4], labels[i : i + 4]
        close(step(x, y), plain_step(plain, optimizer, x, y))
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert step.captures == 1


def test_the_first_steps_are_eager_and_each_batch_size_has_its_graph(
    build: Build, images: Tensor, labels: Tensor
) -> None:
    model = build("vpt-deep").train()
    capturer = RecordingCapturer()
    step = GraphedTrainStep(model, sgd(model, momentum=0.5), capturer=capturer)
    counts = []
    for size in (4, 4, 4, 4, 4, 3, 3, 3, 3, 4):
        step(images[:size], labels[:size])
        counts.append((step.captures, capturer.warm_ups))
    assert counts == [(0, 1), (0, 2), (0, 3), (1, 3), (1, 3), (1, 4), (1, 5), (1, 6), (2, 6), (2, 6)]
    assert len(capturer.pools) == 1
    assert [graph.replays for graph in capturer.graphs] == [3, 1]


def test_gradients_stay_in_place(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep").train()
    step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
    step(images[:4], labels[:4])
    places = [p.grad.data_ptr() for _, p in model.trainable_parameters()]
    for i in range(6):
        before = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.grad = None  # what a loop's own zero_grad() does
        step(images[i : i + 4], labels[i : i + 4])
        assert [p.grad.data_ptr() for _, p in model.trainable_parameters()] == places
        F.cross_entropy(before(images[i : i + 4]), labels[i : i + 4]).backward()
    for (_, found), (_, wanted) in zip(model.trainable_parameters(), before.trainable_parameters(), strict=True):
        close(found.grad, wanted.grad)
    assert step.captures == 1


def test_gradients_outside_of_the_optimizer_stay_too(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep").train()
    optimizer = torch.optim.SGD(model.generator.parameters(), lr=0.1)
    step = GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
    step(images[:4], labels[:4])
    place = model.head.weight.grad.data_ptr()
    for _ in range(5):
        model.head.weight.grad = None
        step(images[:4], labels[:4])
        assert model.head.weight.grad.data_ptr() == place


def test_the_loss_is_a_copy_and_its_function_the_caller_s(build: Build, images: Tensor) -> None:
    model = build("linear").train()
    targets = torch.randn(4, 3, dtype=torch.float64)

    def loss(logits: Tensor, labels: Tensor, aux: dict[str, Tensor]) -> Tensor:
        return (logits - labels).square().mean()

    step = GraphedTrainStep(model, sgd(model, lr=0.01), loss, capturer=RecordingCapturer())
    losses = [step(images[:4], targets) for _ in range(8)]
    assert len(set(map(float, losses))) == 8
    assert all(b < a for a, b in itertools.pairwise(losses))


def test_learning_rates_are_read_at_replay(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep").train()
    plain = copy.deepcopy(model)
    optimizers = [sgd(m, momentum=0.5) for m in (model, plain)]
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    step = GraphedTrainStep(model, optimizers[0], capturer=RecordingCapturer())
    for i in range(8):
        if i == 6:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] = 0.75
        step(images[:4], labels[:4])
        plain_step(plain, optimizers[1], images[:4], labels[:4])
        for scheduler in schedulers:
            scheduler.step()
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert step.captures == 1


@pytest.mark.parametrize("what", ["weight decay", "state", "data", "frozen"])
def test_what_was_captured_and_changes_is_captured_again(
    build: Build, images: Tensor, labels: Tensor, what: str
) -> None:
    model = build("vpt-deep").train()
    plain = copy.deepcopy(model)
    models, optimizers = (model, plain), (sgd(model, momentum=0.5), sgd(plain, momentum=0.5))
    step = GraphedTrainStep(model, optimizers[0], capturer=RecordingCapturer())
    for i in range(12):
        if i == 5:
            for m, optimizer in zip(models, optimizers, strict=True):
                if what == "weight decay":
                    optimizer.param_groups[0]["weight_decay"] = 0.1
                elif what == "state":
                    state = copy.deepcopy(optimizer.state_dict())
                    for values in state["state"].values():
                        values["momentum_buffer"].mul_(2)
                    optimizer.load_state_dict(state)
                    optimizer.param_groups[0]["lr"] = 0.125
                elif what == "data":
                    m.head.weight.data = 2 * m.head.weight.data
                else:
                    m.head.weight.requires_grad_(False)
                    m.head.weight.grad = None
        step(images[:4], labels[:4])
        plain_step(plain, optimizers[1], images[:4], labels[:4])
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert step.captures == 2


def test_what_was_made_of_parameters_notices_a_replay(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep")  # in eval mode, so that nothing else drops what the model keeps
    graphed, _ = graphed_of(model)
    step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
    for _ in range(WARM_UPS + 3):
        step(images[:4], labels[:4])
        with torch.no_grad():
            expected = model.reference_forward(images[:2])
            close(model(images[:2]), expected)
        close(graphed(images[:2]), expected)
    assert step.captures == 1
    assert graphed.captures == 3


def test_a_step_that_cannot_be_captured_goes_on_eagerly(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep").train()
    plain = copy.deepcopy(model)
    optimizer = sgd(plain)
    step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer({0: RuntimeError("no")}))
    with pytest.warns(UserWarning, match="no CUDA graph") as caught:
        losses = [step(images[:4], labels[:4]) for _ in range(WARM_UPS + 3)]
    for loss in losses:
        close(loss, plain_step(plain, optimizer, images[:4], labels[:4]))
    assert len(caught) == 1
    assert "batch 4 of 32 x 32 images" in str(caught[0].message)
    assert "RuntimeError: no" in str(caught[0].message)


def test_a_loss_that_reads_the_host_is_named(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("linear").train()

    def loss(logits: Tensor, labels: Tensor, aux: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(logits, labels) / max(1.0, float(logits.detach().abs().max()))

    step = GraphedTrainStep(model, sgd(model), loss, capturer=RecordingCapturer())
    for _ in range(WARM_UPS):
        step(images[:4], labels[:4])
    with pytest.warns(UserWarning, match="_local_scalar_dense.* is not permitted"):
        step(images[:4], labels[:4])


def test_optimizers_that_cannot_be_captured_are_refused(build: Build) -> None:
    model = build("linear").train()
    parameters = [p for _, p in model.trainable_parameters()]
    for optimizer, message in (
        (torch.optim.AdamW(parameters), "optimizer AdamW must be made with capturable=True"),
        (torch.optim.LBFGS(parameters), "optimizer LBFGS has no step that a CUDA graph can hold"),
        (torch.optim.SGD(parameters, lr=0.1, differentiable=True), "optimizer must not be differentiable"),
        (torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1), "optimizer must be over parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer"):
        GraphedTrainStep(model, parameters, capturer=RecordingCapturer())
    with pytest.raises(TypeError, match="loss must be a function"):
        GraphedTrainStep(model, sgd(model), "cross_entropy", capturer=RecordingCapturer())


def test_wrong_batches(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("linear").train()
    step = GraphedTrainStep(model, sgd(model), capturer=RecordingCapturer())
    with pytest.raises(ValueError, match="labels must be"):
        step(images[:4], labels[:3])
    with pytest.raises(ValueError, match="labels must be"):
        step(images[:0], labels[:0])
    with pytest.raises(TypeError, match="labels must be a tensor"):
        step(images[:4], [0, 1, 2, 0])
    with pytest.raises(ValueError, match="images must have shape"):
        step(images[0], labels[:1])


def test_another_parameter_group_is_an_error(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("vpt-deep").train()
    optimizer = torch.optim.SGD(model.generator.parameters(), lr=0.1)
    step = GraphedTrainStep(model, optimizer, capturer=RecordingCapturer())
    optimizer.add_param_group({"params": list(model.head.parameters())})
    with pytest.raises(RuntimeError, match="optimizer has got another parameter group"):
        step(images[:4], labels[:4])


def test_release(build: Build, images: Tensor, labels: Tensor) -> None:
    model = build("linear").train()
    capturer = RecordingCapturer()
    step = GraphedTrainStep(model, sgd(model), capturer=capturer)
    for _ in range(WARM_UPS + 1):
        step(images[:4], labels[:4])
    step.release()
    assert capturer.pools == [[]]
    with pytest.raises(RuntimeError, match="this GraphedTrainStep was released"):
        step(images[:4], labels[:4])
