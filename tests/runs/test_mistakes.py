"""The worst mistakes of a run: which, with what file and picture, and the report that shows them."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_backbones import write_backbone
from PIL import Image

from fastprompt.report import build_report
from fastprompt.runs.execute import execute
from fastprompt.runs.mistakes import SIDE, WORST, worst_mistakes
from fastprompt.runs.settings import RunSettings
from fastprompt.train.evaluate import summarise


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on noise that learns nothing, so that it makes mistakes."""
    root = tmp_path_factory.mktemp("mistakes")
    backbone = write_backbone(root / "vit", embed_dim=24, depth=1)
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "images" / name).mkdir(parents=True)
        for i in range(10):
            pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "images" / name / f"{i}.png")
    settings = RunSettings(
        "vpt-deep",
        str(root / "images"),
        backbone,
        options={"num_prompts": 2},
        recipe={"epochs": 1, "dtype": "float32", "batch_size": 8, "lr": 1e-9, "head_lr": 1e-9},
        num_val=8,
    )
    execute(settings, root / "run", progress=False, device="cpu")
    return root / "run"


class Images(list[tuple[torch.Tensor, int]]):
    def file_of(self, index: int) -> None:
        return None


def images_of(count: int, shape: tuple[int, ...]) -> Images:
    return Images((torch.full(shape, 10 * i, dtype=torch.uint8), i % 2) for i in range(count))


def evaluated(right: list[float]) -> Any:
    """An evaluation of two classes in which image i gives its own label this probability."""
    labels = torch.arange(len(right)) % 2
    own = torch.tensor(right)
    probabilities = torch.stack([torch.where(labels == c, own, 1 - own) for c in range(2)], dim=1)
    return summarise(probabilities.log(), labels, 1.0)


def test_the_surest_mistakes_come_first() -> None:
    found = worst_mistakes(evaluated([0.9, 0.4, 0.1, 0.6, 0.3]), images_of(5, (3, 8, 8)))
    assert [each["index"] for each in found] == [2, 4, 1]
    assert [each["label"] for each in found] == [0, 0, 1]
    assert [each["predicted"] for each in found] == [1, 1, 0]
    assert np.allclose([each["probability"] for each in found], [0.9, 0.7, 0.6])
    assert [each["file"] for each in found] == [None] * 3
    picture = Image.open(io.BytesIO(base64.b64decode(found[0]["picture"])))
    assert picture.size == (8, 8)
    assert picture.getpixel((0, 0)) == (20, 20, 20)


def test_many_large_grey_and_other_images() -> None:
    wrong = evaluated([0.1] * 20)
    large = worst_mistakes(wrong, images_of(20, (1, 200, 100)))
    assert len(large) == WORST
    picture = Image.open(io.BytesIO(base64.b64decode(large[0]["picture"])))
    assert picture.size == (SIDE // 2, SIDE)
    assert picture.mode == "L"
    assert {each["picture"] for each in worst_mistakes(wrong, images_of(20, (4, 8, 8)))} == {None}
    assert worst_mistakes(evaluated([0.9] * 4), images_of(4, (3, 8, 8))) == []


def test_a_run_names_the_files_and_its_report_shows_them(small_run: Path, tmp_path: Path) -> None:
    results = json.loads((small_run / "results.json").read_text())
    record = results["validation"]
    wrong = [i for i, (y, p) in enumerate(zip(record["labels"], record["predictions"], strict=True)) if y != p]
    assert sorted(each["index"] for each in record["mistakes"]) == wrong
    assert wrong
    for each in record["mistakes"]:
        assert Path(each["file"]).parent.name == results["class_names"][each["label"]]
        assert Path(each["file"]).is_file()
    page = build_report([small_run], tmp_path / "report.html").read_text()
    assert f"The {len(wrong)} worst mistakes" in page
    for each in record["mistakes"]:
        each["picture"] = None
    assert "worst mistakes" not in build_report([results], tmp_path / "bare.html").read_text()
