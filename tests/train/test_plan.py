"""The plan of a run: what it says is what `fit` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import fastprompt as fp
from fastprompt.generators import PromptConfig
from fastprompt.train.constants import Constants

Pair = tuple[Tensor, Tensor]


@pytest.fixture
def data() -> Pair:
    return torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8), torch.arange(9) % 3


@pytest.fixture
def make(make_vit: Callable[..., Any]) -> Callable[[PromptConfig], fp.PromptedViT]:
    backbone = fp.FrozenViT(make_vit())
    return lambda config: fp.PromptedViT(backbone, config, num_classes=3)


@pytest.mark.parametrize(
    ("config", "fields", "reads"),
    [
        (fp.VQTConfig(2), {}, "constants"),
        (fp.VQTConfig(2), {"cache": "keys", "cache_dtype": "bfloat16"}, "constants"),
        (fp.VPTConfig(2, first_block=1), {}, "constants"),
        (fp.VQTConfig(2), {"cache": "none"}, "images"),
        (fp.VQTConfig(2), {"cache_gib": 1e-6}, "images"),
        (fp.VPTConfig(2), {}, "images"),
        (fp.VPTConfig(2), {"mixup": 0.5}, "images"),
        (fp.LinearProbeConfig(), {}, "features"),
        (fp.LinearProbeConfig(), {"cutmix": 0.5}, "images"),
    ],
)
def test_fit_does_what_the_plan_says(
    make: Callable[..., Any],
    data: Pair,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: PromptConfig,
    fields: dict[str, Any],
    reads: str,
) -> None:
    model, fields = make(config), {"epochs": 2, "batch_size": 4, "dtype": "float32", **fields}
    plan = fp.plan(model, data, data, **fields)
    assert plan.reads == reads
    kept: list[int] = []
    original = Constants.kept
    monkeypatch.setattr(
        Constants, "kept", lambda self, *which: (found := original(self, *which), kept.append(found[0].nbytes))[0]
    )
    forwards: list[int] = []
    model.backbone.register_forward_pre_hook(lambda *_: None)
    count = model.forward
    monkeypatch.setattr(model, "forward", lambda images, **rest: forwards.append(len(images)) or count(images, **rest))
    fp.fit(model, data, data, progress=True, **fields)
    said = capsys.readouterr().err
    assert plan.said in said
    constants = [entry for entry in plan.entries if entry.place and not entry.what.startswith("decoded")]
    if reads == "constants":
        assert kept == [entry.bytes for entry in constants]
        assert "kept for all epochs" in plan.said
    else:
        assert not kept
    steps = sum(size for size in forwards if size > 2)
    assert (steps >= 2 * 18) == (reads == "images")  # the trial forward alone has two images
    if reads == "features":
        assert constants[0].bytes == 18 * model.feature_width * 4


def test_the_text_names_places_and_sizes(make: Callable[..., Any], data: Pair, tmp_path: Path) -> None:
    plan = fp.plan(make(fp.VQTConfig(2)), data, data, dtype="float32", cache_dir=tmp_path)
    text = str(plan)
    assert f"inputs of 3 blocks (train, 9 images): kept in {tmp_path}" in text
    assert "decoded images (val, 9 images): kept in memory, 0.0 MiB; they were given as tensors" in text
    assert "patch embeddings (train and val, 18 images): not kept" in text
    assert plan.bytes[str(tmp_path)] > 0
    assert not list(tmp_path.iterdir())  # nothing is computed but one image
    reasons = str(fp.plan(make(fp.VPTConfig(2)), data, data))
    assert "results of the frozen blocks (train and val, 18 images): not kept; prompts enter the first block" in reasons


def test_decoded_images_of_files(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        folder = tmp_path / ("red" if i % 2 else "blue")
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    model = make(fp.VPTConfig(2))
    kept = fp.load_data(tmp_path, image_size=32, augment="flip")
    plan = fp.plan(model, kept.train, kept.val)
    size = 3 * 32 * 32 * (len(kept.train) + len(kept.val))
    assert plan.bytes == {"memory": size}
    monkeypatch.setattr("fastprompt.data.splits.KEEP_BYTES", 0)
    read = fp.load_data(tmp_path, image_size=32)
    plan = fp.plan(model, read.train, read.val)
    assert plan.bytes == {}
    assert "the data set reads them in every epoch" in str(plan)
    plan = fp.plan(make(fp.VQTConfig(2)), read.train, read.val)
    assert "decoded images (train, " in str(plan)
    assert "they are read once" in str(plan)


def test_a_loader_and_wrong_arguments(make: Callable[..., Any], data: Pair) -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data), 3)
    assert "the DataLoader reads them" in str(fp.plan(make(fp.VQTConfig(2)), loader, data))
    with pytest.raises(ValueError, match="epoch must be a field of the recipe"):
        fp.plan(make(fp.VQTConfig(2)), data, data, epoch=3)
