from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.analysis.library import library_usage
from fastprompt.cli import main
from fastprompt.data import load_data
from fastprompt.locks import DirectoryInUse, directory_lock
from fastprompt.runs import execute as execute_module
from fastprompt.runs.directory import read_settings
from fastprompt.runs.execute import PROBE_VIEWS, execute, run_probe
from fastprompt.runs.settings import RunSettings
from fastprompt.train import probe as probe_module
from fastprompt.train.directory import open_run
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

    def record(model: Any, train: Any, val: Any, grid: Any) -> Any:
        fitted.append((train, val))
        return fit_linear_probe(model, train, val, grid)

    monkeypatch.setattr(probe_module, "fit_linear_probe", record)
    backbone = fp.FrozenViT(tiny_vit)
    config = fp.LinearProbeConfig()
    recipe = adjusted_recipe("linear", {"dtype": "float32"})
    for augment, views in (("none", 1), ("flip", PROBE_VIEWS)):
        splits = load_data(tmp_path / "images", image_size=32, augment=augment)
        model = fp.PromptedViT(backbone, config, num_classes=2)
        with open_run(tmp_path / augment) as directory:
            results = run_probe(model, splits, recipe, directory, {"run.json": "{}"})
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
        ("{", "must be valid JSON"),
        ("[1]", "must hold a JSON object, got a list"),
        ('{"method": "pgn"}', "run.json must have the key 'data'"),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_settings(tmp_path)


def picture(path: Path, seed: int, side: int = 32) -> None:
    """An image of one size in bytes, whatever the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="BMP")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with train, val and test of two classes."""
    for number, part in enumerate(("train", "val", "test")):
        for label, name in enumerate(("cat", "dog")):
            for i in range(6 if part == "train" else 3):
                picture(tmp_path / "images" / part / name / f"{i}.bmp", 100 * number + 10 * label + i)
    return tmp_path / "images"


