"""A folder of pictures becomes an adapter and a list of predictions."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import pytest
from documented import offline, prepare

import fastprompt as fp

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "adapt_folder.py"


def test_it_learns_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tmp_path)
    offline(monkeypatch, tiny=True)
    monkeypatch.chdir(tmp_path)
    words = ["birds", "--image-size", "32", "--epochs", "6", "--out", "adapter"]
    runpy.run_path(str(EXAMPLE))["main"](words)
    printed = capsys.readouterr().out
    assert "test accuracy 1.000" in printed
    with open("adapter/predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["predicted"] for row in rows] == [row["class"] for row in rows]
    assert {row["class"] for row in rows} == {"owl", "robin"}
    backbone = fp.load_backbone("vit_base_patch16_224", image_size=32)
    assert fp.PromptedViT.from_pretrained(backbone, "adapter").class_names == ["owl", "robin"]
