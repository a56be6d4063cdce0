"""Values made of tensors once and kept, and whether the tensors have changed since: the one place that answers.

PyTorch tells of most changes. A tensor that was replaced is another object; `p.data = x` gives it other memory; a write
in place raises its version. It does not tell of a write through `.data`, as code that swaps averaged weights makes it
(`p.data.copy_(average)`), nor of writes to tensors made in inference mode. So tensors that are small beside the
backbone are compared by value (`SeenValues`), which misses nothing. A frozen backbone is too large for that
(`SeenObjects`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SAMPLES = 16
"""Values of each tensor that `SeenObjects` compares; of a tensor of at most `SAMPLES`² all."""

T = TypeVar("T")
Facts = tuple[Any, ...]
"""What else a value depends on, compared by `==`: readout, autocast, modules by weak reference."""


class Seen(Protocol):
    """What tensors and facts were when they were seen."""

    facts: Facts

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        """Whether tensors and facts are what they were; False where nobody can tell."""


class SeenValues:
    """Tensors by their values, of which copies are kept: exact however they were written.

    Comparing tensors on a GPU makes the host wait for it.
    """

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
        dtypes = {tensor.dtype for tensor in tensors}  # few launches and one wait for each
        return all(torch.equal(_flat(tensors, dtype), _flat(self.copies, dtype)) for dtype in dtypes)


class SeenObjects:
    """Tensors by identity, memory and version, all held weakly, and by samples of their values.

    The samples, along the diagonal of each tensor, notice a write through `.data` to a whole tensor, or to a sixteenth
    of its rows or columns that lie together. One that changes less goes unnoticed, and so does every such write on a
    GPU, unless the host may wait for it. Tensors made in inference mode have no version: they are never the same.

    Args:
        contents: False: only where the tensors lie counts, as for a CUDA graph, which reads what is there.
        waits: compare samples on a GPU too.
    """

    def __init__(
        self, tensors: Sequence[Tensor], facts: Facts = (), contents: bool = True, waits: bool = False
    ) -> None:
        self.facts, self._contents = facts, contents
        self._objects = [weakref.ref(tensor) for tensor in tensors] if contents else []
        self._memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
        self._places = _places(tensors)
        self._versions = _versions(tensors) if contents else []
        views = [_sample(tensor) for tensor in tensors if contents and (waits or tensor.device.type == "cpu")]
        self._views = [view for view in views if view is not None and view.device.type != "cpu"]
        self._arrays = [np.from_dlpack(view) for view in views if view is not None and view.device.type == "cpu"]
        self._values = self._look()

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        if facts != self.facts or len(tensors) != len(self._memory):
            return False
        if self._contents and (
            None in self._versions
            or not all(map(is_, [seen() for seen in self._objects], tensors))
            or self._versions != _versions(tensors)
        ):
            return False
        memory = [seen.cdata for seen in self._memory]
        if memory != [tensor.untyped_storage()._cdata for tensor in tensors] or self._places != _places(tensors):
            return False
        return self._values == self._look()

    def _look(self) -> bytes:
        """The samples now; read where the tensors lie, so behind the comparison of their places."""
        values = b"".join(view.cpu().numpy().tobytes() for view in _joined(self._views))
        return values + (np.concatenate(self._arrays).tobytes() if self._arrays else b"")


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
    tensors: list[Tensor | None] = []
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module is not None:
            tensors += module._parameters.values()
            tensors += module._buffers.values()
            waiting += module._modules.values()
    return [tensor for tensor in tensors if tensor is not None]


def arithmetic(device: torch.device) -> Facts:
    """The switches of PyTorch that change in which precision a product is computed."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return (on and torch.get_autocast_dtype(device.type), torch.get_float32_matmul_precision())


def can_compare() -> bool:
    """Whether values can be looked at: not in a compiler or a transform of `torch.func`, nor in a capture."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _places(tensors: Sequence[Tensor]) -> list[Any]:
    """Where each tensor's values lie. An address alone names no memory, which may have been freed and used again."""
    return [
        list(map(Tensor.data_ptr, tensors)),
        [tensor.dtype for tensor in tensors],
        list(map(Tensor.size, tensors)),
        list(map(Tensor.stride, tensors)),
    ]


def _versions(tensors: Sequence[Tensor]) -> list[int | None]:
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sample(tensor: Tensor) -> Tensor | None:
    """(values,): a view of values along the tensor's diagonal, as integers; None: it has none that can be read."""
    if not tensor.numel() or type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_complex():
        return None
    values = tensor.detach()
    sides = list(zip(values.shape, values.stride(), strict=True))
    step = sum(size // SAMPLES * stride for size, stride in sides if size >= SAMPLES)
    if values.numel() > SAMPLES**2 and step:
        values = values.as_strided((SAMPLES,), (step,))
    values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))  # as they lie in memory
    values = values.reshape(-1) if values.is_contiguous() else values[(0,) * (values.ndim - 1)]
    return values.view(_INTEGERS[values.element_size()])


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """All values of the tensors of this dtype, in order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor.dtype == dtype])


def _joined(views: Sequence[Tensor]) -> list[Tensor]:
    """The views as one for each size of number: few launches on a GPU."""
    return [_flat(views, dtype) for dtype in _INTEGERS.values() if any(view.dtype == dtype for view in views)]
