"""Activations that keep their derivative in few bits: what the codes stand for, gradients, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import GluMlp
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.arguments import ArgumentError
from fastprompt.vit import compressed, recomputed
from fastprompt.vit.linear import FrozenLinear
from fastprompt.vit.weights import ACTIVATIONS, Dense, Mlp


@pytest.mark.parametrize("act", compressed.DERIVATIVES)
def test_derivatives_are_those_of_the_activations(act: str) -> None:
    x = torch.linspace(-6, 6, 41, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(ACTIVATIONS[act](x).sum(), x)
    torch.testing.assert_close(compressed.DERIVATIVES[act](x.detach()), expected, rtol=1e-12, atol=1e-12)


def test_codes_of_8_bits_are_within_half_a_step() -> None:
    rows = torch.randn(3, 5, 7, dtype=torch.float64)
    codes, values = compressed.quantised(rows, 8)
    step = (rows.amax(-1, keepdim=True) - rows.amin(-1, keepdim=True)) / 255
    assert codes.dtype == torch.uint8
    assert codes.shape == rows.shape
    assert ((compressed.dequantised(codes, values, 7) - rows).abs() <= step / 2 * (1 + 1e-9)).all()


def test_each_of_4_codes_stands_for_the_mean_of_its_numbers() -> None:
    rows = torch.randn(3, 5, 10, dtype=torch.float64)
    codes, values = compressed.quantised(rows, 2)
    found = compressed.dequantised(codes, values, 10)
    assert codes.shape == (3, 5, 3)  # four codes a byte
    assert values.shape == (3, 5, 4)
    torch.testing.assert_close(found.sum(-1), rows.sum(-1))
    row, of_row = found[0, 0], rows[0, 0]
    assert 1 < len(row.unique()) <= 4
    for level in row.unique():
        torch.testing.assert_close(of_row[row == level].mean(), level)


@pytest.mark.parametrize("bits", compressed.BITS)
def test_equal_numbers_and_nan_survive(bits: int) -> None:
    rows = torch.full((2, 6), 0.25)
    rows[1, 3] = float("nan")
    found = compressed.dequantised(*compressed.quantised(rows, bits), 6)
    assert torch.equal(found[0], rows[0])
    assert found[1].isnan().all()


@pytest.mark.parametrize("bits", [0, None])
def test_nothing_kept_gives_exact_gradients(
    model: fp.PromptedViT, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows at once and some at a time. `bits` None: the blocks are computed again, and their MLPs keep nothing."""
    images = torch.randn(2, 3, *model.backbone.image_size, dtype=torch.float64)
    recomputes = model.recomputes
    model.set_grad_checkpointing(False)
    exact, expected = outputs_and_gradients(model, images)
    model.set_grad_checkpointing(recomputes or bits is None)
    model.set_activation_bits(bits)
    for size in (2**22, 3000):
        monkeypatch.setattr(recomputed, "CHUNK", {"cpu": size})
        outputs, gradients = outputs_and_gradients(model, images)
        torch.testing.assert_close(outputs, exact, rtol=1e-12, atol=1e-12)
        for found, own in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_that_is_computed_again_runs_neither_fc1_nor_fc2_twice(
    make_vit: Callable[..., Any], post_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fc1 runs twice for each block that prompts reach, fc2 once; a norm behind the MLP needs what it reads."""
    options = {"block_fn": ResPostBlock, "init_values": 0.1} if post_norm else {}
    model = fp.PromptedViT(fp.FrozenViT(make_vit(**options)).double(), fp.VPTConfig(3), num_classes=3).train()
    model.head.double()
    model.set_grad_checkpointing()
    calls: dict[int, int] = {}
    forward = Dense.forward
    linears = [getattr(block.mlp, name) for block in model.backbone.folded().blocks for name in ("fc1", "fc2")]

    def counted(module: Dense, x: Tensor) -> Tensor:
        calls[id(module)] = calls.get(id(module), 0) + 1
        return forward(module, x)

    monkeypatch.setattr(FrozenLinear, "forward", counted)
    images = torch.randn(2, 3, *model.backbone.image_size, dtype=torch.float64)
    outputs_and_gradients(model, images)
    fc1, fc2 = ({calls[id(module)] for module in linears[at::2]} for at in (0, 1))
    assert fc1 == ({3} if post_norm else {2})
    assert fc2 == ({2} if post_norm else {1})


@pytest.mark.parametrize("options", [{"act_layer": "relu"}, {"mlp_layer": GluMlp, "mlp_ratio": 4}])
def test_nothing_kept_of_any_activation(make_vit: Callable[..., Any], options: dict[str, Any]) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit(**options)).double(), fp.VPTConfig(3), num_classes=3).train()
    model.head.double()
    images = torch.randn(2, 3, *model.backbone.image_size, dtype=torch.float64)
    exact, expected = outputs_and_gradients(model, images)
    model.set_activation_bits(0)
    outputs, gradients = outputs_and_gradients(model, images)
    torch.testing.assert_close(outputs, exact, rtol=1e-12, atol=1e-12)
    for found, own in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)


def straight_through(x: Tensor, act: str, bits: int) -> Tensor:
    """act(x) with the dequantised derivative as its slope, by plain operators."""
    slope = compressed.dequantised(*compressed.quantised(compressed.DERIVATIVES[act](x.detach()), bits), x.shape[-1])
    return ACTIVATIONS[act](x).detach() + slope * (x - x.detach())


@pytest.fixture(params=["vpt", "cvpt", "pixel", "recomputed", "swin"])
def model(request: pytest.FixtureRequest, make_vit: Callable[..., Any], tiny_swin: Callable[..., Any]) -> Any:
    kinds = {"cvpt": fp.CVPTConfig(3), "pixel": fp.PixelPromptConfig(4)}
    module = tiny_swin() if request.param == "swin" else make_vit()
    built = fp.PromptedViT(fp.FrozenViT(module).double(), kinds.get(request.param, fp.VPTConfig(3)), num_classes=3)
    built.head.double()
    built.set_grad_checkpointing(request.param == "recomputed")
    with torch.no_grad():
        for parameter in built.generator.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return built.train()


def outputs_and_gradients(model: fp.PromptedViT, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(images, draws={})
    logits.square().sum().backward()
    return logits.detach(), [p.grad for _, p in model.trainable_parameters()]


@pytest.mark.parametrize("bits", compressed.BITS)
def test_gradients_are_those_of_the_dequantised_derivative(
    model: fp.PromptedViT, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compressed, "CHUNK", 3000)  # some rows at a time
    images = torch.randn(2, 3, *model.backbone.image_size, dtype=torch.float64)
    exact, exact_gradients = outputs_and_gradients(model, images)
    model.set_activation_bits(bits)
    outputs, gradients = outputs_and_gradients(model, images)
    monkeypatch.setattr(compressed, "activation", straight_through)
    _, expected = outputs_and_gradients(model, images)
    assert torch.equal(outputs, exact)
    for found, own in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-10, atol=1e-12)
    first, plain = gradients[0], exact_gradients[0]
    error = (first - plain).norm() / plain.norm()
    assert 0 < error < {8: 0.02, 2: 0.6}[bits]


def test_autocast(make_vit: Callable[..., Any]) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(3), num_classes=3).train()
    images = torch.randn(2, 3, *model.backbone.image_size)
    gradients = []
    for bits in (None, 8, 0):
        model.set_activation_bits(bits)
        with torch.autocast("cpu", torch.bfloat16):
            gradients.append(outputs_and_gradients(model, images)[1][0])
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()
    assert not torch.equal(*gradients[:2])
    assert (gradients[2] - gradients[0]).norm() < 0.01 * gradients[0].norm()


def test_memory(make_vit: Callable[..., Any]) -> None:
    """Of the activations, the backward keeps the codes and no tensor of their input's size."""
    model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(3), num_classes=3).train()
    images = torch.randn(2, 3, *model.backbone.image_size)
    hidden = model.backbone.blocks[0].mlp.fc1.weight.shape[0]
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    sizes = {}
    for bits in (None, 8, 2, 0):
        model.set_activation_bits(bits)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(images)
        wide = [x for x in kept if x.dim() == 3 and x.shape[-1] == hidden and x.is_floating_point()]
        assert bool(wide) == (bits is None)
        sizes[bits] = sum(x.numel() for x in kept if x.dtype == torch.uint8)
    assert sizes[None] == sizes[0] == 0
    assert sizes[8] == 4 * sizes[2] > 0


