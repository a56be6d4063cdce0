from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastprompt as fp
from fastprompt.generators import Geometry

# papers.md §3.2, ViT-B/16 at 224 px: prompts, parameters of the released code, of the paper's formula
COUNTS = [
    (1, 31_866, 14_364),
    (5, 42_418, 22_476),
    (10, 55_608, 32_616),
    (50, 161_128, 113_736),
    (100, 293_028, 215_136),
    (200, 556_828, 417_936),
]


def trained(geometry: Geometry, **options: Any) -> fp.VAPT:
    """A VAPT in float64 whose zero-initialised tensors are random, as after some training."""
    vapt = fp.VAPT(geometry=geometry, num_prompts=5, **options).double().eval()
    with torch.no_grad():
        for p in vapt.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return vapt


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_golden(golden: Callable, golden_backbone: Callable, check_golden: Callable, dtype: torch.dtype) -> None:
    data = golden("vapt")
    model = fp.PromptedViT(golden_backbone(data, dtype), fp.VAPTConfig(num_prompts=10, hidden=8, kernel=2)).eval()
    names = {
        "first": ("static.embeddings", None),
        "feature_projector.w1": ("feature_projectors.0.w1", None),
        "feature_projector.w2": ("feature_projectors.0.w2", None),
    }
    for j in range(3):
        for theirs, ours in (
            ("norm.weight", "norm.weight"),
            ("norm.bias", "norm.bias"),
            ("conv.kernel", "kernel"),
            ("token_projector.weight", "projector.weight"),
            ("token_projector.bias", "projector.bias"),
        ):
            names[f"{j + 1}.{theirs}"] = (f"adaptive.{j}.{ours}", None)
    check_golden(model, data, names)


@pytest.mark.parametrize(("num_prompts", "code", "paper"), COUNTS)
def test_parameter_counts(num_prompts: int, code: int, paper: int) -> None:
    vapt = fp.VAPT(num_prompts=num_prompts)
    assert vapt.num_parameters() == code
    assert vapt.paper_num_parameters() == paper
    assert (code > fp.VPT(num_prompts=num_prompts).num_parameters()) == (num_prompts <= 4)


def test_adaptive_prompts_start_at_exactly_zero_yet_the_projector_learns(small: Geometry) -> None:
    vapt = fp.VAPT(geometry=small, num_prompts=5)
    tokens = torch.randn(2, 12, 24)
    for layer in (1, 2):
        prompts = vapt(tokens, layer=layer)
        assert torch.equal(prompts, torch.zeros(2, 5, 24))
        (prompts * torch.randn_like(prompts)).sum().backward()
    assert vapt.adaptive[0].projector.weight.grad.abs().min() > 0
    assert vapt.adaptive[0].projector.bias.grad.abs().min() > 0
    assert vapt(layer=0).abs().min() > 0


def test_initial_values(small: Geometry) -> None:
    vapt = fp.VAPT(geometry=Geometry(width=24, depth=200, grid=(3, 4)), kernel=3)
    kernels = torch.stack([layer.kernel for layer in vapt.adaptive])
    assert kernels.shape == (199, 1, 1, 3, 3)
    assert abs(kernels.std() - 1) < 0.06
    assert abs(kernels.mean()) < 0.08
    assert all(layer.norm.eps == 1e-5 for layer in vapt.adaptive)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": 3},
        {"kernel": 3, "padding": 1},
        {"kernel": 1},
        {"conv": False},
        {"channelwise": False},
        {"channelwise": False, "kernel": 3, "padding": 2},
        {"feature_projector": False},
        {"share_projector": False},
        {"learnable_scale": True},
        {"activation": "gelu"},
        {"activation": "attention"},
        {"activation": "attention", "share_projector": False, "learnable_scale": True},
        {"activation": "attention", "channelwise": False},
        {"activation": "attention", "feature_projector": False},
        {"static_layers": 0},
        {"hidden": 3},
        {"project": 7},
    ],
    ids=str,
)
def test_rewritten_graph_is_the_released_one(small: Geometry, options: dict[str, Any]) -> None:
    vapt = trained(small, **options)
    tokens = torch.randn(2, 12, 24).double()
    vapt.train()
    for draws in ({}, vapt.draw(2)):
        for layer in range(3):
            fast, plain = (
                vapt.prompts(layer, None, tokens, draws),
                vapt.plain_prompts(layer, None, tokens, draws),
            )
            torch.testing.assert_close(fast, plain, rtol=1e-11, atol=1e-11)
            assert fast.abs().max() > 0


