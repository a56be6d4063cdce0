"""Tile sizes of the Triton kernels: a table per kernel, no tuning at run time."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import NamedTuple

import torch

NOTHING: Mapping[str, int] = MappingProxyType({})

_forced: ContextVar[str | None] = ContextVar("fastprompt_family", default=None)


class Tiles(NamedTuple):
    """One row of a kernel's table: what to launch with on parts of `families`, up to the sizes in `limits`.

    sizes: constexpr parameters of the kernel. families: prefixes of `family`, empty for every part.
    limits: the largest value of each size that the row is for.
    """

    sizes: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2
    families: tuple[str, ...] = ()
    limits: Mapping[str, int] = NOTHING

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**self.sizes, "num_warps": self.num_warps, "num_stages": self.num_stages}


def pick(table: tuple[Tiles, ...], device: torch.device, **sizes: int) -> Tiles:
    """The first row of `table` for the part that `device` is and for `sizes`; the last row must fit everything."""
    part = family(device)
    for row in table:
        if (not row.families or part.startswith(row.families)) and all(
            sizes[name] <= limit for name, limit in row.limits.items()
        ):
            return row
    raise LookupError(f"no row of the table is for {part} and {sizes}")


def family(device: torch.device) -> str:
    """The compiler's name of the part: "sm_80", "sm_90", "gfx942", ...; off the GPU that of `as_family`, or "sm_80"."""
    forced = _forced.get()
    if forced is not None:
        return forced
    return _family(device) if device.type == "cuda" else "sm_80"


@functools.cache
def _family(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@contextmanager
def as_family(name: str) -> Iterator[None]:
    """Within this context, pick tiles as the named part would."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
