"""The engine behind a host: what is loaded, what is refused at the start, and batches of many clients."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastprompt as fp
from fastprompt.adapters import Preprocessing
from fastprompt.cli import main
from fastprompt.engine import engine as engines
from fastprompt.engine.backends import BACKENDS, Backend
from fastprompt.serve.protocol import Ask, Limits, Refused, Work, classify_answer, classify_work, embeddings_work
from fastprompt.serve.tenants import HostSettings, answers, load, warm_up


def settings(place: Path, *adapters: str, **options: Any) -> HostSettings:
    return HostSettings(
        f"local-dir:{place / 'vit'}",
        adapters={name: place / name for name in adapters},
        **{"dtype": "float32", "batch_size": 4, "threads": 1, **options},
    )


def pictures(count: int, height: int = 32, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (count, 3, height, 32), np.uint8))


def test_what_is_loaded_is_told(place: Path) -> None:
    engine, catalogue = load(settings(place, "birds", "cars"))
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    assert engine.adapter_names == ["__base__", "birds", "cars"]
    assert (catalogue.name, catalogue.fingerprint) == ("vit", backbone.fingerprint)
    assert abs(catalogue.created - time.time()) < 60
    assert str(place) not in str(catalogue.models())
    assert (catalogue.width, catalogue.dtype) == (48, "float32")
    assert catalogue.adapters == {"birds": ["birds-0", "birds-1", "birds-2"], "cars": list("0123456")}


def test_the_backbone_is_the_one_that_an_adapter_names(place: Path) -> None:
    named = load(settings(place, "birds"))[1]
    catalogue = load(HostSettings(adapters={"birds": place / "birds"}, dtype="float32", threads=1))[1]
    assert (catalogue.name, catalogue.fingerprint) == (named.name, named.fingerprint)


def test_adapters_are_served_in_int8(place: Path, tmp_path: Path) -> None:
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    images = torch.from_numpy(np.stack(pictures(12)))
    file = fp.Int8Weights.calibrate(backbone, images).save(tmp_path / "int8.safetensors")
    engine, catalogue = load(settings(place, "birds", dtype="int8", int8=file))
    assert catalogue.dtype == engine.precision == "int8"
    work = [Work(pictures(3), "birds")]
    [found], [exact] = answers(engine, work), answers(load(settings(place, "birds"))[0], work)
    np.testing.assert_allclose(found, exact, rtol=0.1, atol=0.1)
    assert not np.array_equal(found, exact)


def test_any_size_leaves_adapters_their_backbone(place: Path) -> None:
    engine, catalogue = load(settings(place, "birds", any_size=True))
    assert catalogue.fingerprint == fp.load_backbone(f"local-dir:{place / 'vit'}").fingerprint
    assert [entry["any_size"] for entry in catalogue.models()["data"]] == [True, True]
    [[short], [tall]] = answers(engine, [Work(pictures(1), "__base__"), Work(pictures(1, 40), "__base__")])
    assert short.shape == tall.shape == (48,)


def test_adapters_of_one_size_are_known_and_their_pictures_refused_before_they_wait(
    place: Path, picture: Callable[..., bytes]
) -> None:
    _, catalogue = load(settings(place, "birds", "cars", "rgb", any_size=True))
    assert list(catalogue.fixed) == ["cars", "rgb"]
    assert [entry["any_size"] for entry in catalogue.models()["data"]] == [True, True, False, False]
    for name in ("cars", "rgb"):
        assert classify_work(Ask([picture()], name, "float"), catalogue, Limits()).adapter == name
        for height, width in ((40, 32), (16, 64)):  # the second has as many patches
            ask = Ask([picture(height=height, width=width)], name, "float", "exact")
            with pytest.raises(Refused, match="takes 32 x 32 pixels") as caught:
                classify_work(ask, catalogue, Limits())
            assert (caught.value.status, caught.value.code) == (422, "wrong_size")
    assert catalogue.in_pixels == ["rgb"]
    with pytest.raises(Refused, match="takes 32 x 32 pixels"):  # also where nothing is said
        classify_work(Ask([picture(height=40)], "rgb", "float"), catalogue, Limits())
    exact = classify_work(Ask([picture(height=40)], "birds", "float", "exact"), catalogue, Limits())
    assert exact.pictures[0].shape == (3, 40, 32)
    assert embeddings_work(Ask([picture(height=40)], None, "float"), catalogue, Limits()).adapter == "__base__"
    assert not load(settings(place, "cars"))[1].fixed


def test_pictures_of_a_client_that_extends_them_give_its_models_answer(place: Path) -> None:
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    model = fp.PromptedViT.from_pretrained(backbone, place / "rgb")
    client, raw = fp.RGBPrompts(model), torch.from_numpy(np.stack(pictures(2)))
    tall = client.pictures(raw).numpy()
    assert tall.shape == (2, 3, 40, 32)
    engine, _ = load(settings(place, "rgb", any_size=True))
    [features] = answers(engine, [Work(list(tall), "__base__")])
    with torch.no_grad():
        expected = model(raw)
    assert not isinstance(features, Refused)
    torch.testing.assert_close(client.classify(torch.from_numpy(np.stack(features))), expected, rtol=1e-4, atol=1e-4)
    [logits] = answers(engine, [Work(list(raw.numpy()), "rgb")])
    torch.testing.assert_close(torch.from_numpy(np.stack(logits)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_photo_gets_the_answer_of_predict(
    place: Path, tmp_path: Path, picture: Callable[..., bytes], resize: str
) -> None:
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    model = fp.PromptedViT.from_pretrained(backbone, place / "birds")
    model.preprocessing = Preprocessing(resize)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "photo.jpg").write_bytes(picture(height=77, width=45, format="JPEG"))
    command = ["predict", str(tmp_path / "adapter"), str(tmp_path / "photo.jpg"), "--dtype", "float32"]
    assert main([*command, "--backbone", f"local-dir:{place / 'vit'}", "--out", str(tmp_path / "out.json")]) == 0
    [expected] = json.loads((tmp_path / "out.json").read_text())["images"]
    engine, catalogue = load(replace(settings(place), adapters={"birds": tmp_path / "adapter"}))
    ask = Ask([(tmp_path / "photo.jpg").read_bytes()], "birds", "float")
    [logits] = answers(engine, [classify_work(ask, catalogue, Limits())])
    assert not isinstance(logits, Refused)
    [found] = classify_answer(ask, catalogue, logits)["data"]
    assert found["class"] == expected["class"]
    for entry in found["probabilities"]:
        assert entry["probability"] == pytest.approx(expected["probabilities"][entry["class"]], rel=1e-5)


@pytest.mark.parametrize("fast_adapters", [0, 1])
def test_an_adapter_of_other_means_gets_its_own_pixels(
    place: Path, tmp_path: Path, fast_adapters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from_pretrained's model does, whether its batches run on a backend or beside the backbone's."""
    monkeypatch.setitem(BACKENDS, "fast", Backend(lambda model, images: model, bakes=False))
    backbone = fp.load_backbone(f"local-dir:{place / 'vit'}")
    model = fp.PromptedViT.from_pretrained(backbone, place / "birds")
    assert model.backbone is backbone
    own = fp.PromptedViT(backbone.normalising_by((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)), model.config, 3)
    own.load_adapter_state_dict(model.adapter_state_dict())
    own.eval().save_pretrained(tmp_path / "other")
    raw = pictures(4)
    with torch.no_grad():
        expected = own(torch.from_numpy(np.stack(raw)))
        assert (model(torch.from_numpy(np.stack(raw))) - expected).abs().max() > 1e-2
        torch.testing.assert_close(
            fp.PromptedViT.from_pretrained(backbone, tmp_path / "other")(torch.from_numpy(np.stack(raw))), expected
        )
    asked = replace(
        settings(place), adapters={"other": tmp_path / "other"}, backend="fast", fast_adapters=fast_adapters
    )
    engine, catalogue = load(asked)
    warm_up(engine, asked, catalogue)
    works = [Work(raw, "other"), Work(raw, "__base__")]
    found, features = answers(engine, works)
    np.testing.assert_allclose(np.stack(found), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(features, answers(engine, works[1:])[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(answers(engine, works[:1])[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (("birds", "nowhere"), FileNotFoundError, "nowhere"),
        (("birds", "stranger"), ValueError, "adapter 'stranger': .* another backbone"),
        (("headless",), ValueError, "adapter 'headless': .* has no head"),
        (("birds", "torn"), ValueError, "torn"),
    ],
)
def test_bad_adapters_are_refused(place: Path, adapters: tuple[str, ...], error: type[Exception], message: str) -> None:
    if "torn" in adapters and not (place / "torn").exists():
        (place / "torn").mkdir()
        for file in (place / "birds").iterdir():
            (place / "torn" / file.name).write_bytes(file.read_bytes()[:-9])
    with pytest.raises(error, match=message):
        load(settings(place, *adapters))


def test_bad_names_and_settings_are_refused(place: Path) -> None:
    name = f"local-dir:{place / 'vit'}"
    with pytest.raises(ValueError, match="is the name of the backbone"):
        load(HostSettings(name, adapters={"vit": place / "birds"}))
    with pytest.raises(ValueError, match="adapter '__base__': name must be"):
        load(HostSettings(name, adapters={"__base__": place / "birds"}))
    for options in ({"dtype": "int4"}, {"int8": place}, {"batch_size": 0}, {"threads": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            settings(place, **options)


def test_batches_of_one_tenant_run_on_the_fastest_backend(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def build(model: fp.PromptedViT, images: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(images: torch.Tensor) -> torch.Tensor:
            batches.append(len(images))
            return model(images)

        return run

    monkeypatch.setitem(BACKENDS, "fast", Backend(build))
    monkeypatch.setitem(BACKENDS, "compile", Backend(lambda model, images: pytest.fail("takes minutes")))
    monkeypatch.setitem(BACKENDS, "openvino", Backend(build, lambda model: "not here"))
    monkeypatch.setattr(engines, "_seconds", lambda run, device: 1.0 + isinstance(run.func, fp.PromptedViT))
    asked = replace(settings(place, "birds", "cars"), fast_adapters=1)
    engine, catalogue = load(asked)
    said = warm_up(engine, asked, catalogue)
    assert said == [f"{name}: fast for batches of 1, fast for batches of 4" for name in ("vit", "birds")]
    for works, expected in [
        ([Work(pictures(4), "birds")], [4]),
        ([Work(pictures(1), "birds")], [1]),
        ([Work(pictures(2), "birds"), Work(pictures(2), "birds")], [4]),
        ([Work(pictures(4), "__base__")], [4]),
        ([Work(pictures(4), "cars")], []),
        ([Work(pictures(3), "birds"), Work(pictures(1), "cars")], []),
    ]:
        batches.clear()
        found = answers(engine, works)
        assert batches == expected
        alone = load(replace(asked, backend="eager"))[0]
        for ours, theirs in zip(found, answers(alone, works), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="fast_adapters must be a number from 0 to 15, got 16"):
        replace(asked, fast_adapters=16)


def test_a_batch_of_everybody_is_what_each_would_get_alone(place: Path) -> None:
    engine, _ = load(settings(place, "birds", "cars", any_size=True))
    works = [
        Work(pictures(2, seed=1), "birds"),
        Work(pictures(1, 40, 2), "__base__"),
        Work(pictures(1, seed=3), "cars"),
        Work([*pictures(1, 48, 4), *pictures(1, seed=4)], "birds"),
        Work(pictures(3, seed=5), "__base__"),
    ]
    calls = []

    def recorded(images: torch.Tensor, adapter_names: list[str]) -> Any:
        calls.append((tuple(images.shape[2:]), adapter_names))
        return fp.Engine.__call__(engine, images, adapter_names)

    spy: Any = type("Spy", (), {"__call__": lambda self, *a, **k: recorded(*a, **k), "model": engine.model})()
    together = answers(spy, works)
    assert calls == [
        ((32, 32), ["birds", "birds", "cars", "birds", "__base__", "__base__", "__base__"]),
        ((40, 32), ["__base__"]),
        ((48, 32), ["birds"]),
    ]
    for work, found in zip(works, together, strict=True):
        [alone] = answers(engine, [work])
        assert len(found) == len(work.pictures)
        for one, other in zip(found, alone, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_request_that_fails_takes_no_other_with_it(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, _ = load(settings(place, "birds", "cars", any_size=True))
    good = Work(pictures(1), "birds")
    [found, refused, lost] = answers(engine, [good, Work(pictures(1, 40), "cars"), Work(pictures(1), "deleted")])
    np.testing.assert_allclose(found[0], answers(engine, [good])[0][0], rtol=1e-4, atol=1e-5)
    assert isinstance(refused, Refused), "VAPT mixes the patches of one size"
    assert (refused.status, refused.message) == (422, "the model takes no picture of 40 x 32 pixels")
    assert isinstance(lost, Refused)
    assert "deleted" not in lost.message
    calls: list[list[str]] = []

    class Recorded:
        model = engine.model

        def __call__(self, images: torch.Tensor, adapter_names: list[str]) -> torch.Tensor | list[torch.Tensor]:
            calls.append(adapter_names)
            return engine(images, adapter_names=adapter_names)

    works = [good] * 5 + [Work([*pictures(1), *pictures(1, 40)], "cars"), Work(pictures(1, 40), "birds")]
    found = answers(Recorded(), works)  # type: ignore[arg-type]
    assert [isinstance(answer, Refused) for answer in found] == [False] * 5 + [True, False]
    assert calls == [["birds"] * 5 + ["cars"], ["cars", "birds"], ["cars"], ["birds"]]

    class Broken:
        model = engine.model

        def __call__(self, *_: object, **__: object) -> None:
            raise RuntimeError("secret address 0x7f")

    [error] = answers(Broken(), [good])  # type: ignore[arg-type]
    assert isinstance(error, Refused)
    assert (error.status, "secret" in error.message) == (500, False)
    assert "secret" in caplog.text


def test_backbone_and_size_come_from_the_first_adapter(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastprompt.runs.directory import write_json
    from fastprompt.runs.settings import RunSettings
    from fastprompt.serve import tenants

    asked: list[Any] = []

    def backbone_at(name: str, image_size: int | None) -> Callable[..., Any]:
        asked.append((name, image_size))
        raise ValueError("enough")

    monkeypatch.setattr(tenants, "backbone_at", backbone_at)
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    for file in (place / "birds").iterdir():
        (run / "best" / file.name).write_bytes(file.read_bytes())
    for given in (HostSettings(), HostSettings(adapters={"a": run / "best"})):
        with pytest.raises(ValueError, match="enough"):
            load(given)
    write_json(run / "run.json", RunSettings(method="vpt-deep", data="d", backbone="vit-s14").to_dict())
    with pytest.raises(ValueError, match="enough"):
        load(HostSettings(adapters={"a": run}))
    assert asked == [("clip-vit-b16", None), (f"local-dir:{place / 'vit'}", 32), ("vit-s14", 32)]


def test_outputs_that_are_not_finite_are_no_answer(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the request alone whose adapter gives them."""
    engine, _ = load(settings(place, "birds", "cars"))
    broken = fp.PromptedViT.from_pretrained(fp.load_backbone(f"local-dir:{place / 'vit'}"), place / "birds")
    with torch.no_grad():
        broken.head.weight.fill_(3e38)
    engine.add_adapter("birds", broken)
    refused, [logits] = answers(engine, [Work(pictures(1), "birds"), Work(pictures(1), "cars")])
    assert isinstance(refused, Refused)
    assert (refused.status, refused.code) == (500, "internal_error")
    assert np.isfinite(logits).all()
    assert "finite outputs" in caplog.text
