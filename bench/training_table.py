"""Measure what training costs, and write results/training.md: `python bench/training_table.py [PART ...]`.

* steps: a training step (forward, cross-entropy, backward, SGD) of VPT-deep on ViT-B/16 at 224 px with 10, 50 and 100
  prompts, against the papers' graph as its authors train it, float32 eager. Both graphs also run compiled, and in
  bfloat16 where the processor multiplies it. Their gradients are compared first; then all ways take turns.
* memory: peak resident memory of one step in a process of its own, and what it consists of.
* files: `fp.fit` on JPEG files, which it reads, decodes and flips in every epoch, against the step alone.
* bits: what activations in 8 and 2 bits save, and how far gradients are from the exact ones, on published weights.

`--minutes` bounds the time of each part: rounds end when it is over, after three at least.

What is measured lies in .benchmarks/training.json, so that parts can be measured at different times. Of a part that was
not measured here, results/training.md keeps its section. `make bench-training` measures everything.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cost import count_saved, random_backbone
from data_table import write_images
from forward_table import cell, ratio
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fastprompt as fp
from fastprompt.cost import cost
from fastprompt.data import splits
from fastprompt.files import atomic_write
from fastprompt.kept import tensors_of
from fastprompt.memory import peak_memory_mib, reset_peak_memory
from fastprompt.vit.linear import bfloat16_is_fast, onednn_is_faster

MEASURED, OUT = Path(".benchmarks/training.json"), Path("results/training.md")
PROMPTS, BATCH = (10, 50, 100), 8
THEIRS = "papers' graph, float32 eager"
GOALS = {"float32": (1.17, 1.40, 1.68), "bfloat16": (4.5, 5.0, 6.5)}
EQUAL_GOALS = (1.15, 1.4, 1.65)
"""× the better of the papers' graph in bfloat16 eager and compiled."""
MEMORY: dict[str, float | None] = {
    "papers' graph, float32": 1.0,
    "rewritten, float32": 0.6,
    "rewritten, float32, activations in 0 bits": 0.6,
    "rewritten, bfloat16": 0.5,
    "rewritten, bfloat16, blocks recomputed": 0.25,
    "rewritten, bfloat16, blocks recomputed, 4 parts": 0.25,
    "rewritten, bfloat16, no copies, blocks recomputed": 0.25,
    "rewritten, bfloat16, no copies, blocks recomputed, 4 parts": 0.25,
    "papers' graph, bfloat16": None,
    "rewritten, bfloat16, packed": None,
    "rewritten, bfloat16, packed, activations in 0 bits": 0.5,
    "rewritten, bfloat16, activations in 0 bits": None,
    "rewritten, bfloat16, activations in 8 bits": None,
    "rewritten, bfloat16, activations in 2 bits": None,
}
"""Ways whose memory is measured, with the goal as a share of the first."""
PARTS = {
    "imports": "imports",
    "weights": "weights",
    "folded": "folded copies",
    "images": "images",
    "saved": "saved for the backward",
    "rest": "the rest",
    "peak": "peak",
}
"""What memory consists of, as the table names it."""
FILES_GOAL = 0.9
MMAP = {"MALLOC_MMAP_THRESHOLD_": "1048576"}
"""Makes glibc give back what is freed, rather than keep it in pieces between what lives on."""
BITS_GOALS = {8: 0.80, 2: 0.65}
ROUNDING = {"float32": 1e-3, "bfloat16": 0.1}
"""Largest distance of a gradient from that of the papers' graph in float32, relative to its norm."""


def build(num_prompts: int, dtype: str, backbone: fp.FrozenViT | None = None) -> fp.PromptedViT:
    """VPT-deep on a random ViT-B/16 in training mode, with a linear head of 10 classes."""
    backbone = random_backbone().to(getattr(torch, dtype)) if backbone is None else backbone
    torch.manual_seed(0)
    return fp.PromptedViT(backbone, fp.VPTConfig(num_prompts), num_classes=10).train()


