"""Who may write a module's tensors, and who may copy them, at the same time."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from fastprompt import changes
from fastprompt.changes import changing, unchanging, watch_optimizers


def is_whole(module: nn.Module, patience: float | None = 0.0) -> bool:
    """What another thread is told that wants to copy the module."""

    def ask() -> bool:
        with unchanging(module, [module], patience) as whole:
            return whole

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result(60)


def test_a_change_is_waited_for_and_nobody_else_s() -> None:
    model, other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2)
    with changing(model, [model]):
        assert not is_whole(model)
        assert not is_whole(model[1])
        assert is_whole(other)
        with changing(model[0], [model[0]]):  # nested
            assert not is_whole(model)
        assert not is_whole(model[1])
        with unchanging(model, [model]) as whole:
            assert not whole, "the thread that writes is told so, and does not wait for itself"
    assert is_whole(model)
    with changing(model[1], [model[1]]):
        assert not is_whole(model)
        assert is_whole(model[0])


def test_patience_counts_from_the_begin_of_the_change() -> None:
    model = nn.Linear(2, 2)
    with changing(model, [model]):
        began = time.monotonic()
        assert not is_whole(model, 0.2)
        assert time.monotonic() - began >= 0.2
        began = time.monotonic()
        assert not is_whole(model, 0.2)  # no longer
        assert time.monotonic() - began < 0.15


def test_a_copy_holds_new_changes_back_and_waits_for_those_that_run() -> None:
    model, steps = nn.Linear(2, 2), []
    first, copying, done = threading.Event(), threading.Event(), threading.Event()

    def write(name: str, begun: threading.Event, until: threading.Event) -> None:
        with changing(model, [model]):
            begun.set()
            assert until.wait(60)
            steps.append(name)

    def copy() -> None:
        with unchanging(model, [model]) as whole:
            assert whole
            assert done.wait(60)
            steps.append("copied")

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(write, "first", first, copying)]
        assert first.wait(60)
        running.append(pool.submit(copy))
        while not changes._copying:  # until it waits
            time.sleep(0.001)
        second = threading.Event()
        running.append(pool.submit(write, "second", second, done))
        assert not second.wait(0.1), "the copy came first"
        copying.set()
        assert not second.wait(0.1), "and is not finished"
        done.set()
        for future in running:
            future.result(60)
    assert steps == ["first", "copied", "second"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_step_of_an_optimizer_is_a_change_until_it_ends(fails: bool) -> None:
    watch_optimizers()
    watch_optimizers()
    model, told = nn.Linear(2, 2), []

    class Asking(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            told.append(is_whole(model))
            if fails:
                raise ZeroDivisionError

    optimizer = Asking(model.parameters(), lr=1.0)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext() as caught:
        optimizer.step()
    assert told == [False]
    assert is_whole(model, None), caught  # which still holds the step's frame
    assert not changes._writing
