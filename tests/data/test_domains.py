from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.data import DataSplits, DomainSet
from fastprompt.runs import execute as execute_module
from fastprompt.runs.execute import execute
from fastprompt.runs.settings import RunSettings


def make(root: Path, classes: dict[str, int], count: int) -> Path:
    for number, (name, shade) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        random = np.random.default_rng((number, shade))
        for i in range(count):
            pixels = random.integers(shade, shade + 40, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("domains")
    make(root / "pets", {"cat": 0, "dog": 60}, 12)
    make(root / "farm", {"cow": 120, "dog": 180}, 4)
    return root


def load(place: Path, **options: Any) -> DataSplits:
    sources = [str(place / "pets"), str(place / "farm")]
    return fp.load_data(sources, image_size=32, **options)


def whole(data: Any) -> DomainSet:
    assert isinstance(data, DomainSet)
    return data


def test_a_union_joins_classes_of_one_name(place: Path) -> None:
    data = load(place)
    assert data.class_names == ["cat", "dog", "cow"]
    train = whole(data.train)
    assert train.domains.names == ("pets", "farm")
    assert train.domains.classes == ((0, 1), (2, 1))
    alone = {name: fp.load_data(str(place / name), image_size=32) for name in ("pets", "farm")}
    assert len(train) == sum(len(each.train) for each in alone.values())
    farm = whole(data.train).of("farm")
    assert {data.class_names[label] for label in farm.labels} == {"cow", "dog"}
    for i, (image, label) in enumerate(farm):
        other, own = alone["farm"].train[i]
        assert torch.equal(image, other)
        assert data.class_names[label] == alone["farm"].class_names[own]
    summary = data.summary()
    assert summary["train"] == len(train)
    assert set(summary["domains"]) == {"pets", "farm"}


def test_heads_per_domain_keep_classes_apart(place: Path) -> None:
    data = load(place, labels="per-domain")
    assert data.class_names == ["pets: cat", "pets: dog", "farm: cow", "farm: dog"]
    assert whole(data.train).domains.classes == ((0, 1), (2, 3))


def test_balanced_epochs_have_equally_many_of_each_domain(place: Path) -> None:
    data = load(place, sampling="balanced", seed=1)
    train = whole(data.train)
    sizes = Counter(train.domain_of)
    assert sum(sizes.values()) == len(train)
    assert abs(sizes["pets"] - sizes["farm"]) <= 1
    proportional = Counter(whole(load(place).train).domain_of)
    assert proportional["pets"] > 2 * proportional["farm"]
    first = list(train._index)
    train.set_epoch(1)
    assert train._index != first
    train.set_epoch(0)
    assert train._index == first
    drawn = Counter(i for number, i in first if number == 1)
    assert set(drawn) == set(range(len(train.parts[1]))), "a small domain is drawn whole before it repeats"
    assert max(drawn.values()) - min(drawn.values()) <= 1
    assert Counter(whole(data.val).domain_of) == Counter(whole(load(place, seed=1).val).domain_of)


def test_labels_follow_the_epochs_images(place: Path) -> None:
    train = whole(load(place, sampling="balanced").train)
    for epoch in (0, 3):
        train.set_epoch(epoch)
        assert train.labels == [label for _, label in train]


def test_the_test_split_is_read_once(place: Path) -> None:
    data = load(place)
    assert len(data.test) == data.summary()["test"]
    with pytest.raises(RuntimeError, match="was read already"):
        _ = data.test


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], {}, "name must be two data sets or more"),
        (5, {}, "name must be a data set or a list of them"),
        (["x/pets", "y/pets"], {}, "two are 'pets'"),
        (["x/pets", "y/farm"], {"labels": "both"}, "labels must be one of 'union', 'per-domain'"),
        (["x/pets", "y/farm"], {"sampling": "all"}, "sampling must be one of"),
        ("mnist5k", {"labels": "union"}, "labels must be None for a single data set"),
    ],
)
def test_wrong_arguments(names: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.load_data(names, image_size=32, **options)


@pytest.mark.parametrize("labels", ["union", "per-domain"])
def test_one_model_for_several_domains(labels: str, place: Path, tiny_vit: Any, tmp_path: Path) -> None:
    """Trained, evaluated by domain, saved and loaded; the adapter knows its domains."""
    data = load(place, labels=labels, sampling="balanced")
    backbone = fp.FrozenViT(tiny_vit)
    config = fp.PGNConfig(num_prompts=2, library_size=4, widths=(4,))
    model = fp.PromptedViT(backbone, config, num_classes=data.num_classes)
    recipe = fp.default_recipe(config).replace(epochs=2, dtype="float32", warmup_epochs=0)
    result = fp.fit(model, data.train, data.val, recipe, tmp_path / "run", progress=False)
    assert len(result.history) == 2
    loaded = fp.PromptedViT.from_pretrained(backbone, tmp_path / "run" / "best")
    assert loaded.domains == whole(data.val).domains
    pets = whole(data.val).of("pets")
    given = fp.evaluate(loaded, pets, domain="pets")
    own = list(loaded.domains.classes[0])
    assert set(given.predictions.tolist()) <= set(own)
    images = torch.stack([image for image, _ in pets])
    expected = loaded(images).detach()[:, own].argmax(-1)
    assert given.predictions.tolist() == [own[i] for i in expected.tolist()]
    if labels == "per-domain":
        assert fp.evaluate(loaded, pets).accuracy == given.accuracy, "the label names the head"
        assert result.best_val_accuracy == pytest.approx(fp.evaluate(loaded, data.val).accuracy)
    with pytest.raises(ValueError, match="domain must be one of pets, farm, got 'sea'"):
        fp.evaluate(loaded, pets, domain="sea")
    again = fp.fit(model, data.train, data.val, recipe, tmp_path / "run", progress=False)
    assert again.best_val_accuracy == result.best_val_accuracy
    other = load(place, labels=labels)
    with pytest.raises(ValueError, match="holds another run"):
        fp.fit(
            fp.PromptedViT(backbone, config, num_classes=data.num_classes),
            other.train,
            other.val,
            recipe,
            tmp_path / "run",
        )


def test_a_model_of_one_data_set_has_no_domains(place: Path, tiny_vit: Any) -> None:
    data = fp.load_data(str(place / "pets"), image_size=32)
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.LinearProbeConfig(), num_classes=2)
    with pytest.raises(ValueError, match="domain must be None"):
        fp.evaluate(model, data.val, domain="pets")


