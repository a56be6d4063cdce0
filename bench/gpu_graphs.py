"""Compare replays of CUDA graphs with eager forwards, and time both. Part of `make gpu` (results/gpu.json).

Alone, `python bench/gpu_graphs.py --methods pgn --batches 1 8` writes results/gpu_graphs.json again after each method.

The backbone is a ViT-B/16 at 224 px in bfloat16. For each method, replays are compared with float64 under the gates'
tolerance, at a captured and at a padded batch size, before and after parameters change in place. Then a call is timed
eager, under torch.compile and as a graph, for inference and for a training step (AdamW) on the same batches: medians
and quartiles of interleaved rounds. "throughput" is the time per call of many without waiting, "latency" that of one
until its output is there. Last, 32 images of 32 adapters in one batch of `fp.Engine` are timed beside 32 images of one
adapter, and beside serving them one by one, eager and with a graph of each adapter.

A mismatch, or a forward that cannot be captured, ends the run with an error. Inside `make gpu`, time is short: there
are as many rounds as fit, and torch.compile's times are null if there is no time to compile.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.engine.cuda_graph import Capturer, CudaCapturer, GraphedForward, GraphedTrainStep, cross_entropy
from fastprompt.engine.engine import TOLERANCE
from fastprompt.generators import PromptConfig

ROOT = Path(__file__).resolve().parent.parent
METHODS: dict[str, PromptConfig] = {
    "vpt-deep": fp.VPTConfig(num_prompts=10),
    "pgn": fp.PGNConfig(),
    "v2apt": fp.V2APTConfig(),
    "vapt": fp.VAPTConfig(),
}
BATCHES = (1, 8, 32, 128)
NUM_CLASSES = 100
ROUNDS, CALLS = 9, 20
COMPILE_SECONDS = 60.0  # to compile one of these models, forward and backward
ADAPTERS = 32

Times = dict[str, dict[str, dict[str, float]] | None]


def vit_base(device: str = "cuda") -> fp.FrozenViT:
    """Return a ViT-B/16 with random weights, in bfloat16."""
    torch.manual_seed(0)
    module = timm.create_model("vit_base_patch16_224", num_classes=0)
    return fp.FrozenViT(module).to(device=device, dtype=torch.bfloat16)


def measure(
    backbone: fp.FrozenViT | None = None,
    methods: Sequence[str] = tuple(METHODS),
    batches: tuple[int, ...] = BATCHES,
    capturer: Callable[[], Capturer] | None = None,
    compiler: Callable[..., Any] = torch.compile,
    keep: Callable[[dict[str, Any]], None] | None = None,
    deadline: float = math.inf,
) -> dict[str, Any]:
    """Return the report: parity of all methods, then their times. `keep` receives it after each method.

    Args:
        backbone: on the device to measure; None: ViT-B/16 on the current GPU.
        capturer: makes the `Capturer` of each manager. compiler: replaces torch.compile. Both are for tests.
        deadline: when the timing should end, by `time.monotonic`; it does not limit parity.
    """
    backbone = vit_base() if backbone is None else backbone
    capturer = (lambda: CudaCapturer(backbone.device)) if capturer is None else capturer
    report: dict[str, Any] = {"batches": list(batches), "backbone": str(backbone.dtype), "methods": {}}
    images = torch.randn(max(batches), 3, *backbone.image_size, device=backbone.device)
    labels = torch.randint(0, NUM_CLASSES, (max(batches),), device=backbone.device)
    models, left = {}, 2 * len(batches) * len(methods)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        for name in methods:
            torch.manual_seed(0)
            models[name] = fp.PromptedViT(backbone, METHODS[name], NUM_CLASSES).eval()
            report["methods"][name] = {"parity": parity(name, models[name], images, batches, capturer)}
            print(f"graphs, {name}: replays are right", flush=True)
        for name, model in models.items():
            jobs = {
                "inference": lambda x, y, until, model=model: inference(model, x, capturer, compiler, until),
                "training step": lambda x, y, until, model=model: training(model, x, y, capturer, compiler, until),
            }
            for job, run in jobs.items():
                report["methods"][name][job] = {}
                for batch in batches:
                    x, y, now = images[:batch].contiguous(), labels[:batch].contiguous(), time.monotonic()
                    report["methods"][name][job][str(batch)] = run(x, y, now + (deadline - now) / left)
                    left -= 1
            if keep is not None:
                keep(report)
    report["mixed batch"] = mixed(backbone, capturer, deadline)
    if keep is not None:
        keep(report)
    return report


def parity(
    name: str, model: fp.PromptedViT, images: Tensor, batches: tuple[int, ...], capturer: Callable[[], Capturer]
) -> list[dict[str, Any]]:
    """Return error and allowed error of replays, and whether their bits are those of eager."""
    exact = fp.PromptedViT(copy.deepcopy(model.backbone).double(), model.config, NUM_CLASSES).eval()
    graphed, rows, largest = GraphedForward(model, batches, capturer=capturer()), [], max(batches)
    for round_ in ("first parameters", "changed in place"):
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))  # some start at zero
        exact.load_adapter_state_dict(model.adapter_state_dict())
        for count in sorted({largest, max(1, largest - 1)}):
            x = images[:count]
            with torch.no_grad():
                truth, eager = exact(x.double()), model(x)
            found = graphed(x)
            error, reference = (float((output.double() - truth).abs().max()) for output in (found, eager))
            budget = 2 * reference + torch.finfo(model.backbone.dtype).eps * float(truth.abs().max())
            if not error <= budget:
                raise SystemExit(f"{name}, batch {count}, {round_}: the error of a replay, {error}, is above {budget}")
            rows.append(
                {
                    "batch": count,
                    "parameters": round_,
                    "error": error,
                    "budget": budget,
                    "bits of eager": torch.equal(found, eager),
                }
            )
    graphed.release()
    return rows


def inference(
    model: fp.PromptedViT, images: Tensor, capturer: Callable[[], Capturer], compiler: Callable[..., Any], until: float
) -> Times:
    """Time a forward."""
    graphed = GraphedForward(model, (len(images),), capturer=capturer())
    torch._dynamo.reset()
    compiled = compiler(model, dynamic=False)
    with torch.no_grad():
        found = timed(
            {
                "eager": lambda: model(images),
                "compile": lambda: compiled(images),
                "graph": lambda: graphed(images),
                "graph, borrowed": lambda: graphed(images, borrow=True),
            },
            graphed.capturer,
            until,
        )
    graphed.release()
    return found


def training(
    model: fp.PromptedViT,
    images: Tensor,
    labels: Tensor,
    capturer: Callable[[], Capturer],
    compiler: Callable[..., Any],
    until: float,
) -> Times:
    """Time a training step; each way trains its own copy of generator and head."""
    torch._dynamo.reset()
    models = [fp.PromptedViT(model.backbone, model.config, NUM_CLASSES).train() for _ in range(3)]
    for other in models:
        other.load_adapter_state_dict(model.adapter_state_dict())
    graphed = GraphedTrainStep(models[2], adamw(models[2], capturable=True), capturer=capturer())
    found = timed(
        {
            "eager": plain_step(models[0], models[0], images, labels),
            "compile": plain_step(models[1], compiler(models[1], dynamic=False), images, labels),
            "graph": lambda: graphed(images, labels),
        },
        graphed.capturer,
        until,
    )
    graphed.release()
    return found


def mixed(backbone: fp.FrozenViT, capturer: Callable[[], Capturer], until: float) -> dict[str, Any]:
    """Time `ADAPTERS` images, each of its own VPT-deep adapter, for every way to serve them.

    Raises:
        SystemExit: an image's output is not its own adapter's.
    """
    models = []
    for seed in range(ADAPTERS):
        torch.manual_seed(seed)
        models.append(fp.PromptedViT(backbone, METHODS["vpt-deep"], NUM_CLASSES).eval())
    images = torch.randn(ADAPTERS, 3, *backbone.image_size, device=backbone.device)
    single, names = images.split(1), [f"adapter {i}" for i in range(ADAPTERS)]
    graphs = [GraphedForward(model, (1,), capturer=capturer()) for model in models]
    with fp.Engine(backbone, (ADAPTERS,), backbone.dtype, "eager") as engine, torch.no_grad():
        for name, model in zip(names, models, strict=True):
            engine.add_adapter(name, model)
        expected = torch.cat([model(x) for model, x in zip(models, single, strict=True)]).double()
        served = {
            "mixed batch": torch.stack(list(engine(images, adapter_names=names))),
            "batch 1, graph": torch.cat([graph(x) for graph, x in zip(graphs, single, strict=True)]),
        }
        for way, outputs in served.items():
            error = float((outputs.double() - expected).norm() / expected.norm())
            if not error < TOLERANCE[backbone.dtype]:
                raise SystemExit(f"{way}: the outputs are off by {error:.2g} of the adapters' own")
        times = timed(
            {
                "mixed batch": lambda: engine(images, adapter_names=names),
                "one adapter": lambda: engine(images, adapter_names=ADAPTERS * names[:1]),
                "batch 1, eager": lambda: [model(x) for model, x in zip(models, single, strict=True)],
                "batch 1, graph": lambda: [graph(x) for graph, x in zip(graphs, single, strict=True)],
            },
            graphs[0].capturer,
            until,
            calls=1,
        )
    for graph in graphs:
        graph.release()
    mixture = times["mixed batch"]["throughput"]["median"]
    return {
        "adapters": ADAPTERS,
        "microseconds": times,
        "times of a mixed batch": {way: of["throughput"]["median"] / mixture for way, of in times.items()},
    }


def adamw(model: fp.PromptedViT, capturable: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for _, p in model.trainable_parameters()], lr=1e-4, capturable=capturable)


def plain_step(
    model: fp.PromptedViT, forward: Callable[..., Any], images: Tensor, labels: Tensor
) -> Callable[[], None]:
    """The captured step, as a training loop would write it."""
    optimizer, loss = adamw(model), cross_entropy(model)

    def step() -> None:
        optimizer.zero_grad()
        logits, aux = forward(images, return_aux=True)
        loss(logits, labels, aux).backward()
        optimizer.step()

    return step


def timed(ways: dict[str, Callable[[], Any]], device: Capturer, until: float, calls: int | None = None) -> Times:
    """Return microseconds per call, median and quartiles over at least one round; None if no time was left."""
    samples: dict[str, dict[str, list[float]]] = {}
    for name, way in ways.items():
        if name == "compile" and time.monotonic() + COMPILE_SECONDS > until:
            continue
        samples[name] = {"throughput": [], "latency": []}
        for _ in range(5):  # compiles, warms up and captures
            way()
    for i in range(ROUNDS):
        if i and time.monotonic() > until:
            break
        for name, found in samples.items():
            for kind, repeats in (("throughput", CALLS if calls is None else calls), ("latency", 1)):
                device.synchronize()
                began = time.perf_counter()
                for _ in range(repeats):
                    ways[name]()
                device.synchronize()
                found[kind].append((time.perf_counter() - began) * 1e6 / repeats)
    return {
        name: {kind: spread(values) for kind, values in samples[name].items()} if name in samples else None
        for name in ways
    }


def spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu_graphs.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "CUDA graphs need a CUDA or ROCm device and torch sees none; without one, `make test` holds "
            "their rules by a recording double"
        )

    def keep(report: dict[str, Any]) -> None:
        arguments.out.write_text(json.dumps(about | report, indent=1) + "\n")

    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
    }
    measure(methods=arguments.methods, batches=tuple(arguments.batches), keep=keep)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
