"""Frozen products by oneDNN: the same numbers and gradients, taken only where they are faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastprompt as fp
from fastprompt.vit import linear as module
from fastprompt.vit.linear import linear, onednn_is_faster


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """oneDNN is taken, whatever is faster here; the shapes of its operands are recorded."""
    shapes, original = [], module._product
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(module, "_product", lambda x, w, b: shapes.append(tuple(x.shape)) or original(x, w, b))
    return shapes


@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients(onednn: list[tuple[int, ...]], bias: bool) -> None:
    sequence = torch.randn(3, 9, 20)
    x, weight = sequence[:, 2:].requires_grad_(), torch.randn(12, 20)[:8]
    b = torch.randn(8) if bias else None
    ours, plain = linear(x, weight, b), F.linear(x, weight, b)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (ours, plain)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    assert onednn == [(3, 7, 20), (3, 7, 8)]


def test_a_model_trains_by_it(
    onednn: list[tuple[int, ...]], tiny_vit: torch.nn.Module, tiny_images: torch.Tensor
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VPTConfig(num_prompts=2))
    results = []
    for run in (model, model.reference_forward):
        before = len(onednn)
        out = run(tiny_images)
        results.append((out, *torch.autograd.grad(out.square().sum(), model.generator.parameters())))
        assert (len(onednn) > before) == (run is model)  # the papers' graph is PyTorch's own
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_only_float32_of_frozen_weights_takes_it(onednn: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    linear(x.double(), weight.double(), None)
    linear(x.bfloat16(), weight.bfloat16(), None)
    linear(x, weight.clone().requires_grad_(), None).sum().backward()
    linear(x[:0], weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    assert onednn == []


def test_the_choice_is_measured_once() -> None:
    onednn_is_faster.cache_clear()
    assert onednn_is_faster() in (True, False)
    onednn_is_faster()
    assert onednn_is_faster.cache_info().hits == 1
