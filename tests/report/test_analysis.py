from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.report.analysis import analyse
from fastprompt.runs import execute as execute_module
from fastprompt.runs.execute import execute
from fastprompt.runs.settings import RunSettings

V2APT = {"num_prompts": 3, "num_instance": 2, "latent": 3, "hidden": 4}
PGN = {"num_prompts": 2, "library_size": 4, "widths": [4]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("analysis")
    random = np.random.default_rng(0)
    for folder, shades in (("day", (0, 60)), ("night", (120, 200))):
        for name, shade in zip(("a", "b"), shades, strict=True):
            (root / folder / name).mkdir(parents=True)
            for i in range(20):
                pixels = random.integers(shade, shade + 40, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / folder / name / f"{i}.png")
    return root


@pytest.fixture
def run(
    images: Path, tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, Any]], Path]:
    monkeypatch.setattr(execute_module, "backbone_at", lambda *_: fp.FrozenViT(tiny_vit))

    def make(method: str, options: dict[str, Any], **settings: Any) -> Path:
        recipe = {"epochs": 1, "warmup_epochs": 0, "kl_warmup_epochs": 0, "dtype": "float32"}
        chosen = RunSettings(method, str(images / "day"), options=options, recipe=recipe, num_val=10, **settings)
        execute(chosen, tmp_path / method, progress=False)
        return tmp_path / method

    return make


def titles(sections: list[dict[str, Any]]) -> list[str]:
    return [section["title"] for section in sections]


def test_a_run_shows_what_its_method_has(run: Callable[..., Path], tmp_path: Path) -> None:
    v2apt = run("v2apt", V2APT)
    found = analyse(v2apt, ["information", "latent", "similarity", "domains"], max_images=8)
    assert titles(found) == ["Mutual information with the labels", "Latent units", "Prompts and patches"]
    assert [row[0] for row in found[0]["table"]["rows"]] == ["generator", "backbone", "prompted"]
    assert "of 8 validation images" in found[0]["table"]["caption"]
    assert len(found[1]["figures"]) == 2
    page = tmp_path / "report.html"
    assert main(["report", str(v2apt), "--analysis", "latent", "--out", str(page)]) == 0
    assert "KL of each latent unit to its prior over 10 validation images" in page.read_text()
    assert main(["report", str(v2apt), "--out", str(page)]) == 0
    assert "latent unit to its prior" not in page.read_text()


def test_a_run_of_several_data_sets_shows_its_domains(images: Path, run: Callable[..., Path]) -> None:
    pgn = run("pgn", PGN, more_data=(str(images / "night"),))
    [domains] = analyse(pgn, ["latent", "domains"])
    assert domains["title"] == "Domains"
    assert [row[0] for row in domains["table"]["rows"]] == ["mixture", "backbone"]
    assert "Tokens that carry nine tenths of a domain's weight: day " in domains["table"]["caption"]


def test_what_cannot_be_analysed(run: Callable[..., Path], tmp_path: Path) -> None:
    linear = run("linear-sgd", {})
    assert analyse(linear, ["latent", "similarity", "domains"]) == []
    with pytest.raises(ValueError, match="analysis must be of information, latent, similarity, domains, got 'colour'"):
        analyse(linear, ["colour"])
    with pytest.raises(ValueError, match="max_images must be at least 1"):
        analyse(linear, ["latent"], max_images=0)
    with pytest.raises(FileNotFoundError):
        analyse(tmp_path / "none", ["latent"])
