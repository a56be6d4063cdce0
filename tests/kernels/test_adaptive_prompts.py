from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.kernels.adaptive_prompts import ACTIVATIONS, adaptive_prompts
from fastprompt.kernels.adaptive_prompts.reference import position_matrix
from fastprompt.kernels.dispatch import use_backend

B, P, D, R = 2, 3, 6, 4


def tensors(positions: int) -> dict[str, Tensor]:
    shapes = {
        "norm_weight": (D,),
        "norm_bias": (D,),
        "mix": (P, positions),
        "bias": (P,),
        "w1": (R, D),
        "w2": (D, R),
    }
    return {
        "tokens": torch.randn(B, positions, D).double(),
        **{name: torch.randn(s).double() for name, s in shapes.items()},
    }


def released_graph(
    tokens: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    kernel: Tensor,
    projector: Tensor,
    bias: Tensor,
    w1: Tensor,
    w2: Tensor,
    grid: tuple[int, int],
    padding: int,
    channel_mask: Tensor | None,
    hidden_mask: Tensor | None,
) -> Tensor:
    """LayerNorm, depthwise convolution, channel dropout, Linear over positions, bottleneck with residual."""
    x = F.layer_norm(tokens, (D,), norm_weight, norm_bias, 1e-5).transpose(1, 2).reshape(B, D, *grid)
    x = F.conv2d(x, kernel.expand(D, 1, -1, -1), padding=padding, groups=D)
    if channel_mask is not None:
        x = x * channel_mask[:, :, None, None]
    x = F.linear(x.flatten(2), projector, bias).transpose(1, 2)
    hidden = F.relu(F.linear(x, w1))
    if hidden_mask is not None:
        hidden = hidden * hidden_mask
    return F.linear(hidden, w2) + x


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    ("grid", "size", "padding"),
    [
        ((4, 4), 2, 0),
        ((3, 5), 2, 0),
        ((5, 3), 3, 1),
        ((4, 6), 3, 0),
        ((2, 2), 3, 2),
        ((1, 3), 1, 0),
        ((4, 4), 4, 0),
        ((3, 4), 2, 1),
    ],
)
def test_matches_convolution_and_linear(grid: tuple[int, int], size: int, padding: int, masks: bool) -> None:
    t = tensors(grid[0] * grid[1])
    kernel = torch.randn(1, 1, size, size).double()
    positions = (grid[0] + 2 * padding - size + 1) * (grid[1] + 2 * padding - size + 1)
    projector = torch.randn(P, positions).double()
    channel_mask = torch.tensor([0.0, 1.25]).double()[torch.randint(2, (B, D))] if masks else None
    hidden_mask = torch.tensor([0.0, 2.0]).double()[torch.randint(2, (B, P, R))] if masks else None
    t["mix"] = position_matrix(kernel, projector, grid, padding)
    assert t["mix"].shape == (P, grid[0] * grid[1])
    prompts = adaptive_prompts(**t, channel_mask=channel_mask, hidden_mask=hidden_mask)
    expected = released_graph(
        t["tokens"],
        t["norm_weight"],
        t["norm_bias"],
        kernel,
        projector,
        t["bias"],
        t["w1"],
        t["w2"],
        grid,
        padding,
        channel_mask,
        hidden_mask,
    )
    torch.testing.assert_close(prompts, expected, rtol=1e-12, atol=1e-12)


def test_channel_mask_comes_before_the_bias() -> None:
    t = tensors(9)
    prompts = adaptive_prompts(**{**t, "w1": None, "w2": None}, channel_mask=torch.zeros(B, D).double())
    torch.testing.assert_close(prompts, t["bias"][:, None].expand(B, P, D))


def test_without_bottleneck_the_mix_is_the_prompt() -> None:
    t = tensors(9)
    x = F.layer_norm(t["tokens"], (D,), t["norm_weight"], t["norm_bias"], 1e-5)
    prompts = adaptive_prompts(**{**t, "w1": None, "w2": None})
    torch.testing.assert_close(prompts, t["mix"] @ x + t["bias"][:, None], rtol=1e-12, atol=1e-12)