@pytest.mark.parametrize(
    ("config", "options", "problem"),
    [
        (fp.FullFineTuneConfig(), {}, "the backbone trains"),
        (fp.LinearProbeConfig(), {}, "no gradient of 'linear'"),
        (fp.VQTConfig(), {}, "no gradient of 'vqt'"),
        (fp.VPTConfig(), {"act_layer": "relu"}, "the activation 'relu'"),
    ],
)
def test_where_nothing_can_be_compressed(
    make_vit: Callable[..., Any], config: Any, options: dict[str, Any], problem: str
) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit(**options)), config, num_classes=3)
    with pytest.raises(ArgumentError, match=problem) as error:
        model.set_activation_bits(8)
    assert error.value.argument == "bits"
    if "act_layer" not in options:
        with pytest.raises(ArgumentError, match=problem):
            model.set_activation_bits(0)
    model.set_activation_bits(None)
    pair = torch.rand(4, 3, *model.backbone.image_size), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ArgumentError, match="activation_bits must be None here.*" + problem):
        fp.fit(model, pair, pair, epochs=1, activation_bits=2, progress=False)


def test_other_refusals(make_vit: Callable[..., Any], tiny_swin: Callable[..., nn.Module]) -> None:
    model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(), num_classes=3)
    with pytest.raises(ArgumentError, match="bits must be 8, 2, 0 or None, got 4"):
        model.set_activation_bits(4)
    model.set_activation_bits(2)
    with pytest.raises(ArgumentError, match="graph must be 'rewritten'"):
        model.set_graph("papers")
    model.set_activation_bits(None)
    model.set_graph("papers")
    with pytest.raises(ArgumentError, match="papers' graph"):
        model.set_activation_bits(2)
    pixels = fp.PromptedViT(fp.FrozenViT(tiny_swin()), fp.PixelPromptConfig(4), num_classes=3)
    with pytest.raises(ArgumentError, match="plain graph of a Swin"):
        pixels.set_activation_bits(8)
    block = make_vit().blocks[0]
    block.mlp = Mlp(Dense(torch.zeros(8, 4), None), Dense(torch.zeros(4, 4), None), "silu", glu="first")
    assert compressed.obstacle(block) == "a gated MLP"


def test_fit_trains_with_it_and_leaves_the_model_as_it_was(make_vit: Callable[..., Any]) -> None:
    images = torch.rand(8, 3, *fp.FrozenViT(make_vit()).image_size)
    pair, weights = (images, torch.arange(8) % 2), []
    for bits in (None, 8):
        torch.manual_seed(0)
        model = fp.PromptedViT(fp.FrozenViT(make_vit()), fp.VPTConfig(3), num_classes=2)
        fp.fit(model, pair, pair, epochs=1, batch_size=4, activation_bits=bits, dtype="float32", progress=False)
        assert model.activation_bits is None
        weights.append(torch.cat([p.detach().flatten() for _, p in model.trainable_parameters()]))
    assert not torch.equal(*weights)
    assert (weights[0] - weights[1]).norm() < 0.01 * weights[0].norm()
