"""The whole model as a file: each runtime computes what the model computes, wrong files and arguments are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt import export
from fastprompt.export import export_model
from fastprompt.generators import PromptConfig

PICTURES = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def run_pt2(path: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    extra = {"fastprompt.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module()(images), json.loads(extra["fastprompt.json"])


def run_onnx(path: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [value.name for value in (*session.get_inputs(), *session.get_outputs())] == ["images", "logits"]
    output = session.run(["logits"], {"images": images.numpy()})[0]
    return torch.from_numpy(output), json.loads(session.get_modelmeta().custom_metadata_map["fastprompt"])


def run_openvino(path: Path, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
    import openvino

    model = openvino.Core().read_model(path)
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    output = compiled({"images": images.numpy()})["logits"]
    return torch.from_numpy(output.copy()), json.loads(model.get_rt_info("fastprompt").astype(str))


READERS = {"pt2": run_pt2, "onnx": run_onnx, "openvino": run_openvino}


@pytest.fixture
def backbone(make_vit: Callable[..., VisionTransformer]) -> fp.FrozenViT:
    return fp.FrozenViT(make_vit(depth=1), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


@pytest.fixture
def model(backbone: fp.FrozenViT, randomised: Callable[..., nn.Module]) -> fp.PromptedViT:
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), num_classes=3, class_names=["a", "b", "c"])
    randomised(model.generator)
    return model.eval()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("format", READERS)
def test_each_runtime_computes_what_the_model_computes(format: str, model: fp.PromptedViT, tmp_path: Path) -> None:
    path = tmp_path / f"model{export.SUFFIXES[format]}"
    record = fp.export_model(model, path)
    assert names_in(tmp_path) == sorted({path.name, *(["model.bin"] if format == "openvino" else [])})
    found, read = READERS[format](path, PICTURES)
    torch.testing.assert_close(found, model(PICTURES), rtol=1e-4, atol=1e-5)
    assert read == record
    assert record["class_names"] == ["a", "b", "c"]
    assert record["fingerprint"] == model.backbone.fingerprint
    assert (record["input"], record["image_size"], record["mean"]) == ("uint8", [32, 32], [0.4, 0.5, 0.6])


@pytest.mark.parametrize("method", ["pgn", "v2apt"])
def test_prompts_that_depend_on_the_image(
    method: str, configs: dict[str, PromptConfig], backbone: fp.FrozenViT, tmp_path: Path
) -> None:
    model = fp.PromptedViT(backbone, configs[method], num_classes=2).eval()
    fp.export_model(model, tmp_path / "model.pt2")
    found, _ = run_pt2(tmp_path / "model.pt2", PICTURES)
    torch.testing.assert_close(found, model(PICTURES), rtol=1e-4, atol=1e-5)


def test_normalised_images_and_features_in_16_bits(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    """The file is in float32 whatever the model computes in; without a head it gives features."""
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2, deep=False)).train()
    expected = model(PICTURES)
    model.set_backbone_dtype(torch.bfloat16)
    record = fp.export_model(model, tmp_path / "model.pt2", input="float32")
    assert record["num_classes"] is None
    assert model.training
    assert model.backbone_dtype == torch.bfloat16
    found, _ = run_pt2(tmp_path / "model.pt2", model.backbone.normalise(PICTURES).float())
    assert float((found - expected).norm() / expected.norm()) < 0.05  # weights rounded to 16 bits


def test_a_swin_transformer(tiny_swin: Callable[..., nn.Module], tmp_path: Path) -> None:
    model = fp.PromptedViT(
        fp.FrozenViT(tiny_swin(depths=(2,), num_heads=(1,))), fp.VPTConfig(num_prompts=2), num_classes=2
    ).eval()
    fp.export_model(model, tmp_path / "model.pt2")
    torch.testing.assert_close(run_pt2(tmp_path / "model.pt2", PICTURES)[0], model(PICTURES), rtol=1e-4, atol=1e-5)


def test_a_file_that_computes_something_else_is_refused(
    model: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.pt2").write_bytes(b"before")
    program = export._program

    def another(model: fp.PromptedViT, images: Tensor) -> Any:
        with torch.no_grad():
            model.head.bias.add_(0.5)
        return program(model, images)

    monkeypatch.setattr(export, "_program", another)
    with pytest.raises(RuntimeError, match=r"model\.pt2 was not written: as pt2, the model's output is off by \d"):
        fp.export_model(model, tmp_path / "model.pt2")
    assert names_in(tmp_path) == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"before"


def test_a_failed_write_leaves_the_old_file(
    model: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.pt2").write_bytes(b"before")

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no file was changed"):
        fp.export_model(model, tmp_path / "model.pt2")
    assert names_in(tmp_path) == ["model.pt2"]
    assert (tmp_path / "model.pt2").read_bytes() == b"before"


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("model", {}, "path must end in .onnx, .pt2, .xml if no format is given"),
        ("model.bin", {"format": "openvino"}, "path must end in .xml for format 'openvino'"),
        ("model.pt2", {"format": "tflite"}, "format must be one of"),
        ("model.pt2", {"input": "int8"}, "input must be one of"),
        ("folder.pt2", {}, "path must be a file, got the folder"),
    ],
)
def test_wrong_arguments_are_named(
    model: fp.PromptedViT, tmp_path: Path, path: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        fp.export_model(model, tmp_path / path, **options)
    assert names_in(tmp_path) == ["folder.pt2"]


def test_other_models_and_values_are_refused(
    model: fp.PromptedViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TypeError, match="model must be a PromptedViT, got FrozenViT"):
        export_model(model.backbone, tmp_path / "model.pt2")  # type: ignore[arg-type]
    monkeypatch.setattr(export, "_LARGEST_ONNX", 1000)
    with pytest.raises(ValueError, match=r"format must be 'pt2' or 'openvino' for .* bytes of tensors"):
        fp.export_model(model, tmp_path / "model.onnx")
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"model must have finite values, got NaN or infinite ones in head\.bias"):
        fp.export_model(model, tmp_path / "model.pt2")
    assert names_in(tmp_path) == []
