"""Int8 weights: file, fit, gate, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.int8 import native
from fastprompt.int8.arithmetic import Rounded
from fastprompt.int8.weights import cached


def same(a: Rounded, b: Rounded) -> bool:
    return a.bits == b.bits and all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_a_file_holds_the_weights(weights: fp.Int8Weights, tmp_path: Path) -> None:
    path = weights.save(tmp_path / "folder" / "int8.safetensors")
    loaded = fp.Int8Weights.load(path)
    for field in dataclasses.fields(weights):
        if field.name != "blocks":
            assert getattr(loaded, field.name) == getattr(weights, field.name)
    for ours, theirs in zip(loaded.blocks, weights.blocks, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(same(ours[name], theirs[name]) for name in theirs)
    assert loaded.digest == weights.digest


def test_damaged_files_are_refused(weights: fp.Int8Weights, tmp_path: Path) -> None:
    path = weights.save(tmp_path / "int8.safetensors")
    content = path.read_bytes()
    for damaged in (b"", content[:100], content[:-1], content.replace(b'"format":"2"', b'"format":"9"')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must be a file of Int8Weights\.save"):
            fp.Int8Weights.load(path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        fp.Int8Weights.load(tmp_path / "none")


def test_an_engine_finds_the_weights_in_the_user_cache(
    backbone: fp.FrozenViT,
    weights: fp.Int8Weights,
    images: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="int8 is required: this backbone has not been calibrated here"):
        fp.Engine(backbone, dtype="int8")
    assert weights.save() == cached(backbone.fingerprint)
    expected = fp.Engine(backbone, dtype="int8", int8=weights)(images)
    assert torch.equal(fp.Engine(backbone, dtype="int8")(images), expected)
    assert torch.equal(fp.Engine(backbone, dtype="int8", int8=cached(backbone.fingerprint))(images), expected)


def test_weights_of_another_backbone_or_beyond_the_gate_are_refused(
    make_vit: Callable[..., Any], backbone: fp.FrozenViT, weights: fp.Int8Weights
) -> None:
    other = fp.FrozenViT(make_vit(seed=1, num_classes=0))
    with pytest.raises(ValueError, match="int8 are for the backbone with fingerprint"):
        fp.Engine(other, dtype="int8", int8=weights)
    for error in (1.6 * weights.bfloat16_error, float("nan")):
        with pytest.raises(ValueError, match=r"more than 1\.5 times the .* of bfloat16"):
            fp.Engine(backbone, dtype="int8", int8=dataclasses.replace(weights, error=error))
    swapped = dataclasses.replace(weights, blocks=weights.blocks[::-1])
    with pytest.raises(ValueError, match="int8 must be the backbone's own weights, qkv of block 0 is another"):
        fp.Engine(backbone, dtype="int8", int8=swapped)


def test_what_does_not_run_in_int8_is_refused_by_name(
    backbone: fp.FrozenViT,
    weights: fp.Int8Weights,
    images: Tensor,
    tiny_swin: Callable[..., nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="backbone must be a ViT: int8 is not defined for Swin"):
        fp.Int8Weights.calibrate(fp.FrozenViT(tiny_swin()), images)
    with pytest.raises(ValueError, match="images must be at least 8, got 7"):
        fp.Int8Weights.calibrate(backbone, images[:7])
    full = fp.PromptedViT(backbone, fp.FullFineTuneConfig(), 3)
    with pytest.raises(ValueError, match="backbone must be frozen"):
        fp.Engine(full, dtype="int8", int8=weights)
    with pytest.raises(TypeError, match="int8 must be Int8Weights or a file of them, got int"):
        fp.Engine(backbone, dtype="int8", int8=3)
    with pytest.raises(ValueError, match=r"int8 must be None with dtype=torch\.float32"):
        fp.Engine(backbone, dtype=torch.float32, int8=weights)
    with pytest.raises(RuntimeError, match="backend 'compile' cannot run: int8 runs in eager alone"):
        fp.Engine(backbone, dtype="int8", int8=weights, backend="compile")
    monkeypatch.setattr(native, "obstacle", lambda: "there is no compiler")
    with pytest.raises(RuntimeError, match="dtype 'int8' cannot run: there is no compiler"):
        fp.Engine(backbone, dtype="int8", int8=weights)
    with pytest.raises(RuntimeError, match="int8 cannot run: there is no compiler"):
        fp.Int8Weights.calibrate(backbone, images)
