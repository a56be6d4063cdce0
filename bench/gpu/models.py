"""Stages of whole models: are replays right, and what do our graph and the papers' cost, eager, captured and compiled.

ViT-B/16 at 224 px with random weights and a head of 100 classes, the backbone in bfloat16. A dry run has a tiny ViT in
float32, a capturer that records a CPU's operations (`tests/support/recorded_graphs.py`) and a compiler that returns
what it gets. Times are of calls one behind the other, until the device is idle. Peak memory is that of building and
running one way, with the weights that its graph reads.
"""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
from recorded_graphs import RecordingCapturer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp
from fastprompt.engine.cuda_graph import Capturer, CudaCapturer, GraphedForward, GraphedTrainStep, cross_entropy
from fastprompt.engine.engine import TOLERANCE
from fastprompt.generators import PromptConfig
from fastprompt.train.callbacks import Step
from gpu import ROOT, floors
from gpu.device import Call, Place, captured, measure, rates, synchronize
from gpu.jobs import Job, NotRun, Row

NUM_CLASSES = 100
METHODS: dict[str, PromptConfig] = {
    "VPT-deep 10": fp.VPTConfig(num_prompts=10),
    "VPT-deep 50": fp.VPTConfig(num_prompts=50),
    "VPT-deep 100": fp.VPTConfig(num_prompts=100),
    "VAPT 50": fp.VAPTConfig(num_prompts=50),
    "V²APT 50": fp.V2APTConfig(num_prompts=50, num_instance=25),
    "PGN 16": fp.PGNConfig(),
}
TINY: dict[str, PromptConfig] = {
    "VPT-deep 10": fp.VPTConfig(num_prompts=2),
    "VAPT 50": fp.VAPTConfig(num_prompts=2, hidden=4),
    "V²APT 50": fp.V2APTConfig(num_prompts=2, num_instance=1, latent=3, hidden=5),
    "PGN 16": fp.PGNConfig(num_prompts=2, library_size=5, widths=(4,)),
}
BATCHES = (32, 1, 8, 128, 256)
TRAINED = (32, 64)
ADAPTERS = 32
COMPILE_SECONDS = 60.0  # that the compiled ways of one model take
DEVICE_TESTS = ROOT / "tests" / "engine" / "cuda_graph" / "test_device.py"


class Setting(NamedTuple):
    """What is measured at a place."""

    backbone: fp.FrozenViT
    methods: dict[str, PromptConfig]
    batches: tuple[int, ...]
    trained: tuple[int, ...]
    adapters: int
    capturer: Callable[[], Capturer]
    compiler: Callable[..., Any]

    def images(self, batch: int) -> Tensor:
        generator = torch.Generator(self.backbone.device).manual_seed(batch)
        size = (batch, 3, *self.backbone.image_size)
        return torch.randn(size, device=self.backbone.device, generator=generator)

    def model(self, method: str) -> fp.PromptedViT:
        torch.manual_seed(0)
        return fp.PromptedViT(self.backbone, self.methods[method], NUM_CLASSES).eval()


@functools.cache
def setting(place: Place) -> Setting:
    torch.manual_seed(0)
    if place.dry:
        vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0)
        return Setting(fp.FrozenViT(vit), TINY, (2,), (2,), 3, RecordingCapturer, lambda function, **options: function)
    vit = timm.create_model("vit_base_patch16_224", num_classes=0)
    backbone = fp.FrozenViT(vit).to(device=place.device, dtype=torch.bfloat16)
    device = backbone.device
    return Setting(backbone, METHODS, BATCHES, TRAINED, ADAPTERS, lambda: CudaCapturer(device), torch.compile)


def replays(place: Place) -> Iterator[Job]:
    """Jobs of the parity stage: replays of whole models against float64."""
    for method in setting(place).methods:
        yield Job({"op": "whole model", "case": method}, lambda method=method: replayed(place, method))


