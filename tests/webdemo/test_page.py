"""The page over HTTP, as a browser's requests, and what it refuses."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
from timm.models import save_for_hf

import fastprompt as fp
from fastprompt.cli import main
from fastprompt.cli.demo import named
from fastprompt.webdemo.models import load_models

gradio = pytest.importorskip("gradio")


@pytest.fixture
def address(models: dict[str, fp.PromptedViT]) -> Iterator[str]:
    from fastprompt.webdemo.page import launch

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    page, where = launch(models, port=port)
    yield where
    page.close(verbose=False)


def test_pictures_become_classes_maps_and_tokens(
    address: str, models: dict[str, fp.PromptedViT], pictures: list[Path], tmp_path: Path
) -> None:
    from gradio_client import Client, handle_file

    client = Client(address, verbose=False, download_files=str(tmp_path / "down"), analytics_enabled=False)
    files = [{"image": handle_file(str(path)), "caption": None} for path in pictures]
    text, maps = client.predict(files, list(models), api_name="/classify")
    assert text.count("<section class='picture'>") == 2
    assert text.count("<div class='adapter'>") == 6
    assert "&lt;b&gt;owl&lt;/b&gt;" in text
    assert "<b>owl" not in text
    assert text.count("library tokens in its prompts") == 2
    assert [entry["caption"] for entry in maps][:1] == ["owl.png, birds, block 0: patches that read the prompts"]
    assert all(Path(entry["image"]).stat().st_size > 0 for entry in maps)
    (tmp_path / "text.png").write_text("no picture")
    for given, chosen, said in (
        ([], ["birds"], "Drop at least one picture"),
        (files, [], "Choose at least one adapter"),
        (9 * files, ["birds"], "at most 16 pictures"),
        ([{"image": handle_file(str(tmp_path / "text.png")), "caption": None}], ["birds"], "cannot read the image"),
    ):
        with pytest.raises(Exception, match=said) as caught:
            client.predict(given, chosen, api_name="/classify")
        assert str(tmp_path) not in str(caught.value)


def test_adapters_of_one_backbone_share_it(tmp_path: Path) -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes), tmp_path / "vit")
    backbone = fp.load_backbone(f"local-dir:{tmp_path / 'vit'}", image_size=32)
    for name, classes in (("a", 3), ("b", 2), ("headless", None)):
        fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), num_classes=classes).save_pretrained(tmp_path / name)
    models = load_models({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert models["a"].backbone is models["b"].backbone
    assert [model.num_classes for model in models.values()] == [3, 2]
    with pytest.raises(ValueError, match="'headless' has no head"):
        load_models({"headless": tmp_path / "headless"})


def test_names_of_adapters(capsys: pytest.CaptureFixture[str]) -> None:
    assert named(["runs/birds", "cars=x/y", "ann/vapt"]) == {
        "birds": Path("runs/birds"),
        "cars": Path("x/y"),
        "vapt": Path("ann/vapt"),
    }
    for words, said in ((["a/x", "b/x"], "got 'x' twice"), (["=x"], "got '=x'"), (["no/such/run"], "directory")):
        assert main(["demo", *words]) == 2
        assert said in capsys.readouterr().err