def stepper(
    model: fp.PromptedViT, forward: Callable[[Tensor], Any], parts: int = 1
) -> Callable[[Tensor, Tensor], None]:
    """Return a function that takes one training step on a batch, of which it computes equal parts in turn."""
    optimizer = torch.optim.SGD([p for _, p in model.trainable_parameters()], lr=1e-3, momentum=0.9)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        for of_images, of_labels in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            (F.cross_entropy(forward(of_images).float(), of_labels) / parts).backward()
        optimizer.step()

    return step


def seconds(run: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def gradients(model: fp.PromptedViT, forward: Callable[[Tensor], Any], images: Tensor, labels: Tensor) -> Tensor:
    """The gradients of all trained parameters on a batch, (total,) float32."""
    model.zero_grad(set_to_none=True)
    F.cross_entropy(forward(images).float(), labels).backward()
    return torch.cat([p.grad.flatten().float() for _, p in model.trainable_parameters() if p.grad is not None])


def check_gradient(name: str, found: Tensor, exact: Tensor, dtype: str) -> float:
    """Return the distance of a gradient from the exact one, relative to its norm; end the run if it is too large."""
    error = float((found - exact).norm() / exact.norm())
    if not error <= ROUNDING[dtype]:
        raise SystemExit(f"{name}: the gradient differs by {error:.2g} of its norm; at most {ROUNDING[dtype]:g} may")
    return error


def steps(rounds: int, minutes: float, numbers: Sequence[int], known: dict[str, Any]) -> dict[str, Any]:
    """Time all ways at these numbers of prompts; return what is `known` of the others as well."""
    plain = random_backbone().float()
    fast = bfloat16_is_fast(torch.device("cpu"))
    dtype, own = ("bfloat16", copy.deepcopy(plain).to(torch.bfloat16)) if fast else ("float32", plain)
    of_packed = copy.deepcopy(own)
    of_packed.set_copies("packed")
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.arange(BATCH) % 10
    found = dict(known)
    for num_prompts in numbers:
        began = time.perf_counter()
        torch._dynamo.reset()
        exact = build(num_prompts, "float32", plain)
        ways = {THEIRS: (exact, exact.reference_forward)}
        model = build(num_prompts, dtype, own)
        for graph, forward in (("papers' graph", model.reference_forward), ("rewritten", model.forward)):
            ways[f"{graph}, {dtype} eager"] = model, forward
            ways[f"{graph}, {dtype} compiled"] = model, torch.compile(forward)
        packed = build(num_prompts, dtype, of_packed)
        ways[f"rewritten, {dtype} eager, packed"] = packed, packed.forward
        correct, errors = gradients(exact, exact.reference_forward, images, labels), {}
        for name, (trained, forward) in ways.items():  # which also compiles
            errors[name] = check_gradient(name, gradients(trained, forward, images, labels), correct, dtype)
        runs = {name: stepper(*way) for name, way in ways.items()}
        times: dict[str, Any] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            if turn > 3 and time.perf_counter() - began > 60 * minutes / len(numbers):
                break
            for name, step in runs.items():
                taken = seconds(lambda step=step: step(images, labels))
                if turn:  # the first one warms up
                    times[name].append(taken)
        print(f"{num_prompts} prompts: { ({n: round(statistics.median(t), 2) for n, t in times.items()}) }", flush=True)
        flops = [cost(plain, fp.VPTConfig(num_prompts), graph=g, training=True, batch=BATCH).flops for g in GRAPHS]
        found[str(num_prompts)] = times | {"flops": flops, "errors": errors, "dtype": dtype}
    return found


GRAPHS = ("papers", "rewritten")


class Filled(TorchDispatchMode):
    """Products return zeros of the shape of their result, in new memory: what a step allocates stays the same."""

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "convolution", "_linear_pointwise", "linear")
    ATTENTION = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name.split("::")[1] not in (*self.PRODUCTS, *self.ATTENTION):
            return func(*args, **kwargs)
        if isinstance(out := kwargs.get("out"), Tensor):
            return out.zero_()
        shapes = tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, (args, kwargs))
        found = func(*shapes[0], **shapes[1])
        return tree_map(
            lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).zero_() if isinstance(x, Tensor) else x,
            found,
        )


def filled() -> contextlib.AbstractContextManager[Any]:
    """`Filled` where bfloat16 is emulated, which would take an hour; else nothing."""
    return contextlib.nullcontext() if bfloat16_is_fast(torch.device("cpu")) else Filled()


