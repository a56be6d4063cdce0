from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastprompt as fp
import fastprompt.train.run as run_module
from fastprompt.adapters import Preprocessing, read_adapter, write_adapter
from fastprompt.cli import main
from fastprompt.cli.adapt import adapt_settings
from fastprompt.cli.main import parse
from fastprompt.cli.options import data_name
from fastprompt.cost import Sizes, cost
from fastprompt.data import LabelTable, files as data_files, read_images
from fastprompt.generators import VPTConfig
from fastprompt.int8 import weights
from fastprompt.kernels import native
from fastprompt.runs.execute import backbone_at
from fastprompt.runs.settings import RunSettings
from fastprompt.train.loop import Loop
from fastprompt.train.recipes import adjusted_recipe

COLOURS = {"blue": (0, 0, 200), "green": (0, 200, 0), "red": (200, 0, 0)}


def make_backbone(directory: Path, seed: int) -> str:
    """A tiny random ViT in timm's own folder format; returns its name for --backbone."""
    torch.manual_seed(seed)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, num_classes=0, **sizes)
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors")
    config = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0}
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": sizes,
        "pretrained_cfg": config,
        "num_classes": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return f"local-dir:{directory}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny backbone, another one, and labelled images of three colours."""
    root = tmp_path_factory.mktemp("cli")
    make_backbone(root / "vit", 0)
    make_backbone(root / "other", 1)
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        folder = root / "images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = np.clip(np.array(colour) + random.integers(-40, 40, (32, 32, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


def adapt_command(place: Path, out: Path, *more: str, method: str = "vpt-deep") -> list[str]:
    sizes = ["--num-train", "18", "--num-val", "6", "--num-test", "6"]
    recipe = [
        "--epochs",
        "3",
        "--batch-size",
        "6",
        "--lr",
        "0.02",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--no-progress",
    ]
    where = ["--backbone", f"local-dir:{place / 'vit'}", "--data", str(place / "images"), "--out", str(out)]
    return ["adapt", "--method", method, *where, *sizes, *recipe, *more]


@pytest.fixture(scope="module")
def run_dir(place: Path) -> Path:
    """A finished run with its test record."""
    out = place / "run"
    options = ["--set", "library_size=16", "widths=(4, 4, 8, 8)", "--num-prompts", "3", "--test"]
    assert main(adapt_command(place, out, *options, method="pgn")) == 0
    return out


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error on stderr: exactly one line, no traceback; what was announced before the work is left out."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    lines = [line for line in text.splitlines() if line and not line.startswith("cpu (")]
    assert len(lines) == 1, text
    return lines[0]


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastprompt {fp.__version__}\n"


@pytest.mark.parametrize(
    ("words", "compared"),
    [
        (("--epochs", "10"), True),
        (("--epochs", "9"), False),
        (("--epochs", "1", "--compare-probe", "yes"), True),
        (("--epochs", "10", "--compare-probe", "no"), False),
        (("--epochs", "10", "--method", "linear-sgd"), False),
        (("--epochs", "10", "--recipe.loss", "bce", "--recipe.label-smoothing", "0"), True),  # of class labels
        (("--epochs", "10", "--more-data", "{images}", "--labels", "per-domain"), None),
    ],
)
def test_long_runs_are_compared_with_a_linear_probe(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], compared: bool | None
) -> None:
    """`compared` None: there is no probe to compare with."""
    shutil.copytree(place / "images", tmp_path / "others")
    words = tuple(word.format(images=tmp_path / "others") for word in words)
    command = adapt_command(place, tmp_path / "run", "--lr", "1e-9", "--recipe.head-lr", "1e-9", *words)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert main(command) == 0
    said = [str(warning.message) for warning in warned] + [capsys.readouterr().err]
    assert any("below that of a linear probe" in text for text in said) == bool(compared)


