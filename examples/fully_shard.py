"""Prompts for a backbone that fits no single device: its blocks are sharded among processes (PyTorch's `fully_shard`).

torchrun --nproc-per-node=2 examples/fully_shard.py

Each process holds its part of every block, gathers one block at a time for the forward and again for the backward,
and takes its share of the batch. Frozen blocks have no gradients to scatter: only prompts and head, which every
process holds, average theirs. `set_graph("papers")` calls blocks as modules, which is where `fully_shard` gathers; the
rewritten graph keeps folded copies of all weights, which are not sharded.

It runs on a tiny random ViT and random pictures, on GPUs if there are any, and compares the result with training on the
whole backbone. Here every process builds all blocks and then keeps its part of them.
"""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy

import fastprompt as fp

STEPS, BATCH = 5, 8


def pictures(count: int) -> tuple[Tensor, Tensor]:
    """uint8 pictures (count, 3, 64, 64), dark ones of class 0 and bright ones of class 1."""
    labels = torch.arange(count) % 2
    images = torch.randint(0, 128, (count, 3, 64, 64), dtype=torch.uint8)
    return images + 127 * labels.to(torch.uint8).view(-1, 1, 1, 1), labels


def sharded(model: fp.PromptedViT, mesh: DeviceMesh) -> fp.PromptedViT:
    """Shard the frozen blocks, each on its own; return the model."""
    model.set_graph("papers")
    for block in model.backbone.blocks:
        fully_shard(block, mesh=mesh)
    return model


def train(model: fp.PromptedViT, images: Tensor, labels: Tensor, ranks: int) -> list[float]:
    """Train prompts and head on this process's share of each batch; returns the mean loss of each step."""
    trained = [parameter for _, parameter in model.trainable_parameters()]
    optimizer, losses = torch.optim.SGD(trained, lr=0.02, momentum=0.9), []
    model.train()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = cross_entropy(model(images), labels)
        loss.backward()
        if ranks > 1:
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ranks
        optimizer.step()
        losses.append(loss.detach())
    means = torch.stack(losses)
    if ranks > 1:
        dist.all_reduce(means)
    return (means / ranks).tolist()


def held(model: fp.PromptedViT) -> tuple[int, int]:
    """Numbers of the backbone's parameters that this process holds, and that there are."""
    parameters = list(model.backbone.parameters())
    local = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return local, sum(p.numel() for p in parameters)


def main() -> None:
    """Train on a sharded and on a whole backbone, and compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same initial prompts and pictures in every process
    backbone = fp.FrozenViT.from_timm("test_vit", pretrained=False, image_size=64).to(device)
    whole = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=4), num_classes=2).to(device)
    model = copy.deepcopy(whole)
    images, labels = (part.to(device) for part in pictures(BATCH))
    share = slice(rank * BATCH // ranks, (rank + 1) * BATCH // ranks)
    expected = train(whole, images, labels, ranks=1)
    model = sharded(model, init_device_mesh(device, (ranks,)))
    losses = train(model, images[share], labels[share], ranks)
    local, total = held(model)
    there, here = whole.adapter_state_dict(), model.adapter_state_dict()
    difference = max(float((there[name] - here[name]).abs().max()) for name in there)
    if rank == 0:
        print(
            f"loss {losses[0]:.3f} to {losses[-1]:.3f}, whole {expected[-1]:.3f}; largest difference of a trained "
            f"number {difference:.1e}; each process holds {local:,} of {total:,} numbers of the backbone"
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
