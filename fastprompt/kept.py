"""Cache values computed from tensors, and detect when the tensors have changed. No other module decides this.

PyTorch reveals most changes. A replaced tensor is another object; `p.data = x` gives it other memory; an in-place write
raises its version. It does not reveal a write through `.data`, as in code that swaps averaged weights
(`p.data.copy_(average)`), nor writes to tensors created in inference mode. So tensors that are small compared to the
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
from torch.utils._pytree import tree_leaves

from fastprompt.streams import Written

SAMPLES = 16
"""Number of values of each tensor that `SeenObjects` compares; it compares all values of up to `SAMPLES`² values."""

T = TypeVar("T")
Facts = tuple[Any, ...]
"""What else a value depends on, compared with `==`: readout, autocast, modules by weak reference."""


class Seen(Protocol):
    """A record of tensors and facts at one point in time."""

    facts: Facts

    def same(self, tensors: Sequence[Tensor], facts: Facts = ()) -> bool:
        """Whether tensors and facts are the same as then; False if that cannot be determined."""


class SeenValues:
    """Tensors compared by value with kept copies, so any kind of write is detected.

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
        dtypes = {tensor.dtype for tensor in tensors}  # few launches and one wait per dtype
        return all(torch.equal(_flat(tensors, dtype), _flat(self.copies, dtype)) for dtype in dtypes)


class SeenObjects:
    """Tensors compared by identity, memory and version, all held weakly, and by samples of their values.

    The samples lie along the diagonal of each tensor. They detect a write through `.data` to a whole tensor, or to a
    contiguous sixteenth of its rows or columns. A smaller write goes undetected, and so does any such write on a GPU,
    unless the host may wait for it. Tensors created in inference mode have no version, so they never count as the same.

    Args:
        contents: False: compare only the addresses, as for a CUDA graph, which reads the current contents.
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
        """Return the samples now. This reads the tensors' memory, so compare their addresses first."""
        values = b"".join(view.cpu().numpy().tobytes() for view in _joined(self._views))
        return values + (np.concatenate(self._arrays).tobytes() if self._arrays else b"")


class Kept(Generic[T]):
    """One value computed from tensors, and again after they change. A copy or a pickle of it is empty.

    Threads may share it, each on a stream of its own: a stream that gets the value waits for the one that computed it.
    """

    def __init__(self) -> None:
        self._held: tuple[Seen, T, Written | None] | None = None  # assigned as one tuple, as threads may share it

    @property
    def value(self) -> T | None:
        """The last value, whatever has changed since."""
        return None if self._held is None else self._held[1]

    def current(self, tensors: Sequence[Tensor], facts: Facts = ()) -> T | None:
        """Return the last value if it is still valid."""
        held = self._held
        return _read(held) if held is not None and held[0].same(tensors, facts) else None

    def get(
        self,
        seen: Callable[[Sequence[Tensor], Facts], Seen],
        tensors: Sequence[Tensor],
        facts: Facts,
        make: Callable[[], T],
    ) -> T:
        """Return the kept value for these tensors and facts, or a new one from `make`.

        `make` runs without gradients and outside inference mode, so that its result can be used in every mode.
        """
        held = self._held
        if held is None or not held[0].same(tensors, facts):
            with torch.inference_mode(False), torch.no_grad():
                value = seen(tensors, facts), make()
                held = self._held = (*value, Written(tensors[0].device) if tensors else None)
        return _read(held)

    def clear(self) -> None:
        self._held = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept[T]:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept[T]], tuple[()]]:
        return Kept, ()


def _read(held: tuple[Seen, T, Written | None]) -> T:
    """Return the value, once the current stream may read it."""
    _, value, written = held
    if written is not None:
        written.read(lambda: _tensors_in(value))
    return value


def _tensors_in(value: Any) -> list[Tensor]:
    """Return the tensors of a value that was kept: tensors and modules in tuples, lists and dictionaries."""
    leaves = tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    return tensors + tensors_of(*(leaf for leaf in leaves if isinstance(leaf, nn.Module)))


def tensors_of(*modules: nn.Module | None) -> list[Tensor]:
    """Return all parameters and buffers in a fixed order; shared ones appear once per use."""
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
    """Return the PyTorch switches that affect the precision of products."""
    on = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return (on and torch.get_autocast_dtype(device.type), torch.get_float32_matmul_precision())


def can_compare() -> bool:
    """Whether values can be read: not in a compiler, a transform of `torch.func`, or a graph capture."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


def _places(tensors: Sequence[Tensor]) -> list[Any]:
    """Describe each tensor's memory. An address alone does not identify memory, which may be freed and reused."""
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
    """Return a view (values,) along the tensor's diagonal, as integers; None if no values can be read."""
    if not tensor.numel() or type(tensor.data) is not Tensor or tensor.layout != torch.strided or tensor.is_complex():
        return None
    values = tensor.detach()
    sides = list(zip(values.shape, values.stride(), strict=True))
    step = sum(size // SAMPLES * stride for size, stride in sides if size >= SAMPLES)
    if values.numel() > SAMPLES**2 and step:
        values = values.as_strided((SAMPLES,), (step,))
    values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))  # in memory order
    values = values.reshape(-1) if values.is_contiguous() else values[(0,) * (values.ndim - 1)]
    return values.view(_INTEGERS[values.element_size()])


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Concatenate all values of the tensors with this dtype, in order."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor.dtype == dtype])


def _joined(views: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate the views, one tensor per integer size, so that a GPU needs few launches."""
    return [_flat(views, dtype) for dtype in _INTEGERS.values() if any(view.dtype == dtype for view in views)]