def adaptive_by_hand(vapt: fp.VAPT, tokens: Tensor, j: int) -> Tensor:
    """The default graph on the 3 x 4 grid with explicit sums over the kernel's offsets."""
    layer, g = vapt.adaptive[j], vapt.feature_projectors[0]
    x = F.layer_norm(tokens, (24,), layer.norm.weight, layer.norm.bias, 1e-5).view(-1, 3, 4, 24)
    kernel = layer.kernel[0, 0]
    y = sum(kernel[a, b] * x[:, a : a + 2, b : b + 3] for a in range(2) for b in range(2))
    p = layer.projector.weight @ y.reshape(-1, 6, 24) + layer.projector.bias[:, None]
    return torch.relu(p @ g.w1.T) @ g.w2.T + p


def test_default_graph_by_hand(small: Geometry) -> None:
    vapt = trained(small)
    tokens = torch.randn(2, 12, 24).double()
    for j in range(2):
        torch.testing.assert_close(vapt(tokens, layer=j + 1), adaptive_by_hand(vapt, tokens, j), rtol=1e-11, atol=1e-11)


def test_convolution_switches(small: Geometry) -> None:
    assert trained(small).adaptive[0].projector.in_features == 2 * 3
    assert trained(small, kernel=3, padding=1).adaptive[0].projector.in_features == 12
    no_conv = trained(small, conv=False)
    assert no_conv.adaptive[0].kernel is None
    assert no_conv.adaptive[0].projector.in_features == 12
    assert trained(small, channelwise=False).adaptive[0].kernel.shape == (24, 1, 2, 2)


def test_per_channel_kernels_convolve_each_channel_with_its_own(small: Geometry) -> None:
    vapt = trained(small, channelwise=False, feature_projector=False)
    tokens, layer = torch.randn(1, 12, 24).double(), vapt.adaptive[0]
    x = layer.norm(tokens)[0].view(3, 4, 24)
    for channel in (0, 17):
        y = F.conv2d(x[None, None, :, :, channel], layer.kernel[channel : channel + 1]).flatten()
        expected = layer.projector.weight @ y + layer.projector.bias
        torch.testing.assert_close(vapt(tokens, layer=1)[0, :, channel], expected, rtol=1e-11, atol=1e-11)


def test_projector_switches(small: Geometry) -> None:
    assert len(trained(small).feature_projectors) == 1
    assert len(trained(small, feature_projector=False).feature_projectors) == 0
    separate = trained(small, share_projector=False)
    assert len(separate.feature_projectors) == 2
    tokens = torch.randn(1, 12, 24).double()
    before = separate(tokens, layer=1), separate(tokens, layer=2)
    with torch.no_grad():
        separate.feature_projectors[1].w2.zero_()
    assert torch.equal(separate(tokens, layer=1), before[0])
    assert not torch.allclose(separate(tokens, layer=2), before[1])


def test_feature_projector_off_leaves_the_mix(small: Geometry) -> None:
    vapt, tokens = trained(small), torch.randn(1, 12, 24).double()
    bare = fp.VAPT(geometry=small, num_prompts=5, feature_projector=False).double().eval()
    bare.load_state_dict({k: v for k, v in vapt.state_dict().items() if not k.startswith("feature_projectors")})
    with torch.no_grad():
        vapt.feature_projectors[0].w2.zero_()
    torch.testing.assert_close(vapt(tokens), bare(tokens), rtol=1e-12, atol=1e-12)