def distinct_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the memory behind tensors, of which several may share one."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def memory_of(way: str, batch: int) -> dict[str, float]:
    """Return in MiB the peak resident memory of this process in one step at 50 prompts, and what it consists of."""
    torch.set_num_threads(1)
    imports = resident_mib()
    dtype, graph = (
        ("bfloat16" if "bfloat16" in way else "float32"),
        "papers" if way.startswith("papers") else "rewritten",
    )
    model = build(50, dtype)
    graph = "recompute" if "recomputed" in way else graph
    kept, parts = (int(way.split()[-2]) if way.endswith(f" {unit}") else None for unit in ("bits", "parts"))
    model.set_grad_checkpointing(graph == "recompute")
    model.set_activation_bits(kept)
    model.backbone.set_copies("none" if "no copies" in way else "packed" if "packed" in way else "folded")
    step = stepper(model, model.reference_forward if graph == "papers" else model, parts or 1)
    images, labels = torch.randn(batch, 3, 224, 224), torch.arange(batch) % 10
    onednn_is_faster()  # decided by real products
    gc.collect()
    reset_peak_memory(torch.device("cpu"))
    with filled():
        step(images, labels)
    peak = peak_memory_mib()
    weights = distinct_bytes(tensors_of(model.backbone))
    own = model.backbone.folded() if graph != "papers" else None
    folded = 0 if own is None else distinct_bytes([*tensors_of(model.backbone), *tensors_of(*own.blocks)]) - weights
    formula = cost(
        model.backbone, model.config, graph=graph, training=True, dtype=dtype, batch=batch, activation_bits=kept
    )
    saved = formula.saved_bytes * batch / (parts or 1)
    known = {"weights": weights, "folded": folded, "images": images.nbytes, "saved": saved}
    mib = {"imports": imports} | {name: size / 2**20 for name, size in known.items()}
    return {"peak": peak, **mib, "rest": peak - sum(mib.values())}


