from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pixels
import pytest
import table
import torch
from timm.models.vision_transformer import VisionTransformer
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.generators import get_method
from fastprompt.runs.settings import RunSettings
from fastprompt.train.recipes import Recipe

LABELS = [0, 1] * 20


@pytest.fixture
def backbone(tiny_vit: VisionTransformer) -> fp.FrozenViT:
    return fp.FrozenViT(tiny_vit, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randint(0, 256, (70, 3, 32, 32), dtype=torch.uint8), torch.zeros(70))


def spread(model: fp.PromptedViT, data: TensorDataset) -> fp.PromptedViT:
    """With a head that tells images apart."""
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(-model.eval()(data.tensors[0]).mean(0))
    return model


@pytest.mark.parametrize("placement", ["extend", "replace"])
def test_the_png_of_rgb_prompts_gives_what_the_model_predicts(
    backbone: fp.FrozenViT, data: TensorDataset, placement: str
) -> None:
    config = fp.RGBPGNConfig(num_prompts=4, library_size=6, widths=(4, 8), placement=placement)
    model = spread(fp.PromptedViT(backbone, config, num_classes=5), data)
    found = pixels.classify_pictures(model, data)
    images = data.tensors[0]
    assert found["png"] == model(images).argmax(-1).tolist()
    assert len(set(found["png"])) > 1
    unrounded, _ = pixels.in_pixels(model)
    assert (unrounded.generator.config.round_pixels, model.generator.config.round_pixels) == (False, True)
    assert found["float"] == unrounded(images).argmax(-1).tolist()


def test_a_border_is_cut_off_and_rounded_in_a_png_alone(backbone: fp.FrozenViT, data: TensorDataset) -> None:
    model = spread(fp.PromptedViT(backbone, fp.PixelPromptConfig(border=10), num_classes=5), data)
    with torch.no_grad():
        model.generator.top.mul_(20)  # far outside of what a picture can hold
    found = pixels.classify_pictures(model, data)
    assert found["float"] == model(data.tensors[0]).argmax(-1).tolist()
    assert found["png"] != found["float"]
    pictures = pixels.through_png(fp.RGBPrompts(model).pictures(data.tensors[0][:3]))
    torch.testing.assert_close(pictures, fp.RGBPrompts(model).pictures(data.tensors[0][:3]))


def test_a_pgn_of_tokens_is_inverted(backbone: fp.FrozenViT, data: TensorDataset) -> None:
    config = fp.PGNConfig(num_prompts=4, library_size=6, widths=(4, 8))
    model = spread(fp.PromptedViT(backbone, config, num_classes=5), data)
    found = pixels.classify_pictures(model, data)
    floats, pictures = pixels.in_pixels(model)
    assert (floats.generator.config.round_pixels, pictures.generator.config.round_pixels) == (False, True)
    agreeing = sum(p == q for p, q in zip(found["float"], model(data.tensors[0]).argmax(-1).tolist(), strict=True))
    assert agreeing >= 68  # 3 · 8² numbers to a patch of 48: exact, up to float32


def test_variants_are_methods_with_options() -> None:
    plan = pixels.plan_of("mnist5k", Path("nowhere"), (0,))
    for row in pixels.ROWS:
        settings = table.Job(row, None, 1, True).settings(plan.base)
        get_method(settings.method).config(settings.options)
        assert table.Job(row, None, 1, True).directory(plan.out) == Path("nowhere") / row / "lrdefault-seed1"
    settings = table.Job("rgb-replace", 0.01, 1, True).settings(plan.base)
    assert (settings.method, settings.options["placement"], settings.augment) == ("rgb-pgn", "replace", "none")


