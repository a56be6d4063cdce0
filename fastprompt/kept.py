"""Values made of tensors once and kept, and whether the tensors have changed since: the one place that answers.

PyTorch tells of most changes. A tensor that was replaced is another object; `p.data = x` gives it other memory; a write
in place raises its version. It does not tell of a write through `.data`, as code that swaps averaged weights makes it
(`p.data.copy_(average)`), nor of writes to tensors made in inference mode. So tensors that are small beside the
backbone are compared by value (`SeenValues`), which misses nothing. A frozen backbone is too large for that
(`SeenObjects`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

ROW = 16
"""Values of each tensor that `SeenObjects` compares on a CPU."""

T = TypeVar("T")
Facts = tuple[Any, ...]
"""What else a value depends on, compared by `==`: readout, autocast, modules by weak reference."""


class Seen(Protocol):
    """What tensors and facts were when they were seen."""

    facts: Facts

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        """Whether tensors and facts are what they were; False where nobody can tell."""


class SeenValues:
    """Tensors by their values, of which copies are kept: exact however they were written."""

    def __init__(self, tensors: Sequence[Tensor], facts: Facts = ()) -> None:
        self.facts = facts
        self.copies = [tensor.detach().clone() for tensor in tensors]

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        if facts != self.facts or len(tensors) != len(self.copies):
            return False
        pairs = list(zip(tensors, self.copies, strict=True))
        if any((a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) for a, b in pairs):
            return False
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return all(torch.equal(a, b) for a, b in pairs)
        return not torch.stack([(a != b).any() for a, b in pairs]).any().item()  # one wait for the device


class SeenObjects:
    """Tensors by identity, memory and version, all held weakly, and on a CPU by the first values of each.

    The values notice a write through `.data` that changes a tensor as a whole. One that leaves the first row alone goes
    unnoticed, as does every such write on a GPU, where looking would make the host wait in each forward.

    Args:
        contents: False: only where the tensors lie counts, as for a CUDA graph, which reads what is there.
    """

    def __init__(self, tensors: Sequence[Tensor], facts: Facts = (), contents: bool = True) -> None:
        self.facts, self._contents = facts, contents
        self._objects = [weakref.ref(tensor) for tensor in tensors] if contents else []
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._layouts = [_layout(tensor) for tensor in tensors]
        self._versions = _versions(tensors) if contents else []
        self._rows = [row for tensor in tensors if contents and (row := _first_bytes(tensor)) is not None]
        self._first = _joined(self._rows)

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        return (
            facts == self.facts
            and len(tensors) == len(self._memory)
            and all(seen() is tensor for seen, tensor in zip(self._objects, tensors, strict=False))
            and all(
                seen.cdata == tensor.untyped_storage()._cdata
                for seen, tensor in zip(self._memory, tensors, strict=True)
            )
            and self._layouts == [_layout(tensor) for tensor in tensors]
            and (not self._contents or (self._versions == _versions(tensors) and self._first == _joined(self._rows)))
        )


class Kept(Generic[T]):
    """One value made of tensors, made again where they have changed. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self._held: tuple[Seen, T] | None = None  # replaced as one: threads may share it

    @property
    def value(self) -> T | None:
        """What was made last, whatever has changed since."""
        return None if self._held is None else self._held[1]

    def current(self, tensors: Sequence[Tensor], facts: Facts = ()) -> T | None:
        """What was made last, if it still holds."""
        held = self._held
        return held[1] if held is not None and held[0].same(tensors, facts) else None

    def get(
        self,
        seen: Callable[[Sequence[Tensor], Facts], Seen],
        tensors: Sequence[Tensor],
        facts: Facts,
        make: Callable[[], T],
    ) -> T:
        """What `make` returns, or returned for the same tensors and facts.

        It is made without gradients and outside inference mode, so that it can be used in every mode.
        """
        held = self._held
        if held is None or not held[0].same(tensors, facts):
            with torch.inference_mode(False), torch.no_grad():
                held = self._held = (seen(tensors, facts), make())
        return held[1]

    def clear(self) -> None:
        self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """All parameters and buffers in a fixed order, shared ones as often as they occur."""
    return [tensor for module in modules if module is not None for tensor in _walk(module)]


def _walk(module: nn.Module) -> Iterator[Tensor]:
    waiting = [module]
    while waiting:
        module = waiting.pop()
        for slots in (module._parameters, module._buffers):
            for tensor in slots.values():
                if tensor is not None:
                    yield tensor
        waiting += [child for child in module._modules.values() if child is not None]


def autocast_facts(device: torch.device) -> Facts:
    """What of the autocast that is on changes a result."""
    on = torch.is_autocast_enabled(device.type)
    return (on, torch.get_autocast_dtype(device.type) if on else None)


def can_compare() -> bool:
    """Whether values can be looked at: not in a compiler or a transform of `torch.func`, nor in a capture."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _first_bytes(tensor: Tensor) -> np.ndarray | None:
    """A view of a tensor's first values, on its own memory; None: it is on no CPU, or has none that lie together."""
    if tensor.device.type != "cpu" or not tensor.numel() or type(tensor.data) is not Tensor:
        return None
    row = tensor.detach()[(0,) * (tensor.ndim - 1)][:ROW] if tensor.ndim else tensor.detach()[None]
    return row.view(torch.uint8).numpy() if row.stride(0) == 1 or len(row) == 1 else None


def _joined(rows: list[np.ndarray]) -> bytes:
    return np.concatenate(rows).tobytes() if rows else b""
