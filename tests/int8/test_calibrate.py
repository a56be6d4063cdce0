"""Rounding with errors that compensate each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.int8 import native, weights as module
from fastprompt.int8.arithmetic import round_rows, round_weight, weight_scale
from fastprompt.int8.calibrate import compensated, smoothing
from fastprompt.int8.weights import relative_error


def plain(weight: Tensor, scale: Tensor) -> Tensor:
    return weight * scale[:, None]


def test_errors_compensate_each_other_on_the_inputs() -> None:
    x = torch.randn(400, 30) @ torch.randn(30, 150) * torch.logspace(-1, 1, 150) + 0.1 * torch.randn(400, 150)
    weight = torch.randn(40, 150)
    rounded, scale = compensated(weight, (x.t() @ x).double())
    assert rounded.dtype == torch.int8
    nearest = plain(round_weight(weight, scale), scale)

    def error(other: Tensor) -> float:
        return float((x @ (other - weight).t()).norm())

    assert error(plain(rounded, scale)) < 0.5 * error(nearest)
    assert ((plain(rounded, scale) - weight).abs() <= 127 * scale[:, None]).all()


def test_inputs_without_correlation_are_rounded_to_the_nearest() -> None:
    weight = torch.randn(10, 140)
    weight[3] = 0
    rounded, scale = compensated(weight, torch.eye(140, dtype=torch.float64))
    assert torch.equal(rounded, round_weight(weight, weight_scale(weight)))
    never_seen, _ = compensated(weight, torch.zeros(140, 140, dtype=torch.float64))
    assert torch.equal(never_seen, rounded)
    assert torch.equal(scale, weight_scale(weight))


def test_calibration_is_deterministic_and_leaves_the_backbone_alone(
    backbone: fp.FrozenViT, images: Tensor, weights: fp.Int8Weights
) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    bits = weights.blocks[0]["qkv"].bits
    again = fp.Int8Weights.calibrate(backbone, images, activation_bits=bits)
    assert all(block.keys() == {"qkv", "proj", "fc1", "fc2"} for block in weights.blocks)
    assert again.digest == weights.digest
    assert (again.error, again.bfloat16_error) == (weights.error, weights.bfloat16_error)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


def test_the_measured_error_is_that_of_the_images_left_out(
    backbone: fp.FrozenViT, images: Tensor, weights: fp.Int8Weights
) -> None:
    exact = fp.Engine(backbone, dtype=torch.float32, backend="eager")(images[3::4])
    found = fp.Engine(backbone, dtype="int8", backend="eager", int8=weights)(images[3::4])
    assert abs(relative_error(found, exact) - weights.error) < 1e-5
    assert 0 < weights.error < 1.5 * weights.bfloat16_error
    assert weights.num_images == 9


def test_factors_make_columns_alike() -> None:
    """A column of large inputs no longer takes the 8 bits of the others."""
    rows, weight = torch.randn(300, 64), torch.randn(48, 64)
    rows[:, 5] *= 60
    factor = smoothing(weight, rows.abs().amax(dim=0), rows)
    assert factor[5] < 0.2 * factor.median()

    def error(factor: Tensor) -> float:
        v, step = round_rows(rows * factor, 8)
        return float(((v * step) @ (weight / factor).t() - rows @ weight.t()).norm())

    assert error(factor) < 0.4 * error(torch.ones(64))
    even = torch.randn(300, 64).clamp(-2, 2)
    assert error(smoothing(weight, even.abs().amax(dim=0), even)) > 0


def test_bits_of_activations(backbone: fp.FrozenViT, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 where the CPU multiplies bytes, else 12."""
    for has_bytes, bits in ((True, 8), (False, 12)):
        monkeypatch.setattr(native, "has_bytes", lambda has=has_bytes: has)
        found = fp.Int8Weights.calibrate(backbone, images)
        assert bits in {rounded.bits for block in found.blocks for rounded in block.values()}
        assert (found.num_bytes > 0) == has_bytes
    with pytest.raises(ValueError, match="activation_bits must be 8, 12 or None, got 4"):
        fp.Int8Weights.calibrate(backbone, images, activation_bits=4)


def test_some_linears_get_12_bits_if_the_gate_needs_it(
    backbone: fp.FrozenViT, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, all_eight = (fp.Int8Weights.calibrate(backbone, images, activation_bits=bits) for bits in (12, 8))
    between = (0.6 * exact.error + 0.4 * all_eight.error) / all_eight.bfloat16_error
    monkeypatch.setattr(module, "GATE", between / module.MARGIN)
    found = fp.Int8Weights.calibrate(backbone, images, activation_bits=8)
    assert 0 < found.num_bytes < 8
    assert exact.error < found.error <= between * found.bfloat16_error
    monkeypatch.setattr(module, "GATE", 0.0)
    assert fp.Int8Weights.calibrate(backbone, images, activation_bits=8).num_bytes == 0