def replayed(place: Place, method: str) -> Row:
    """Replays under the tolerance of the gates, before and after parameters change in place, full and padded."""
    s = setting(place)
    model, images = s.model(method), s.images(4)
    exact = fp.PromptedViT(copy.deepcopy(s.backbone).double(), model.config, NUM_CLASSES).eval()
    graphed, shares, exactly = GraphedForward(model, (4,), capturer=s.capturer()), [], True
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="no CUDA graph")
        for _ in range(2):
            with torch.no_grad():
                for _, parameter in model.trainable_parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))  # some start at zero
            exact.load_adapter_state_dict(model.adapter_state_dict())
            for count in (4, 3):
                x = images[:count]
                with torch.no_grad():
                    truth, eager = exact(x.double()), model(x)
                found = graphed(x)
                error, peer = (float((output.double() - truth).abs().max()) for output in (found, eager))
                budget = 2 * peer + torch.finfo(s.backbone.dtype).eps * float(truth.abs().max())
                if not error <= budget:
                    raise AssertionError(f"the error of a replay of {count} images, {error}, is above {budget}")
                shares.append(error / budget)
                exactly &= torch.equal(found, eager)
    graphed.release()
    return {
        "dtype": str(s.backbone.dtype).split(".")[1],
        "how": "replayed" + ", the bits of eager" * exactly,
        "tensors": len(shares),
        "of budget": max(shares),
    }


def graphs(place: Place) -> Iterator[Job]:
    """The tests of CUDA graphs that need a device."""

    def run() -> Row:
        if place.dry:
            raise NotRun("the tests need a device")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(DEVICE_TESTS)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ran.returncode:
            raise AssertionError(ran.stdout[-8000:] + ran.stderr[-2000:])
        return {"found": ran.stdout.strip().splitlines()[-1]}

    yield Job({"tests": DEVICE_TESTS.name}, run)
    yield Job({"tests": "fp.fit waits for nothing within an epoch"}, lambda: fitted(place, compiled=False))
    if not place.dry:
        name = "fp.fit waits for nothing within an epoch, compiled"
        yield Job({"tests": name}, lambda: fitted(place, compiled=True), COMPILE_SECONDS)


class Unwaiting(fp.Callback):
    """Makes whatever waits for the device an error, from the first step of an epoch to its last."""

    def __init__(self, mode: Callable[[str], Any]) -> None:
        self.mode, self.steps = mode, 0

    def on_step(self, step: Step) -> None:
        if step.step == 1:
            self.mode("error")
        elif step.step == step.steps:
            self.mode("default")
        else:
            self.steps += 1


def fitted(place: Place, compiled: bool) -> Row:
    """Train two epochs with `fp.fit`; in the second, whose implementations are chosen, no step may wait."""
    s = setting(place)
    batch, model = s.trained[0], s.model("VPT-deep 10")
    images = torch.randint(0, 256, (8 * batch, 3, *s.backbone.image_size), dtype=torch.uint8)
    data = images, torch.arange(len(images)) % NUM_CLASSES
    recipe = fp.default_recipe("vpt-deep").replace(
        epochs=1, batch_size=batch, warmup_epochs=0, dtype="float32" if place.dry else "bfloat16", compile=compiled
    )
    watch = Unwaiting((lambda mode: None) if place.dry else torch.cuda.set_sync_debug_mode)
    fp.fit(model, data, data, recipe, progress=False)
    try:
        fp.fit(model, data, data, recipe, progress=False, callbacks=[watch])
    finally:
        watch.mode("default")
    return {"found": f"{watch.steps} steps"}


def inference(place: Place) -> Iterator[Job]:
    """Our graph and the papers', eager and captured, for all models; then compiled ones where time is left."""
    s = setting(place)
    for batch, method in itertools.product(s.batches, s.methods):
        labels = {"method": method, "batch": batch}
        yield Job(labels, lambda m=method, b=batch: inferred(place, m, b, compiled=False))
    yield from itertools.islice(autotuned(place), 1 if place.dry else None)


def autotuned(place: Place) -> Iterator[Job]:
    """Compiled models beside our captured one."""
    s = setting(place)
    for batch, method in itertools.product(s.batches, s.methods):
        labels = {"method": method, "batch": f"{batch}, beside compilers"}
        seconds = 0.0 if place.dry else COMPILE_SECONDS
        yield Job(labels, lambda m=method, b=batch: inferred(place, m, b, compiled=True), seconds)


