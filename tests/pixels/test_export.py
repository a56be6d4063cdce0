from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

import fastprompt as fp
from fastprompt.adapters import Preprocessing
from fastprompt.pixels.export import cosine, export_client, golden_image, threshold, unnoticed
from fastprompt.pixels.graph import resampling, selection_graph


def make_backbone(num_classes: int = 0) -> fp.FrozenViT:
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=2, num_classes=num_classes)
    with torch.no_grad():
        for name, p in vit.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.3 if name == "pos_embed" else p[0].numel() ** -0.5)
    return fp.FrozenViT(vit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture
def backbone() -> fp.FrozenViT:
    return make_backbone()


def make(backbone: fp.FrozenViT, **options: Any) -> fp.PromptedViT:
    config = fp.RGBPGNConfig(**{"num_prompts": 4, "library_size": 12, "widths": (4, 8), **options})
    return fp.PromptedViT(backbone, config, num_classes=3).eval()


def named(backbone: fp.FrozenViT, name: str) -> fp.PromptedViT:
    return fp.PromptedViT(backbone, make(backbone).config, num_classes=2, class_names=[name, "b"])


def disturb(model: fp.PromptedViT) -> None:
    with torch.no_grad():
        for module in model.generator.trunk.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for values in (module.running_mean, module.weight, module.bias):
                    values.normal_(1, 0.2)
                module.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("trained", ["crop", "squash"])
def test_the_client_resizes_as_in_training(backbone: fp.FrozenViT, tmp_path: Path, trained: str) -> None:
    model = make(backbone)
    assert export_client(model, tmp_path)["preprocessing"]["resize"] == "crop"
    model.preprocessing = Preprocessing(trained)
    assert export_client(model, tmp_path)["preprocessing"]["resize"] == trained
    assert export_client(model, tmp_path, resize="crop")["preprocessing"]["resize"] == "crop"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stem_pool": False},
        {"resolution": 16},
        {"resolution": 32},
        {"resolution": 16, "resize": "short_side"},
        {"trunk": "resnet18"},
        {"activation": "sigmoid", "bounded": False},
        {"widths": (4, 4, 8, 8)},
    ],
    ids=str,
)
def test_the_graph_is_the_mixture_of_raw_pixels(backbone: fp.FrozenViT, options: dict[str, Any]) -> None:
    model = make(backbone, **options)
    disturb(model)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(selection_graph(model.generator, backbone))
    with torch.no_grad():
        expected = model.generator.mixture(backbone.normalise(images))
    for image, weights in zip(images, expected, strict=True):
        [found] = session.run(None, {"image": image.permute(1, 2, 0)[None].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), weights, rtol=1e-4, atol=1e-6)
    assert expected.std() > 1e-3


def test_the_graph_has_standard_operators_and_no_batch_norm(backbone: fp.FrozenViT) -> None:
    made = onnx.load_from_string(selection_graph(make(backbone, resolution=16).generator, backbone))
    assert {node.domain for node in made.graph.node} == {""}
    assert {node.op_type for node in made.graph.node} == {
        "Cast",
        "Transpose",
        "Div",
        "Sub",
        "MatMul",
        "Conv",
        "Relu",
        "MaxPool",
        "Add",
        "GlobalAveragePool",
        "Flatten",
        "Gemm",
        "Reshape",
        "Softmax",
    }


