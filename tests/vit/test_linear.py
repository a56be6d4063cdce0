"""Frozen products by oneDNN: the same numbers and gradients, taken only where they are faster."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import fastprompt as fp
from fastprompt.vit import linear as module
from fastprompt.vit.linear import FrozenLinear, PackedLinear, bfloat16_is_fast, linear, onednn_is_faster, pack
from fastprompt.vit.weights import ACTIVATIONS, Dense


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


def test_a_flop_counter_sees_pytorchs_linear(onednn: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, None).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 3 * 4 * 5
    assert onednn == []


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


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, "MKL"), (0.5, "oneDNN")])
def test_other_work_on_the_machine_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, seconds: float, expected: str
) -> None:
    now, calls = [0.0], []

    def product(name: str, takes: float) -> Callable[..., None]:
        def run(*operands: torch.Tensor | None) -> None:
            calls.append(name)
            now[0] += takes * (20 if name == "MKL" and len(calls) <= 30 else 1)  # at first something else runs too

        return run

    monkeypatch.setattr(module, "F", SimpleNamespace(linear=product("MKL", 1.0)))
    monkeypatch.setattr(module, "_product", product("oneDNN", seconds))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    module.faster_product.cache_clear()
    try:
        assert module.faster_product() == expected
        assert calls[:4] == ["MKL", "MKL", "oneDNN", "oneDNN"]
    finally:
        module.faster_product.cache_clear()


def test_only_frozen_weights_of_its_dtypes_take_it(
    onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    linear(x.double(), weight.double(), None)
    linear(x.half(), weight.half(), None)
    monkeypatch.setattr(module, "onednn_has_bfloat16", lambda: False)
    linear(x.bfloat16(), weight.bfloat16(), None)
    linear(x, weight.clone().requires_grad_(), None).sum().backward()
    linear(x[:0], weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    assert onednn == []


def test_the_choice_is_measured_once() -> None:
    module.faster_product.cache_clear()
    assert onednn_is_faster() in (True, False)
    onednn_is_faster()
    assert module.faster_product.cache_info().hits == 1


needs_bfloat16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no bfloat16")


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_products_and_gradients(
    onednn: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    """At most as far from float64 as PyTorch's own."""
    monkeypatch.setattr(module, "onednn_has_bfloat16", lambda: True)
    x, weight = torch.randn(3, 9, 20).bfloat16()[:, 2:].requires_grad_(), torch.randn(12, 20).bfloat16()[:8]
    b = torch.randn(8).bfloat16() if bias else None
    exact_x = x.detach().double().requires_grad_()
    exact = F.linear(exact_x, weight.double(), None if b is None else b.double())
    (exact_grad,) = torch.autograd.grad(exact.sum(), exact_x)
    errors = []
    for y in (linear(x, weight, b), F.linear(x, weight, b)):
        (grad,) = torch.autograd.grad(y.sum(), x)
        errors.append([float((found - right).norm()) for found, right in ((y, exact), (grad, exact_grad))])
    for ours, theirs, right in zip(*errors, (exact, exact_grad), strict=True):
        assert ours <= theirs + 1e-3 * float(right.detach().norm())
    assert onednn == [(3, 7, 20), (3, 7, 8)]


