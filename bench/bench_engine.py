"""Compare `fp.Engine` with the papers' graph in other engines, on ViT-B/16 at 224 px with random weights.

In every round all ways run one after the other, on the same images, threads and prompts, after each was checked against
the papers' graph in float32. `make bench-engine` writes the ratios to results/engine.md.
"""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch._inductor.config
import torch.nn.functional as F
from cost import count_flops
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.engine.backends import BACKENDS, in_float32

ROUNDS = 9
METHODS = {"VPT-deep": fp.VPTConfig, "VAPT": fp.VAPTConfig, "PGN": fp.PGNConfig}
CASES = [
    ("VPT-deep", 10, 8),
    ("VPT-deep", 50, 8),
    ("VPT-deep", 100, 8),
    ("VAPT", 10, 8),
    ("VAPT", 50, 8),
    ("VAPT", 100, 8),
    ("PGN", 16, 8),
    ("VPT-deep", 50, 1),
]
ALL_WAYS = ("VPT-deep",)
"""Methods that are also compared with the compiled papers' graph, which takes a minute; others have no goal there."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
Run = Callable[[Tensor], Any]


@pytest.fixture(scope="module")
def backbone() -> fp.FrozenViT:
    torch.manual_seed(0)
    return fp.FrozenViT(timm.create_model("vit_base_patch16_224", num_classes=0))


def model_of(backbone: fp.FrozenViT, method: str, num_prompts: int, seed: int = 0) -> fp.PromptedViT:
    torch.manual_seed(seed)
    model = fp.PromptedViT(backbone, METHODS[method](num_prompts=num_prompts), 10)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


class Papers(nn.Module):
    """The papers' graph as `forward`."""

    def __init__(self, model: fp.PromptedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.reference_forward(images)


def compiled(model: nn.Module, images: Tensor) -> Run:
    run = torch.compile(torch.export.export(model, (images,)).module(), dynamic=False)
    with torch._inductor.config.patch(freezing=True):
        run(images)
    return run


def in_openvino(model: nn.Module, images: Tensor, precision: str) -> Run:
    import openvino

    program = torch.export.export(model, (images,))
    made = openvino.compile_model(
        openvino.convert_model(program),
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    request: Any = made.create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0].copy())


