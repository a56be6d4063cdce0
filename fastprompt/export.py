"""`export_model`: a whole prompted model as one file for ONNX Runtime, PyTorch or OpenVINO.

The file is written beside its place, read back by the runtime that it is for, and compared with the model's own output.
Only then is it renamed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import fastprompt
from fastprompt.arguments import ArgumentError, ArgumentTypeError, NotFiniteError
from fastprompt.extras import needed
from fastprompt.files import Content, atomic_write_many
from fastprompt.model import GRAPHS, PromptedViT

SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "openvino": ".xml"}
"""The formats, and the suffix of each one's file; OpenVINO has its weights in a second file, `.bin`."""
INPUTS = {"uint8": torch.uint8, "float32": torch.float32}
TOLERANCE = 1e-3
"""Largest error of a file's output, relative to the largest magnitude of the model's in float64."""
OPSET = 18
_LARGEST_ONNX = 2**31 - 2**20
"""Bytes of tensors that one ONNX file can hold; protobuf ends at 2 GiB."""
_METADATA = "fastprompt"


def export_model(
    model: PromptedViT, path: str | os.PathLike[str], format: str | None = None, *, input: str = "uint8"
) -> dict[str, Any]:
    """Write the whole model, backbone included, as one file that other runtimes run; return what it records.

    The graph takes images of the backbone's size, (B, 3, H, W) with any B, under the name "images", and gives "logits"
    (B, C), or "features" (B, D) without a head. It is the rewritten graph in float32, for a Swin transformer the
    papers', with the prompts of the model as they are now: static ones are constants.

    The file records class names, backbone and fingerprint, input and image size as JSON under the key "fastprompt": in
    ONNX `metadata_props`, in a `.pt2` the extra file `fastprompt.json`, in OpenVINO `rt_info`.

    Args:
        model: a model in any dtype and on any device; it is copied.
        path: the file to write.
        format: "onnx" (ONNX Runtime), "pt2" (`torch.export`) or "openvino"; None: by the path's suffix, `.onnx`, `.pt2`
            or `.xml`.
        input: "uint8": the graph takes raw pixels and normalises them itself; "float32": it takes normalised images.

    Raises:
        TypeError, ValueError: an argument is invalid, or the model holds NaN or infinite values.
        ImportError: the packages of the format are not installed.
        RuntimeError: the format cannot express the model, or what was written computes something else; the file is not
            kept.
        OSError: the file cannot be written. In all cases nothing has changed.
    """
    if not isinstance(model, PromptedViT):
        raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ArgumentTypeError("path", f"must be a file's path, got {path!r}")
    target = Path(path)
    if format is None:
        format = next((name for name, suffix in SUFFIXES.items() if target.suffix == suffix), None)
        if format is None:
            raise ArgumentError("path", f"must end in {', '.join(SUFFIXES.values())} if no format is given, got {path}")
    if format not in SUFFIXES:
        raise ArgumentError("format", f"must be one of {tuple(SUFFIXES)}, got {format!r}")
    if target.suffix != SUFFIXES[format]:
        raise ArgumentError("path", f"must end in {SUFFIXES[format]} for format {format!r}, got {path}")
    if target.is_dir():
        raise ArgumentError("path", f"must be a file, got the folder {path}")
    if input not in INPUTS:
        raise ArgumentError("input", f"must be one of {tuple(INPUTS)}, got {input!r}")
    size = 4 * sum(p.numel() for p in model.parameters())
    if format == "onnx" and size > _LARGEST_ONNX:
        raise ArgumentError("format", f"must be 'pt2' or 'openvino' for {size:,} bytes of tensors: ONNX ends at 2 GiB")
    write, read = _FORMATS[format]()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NotFiniteError("model", f"must have finite values, got NaN or infinite ones in {name}")
    exact, images = _exact(model), _images(model, input)
    with torch.no_grad():
        expected = exact(images if input == "uint8" else images.double())
    plain = exact.float()
    plain.backbone.set_copies("folded")
    plain.backbone.folded()
    record = _record(model, input)
    program = _program(plain, images[:2])
    with tempfile.TemporaryDirectory(prefix="fastprompt-") as name:
        written = Path(name) / target.name
        write(program, written, json.dumps(record), "logits" if model.head is not None else "features")
        run = read(written)
        for chosen in (slice(0, 3), slice(0, 1)):
            with torch.no_grad():
                error = _error(run(images[chosen]), expected[chosen])
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{target} was not written: as {format}, the model's output is off by {error:.2g} of its largest "
                    f"value, at most {TOLERANCE:g} is accepted"
                )
        del run
        files: dict[str, Content] = {file.name: partial(_copy, file) for file in sorted(Path(name).iterdir())}
        atomic_write_many(target.parent, files)
    return record


