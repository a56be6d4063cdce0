"""`fp.Engine(backend="cuda_graph")`, by the double in place of a device."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from recorded_graphs import (
    RecordingCapturer,
    change,
    close,
    eager,
)
from torch import Tensor

import fastprompt as fp
from fastprompt.engine import cuda_graph, engine as engine_module
from fastprompt.engine.backends import BACKENDS

Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def failures() -> dict[int, Exception]:
    """What capture number i of each engine raises."""
    return {}


@pytest.fixture(autouse=True)
def capturers(failures: dict[int, Exception], monkeypatch: pytest.MonkeyPatch) -> list[RecordingCapturer]:
    """Those that engines have made, in order."""
    made: list[RecordingCapturer] = []

    def capturer(device: torch.device) -> RecordingCapturer:
        made.append(RecordingCapturer(failures))
        return made[-1]

    for name in ("compile", "openvino", "compiled_cuda_graph"):
        monkeypatch.delitem(BACKENDS, name)
    monkeypatch.setattr(cuda_graph, "CudaCapturer", capturer)
    monkeypatch.setitem(BACKENDS, "cuda_graph", BACKENDS["cuda_graph"]._replace(obstacle=lambda model: ""))
    return made


def test_replays_a_graph_of_each_size(
    build: Build, images: Tensor, method: str, capturers: list[RecordingCapturer]
) -> None:
    model = build(method)
    engine = fp.Engine(model, (2, 4), torch.float64, "cuda_graph")
    for count in (4, 1, 3, 7, 2):
        close(engine(images[:count]), eager(model, images[:count]))
    replays = [[graph.replays for graph in capturer.graphs] for capturer in capturers]
    assert replays == [[1 + 1 + 1 + 2], [1 + 2]]  # the first readies the graph; 7 images are two batches of 4


def test_sees_what_changes_without_a_new_capture(
    build: Build, images: Tensor, capturers: list[RecordingCapturer]
) -> None:
    model = build("vpt-deep")
    engine = fp.Engine(model, (2,), torch.float64, "cuda_graph")
    before = engine(images[:2])
    change(model)
    close(engine(images[:2]), eager(model, images[:2]))
    assert not torch.allclose(engine(images[:2]), before)
    assert [capturer.attempts for capturer in capturers] == [1]
    model.head = copy.deepcopy(model.head)
    change(model)
    close(engine(images[:2]), eager(model, images[:2]))


def test_auto_measures_it(build: Build, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = {"GraphedForward": 1.0, "PromptedViT": 2.0}
    monkeypatch.setattr(engine_module, "_seconds", lambda run, device: durations[type(run.func).__name__])
    engine = fp.Engine(build("pgn"), (2,), torch.float64)
    engine(images[:2])
    (measured,) = engine.measured.values()
    assert measured.chosen == "cuda_graph"
    assert measured.seconds == {"eager": 2.0, "cuda_graph": 1.0}
    assert "float64: cuda_graph (cuda_graph 1e+03 ms, eager 2e+03 ms)" in str(fp.explain(engine))


def test_what_cannot_be_captured_is_said_and_not_run(
    build: Build, images: Tensor, failures: dict[int, Exception]
) -> None:
    failures[0] = RuntimeError("operation not permitted")
    model = build("vpt-deep")
    engine = fp.Engine(model, (2,), torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(engine(images[:2]), eager(model, images[:2]))
        (measured,) = engine.measured.values()
        assert measured.chosen == "eager"
        assert measured.reasons["cuda_graph"].startswith("it failed: RuntimeError: the forward cannot be captured")
        with pytest.raises(RuntimeError, match=r"backend 'cuda_graph' failed: .*operation not permitted"):
            fp.Engine(model, (2,), torch.float64, "cuda_graph")(images[:2])


def test_a_released_engine_keeps_no_graph(build: Build, images: Tensor, capturers: list[RecordingCapturer]) -> None:
    engine = fp.Engine(build("vpt-deep"), (2,), torch.float64, "cuda_graph")
    engine(images[:2])
    (run,) = engine._runs.values()
    kept = weakref.ref(run)
    del run
    engine.release()
    gc.collect()
    assert kept() is None


def test_needs_a_device(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="backend 'cuda_graph' cannot run: CUDA graphs need a CUDA or"):
        fp.Engine(build("linear"), (1,), torch.float64, "cuda_graph")
