"""The backends with which an `Engine` can run a model, in one table. Each turns a model into a function of images.

A backend takes a frozen model in eval mode and example images, and returns a function of images of that shape and
dtype. Its resources are freed with that function. Both are called without gradients and autocast, by one thread at a
time.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.engine.cuda_graph import GraphedForward
from fastprompt.int8.linear import is_int8
from fastprompt.kernels.dispatch import native_in_graphs
from fastprompt.model import PromptedViT

Run = Callable[[Tensor], Tensor]


class Backend(NamedTuple):
    """One way to run a model.

    Attributes:
        build: (model, example images (B, 3, H, W)) → function of such images.
        obstacle: (model) → why it cannot run here; empty if it can.
        any_batch: whether the function also takes other batch sizes.
        bakes: whether the model's tensors become constants of the function, which is rebuilt when they change.
        package: the package it needs; the fastprompt extra that installs it has the same name.
        int8: whether it runs Linears in int8.
    """

    build: Callable[[PromptedViT, Tensor], Run]
    obstacle: Callable[[PromptedViT], str] = lambda model: ""
    any_batch: bool = False
    bakes: bool = True
    package: str | None = None
    int8: bool = False

    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def reason(self, model: PromptedViT) -> str:
        """Return why it cannot run this model here; empty if it can."""
        if not self.is_installed():
            return f"{self.package} is not installed: pip install 'fastprompt[{self.package}]'"
        parts = model.backbone.kept_fold.value
        if not self.int8 and parts is not None and any(is_int8(block) for block in parts.blocks):
            return "int8 runs in eager alone"
        return self.obstacle(model)


def _eager(model: PromptedViT, images: Tensor) -> Run:
    return model


def _compile(model: PromptedViT, images: Tensor) -> Run:
    """Build with `torch.compile` and freezing.

    Exporting first keeps engines from sharing one function's recompilations. An eager call beforehand determines where
    the native kernels are faster; the graph calls them there.
    """
    import torch._inductor.config

    model(images)
    with native_in_graphs():
        program = torch.export.export(model, (images,))
    compiled = torch.compile(program.module(), dynamic=False)

    def run(images: Tensor) -> Tensor:
        with torch._inductor.config.patch(freezing=True):
            return compiled(images)

    run(images)
    return run


def _no_compiler(model: PromptedViT) -> str:
    if model.backbone.device.type != "cpu" or shutil.which(os.environ.get("CXX") or "g++"):
        return ""
    return "torch.compile needs a C++ compiler on a CPU: install g++ or set CXX"


PRECISIONS = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def _openvino(model: PromptedViT, images: Tensor) -> Run:
    """Build with OpenVINO from the float32 graph and the model's values; the model's dtype sets the precision."""
    import openvino

    threads, precision = torch.get_num_threads(), PRECISIONS[model.backbone.dtype]
    program = torch.export.export(in_float32(model), (images,))
    compiled = openvino.compile_model(
        openvino.convert_model(program),
        "CPU",
        {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads},
    )
    request: Any = compiled.create_infer_request()

    def run(images: Tensor) -> Tensor:
        outputs = request.infer([images.contiguous().numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(outputs[0].copy())

    run(images)
    return run


def in_float32(model: PromptedViT) -> PromptedViT:
    """Return a copy of the model that computes in float32."""
    copied = copy.deepcopy(model).float()
    copied.backbone.set_copies("folded")
    copied.backbone.folded()
    return copied


def _not_for_openvino(model: PromptedViT) -> str:
    if model.backbone.device.type != "cpu":
        return f"it runs on a CPU, the engine is on {model.backbone.device}"
    if model.backbone.dtype not in PRECISIONS:
        return f"it computes in float32 and 16 bits, not in {model.backbone.dtype}"
    return ""


def _cuda_graph(model: PromptedViT, images: Tensor) -> Run:
    """Build one launch for the whole forward. It reads the parameters in place, also after they change."""
    return _captured(GraphedForward(model, (len(images),)), images)


def _compiled_graph(model: PromptedViT, images: Tensor) -> Run:
    """Build one launch for the whole forward as Inductor compiles it, kernels tuned on the device."""
    return _captured(GraphedForward(model, (len(images),), compiled=True), images)


def _captured(graphed: GraphedForward, images: Tensor) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no CUDA graph")  # raised as an error here instead
        graphed.prepare(images)
    for reason in graphed.eager.values():
        raise RuntimeError(f"the forward cannot be captured: {reason}")
    return graphed


def _no_graphs(model: PromptedViT) -> str:
    device = model.backbone.device
    return "" if device.type == "cuda" else f"CUDA graphs need a CUDA or ROCm device, the engine is on {device}"


BACKENDS: dict[str, Backend] = {
    "eager": Backend(_eager, any_batch=True, bakes=False, int8=True),
    "cuda_graph": Backend(_cuda_graph, _no_graphs, bakes=False),
    "compiled_cuda_graph": Backend(_compiled_graph, _no_graphs, bakes=False),
    "compile": Backend(_compile, _no_compiler),
    "openvino": Backend(_openvino, _not_for_openvino, package="openvino"),
}
"""Backends by name; `backend="auto"` measures all that can run."""
