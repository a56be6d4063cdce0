from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.analysis.library import library_usage
from fastprompt.data import load_data
from fastprompt.runs.directory import read_settings
from fastprompt.runs.execute import PROBE_VIEWS, execute, run_probe
from fastprompt.runs.settings import RunSettings
from fastprompt.train import probe as probe_module
from fastprompt.train.recipes import adjusted_recipe


def test_a_method_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method must be one of .*vpt-deep.* got 'lora'"):
        RunSettings(method="lora", data="x")


def test_settings_of_another_version_are_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"method": "pgn", "data": "x", "colour": 1}))
    with pytest.raises(ValueError, match="colour"):
        read_settings(tmp_path)
    assert read_settings(tmp_path / "a" / "b") is None


def pgn(tiny_vit: Any) -> tuple[fp.PromptedViT, TensorDataset]:
    config = fp.PGNConfig(num_prompts=2, library_size=8, widths=(4, 4, 4, 4))
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), config, num_classes=3)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    return model, TensorDataset(images, torch.zeros(5, dtype=torch.long))


def test_library_usage_of_flat_and_of_one_token_mixtures(tiny_vit: Any) -> None:
    model, data = pgn(tiny_vit)
    fc = model.generator.trunk.fc
    with torch.no_grad():
        fc.weight.zero_()
        fc.bias.zero_()
    flat = library_usage(model, data, batch_size=2)
    assert flat["mean_weight"] == pytest.approx([1 / 8] * 8)
    assert flat["effective_tokens"] == pytest.approx(8)
    assert flat["effective_library"] == pytest.approx(8)
    with torch.no_grad():
        fc.bias.view(2, 8)[0, 3] = 100  # the first prompt is token 3, the second token 5
        fc.bias.view(2, 8)[1, 5] = 100
    peaked = library_usage(model, data, batch_size=2)
    assert peaked["mean_weight"] == pytest.approx([0, 0, 0, 0.5, 0, 0.5, 0, 0])
    assert peaked["effective_tokens"] == pytest.approx(1)
    assert peaked["effective_library"] == pytest.approx(2)
    assert model.training


def test_the_probe_is_fitted_to_several_views_where_images_are_augmented(
    tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    fitted: list[Any] = []
    fit_linear_probe = probe_module.fit_linear_probe

    def record(model: Any, train: Any, val: Any) -> Any:
        fitted.append((train, val))
        return fit_linear_probe(model, train, val)

    monkeypatch.setattr(probe_module, "fit_linear_probe", record)
    backbone = fp.FrozenViT(tiny_vit)
    config = fp.LinearProbeConfig()
    recipe = adjusted_recipe("linear", {"dtype": "float32"})
    for augment, views in (("none", 1), ("flip", PROBE_VIEWS)):
        splits = load_data(tmp_path / "images", image_size=32, augment=augment)
        model = fp.PromptedViT(backbone, config, num_classes=2)
        results = run_probe(model, splits, recipe, tmp_path / augment)
        (features, labels), (of_val, _) = fitted[-1]
        assert len(features) == len(labels) == views * len(splits.train)
        assert labels.tolist() == splits.train.labels * views
        assert len(of_val) == len(splits.val)
        assert results["images_per_second"] == pytest.approx((len(features) + len(of_val)) / results["seconds"])
        assert (tmp_path / augment / "best" / "adapter_config.json").exists()
    of_view = features.view(views, len(splits.train), -1)
    assert len({view.numpy().tobytes() for view in of_view}) == views, "the same view several times"


def test_wrong_input_that_only_the_training_finds_leaves_nothing(
    tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.setattr("fastprompt.runs.execute.backbone_at", lambda *_: fp.FrozenViT(tiny_vit))
    for method, recipe in (("linear", {}), ("vpt-deep", {"head_init": "probe"})):
        settings = RunSettings(method, str(tmp_path / "images"), num_train=1, recipe={"epochs": 1, **recipe})
        with pytest.warns(UserWarning, match="no training image"), pytest.raises(ValueError, match="two classes"):
            execute(settings, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()


def test_a_record_whose_adapter_was_not_kept_is_trained_again_for_its_test(
    tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(8):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.setattr("fastprompt.runs.execute.backbone_at", lambda *_: fp.FrozenViT(tiny_vit))
    settings = RunSettings("vpt-deep", str(tmp_path / "images"), recipe={"epochs": 1, "dtype": "float32"})
    first = execute(settings, tmp_path / "run", progress=False)
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and path.name not in ("run.json", "results.json"):
            path.unlink()
    assert execute(settings, tmp_path / "run", progress=False) == first
    tested = execute(settings, tmp_path / "run", test=True, progress=False)
    assert tested["validation"]["predictions"] == first["validation"]["predictions"]
    assert tested["test"]["num_images"] > 0


def test_library_usage_needs_a_library_and_images(tiny_vit: Any) -> None:
    model, data = pgn(tiny_vit)
    with pytest.raises(ValueError, match="dataset"):
        library_usage(model, TensorDataset(torch.empty(0, 3, 32, 32), torch.empty(0)))
    vpt = fp.PromptedViT(model.backbone, fp.VPTConfig(num_prompts=2), num_classes=3)
    with pytest.raises(TypeError, match=r"model.*VPT"):
        library_usage(vpt, data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON"),
        ("[1]", "holds a list, not a JSON object"),
        ('{"method": "pgn"}', "run.json: has no 'data'"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)
