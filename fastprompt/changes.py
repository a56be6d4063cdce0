"""Consistent states of a module: prevent copying its tensors while another thread is writing them."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_POLL = 0.05
"""Seconds between a waiting thread's checks for optimizer steps that ended with an exception."""


class _Access:
    """One thread's access (writing or copying) to tensors and modules, identified by their ids."""

    def __init__(self, ids: frozenset[int], frame: FrameType | None = None) -> None:
        self.ids, self.frame = ids, frame
        self.thread, self.since = threading.get_ident(), time.monotonic()

    def is_over(self) -> bool:
        """Whether the optimizer step has ended; a step that raises ends without calling its hook."""
        if self.frame is None:
            return False
        running = sys._current_frames().get(self.thread)
        while running is not None and running is not self.frame:
            running = running.f_back
        return running is None


_changed = threading.Condition()
_writing: list[_Access] = []
_copying: list[_Access] = []


@contextlib.contextmanager
def changing(module: nn.Module, parts: Sequence[nn.Module]) -> Iterator[None]:
    """Context for writing tensors of `parts`, or replacing parts of `module`, as one change.

    `unchanging` waits until the change has ended, and this waits while another thread is in `unchanging`. Contexts may
    be nested.
    """
    access = _Access(_ids(module, parts))
    _begin_writing(access)
    try:
        yield
    finally:
        _end(_writing, access)


@contextlib.contextmanager
def unchanging(module: nn.Module, parts: Sequence[nn.Module], patience: float | None = None) -> Iterator[bool]:
    """Keep other threads from changing `module` and `parts`, so that a copy made here is consistent.

    Args:
        patience: maximum time in seconds to wait for another thread's change, counted from its start; None waits
            without limit.

    Yields:
        Whether nobody is writing: False if a change takes longer, or is this thread's own.
    """
    access = _Access(_ids(module, parts))
    with _changed:
        _copying.append(access)  # now, so that nobody starts another change meanwhile
    try:
        yield _wait_for_writers(access, patience)
    finally:
        _end(_copying, access)


def _ids(module: nn.Module, parts: Sequence[nn.Module]) -> frozenset[int]:
    """Return the ids of all tensors that may be written in place and of all modules with replaceable parts."""
    inside = (found for part in parts for found in (part.modules(), part.parameters(), part.buffers()))
    return frozenset([id(module), *(id(thing) for found in inside for thing in found)])


def _wait_for_writers(access: _Access, patience: float | None) -> bool:
    with _changed:
        while writers := _meeting(_writing, access):
            if any(writer.thread == access.thread for writer in writers):
                return False
            age = time.monotonic() - min(writer.since for writer in writers)
            if patience is not None and age >= patience:
                return False
            _changed.wait(_POLL)
    return True


def _begin_writing(access: _Access) -> None:
    with _changed:
        while not any(writer.thread == access.thread for writer in _meeting(_writing, access)):
            if all(copier.thread == access.thread for copier in _meeting(_copying, access)):
                break
            _changed.wait(_POLL)
        _writing.append(access)


def _meeting(accesses: list[_Access], own: _Access) -> list[_Access]:
    """Return the accesses that share tensors with `own`; drop steps that ended without their hook."""
    accesses[:] = [access for access in accesses if not access.is_over()]
    return [access for access in accesses if access.ids & own.ids]


def _end(accesses: list[_Access], access: _Access) -> None:
    with _changed:
        if access in accesses:
            accesses.remove(access)
        _changed.notify_all()


def _step_begins(optimizer: Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    ids = frozenset(id(parameter) for group in optimizer.param_groups for parameter in group["params"])
    _begin_writing(_Access(ids, sys._getframe(1)))


def _step_ended(*_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    with _changed:
        _writing[:] = [access for access in _writing if access.frame is not frame]
        _changed.notify_all()


_hooked = False


def watch_optimizers() -> None:
    """Register the steps of torch's optimizers as changes. Call this before a model is first copied."""
    global _hooked
    with _changed:
        if not _hooked:
            register_optimizer_step_pre_hook(_step_begins)
            register_optimizer_step_post_hook(_step_ended)
            _hooked = True
