"""A released manager keeps nothing, and raises."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
from recorded_graphs import (
    graphed_of,
)
from torch import Tensor

import fastprompt as fp

Build = Callable[..., fp.PromptedViT]


def test_frees_graphs_pool_and_buffers(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vpt-deep"))
    borrowed = graphed(images[:2], borrow=True)
    static = weakref.ref(borrowed.untyped_storage()._cdata and borrowed._base)
    assert static() is not None
    del borrowed
    graphed.release()
    gc.collect()
    assert static() is None
    assert capturer.synchronized == 1
    assert capturer.pools == [[]]
    assert not any(graph.calls for graph in capturer.graphs)
    graphed.release()


def test_a_released_manager_raises(build: Build, images: Tensor) -> None:
    model = build("v2apt-samples")
    graphed, _ = graphed_of(model, seed=1)
    graphed.release()
    for call in (
        lambda: graphed(images[:1]),
        lambda: graphed.prepare(images),
        lambda: graphed.load_adapter(model),
        graphed.refresh,
        lambda: graphed.manual_seed(1),
    ):
        with pytest.raises(RuntimeError, match="this GraphedForward was released; make a new one"):
            call()
