"""Graphs under several threads, each a stream of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
from recorded_graphs import (
    eager,
    graphed_of,
    run_threads,
)
from torch import Tensor

import fastprompt as fp

Build = Callable[..., fp.PromptedViT]


def test_results_are_right_while_threads_and_adapters_mix(build: Build, images: Tensor) -> None:
    models = [build("vpt-deep", seed=seed) for seed in (1, 2)]
    expected = [eager(model, images) for model in models]
    graphed, _ = graphed_of(build("vpt-deep", seed=1), pause=lambda: time.sleep(0))
    graphed.prepare(images)
    wrong: list[str] = []

    def hammer(me: int) -> None:
        for turn in range(24):
            if wrong:
                return
            if me == 0:
                graphed.load_adapter(models[turn % 2])
            start, count = (me + turn) % 6, (me * turn) % 6
            found = graphed(images[start : start + count])
            if not any(torch.allclose(found, e[start : start + count], rtol=1e-9, atol=1e-9) for e in expected):
                wrong.append(f"thread {me}, turn {turn}, images {start} to {start + count}")

    run_threads(hammer, 8)
    assert not wrong


def test_a_call_waits_for_the_one_before_on_another_stream(build: Build, images: Tensor) -> None:
    graphed, capturer = graphed_of(build("vpt-deep"))
    graphed(images[:1])
    graphed(images[:1])
    assert not capturer.followed
    run_threads(lambda _: graphed(images[:1]), 1)
    ((after, before),) = capturer.followed
    assert before == threading.get_ident() != after


def test_a_borrowed_output_is_safe_from_other_threads(build: Build, images: Tensor) -> None:
    graphed, _ = graphed_of(build("vpt-deep"))
    borrowed = graphed(images[:2], borrow=True)
    kept = borrowed.clone()
    caught: list[Exception] = []

    def other(_: int) -> None:
        try:
            graphed(images[2:4])
        except RuntimeError as error:
            caught.append(error)

    run_threads(other, 1)
    assert "another thread holds the output that it borrowed" in str(caught[0])
    assert torch.equal(borrowed, kept)
    graphed(images[:2])
    run_threads(other, 1)
    assert len(caught) == 1
