"""The backward of prefix attention and of VAPT's position mix that keeps its inputs alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import adaptive_prompts, recompute as adaptive
from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.prefix_attention import prefix_attention, recompute as attention

SIZES = {  # images, heads, rows, tokens, prompts, prompts shared by all images
    "shared prefix": (3, 2, 5, 7, 4, True),
    "prefix per image": (3, 2, 5, 7, 4, False),
    "no prefix": (3, 2, 5, 7, 0, False),
    "one query, one token": (2, 3, 1, 1, 2, True),
    "one image": (1, 2, 5, 5, 3, True),
    "no image": (0, 2, 5, 5, 3, True),
}


def inputs(size: str) -> list[Tensor | None]:
    b, h, r, t, p, shared = SIZES[size]
    packed = torch.randn(b, t, 2, h, 8, dtype=torch.float64)
    k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    q = torch.randn(b, r, h, 8, dtype=torch.float64).transpose(1, 2)
    prefix = [torch.randn(1 if shared else b, h, p, 8, dtype=torch.float64) if p else None for _ in "kv"]
    return [q, k, v, *prefix]


@pytest.mark.parametrize("size", ["shared prefix", "no prefix", "no image"])
def test_packed_inputs_get_packed_gradients(size: str) -> None:
    q, k, v, *prefix = inputs(size)
    assert q is not None
    assert k is not None
    assert v is not None
    pair = torch.stack([k, v]).permute(1, 3, 0, 2, 4).contiguous()  # (B, T, 2, H, d)
    whole = torch.cat([pair[:, :, :1], pair], dim=2).detach()  # with the keys as queries
    for given in ((q, pair, None), (whole, None, None)):
        x = [t if t is None else t.detach().requires_grad_() for t in (*given, *prefix)]
        active = [t for t in x if t is not None]
        out = prefix_attention(*x, scale=0.3)
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        ours = torch.autograd.grad((out * weights).sum(), active)
        assert ours[1 if given[1] is pair else 0].is_contiguous()
        with use_backend("reference"):
            plain = prefix_attention(*x, scale=0.3)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
        for a, b in zip(ours, torch.autograd.grad((plain * weights).sum(), active), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    for first in (True, False):  # tokens that need no gradient
        x = [
            whole if first else whole.requires_grad_(),
            None,
            None,
            *(t if t is None else t.detach().requires_grad_(first) for t in prefix),
        ]
        if any(t is not None and t.requires_grad for t in x):
            prefix_attention(*x, scale=0.3).sum().backward()
            assert (whole.grad is None) == first


@pytest.mark.parametrize("buffer", [5 * 2**18, 100, 20], ids=["one buffer", "a head at a time", "less than a head"])
@pytest.mark.parametrize("size", SIZES)
def test_attention_gradients(size: str, buffer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "BUFFER_SCORES", buffer)
    tensors = inputs(size)
    for wanted in range(1, 2**5):  # every choice of inputs that need a gradient
        x = [t if t is None else t.detach().requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
        active = [t for t in x if t is not None and t.requires_grad]
        if not active:
            continue
        out = prefix_attention(*x, scale=0.3)
        assert dispatch.choices["prefix_attention"].backend == "recompute"
        weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        ours = torch.autograd.grad((out * weights).sum(), active)
        with use_backend("reference"):
            plain = prefix_attention(*x, scale=0.3)
        torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
        for a, b in zip(ours, torch.autograd.grad((plain * weights).sum(), active), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def saved_bytes(run: object, given: list[Tensor | None]) -> int:
    """Bytes kept for the backward in other memory than that of the tensors given."""
    known = {t.untyped_storage().data_ptr() for t in given if t is not None}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()  # type: ignore[operator]
    assert out.requires_grad
    return sum(kept.values())


def test_attention_keeps_nothing_but_its_inputs() -> None:
    x = [t.requires_grad_() for t in inputs("shared prefix")]  # type: ignore[union-attr]
    assert saved_bytes(lambda: prefix_attention(*x), x) == 0
    with use_backend("reference"):
        assert saved_bytes(lambda: prefix_attention(*x), x) > 0


def test_the_mix_keeps_nothing_but_its_inputs_and_equals_the_reference() -> None:
    sequence = torch.randn(3, 12, 6, dtype=torch.float64)
    tokens = sequence[:, 2:11].requires_grad_()
    parameters = [torch.randn(n, dtype=torch.float64).requires_grad_() for n in (6, 6)]
    mix, bias = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((4, 9), (4,)))
    x = [tokens, *parameters, mix, bias]
    out = adaptive_prompts(*x)
    assert dispatch.choices["adaptive_prompts"].backend == "recompute"
    with use_backend("reference"):
        plain = adaptive_prompts(*x)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), x) for y in (out, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    assert saved_bytes(lambda: adaptive.mix_positions(*x[:4], 1e-5), x) == 0


def test_tokens_without_gradient_get_none() -> None:
    tokens = torch.randn(2, 9, 6)
    weight, bias, mix = torch.ones(6), torch.zeros(6), torch.randn(4, 9).requires_grad_()
    adaptive_prompts(tokens, weight, bias, mix, torch.zeros(4)).sum().backward()
    assert mix.grad.abs().max() > 0
    assert tokens.grad is None


def test_a_second_derivative_is_refused() -> None:
    x = [t.requires_grad_() for t in inputs("shared prefix")]  # type: ignore[union-attr]
    (first,) = torch.autograd.grad(prefix_attention(*x).square().sum(), x[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("why", ["inference", "compiling", "asked for the reference"])
def test_the_reference_runs_elsewhere(why: str) -> None:
    x = [t.requires_grad_() for t in inputs("shared prefix")]  # type: ignore[union-attr]
    if why == "inference":
        with torch.no_grad():
            prefix_attention(*x)
    elif why == "compiling":
        torch.compile(prefix_attention, backend="aot_eager", fullgraph=True)(*x).sum().backward()
    else:
        with use_backend("reference"):
            prefix_attention(*x)
    assert dispatch.choices["prefix_attention"].backend == "reference"