def inferred(place: Place, method: str, batch: int, compiled: bool) -> list[Row]:
    """Times of a forward in all ways, those with a compiler or those without."""
    s = setting(place)
    model, images = s.model(method), s.images(batch)
    built: list[GraphedForward] = []

    def graph() -> Call:
        built.append(GraphedForward(model, (batch,), capturer=s.capturer()))
        return lambda: built[0](images, borrow=True)

    def papers(mode: str) -> Call:
        call = s.compiler(model.reference_forward, mode=mode, dynamic=False)
        return lambda: stepped(call, images)

    def ours() -> Call:
        call = s.compiler(model, mode="max-autotune-no-cudagraphs", dynamic=False)
        return captured(place, [lambda: call(images)])

    ways: dict[str, Callable[[], Call]] = {"ours, graph": graph}
    if compiled:
        torch._dynamo.reset()
        ways |= {"ours, compiled in a graph": ours}
        ways |= {f"papers', {mode}": functools.partial(papers, mode) for mode in ("reduce-overhead", "max-autotune")}
    else:
        ways |= {"ours, eager": lambda: lambda: model(images)}
        ways |= {"papers', eager": lambda: lambda: model.reference_forward(images)}
    with torch.no_grad():
        rows = model_rows(place, model, batch, False, ways)
    for graphed in built:
        graphed.release()
    return rows


def stepped(call: Callable[..., Any], *arguments: Any) -> Any:
    torch.compiler.cudagraph_mark_step_begin()
    return call(*arguments)


def training(place: Place) -> Iterator[Job]:
    """Training steps, with AdamW, of our graph and the papers'."""
    s = setting(place)
    for compiled, batch, method in itertools.product((False, True), s.trained, s.methods):
        if compiled and place.dry and method != "PGN 16":
            continue
        labels = {"method": method, "batch": f"{batch}, beside compilers" if compiled else batch}
        seconds = COMPILE_SECONDS if compiled and not place.dry else 0.0
        yield Job(labels, lambda m=method, b=batch, c=compiled: trained(place, m, b, c), seconds)


def trained(place: Place, method: str, batch: int, compiled: bool) -> list[Row]:
    """Times of a training step in all ways, each on generator and head of its own."""
    s = setting(place)
    images, labels = s.images(batch), torch.arange(batch, device=s.backbone.device) % NUM_CLASSES
    built: list[GraphedTrainStep] = []

    def graph() -> Call:
        model = s.model(method).train()
        built.append(GraphedTrainStep(model, optimizer_of(model, captured=True), capturer=s.capturer()))
        return lambda: built[0](images, labels)

    def plain(forward: Callable[[fp.PromptedViT], Callable[..., Any]]) -> Call:
        model = s.model(method).train()
        return step_of(model, forward(model), images, labels)

    def compiler(mode: str, papers: bool) -> Callable[[fp.PromptedViT], Callable[..., Any]]:
        return lambda model: s.compiler(model.reference_forward if papers else model, mode=mode, dynamic=False)

    ways: dict[str, Callable[[], Call]] = {"ours, graph": graph}
    if compiled:
        torch._dynamo.reset()
        ways |= {"ours, default": lambda: plain(compiler("default", papers=False))}
        ways |= {
            f"papers', {mode}": lambda mode=mode: plain(compiler(mode, papers=True))
            for mode in ("default", "max-autotune")
        }
    else:
        ways |= {"ours, eager": lambda: plain(lambda model: model)}
        ways |= {"papers', eager": lambda: plain(lambda model: model.reference_forward)}
    rows = model_rows(place, s.model(method), batch, True, ways)
    for graphed in built:
        graphed.release()
    return rows


def optimizer_of(model: fp.PromptedViT, captured: bool = False) -> torch.optim.Optimizer:
    """AdamW; SGD on a CPU, where a capturable AdamW does not run."""
    trained = [p for _, p in model.trainable_parameters()]
    if model.backbone.device.type == "cpu":
        return torch.optim.SGD(trained, lr=1e-4)
    return torch.optim.AdamW(trained, lr=1e-4, capturable=captured)


