"""Watches kernels in Triton's interpreter: what is launched, which bytes it touches, what is allocated.

Every load and store is checked against the extents of the launch's tensors; one outside of them raises, where the
interpreter would go on with whatever lies there. Memory that the ops allocate is filled with NaN first. A product of
tiles is rounded once: in which order NumPy sums it in float32 depends on the processor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

OWNER = "fastprompt.kernels."


class OutOfBounds(Exception):
    """A kernel touched memory outside its tensors."""


@dataclass
class Region:
    """Memory of one or several overlapping tensors of a launch."""

    start: int
    end: int
    itemsize: int
    names: list[str]
    loaded: int = 0
    stored: int = 0
    touched: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @property
    def distinct(self) -> int:
        return int(self.touched.sum()) * self.itemsize


@dataclass
class Launch:
    """One launch: kernel, keyword arguments that are no tensors, grid, and the traffic of its memory."""

    kernel: str
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    regions: list[Region]

    @property
    def distinct(self) -> int:
        """Distinct bytes touched."""
        return sum(region.distinct for region in self.regions)

    @property
    def loaded(self) -> int:
        return sum(region.loaded for region in self.regions)


class Watch:
    """Context in which launches are recorded, bounds checked and allocations of the ops poisoned.

    Attributes:
        launches: in order. allocated: bytes of each tensor that the ops allocated, by address.
    """

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.allocated: dict[int, int] = {}
        self._kept: list[Tensor] = []  # an address may not be given out twice while it is being watched
        self._regions: list[Region] = []
        self._starts = np.zeros(0, dtype=np.uint64)

    def __enter__(self) -> Watch:
        self._stack = ExitStack()
        patch = self._stack.enter_context
        builder, function = interpreter.InterpreterBuilder, interpreter.InterpretedFunction
        load, store, run = builder.create_masked_load, builder.create_masked_store, function.run
        dot = builder.create_dot
        watch = self

        def watched_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            watch._touch(ptrs, mask, stored=False)
            return load(self, ptrs, mask, *rest)

        def watched_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            watch._touch(ptrs, mask, stored=True)
            return store(self, ptrs, value, mask, *rest)

        def rounded_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            if any(x.data.dtype.kind != "f" for x in (a, b, d)):
                return dot(self, a, b, d, *rest)
            summed = np.matmul(a.data, b.data, dtype=np.float64) + d.data
            return interpreter.TensorHandle(summed.astype(d.data.dtype), d.dtype.scalar)

        def watched_run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
            watch._begin(self, args, kwargs, grid)
            try:
                return run(self, *args, grid=grid, warmup=warmup, **kwargs)
            finally:
                watch._regions = []

        patch(mock.patch.object(builder, "create_masked_load", watched_load))
        patch(mock.patch.object(builder, "create_masked_store", watched_store))
        patch(mock.patch.object(function, "run", watched_run))
        patch(mock.patch.object(builder, "create_dot", rounded_dot))
        # the copy back of CPU tensors to themselves would touch all of a huge buffer
        patch(mock.patch.object(interpreter.GridExecutor, "_restore_args_dev", return_value=None))
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (torch, "zeros"),
            (torch, "zeros_like"),
            (Tensor, "new_zeros"),
        ):
            patch(mock.patch.object(owner, name, self._allocating(getattr(owner, name), "empty" in name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def _allocating(self, allocate: Callable[..., Tensor], poison: bool) -> Callable[..., Tensor]:
        def allocated(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            if type(tensor) is Tensor and sys._getframe(1).f_globals.get("__name__", "").startswith(OWNER):
                self._kept.append(tensor)
                self.allocated[tensor.data_ptr()] = tensor.nbytes
                if poison and tensor.is_floating_point():
                    tensor.fill_(float("nan"))
            return tensor

        return allocated

    def _begin(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        bound = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
        extents = []
        for name, value in bound.items():
            if isinstance(value, Tensor) and value.numel():
                last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
                start = value.data_ptr()
                extents.append((start, start + (last + 1) * value.element_size(), value.element_size(), name))
        regions: list[Region] = []
        for start, end, itemsize, name in sorted(extents):
            if regions and start < regions[-1].end:
                regions[-1].end = max(regions[-1].end, end)
                regions[-1].names.append(name)
            else:
                regions.append(Region(start, end, itemsize, [name]))
        for region in regions:
            region.touched = np.zeros((region.end - region.start) // region.itemsize, dtype=bool)
        self._regions = regions
        self._starts = np.array([region.start for region in regions], dtype=np.uint64)
        scalars = {name: value for name, value in bound.items() if not isinstance(value, Tensor)}
        grid = grid(scalars) if callable(grid) else grid
        self.launches.append(Launch(function.__name__, scalars, tuple(grid), regions))

    def _touch(self, ptrs: Any, mask: Any, stored: bool) -> None:
        addresses = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.uint64).ravel()
        if not addresses.size:
            return
        where = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        for i in np.unique(where):
            region = self._regions[i] if i >= 0 else None
            inside = addresses[where == i]
            if region is None or int(inside.max()) + region.itemsize > region.end:
                name = self.launches[-1].kernel
                raise OutOfBounds(
                    f"{name} {'stores' if stored else 'loads'} outside its tensors, "
                    f"{f'behind {region.names}' if region else 'before all of them'}"
                )
            region.touched[(inside - np.uint64(region.start)) // np.uint64(region.itemsize)] = True
            if stored:
                region.stored += inside.size * region.itemsize
            else:
                region.loaded += inside.size * region.itemsize