def test_bfloat16_goes_to_onednn_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for fast in (True, False):
        monkeypatch.setattr(module, "bfloat16_is_fast", lambda device, fast=fast: fast)
        module.onednn_has_bfloat16.cache_clear()
        try:
            assert module.onednn_has_bfloat16() == (fast and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        finally:
            module.onednn_has_bfloat16.cache_clear()


@needs_bfloat16
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", ["identity", "gelu", "gelu_tanh"])
def test_packed_products_and_activations(act: str, bias: bool) -> None:
    source = FrozenLinear(torch.randn(12, 20), torch.randn(12) if bias else None).bfloat16()
    packed, x = PackedLinear(source, act), torch.randn(3, 9, 20).bfloat16()[:, 2:]
    exact = ACTIVATIONS[act](F.linear(x.double(), source.weight.double(), source.bias.double() if bias else None))
    plain = ACTIVATIONS[act](source(x))
    with torch.no_grad():
        found = packed(x)
        assert (found - exact).norm() <= (plain - exact).norm() + 1e-3 * exact.norm()
        assert packed(x[:0]).shape == (0, 7, 12)
    assert packed.weight is source.weight
    assert torch.equal(packed(x), plain)  # with gradients recorded: by the plain weight
    assert not any("packed" in name for name in packed.state_dict())


@needs_bfloat16
def test_a_packed_block_computes_the_same_and_exports_its_plain_weights(
    tiny_vit: torch.nn.Module, tiny_images: torch.Tensor
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit).bfloat16(), fp.VPTConfig(num_prompts=2)).eval()
    with torch.no_grad():
        expected = model(tiny_images).float()
        for block in model.backbone.folded().blocks:
            pack(block)
        assert isinstance(block.mlp.fc1, PackedLinear)
        assert (block.mlp.act, block.mlp.fc1.act) == ("identity", "gelu")
        assert (model(tiny_images) - expected).norm() <= 2e-2 * expected.norm()
        exported = torch.export.export(model, (tiny_images,)).module()
        assert (exported(tiny_images) - expected).norm() <= 2e-2 * expected.norm()


def test_float32_is_packed_only_where_onednn_is_faster(
    tiny_vit: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for faster in (False, True):
        monkeypatch.setattr(module, "onednn_is_faster", lambda faster=faster: faster)
        block = fp.FrozenViT(tiny_vit).folded().blocks[0]
        pack(block)
        assert isinstance(block.qkv, PackedLinear) == faster


def test_bfloat16_is_fast_only_with_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, fast in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert bfloat16_is_fast(torch.device("cpu")) == fast
    assert not bfloat16_is_fast(torch.device("meta"))


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_bfloat16_is_fast_asks_older_versions_of_torch_too(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert bfloat16_is_fast(torch.device("cpu")) == (avx512 or amx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_train(
    make_vit: Callable[..., Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Laid out for both directions: the same outputs and gradients up to rounding."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(module, "onednn_is_faster", lambda: True)
    vit = fp.FrozenViT(make_vit(num_classes=0)).to(dtype)
    model = fp.PromptedViT(vit, fp.VPTConfig(num_prompts=3), num_classes=4)
    images, results = torch.randn(3, 3, 32, 32), []
    exact = copy.deepcopy(model)
    exact.set_backbone_dtype(torch.float64)
    for candidate, copies in ((exact, "folded"), (model, "folded"), (model, "packed"), (model, "recomputed")):
        if copies != "folded":
            vit.set_copies("packed")
            blocks = vit.folded().blocks
            linears = [m for block in blocks for m in block.modules() if isinstance(m, module.PackedLinear)]
            assert len(linears) == 4 * len(blocks)
            assert all(linear.transposed is not None and linear.act == "identity" for linear in linears)
        candidate.set_grad_checkpointing(copies == "recomputed")
        candidate.zero_grad()
        y = candidate(images)
        y.square().sum().backward()
        found = [y, *(p.grad for p in candidate.generator.parameters())]
        results.append(torch.cat([t.detach().double().flatten() for t in found]))
    plain, *packed = ((found - results[0]).norm() for found in results[1:])
    assert plain > 0
    assert all(error <= 1.5 * plain for error in packed)
    with torch.no_grad():
        torch.testing.assert_close(model(images), exact(images).to(torch.float32), rtol=0.1, atol=0.1)
    vit.set_copies("none")
    assert not any(isinstance(m, module.PackedLinear) for block in vit.folded().blocks for m in block.modules())
    with pytest.raises(ValueError, match=r"kind must be one of \('none', 'folded', 'packed'\), got 'all'"):
        vit.set_copies("all")


def test_a_packed_linear_has_second_derivatives() -> None:
    packed = module.PackedLinear(Dense(torch.randn(6, 5), torch.randn(6)), trains=True)
    x = torch.randn(4, 5, requires_grad=True)
    (first,) = torch.autograd.grad(packed(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    y = x.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((y @ packed.weight.t() + packed.bias).pow(3).sum(), y, create_graph=True)
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, torch.autograd.grad(expected.square().sum(), y)[0])