def in_onnxruntime(model: nn.Module, images: Tensor, folder: Path) -> Run:
    import onnxruntime

    torch.onnx.export(model, (images,), folder / "model.onnx", dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def products(model: fp.PromptedViT, batch: int) -> dict[tuple[int, int], Callable[[], Any]]:
    """oneDNN's bfloat16 product of each of a block's four Linears, by (in, out), for all patch tokens of a batch."""
    block, half = model.backbone.blocks[0], torch.bfloat16
    rows = batch * (1 + model.backbone.grid[0] * model.backbone.grid[1])
    found: dict[tuple[int, int], Callable[[], Any]] = {}
    for dense in (block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2):
        weight = dense.weight.detach().to(half)
        x = torch.randn(rows, weight.shape[1]).to(half)
        found[weight.shape[1], weight.shape[0]] = lambda x=x, weight=weight: F.linear(x, weight)
    return found


def product_rates(measured: dict[tuple[int, int], Callable[[], Any]], batch: int) -> dict[str, float]:
    """Measure the FLOP/s of each product over several calls in a row, because one call is short."""
    rates = {}
    for (k, n), run in measured.items():
        began = time.perf_counter()
        for _ in range(5):
            run()
        rates[f"{k} x {n}"] = 5 * 2 * batch * 197 * k * n / (time.perf_counter() - began)
    return rates


def interleaved(ways: dict[str, Run], images: Tensor, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return the seconds of each way in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - began)
    return seconds


def engines(model: fp.PromptedViT, batch: int) -> Iterator[tuple[str, Run]]:
    """Build an engine for each backend that can run; compile only in bfloat16, to save time."""
    for dtype, left_out in ((torch.bfloat16, ()), (torch.float32, ("compile",))):
        for name, backend in BACKENDS.items():
            if name not in left_out and not backend.reason(model):
                label = f"Engine, {str(dtype).removeprefix('torch.')} {name}"
                yield label, fp.Engine(model, (batch,), dtype, name)


@pytest.mark.parametrize(("method", "num_prompts", "batch"), CASES)
def test_one_adapter(
    benchmark: BenchmarkFixture, backbone: fp.FrozenViT, tmp_path: Path, method: str, num_prompts: int, batch: int
) -> None:
    pytest.importorskip("openvino")
    torch._dynamo.reset()
    model, images = model_of(backbone, method, num_prompts), torch.randn(batch, 3, 224, 224)
    with torch.no_grad():
        ways: dict[str, Run] = {"papers' graph, float32 eager": model.reference_forward}
        if method in ALL_WAYS:
            half = copy.deepcopy(model)
            half.set_backbone_dtype(torch.bfloat16)
            ways["papers' graph, bfloat16 compiled"] = compiled(Papers(half).eval(), images)
        ways["papers' graph, bfloat16 OpenVINO"] = in_openvino(Papers(in_float32(model)).eval(), images, "bf16")
        ways["papers' graph, float32 ONNX Runtime"] = in_onnxruntime(Papers(in_float32(model)).eval(), images, tmp_path)
        ways |= dict(engines(model, batch))
        expected = model.reference_forward(images)
        for name, run in ways.items():
            error = float((run(images).float() - expected).norm() / expected.norm())
            assert error < TOLERANCE[torch.float32 if "float32" in name else torch.bfloat16], f"{name}: {error}"
        rates: list[dict[str, float]] = []
        ways["products"] = lambda _: rates.append(product_rates(linears, batch))
        linears = products(model, batch)
        ways["products"](images)
        seconds = interleaved(ways, images)
        del seconds["products"], rates[0]
        flops = count_flops(lambda: ways["Engine, bfloat16 eager"](images))
        benchmark.pedantic(ways["Engine, bfloat16 openvino"], args=(images,), rounds=1)
    benchmark.extra_info |= {
        "job": "one adapter",
        "method": method,
        "num_prompts": num_prompts,
        "batch": batch,
        "flops": flops,
        "product_rates": rates,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"\n{method}, {num_prompts} prompts, batch {batch}:")
    for name, times in seconds.items():
        print(f"  {name:<40} {1000 * statistics.median(times):8.1f} ms")
    ways.clear()
    gc.collect()


@pytest.mark.parametrize("mixture", ["VPT-deep", "methods"])
def test_many_adapters(benchmark: BenchmarkFixture, backbone: fp.FrozenViT, mixture: str) -> None:
    """Compare 32 images of 32 adapters with 32 of one, in one engine: VPT-deep with 50 prompts, or mixed methods."""
    kinds = [("VPT-deep", 50)]
    if mixture == "methods":
        kinds += [("VPT-deep", 10), ("VAPT", 10), ("PGN", 16)]
    engine, images = fp.Engine(backbone, (32,), torch.bfloat16, "eager"), torch.randn(32, 3, 224, 224)
    for i in range(32):
        engine.add_adapter(f"adapter {i}", model_of(backbone, *kinds[i % len(kinds)], seed=i))
    names = [f"adapter {i}" for i in range(32)]
    ways: dict[str, Run] = {
        "one adapter, its own engine": fp.Engine(model_of(backbone, *kinds[0]), (32,), torch.bfloat16, "eager")
    }
    ways |= {
        f"one adapter: {method}, {num_prompts} prompts": lambda x, i=i: engine(x, adapter_names=32 * [names[i]])
        for i, (method, num_prompts) in enumerate(kinds)
    }
    ways["32 adapters"] = lambda x: engine(x, adapter_names=names)
    found = ways["32 adapters"](images)
    for i, name in enumerate(names):
        alone = engine(images[i : i + 1], adapter_names=[name])[0]
        assert (found[i] - alone).norm() < 5e-2 * alone.norm()
    for run in ways.values():
        run(images)
    seconds = interleaved(ways, images)
    benchmark.pedantic(ways["32 adapters"], args=(images,), rounds=1)
    benchmark.extra_info |= {
        "job": "many adapters",
        "mixture": mixture,
        "seconds": seconds,
        "of": len(kinds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name, times in seconds.items():
        print(f"\n  {name:<40} {1000 * statistics.median(times):8.1f} ms", end="")


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_of_200_adapters(benchmark: BenchmarkFixture, backbone: fp.FrozenViT) -> None:
    engine = fp.Engine(backbone, (1,), torch.bfloat16, "eager")
    engine.add_adapter("first", model_of(backbone, "VPT-deep", 50))
    before = resident()
    for i in range(200):
        engine.add_adapter(str(i), model_of(backbone, "VPT-deep", 50, seed=i))
    grown = resident() - before
    assert grown < 2**30
    benchmark.pedantic(engine, args=(torch.randn(1, 3, 224, 224),), rounds=1)
    benchmark.extra_info |= {
        "job": "memory",
        "bytes": grown,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(f"\n200 adapters: {grown / 2**20:.0f} MiB")
