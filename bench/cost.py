"""Compare the formulas of `fastprompt.cost` with measurements: `make cost` writes results/cost.md.

* FLOPs: torch's FlopCounterMode. Matrix products and convolutions count, two for a multiplication and its addition;
  norms, activations, softmax and sums do not. The CPU's fused attention and grouped convolutions, which torch does not
  count or counts wrongly, and oneDNN's Linear have their formulas here.
* Saved bytes: growth of the live allocations during a forward that keeps its graph.
* Dispatches: calls of ATen operators below autograd that are not views.

    python bench/cost.py [--batch 4] [--out results/cost.md]

The table is for ViT-B/16 at 224 px with random weights, in bfloat16, with a linear head on the class token.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import timm
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastprompt as fp
from fastprompt.cost import GRAPHS, Cost, cost
from fastprompt.files import atomic_write
from fastprompt.generators import PromptConfig
from fastprompt.vit import forward as rewritten

aten: Any = torch.ops.aten


def _attention_flops(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """q kᵀ and a v; shapes (B, H, R, d) and (B, H, S, d)."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def _attention_backward_flops(grad: Any, q: Any, k: Any, *args: Any, **kwargs: Any) -> int:
    """Five products: the scores again, and the gradients of a, q, k and v."""
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


def _convolution_backward_flops(
    grad: Any,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    mask: list[bool],
    **kwargs: Any,
) -> int:
    """As many as in the forward, for each of input and weight that needs a gradient."""
    positions, per_position = (x if transposed else grad)[2:], torch.Size(weight).numel()
    return 2 * x[0] * torch.Size(positions).numel() * per_position * (mask[0] + mask[1])


def _linear_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """oneDNN's x Wᵀ, which a frozen Linear uses in float32 if it is faster."""
    return 2 * torch.Size(x).numel() * weight[0]


FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
    aten.convolution_backward: _convolution_backward_flops,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = _linear_flops


class Dispatches(TorchDispatchMode):
    """Names of the ATen calls that are not views, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [value.alias_info for value in func._schema.returns]
        view = any(alias is not None and not alias.is_write for alias in aliases) or func is aten._unsafe_view.default
        if not view:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def count_flops(run: Callable[[], Any]) -> int:
    """Count the FLOPs of `run`."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        run()
    return counter.get_total_flops()


def count_dispatches(run: Callable[[], Any]) -> list[str]:
    """Return the ATen calls of `run` that are not views."""
    with Dispatches() as dispatches:
        run()
    return dispatches.calls


def count_saved(forward: Callable[[], Tensor]) -> int:
    """Return the bytes that stay alive after `forward`, in its output and its graph; it must have run before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        output = forward()
    grown = sum(event.nbytes() for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]")
    del output
    return grown


class Measured(NamedTuple):
    """Costs of one graph of one model: a forward without autograd, and a training step with what its forward saves."""

    inference: Cost
    training: Cost


def measure(model: fp.PromptedViT, images: Tensor, graph: str, activation_bits: int | None = None) -> Measured:
    """Measure the costs of `graph`, one of `GRAPHS`, for a trainable model; FLOPs and bytes are per image."""
    batch = images.shape[0]
    model.set_activation_bits(activation_bits)
    model.set_grad_checkpointing(graph == "recompute")
    forward: Callable[[Tensor], Any] = model.reference_forward if graph == "papers" else model

    def infer() -> Tensor:
        with torch.no_grad():
            return forward(images)

    def step() -> None:
        model.zero_grad()
        logits = forward(images)
        logits.backward(ones)

    ones = torch.ones_like(model.eval() and infer())
    calls = len(count_dispatches(infer))
    with frozen(model):  # the counter hooks into what needs a gradient
        infer()
        flops = count_flops(infer)
    inference = Cost(flops / batch, 0.0, calls)
    model.train()
    step()
    model.zero_grad()
    saved = count_saved(lambda: forward(images))
    counted: list[str] = []
    flops = count_flops(lambda: counted.extend(count_dispatches(step)))
    model.zero_grad()
    return Measured(inference, Cost(flops / batch, saved / batch, len(counted)))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.requires_grad_(False)
    yield
    for p in trained:
        p.requires_grad_(True)


def random_backbone(name: str = "vit_base_patch16_224", **sizes: Any) -> fp.FrozenViT:
    """Build a random timm ViT in bfloat16 with non-zero biases, as after pretraining."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **sizes)
    with torch.no_grad():
        for p in vit.parameters():
            if p.dim() == 1:
                p.add_(torch.randn_like(p), alpha=0.02)
    return fp.FrozenViT(vit).to(torch.bfloat16)