@pytest.fixture
def run(tiny_vit: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """run(method="vpt-deep", test=False, resume=True, **settings): `execute` in tmp_path / "run"."""
    monkeypatch.setattr(execute_module, "backbone_at", lambda *_: fp.FrozenViT(tiny_vit))

    def call(method: str = "vpt-deep", test: bool = False, resume: bool = True, **settings: Any) -> Any:
        recipe = {"epochs": 1, "dtype": "float32"}
        asked = RunSettings(method, str(images), recipe=recipe, **{"options": {"num_prompts": 2}, **settings})
        return execute(asked, tmp_path / "run", test=test, resume=resume, progress=False)

    return call


def rewrite(path: Path, seed: int, side: int = 32) -> None:
    """Another image under the same name, with the same size in bytes and the same time."""
    before = path.stat()
    picture(path, seed, side)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert path.stat().st_mtime_ns == before.st_mtime_ns


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a training image": (lambda at: rewrite(at / "train" / "cat" / "0.bmp", 999), r"train\.images changed"),
    "a validation image": (lambda at: rewrite(at / "val" / "dog" / "1.bmp", 999), r"val\.images changed"),
    "a test image": (lambda at: rewrite(at / "test" / "dog" / "1.bmp", 999), r"test\.images changed"),
    "one more": (lambda at: picture(at / "train" / "cat" / "9.bmp", 999), r"train\.num_images is 13, was 12"),
    "one less": (lambda at: (at / "val" / "cat" / "0.bmp").unlink(), r"val\.num_images is 5, was 6"),
    "another label": (
        lambda at: (at / "train" / "cat" / "0.bmp").rename(at / "train" / "dog" / "7.bmp"),
        r"train\.labels changed",
    ),
    "a class": (lambda at: picture(at / "train" / "emu" / "0.bmp", 999), "num_classes is 3, was 2"),
    "a class's name": (
        lambda at: [(at / part / "cat").rename(at / part / "ant") for part in ("train", "val", "test")],
        "class_names is \\['ant', 'dog'\\], was \\['cat', 'dog'\\]",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_result_of_other_images_is_not_returned(
    change: str, run: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    method = "linear" if change == "a training image" else "vpt-deep"
    options = {"method": method, "options": {} if method == "linear" else {"num_prompts": 2}, "test": True}
    run(**options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    alter, message = CHANGES[change]
    alter(images)
    with pytest.raises(ValueError, match=f"holds another run .*{message}.*--no-resume"):
        run(**options)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    results = run(**options, resume=False)
    assert run(**options) == results


def test_a_finished_run_is_returned_without_reading_anything_while_no_file_changed(
    run: Callable[..., Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(test=True)
    monkeypatch.setattr(execute_module, "load_run_data", lambda *_: pytest.fail("images were read"))
    assert run(test=True) == run() == results
    monkeypatch.undo()


@pytest.mark.parametrize("how", ["touched", "copied", "a note beside them"])
def test_a_finished_run_is_returned_where_files_changed_and_their_images_did_not(
    how: str, run: Callable[..., Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = run(test=True)
    if how == "touched":
        os.utime(images / "train" / "cat" / "0.bmp")
    elif how == "copied":
        shutil.copytree(images, tmp_path / "copy")
        shutil.rmtree(images)
        (tmp_path / "copy").rename(images)
    else:
        (images / "train" / "cat" / "notes.txt").write_text("mine")
    without = {key: value for key, value in results.items() if key != "identity"}
    with monkeypatch.context() as patch:
        patch.setattr(execute_module, "_train", lambda *_: pytest.fail("trained again"))
        found = run(test=True)
        assert {key: value for key, value in found.items() if key != "identity"} == without
        patch.setattr(execute_module, "load_run_data", lambda *_: pytest.fail("the new times were not kept"))
        assert run(test=True) == found


def test_another_backbone_or_other_class_embeddings_under_the_same_name_are_named(
    run: Callable[..., Any], tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: Path
) -> None:
    path = tmp_path / "classes.npy"
    np.save(path, np.eye(2, 48))
    options: dict[str, Any] = {"head": "text", "class_embeddings": str(path)}
    results = run(**options)
    np.save(path, np.eye(2, 48)[::-1])
    with pytest.raises(ValueError, match=r"\(head_tensors\.head\.class_embeddings changed\)"):
        run(**options)
    np.save(path, np.eye(2, 48))
    assert run(**options)["validation"] == results["validation"]
    (tiny_vit.blocks[0].attn.qkv.weight.data).add_(1)
    os.utime(images)  # local weights change with their folder; here the images stand in for it
    os.utime(images / "val" / "cat" / "0.bmp")
    with pytest.raises(ValueError, match=r"\(backbone changed\)"):
        run(**options)


def test_results_of_an_earlier_version_are_compared_as_far_as_they_go(
    run: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    results = run()
    path = tmp_path / "run" / "results.json"
    del results["identity"]
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    del settings["on_bad"]  # the first version had no such choice
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    path.write_text(json.dumps(results))
    with pytest.warns(UserWarning, match="recorded the names of the images but not their contents"):
        assert run() == results
    assert "identity" not in json.loads(path.read_text())
    with pytest.warns(UserWarning, match="recorded the names"):
        assert run(test=True)["test"]["num_images"] == 6
    picture(images / "train" / "cat" / "9.bmp", 999)
    with pytest.raises(ValueError, match=r"data\.train is 13, was 12"):
        run()


def test_settings_are_compared_before_anything_is_read(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run()
    monkeypatch.setattr(execute_module, "backbone_at", lambda *_: pytest.fail("the backbone was loaded"))
    with pytest.raises(ValueError, match=r"different settings .*num_val: None there, 2 now"):
        run(num_val=2)
    with directory_lock(tmp_path / "run"), pytest.raises(DirectoryInUse, match=f"process {os.getpid()}"):
        run(resume=False)


def test_a_class_folder_that_is_no_utf8_is_refused_before_training(
    run: Callable[..., Any], images: Path, tmp_path: Path
) -> None:
    for part in ("train", "val", "test"):
        (images / part / "cat").rename(images / part / os.fsdecode(b"caf\xe9"))
    for method in ("vpt-deep", "linear"):
        with pytest.raises(ValueError, match=r"class_names\[0\] must be text that UTF-8 can encode"):
            run(method, options={})
        assert not (tmp_path / "run").exists()


def test_a_folder_whose_path_is_no_utf8_is_no_obstacle(
    tiny_vit: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"pictures-\xe9")
    images.rename(folder)
    monkeypatch.setattr(execute_module, "backbone_at", lambda *_: fp.FrozenViT(tiny_vit))
    settings = RunSettings("linear", str(folder), recipe={"dtype": "float32"})
    results = execute(settings, tmp_path / "run", progress=False)
    assert read_settings(tmp_path / "run") == settings
    assert execute(settings, tmp_path / "run", progress=False) == results


def test_the_command_says_that_the_folder_changed(
    run: Callable[..., Any], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["adapt", "--method", "vpt-deep", "--data", str(images), "--out", str(tmp_path / "cli"), "--no-progress"]
    command += ["--epochs", "1", "--dtype", "float32", "--num-prompts", "2"]
    assert main(command) == 0
    assert main(command) == 0
    picture(images / "train" / "cat" / "9.bmp", 999)
    capsys.readouterr()
    assert main(command) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "train.num_images is 13, was 12" in shown.err
    assert "--no-resume" in shown.err
    assert main([*command, "--no-resume"]) == 0
