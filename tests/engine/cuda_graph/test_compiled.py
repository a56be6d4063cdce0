"""Graphs of what `torch.compile` makes of a model.

The double of a capturer records what a compiler that changes nothing
returns; that the compiler takes the whole forward is tested beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import RecordingCapturer, close, eager, graphed_of, plain_step, sgd
from torch import Tensor

import fastprompt as fp
from fastprompt.engine import cuda_graph
from fastprompt.engine.backends import BACKENDS
from fastprompt.engine.cuda_graph import WARM_UPS, GraphedTrainStep

Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A compiler that changes nothing; the list grows by (mode, images) of each call of what it compiled."""
    calls: list[tuple[str, int]] = []

    def compiled(function: Callable[..., Any], mode: str, dynamic: bool) -> Callable[..., Any]:
        assert not dynamic

        def run(images: Tensor, *args: Any, **options: Any) -> Any:
            calls.append((mode, len(images)))
            return function(images, *args, **options)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return calls


def test_what_was_compiled_is_captured(build: Build, images: Tensor, compiles: list[tuple[str, int]]) -> None:
    model = build("vpt-deep")
    graphed, capturer = graphed_of(model, compiled=True)
    for count in (3, 4, 1):
        close(graphed(images[:count]), eager(model, images[:count]))
    sizes = graphed.batch_sizes
    assert compiles == [("max-autotune-no-cudagraphs", size) for size in sizes for _ in range(WARM_UPS + 1)]
    assert len(capturer.graphs) == len(sizes)
    with torch.no_grad():
        model.head.weight.mul_(-2)  # read in place by the graphs that there are
    close(graphed(images[:4]), eager(model, images[:4]))
    assert len(capturer.graphs) == len(sizes)


def test_a_compiled_step_trains_as_eager_does(
    build: Build, images: Tensor, labels: Tensor, compiles: list[tuple[str, int]]
) -> None:
    model = build("v2apt").train()
    plain = copy.deepcopy(model)
    optimizer = sgd(plain)
    step = GraphedTrainStep(model, sgd(model), compiled=True, capturer=RecordingCapturer())
    for run in (step, lambda x, y: plain_step(plain, optimizer, x, y)):
        torch.manual_seed(5)
        for i in range(WARM_UPS + 3):
            run(images[i : i + 4], labels[i : i + 4])
    for found, wanted in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert compiles == [("max-autotune-no-cudagraphs", 4)] * (WARM_UPS + 1)
    assert step.captures == 1


def test_an_engine_runs_it(
    build: Build, images: Tensor, compiles: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graph, "CudaCapturer", lambda device: RecordingCapturer())
    name = "compiled_cuda_graph"
    assert BACKENDS[name].obstacle(build("vpt-deep")).startswith("CUDA graphs need a CUDA or ROCm device")
    monkeypatch.setitem(BACKENDS, name, BACKENDS[name]._replace(obstacle=lambda model: ""))
    model = build("vapt")
    engine = fp.Engine(model, (4,), torch.float64, name)
    close(engine(images[:3]), eager(model, images[:3]))
    assert {batch for _, batch in compiles} == {4}


@pytest.mark.parametrize("method", ["vpt-deep", "v2apt"])
def test_the_compiler_takes_the_whole_forward(build: Build, images: Tensor, method: str) -> None:
    model = build(method)
    samples = [{}] if model.generator is None else model.generator.inference_draws()
    prefixes = model.kept_prefixes()
    torch._dynamo.reset()
    predict = torch.compile(model.predict, fullgraph=True, dynamic=False, backend="aot_eager")
    with torch.no_grad():
        close(predict(images[:2], samples, prefixes)[0], eager(model, images[:2]))