def test_learnable_scale_starts_at_one_and_scales_the_bottleneck_only(small: Geometry) -> None:
    scaled = fp.VAPT(geometry=small, learnable_scale=True)
    assert scaled.feature_projectors[0].scale.item() == 1.0
    assert scaled.num_parameters() == fp.VAPT(geometry=small).num_parameters() + 1
    vapt, tokens = trained(small, learnable_scale=True), torch.randn(1, 12, 24).double()

    def at(scale: float) -> Tensor:
        with torch.no_grad():
            vapt.feature_projectors[0].scale.fill_(scale)
        return vapt(tokens)

    torch.testing.assert_close(at(2.0) - at(0.0), 2 * (at(1.0) - at(0.0)), rtol=1e-11, atol=1e-11)
    assert (at(1.0) - at(0.0)).abs().max() > 0.01


def test_activation_matters(small: Geometry) -> None:
    vapt, tokens = trained(small), torch.randn(1, 12, 24).double()
    other = fp.VAPT(geometry=small, num_prompts=5, activation="tanh").double().eval()
    other.load_state_dict(vapt.state_dict())
    assert not torch.allclose(vapt(tokens), other(tokens))


def test_attention_is_a_softmax_over_hidden_units(small: Geometry) -> None:
    vapt, tokens = trained(small, activation="attention"), torch.randn(2, 12, 24).double()
    bare = fp.VAPT(geometry=small, num_prompts=5, feature_projector=False).double().eval()
    bare.load_state_dict({k: v for k, v in vapt.state_dict().items() if "feature" not in k})
    p, g = bare(tokens), vapt.feature_projectors[0]
    expected = torch.softmax(p @ g.w1.T, dim=-1) @ g.w2.T + p
    torch.testing.assert_close(vapt(tokens), expected, rtol=1e-11, atol=1e-11)


def test_what_the_kernels_do_not_know_is_explained(tiny_vit: VisionTransformer) -> None:
    model = fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VAPTConfig(num_prompts=2, activation="attention"))
    assert "no softmax over hidden units" in fp.explain(model).ops["bottleneck"].reason
    assert "bottleneck" not in fp.explain(fp.PromptedViT(fp.FrozenViT(tiny_vit), fp.VAPTConfig(num_prompts=2))).ops


@pytest.mark.parametrize("static", range(4))
def test_static_layers(small: Geometry, static: int) -> None:
    vapt, tokens = trained(small, static_layers=static), torch.randn(2, 12, 24).double()
    assert len(vapt.adaptive) == 3 - static
    for layer in range(3):
        if layer < static:
            assert torch.equal(vapt(layer=layer)[0], vapt.static.embeddings[layer])
        else:
            assert vapt(tokens, layer=layer).shape == (2, 5, 24)
            with pytest.raises(TypeError, match=r"x must be a floating-point tensor"):
                vapt(layer=layer)


@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (7, 7), (3, 11), (2, 2)])
def test_any_patch_grid(grid: tuple[int, int]) -> None:
    vapt = trained(Geometry(width=24, depth=2, grid=grid))
    tokens = torch.randn(2, grid[0] * grid[1], 24).double()
    assert vapt(tokens).shape == (2, 5, 24)
    torch.testing.assert_close(vapt(tokens), vapt.plain_prompts(1, None, tokens), rtol=1e-10, atol=1e-10)


