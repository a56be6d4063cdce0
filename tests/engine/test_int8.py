"""`fp.Engine` in int8: every method, mixed batches, and when dtype=None means it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.adapters import Int8Check, keep_int8_check, state_digest
from fastprompt.engine import engine as module
from fastprompt.int8 import native
from fastprompt.int8.linear import LINEARS, Int8Linear, linear_of
from fastprompt.int8.weights import relative_error

Build = Callable[..., fp.PromptedViT]


@pytest.fixture
def weights(backbone: fp.FrozenViT, images: Tensor) -> fp.Int8Weights:
    return fp.Int8Weights.calibrate(backbone, images)


def test_every_method_stays_close_to_float32(
    build: Build, images: Tensor, weights: fp.Int8Weights, variant: str
) -> None:
    model = build(variant)
    if model.full:
        with pytest.raises(ValueError, match="backbone must be frozen"):
            fp.Engine(model, dtype="int8", int8=weights)
        return
    engine = fp.Engine(model, (4,), "int8", int8=weights)
    with torch.no_grad():
        expected = model(images)
    found = engine(images)
    assert 0 < relative_error(found, expected) < 0.1  # in int8, and yet close
    named = engine(images, adapter_names=["default"] * len(images))
    torch.testing.assert_close(torch.stack(list(named)), found, rtol=1e-3, atol=1e-3)


def test_all_linears_of_the_blocks_run_in_int8(build: Build, weights: fp.Int8Weights) -> None:
    engine = fp.Engine(build("vpt-deep"), dtype="int8", int8=weights)
    parts = engine.model.backbone.folded()
    assert parts is not None
    assert all(isinstance(linear_of(block, name), Int8Linear) for block in parts.blocks for name in LINEARS)
    assert engine.precision == "int8"
    assert "in int8 on cpu" in engine.describe()
    assert "in int8 on cpu" in str(fp.explain(engine))


def test_adapters_of_several_methods_share_a_batch(build: Build, images: Tensor, weights: fp.Int8Weights) -> None:
    engine = fp.Engine(build("linear"), (4,), "int8", int8=weights)
    for name in ("vpt-deep", "vapt", "pgn"):
        engine.add_adapter(name, build(name, seed=1))
    names = ["vpt-deep", "vapt", "pgn", "default"]
    mixed = engine(images[:4], adapter_names=names)
    for i, name in enumerate(names):
        alone = engine(images[i : i + 1], adapter_names=[name])[0]
        torch.testing.assert_close(mixed[i], alone, rtol=1e-3, atol=1e-3)


def test_changes_of_the_model_are_followed(build: Build, images: Tensor, weights: fp.Int8Weights) -> None:
    model = build("vpt-deep")
    engine = fp.Engine(model, (4,), "int8", int8=weights)
    before = engine(images)
    with torch.no_grad():
        for p in model.generator.parameters():
            p.add_(torch.randn_like(p))
    after = engine(images)
    assert not torch.allclose(before, after)
    assert torch.equal(after, fp.Engine(model, (4,), "int8", int8=weights)(images))


def test_none_means_int8_only_if_it_is_allowed(
    build: Build, images: Tensor, weights: fp.Int8Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("vpt-deep")
    for fast, allowed, expected in ((False, True, "int8"), (True, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(module, "bfloat16_is_fast", lambda device, fast=fast: fast)
        monkeypatch.setattr(native, "beats_bfloat16", lambda: False)
        engine = fp.Engine(model, backend="eager", allow_int8=allowed, int8=weights if allowed else None)
        assert engine.precision == expected
    assert engine.not_int8 == ""
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda device: True)
    assert fp.Engine(model, allow_int8=True, int8=weights).not_int8 == "bfloat16 is faster on this processor"
    monkeypatch.setattr(native, "beats_bfloat16", lambda: True)
    wide = fp.Int8Weights.calibrate(model.backbone, images, activation_bits=12)
    reason = fp.Engine(model, allow_int8=True, int8=wide).not_int8
    assert " Linears have 12 bits, and bfloat16 is faster than those" in reason
    narrow = fp.Int8Weights.calibrate(model.backbone, images, activation_bits=8)
    assert fp.Engine(model, backend="eager", allow_int8=True, int8=narrow).precision == "int8"
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda device: False)
    other = build("vpt-deep", backbone=fp.FrozenViT(model_of(1)))
    engine = fp.Engine(other, backend="eager", allow_int8=True, int8=weights)
    assert engine.precision == "float32"
    assert "not int8: int8 are for the backbone with fingerprint" in str(fp.explain(engine))


def test_auto_means_int8_for_an_adapter_that_was_checked(
    build: Build, weights: fp.Int8Weights, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "bfloat16_is_fast", lambda device: False)
    built = build("vpt-deep")
    check = Int8Check(state_digest(built.adapter_state_dict()), weights.digest, 500, -0.001, -0.004, 0.002, 0.998)
    built.save_pretrained(tmp_path)
    keep_int8_check(tmp_path, check)

    def precision(model: fp.PromptedViT, given: fp.Int8Weights | None = weights) -> str:
        engine = fp.Engine(model, dtype="auto", backend="eager", int8=given)
        return f"{engine.precision}{engine.not_int8}"

    model = fp.PromptedViT.from_pretrained(built.backbone, tmp_path)
    assert model.int8_check == check
    assert precision(model) == "int8"
    assert fp.Engine(model, dtype=torch.float32, backend="eager").precision == "float32"
    with pytest.raises(ValueError, match="int8 must be None with dtype=None"):
        precision(built)  # not checked
    other = dataclasses.replace(weights, blocks=weights.blocks[::-1])
    assert precision(model, other) == "float32the adapter was compared with float32 on other int8 weights"
    model.save_pretrained(tmp_path / "again")
    assert fp.PromptedViT.from_pretrained(model.backbone, tmp_path / "again").int8_check == check
    with torch.no_grad():
        next(model.generator.parameters()).add_(1)
    assert precision(model) == "float32the adapter has changed since it was compared with float32"
    model.save_pretrained(tmp_path / "changed")
    assert fp.PromptedViT.from_pretrained(model.backbone, tmp_path / "changed").int8_check is None
    with pytest.raises(ValueError, match="is not the one that was compared"):
        keep_int8_check(tmp_path / "changed", check)
    for lost in ({"difference": -0.004}, {"low": -0.02}):
        failed = dataclasses.replace(check, **lost)
        assert not failed.passed
        keep_int8_check(tmp_path, failed)
        loaded = fp.PromptedViT.from_pretrained(model.backbone, tmp_path)
        assert precision(loaded, None) == "float32"


def model_of(seed: int) -> torch.nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