def test_a_run_of_several_domains_reports_each(
    place: Path, tiny_vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(execute_module, "backbone_at", lambda *_: fp.FrozenViT(tiny_vit))
    settings = RunSettings(
        "pgn",
        str(place / "pets"),
        options={"num_prompts": 2, "library_size": 4, "widths": [4]},
        recipe={"epochs": 1, "warmup_epochs": 0, "dtype": "float32"},
        more_data=(str(place / "farm"),),
        labels="per-domain",
        sampling="balanced",
    )
    results = execute(settings, tmp_path / "run", test=True, progress=False)
    for part in ("validation", "test"):
        assert set(results["domains"][part]) == {"pets", "farm"}
        weighted = sum(each["accuracy"] * each["num_images"] for each in results["domains"][part].values())
        assert weighted / results[part]["num_images"] == pytest.approx(results[part]["accuracy"])
    assert RunSettings.from_dict(settings.to_dict()) == settings
    monkeypatch.setattr("fastprompt.cli.predict.load_adapter", lambda *_: loaded)
    loaded = fp.PromptedViT.from_pretrained(fp.FrozenViT(tiny_vit), tmp_path / "run" / "best")
    picture = str(place / "farm" / "cow" / "0.png")
    assert main(["predict", str(tmp_path / "run"), picture]) == 2
    assert "--domain must be given, one of pets, farm" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "run"), picture, "--domain", "farm", "--out", str(tmp_path / "p.csv")]) == 0
    assert ",farm: " in (tmp_path / "p.csv").read_text().splitlines()[1]


def test_images_of_domains_name_their_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (32, 32)).save(tmp_path / name / label / f"{i}.png")
    data = fp.load_data([tmp_path / "first", tmp_path / "second"], image_size=32)
    for part in (data.train, data.val):
        for i, domain in enumerate(part.domain_of):
            path = Path(part.file_of(i))
            assert path.is_file()
            assert path.parent.parent.name == domain
            assert path.parent.name == data.class_names[part[i][1]]
