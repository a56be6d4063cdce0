"""Kernels are launched again without binding their arguments, and ops are called again without checking them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

import launch as bench
from triton.runtime.jit import JITFunction

import fastprompt as fp
from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import adaptive_prompts
from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.launch import cdiv, power_of_2
from fastprompt.kernels.library_prompts import PreNorm, library_prompts
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.vae_prompts import Decoder, vae_prompts


class Bound:
    """Counts the launches that Triton binds, by kernel."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(kernel: JITFunction, *args: Any, **options: Any) -> Any:
            self.names.append(kernel.__name__)
            return function(kernel, *args, **options)

        return run


@pytest.fixture
def bound() -> Iterator[Bound]:
    """A driver that launches nothing, and what Triton binds for it."""
    found = Bound()
    with bench.stubbed(), mock.patch.object(JITFunction, "run", found.run(JITFunction.run)):
        yield found


def inputs(dtype: torch.dtype = torch.float32, batch: int = 1) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, 2, 4, 16, dtype=dtype) for _ in range(3))


def test_a_launch_like_an_earlier_one_is_not_bound(bound: Bound) -> None:
    x = inputs()
    aligned = torch.randn(129)
    with torch.no_grad(), fp.use_backend("triton"):
        for given in (x, x, inputs()):
            prefix_attention(*given)
        assert bound.names == ["_prefix_attention_fwd"]
        unaligned = aligned[1:].view(1, 2, 4, 16)
        for i, given in enumerate([inputs(batch=2), inputs(torch.float16), (unaligned, *x[1:]), (x[0].mT.mT, *x[1:])]):
            prefix_attention(*given)
            assert len(bound.names) == min(2 + i, 4)  # the last differs in nothing
        prefix_attention(*x, scale=2)
        prefix_attention(*x, scale=2.0)
        assert len(bound.names) == 6


def test_a_backward_like_an_earlier_one_is_not_bound(bound: Bound) -> None:
    with fp.use_backend("triton"):
        for _ in range(2):
            x = [t.requires_grad_() for t in inputs()]
            prefix_attention(*x).sum().backward()
    assert len(bound.names) == len(set(bound.names)) == 3