def resident_mib() -> float:
    """The resident memory of this process."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 2**10


def memory(batch: int) -> dict[str, Any]:
    """Measure every way in a process of its own, without and with glibc told to give back what is freed."""
    found: dict[str, Any] = {"batch": batch, "filled": not bfloat16_is_fast(torch.device("cpu"))}
    for way in MEMORY:
        command, found[way] = [sys.executable, __file__, "--one", way, "--batch", str(batch)], []
        for settings in ({}, MMAP):
            run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | settings)
            found[way].append(json.loads(run.stdout.splitlines()[-1]))
        print(f"{way}: {[round(each['peak']) for each in found[way]]} MiB", flush=True)
    return found


def files(number: int, epochs: int) -> dict[str, Any]:
    """Time `fit` on files against the step alone, before and after it."""
    dtype = "bfloat16" if bfloat16_is_fast(torch.device("cpu")) else "float32"
    found: dict[str, Any] = {"images": number, "dtype": dtype, "epochs": epochs}
    with tempfile.TemporaryDirectory(prefix="fastprompt-") as folder:
        for part, count in (("train", number), ("val", BATCH), ("test", 2)):
            for name in ("a", "b"):
                (path := Path(folder) / part / name).mkdir(parents=True)
                paths = write_images(path, count // 2, "jpg")
        found["file_kib"] = Path(paths[0]).stat().st_size / 2**10
        splits.KEEP_BYTES = 0  # every epoch decodes its files, as those of a large data set
        data = fp.load_data(folder, image_size=224, augment="flip")
        found["reading"] = number / seconds(lambda: [data.train[i] for i in range(number)])
        model = build(50, "float32")
        model.set_backbone_dtype(getattr(torch, dtype))
        step, (images, labels) = stepper(model, model), next(iter(torch.utils.data.DataLoader(data.train, BATCH)))
        step(images, labels)
        alone = [seconds(lambda: step(images, labels)) for _ in range(3)]
        for workers in (0, 1):
            recipe = fp.default_recipe(model.config).replace(
                epochs=epochs, batch_size=BATCH, dtype=dtype, num_workers=workers, warmup_epochs=0
            )
            result = fp.fit(model, data.train, data.val, recipe, progress=False)
            found[f"{workers} workers"] = [event["images_per_second"] for event in result.history]
            model.train()
            alone += [seconds(lambda: step(images, labels)) for _ in range(3)]
    found["step"] = [BATCH / taken for taken in alone]
    print(found, flush=True)
    return found


def bits(weights: str) -> dict[str, Any]:
    """Count saved bytes, and compare gradients of a batch with the exact ones."""
    found: dict[str, Any] = {"weights": weights}
    model = build(50, "bfloat16")
    images = torch.randn(4, 3, 224, 224)
    for kept in (None, *BITS_GOALS):
        model.set_activation_bits(kept)
        formula = cost(model.backbone, model.config, training=True, batch=4, activation_bits=kept).saved_bytes
        with filled():
            model(images)
            gc.collect()
            found[f"saved, {kept}"] = [formula, count_saved(lambda: model(images)) / 4]
    backbone = fp.load_backbone(weights)
    data = fp.load_data("fashion-mnist", image_size=backbone.image_size, num_train=50, num_val=50)
    images, labels = next(iter(torch.utils.data.DataLoader(data.train, BATCH)))
    for dtype in ("float32", "bfloat16") if bfloat16_is_fast(torch.device("cpu")) else ("float32",):
        model = build(50, dtype, backbone.to(getattr(torch, dtype)))
        gradients = []
        for kept in (None, *BITS_GOALS):
            model.set_activation_bits(kept)
            model.zero_grad()
            F.cross_entropy(model(images).float(), labels).backward()
            assert model.generator is not None
            gradients.append(torch.cat([p.grad.flatten() for p in model.generator.parameters() if p.grad is not None]))
        for kept, gradient in zip(BITS_GOALS, gradients[1:], strict=True):
            error = (gradient - gradients[0]).norm() / gradients[0].norm()
            found[f"error, {dtype}, {kept}"] = [
                float(error),
                float(F.cosine_similarity(gradient, gradients[0], dim=0)),
            ]
    print(found, flush=True)
    return found


def steps_table(part: dict[str, Any]) -> list[str]:
    """The lines on steps."""
    numbers = [number for number in PROMPTS if str(number) in part["found"]]
    columns = [part["found"][str(number)] for number in numbers]
    ways = list(dict.fromkeys(name for errors in columns for name in errors["errors"]))
    rounds = min(len(times[way]) for times in columns for way in ways if way in times)
    lines = [
        HEADINGS["steps"],
        "",
        f"VPT-deep on ViT-B/16 at 224 px, batch {BATCH}, random weights. The second row is images a second of the "
        "papers' graph as its authors train it; × is times as fast. Medians over rounds in which all ways take turns, "
        f"at least {rounds}, in brackets the rounds but the lowest and the highest, behind it the goal: ≥ where the "
        "upper end reaches it. Before that, gradients of all ways are compared with the second row's.",
        "",
        f"| training step, prompts | {' | '.join(map(str, numbers))} |",
        "|---|" + "---:|" * len(numbers),
        "| FLOPs by formula, papers' graph / rewritten | "
        + " | ".join(f"{c['flops'][0] / c['flops'][1]:.2f}" for c in columns)
        + " |",
        f"| {THEIRS}, images/s | " + " | ".join(f"{BATCH / statistics.median(c[THEIRS]):.2f}" for c in columns) + " |",
    ]
    for way in ways[1:]:
        goals = GOALS["bfloat16" if "bfloat16" in way else "float32"] if way.startswith("rewritten") else None
        cells = [
            cell(ratio(c[THEIRS], c[way]), None if goals is None else goals[PROMPTS.index(n)]) if way in c else ""
            for n, c in zip(numbers, columns, strict=True)
        ]
        lines.append(f"| {way}, × | {' | '.join(cells)} |")
    cells = []
    for n, c in zip(numbers, columns, strict=True):
        theirs, ours = (
            min((times for way, times in c.items() if way.startswith(f"{g}, {c['dtype']}")), key=statistics.median)
            for g in ("papers' graph", "rewritten")
        )
        goal = EQUAL_GOALS[PROMPTS.index(n)] if c["dtype"] == "bfloat16" else None
        cells.append(cell(ratio(theirs, ours), goal))
    lines.append(f"| rewritten, the better, × the papers' better in the same dtype | {' | '.join(cells)} |")
    return lines


def memory_table(part: dict[str, Any]) -> list[str]:
    """The lines on memory."""
    found = part["found"]
    theirs = [each["peak"] for each in found[next(iter(MEMORY))]]
    how = " Products are filled instead of computed, as this processor emulates bfloat16." if found["filled"] else ""
    lines = [
        HEADINGS["memory"],
        "",
        f"Peak resident memory of a process that takes one step at batch {found['batch']} with 50 prompts, one thread, "
        f"PyTorch and weights included, and its share of the first row's in the same environment.{how} Behind it the "
        "goal: ≤ where both shares meet it. glibc keeps "
        "pieces of freed memory between tensors that live on; with `MALLOC_MMAP_THRESHOLD_=1048576` in the environment "
        "it gives them back. Blocks that are computed again keep nothing of their MLPs in the backward either "
        "(`activation_bits=0`). No copies: nothing is folded into the weights "
        "(`FrozenViT.set_copies`); packed: they are also laid out for oneDNN, forward and backward. In 4 parts: "
        "the gradients of 4 times a quarter of the images add up to one step (`Recipe.accumulate`).",
        "",
        "| one step | MiB | share | MiB, giving back | share | goal |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way, goal in MEMORY.items():
        peaks = [each["peak"] for each in found[way]]
        shares = [mine / its for mine, its in zip(peaks, theirs, strict=True)]
        said = "" if goal is None or goal == 1 else f"{'≤' if max(shares) <= goal else '**>**'} {goal:g}"
        cells = [f"{peak:,.0f} | {share:.2f}" for peak, share in zip(peaks, shares, strict=True)]
        lines.append(f"| {way} | {' | '.join(cells)} | {said} |")
    ours, own = (found[f"{graph}, bfloat16"][1]["peak"] for graph in ("rewritten", "papers' graph"))
    lines += [
        "",
        f"In bfloat16 both, giving back: {ours / own:.2f}. What the peak consists of, giving back: importing PyTorch, "
        "timm and fastprompt; the frozen weights, and copies with the norms' γ in them; the images; what the formula "
        "says is saved for the backward; the rest is in use for a moment, or lost between tensors.",
        "",
        "| one step, MiB | " + " | ".join(PARTS.values()) + " |",
        "|---|" + "---:|" * len(PARTS),
    ]
    for way in MEMORY:
        lines.append(f"| {way} | " + " | ".join(f"{found[way][1][name]:,.0f}" for name in PARTS) + " |")
    return lines


def files_table(part: dict[str, Any]) -> list[str]:
    """The lines on files."""
    found = part["found"]
    step = statistics.median(found["step"])
    lines = [
        HEADINGS["files"],
        "",
        f"`fp.fit` on {found['images']} JPEG files of 500 x 375 pixels ({found['file_kib']:.0f} KiB), which are read, "
        f"decoded, scaled, cropped and flipped in every epoch; VPT-deep with 50 prompts in {found['dtype']}, "
        f"batch {BATCH}, medians over {found['epochs']} epochs. The step alone runs on a batch in memory, before, "
        f"between and after. The goal is {FILES_GOAL:.0%} of it.",
        "",
        "| | images/s | of the step alone |",
        "|---|---:|---:|",
        f"| reading alone, in the training process | {found['reading']:.1f} | |",
        f"| the step alone | {step:.2f} | |",
    ]
    for workers in (0, 1):
        speed = statistics.median(found[f"{workers} workers"])
        said = "≥" if speed >= FILES_GOAL * step else "**<**"
        lines.append(
            f"| `fp.fit`, `num_workers={workers}` | {speed:.2f} | {speed / step:.1%} {said} {FILES_GOAL:.0%} |"
        )
    return lines


def bits_table(part: dict[str, Any]) -> list[str]:
    """The lines on activations in few bits."""
    found = part["found"]
    exact = found["saved, None"][1]
    errors = {key: value for key, value in found.items() if key.startswith("error")}
    lines = [
        HEADINGS["bits"],
        "",
        "`Recipe.activation_bits`: what a step of VPT-deep with 50 prompts keeps for its backward of an image, "
        "ViT-B/16 in bfloat16 at batch 4; and the distance of the prompts' gradient from the exact one, relative to "
        f"its norm, and its cosine, of a fresh adapter on `{found['weights']}` for {BATCH} images of Fashion-MNIST.",
        "",
        "| bits | by formula, MiB | measured, MiB | share | "
        + " | ".join(
            f"{way} {dtype}"
            for dtype in dict.fromkeys(key.split(", ")[1] for key in errors)
            for way in ("error in", "cosine in")
        )
        + " |",
        "|---|---:|---:|---:|" + "---:|" * len(errors),
        f"| all | {found['saved, None'][0] / 2**20:.2f} | {exact / 2**20:.2f} | 1.00 | "
        + " | ".join([""] * len(errors))
        + " |",
    ]
    for kept, goal in BITS_GOALS.items():
        formula, measured = found[f"saved, {kept}"]
        share = measured / exact
        own = [value for key, value in errors.items() if key.endswith(f", {kept}")]
        cells = " | ".join(f"{error:.2g} | {cosine:.5f}" for error, cosine in own)
        lines.append(
            f"| {kept} | {formula / 2**20:.2f} | {measured / 2**20:.2f} | {share:.3f} "
            f"{'≤' if share <= goal else '**>**'} {goal:.2f} | {cells} |"
        )
    return lines


TABLES = {"steps": steps_table, "memory": memory_table, "files": files_table, "bits": bits_table}


HEADINGS = {
    "steps": "## A training step",
    "memory": "## Memory of a training step",
    "files": "## From JPEG files",
    "bits": "## Activations in few bits",
}


def sections(path: Path) -> dict[str, list[str]]:
    """Return the sections of a file that was written before, by heading."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        if line.startswith("## "):
            found[line] = []
        if found:
            found[list(found)[-1]].append(line)
    return {heading: [*"\n".join(lines).rstrip().splitlines(), ""] for heading, lines in found.items()}