def methods(num_prompts: int) -> dict[str, PromptConfig]:
    """Return what the table compares, by name."""
    return {
        "PGN": fp.PGNConfig(num_prompts=num_prompts),
        "V²APT": fp.V2APTConfig(num_prompts=num_prompts, num_instance=num_prompts // 2),
        "V²APT per layer": fp.V2APTConfig(num_prompts=num_prompts, num_instance=num_prompts // 2, share="per_layer"),
        "VAPT": fp.VAPTConfig(num_prompts=num_prompts),
        "VPT-deep": fp.VPTConfig(num_prompts=num_prompts),
        "VPT-shallow": fp.VPTConfig(num_prompts=num_prompts, deep=False),
        "Free prompts": fp.FreePromptsConfig(num_prompts=num_prompts),
    }


class OnGPU(NamedTuple):
    """Dispatches of a forward and of a training step, each of our graph and of the papers'."""

    forward: tuple[int, int]
    training: tuple[int, int]


def on_a_gpu(model: fp.PromptedViT, images: Tensor) -> OnGPU:
    """Count the dispatches of a GPU's graph on a CPU: rows go into their slots, ops run by kernels that run nothing.

    A kernel's op counts as one dispatch. The model ends up in training mode.
    """
    import launch  # needs Triton, which the rest does not

    found: list[tuple[int, int]] = []
    with launch.stubbed(), mock.patch.object(rewritten, "in_slots", return_value=True):
        for graph in (model, model.reference_forward):

            def infer(graph: Callable[[Tensor], Tensor] = graph) -> None:
                with torch.no_grad():
                    graph(images)

            def step(graph: Callable[[Tensor], Tensor] = graph) -> None:
                model.zero_grad()
                logits = graph(images)
                logits.backward(torch.ones_like(logits))

            counts = []
            for run, trains in ((infer, False), (step, True)):
                model.train(trains)
                run()
                counts.append(len(count_dispatches(run)))
            found.append((counts[0], counts[1]))
    ours, papers = found
    return OnGPU((ours[0], papers[0]), (ours[1], papers[1]))


def gpu_lines() -> list[str]:
    """The lines of the table of dispatches on a GPU, which depend on no size but the number of blocks."""
    backbone, lines = random_backbone("vit_tiny_patch16_224", img_size=64), []
    for name, config in methods(10).items():
        model = fp.PromptedViT(backbone, config, num_classes=10, readout="cls")
        found = on_a_gpu(model, torch.randn(2, 3, 64, 64))
        cells = [f"{ours:,} | {papers:,}" for ours, papers in found]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


class Job(NamedTuple):
    """A job of one process: a method with a number of prompts, in all graphs."""

    name: str
    config: PromptConfig
    num_prompts: int
    batch: int


def rows(job: Job) -> list[str]:
    """The lines of one method in the table."""
    torch.set_num_threads(1)
    model, lines = fp.PromptedViT(random_backbone(), job.config, num_classes=10, readout="cls"), []
    images = torch.randn(job.batch, 3, 224, 224)
    for graph in GRAPHS:
        measured = measure(model, images, graph)
        formula = Measured(
            *(cost(model.backbone, job.config, "cls", graph, training, batch=job.batch) for training in (False, True))
        )
        cells = [pair(f.flops / 1e9, m.flops / 1e9, ".2f") for f, m in zip(formula, measured, strict=True)]
        cells.append(pair(formula.training.saved_bytes / 2**20, measured.training.saved_bytes / 2**20, ".2f"))
        cells += [pair(f.dispatches, m.dispatches, ",") for f, m in zip(formula, measured, strict=True)]
        lines.append(f"| {job.name} | {job.num_prompts} | {graph} | " + " | ".join(cells) + " |")
    return lines


def pair(formula: float, measured: float, form: str) -> str:
    return f"{formula:{form}} / {measured:{form}} ({formula / measured:.4f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("results/cost.md"))
    arguments = parser.parse_args()
    jobs = [Job(name, config, n, arguments.batch) for n in (10, 50) for name, config in methods(n).items()]
    jobs += [
        Job("Linear probe", fp.LinearProbeConfig(), 0, arguments.batch),
        Job("Pixel prompt", fp.PixelPromptConfig(), 0, arguments.batch),
    ]
    lines = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for found in pool.imap(rows, jobs):
            lines += found
            print("\n".join(found), file=sys.stderr, flush=True)
    text = HEAD.format(batch=arguments.batch, torch=torch.__version__.partition("+")[0]) + "\n".join(lines) + "\n"
    text += GPU_HEAD + "\n".join(gpu_lines()) + "\n"
    atomic_write(arguments.out, text.encode())
    print(f"written: {arguments.out}")


HEAD = """# Cost by formula and as measured

`make cost`: ViT-B/16 at 224 px, random weights, bfloat16 backbone, float32 prompts, linear head of 10 classes on the
class token, batch {batch}, one thread, PyTorch {torch} on a CPU. PGN has a library of 256 tokens; half of V²APT's
prompts are instance prompts; only VAPT has dropout, as by default.

Each cell is formula / measured (ratio), by `fastprompt.cost` and `bench/cost.py`. FLOPs are those of matrix
products and convolutions, two for a multiplication and its addition. Saved bytes: what live allocations grow by during
the forward of a training step. Dispatches: ATen calls without views, of one call with the whole batch. Graphs:
`papers` is `reference_forward`, `rewritten` is `forward`, `recompute` the same with `set_grad_checkpointing()`, which
only changes training.

| method | prompts | graph | GFLOPs/image, forward | GFLOPs/image, training step | saved MiB/image | \
dispatches, forward | dispatches, training step |
|---|---:|---|---:|---:|---:|---:|---:|
"""

GPU_HEAD = """
## On a GPU

Dispatches of the path that a GPU takes, counted on a CPU with a driver that launches nothing: a kernel's op is one
dispatch. A backbone of 12 blocks; the papers' graph has the same generators, whose ops run by kernels too.

| method | forward, ours | papers | training step, ours | papers |
|---|---:|---:|---:|---:|
"""


if __name__ == "__main__":
    main()
