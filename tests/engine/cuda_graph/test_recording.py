"""What the other tests of graphs rely on: the recording double keeps the rules of a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recorded_graphs import (
    RecordingCapturer,
)
from torch import Tensor


def test_a_capture_runs_nothing() -> None:
    x, y, capturer = torch.ones(3), torch.zeros(3), RecordingCapturer()
    graph = capturer.capture(lambda: y.copy_(x * 2), capturer.pool())
    assert y.eq(0).all()
    graph.replay()
    assert y.eq(2).all()


def test_a_replay_reads_memory_and_not_names() -> None:
    x, y, capturer = torch.ones(3), torch.zeros(3), RecordingCapturer()
    holder = {"x": x}
    graph = capturer.capture(lambda: y.copy_(holder["x"] * 2), capturer.pool())
    holder["x"] = torch.full((3,), 50.0)
    x.fill_(4)
    graph.replay()
    assert y.eq(8).all()


def test_what_a_capture_made_is_garbage_until_a_replay() -> None:
    x, capturer, made = torch.ones(3), RecordingCapturer(), []
    graph = capturer.capture(lambda: made.append(x * 2), capturer.pool())
    assert made[0].isnan().all()
    graph.replay()
    assert made[0].eq(2).all()


def test_a_replay_leaves_versions_alone() -> None:
    x, capturer = torch.ones(3), RecordingCapturer()
    graph = capturer.capture(lambda: x.add_(1), capturer.pool())
    before = x._version
    graph.replay()
    assert x.eq(2).all()
    assert x._version == before


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum().item(),
        lambda x: torch.tensor([1.0]) + x,
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: torch.equal(x, x),
    ],
)
def test_the_host_is_not_read(function: Callable[[Tensor], Any]) -> None:
    capturer, x = RecordingCapturer(), torch.ones(3)
    with pytest.raises(RuntimeError, match="not permitted while a stream is capturing"):
        capturer.capture(lambda: function(x), capturer.pool())
