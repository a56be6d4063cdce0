from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.prefix_attention.reference import SMALL_SCORES

B, H, R, T, P, D = 2, 3, 4, 5, 6, 8


def tensors(shared: bool = False, rows: int = R, tokens: int = T) -> dict[str, Tensor]:
    b = 1 if shared else B
    shapes = {
        "q": (B, H, rows, D),
        "k": (B, H, tokens, D),
        "v": (B, H, tokens, D),
        "prefix_k": (b, H, P, D),
        "prefix_v": (b, H, P, D),
    }
    return {name: torch.randn(shape).double() for name, shape in shapes.items()}


def by_hand(q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor | None = None, prefix_v: Tensor | None = None) -> Tensor:
    """One query at a time: exponentials of the scores over prefix and tokens, normalised by their common sum."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = list(k[b, h]), list(v[b, h])
            if prefix_k is not None and prefix_v is not None:
                i = b if len(prefix_k) > 1 else 0
                keys, values = list(prefix_k[i, h]) + keys, list(prefix_v[i, h]) + values
            for r in range(q.shape[2]):
                weights = [math.exp(float(q[b, h, r] @ key) / math.sqrt(q.shape[3])) for key in keys]
                out[b, h, r] = sum(w * value for w, value in zip(weights, values, strict=True)) / sum(weights)
    return out


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("rows", [1, R])
def test_matches_the_formula(shared: bool, rows: int) -> None:
    t = tensors(shared, rows)
    torch.testing.assert_close(prefix_attention(**t), by_hand(**t), rtol=1e-11, atol=1e-12)


def test_without_prefix_it_is_attention() -> None:
    t = tensors()
    out = prefix_attention(t["q"], t["k"], t["v"])
    torch.testing.assert_close(out, by_hand(t["q"], t["k"], t["v"]), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(t["q"], t["k"], t["v"]))


def test_packed_is_the_same() -> None:
    qkv, t = torch.randn(B, T, 3, H, D).double(), tensors()
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    prefix = (t["prefix_k"], t["prefix_v"])
    assert torch.equal(prefix_attention(qkv, None, None, *prefix), prefix_attention(q, k, v, *prefix))
    assert torch.equal(prefix_attention(t["q"], qkv[:, :, 1:]), prefix_attention(t["q"], k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [T, 1 + SMALL_SCORES // R])
def test_other_dtypes_take_both_ways_within_tolerance(dtype: torch.dtype, tokens: int) -> None:
    t = {name: x.to(dtype) for name, x in tensors(tokens=tokens).items()}
    out = prefix_attention(**t)
    assert out.dtype == dtype
    exact = prefix_attention(**{name: x.double() for name, x in t.items()})
    k, v = (torch.cat([t["prefix_" + n], t[n]], dim=2) for n in "kv")
    plain = torch.softmax(t["q"] @ k.transpose(2, 3) / math.sqrt(D), dim=-1) @ v
    bound = 2 * (plain.double() - exact).abs().max() + torch.finfo(dtype).eps * exact.abs().max()
    assert (out.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("shared", [True, False])
def test_gradients(shared: bool) -> None:
    inputs = [x.requires_grad_() for x in tensors(shared, rows=2, tokens=2).values()]
    assert torch.autograd.gradcheck(prefix_attention, inputs)


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_windows_share_their_image_s_prefix_and_have_their_own_bias(windows: int) -> None:
    images = 4 // windows
    q, k, v = torch.randn(3, 4, H, R, D).double().unbind(0)
    prefix_k, prefix_v = torch.randn(2, images, H, P, D).double().unbind(0)
    bias = torch.randn(windows, H, R, R).double()
    found = prefix_attention(q, k, v, prefix_k, prefix_v, bias=bias, scale=0.3)
    for i in range(images):
        for w in range(windows):
            keys, values = (torch.cat([a[i], b[i * windows + w]], 1) for a, b in ((prefix_k, k), (prefix_v, v)))
            scores = 0.3 * q[i * windows + w] @ keys.mT
            scores[:, :, P:] += bias[w]
            torch.testing.assert_close(found[i * windows + w], scores.softmax(-1) @ values, rtol=1e-11, atol=1e-12)


def test_kernels_say_what_they_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"take float32, float16 and bfloat16, not torch\.float64"):
            prefix_attention(**tensors())
        with pytest.raises(RuntimeError, match="heads of at most 128, not 130"):
            prefix_attention(*torch.randn(3, 1, 1, 2, 130).unbind(0))


def test_empty_batch() -> None:
    t = tensors(shared=True)
    assert prefix_attention(t["q"][:0], t["k"][:0], t["v"][:0], t["prefix_k"], t["prefix_v"]).shape == (
        0,
        H,
        R,
        D,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(B, R, D)}, "q must be"),
        ({"v": torch.zeros(B, H, T + 1, D)}, "k, v"),
        ({"k": None}, "v needs k"),
        ({"v": None}, r"k must be packed, \(B, T, 2, H, d\), where v is None, got \(2, 3, 5, 8\)"),
        ({"k": None, "v": None}, r"q must be packed, \(B, T, 3, H, d\), where v is None, got \(2, 3, 4, 8\)"),
        ({"k": torch.zeros(B, T, 3, H, D), "v": None}, "k must be packed"),
        ({"q": torch.zeros(B, H, R, D + 1)}, "q must be"),
        ({"q": torch.zeros(B, H + 1, R, D)}, "q must be"),
        ({"prefix_v": None}, "prefix_k and prefix_v must be given together"),
        (
            {"prefix_k": torch.zeros(3, H, P, D)},
            r"prefix_k must be \(n, 3, P, 8\) with n dividing 2, got \(3, 3, 6, 8\)",
        ),
        ({"prefix_v": torch.zeros(B, H, P, D + 1).double()}, "prefix_v must be"),
        ({"prefix_v": torch.zeros(B, H, P + 1, D).double()}, "prefix_v must have the shape of prefix_k"),
        ({"bias": torch.zeros(1, H, R, T + 1)}, r"bias must be \(W, 3, 4, 5\) with W dividing 2, got \(1, 3, 4, 6\)"),
        ({"bias": torch.zeros(3, H, R, T)}, "bias must be"),
        ({"bias": torch.zeros(1, H, R, T, requires_grad=True)}, "bias gets no gradient"),
        ({"q": torch.zeros(B, H, R, D)}, r"q must have the dtype of k, torch\.float64, got torch\.float32"),
        (
            {"prefix_k": torch.zeros(B, H, P, D)},
            r"prefix_k must have the dtype of k, torch\.float64, got torch\.float32",
        ),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix_attention(**{**tensors(), **change})
