"""Rounding with errors that compensate each other."""

from __future__ import annotations

import torch
from torch import Tensor

import fastprompt as fp
from fastprompt.int8.arithmetic import round_weight, weight_scale
from fastprompt.int8.calibrate import compensated
from fastprompt.int8.linear import plain_weight
from fastprompt.int8.weights import relative_error


def test_errors_compensate_each_other_on_the_inputs() -> None:
    x = torch.randn(400, 30) @ torch.randn(30, 150) * torch.logspace(-1, 1, 150) + 0.1 * torch.randn(400, 150)
    weight = torch.randn(40, 150)
    rounded, scale = compensated(weight, (x.t() @ x).double())
    assert rounded.dtype == torch.int8
    nearest = plain_weight(round_weight(weight, scale), scale)

    def error(other: Tensor) -> float:
        return float((x @ (other - weight).t()).norm())

    assert error(plain_weight(rounded, scale)) < 0.5 * error(nearest)
    assert ((plain_weight(rounded, scale) - weight).abs() <= 127 * scale[:, None]).all()


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
    again = fp.Int8Weights.calibrate(backbone, images)
    for first, second in zip(weights.blocks, again.blocks, strict=True):
        assert first.keys() == second.keys() == {"qkv", "proj", "fc1", "fc2"}
        assert all(torch.equal(a, b) for name in first for a, b in zip(first[name], second[name], strict=True))
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