def machine() -> str:
    """The processor, threads and version, as each table says them."""
    name = platform.processor() or platform.machine()
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        names = [line.partition(":")[2].strip() for line in cpus.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    units = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({units}), {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(TABLES)}; all if none is named")
    parser.add_argument("--prompts", type=int, nargs="+", choices=PROMPTS, default=PROMPTS, help="of the steps")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of the steps")
    parser.add_argument("--minutes", type=float, default=10, help="after which the rounds of steps end")
    parser.add_argument("--batch", type=int, default=32, help="batch of the memory's step")
    parser.add_argument("--images", type=int, default=24, help="number of files")
    parser.add_argument("--epochs", type=int, default=3, help="epochs over the files")
    parser.add_argument("--weights", default="clip-vit-b16", help="published weights for the gradients")
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(memory_of(arguments.one, arguments.batch)))
        return
    if unknown := set(arguments.parts) - set(TABLES):
        parser.error(f"argument PART: must be among {', '.join(TABLES)}, got {', '.join(sorted(unknown))}")
    if arguments.rounds < 3:
        parser.error("argument --rounds: must be at least 3")
    parts = json.loads(arguments.measured.read_text()) if arguments.measured.is_file() else {}
    measure = {
        "steps": lambda: steps(
            arguments.rounds, arguments.minutes, arguments.prompts, parts.get("steps", {}).get("found", {})
        ),
        "memory": lambda: memory(arguments.batch),
        "files": lambda: files(arguments.images, arguments.epochs),
        "bits": lambda: bits(arguments.weights),
    }
    for name in arguments.parts or TABLES:
        parts[name] = {"machine": machine(), "found": measure[name]()}
        arguments.measured.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(arguments.measured, json.dumps(parts))
    lines = [
        "# What training costs",
        "",
        "`make bench-training`, random weights and prompts where no others are named.",
        "",
    ]
    before = sections(arguments.out)
    for name, table in TABLES.items():
        if name in parts:
            lines += [*table(parts[name]), "", f"Measured on an {parts[name]['machine']}.", ""]
        else:
            lines += before.get(HEADINGS[name], [])
    atomic_write(arguments.out, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
