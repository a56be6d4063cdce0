"""Several processes that train one model: who they are, what they sum up, and batch norm over all of them.

Accelerate starts the process group as torchrun says, on NCCL or gloo. The trained tensors are few, so their gradients
travel with a step's sums in one buffer and one all-reduce; DistributedDataParallel, which overlaps many buckets with
the backward pass, would need several.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastprompt.arguments import ArgumentError
from fastprompt.extras import needed

T = TypeVar("T")


class RankLost(RuntimeError):
    """Another process of the job has ended, so this one cannot go on."""


class Ranks:
    """The processes of a job, as one of them sees them.

    Attributes:
        rank: number of this process, from 0. size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, batch: Sequence[T]) -> list[T]:
        """Return this process's part of a batch: contiguous, of equal size up to one."""
        start, end = (len(batch) * (self.rank + more) // self.size for more in (0, 1))
        return list(batch[start:end])

    def seed(self, seed: int, step: int) -> None:
        """Seed all generators for one step, differently in each process; with one process this does nothing.

        States need not be saved then: every process computes its own again.
        """
        if self.size > 1:
            own = ((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**63
            torch.manual_seed(own)
            np.random.seed(own % 2**32)
            random.seed(own)

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes; with one process, the tensor itself."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        with self.lost_ranks_named():
            dist.all_reduce(total)
        return total

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, which may have different numbers of them, on the CPU."""
        if self.size == 1:
            return tensor.cpu()
        found: list[Any] = [None] * self.size
        with self.lost_ranks_named():
            dist.all_gather_object(found, tensor.cpu())
        return torch.cat(found)

    def of_main(self, compute: Callable[[], T]) -> T:
        """Compute something in the first process and return it in all of them; what it raises, all raise."""
        if self.size == 1:
            return compute()
        told: list[Any] = [None]
        if self.main:
            try:
                told = [(compute(), None)]
            except Exception as error:
                told = [(None, error)]
        with self.lost_ranks_named():
            dist.broadcast_object_list(told)
        value, failure = told[0]
        if failure is not None:
            raise failure
        return value

    @contextlib.contextmanager
    def lost_ranks_named(self) -> Iterator[None]:
        """Context of a communication; raises `RankLost` in place of the backend's error."""
        try:
            yield
        except RuntimeError as error:  # dist.DistBackendError, and gloo's closed connections
            raise RankLost(
                f"process {self.rank} of {self.size} lost another one, so training cannot go on; run the same command "
                f"again to resume ({str(error).splitlines()[0]})"
            ) from error


def find_ranks(device: torch.device) -> Ranks:
    """Return the processes of this job, after starting their group if `WORLD_SIZE` says that there are several.

    Raises:
        ImportError: Accelerate is missing; it comes with the extra `distributed`.
    """
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Ranks()
    with needed("distributed", "training in several processes"):
        from accelerate import PartialState
    state = PartialState(cpu=device.type == "cpu")
    return Ranks(state.process_index, state.num_processes)


def leave_job() -> None:
    """End this process's part in the group, at the end of a program; without a group this does nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with mean and variance of the images of all processes while training, on any backend.

    PyTorch's SyncBatchNorm takes CUDA tensors alone. Mean and then variance are summed over the processes by an
    all-reduce that autograd knows, so gradients are those of the whole batch.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        if not self.training:
            return super().forward(x)
        from torch.distributed.nn.functional import all_reduce

        count = torch.full((), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        total = all_reduce(torch.cat([x.sum((0, 2, 3)), count[None]]))
        mean, count = total[:-1] / total[-1], total[-1].detach()
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        if self.track_running_stats:
            assert self.running_mean is not None and self.running_var is not None  # noqa: PT018
            assert self.num_batches_tracked is not None and self.momentum is not None  # noqa: PT018
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean.detach(), self.momentum)
                self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
        normal = centred * (var + self.eps).rsqrt()[:, None, None]
        return normal if self.weight is None else normal * self.weight[:, None, None] + self.bias[:, None, None]


@contextlib.contextmanager
def synced_batch_norms(model: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Context in which the model's batch norms are over the images of all processes."""
    norms = [m for m in model.modules() if type(m) is nn.BatchNorm2d] if ranks.size > 1 else []
    for norm in norms:
        norm.__class__ = SyncedBatchNorm2d
    try:
        yield
    finally:
        for norm in norms:
            norm.__class__ = nn.BatchNorm2d


def check_shares(model: nn.Module, ranks: Ranks, batch_size: int, num_images: int) -> None:
    """Raise `ValueError` if a process would have no images in a batch that batch norm needs from all of them."""
    if ranks.size == 1:
        return
    for name, count in (("batch_size", batch_size), ("train", num_images)):
        if count < ranks.size:
            raise ArgumentError(name, f"must be images for each of {ranks.size} processes, got {count}")
    last = num_images % batch_size
    if 1 < last < ranks.size and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        raise ArgumentError(
            "batch_size",
            f"must leave a last batch of at least {ranks.size} images, one per process, for this method's batch norm, "
            f"got {batch_size} for {num_images} images",
        )


def reduce_step(parameters: Sequence[nn.Parameter], sums: Tensor, ranks: Ranks) -> Tensor:
    """Sum the gradients over all processes, in place, and return the sum of `sums` (n,), in one all-reduce."""
    if ranks.size == 1:
        return sums
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    total = ranks.sum(torch.cat([*(gradient.flatten() for gradient in gradients), sums]))
    for parameter, gradient in zip(
        parameters, total.split([p.numel() for p in parameters] + [len(sums)]), strict=False
    ):
        parameter.grad = gradient.view_as(parameter)
    return total[len(total) - len(sums) :]
