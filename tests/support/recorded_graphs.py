"""CUDA graphs on a CPU: a capturer that records operations and replays them on the same memory."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastprompt as fp
from fastprompt.engine.cuda_graph import GraphedForward

aten = torch.ops.aten
HOST = {
    aten._local_scalar_dense,
    aten.lift_fresh,
    aten.equal,
    aten.is_nonzero,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.repeat_interleave,
}  # read a tensor on the host, or copy one from there  # read a tensor on the host, or copy one from there


class Recording(TorchDispatchMode):
    """Runs operations, and keeps them with the tensors they read and wrote, as a graph keeps addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, Tensor] = {}  # storages that were there before, by address
        self.before: dict[int, torch.UntypedStorage] = {}  # what was in those of them that were written to
        self.inside: dict[int, torch.UntypedStorage] = {}
        self.written: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masks = func.overloadpacket is aten.index and any(t.dtype == torch.bool for t in tensors_of(args[1]))
        if (masks or func.overloadpacket in HOST) and not happens_on_cpus_alone():
            raise RuntimeError(f"{func} is not permitted while a stream is capturing")
        for tensor in tensors_of((args, kwargs)):
            if address(tensor) not in self.inside:
                self.outside.setdefault(address(tensor), tensor)
        for tensor in written_by(func, args, kwargs):
            if address(tensor) in self.outside:
                self.written.append(tensor)
                self.before.setdefault(address(tensor), tensor.untyped_storage().clone())
        outputs = func(*args, **kwargs)
        for tensor in tensors_of(outputs):
            if address(tensor) and address(tensor) not in self.outside:
                self.inside[address(tensor)] = tensor.untyped_storage()
        self.calls.append((func, args, kwargs, outputs))
        return outputs

    def undo(self) -> None:
        """A capture runs nothing: what was written gets its values back, what was made is garbage."""
        for place, values in self.before.items():
            self.outside[place].untyped_storage().copy_(values)
        for storage in self.inside.values():
            storage.fill_(255)


class RecordedGraph:
    def __init__(self, recording: Recording, pool: list[RecordedGraph], pause: Callable[[], None]) -> None:
        self.calls, self.written, self.pause = recording.calls, recording.written, pause
        self.pool, self.replays = pool, 0
        pool.append(self)

    def replay(self) -> None:
        assert self.calls, "this graph was reset"
        self.replays += 1
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.written)):
            for i, (func, args, kwargs, outputs) in enumerate(self.calls):
                if i == len(self.calls) // 2:
                    self.pause()
                for kept, fresh in zip(tensors_of(outputs), tensors_of(func(*args, **kwargs)), strict=True):
                    if kept.data_ptr() != fresh.data_ptr():
                        kept.copy_(fresh)

    def reset(self) -> None:
        self.calls, self.written = [], []
        self.pool.remove(self)


class RecordingCapturer:
    """A `Capturer` of a CPU. Each thread is a stream of its own.

    failures: what capture number i raises. pause: runs in the middle of each replay.
    """

    def __init__(self, failures: dict[int, Exception] | None = None, pause: Callable[[], None] = lambda: None) -> None:
        self.failures, self.pause = failures or {}, pause
        self.pools: list[list[RecordedGraph]] = []
        self.graphs: list[RecordedGraph] = []
        self.attempts = self.warm_ups = self.synchronized = 0
        self.followed: list[tuple[int, int]] = []  # stream, and the one it continues behind

    def pool(self) -> Any:
        self.pools.append([])
        return self.pools[-1]

    def warm_up(self, function: Callable[[], None]) -> None:
        self.warm_ups += 1
        function()

    def capture(self, function: Callable[[], None], pool: Any) -> RecordedGraph:
        self.attempts += 1
        recording, rng = Recording(), torch.get_rng_state()
        try:
            with recording:
                function()
            if self.attempts - 1 in self.failures:
                raise self.failures[self.attempts - 1]
        finally:
            torch.set_rng_state(rng)
            with torch.no_grad():
                recording.undo()
        self.graphs.append(RecordedGraph(recording, pool, self.pause))
        return self.graphs[-1]

    def mark(self) -> Any:
        return threading.get_ident()

    def follow(self, mark: Any) -> None:
        if mark != threading.get_ident():
            self.followed.append((threading.get_ident(), mark))

    def synchronize(self) -> None:
        self.synchronized += 1


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def tensors_of(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operation changes; batch norm's statistics are not marked in its schema."""
    if func.overloadpacket is aten.native_batch_norm:
        return tensors_of(args[3:5])
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return tensors_of(
        [
            given.get(argument.name)
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )


def happens_on_cpus_alone() -> bool:
    """`check_images` looks for NaN, and AdamW makes the number 1, only for tensors on a CPU, as they are here."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_name not in ("check_images", "_multi_tensor_adam"):
        frame = frame.f_back
    return frame is not None


def graphed_of(
    model: fp.PromptedViT, batch_sizes: tuple[int, ...] = (1, 2, 4), **options: Any
) -> tuple[GraphedForward, RecordingCapturer]:
    capturer = RecordingCapturer(**{k: options.pop(k) for k in ("failures", "pause") if k in options})
    return GraphedForward(model, batch_sizes, capturer=capturer, **options), capturer


def eager(model: fp.PromptedViT, images: Tensor, draws: dict[str, Tensor] | None = None) -> Tensor:
    """The model's own output, without anything it kept, by the operators that the recording double sees."""
    model.eval()
    with torch.no_grad(), fp.use_backend("reference" if images.device.type == "cpu" else "auto"):
        return model(images, draws=draws)


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def change(model: fp.PromptedViT, seed: int = 7) -> None:
    """Every parameter of generator and head, in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.trainable_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))


def run_threads(function: Callable[[int], Any], count: int) -> None:
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            function(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def sgd(model: fp.PromptedViT, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for _, p in model.trainable_parameters()], **{"lr": 0.125, **options})


def plain_step(model: fp.PromptedViT, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    """The step as anybody writes it."""
    optimizer.zero_grad()
    logits, aux = model(images, return_aux=True)
    loss = F.cross_entropy(logits, labels)
    if "kl" in aux:
        loss = loss + model.config.beta * aux["kl"].mean()
    loss.backward()
    optimizer.step()
    return loss.detach()