@pytest.mark.parametrize("antialias", [True, False])
def test_resampling_is_interpolates(antialias: bool) -> None:
    x = torch.rand(1, 2, 30, 40, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(x, size=(13, 17), mode="bilinear", antialias=antialias)
    rows, columns = resampling(30, 13, antialias), resampling(40, 17, antialias)
    torch.testing.assert_close(rows @ x @ columns.T, expected, rtol=1e-12, atol=1e-12)


def test_the_files_are_those_of_the_manifest(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    model = make(backbone)
    manifest = export_client(model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8")) == manifest
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*manifest["files"], "manifest.json"}
    for name, stated in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (stated["bytes"], stated["sha256"])
        assert name.endswith((".npy", ".png", ".onnx"))
    assert manifest["backbone"]["fingerprint"] == backbone.fingerprint
    assert manifest["backbone"]["mean"] == [0.4, 0.5, 0.6]
    assert manifest["picture_size"] == [40, 32]
    assert manifest["class_names"] == ["0", "1", "2"]


def test_the_library_is_bytes_and_what_rounding_took(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    model = make(backbone)
    export_client(model, tmp_path)
    library, rest = np.load(tmp_path / "library.npy"), np.load(tmp_path / "library_rest.npy")
    assert (library.dtype, rest.dtype, library.shape) == (np.uint8, np.float16, (12, 192))
    exact = torch.sigmoid(model.generator.library.double()).detach().numpy() * 255
    assert np.abs(library - exact).max() <= 0.5
    assert np.abs(library + rest.astype(float) - exact).max() < 2e-4


def test_the_golden_embedding_is_what_the_model_sees(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    model = make(backbone, placement="replace")
    export_client(model, tmp_path)
    golden = torch.from_numpy(np.array(Image.open(tmp_path / "golden_image.png"))).permute(2, 0, 1)[None]
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "golden_picture.png"))).permute(2, 0, 1)[None]
    assert torch.equal(picture, fp.RGBPrompts(model).pictures(golden))
    embedding = torch.from_numpy(np.load(tmp_path / "golden_embedding.npy"))
    with torch.no_grad():
        torch.testing.assert_close(embedding, model.forward_features(golden)[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(embedding, backbone.forward_features(picture)[0], rtol=1e-4, atol=1e-5)


def test_every_likely_mistake_is_noticed(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    manifest = export_client(make(backbone), tmp_path)
    names = {mistake["name"] for mistake in manifest["golden"]["mistakes"]}
    assert names == {
        "JPEG compression",
        "resizing",
        "cropping",
        "resizing and cropping",
        "blue and red swapped (BGR)",
        "other mean and standard deviation",
        "another readout",
        "mirroring",
        "no colours",
        "few colours",
    }
    assert all("4:4:4" in mistake for mistake in unnoticed(manifest))  # JPEG that is all but lossless
    assert 0.999 <= manifest["golden"]["threshold"] < manifest["golden"]["bfloat16_cosine"] < 1
    embeddings = torch.from_numpy(np.load(tmp_path / "mistakes.npy"))
    golden = torch.from_numpy(np.load(tmp_path / "golden_embedding.npy"))
    for row, mistake in zip(embeddings, manifest["golden"]["mistakes"], strict=True):
        assert cosine(row, golden) == pytest.approx(mistake["cosine"], abs=1e-6)


@pytest.mark.parametrize(
    ("rounded", "mistakes", "least"),
    [
        (0.9999, [], 0.999),
        (0.9999, [0.5, 0.985], 0.999),  # far below what would pass
        (0.9999, [0.9987], 0.9992),  # half way from there to 0.9997
        (0.9999, [0.9995, 0.985], 0.9996),
        (0.9999, [0.9995, 0.99975], 0.9996),  # the second is as near as a host in bfloat16 may be
        (0.9995, [0.9992], 0.999),
        (1.0, [0.9999], 0.999935),  # no host computes like ours to the last bit
        (0.0, [0.99], 0.999),
    ],
)
def test_the_threshold_is_between_the_nearest_mistake_and_bfloat16(
    rounded: float, mistakes: list[float], least: float
) -> None:
    assert threshold(rounded, mistakes) == pytest.approx(least, abs=1e-9)


def test_a_mistake_that_changes_nothing_is_named(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    grey = torch.full((3, 32, 32), 128, dtype=torch.uint8)
    model = fp.PromptedViT(backbone, fp.PixelPromptConfig(border=1), num_classes=3)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.zero_()
    missed = unnoticed(export_client(model, tmp_path, grey))
    assert any("JPEG" in text for text in missed)
    assert any("BGR" in text for text in missed)
    assert not any("mean" in text for text in missed)


@pytest.mark.parametrize("training", [True, False])
def test_export_leaves_the_model_in_its_mode(backbone: fp.FrozenViT, tmp_path: Path, training: bool) -> None:
    model = make(backbone).train(training)
    model.generator.trunk.stem.eval()  # as one who keeps a part's running statistics
    before = {name: module.training for name, module in model.named_modules()}
    export_client(model, tmp_path)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_the_golden_image_may_be_given(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    golden = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    export_client(make(backbone), tmp_path, golden)
    assert np.array_equal(np.array(Image.open(tmp_path / "golden_image.png")), golden.permute(1, 2, 0).numpy())
    assert torch.equal(golden_image(32, 32), golden_image(32, 32))


def test_an_inverted_pgn_keeps_its_offsets(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    model = fp.PromptedViT(backbone, fp.PGNConfig(num_prompts=4, library_size=5, widths=(4, 8)), num_classes=3)
    inverted = fp.RGBPrompts.invert(model, "extend", picture=True)
    manifest = export_client(inverted, tmp_path)
    assert (manifest["prompts"]["rest"], manifest["prompts"]["offset"], manifest["prompts"]["added"]) == (
        False,
        True,
        True,
    )
    assert np.load(tmp_path / "library.npy").dtype == np.float32
    generator = inverted.generator
    np.testing.assert_allclose(np.load(tmp_path / "offset.npy"), generator.offset.detach().numpy() * 255, rtol=1e-6)
    np.testing.assert_allclose(
        np.load(tmp_path / "added.npy"), generator.compensation.detach().permute(1, 2, 0).numpy() * 255, rtol=1e-6
    )


def test_a_second_export_replaces_the_first_and_a_failed_one_changes_nothing(
    backbone: fp.FrozenViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_client(make(backbone), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="no file was changed"):
            export_client(make(backbone), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    manifest = export_client(make(backbone), tmp_path)
    for name, stated in manifest["files"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == stated["sha256"]


@pytest.mark.parametrize(
    "name", ["generator.library", "generator.trunk.fc.weight", "head.weight", "generator.trunk.stem.1.running_var"]
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_refused(backbone: fp.FrozenViT, tmp_path: Path, name: str, value: float) -> None:
    model = make(backbone)
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1)[0] = value
    with pytest.raises(ValueError, match=rf"model\.{re.escape(name)} must be finite, got NaN or infinite values"):
        export_client(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_is_not_finite_is_refused(
    backbone: fp.FrozenViT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastprompt.pixels.export.host_features", lambda *_: torch.full((48,), float("nan")))
    with pytest.raises(ValueError, match="features of the golden picture must be finite"):
        export_client(make(backbone), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda b, out: export_client(fp.PromptedViT(b, fp.VPTConfig(num_prompts=2), 3), out),
            ValueError,
            "model must have pixel prompts",
        ),
        (lambda b, out: export_client(make(b, placement="latent"), out), ValueError, "model must have pixel prompts"),
        (lambda b, out: export_client(b, out), TypeError, "model must be a PromptedViT"),
        (
            lambda b, out: export_client(make(b), out, torch.zeros(3, 32, 32)),
            ValueError,
            "golden must be a uint8 tensor",
        ),
        (
            lambda b, out: export_client(make(b), out, torch.zeros(3, 16, 16, dtype=torch.uint8)),
            ValueError,
            r"golden must be a uint8 tensor \(3, 32, 32\)",
        ),
        (lambda b, out: export_client(make(b), out, "golden.png"), ValueError, "golden must be a uint8 tensor"),
        (
            lambda b, out: export_client(make(b), out, resize="stretch"),
            ValueError,
            r"resize must be one of \('crop', 'squash'\), got 'stretch'",
        ),
        (lambda b, out: export_client(make(b), out, resize=""), ValueError, "resize must be one of"),
        (lambda b, out: export_client(make(b), None), TypeError, "out_dir must be a folder's path, got None"),
        (lambda b, out: export_client(make(b), 3), TypeError, "out_dir must be a folder's path, got 3"),
        (lambda b, out: export_client(make(b), ""), TypeError, "out_dir must be a folder's path, got ''"),
        (lambda b, out: export_client(make(b), __file__), NotADirectoryError, "out_dir must be a folder, got the file"),
        (
            lambda b, out: export_client(named(b, "a\udcff"), out),
            ValueError,
            "model.class_names must be text that UTF-8 can encode",
        ),
    ],
)
def test_bad_input_is_named_and_writes_nothing(
    backbone: fp.FrozenViT,
    tmp_path: Path,
    call: Any,
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def work(*_: Any) -> None:
        raise AssertionError("the backbone was run")

    monkeypatch.setattr("fastprompt.pixels.export.host_features", work)
    with pytest.raises(error, match=message):
        call(backbone, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arrays_hold_no_pickles(backbone: fp.FrozenViT, tmp_path: Path) -> None:
    export_client(make(backbone), tmp_path)
    for path in tmp_path.glob("*.npy"):
        np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
