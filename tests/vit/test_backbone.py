"""Which backbone it is: the same on every processor, and another where anything that was loaded differs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import fastprompt as fp
from fastprompt.train.identity import as_recorded_here
from fastprompt.vit.backbone import Backbone

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0, "patch_size": 8}


def vit() -> nn.Module:
    return VisionTransformer(img_size=32, **SIZES)


def named_vit() -> nn.Module:
    """One whose library knows the size that it was published for."""
    return timm.create_model("vit_tiny_patch16_224", img_size=224, **{**SIZES, "patch_size": 56})


def swin(name: str) -> nn.Module:
    options = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 0, "window_size": 4}
    model = timm.create_model(name, img_size=64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def resampled_before(model: Any, image_size: int) -> fp.FrozenViT:
    """By timm, before it is read."""
    model.set_input_size(img_size=image_size)
    return fp.FrozenViT(model)


def resized(model: nn.Module, image_size: int) -> fp.FrozenViT:
    """Resampled here."""
    return fp.FrozenViT(model, image_size=image_size)


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, int], fp.FrozenViT], int]] = {
    "resized": (vit, resized, 48),
    "resampled before": (named_vit, resampled_before, 336),
    "swin": (lambda: swin("swin_tiny_patch4_window7_224"), resized, 128),
    "swinv2": (lambda: swin("swinv2_tiny_window8_256"), resized, 128),
}
"""By name: a module of its own size, how it becomes a backbone of another, and which."""


def built(name: str, size: int | None = None, seed: int = 0, state: Path | None = None) -> fp.FrozenViT:
    """A backbone of random weights, or of those in a file."""
    make, read, own = MODULES[name]
    torch.manual_seed(seed)
    module = make()
    if state is not None:
        module.load_state_dict(torch.load(state, weights_only=True))
    return read(module, size or own)


@torch.no_grad()
def shake(backbone: fp.FrozenViT) -> None:
    """Give what was computed when the backbone was read the last bits of another processor."""
    for name in backbone._loaded:
        backbone.get_parameter(name).mul_(1 + 2e-7)


@pytest.mark.parametrize("name", MODULES)
def test_last_bits_of_what_was_computed_do_not_count(name: str, tmp_path: Path) -> None:
    backbone, other = built(name), built(name)
    assert backbone._loaded
    shake(other)
    assert other.identity.earlier != backbone.identity.earlier  # as versions took it that refused this
    assert other.fingerprint == backbone.fingerprint
    assert other.is_same(backbone)
    model = fp.PromptedViT(backbone, fp.VPTConfig(num_prompts=2), 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(fp.PromptedViT.from_pretrained(other, tmp_path).head.weight, model.head.weight)
    fp.Engine(other, dtype=torch.float32, backend="eager").add_adapter("own", tmp_path)
    fp.Engine(other, dtype=torch.float32, backend="eager").add_adapter("own", model)
    fp.PromptedViT.from_pretrained(other.bfloat16(), tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_other_weights_size_or_resampling_are_another_backbone(name: str, tmp_path: Path) -> None:
    backbone = built(name)
    fp.PromptedViT(backbone, fp.LinearProbeConfig(), 3).save_pretrained(tmp_path)
    for other in (built(name, seed=1), built(name, backbone.image_size[0] // 2)):
        assert not other.is_same(backbone)
        with pytest.raises(ValueError, match="was trained on another backbone"):
            fp.PromptedViT.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("by", [1e-4, 1e-5])
def test_what_was_resampled_before_is_compared(tmp_path: Path, by: float) -> None:
    backbone, other = built("resampled before"), built("resampled before")
    fp.PromptedViT(backbone, fp.LinearProbeConfig(), 3).save_pretrained(tmp_path)
    with torch.no_grad():
        other.pos_embed[0, 3, 5] += by * other.pos_embed.abs().max()
    assert other.fingerprint == backbone.fingerprint
    assert not other.is_same(backbone)
    with pytest.raises(ValueError, match=r"was trained on another backbone: .*, resampled otherwise"):
        fp.PromptedViT.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("name", MODULES)
def test_a_recorded_run_is_told_by_the_same_rule(name: str) -> None:
    backbone, other = built(name), built(name)
    shake(other)
    resampled = other.identity.resampled
    for named in (other.fingerprint, backbone.identity.earlier):
        assert as_recorded_here({"backbone": named}, resampled, backbone)["backbone"] == backbone.fingerprint
    unlike = built(name, seed=1)
    there = as_recorded_here({"backbone": unlike.fingerprint}, unlike.identity.resampled, backbone)
    assert there["backbone"] != backbone.fingerprint


@pytest.mark.parametrize("name", MODULES)
def test_adapters_of_earlier_versions_load(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the hash of what came of resampling, and nothing to compare."""
    backbone = built(name)
    earlier = backbone.identity.earlier
    monkeypatch.setattr(
        Backbone, "identity", property(lambda self: self._identify()._replace(fingerprint=earlier, resampled={}))
    )
    model = fp.PromptedViT(backbone, fp.LinearProbeConfig(), 3)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["backbone"]["fingerprint"] == earlier
    assert torch.equal(fp.PromptedViT.from_pretrained(backbone, tmp_path).head.weight, model.head.weight)


def test_what_was_not_resampled_keeps_the_fingerprint_of_earlier_versions(tiny_vit: VisionTransformer) -> None:
    for module in (tiny_vit, timm.create_model("vit_tiny_patch16_224", depth=1)):
        identity = fp.FrozenViT(module).identity
        assert identity.fingerprint == identity.earlier
        assert not identity.resampled


def test_loaded_tensors_are_as_loaded(tiny_vit: VisionTransformer) -> None:
    backbone = built("resized")
    state = {name: tensor + 1 for name, tensor in backbone.state_dict().items()}
    backbone.load_state_dict(state)
    assert backbone.identity.fingerprint == backbone.identity.earlier


THERE = """
import importlib.util, pathlib, torch, fastprompt as fp
spec = importlib.util.spec_from_file_location("test_backbone", {file!r})
tests = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tests)
print(torch.backends.cpu.get_cpu_capability())
for name in tests.MODULES:
    place = pathlib.Path({root!r}) / name
    backbone = tests.built(name, state=place / "module.pt")
    print(backbone.fingerprint)
    fp.PromptedViT.from_pretrained(backbone, place)
"""


def test_adapters_load_under_another_instruction_set(tmp_path: Path) -> None:
    prints = []
    for name, (make, _, _) in MODULES.items():
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        torch.save(make().state_dict(), tmp_path / name / "module.pt")
        backbone = built(name, state=tmp_path / name / "module.pt")
        fp.PromptedViT(backbone, fp.LinearProbeConfig(), 3).save_pretrained(tmp_path / name)
        prints.append(backbone.fingerprint)
    code = THERE.format(file=__file__, root=str(tmp_path))
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DEFAULT", *prints]