def test_adapt_writes_the_run(run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    assert results["config"]["library_size"] == 16
    assert results["config"]["num_prompts"] == 3
    assert results["config"]["widths"] == [4, 4, 8, 8]
    assert results["recipe"]["lr"] == 0.02
    assert [entry["epoch"] for entry in results["history"]] == [1, 2, 3]
    assert results["test"]["num_images"] == 6
    assert np.trace(results["test"]["confusion"]) == round(results["test"]["accuracy"] * 6)
    assert len(results["library"]["mean_weight"]) == 16
    assert sum(results["library"]["mean_weight"]) == pytest.approx(1)
    assert 1 <= results["library"]["effective_tokens"] <= results["library"]["effective_library"] <= 16 + 1e-9
    saved = load_file(run_dir / "best" / "adapter_model.safetensors")
    assert results["trained_parameters"]["generator"] == sum(
        tensor.numel()
        for name, tensor in saved.items()
        if name.startswith("generator.") and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )
    assert not list(run_dir.rglob("*.tmp"))


def test_a_finished_run_is_not_run_again(
    run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module.Run, "one_epoch", lambda *_: pytest.fail("trained again"))
    command = ["--set", "library_size=16", "widths=(4, 4, 8, 8)", "--num-prompts", "3"]
    assert main(adapt_command(place, run_dir, *command, method="pgn")) == 0
    results = json.loads((run_dir / "results.json").read_text())
    shown = capsys.readouterr().out
    assert "PGN" in shown
    assert f"{results['trained_parameters']['total']:,}" in shown
    assert f"{results['test']['accuracy']:.4f}" in shown


def test_other_settings_need_another_directory(run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_dir / "results.json").read_bytes()
    assert main(adapt_command(place, run_dir, method="pgn")) == 2
    line = error_line(capsys)
    assert "out" in line
    assert "options" in line
    assert "--no-resume" in line
    assert (run_dir / "results.json").read_bytes() == before


def test_eval_agrees_with_the_run(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "eval.json"
    assert main(["eval", str(run_dir), "--split", "test", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    test = json.loads((run_dir / "results.json").read_text())["test"]
    for key in ("accuracy", "mean_per_class", "confusion", "labels", "predictions"):
        assert found[key] == test[key]
    shown = capsys.readouterr().out
    assert f"accuracy        {test['accuracy']:.4f}" in shown
    assert all(name in shown for name in COLOURS)


def test_eval_compares_int8_with_float32(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are calibrated once, on training images, and kept; predict takes their file."""
    monkeypatch.setattr(weights, "cache_dir", lambda: tmp_path)
    out = tmp_path / "eval.json"
    command = ["eval", str(run_dir), "--split", "test", "--dtype", "int8", "--against", "float32", "--out", str(out)]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "calibrating int8 weights on 18 training images" in shown.err
    assert "difference      +0.0000 [+0.0000, +0.0000] over images" in shown.out
    found = json.loads(out.read_text())
    test = json.loads((run_dir / "results.json").read_text())["test"]
    assert found["against"]["accuracy"] == test["accuracy"]
    assert found["against"]["agreement"] == 1
    assert main(command) == 0
    assert "calibrating" not in capsys.readouterr().err
    (file,) = (tmp_path / "int8").iterdir()
    predict = ["predict", str(run_dir), str(place / "images"), "--out", str(out)]
    predictions = []
    for options in (["--dtype", "int8", "--int8", str(file)], ["--dtype", "float32"]):
        assert main([*predict, *options]) == 0
        predictions.append(json.loads(out.read_text())["images"])
    for ours, exact in zip(*predictions, strict=True):
        assert ours["class"] == exact["class"]
        assert ours["probability"] != exact["probability"]
    assert main(["eval", str(run_dir), "--against", "float32", "--corruptions", "fog"]) == 2
    assert "against" in error_line(capsys)
    assert main(["eval", str(run_dir), "--dtype", "int8", "--keep-check"]) == 2
    assert "--keep-check must be given with --dtype int8 --against float32" in error_line(capsys)
    adapter = tmp_path / "adapter"
    shutil.copytree(run_dir / "best", adapter)
    of_adapter = ["eval", str(adapter), "--data", str(place / "images"), "--backbone", f"local-dir:{place / 'vit'}"]
    assert main([*of_adapter, *command[4:8], "--keep-check"]) == 0
    assert f"kept in {adapter}; passed: engines may choose int8" in capsys.readouterr().out
    kept = fp.PromptedViT.from_pretrained(fp.load_backbone(f"local-dir:{place / 'vit'}"), adapter).int8_check
    assert kept.passed
    assert kept.weights == fp.Int8Weights.load(file).digest


def test_eval_matches_classes_by_name(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(adapt_command(place, run, method="linear")) == 0
    for name in ("green", "red"):
        shutil.copytree(place / "images" / name, tmp_path / "two" / name)
    out, whole = tmp_path / "two.json", tmp_path / "whole.json"
    with pytest.warns(UserWarning, match="lacks blue of the model's 3"):
        assert main(["eval", str(run), "--data", str(tmp_path / "two"), "--out", str(out)]) == 0
    assert main(["eval", str(run), "--data", str(place / "images"), "--out", str(whole)]) == 0
    found, all_three = json.loads(out.read_text()), json.loads(whole.read_text())
    assert found["class_names"] == all_three["class_names"] == sorted(COLOURS)
    assert set(found["labels"]) == {1, 2}
    assert found["per_class"][0] is None
    assert all_three["accuracy"] > 0.8
    assert found["accuracy"] > 0.8
    shutil.copytree(place / "images" / "red", tmp_path / "two" / "violet")
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(tmp_path / "two")]) == 2
    assert "got images of violet" in capsys.readouterr().err


def test_eval_finds_a_folder_that_was_given_relative_to_another_place(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    command = adapt_command(place, tmp_path / "run", method="linear")
    command[command.index("--data") + 1] = "images"
    assert main(command) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "run"]) == 0


def test_a_bare_adapter_stands_alone(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, photo = tmp_path / "adapter", str(place / "images" / "red" / "3.png")
    shutil.copytree(run_dir / "best", bare)
    assert main(["predict", str(run_dir), photo, "--dtype", "float32"]) == 0
    of_run = capsys.readouterr().out
    assert main(["predict", str(bare), photo, "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == of_run
    assert main(["info", str(bare)]) == 0
    assert "fits this backbone" not in capsys.readouterr().out  # no weights are fetched to print what a file says
    assert main(["info", str(bare), "--cost"]) == 0
    assert re.search("fits this backbone +yes", capsys.readouterr().out)
    assert main(["eval", str(bare)]) == 2
    assert "--data" in error_line(capsys)
    assert main(["eval", str(bare), "--data", str(place / "images"), "--num-val", "6"]) == 0
    assert "val: 6 images" in capsys.readouterr().out


def test_an_adapter_of_an_earlier_version_needs_a_backbone(
    place: Path, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    bare, photo = repository / "tests" / "golden" / "saved" / "vpt-deep", str(place / "images" / "red" / "3.png")
    assert main(["predict", str(bare), photo]) == 2
    assert "--backbone is required" in error_line(capsys)
    assert main(["predict", str(bare), photo, "--backbone", f"local-dir:{place / 'vit'}"]) == 2
    assert "another backbone" in error_line(capsys)


def test_predict_resizes_as_in_training(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], repository: Path
) -> None:
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3).eval()
    model.head.weight.data.normal_()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for resize in ("crop", "squash"):
        model.preprocessing = Preprocessing(resize)
        model.save_pretrained(tmp_path / resize)
        images, _ = read_images(tmp_path / "wide.png", 32, resize=resize)
        expected = model(images).softmax(-1)[0]
        assert main(["predict", str(tmp_path / resize), str(tmp_path / "wide.png"), "--dtype", "float32"]) == 0
        row = capsys.readouterr().out.splitlines()[1].split(",")
        assert [float(p) for p in row[3:]] == pytest.approx(expected.tolist(), abs=1e-5)


def test_predict_csv_and_json(run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = [str(place / "images" / "red" / "3.png"), str(place / "images" / "blue")]
    table, tree = tmp_path / "p.csv", tmp_path / "p.json"
    assert main(["predict", str(run_dir), *inputs, "--out", str(table), "--batch-size", "5"]) == 0
    assert main(["predict", str(run_dir), *inputs, "--out", str(tree)]) == 0
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 13
    assert rows[0]["file"] == inputs[0]
    images = json.loads(tree.read_text())["images"]
    for row, image in zip(rows, images, strict=True):
        probabilities = {name: float(row[f"p({name})"]) for name in COLOURS}
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == image["class"] == max(probabilities, key=probabilities.__getitem__)
        assert image["probabilities"] == pytest.approx(probabilities, abs=1e-5)
    capsys.readouterr()
    assert main(["predict", str(run_dir), inputs[0]]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "file,class,probability,p(blue),p(green),p(red)"


def test_predict_writes_nothing_when_an_image_is_broken(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (place / "images" / "red" / "0.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "p.csv"
    assert main(["predict", str(run_dir), str(tmp_path), "--out", str(out)]) == 2
    assert "torn.png" in error_line(capsys)
    assert not out.exists()


def test_device_number_format_and_sizes_are_said_before_the_work(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(adapt_command(place, tmp_path / "run", "--device", "cpu")) == 0
    model = fp.PromptedViT.from_pretrained(backbone_at(f"local-dir:{place / 'vit'}", None), tmp_path / "run" / "best")
    total = sum(p.numel() for p in model.parameters())
    trained = model.num_trainable()["total"]
    said = f"cpu (1 threads), float32; 18 train, 6 val, 6 test images of 3 classes; {trained:,} of {total:,} parameters"
    assert said in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "results.json").read_text())["device"] == "cpu (1 threads), float32"
    assert main(["eval", str(tmp_path / "run"), "--split", "test"]) == 0
    assert f"cpu (1 threads), float32; 6 test images of 3 classes; {total:,} parameters" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), str(place / "images" / "red"), "--dtype", "bfloat16"]) == 0
    assert f"cpu (1 threads), bfloat16; 12 images; {total:,} parameters" in capsys.readouterr().err


def test_outputs_that_are_not_finite_are_errors(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = read_adapter(run_dir / "best")
    key = next(name for name in tensors if name.startswith("head.") and name.endswith("weight"))
    write_adapter(tmp_path / "best", config, tensors | {key: torch.full_like(tensors[key], 3e38)})
    capsys.readouterr()
    out = tmp_path / "table.csv"
    assert main(["predict", str(tmp_path / "best"), str(place / "images" / "red"), "--out", str(out)]) == 2
    assert "must give finite outputs, got NaN or infinite ones for image 0" in error_line(capsys)
    assert not out.exists()


@pytest.mark.parametrize("command", ["adapt", "eval", "predict", "serve"])
def test_a_device_that_is_not_there_is_refused_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other arguments do not exist either: nothing was read before."""
    words = {"adapt": ["--data", "none", "--out", str(tmp_path / "out")], "predict": ["none", "none"], "serve": []}
    line = [command, *words.get(command, ["none"])]
    for device, message in (
        ("cuda:1", "--device must be available, got 'cuda:1'"),
        ("mps", "--device must be available, got 'mps'"),
        ("gpu", "must be auto, cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("cpu:0", "got 'cpu:0'"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main([*line, "--device", device]) == 2
        assert message in error_line(capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert main([*line, "--device", "cuda:2"]) == 2
    assert "must be at most cuda:1 on this machine" in error_line(capsys)
    assert not list(tmp_path.iterdir())


def test_info_says_what_the_ops_run_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["info", "--backbone", f"local-dir:{place / 'vit'}", "--method", "vapt"]
    assert main([*command, "--json"]) == 0
    software = json.loads(capsys.readouterr().out)["software"]
    assert software["torch"] == torch.__version__
    assert software["devices"].endswith("cpu")
    monkeypatch.setattr("fastprompt.kernels.native.obstacle", lambda: native.NOT_BUILT)
    assert main(command) == 0
    assert "C++ kernels          the C++ kernels were not built; to build them" in capsys.readouterr().out


def test_info_of_an_adapter(run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_dir), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    results = json.loads((run_dir / "results.json").read_text())
    assert facts["adapter"]["fits this backbone"] is True
    assert facts["adapter"]["tensors"]["generator.library"] == [16, 48]
    assert facts["methods"]["pgn"]["total"] == results["trained_parameters"]["total"]
    assert main(["info", str(run_dir), "--backbone", f"local-dir:{place / 'other'}"]) == 0
    assert "fits this backbone   NO" in capsys.readouterr().out


def test_info_shows_our_count_beside_the_papers(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backbone", f"local-dir:{place / 'vit'}", "--num-classes", "5"]) == 0
    lines = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert lines["VPT-deep"][-1] == lines["VPT-deep"][-5] == "960"  # 10 prompts x 2 layers x 48
    assert lines["VPT-deep"][-2] == "1,205"  # and a head of 5 x 49
    assert lines["VAPT"][-1] != lines["VAPT"][-5]
    assert lines["Linear probe (L-BFGS)"][-1] == "–"
    assert (
        main(
            [
                "info",
                "--backbone",
                f"local-dir:{place / 'vit'}",
                "--method",
                "vapt",
                "--num-prompts",
                "2",
                "--json",
            ]
        )
        == 0
    )
    counts = json.loads(capsys.readouterr().out)["methods"]["VAPT"]
    assert counts["options"]["num_prompts"] == 2
    assert counts["generator"] > counts["paper formula"]


def test_info_of_a_timm_name_needs_no_hub(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_hub(*_: object, **__: object) -> None:
        raise AssertionError("info fetched weights")

    monkeypatch.setattr("timm.models._builder.load_pretrained", no_hub)
    assert main(["info", "--backbone", "vit_tiny_patch16_224", "--method", "vpt-deep", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backbone"]["width"] == 192
    assert "unknown" in facts["backbone"]["fingerprint"]
    assert facts["methods"]["VPT-deep"]["generator"] == 12 * 10 * 192


def test_info_fetches_no_weights_that_are_not_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_index(*_: object, **__: object) -> None:
        raise AssertionError("info fetched weights")

    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path))
    monkeypatch.setattr("fastprompt.vit.assets.read_wheel_member", no_index)
    for words in ((), ("--backbone", "vit-s14", "--image-size", "98")):
        assert main(["info", "--json", *words]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["backbone"]["width"] == (384 if words else 768)
        assert "does not download" in facts["backbone"]["fingerprint"]
        assert facts["methods"]["VPT-deep"]["generator"] == 12 * 10 * facts["backbone"]["width"]


def test_info_of_a_swin_transformer_has_the_sizes_of_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backbone", "swin_tiny_patch4_window7_224", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["backbone"]["width"] == [96, 192, 384, 768]
    assert facts["backbone"]["depth"] == [2, 2, 6, 2]
    assert facts["backbone"]["patch grid"] == [[56, 56], [28, 28], [14, 14], [7, 7]]
    assert facts["methods"]["VPT-deep"]["generator"] == 10 * (2 * 96 + 2 * 192 + 6 * 384 + 2 * 768)
    assert "VAPTConfig is not defined on Swin transformers" in facts["methods"]["VAPT"]["does not fit"]


def test_info_shows_the_cost_of_both_graphs(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["info", "--backbone", f"local-dir:{place / 'vit'}", "--cost"]
    flags = ["--method", "vpt-deep", "--num-prompts", "6", "--readout", "patches+prompts", "--batch-size", "4"]
    assert main([*command, *flags, "--dtype", "float32", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["cost"]
    assert (facts["readout"], facts["dtype"], facts["batch size"]) == ("patches+prompts", "float32", 4)
    graphs = facts["methods"]["VPT-deep"]
    formula = cost(
        Sizes(48, 2, 3, 192, 16, 1, 8, (32, 32), (4, 4)), VPTConfig(6), "patches+prompts", "papers", True, "float32", 4
    )
    assert graphs["papers"]["training GFLOPs per image"] == round(formula.flops / 1e9, 4)
    assert graphs["papers"]["saved MiB per image"] == round(formula.saved_bytes / 2**20, 4)
    assert graphs["papers"]["training dispatches"] == formula.dispatches
    assert graphs["papers"]["saved MiB per image"] > graphs["rewritten"]["saved MiB per image"] > 0
    assert graphs["rewritten"]["saved MiB per image"] > graphs["recompute"]["saved MiB per image"] > 0
    assert main([*command, "--num-classes", "3"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.split("Cost by formula")[1].splitlines()}
    assert all(f"{title} " in " ".join(lines) + " " for title in ("PGN", "V²APT", "VAPT", "VPT-deep", "VPT-shallow"))
    assert lines["VPT-deep"].count("→") == 5
    assert "Pixel prompt" not in lines  # its frame does not fit on 32 px
    assert any(line.startswith("Full fine-tuning: the cost of FullFineTuneConfig") for line in lines)


def test_info_says_whether_prompts_can_be_pixels(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["info", "--backbone", f"local-dir:{place / 'vit'}", "--rgb", "--method", "rgb-pgn", "--num-prompts", "4"]
    assert main([*command, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["rgb"]
    assert (facts["width"], facts["pixels"], facts["rank"], facts["prompts"]) == (48, 192, 48, 4)
    assert [found["placement"] for found in facts["placements"]] == ["latent", "extend", "replace"]
    assert all(found["float_error"] < 1e-4 < found["picture_error"] for found in facts["placements"])
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "Prompts as pixels" in text
    assert "Inversion is exact" in text
    assert main([*command[:4], "--num-prompts", "8", "--json"]) == 0  # without a method
    assert json.loads(capsys.readouterr().out)["rgb"]["prompts"] == 8


def test_info_reports_the_pixels_of_an_adapters_own_tokens(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_dir), "--rgb", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    model = fp.PromptedViT.from_pretrained(backbone_at(facts["backbone"]["name"], None), run_dir / "best")
    expected = fp.RGBPrompts.report(model.backbone, model.config.num_prompts, model.generator.library)
    assert facts["rgb"]["prompts"] == model.config.num_prompts
    for found, wanted in zip(facts["rgb"]["placements"], expected.placements, strict=True):
        for name, value in wanted._asdict().items():
            assert found[name] == (pytest.approx(value) if value == value else None)
    assert main(["info", str(run_dir), "--rgb", "--num-prompts", "4"]) == 2
    assert "--num-prompts must not be given with --rgb and a PGN adapter" in error_line(capsys)


def test_info_takes_method_and_readout_of_the_cost_from_the_adapter(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(run_dir), "--cost", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["cost"]["readout"] == facts["adapter"]["config"]["readout"]
    assert set(facts["cost"]["methods"]) == {"pgn"}


def test_info_of_costs_without_formula_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--backbone", "swin_tiny_patch4_window7_224", "--cost"]) == 2
    assert "Swin" in error_line(capsys)
    command = ["info", "--backbone", f"local-dir:{place / 'vit'}", "--cost", "--method"]
    assert main([*command, "full"]) == 2
    assert "FullFineTuneConfig" in error_line(capsys)
    assert main([*command, "vpt-deep", "--readout", "map"]) == 2
    assert "readout" in error_line(capsys)
    assert main([*command, "vpt-deep", "--batch-size", "0"]) == 2
    assert "--batch-size" in error_line(capsys)


def test_report_from_the_run(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    assert main(["report", str(run_dir), "--out", str(out)]) == 0
    text = out.read_text()
    assert "Most-used library tokens" in text
    assert "http" not in text.replace("data:image", "")


@pytest.mark.parametrize("method", ["linear", "linear-sgd", "v2apt", "pixel", "full"])
def test_other_methods(place: Path, tmp_path: Path, method: str) -> None:
    border = ["--set", "border=4"] if method == "pixel" else []
    assert main(adapt_command(place, tmp_path / method, "--test", *border, method=method)) == 0
    results = json.loads((tmp_path / method / "results.json").read_text())
    assert results["test"]["num_images"] == 6
    if method == "linear":
        assert results["probe"]["C"] > 0
        assert results["validation"]["accuracy"] > 0.8  # plain colours
    if method == "linear-sgd":
        assert results["recipe"]["optimizer"] == "sgd"
    if method == "v2apt":
        assert {"kl", "active_units"} <= set(results["history"][0])
    if method == "full":
        assert results["trained_parameters"]["backbone"] > 0


def test_text_head_takes_class_embeddings(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeddings = np.random.default_rng(0).normal(size=(3, 48)).astype(np.float32)
    np.save(tmp_path / "classes.npy", embeddings)
    text = ["--head", "text", "--class-embeddings", str(tmp_path / "classes.npy")]
    assert main(adapt_command(place, tmp_path / "run", *text)) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["trained_parameters"]["head"] == 0
    missing = ["--head", "text", "--class-embeddings", str(tmp_path / "no.npy")]
    capsys.readouterr()
    assert main(adapt_command(place, tmp_path / "other", *missing)) == 2
    assert "--class-embeddings" in error_line(capsys)


def test_interrupted_run_goes_on_to_the_same_result(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_epoch = run_module.Run.one_epoch
    trained: list[int] = []

    def interrupted(self: Any, epoch: int, bar: Any) -> None:
        if epoch == 3:
            raise KeyboardInterrupt
        one_epoch(self, epoch, bar)

    def recorded(self: Any, epoch: int, bar: Any) -> None:
        trained.append(epoch)
        one_epoch(self, epoch, bar)

    out = tmp_path / "run"
    monkeypatch.setattr(run_module.Run, "one_epoch", interrupted)
    assert main(adapt_command(place, out)) == 130
    line = error_line(capsys)
    assert "resume from" in line
    assert str(out) in line
    assert not (out / "results.json").exists()
    assert not list(out.rglob("*.tmp"))
    monkeypatch.setattr(run_module.Run, "one_epoch", recorded)
    assert main(adapt_command(place, out)) == 0
    assert trained == [3]
    assert main(adapt_command(place, tmp_path / "whole")) == 0
    results, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole"))
    assert results["validation"]["predictions"] == whole["validation"]["predictions"]
    assert [e["train_loss"] for e in results["history"]] == [e["train_loss"] for e in whole["history"]]
    assert main(adapt_command(place, out, "--no-resume")) == 0
    assert trained == [3, 1, 2, 3, 1, 2, 3]


def test_a_run_takes_the_trainers_options_and_goes_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--augment", "flip+rand-m9", "--track", "tensorboard"]
    options += ["--recipe", "class_weights=(1,2,1)", "accumulate=2", "mixup=0.2", "random_erasing=0.1", "rollbacks=1"]
    options += ["checkpoint_every=1 steps", "sampling=balanced"]
    out = tmp_path / "run"
    assert main([word for word in adapt_command(place, out, *options) if word != "--no-progress"]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["recipe"]["class_weights"] == [1, 2, 1]
    assert results["recipe"]["checkpoint_every"] == "1 steps"
    assert list((out / "tensorboard").iterdir())
    shown = capsys.readouterr().err
    assert all(f"epoch {number}/3: loss " in shown for number in (1, 2, 3))
    more = [*options, "epochs=4"]
    command = [word for word in adapt_command(place, out, *more) if word not in ("--epochs", "3")]
    assert main(command) == 2
    assert "recipe" in error_line(capsys)
    assert main([*command[:1], "--extend", *command[1:]]) == 0
    history = json.loads((out / "results.json").read_text())["history"]
    assert history[:3] == results["history"]
    assert [record["epoch"] for record in history] == [1, 2, 3, 4]
    assert json.loads((out / "run.json").read_text())["recipe"]["epochs"] == 4
    assert main(command) == 0
    assert json.loads((out / "results.json").read_text())["history"] == history


def test_what_is_computed_once_is_explained_before_anything_is_trained(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(adapt_command(place, tmp_path / "run", "--explain", *cache, method="vqt")) == 0
    said = capsys.readouterr().out
    assert "Epochs after the first read constants" in said
    assert f"(train, 18 images): kept in {tmp_path / 'cache'}, " in said
    assert "decoded images (val, 6 images): kept in memory, " in said
    assert not list(tmp_path.iterdir())


def test_runs_share_what_is_constant(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = ["--cache-dir", str(tmp_path / "cache")]
    command = [word for word in adapt_command(place, tmp_path / "a", *cache, method="vqt") if word != "--no-progress"]
    assert main(command) == 0
    assert f"in {tmp_path / 'cache'}" in capsys.readouterr().err
    files = {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*.constants")}
    assert len(files) == 2
    other = adapt_command(place, tmp_path / "b", *cache, method="vqt")
    assert main([*other[:1], "--seed", "5", *other[1:]]) == 0
    assert {path: path.stat().st_ino for path in (tmp_path / "cache").glob("*.constants")} == files
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in "ab"]
    assert results[0]["history"] != results[1]["history"]


def test_sigterm_ends_a_command_with_143(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = Loop.validate

    def terminated(self: Any, epoch: int, *rest: Any) -> Any:
        if epoch == 2:
            signal.raise_signal(signal.SIGTERM)
        return validate(self, epoch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "validate", terminated)
        assert main(adapt_command(place, tmp_path / "run")) == 143
    assert "terminated; a checkpoint was written; run the same command again" in capsys.readouterr().err
    assert main(adapt_command(place, tmp_path / "run")) == 0
    assert main(adapt_command(place, tmp_path / "whole")) == 0
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "whole")]
    assert found[0]["validation"]["predictions"] == found[1]["validation"]["predictions"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--data", "x"], "did you mean `fastprompt adapt --data FOLDER --out runs/first`?"),
        (["evaluate", "runs/a"], "did you mean `fastprompt eval runs/first`?"),
        (["Predict"], "did you mean `fastprompt predict runs/first photo.jpg`?"),
        (["classfy"], "did you mean `fastprompt predict"),
        (["xyzzy"], "see `fastprompt --help`"),
        ([], "a command is needed: adapt, eval, predict"),
        (["adapt", "--method", "vptdeep"], "did you mean vpt-deep?"),
        (["adapt", "--method=vapd"], "did you mean vapt?"),
        (["adapt", "--set", "librarysize=3"], "did you mean library_size?"),
        (["info", "--backbone", "vit_base_patch16_24"], "vit_base_patch16_224"),
        (["eval", "{root}/rnu"], "did you mean {root}/run?"),
        (["eval", "{root}/nothing"], "create one with `fastprompt adapt --data FOLDER --out {root}/nothing`"),
        (["predict", "{root}/images", "{root}/run"], "neither {root}/images nor"),
        (["predict", "{root}/images/red/0.png", "{root}/run"], "the directory of a run or an adapter, got the file"),
        (
            ["info", "{root}/stopped"],
            "`fastprompt adapt --config {root}/stopped/run.json --out {root}/stopped` resumes it",
        ),
    ],
)
def test_natural_mistakes_are_answered_with_what_to_type(
    run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    (place / "stopped").mkdir(exist_ok=True)
    shutil.copy(run_dir / "run.json", place / "stopped")
    assert main([word.format(root=place) for word in words]) == 2
    assert said.format(root=place) in error_line(capsys)


def test_options_and_recipe_are_typed_flags(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--set and --recipe spell them: the settings of the run are the same."""
    typed = ["--options.library-size", "16", "--options.widths", "4", "4", "8", "8", "--options.num-prompts", "3"]
    assert main(adapt_command(place, run_dir, *typed, method="pgn")) == 0
    found = []
    for flags in (
        ["--recipe.label-smoothing", "0.1", "--options.stem-pool", "False", "--options.resolution", "None"],
        ["--recipe", "label-smoothing=0.1", "--set", "stem_pool=false", "resolution=none"],
    ):
        command = parse(["adapt", "--data", "x", "--out", "y", "--num-prompts", "2", *flags])
        found.append(adapt_settings(command))
    assert found[0] == found[1]
    assert found[0].options == {"stem_pool": False, "resolution": None, "num_prompts": 2}
    assert found[0].recipe == {"label_smoothing": 0.1}
    capsys.readouterr()
    for wrong in (["--set", "num_prompts=many"], ["--options.num-prompts", "1.5"], ["--recipe", "label_smoothing=a"]):
        with pytest.raises(SystemExit, match="2"):
            main(adapt_command(place, tmp_path / "run", *wrong))
        assert wrong[-1].split("=")[-1] in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        main(["adapt", "--method", "vapt", "--help"])
    shown = capsys.readouterr().out
    assert "--options.channel-dropout FLOAT" in shown
    assert "--options.library-size" not in shown
    assert "--recipe.label-smoothing FLOAT" in shown


def test_a_file_of_settings(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    text = "data: images\nout: runs/a\nmethod: pgn\nnum-train: 18\ntest: true\nprogress: false\nimage_size: null\n"
    text += "options: {num_prompts: 3, widths: [4, 4, 8, 8], stem_pool: false}\nrecipe:\n  lr: 1.0e-2\n  epochs: 4\n"
    file.write_text(text)
    command = parse(["adapt", "--config", str(file), "--lr", "0.5", "--set", "num_prompts=5", "--out", "runs/b"])
    assert (command.data, command.out, command.num_train, command.test) == ("images", Path("runs/b"), 18, True)
    assert (command.progress, command.image_size) == (False, None)
    settings = adapt_settings(command)
    assert settings.options == {"num_prompts": 5, "widths": (4, 4, 8, 8), "stem_pool": False}
    assert settings.recipe == {"lr": 0.5, "epochs": 4}
    assert adapt_settings(parse(["adapt", f"--config={file}", "--recipe.epochs", "2"])).recipe == {
        "lr": 0.01,
        "epochs": 2,
    }
    same = adapt_settings(parse(["adapt", "--config", str(run_dir / "run.json"), "--out", "x"]))
    assert json.loads(json.dumps(same.to_dict())) == json.loads((run_dir / "run.json").read_text())
    (tmp_path / "host.yaml").write_text("port: 8123\nadapter: [birds=a, cars=b]\nany_size: true\n")
    host = parse(["serve", "--config", str(tmp_path / "host.yaml"), "--port", "0"])
    assert (host.port, host.any_size, host.adapter) == (0, True, ["birds=a", "cars=b"])
    for text, message in (
        ("num_trian: 3", "num_trian: {file} has no such option; it has data"),
        ("num_trian: 3", "did you mean num_train?"),
        ("recipe: 3", "--config must have a mapping as recipe, got 3 in {file}"),
        ("test: 3", "--config must have true or false as test, got 3 in {file}"),
        ("- a", "must be a mapping of settings, got {file} with list"),
        ("a: [", "--config must be YAML, got {file}"),
    ):
        file.write_text(text)
        assert main(["adapt", "--config", str(file)]) == 2
        assert message.format(file=file) in error_line(capsys)
    assert main(["adapt", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in error_line(capsys)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--set", "library=3"], "library: method 'vpt-deep' has no such option; it has num_prompts"),
        (["--set", "num_prompts"], "--set"),
        (["--set", "num_prompts=2", "--num-prompts", "2"], "--num-prompts"),
        (["--num-prompts", "0"], "--num-prompts must be at least 1, got 0"),
        (["--lr", "-1"], "--lr must be"),
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--recipe", "speed=3"], "speed"),
        (["--recipe", "lr=3"], "--lr"),
        (["--threads", "0"], "--threads"),
        (["--num-train", "0"], "--num-train must be a positive number of images, got 0"),
        (["--num-train", "5000"], "--num-train must be at most"),
        (["--augment", "magic"], "--augment must be one of"),
        (["--readout", "map"], "--readout"),
        (["--image-size", "0"], "--image-size must be a positive number of pixels, got 0"),
        (["--image-size", "30"], "--image-size must be"),
        (
            ["--data", "no/such/folder"],
            "error: --data must be a folder that exists or the name of a data set, got no/such/folder",
        ),
        (["--data", "cifar-10"], "error: --data must be a folder or a known data set, got 'cifar-10'"),
        (["--data", "mnist5k", "--data-root", "."], "error: --data-root must be None for mnist5k"),
        (
            ["--backbone", "vit_no_such_model"],
            "error: --backbone must be the name of a backbone, got 'vit_no_such_model'",
        ),
        (["--head", "text"], "class_embeddings"),
        (["--class-embeddings", __file__], "--class-embeddings must be None unless head is 'text' or 'prototypes'"),
        (
            ["--head", "text", "--class-embeddings", "no.npy"],
            "--class-embeddings must be a file that exists, got no.npy",
        ),
        (["--head", "text", "--class-embeddings", __file__], "--class-embeddings must be a .npy file"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    out = tmp_path / "run"
    assert main(adapt_command(place, out, *flags)) == 2
    line = error_line(capsys)
    assert line.startswith("fastprompt adapt: error: ")
    assert named in line
    assert not out.exists(), "the next command, with the flag put right, would be another run's"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["eval", "{root}/nowhere", "--data", "x"], "nowhere"),
        (["eval", "{root}/run", "--batch-size", "0"], "batch_size"),
        (["eval", "{root}/run", "--backbone", "local-dir:{root}/other"], "another backbone"),
        (["predict", "{root}/nowhere", "{root}/images"], "nowhere"),
        (["predict", "{root}/run", "{root}/no.png"], "no.png"),
        (["predict", "{root}/run", "{root}/empty"], "empty"),
        (["predict", "{root}/run", "{root}/images", "--out", "{root}/p.xlsx"], "--out"),
        (["predict", "{root}/run", "{root}/images", "--batch-size", "0"], "--batch-size"),
        (["info", "{root}/nowhere"], "nowhere"),
        (["info", "--num-prompts", "3"], "--method"),
        (["report", "{root}/nowhere"], "nowhere"),
    ],
)
def test_wrong_input_of_the_other_commands(
    run_dir: Path, place: Path, capsys: pytest.CaptureFixture[str], command: list[str], named: str
) -> None:
    (place / "empty").mkdir(exist_ok=True)
    assert main([word.format(root=place) for word in command]) == 2
    line = error_line(capsys)
    assert line.startswith(f"fastprompt {command[0]}: error: ")
    assert named in line


def test_classes_of_other_data_are_refused(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cat", "dog"):
        shutil.copytree(place / "images" / "red", tmp_path / "images" / name)
    sizes = ["--num-train", "6", "--num-val", "4", "--num-test", "4"]
    assert main(["eval", str(run_dir), "--data", str(tmp_path / "images"), *sizes]) == 2
    line = error_line(capsys)
    assert "--data" in line
    assert "cat" in line


def test_adapt_into_a_file_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.write_text("mine")
    assert main(adapt_command(place, out)) == 2
    assert "--out must be a directory" in error_line(capsys)
    assert out.read_text() == "mine"


def test_wrong_input_leaves_the_run_that_is_there(run_dir: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert main(adapt_command(place, tmp_path / "run", "--no-resume", "--data", "no/such/folder")) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_from_before_on_bad_goes_on(run_dir: Path, place: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    del settings["on_bad"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    options = ["--set", "library_size=16", "widths=(4, 4, 8, 8)", "--num-prompts", "3"]
    assert main(adapt_command(place, tmp_path / "run", *options, method="pgn")) == 0
    assert main(adapt_command(place, tmp_path / "run", *options, "--on-bad", "skip", method="pgn")) == 2


def test_unreadable_files_among_the_images(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All are named at once and nothing is written; with --on-bad skip the others are predicted."""
    whole = (place / "images" / "red" / "0.png").read_bytes()
    for name, content in (("a.png", whole[:60]), ("b.png", whole), ("c.png", b""), ("d.png", whole)):
        (tmp_path / name).write_bytes(content)
    out = tmp_path / "p.csv"
    command = ["predict", str(run_dir), str(tmp_path), "--batch-size", "1", "--out", str(out)]
    assert main(command) == 2
    line = error_line(capsys)
    assert "a.png" in line
    assert "c.png" in line
    assert "--on-bad skip" in line
    assert not out.exists()
    with pytest.warns(UserWarning, match=r"a\.png"):
        assert main([*command, "--on-bad", "skip"]) == 0
    with out.open(newline="") as file:
        assert [Path(row["file"]).name for row in csv.DictReader(file)] == ["b.png", "d.png"]
    with pytest.warns(UserWarning, match=r"a\.png"):
        assert main(["predict", str(run_dir), str(tmp_path / "a.png"), "--on-bad", "skip"]) == 2
    assert "images must name at least one readable image, got 1 unreadable files" in capsys.readouterr().err


def cut_images(folder: Path) -> list[str]:
    """Images that Pillow opens, and in part decodes, without all of their pixels; their names."""
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(folder / "half.jpg")
    whole = (folder / "half.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    Image.new("RGB", (40_000, 1)).save(folder / "thin.png")
    return ["half.jpg", "thin.png"]


def test_predict_skips_whatever_cannot_be_read(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = cut_images(tmp_path)
    shutil.copy(place / "images" / "red" / "0.png", tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("")
    command = ["predict", str(run_dir), str(tmp_path), "--out", str(tmp_path / "p.json")]
    with pytest.warns(UserWarning, match="left out 1 file"):
        assert main(command) == 2
    line = error_line(capsys)
    assert all(name in line for name in cut)
    with pytest.warns(UserWarning, match=r"skipped 2 .*half\.jpg.*thin\.png"):
        assert main([*command, "--on-bad", "skip"]) == 0
    shown = capsys.readouterr()
    assert "1 images -> " in shown.out
    assert "2 skipped" in shown.out
    assert "--on-bad" not in shown.err
    found = json.loads((tmp_path / "p.json").read_text())
    assert [Path(image["file"]).name for image in found["images"]] == ["good.png"]
    assert [Path(name).name for name in found["skipped"]] == cut


def test_predict_skips_what_breaks_after_it_was_checked(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(place / "images" / "red" / "0.png", tmp_path / name)
    real = data_files.check_files

    def check(paths: Sequence[str], *more: Any) -> list[str]:
        whole = real(paths, *more)
        (tmp_path / "a.png").write_bytes(b"gone")
        return whole

    monkeypatch.setattr(data_files, "check_files", check)
    command = ["predict", str(run_dir), str(tmp_path), "--batch-size", "1", "--on-bad"]
    with pytest.warns(UserWarning, match=r"skipped 1 .*a\.png"):
        assert main([*command, "skip"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    shutil.copy(tmp_path / "b.png", tmp_path / "a.png")
    assert main([*command, "error"]) == 2
    assert "a.png" in error_line(capsys)


@pytest.mark.parametrize("command", ["predict", "adapt"])
def test_an_image_may_take_so_many_bytes(
    command: str, run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(run_dir), str(place / "images")] if command == "predict" else adapt_command(place, tmp_path)
    assert main([*words, "--max-decoded-bytes", "1000"]) == 2
    assert "max_decoded_bytes=1,000" in error_line(capsys)
    assert main([*words, "--max-decoded-bytes", "0"]) == 2
    assert "--max-decoded-bytes must be a positive number of bytes, got 0" in error_line(capsys)


def test_deep_grey_images_are_predicted_as_they_were_trained_on(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """12 bits in 16: the range is in the adapter, for one dark image alone too, and can be set by hand."""
    random = np.random.default_rng(0)
    for name, level in (("dark", 500), ("bright", 3500)):
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(10):
            values = (level + random.integers(-400, 400, (32, 32))).astype(np.uint16)
            values[0, 0] = 4095 if name == "bright" else 0
            Image.fromarray(values).save(tmp_path / "set" / name / f"{i}.png")
    command = adapt_command(place, tmp_path / "run", "--data", str(tmp_path / "set"), method="linear")
    for flag in ("--num-train", "--num-val", "--num-test", "--epochs", "--batch-size", "--lr"):
        del command[command.index(flag) : command.index(flag) + 2]
    with pytest.warns(UserWarning, match="set to 0 and 4095 for all of them"):
        assert main(command) == 0
    stored = read_adapter(tmp_path / "run" / "best")[0]["backbone"]["optional"]["preprocessing"]
    assert stored["intensity_range"] == [0, 4095]
    (tmp_path / "one").mkdir()
    for name in ("dark", "bright"):
        shutil.copy(tmp_path / "set" / name / "0.png", tmp_path / "one" / f"{name}.png")
    capsys.readouterr()

    def classes(*more: str) -> list[str]:
        assert main(["predict", str(tmp_path / "run"), str(tmp_path / "one"), *more]) == 0
        return [row["class"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]

    assert classes() == ["bright", "dark"]
    assert classes("--intensity-range", "0", "65535") == ["dark", "dark"]
    assert main(["eval", str(tmp_path / "run"), "--data", str(tmp_path / "set"), "--split", "val"]) == 0
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "one"), "--intensity-range", "2", "1"]) == 2
    assert "--intensity-range must be" in capsys.readouterr().err


def test_a_folder_with_the_name_of_a_set(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(place / "images", tmp_path / "cifar10")
    monkeypatch.chdir(tmp_path)
    assert main(adapt_command(place, tmp_path / "run", "--data", "cifar10", method="linear")) == 2
    line = error_line(capsys)
    assert "--data must not be ambiguous, got 'cifar10'" in line
    assert "builtin:cifar10" in line
    assert data_name("./cifar10") == str(tmp_path / "cifar10")
    assert data_name("cifar10") == "cifar10"


def test_file_names_that_are_no_utf8(
    run_dir: Path, place: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = os.fsencode(tmp_path)
    shutil.copy(place / "images" / "red" / "0.png", folder + b"/n\xff.png")
    command = ["predict", str(run_dir), os.fsdecode(folder + b"/n\xff.png")]
    assert main(command) == 0
    assert folder + b"/n\xff.png,red" in capfdbinary.readouterr().out
    assert main([*command, "--out", str(tmp_path / "p.csv")]) == 0
    assert folder + b"/n\xff.png,red" in (tmp_path / "p.csv").read_bytes()
    assert main([*command, "--out", str(tmp_path / "p.json")]) == 0
    found = json.loads((tmp_path / "p.json").read_text())
    assert os.fsencode(found["images"][0]["file"]) == folder + b"/n\xff.png"


def test_other_data_are_not_cut_to_the_sizes_of_the_run(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in COLOURS:
        for i in range(3):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "images" / name / f"{i}.png", tmp_path / "images" / name)
    assert main(["eval", str(run_dir), "--data", str(tmp_path / "images")]) == 0
    assert "val: 1 images" in capsys.readouterr().out
    assert main(["eval", str(run_dir), "--data", str(place / "images")]) == 0
    assert "val: 6 images" in capsys.readouterr().out, "the run's own data keep the run's split"


def test_a_damaged_adapter_is_named(
    run_dir: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    weights = tmp_path / "run" / "best" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for command in (["eval"], ["info"], ["predict"]):
        more = [str(place / "images")] if command == ["predict"] else []
        assert main([*command, str(tmp_path / "run"), *more]) == 2
        assert "adapter_model.safetensors" in error_line(capsys)


def test_a_run_that_diverges_exits_with_1(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--optimizer", "sgd", "--recipe", "warmup_epochs=0", "weight_decay=1e30"]
    command = adapt_command(place, tmp_path / "run", *flags)
    command[command.index("--lr") + 1] = "1e30"
    assert main(command) == 1
    assert "diverged" in error_line(capsys)
    assert not (tmp_path / "run" / "results.json").exists()


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_as_a_program(place: Path) -> None:
    shown = subprocess.run([sys.executable, "-m", "fastprompt", "--help"], capture_output=True, text=True, check=True)
    assert all(name in shown.stdout for name in ("adapt", "eval", "predict", "serve", "info", "report"))
    wrong = subprocess.run(
        [sys.executable, "-m", "fastprompt", "adapt", "--method", "lora"], capture_output=True, text=True
    )
    assert wrong.returncode == 2
    assert "--method must be one of" in wrong.stderr
    missing = subprocess.run(
        [sys.executable, "-m", "fastprompt", "report", str(place / "nowhere")], capture_output=True, text=True
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("fastprompt report: error: runs")


@pytest.fixture(scope="module")
def pixel_adapter(place: Path) -> Path:
    """An adapter whose prompts are pixels, not trained."""
    import fastprompt as fp

    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    config = fp.RGBPGNConfig(num_prompts=4, library_size=6, widths=(4, 8), placement="replace")
    fp.PromptedViT(backbone, config, num_classes=3, class_names=list(COLOURS)).save_pretrained(place / "pixels")
    return place / "pixels"


def export_command(place: Path, adapter: Path, out: Path, *more: str) -> list[str]:
    return ["export", str(adapter), "--out", str(out), "--backbone", f"local-dir:{place / 'vit'}", *more]


def test_export_writes_a_clients_folder(
    place: Path, pixel_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastprompt_client import Client

    golden = place / "images" / "red" / "0.png"
    command = export_command(place, pixel_adapter, tmp_path / "out", "--client", "--golden", str(golden))
    assert main(command) == 0
    assert "pictures of 32 x 32 pixels" in capsys.readouterr().out
    client = Client(tmp_path / "out")
    assert client.class_names == tuple(COLOURS)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "golden_image.png")), np.asarray(Image.open(golden)))
    assert client.picture(golden).shape == (32, 32, 3)
    assert client.folder.resize == "crop"
    assert main([*command, "--resize", "squash"]) == 0
    assert Client(tmp_path / "out").folder.resize == "squash"


def test_export_writes_the_whole_model(
    place: Path, pixel_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(export_command(place, pixel_adapter, tmp_path / "model.pt2", "--format", "pt2")) == 0
    assert "uint8 images (B, 3, 32, 32) to logits of 3 classes, blue, green, red" in capsys.readouterr().out
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    model = fp.PromptedViT.from_pretrained(backbone_at(f"local-dir:{place / 'vit'}", None), pixel_adapter)
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(images), model(images))


def test_export_inverts_a_pgn(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import fastprompt as fp

    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    model = fp.PromptedViT(backbone, fp.PGNConfig(num_prompts=4, library_size=6, widths=(4, 8)), num_classes=3)
    model.save_pretrained(tmp_path / "pgn")
    assert main(export_command(place, tmp_path / "pgn", tmp_path / "out", "--client")) == 2
    assert "RGBPrompts.invert" in error_line(capsys)
    assert main(export_command(place, tmp_path / "pgn", tmp_path / "out", "--client", "--invert")) == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["picture_size"] == [40, 32]


def test_export_names_what_is_wrong(
    place: Path, pixel_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for command, message in (
        (export_command(place, pixel_adapter, tmp_path / "out"), "--format or --client is required"),
        (export_command(place, pixel_adapter, tmp_path / "m.onnx", "--format", "onnx", "--client"), "one of the two"),
        (export_command(place, pixel_adapter, tmp_path / "m.onnx", "--format", "onnx", "--invert"), "--invert is for"),
        (export_command(place, pixel_adapter, tmp_path / "out", "--client", "--input", "uint8"), "--input is for"),
        (export_command(place, pixel_adapter, tmp_path / "m.onnx", "--format", "pt2"), "--out must end in .pt2"),
        (export_command(place, pixel_adapter, tmp_path / "file", "--client"), "--out"),
        (
            export_command(place, pixel_adapter, tmp_path / "out", "--client", "--golden", "none.png"),
            "--golden must be an image: no such image file: none.png",
        ),
        (export_command(place, tmp_path / "none", tmp_path / "out", "--client", "--golden", "none.png"), "--golden"),
        (export_command(place, pixel_adapter, tmp_path / "out", "--client", "--invert"), "PGNConfig"),
        (export_command(place, tmp_path / "none", tmp_path / "out", "--client"), "adapter"),
    ):
        assert main(command) == 2
        assert message in error_line(capsys)
    assert not (tmp_path / "out").exists()


HOSTILE = "a\x1b[31m\x9b2J\u202eb\x07"


def test_no_foreign_text_reaches_the_terminal_raw(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names of classes, tensors and files, and fingerprints, of an adapter from anywhere."""
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    names = [f"{HOSTILE}{i}" for i in range(3)]
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3, class_names=names).eval()
    model.save_pretrained(tmp_path / "good")
    config, state = read_adapter(tmp_path / "good")
    config["backbone"]["fingerprint"] = HOSTILE
    write_adapter(tmp_path / "bad", config, {**state, HOSTILE: torch.zeros(1)})
    for i, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(6):
            Image.new("RGB", (32, 32), (i * 80, j, 0)).save(tmp_path / "images" / name / f"{j}{HOSTILE}.png")
    (tmp_path / "images" / names[0] / f"broken{HOSTILE}.png").write_bytes(b"")
    photo = tmp_path / "images" / names[0] / f"0{HOSTILE}.png"
    data = ["--data", str(tmp_path / "images"), "--on-bad", "skip"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for code, *command in (
            (0, "info", str(tmp_path / "bad")),
            (0, "info", str(tmp_path / "bad"), "--json"),
            (0, "eval", str(tmp_path / "good"), *data),
            (0, "predict", str(tmp_path / "good"), str(photo)),
            (2, "predict", str(tmp_path / "bad"), str(photo)),
            (2, "predict", str(tmp_path / "good"), str(photo.parent)),
            (2, "predict", str(tmp_path / "good"), str(photo.parent), "--debug"),
            (0, "predict", str(tmp_path / "good"), str(photo.parent), "--on-bad", "skip"),
            (2, "eval", str(tmp_path / HOSTILE), *data),
        ):
            assert main(command) == code, command
            said = capsys.readouterr()
            for text in (said.out, said.err):
                assert text.replace("\n", "").isprintable(), command
            assert r"\x1b[31m" in said.out + said.err or "u001b" in said.out, command


def test_a_table_holds_no_formula_and_json_is_exact(place: Path, tmp_path: Path) -> None:
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    names = ['=HYPERLINK("http://x")', "+1|cmd", "-3"]
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3, class_names=names).eval()
    model.save_pretrained(tmp_path / "adapter")
    Image.new("RGB", (32, 32)).save(tmp_path / "=1+1.png")
    command = [sys.executable, "-m", "fastprompt", "predict", "adapter", "=1+1.png", "--threads", "1"]
    for table in ("p.csv", "p.json"):
        subprocess.run([*command, "--out", table], check=True, cwd=tmp_path, capture_output=True)
    [row] = list(csv.DictReader((tmp_path / "p.csv").open(newline="")))
    assert row["file"] == "'=1+1.png"
    assert row["class"] in ("'" + names[0], "'" + names[1], "-3")
    assert float(row["probability"]) > 0.3
    written = json.loads((tmp_path / "p.json").read_text())
    assert written["class_names"] == names
    assert written["images"][0]["file"] == "=1+1.png"


def settings_of(*words: str) -> RunSettings:
    return adapt_settings(parse(["adapt", "--data", "images", "--out", "run", *words]))


def test_a_published_recipe_by_name_beside_fields() -> None:
    found = settings_of("--method", "vapt", "--recipe", "vapt-paper")
    expected = fp.paper_recipe("vapt")
    assert adjusted_recipe("vapt", found.recipe) == expected
    assert (found.augment, found.resize) == ("none", "squash")
    found = settings_of("--method", "vapt", "--recipe", "vapt-paper", "base_lr=25", "decay=all", "--batch-size", "32")
    assert adjusted_recipe("vapt", found.recipe) == expected.replace(lr=25 * 32 / 256, batch_size=32, decay="all")
    found = settings_of("--method", "vpt-deep", "--recipe", "vpt-paper", "--lr", "0.7", "--epochs", "20", "--seed", "3")
    recipe = adjusted_recipe("vpt-deep", found.recipe)
    assert (recipe.lr, recipe.epochs, recipe.warmup_epochs, recipe.seed) == (0.7, 20, 2, 3)
    found = settings_of("--recipe", "pgn-paper-adamw", "--resize", "squash")
    assert adjusted_recipe("pgn", found.recipe) == fp.paper_recipe("pgn-paper-adamw")
    assert (found.augment, found.resize) == ("pgn", "squash")
    assert settings_of("--recipe", "pgn-paper", "--augment", "flip").augment == "flip"
    found = settings_of("--method", "pixel", "--recipe", "pixel-paper", "--num-train", "25600")
    assert adjusted_recipe("pixel", found.recipe).warmup_epochs == 10
    assert (settings_of().augment, settings_of().resize, settings_of().recipe) == ("none", "crop", {})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "vapt-papr"], "recipe must be KEY=VALUE or one of .*vapt-paper.* got 'vapt-papr'"),
        (["--recipe", "vapt-paper", "pgn-paper"], "'published' is given twice"),
        (["--recipe", "vapt-paper", "base_lr=1", "--lr", "2"], "lr must not be given with base_lr"),
        (["--recipe", "vapt-paper", "learning_rate=1"], "learning_rate: the recipe has no such option"),
        (["--recipe", "vapt-paper", "base_lr=-1"], "lr must be in"),
        (["--recipe", "pixel-paper"], "num_train must be given for 'pixel-paper'"),
        (
            ["--recipe", "vapt-paper", "batch_size=8", "--batch-size", "9"],
            "batch_size must not be given in --recipe as well",
        ),
    ],
)
def test_recipes_that_are_none_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(*words)


def test_published_recipe_squashed_images_and_a_backbone_that_trains(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PGN with full fine-tuning, from images that are not square, by VPT's recipe."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "wide" / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.clip(np.array(colour) + random.integers(-40, 40, (32, 80, 3)), 0, 255).astype(np.uint8)
            pixels[:, :24] = 0  # what a crop of the centre does not see
            Image.fromarray(pixels).save(tmp_path / "wide" / name / f"{i}.png")
    command = ["adapt", "--method", "pgn", "--train-backbone", "--num-prompts", "2", "--threads", "1", "--no-progress"]
    command += ["--set", "library_size=8", "widths=(4, 4)", "--data", str(tmp_path / "wide"), "--test"]
    command += ["--backbone", f"local-dir:{place / 'vit'}", "--out", str(tmp_path / "run")]
    command += ["--recipe", "vpt-paper", "backbone_lr=1e-3", "--epochs", "3", "--batch-size", "6", "--lr", "0.01"]
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["resize"] == "squash"
    assert results["trained_parameters"]["backbone"] > results["trained_parameters"]["generator"] > 0
    assert results["history"][0]["lr"] == 0.0  # the first epoch warms up from 0
    assert [results["recipe"][key] for key in ("schedule", "head_init", "backbone_lr")] == ["epoch", "vpt", 1e-3]
    assert results["best_epoch"] == 3
    model = fp.PromptedViT.from_pretrained(backbone_at(f"local-dir:{place / 'vit'}", None), tmp_path / "run" / "best")
    assert model.full
    assert model.preprocessing is not None
    assert model.preprocessing.resize == "squash"
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--split", "test", "--out", str(tmp_path / "eval.json")]) == 0
    found = json.loads((tmp_path / "eval.json").read_text())
    assert found["data"]["resize"] == "squash"
    assert found["predictions"] == results["test"]["predictions"]


def test_convert_writes_an_adapter_of_a_published_checkpoint(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"tl_vectors": torch.randn(5, 48), "model.fc.weight": torch.zeros(15, 512)}
    trunk = fp.PGN(num_prompts=3, library_size=5, trunk="resnet18", width=48).trunk
    state |= {f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}
    torch.save({"state_dict": {f"pgn_module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "pgn.pt")
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    backbone = f"local-dir:{place / 'vit'}"
    words = ["convert", str(tmp_path / "pgn.pt"), "--backbone", backbone, "--out", str(tmp_path / "adapter")]
    more = ["--head", "linear", "--num-classes", "2", "--class-names", str(tmp_path / "classes.txt")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the authors normalise otherwise than the backbone
        assert main([*words, *more, "--set", "activation=sigmoid", "stem_pool=False"]) == 0
        expected = fp.load_official(tmp_path / "pgn.pt", backbone_at(backbone, None), activation="sigmoid")
    assert "PGNConfig(num_prompts=3, library_size=5" in capsys.readouterr().out
    model = fp.PromptedViT.from_pretrained(tmp_path / "adapter")
    assert (model.config.activation, model.config.stem_pool, model.class_names) == ("sigmoid", False, ["ant", "bee"])
    for name, tensor in expected.generator.state_dict().items():
        assert torch.equal(tensor, model.generator.state_dict()[name])
    assert model.backbone.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--class-names": "three.txt"}, "--class-names must name 2 classes, got 3 lines"),
        ({"--set": "activation"}, "--set must be KEY=VALUE"),
        ({"--set": "no_such=1"}, "no_such: the checkpoint's method has no such option"),
        ({"--class-embeddings": "three.txt"}, "--class-embeddings must be a .npy file"),
        ({"--class-embeddings": "none.npy"}, "--class-embeddings must be a file that exists"),
        ({"--head": "text"}, "--class-embeddings is needed for head 'text'"),
        ({"checkpoint": "none.pt"}, "checkpoint must be a file that exists"),
        ({"checkpoint": "other.pt"}, "is no published PGN, VPT or VAPT checkpoint"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_convert_refuses_and_writes_nothing(
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"prompt_embeddings": torch.zeros(1, 2, 48)}, "vpt.pt")
    torch.save({"weight": torch.zeros(1)}, "other.pt")
    Path("three.txt").write_text("a\nb\nc\n")
    flags = {"--backbone": f"local-dir:{place / 'vit'}", "--out": "adapter", "--head": "linear", "--num-classes": "2"}
    flags |= {name: value for name, value in changes.items() if name != "checkpoint"}
    words = ["convert", changes.get("checkpoint", "vpt.pt"), *(word for pair in flags.items() for word in pair)]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not Path("adapter").exists()


def test_a_grid_is_adapted_in_one_batch_and_its_best_is_tested(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = adapt_command(place, tmp_path / "grid", "--grid", "lr=0.02,1e30", "seed=0,1", "--test")
    command = [word for word in command if word not in ("--lr", "0.02")]
    assert main(command) == 0
    said = capsys.readouterr().out
    names = [f"lr-{lr}_seed-{seed}" for lr in ("0.02", "1e+30") for seed in (0, 1)]
    assert [line.split()[0] for line in said.splitlines()[2:6]] == names
    assert re.search(r"lr-1e\+30_seed-0 +diverged", said)
    assert re.search(r"best on validation: lr-0.02_seed-[01], lr-0.02_seed-[01]\n", said)
    assert sorted(path.name for path in (tmp_path / "grid").iterdir() if path.name != ".lock") == sorted(names)
    results = [json.loads((tmp_path / "grid" / name / "results.json").read_text()) for name in names[:2]]
    assert all(record["test"]["num_images"] == 6 for record in results)
    assert not (tmp_path / "grid" / names[2] / "results.json").exists()
    alone = adapt_command(place, tmp_path / "alone", "--seed", "1", "--test")
    assert main(alone) == 0
    single = json.loads((tmp_path / "alone" / "results.json").read_text())
    assert single.keys() == results[1].keys()
    for key in ("config", "recipe", "data", "trained_parameters", "best_epoch"):
        assert single[key] == results[1][key]
    assert single["validation"]["loss"] == pytest.approx(results[1]["validation"]["loss"], rel=1e-3)
    assert single["test"]["predictions"] == results[1]["test"]["predictions"]
    mine, theirs = (
        json.loads((path / "run.json").read_text()) for path in (tmp_path / "alone", tmp_path / "grid" / names[1])
    )
    assert mine == theirs
    assert (
        main(["report", str(tmp_path / "grid" / names[0]), str(tmp_path / "alone"), "--out", str(tmp_path / "r.html")])
        == 0
    )
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grid").rglob("*") if path.is_file()}
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "epochs=1,2"], "epochs: the grid has no such option; it has lr, head_lr"),
        (["--grid", "lr=0.1,0.2"], "--lr must not be given in --grid as well"),
        (["--grid", "seed=0,0"], "--grid must have different values for 'seed', got 0, 0"),
        (["--grid", "seed=0,1", "--extend"], "--extend must not be given with --grid"),
        (["--grid", "seed=0,1", "--together", "0"], "--together must be a positive integer or None, got 0"),
        (["--together", "2"], "--together must be given with --grid"),
        (["--grid", "seed=0,1", "--train-backbone"], "must leave the backbone frozen"),
    ],
)
def test_wrong_grids_name_the_flag(
    words: list[str], message: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(adapt_command(place, tmp_path / "new", *words)) == 2
    assert message in error_line(capsys)
    assert not (tmp_path / "new").exists()


def test_a_grid_in_a_settings_file_and_typed_flags(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text("data: birds\nout: runs/grid\ngrid:\n  lr: [0.1, 0.2]\n  clip_grad: [null, 1.0]\n")
    assert parse(["adapt", "--config", str(file)]).grid == {"lr": [0.1, 0.2], "clip_grad": [None, 1.0]}
    command = parse(["adapt", "--data", "x", "--out", "y", "--grid.weight-decay", "0", "1e-4", "--grid", "seed=(0, 1)"])
    assert command.grid == {"weight_decay": [0.0, 1e-4], "seed": [0, 1]}


@pytest.fixture(scope="module")
def tables(place: Path) -> dict[str, Path]:
    """Adapters that predict two labels and one value, and a CSV file with the labels, and the value, of the images."""
    names, files = ["warm", "cold"], [f"{colour}/{i}.png" for colour in COLOURS for i in range(4)]
    rows = [[int("red" in file), int("blue" in file), 0.5 * ("red" in file) + 0.1] for file in files]
    table = place / "images" / "labels.csv"
    table.write_text(
        "file,cold,warm,heat\n" + "".join(f"{f},{b},{a},{v}\n" for f, (a, b, v) in zip(files, rows, strict=True))
    )
    found = {"table": table}
    for kind, loss, columns in (("labels", "bce", names), ("values", "mse", ["heat"])):
        data = LabelTable(table, 32, columns)
        model = fp.PromptedViT(backbone_at(f"local-dir:{place / 'vit'}", None), VPTConfig(num_prompts=2), len(columns))
        fp.fit(
            model,
            data,
            data,
            epochs=4,
            batch_size=4,
            lr=0.05,
            loss=loss,
            label_smoothing=0.0,
            out_dir=place / kind,
            progress=False,
        )
        found[kind] = place / kind
    return found


def test_several_labels_are_evaluated_and_predicted(
    place: Path, tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = str(tables["labels"]), ["--data", str(tables["table"]), "--backbone", f"local-dir:{place / 'vit'}"]
    assert main(["eval", run, *data, "--out", str(tmp_path / "eval.json")]) == 0
    said, record = capsys.readouterr().out, json.loads((tmp_path / "eval.json").read_text())
    log = [json.loads(line) for line in (tables["labels"] / "log.jsonl").read_text().splitlines()]
    assert record["map"] == pytest.approx(
        next(row for row in log if row.get("epoch") == log[-1]["best_epoch"] and "val_map" in row)["val_map"]
    )
    assert f"mean average precision  {record['map']:.4f}" in said
    assert record["names"] == ["warm", "cold"]
    where = data[2:]
    images = [str(place / "images" / "red" / "0.png"), str(place / "images" / "blue" / "1.png")]
    assert main(["predict", run, *images, *where, "--threshold", "0", "1"]) == 0
    header, *lines = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file", "labels", "p(warm)", "p(cold)"]
    assert [line[1] for line in lines] == ["warm", "warm"]
    assert float(lines[0][2]) == pytest.approx(record["probabilities"][8][0], abs=1e-5)
    assert main(["predict", run, *images, *where, "--out", str(tmp_path / "p.json"), "--threshold", "0"]) == 0
    assert json.loads((tmp_path / "p.json").read_text())["images"][0]["labels"] == ["warm", "cold"]
    capsys.readouterr()
    for words, message in (
        (
            ["predict", run, *images, *where, "--threshold", "0.1", "0.2", "0.3"],
            "--threshold must be one probability, or 2",
        ),
        (
            ["eval", run, "--data", str(place / "images"), *where],
            "--data must be a .csv file for an adapter that predicts several labels",
        ),
        (["eval", run, *data, "--num-val", "3"], "--num-val must not be given for an adapter that predicts several"),
    ):
        assert main(words) == 2
        assert message in error_line(capsys)


def test_values_are_evaluated_and_predicted(
    place: Path, tables: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, where = str(tables["values"]), ["--backbone", f"local-dir:{place / 'vit'}"]
    assert main(["eval", run, "--data", str(tables["table"]), *where]) == 0
    assert re.search(r"R² +-?\d+\.\d{4}\nmean absolute error  \d", capsys.readouterr().out)
    image = str(place / "images" / "red" / "0.png")
    assert main(["predict", run, image, *where, "--dtype", "float32"]) == 0
    header, line = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["file", "heat"]
    model = fp.PromptedViT.from_pretrained(backbone_at(where[1], None), tables["values"] / "best")
    with torch.no_grad():
        assert float(line[1]) == pytest.approx(float(model(read_images([image], 32)[0])), abs=1e-4)
    assert main(["predict", run, image, *where, "--threshold", "0.5"]) == 2
    assert "--threshold must not be given for an adapter that predicts values" in error_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,a\nx.png,1\n", "must have a header of 'file' and different names"),
        ("file,a\nx.png,yes\n", "must have finite numbers, got 'yes' for 'a' in line 2"),
        ("file,a\nx.png,1,2\n", "must have 2 cells in each line, got 3 in line 2"),
        ("file,a\n", "must have at least one image"),
        ("file,b\nx.png,1\n", "must have a column for 'a'"),
        ("", "must have a header"),
    ],
)
def test_wrong_tables_of_labels_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        LabelTable(tmp_path / "labels.csv", 32, ["a"])