def test_eps_is_the_layer_norm_s() -> None:
    t = tensors(9)
    t["tokens"] = t["tokens"] * 1e-3
    x = F.layer_norm(t["tokens"], (D,), t["norm_weight"], t["norm_bias"], 1e-2)
    prompts = adaptive_prompts(**{**t, "w1": None, "w2": None}, eps=1e-2)
    torch.testing.assert_close(prompts, t["mix"] @ x + t["bias"][:, None], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(prompts, adaptive_prompts(**{**t, "w1": None, "w2": None}))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_scale(activation: str) -> None:
    functions = {
        "relu": torch.relu,
        "gelu": F.gelu,
        "silu": F.silu,
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
    }
    t = tensors(9)
    p = adaptive_prompts(**{**t, "w1": None, "w2": None})
    for scale in (1.0, 0.5, torch.tensor(-2.0).double()):
        prompts = adaptive_prompts(**t, scale=scale, activation=activation)
        expected = functions[activation](p @ t["w1"].T) @ t["w2"].T * scale + p
        torch.testing.assert_close(prompts, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_tokens_give_prompts_of_the_mix_s_dtype() -> None:
    t = {name: v.float() for name, v in tensors(9).items()}
    with use_backend("reference"):
        prompts = adaptive_prompts(**{**t, "tokens": t["tokens"].bfloat16()})
        assert prompts.dtype == torch.float32
        assert torch.equal(prompts, adaptive_prompts(**{**t, "tokens": t["tokens"].bfloat16().float()}))
    assert adaptive_prompts(**{**t, "tokens": t["tokens"][:0]}).shape == (0, P, D)


def test_kernels_say_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = [torch.zeros(size) for size in ((1, 2, 1025), (1025,), (1025,), (3, 2), (3,))]
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"float32, float16 and bfloat16, not torch\.float64"):
            adaptive_prompts(**tensors(9))
        with pytest.raises(RuntimeError, match="at most 1024 channels, not 1025"):
            adaptive_prompts(*wide)
        with pytest.raises(RuntimeError, match="at most 64 hidden units, not 65"):
            adaptive_prompts(*wide, torch.zeros(65, 1025), torch.zeros(1025, 65), stats=torch.zeros(1, 2, 2))


def test_gradients() -> None:
    t = {name: v.requires_grad_() for name, v in tensors(4).items()}
    scale = torch.tensor(1.5).double().requires_grad_()
    masks = torch.rand(B, D).double(), torch.rand(B, P, R).double()

    def call(*values: Tensor) -> Tensor:
        return adaptive_prompts(*values, activation="tanh", channel_mask=masks[0], hidden_mask=masks[1])

    order = ("tokens", "norm_weight", "norm_bias", "mix", "bias", "w1", "w2")
    assert torch.autograd.gradcheck(call, (*(t[name] for name in order), scale))


def test_position_matrix_gradients() -> None:
    kernel = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    projector = torch.randn(P, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda k, a: position_matrix(k, a, (3, 2), 1), (kernel, projector))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"tokens": torch.zeros(B, 9, D).int()},
            TypeError,
            "tokens must be a floating-point tensor, got torch.int32",
        ),
        ({"tokens": None}, TypeError, "tokens must be a floating-point tensor"),
        ({"tokens": torch.zeros(9, D)}, ValueError, r"tokens must have shape \(B, N, D\), got \(9, 6\)"),
        ({"mix": torch.zeros(P, 8)}, ValueError, r"mix must have shape \(P, 9\).*got \(3, 8\)"),
        ({"norm_weight": torch.zeros(D + 1)}, ValueError, r"norm_weight must have shape \(6,\)"),
        ({"norm_bias": torch.zeros(1, D)}, ValueError, r"norm_bias must have shape \(6,\)"),
        ({"bias": torch.zeros(P, 1)}, ValueError, r"bias must have shape \(3,\), got \(3, 1\)"),
        ({"w1": torch.zeros(R, D + 1)}, ValueError, r"w1 must have shape \(4, 6\)"),
        ({"w2": torch.zeros(R, D)}, ValueError, r"w2 must have shape \(6, 4\), got \(4, 6\)"),
        ({"w2": None}, ValueError, "w1 and w2 must be given together"),
        ({"channel_mask": torch.ones(B, 1)}, ValueError, r"channel_mask must have shape \(2, 6\)"),
        ({"hidden_mask": torch.ones(B, R)}, ValueError, r"hidden_mask must have shape \(2, 3, 4\)"),
        ({"stats": torch.ones(B, 9)}, ValueError, r"stats must have shape \(2, 9, 2\), got \(2, 9\)"),
        ({"activation": "swish"}, ValueError, "activation must be one of"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        adaptive_prompts(**{**tensors(9), **change})
