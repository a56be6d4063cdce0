from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import fastprompt.data
import fastprompt.vit.assets
from fastprompt.fetch import FetchError
from fastprompt.report import demo


def test_from_nothing_to_the_report(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    (tmp_path / "vit").mkdir()
    save_file(model.state_dict(), tmp_path / "vit" / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": sizes, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 32, 32], "num_classes": 0}
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)
    for name, low in (("dark", 0), ("light", 128)):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(15):
            Image.fromarray(random.integers(low, low + 127, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    flags = [
        "--backbone",
        f"local-dir:{tmp_path / 'vit'}",
        "--image-size",
        "32",
        "--data",
        str(tmp_path / "images"),
    ]
    flags += ["--num-train", "8", "--num-val", "4", "--num-test", "6", "--epochs", "1", "--threads", "1"]
    flags += ["--methods", "linear", "pgn", "--out", str(tmp_path / "demo")]
    assert demo.main(flags) == 0
    shown = capfd.readouterr().out
    for method in ("linear", "pgn"):
        results = json.loads((tmp_path / "demo" / method / "results.json").read_text())
        assert results["test"]["num_images"] == 6
        assert f"{results['trained_parameters']['total']:,}" in shown
        assert f"{results['peak_memory_mib']:,.0f}" in shown
    report = (tmp_path / "demo" / "report.html").read_text()
    assert "Most-used library tokens" in report
    assert str(tmp_path / "demo" / "report.html") in shown


def test_a_failing_method_ends_the_demo_with_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "fetch", lambda data, *_: data)
    flags = ["--data", "no/such/folder", "--methods", "linear", "--out", str(tmp_path / "demo")]
    assert demo.main(flags) == 2
    assert not (tmp_path / "demo" / "report.html").exists()


def test_mnist_stands_in_only_where_fashion_mnist_cannot_be_had(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    reachable = {"fashion-mnist": False}

    def load_data(name: str, **_: Any) -> None:
        asked.append(name)
        if not reachable.get(name, True):
            raise FetchError("no network")

    monkeypatch.setattr(fastprompt.data, "load_data", load_data)
    monkeypatch.setattr(fastprompt.vit.assets, "load_backbone", lambda *_, **__: None)
    assert demo.fetch(None, "clip-vit-b16", 112) == "mnist5k"
    assert asked == ["fashion-mnist", "mnist5k"]
    assert "no network" in capsys.readouterr().out
    with pytest.raises(FetchError):
        demo.fetch("fashion-mnist", "clip-vit-b16", 112)
    reachable["fashion-mnist"] = True
    assert demo.fetch(None, "clip-vit-b16", 112) == "fashion-mnist"


@pytest.mark.parametrize(("error", "text"), [(FetchError, "no network"), (ValueError, "name: no such folder")])
def test_what_cannot_be_fetched_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    error: type[Exception],
    text: str,
) -> None:
    def load_data(*_: Any, **__: Any) -> None:
        raise error(text)

    monkeypatch.setattr(fastprompt.data, "load_data", load_data)
    assert demo.main(["--data", "x", "--out", str(tmp_path / "demo")]) == 1
    assert capsys.readouterr().err == f"demo: error: {text}\n"
    assert not (tmp_path / "demo").exists()