def step_of(model: fp.PromptedViT, forward: Callable[..., Any], images: Tensor, labels: Tensor) -> Call:
    """The step that a graph holds, as a loop would write it."""
    optimizer, loss = optimizer_of(model), cross_entropy(model)

    def step() -> None:
        optimizer.zero_grad()
        logits, aux = stepped(lambda: forward(images, return_aux=True))
        loss(logits, labels, aux).backward()
        optimizer.step()

    return step


def model_rows(
    place: Place, model: fp.PromptedViT, batch: int, trains: bool, ways: dict[str, Callable[[], Call]]
) -> list[Row]:
    """Rows of the ways' times, with images per second, peak memory and shares of the floor by this device's rates."""
    peaks: dict[str, float] = {}

    def prepare(name: str, build: Callable[[], Call]) -> tuple[Call, int]:
        before = start_peak(place)
        call = build()
        for _ in range(1 if place.dry else 5):  # compiles, warms up and captures
            call()
        synchronize(place)
        peaks[name] = (peak(place) - before + floors.resident(model, papers=name.startswith("papers"))) / 2**20
        return call, 1

    floor = floors.floor(model, batch, trains)
    rows = measure(
        place,
        {name: functools.partial(prepare, name, build) for name, build in ways.items()},
        1e6 * floor.seconds(*rates(place)),
        lambda name: {"MiB": peaks[name]},
    )
    return [row | {"images/s": 1e6 * batch / row["µs"]["median"]} if "µs" in row else row for row in rows]


def start_peak(place: Place) -> int:
    """Forget earlier peaks; returns what is allocated now."""
    gc.collect()
    if place.dry:
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(place: Place) -> int:
    return 0 if place.dry else torch.cuda.max_memory_allocated()


def mixed(place: Place) -> Iterator[Job]:
    """Images of as many VPT-deep adapters, served in one batch and one by one."""
    yield Job({"method": "VPT-deep 10", "adapters": setting(place).adapters}, lambda: served(place))


def served(place: Place) -> list[Row]:
    """Times of all ways to serve them, after a comparison with each adapter's own outputs."""
    s, models = setting(place), []
    for seed in range(s.adapters):
        torch.manual_seed(seed)
        models.append(fp.PromptedViT(s.backbone, s.methods["VPT-deep 10"], NUM_CLASSES).eval())
    images, names = s.images(s.adapters), [f"adapter {i}" for i in range(s.adapters)]
    single = images.split(1)
    graphs = [GraphedForward(model, (1,), capturer=s.capturer()) for model in models]
    with fp.Engine(s.backbone, (s.adapters,), s.backbone.dtype, "eager") as engine, torch.no_grad():
        for name, model in zip(names, models, strict=True):
            engine.add_adapter(name, model)
        expected = torch.cat([model(x) for model, x in zip(models, single, strict=True)]).double()

        def close(outputs: Sequence[Tensor]) -> None:
            error = float((torch.stack(list(outputs)).double() - expected).norm() / expected.norm())
            if not error < TOLERANCE[s.backbone.dtype]:
                raise AssertionError(f"the outputs are off by {error:.2g} of the adapters' own")

        def checked(call: Call, flat: Callable[[Any], Sequence[Tensor]] = lambda x: x) -> tuple[Call, int]:
            close(flat(call()))
            call()
            return call, 1

        rows = measure(
            place,
            {
                "mixed batch": lambda: checked(lambda: engine(images, adapter_names=names)),
                "one adapter": lambda: (lambda: engine(images, adapter_names=s.adapters * names[:1]), 1),
                "batch 1, eager": lambda: checked(
                    lambda: [model(x)[0] for model, x in zip(models, single, strict=True)]
                ),
                "batch 1, graph": lambda: checked(
                    lambda: [graph(x)[0] for graph, x in zip(graphs, single, strict=True)]
                ),
            },
            1e6 * floors.floor(models[0], s.adapters, False).seconds(*rates(place)),
        )
    for graph in graphs:
        graph.release()
    mixture = next((row["µs"]["median"] for row in rows if row["way"] == "mixed batch" and "µs" in row), None)
    if mixture is None:
        return rows
    return [row | {"× the mixed batch": row["µs"]["median"] / mixture} if "µs" in row else row for row in rows]