def test_dropout_draws(small: Geometry) -> None:
    vapt = fp.VAPT(geometry=small, num_prompts=5, prompt_dropout=0.5, channel_dropout=0.2, hidden_dropout=0.25)
    torch.manual_seed(3)
    draws = vapt.draw(40)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "prompts": (1, 40, 5, 24),
        "channels": (2, 40, 24),
        "hidden": (2, 40, 5, 8),
    }
    for name, p in (("prompts", 0.5), ("channels", 0.2), ("hidden", 0.25)):
        assert set(draws[name].unique().tolist()) == {0.0, torch.tensor(1.0).div(1 - p).item()}
        assert abs((draws[name] == 0).float().mean() - p) < 0.05
    torch.manual_seed(3)
    assert all(torch.equal(v, draws[k]) for k, v in vapt.draw(40).items())
    assert vapt.eval().draw(40) == {}
    assert set(fp.VAPT(geometry=small).draw(2)) == {"channels", "hidden"}
    assert set(fp.VAPT(geometry=small, conv=False, feature_projector=False).draw(2)) == set()


def test_dropout_masks_act_where_the_released_code_puts_them(small: Geometry) -> None:
    vapt = trained(small, feature_projector=False, prompt_dropout=0.5)
    tokens = torch.randn(1, 12, 24).double()
    channels = torch.ones(2, 1, 24).double()
    channels[0, 0, 7] = 0
    prompts = vapt.prompts(1, None, tokens, {"channels": channels})
    # a dropped channel keeps the projector's bias
    torch.testing.assert_close(prompts[0, :, 7], vapt.adaptive[0].projector.bias)
    mask = torch.zeros(1, 1, 5, 24).double()
    assert vapt.prompts(0, None, None, {"prompts": mask}).abs().max() == 0
    assert vapt.prompts(1, None, tokens, {"prompts": mask}).abs().max() > 0
    full = trained(small)
    bare = full.prompts(1, None, tokens, {"hidden": torch.zeros(2, 1, 5, 8).double()})
    with torch.no_grad():
        full.feature_projectors[0].w2.zero_()
    torch.testing.assert_close(bare, full.prompts(1, None, tokens))


def test_wrong_input_and_geometry_are_named(small: Geometry) -> None:
    vapt = fp.VAPT(geometry=small)
    with pytest.raises(ValueError, match=r"x must have the 3 x 4 patch tokens of the grid, got 9"):
        vapt(torch.zeros(1, 9, 24))
    with pytest.raises(ValueError, match=r"x must be \(B, N, 24\), got \(1, 12, 23\)"):
        vapt(torch.zeros(1, 12, 23))
    with pytest.raises(ValueError, match=r"VAPTConfig.static_layers must be at most the 3 blocks, got 4"):
        fp.VAPT(geometry=small, static_layers=4)
    with pytest.raises(ValueError, match=r"VAPTConfig.kernel 5 with padding 0 does not fit the 3 x 4 patch grid"):
        fp.VAPT(geometry=small, kernel=5)


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"hidden": 0}, ValueError, "hidden"),
        ({"kernel": 0}, ValueError, "kernel"),
        ({"padding": -1}, ValueError, "padding"),
        ({"channel_dropout": 1.5}, ValueError, "channel_dropout"),
        ({"hidden_dropout": -0.1}, ValueError, "hidden_dropout"),
        ({"prompt_dropout": "0"}, TypeError, "prompt_dropout"),
        ({"static_layers": -1}, ValueError, "static_layers"),
        ({"activation": "swish"}, ValueError, "activation"),
        ({"conv": None}, TypeError, "conv"),
        ({"channelwise": 1}, TypeError, "channelwise"),
        ({"feature_projector": 0}, TypeError, "feature_projector"),
        ({"share_projector": "yes"}, TypeError, "share_projector"),
        ({"learnable_scale": 1.0}, TypeError, "learnable_scale"),
        ({"project": 0}, ValueError, "project"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"VAPTConfig\.{name} must be"):
        fp.VAPTConfig(**options)


def test_parameters_are_leaves_that_train(small: Geometry) -> None:
    vapt = trained(small, learnable_scale=True).train()
    tokens = torch.randn(2, 12, 24).double()
    sum(vapt(tokens, layer=layer).pow(2).sum() for layer in range(3)).backward()
    assert all(isinstance(p, nn.Parameter) and p.grad is not None for p in vapt.parameters())