def test_tables_of_runs_and_their_pictures(tmp_path: Path) -> None:
    plan = pixels.plan_of("mnist5k", tmp_path / "mnist5k", (0, 1))
    for method, wrong, wrong_png in (("linear", 8, None), ("pgn-14", 4, 9), ("rgb-extend", 5, 6), ("pixel", 7, 7)):
        for lr in plan.grid(method):
            for seed in plan.seeds:
                finish(plan, table.Job(method, lr, seed, True), wrong + seed, wrong_png)
    where = ["--out", str(tmp_path), "--results", str(tmp_path)]
    assert pixels.main(["--data", "mnist5k", "--seeds", "0", "1", "--tables-only", *where]) == 0
    rows = {row["method"]: row for row in json.loads((tmp_path / "pixels.json").read_text())["mnist5k"]}
    assert set(rows) == {"linear", "pgn-14", "rgb-extend", "pixel"}
    png = rows["rgb-extend"]["pictures"]["png"]
    assert png["accuracy"] == pytest.approx(1 - 6 / 40)
    assert png["changed"] == [1, 0]
    assert png["to_latent"]["mean"] == pytest.approx(-(6 - 4.5) / 40)
    assert png["to_border"]["mean"] == pytest.approx((7.5 - 6) / 40)
    assert rows["linear"]["pictures"] == {}
    text = (tmp_path / "pixels.md").read_text()
    assert "| PGN in pixels, image extended | 1,010 | 1,000 | 0.003 | 0.8625" in text
    assert "-3.8" in text


def finish(plan: table.Plan, job: table.Job, wrong: int, wrong_png: int | None) -> None:
    """Write a run's results and pictures: the first images are misclassified."""
    directory = job.directory(plan.out)
    directory.mkdir(parents=True, exist_ok=True)
    answers = [1 - y if i < wrong else y for i, y in enumerate(LABELS)]
    results: dict[str, Any] = {
        "method": job.method, "config": {}, "backbone": "tiny", "backbone_fingerprint": "f", "image_size": 112,
        "data": {}, "machine": "m", "torch_version": "0", "recipe": Recipe(epochs=3, batch_size=4).to_dict(),
        "trained_parameters": {"total": 1010, "generator": 1000, "head": 10, "backbone": 0},
        "paper_parameter_count": None, "images_per_second": 3.0, "history": [{"images_per_second": 1.0}],
        "peak_memory_mib": 100.0, "seconds": 1.0, "validation": {"accuracy": 0.5 if job.lr == 0.01 else 0.6, "loss": 1},
        "test": {"accuracy": 1 - wrong / 40, "labels": LABELS, "predictions": answers},
    }  # fmt: skip
    (directory / "results.json").write_text(json.dumps(results))
    if wrong_png is not None:
        png = [1 - y if i < wrong_png else y for i, y in enumerate(LABELS)]
        (directory / "pictures.json").write_text(json.dumps({"float": answers, "png": png}))


def test_settings_of_a_run_are_kept_apart_by_the_row(tmp_path: Path) -> None:
    plan = pixels.plan_of("fashion-mnist", tmp_path, (0,))
    extend, shrink = (table.Job(row, 0.01, 0, True) for row in ("rgb-extend", "rgb-replace"))
    assert extend.directory(plan.out) != shrink.directory(plan.out)
    assert RunSettings.from_dict(extend.settings(plan.base).to_dict()).options["placement"] == "extend"


def test_a_finished_run_without_its_adapter_is_lost_unless_its_pictures_are_classified(tmp_path: Path) -> None:
    plan = pixels.plan_of("mnist5k", tmp_path, [0, 1, 2])
    kept = {0: "pictures.json", 1: "best"}
    runs = {seed: table.Job("pixel", 0.01, seed, True).directory(tmp_path) for seed in plan.seeds}
    for seed, run in runs.items():
        run.mkdir(parents=True)
        (run / "results.json").write_text("{}")
        if seed in kept:
            (run / kept[seed]).touch()
    table.Job("rgb-extend", 0.003, 0, True).directory(tmp_path).mkdir(parents=True)  # it is not finished
    assert pixels.lost_adapters(plan) == [runs[2]]
    assert pixels.unclassified(plan) == []
    for seed in runs:
        finish(plan, table.Job("pixel", 0.01, seed, True), 1, None)
    assert pixels.unclassified(plan) == [runs[1], runs[2]]
