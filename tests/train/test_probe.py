from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import fastprompt as fp
from fastprompt.domains import Domains
from fastprompt.train.probe import C_GRID, extract_features, fit_linear_probe

LINEAR = fp.LinearProbeConfig()


def blobs(count: int, num_classes: int = 4, seed: int = 0, spread: float = 1.0) -> tuple[Any, Any]:
    """Features (count, 48) with very different scales and offsets, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes, 48, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(count) % num_classes
    features = centres[labels] + spread * torch.randn(count, 48, generator=generator)
    return features * torch.logspace(-2, 2, 48) + torch.linspace(-50, 50, 48), labels


def test_features_are_what_the_head_reads(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    images, labels = colours(9)
    model = make_model().train()
    features, found = extract_features(model, TensorDataset(images, labels), batch_size=4)
    with torch.no_grad():
        assert torch.allclose(features, model.eval().forward_features(images), atol=1e-5)
        assert torch.allclose(extract_features(model.backbone, (images, labels))[0], model.backbone(images), atol=1e-5)
    assert torch.equal(found, labels)
    low = extract_features(model, (images, labels), dtype=torch.bfloat16)[0]
    assert low.dtype == torch.float32
    assert 0 < (low - features).abs().max() < 0.3
    assert model.backbone.dtype == torch.float32


def test_the_standardisation_is_folded_exactly(make_model: Callable[..., Any]) -> None:
    model = make_model(LINEAR).double()
    train, val = blobs(80), blobs(40, seed=1)
    result = fit_linear_probe(model, train, val, C_grid=[0.01])
    x = train[0].double()
    mean, scale = x.mean(0), x.std(0, correction=0)
    # Optimality in the standardised coordinates: W = C Σ (onehot - p) x̃ᵀ, and Σ (onehot - p) = 0.
    weight = (result.weight * scale).requires_grad_()
    bias = (result.bias + result.weight @ mean).requires_grad_()
    loss = 0.5 * weight.square().sum() + 0.01 * F.cross_entropy(
        (x - mean) / scale @ weight.T + bias, train[1], reduction="sum"
    )
    loss.backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.abs().max() < 1e-4
    assert bias.grad.abs().max() < 1e-4
    # And the head computes the same logits from the features as they are.
    logits = model.head(x)
    assert torch.equal(model.head.weight, result.weight)
    expected = ((x - mean) / scale) @ weight.T + bias
    assert (logits - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_head_for_each_domain_is_refused(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    class Domained(TensorDataset):
        domains = Domains(("a", "b"), ((0, 1), (2, 3)), "per-domain")

    data = Domained(*colours(8))
    with pytest.raises(ValueError, match="train must have one label space"):
        fit_linear_probe(make_model(LINEAR), data, data)


def test_c_is_chosen_on_validation(make_model: Callable[..., Any]) -> None:
    model = make_model(LINEAR)
    train, val = blobs(48, spread=3.0), blobs(400, seed=1, spread=3.0)
    result = fit_linear_probe(model, train, val)
    assert [row["C"] for row in result.grid] == list(C_GRID)
    best = max(result.grid, key=lambda row: (row["val_accuracy"], -row["val_loss"]))
    assert (result.C, result.best_val_accuracy, result.best_val_loss) == (
        best["C"], best["val_accuracy"], best["val_loss"],
    )  # fmt: skip
    assert result.C < max(C_GRID)  # overfitting was seen
    accuracy = (model.head(val[0]).argmax(-1) == val[1]).double().mean()
    assert accuracy == pytest.approx(result.best_val_accuracy, abs=0.005)
    assert fit_linear_probe(model, train, val, C_grid=[1e-6, 1e-5]).at_edge


def test_the_probe_on_images(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    model = make_model(LINEAR)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    val = colours(40, seed=1)
    result = fit_linear_probe(model, colours(64), val, C_grid=[1e-3, 1e-1])
    assert result.best_val_accuracy == 1.0
    assert fp.evaluate(model, val).accuracy == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())


def test_two_classes_and_a_constant_feature(make_model: Callable[..., Any]) -> None:
    model = make_model(LINEAR, num_classes=2).double()
    (x, y), (u, v) = blobs(40, 2), blobs(40, 2, seed=1)
    x[:, 3] = u[:, 3] = 7.0
    result = fit_linear_probe(model, (x, y), (u, v), C_grid=[0.1])
    from sklearn.linear_model import LogisticRegression

    z = x.double().numpy()
    scale = np.where(z.std(0) < 1e-9, 1.0, z.std(0))
    expected = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000).fit((z - z.mean(0)) / scale, y.numpy())
    ours = model.head(u.double()).softmax(-1).detach().numpy()
    theirs = expected.predict_proba((u.double().numpy() - z.mean(0)) / scale)
    assert np.abs(ours - theirs).max() < 1e-3
    assert torch.isfinite(result.weight).all()


def test_a_class_without_training_images_is_never_predicted(make_model: Callable[..., Any]) -> None:
    model = make_model(LINEAR, num_classes=4)
    x, y = blobs(60)
    keep = y != 2
    result = fit_linear_probe(model, (x[keep], y[keep]), (x, y), C_grid=[0.1])
    assert (result.weight[2] == 0).all()
    assert not (model.head(x).argmax(-1) == 2).any()
    assert (model.head(x[keep]).argmax(-1) == y[keep]).all()
    assert result.best_val_accuracy == 0.75


def test_wrong_arguments(make_model: Callable[..., Any], colours: Callable[..., Any]) -> None:
    good, images = blobs(20), colours(8)
    model = make_model(LINEAR)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match="linear head"):
        fit_linear_probe(make_model(LINEAR, num_classes=None), good, good)
    for grid in ([], [0.0], [float("nan")]):
        with pytest.raises(ValueError, match="C_grid"):
            fit_linear_probe(model, good, good, C_grid=grid)
    with pytest.raises(ValueError, match="at least two classes"):
        fit_linear_probe(model, (good[0], good[1] * 0), good)
    with pytest.raises(ValueError, match=r"val must have features \(N, 48\)"):
        fit_linear_probe(model, good, (good[0][:, :5], good[1]))
    with pytest.raises(ValueError, match="train must have finite features"):
        fit_linear_probe(model, (good[0] * float("inf"), good[1]), good)
    with pytest.raises(ValueError, match="val must not be empty"):
        fit_linear_probe(model, images, (images[0][:0], images[1][:0]))
    assert torch.equal(model.head.weight, before)