def _copy(source: Path, file: BinaryIO) -> None:
    with open(source, "rb") as stream:
        shutil.copyfileobj(stream, file, 1 << 20)


def _exact(model: PromptedViT) -> PromptedViT:
    """A copy of the model in float64 on the CPU, in eval mode."""
    return copy.deepcopy(model).cpu().double().eval()


def _images(model: PromptedViT, input: str) -> Tensor:
    """Three images to compare outputs on: noise, the same on every machine."""
    height, width = model.backbone.image_size
    pixels = torch.randint(0, 256, (3, 3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return pixels if input == "uint8" else model.backbone.normalise(pixels.to(model.backbone.device)).cpu().float()


def _program(model: PromptedViT, images: Tensor) -> torch.export.ExportedProgram:
    """The graph for any number of images: the rewritten one, or the papers' where that is fixed to one batch size."""
    failure: Exception | None = None
    for graph in GRAPHS:
        model.set_graph(graph)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(images)  # what is kept of static prompts becomes constants
            try:
                return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
            except (RuntimeError, ValueError, torch._dynamo.exc.TorchDynamoException) as error:
                failure = error
    raise RuntimeError(f"the model cannot be exported for any number of images: {failure}") from failure


def _error(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _record(model: PromptedViT, input: str) -> dict[str, Any]:
    backbone = model.backbone
    return {
        "fastprompt_version": fastprompt.__version__,
        "method": model.config.to_dict(),
        "backbone": backbone.spec.name,
        "fingerprint": backbone.fingerprint,
        "image_size": list(backbone.image_size),
        "input": input,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "resize": None if model.preprocessing is None else model.preprocessing.resize,
        "num_classes": model.num_classes,
        "class_names": model.class_names,
    }


Write = Callable[[torch.export.ExportedProgram, Path, str, str], None]
Read = Callable[[Path], Callable[[Tensor], Tensor]]


def _onnx() -> tuple[Write, Read]:
    with needed("onnx", "an ONNX file"):
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  the exporter's

    def write(program: torch.export.ExportedProgram, path: Path, record: str, output: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=[output],
                verbose=False,
            )
        assert exported is not None
        proto = exported.model_proto
        onnx.helper.set_model_props(proto, {_METADATA: record})
        onnx.save(proto, str(path))

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return write, read


def _pt2() -> tuple[Write, Read]:
    def write(program: torch.export.ExportedProgram, path: Path, record: str, output: str) -> None:
        torch.export.save(program, path, extra_files={f"{_METADATA}.json": record})

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        module = torch.export.load(path).module()
        return lambda images: module(images)

    return write, read


def _openvino() -> tuple[Write, Read]:
    with needed("openvino", "an OpenVINO file"):
        import openvino

    def write(program: torch.export.ExportedProgram, path: Path, record: str, output: str) -> None:
        converted = openvino.convert_model(program)
        converted.inputs[0].set_names({"images"})
        converted.outputs[0].set_names({output})
        converted.set_rt_info(record, _METADATA)
        openvino.save_model(converted, path, compress_to_fp16=False)

    def read(path: Path) -> Callable[[Tensor], Tensor]:
        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return lambda images: torch.from_numpy(compiled(images.numpy())[0].copy())

    return write, read


_FORMATS: dict[str, Callable[[], tuple[Write, Read]]] = {"onnx": _onnx, "pt2": _pt2, "openvino": _openvino}
