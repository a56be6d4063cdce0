"""Order between streams of a device: what a thread writes on one, others read on theirs only after it.

A lock orders threads on the host. What they launch may still run in another order on the device, if their streams
differ, so whoever hands a tensor over also hands over a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor


class Streams(Protocol):
    """The streams of one kind of device."""

    def current(self, device: torch.device) -> Hashable:
        """Return the current stream of this thread; None: what is launched now is only recorded (a graph capture)."""

    def mark(self, stream: Any) -> Any:
        """Mark the current point of a stream."""

    def follow(self, stream: Any, mark: Any, tensors: Iterable[Tensor]) -> None:
        """Make a stream wait for a mark, and keep the memory of `tensors` until it has done what it does now."""


class _Cuda:
    """CUDA's, and ROCm's."""

    def current(self, device: torch.device) -> Hashable:
        return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device)

    def mark(self, stream: Any) -> Any:
        return stream.record_event()

    def follow(self, stream: Any, mark: Any, tensors: Iterable[Tensor]) -> None:
        stream.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(stream)


STREAMS: dict[str, Streams] = {"cuda": _Cuda()}
"""By type of device; others run what they are given in the order of the host."""


class Written:
    """What the current stream has written so far on a device, for other streams to read."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._streams = device, STREAMS.get(device.type)
        stream = None if self._streams is None else self._streams.current(device)
        self._known = {stream}
        self._mark = None if self._streams is None or stream is None else self._streams.mark(stream)

    def read(self, tensors: Callable[[], Iterable[Tensor]] = lambda: ()) -> None:
        """Let the current stream read it from now on. tensors: those that are read, whose memory may be freed soon."""
        if self._streams is None or self._mark is None:
            return
        stream = self._streams.current(self._device)
        if stream is not None and stream not in self._known:
            self._known.add(stream)
            self._streams.follow(stream, self._mark, tensors())