def test_a_call_like_an_earlier_one_is_not_checked_again(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    choose = dispatch.choose

    def counted(op: str, *arguments: Any, **options: Any) -> str:
        chosen.append(op)
        return choose(op, *arguments, **options)

    monkeypatch.setattr(dispatch, "choose", counted)
    x = inputs()
    with torch.no_grad():
        prefix_attention(*x)
        dispatch.choices.clear()
        prefix_attention(*x)
        assert len(chosen) == 1
        assert dispatch.choices["prefix_attention"].backend == "triton"
        with fp.use_backend("reference"):
            expected = prefix_attention(*x)
            assert torch.equal(prefix_attention(*x), expected)
        assert dispatch.choices["prefix_attention"].backend == "reference"
        with torch.autocast("cpu", torch.bfloat16):
            prefix_attention(*x)
        with pytest.raises(ValueError, match="q must be"):
            prefix_attention(x[0], x[1][:, :1], x[2][:, :1])
    before = len(chosen)
    prefix_attention(x[0].clone().requires_grad_(), *x[1:])
    assert len(chosen) == before + 1


HOST = 9  # grid, stream, function, metadata and hooks come before a kernel's arguments


def described(x: Any, inputs: list[torch.Tensor]) -> Any:
    """An argument of a launch: which input it is, or what it is like; views with where they begin."""
    if not isinstance(x, torch.Tensor):
        return type(x), x
    for i, given in enumerate(inputs if x.numel() else []):
        if x.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            return i, x.shape, x.stride(), x.dtype, x.storage_offset() - given.storage_offset()
    return x.shape, x.stride(), x.dtype, x.storage_offset() if x.numel() else 0


def leaf(*size: int) -> torch.Tensor:
    return torch.randn(size)


CALLS: dict[str, tuple[Callable[..., Any], Callable[[], list[torch.Tensor]]]] = {
    "attention": (prefix_attention, lambda: [leaf(2, 2, 4, 16) for _ in range(3)]),
    "attention, prefix": (
        lambda q, k, v, p: prefix_attention(q, k, v, p, p + 0),
        lambda: [*(leaf(2, 2, 4, 16) for _ in range(3)), leaf(1, 2, 3, 16)],
    ),
    "attention, packed": (prefix_attention, lambda: [leaf(2, 4, 3, 2, 16)]),
    "attention, bias": (
        lambda q, k, v, bias: prefix_attention(q, k, v, bias=bias),
        lambda: [*(leaf(2, 2, 4, 16) for _ in range(3)), leaf(2, 2, 4, 4)],
    ),
    "add and norm": (lambda x, branch: add_norm(x, branch, 1e-6), lambda: [leaf(2, 4, 16) for _ in range(2)]),
    "add and norm, rows": (
        lambda x, branch: add_norm(x[:, 1:], branch[:, 1:], 1e-6),
        lambda: [leaf(2, 4, 16) for _ in range(2)],
    ),
    "library": (library_prompts, lambda: [leaf(2, 3, 5), leaf(5, 16)]),
    "library, sequence": (
        lambda logits, library, patches, weight, bias: library_prompts(
            logits, library, patches=patches, pre_norm=PreNorm(weight, bias, 1e-5)
        ),
        lambda: [leaf(2, 3, 5), leaf(5, 16), leaf(2, 4, 16), leaf(16), leaf(16)],
    ),
    "adaptive": (adaptive_prompts, lambda: [leaf(2, 4, 16), leaf(16), leaf(16), leaf(3, 4), leaf(3)]),
    "vae": (
        lambda stats, domain, *w: vae_prompts(stats, [Decoder(*w[:4]), Decoder(*w[4:])], domain),
        lambda: [
            leaf(2, 4),
            leaf(2, 1, 16),
            *(w for _ in range(2) for w in (leaf(3, 2), leaf(3), leaf(16, 3), leaf(16))),
        ],
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_planned_call_launches_what_the_first_one_did(bound: Bound, name: str) -> None:
    call, draw = CALLS[name]
    found, returned = [], []
    with torch.no_grad(), fp.use_backend("triton"):
        for _ in range(3):
            launched: list[tuple[Any, ...]] = []
            inputs = draw()
            with mock.patch.object(bench.Compiled, "run", lambda self, *args: launched.append(args)):  # noqa: B023
                outputs = call(*inputs)
            found.append([[args[:3], *(described(x, inputs) for x in args[HOST:])] for args in launched])
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
            returned.append([(o.shape, o.stride(), o.dtype) for o in outputs])
            written = {x.data_ptr() for args in launched for x in args if isinstance(x, torch.Tensor)}
            assert {o.data_ptr() for o in outputs} <= written
    assert found[0]
    assert found[0] == found[1] == found[2]
    assert returned[0] == returned[1] == returned[2]
    plans = [plan for settled in dispatch._settled.values() for plan in settled.plans.values()]
    assert any(plan is not None for plan in plans)


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("attention")])
def test_a_planned_backward_launches_what_the_first_one_did(bound: Bound, name: str) -> None:
    call, draw = CALLS[name]
    found: dict[bool, list[Any]] = {True: [], False: []}
    with fp.use_backend("triton"):
        for _ in range(3):
            for alone in (False, True):  # the first input's gradient alone asks for other launches
                launched: list[tuple[Any, ...]] = []
                inputs = draw()
                leaves = [x.requires_grad_() for x in (inputs[:3] if "bias" in name else inputs)]
                with mock.patch.object(bench.Compiled, "run", lambda self, *args: launched.append(args)):  # noqa: B023
                    outputs = call(*inputs)
                    torch.autograd.grad(outputs, leaves[:1] if alone else leaves, torch.ones_like(outputs))
                found[alone].append([[args[:3], *(described(x, inputs) for x in args[HOST:])] for args in launched])
    for of in found.values():
        assert len(of[0]) > 1
        assert of[0] == of[1] == of[2]


def test_arguments_that_cannot_be_told_apart_are_not_planned(bound: Bound) -> None:
    x, other = leaf(2, 2, 4, 16), leaf(2, 2, 4, 16)
    launched: list[tuple[Any, ...]] = []
    with torch.no_grad(), fp.use_backend("triton"):
        for _ in range(3):
            prefix_attention(x, x, x)
        with mock.patch.object(bench.Compiled, "run", lambda self, *args: launched.append(args)):
            for _ in range(2):
                prefix_attention(x, other, x)
                prefix_attention(other, x, leaf(2, 2, 4, 16))
    firsts = [[y for y in args if isinstance(y, torch.Tensor)][:2] for args in launched]
    assert [a is x for a, _ in firsts] == [True, False, True, False]
    assert [b is x for _, b in firsts] == [False, True, False, True]


def test_what_is_not_timed_is_chosen_anew(bound: Bound, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that a graph capture meets first."""
    monkeypatch.setattr(dispatch, "_can_be_timed", lambda tensors: False)
    x = inputs()
    with torch.no_grad():
        prefix_attention(*x)
        assert not dispatch._settled


def test_on_a_cpu_nothing_is_remembered() -> None:
    assert dispatch.call_of("prefix_attention", *inputs()) is None


def test_host_arithmetic_is_tritons() -> None:
    import triton

    for n in range(1, 40):
        assert power_of_2(n) == triton.next_power_of_2(n)
        assert [cdiv(n, m) for m in range(1, 9)] == [triton.cdiv(n, m) for m in range(1, 9)]


def test_the_host_takes_little_longer_than_pytorchs_own_operators() -> None:
    """`bench/launch.py` measures it, on a machine that does nothing else; this bound holds on one that does."""
    pair = bench.pairs()[0]
    with bench.stubbed(), torch.no_grad():
        us = bench.microseconds({"ours": pair.ours, "peer": pair.peer}, rounds=9)
    assert us["ours"] < 4 * us["peer"]
