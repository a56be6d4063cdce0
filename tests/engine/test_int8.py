"""`fp.Engine` in int8: every method, mixed batches, and when dtype=None means it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.engine import engine as module
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
            p.mul_(2)
    after = engine(images)
    assert not torch.allclose(before, after)
    assert torch.equal(after, fp.Engine(model, (4,), "int8", int8=weights)(images))


def test_none_means_int8_only_if_it_is_allowed(
    build: Build, weights: fp.Int8Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("vpt-deep")
    for fast, allowed, expected in ((False, True, "int8"), (True, True, "bfloat16"), (False, False, "float32")):
        monkeypatch.setattr(module, "bfloat16_is_fast", lambda device, fast=fast: fast)
        engine = fp.Engine(model, backend="eager", allow_int8=allowed, int8=weights if allowed else None)
        assert engine.precision == expected
    other = build("vpt-deep", backbone=fp.FrozenViT(model_of(1)))
    engine = fp.Engine(other, backend="eager", allow_int8=True, int8=weights)
    assert engine.precision == "float32"
    assert "not int8: int8 are for the backbone with fingerprint" in str(fp.explain(engine))


def model_of(seed: int) -> torch.nn.Module:
    import timm

    torch.manual_seed(seed)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0
    )
