from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastprompt.kernels.library_prompts import PreNorm, library_prompts
from fastprompt.kernels.library_prompts.reference import mixture


def by_hand(logits: Tensor, library: Tensor, activation: str) -> Tensor:
    """The formula in Python floats, entry by entry."""
    b, k = logits.shape[:2]
    out = torch.zeros(b, k, library.shape[1], dtype=torch.float64)
    for i in range(b):
        for j in range(k):
            row = logits[i, j].tolist()
            if activation == "softmax":
                top = max(row)
                weights = [math.exp(v - top) for v in row]
                weights = [w / math.fsum(weights) for w in weights]
            else:
                weights = [1 / (1 + math.exp(-v)) for v in row]
            for d in range(library.shape[1]):
                out[i, j, d] = math.fsum(w * t for w, t in zip(weights, library[:, d].tolist(), strict=True))
    return out


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (1, 1, 1, 1), (2, 1, 9, 3)])
def test_matches_the_formula(shape: tuple[int, int, int, int], activation: str) -> None:
    b, k, m, d = shape
    logits, library = 3 * torch.randn(b, k, m, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    expected = by_hand(logits, library, activation)
    torch.testing.assert_close(library_prompts(logits, library, activation), expected, rtol=1e-13, atol=1e-14)
    single = library_prompts(logits.float(), library.float(), activation)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_softmax_is_the_default_and_its_weights_sum_to_one() -> None:
    logits, library = torch.randn(2, 3, 6).double(), torch.ones(6, 4).double()
    torch.testing.assert_close(library_prompts(logits, library), torch.ones(2, 3, 4).double(), rtol=1e-14, atol=0)
    assert library_prompts(logits, library, "sigmoid").std() > 0.01


def test_softmax_does_not_change_when_all_logits_shift() -> None:
    logits, library = torch.randn(2, 3, 6).double(), torch.randn(6, 4).double()
    shifted = library_prompts(logits + 700, library)
    torch.testing.assert_close(shifted, library_prompts(logits, library), rtol=1e-11, atol=1e-12)
    assert torch.isfinite(library_prompts(1e30 * logits.float(), library.float())).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_certain_selection_returns_the_library_row(dtype: torch.dtype) -> None:
    library, chosen = torch.randn(5, 8).to(dtype), torch.tensor([[3, 0], [4, 4]])
    logits = torch.where(torch.nn.functional.one_hot(chosen, 5) == 1, 0.0, float("-inf")).to(dtype)
    assert torch.equal(library_prompts(logits, library), library[chosen])


def test_order_of_library_and_prompts() -> None:
    logits, library = torch.randn(2, 3, 6).double(), torch.randn(6, 4).double()
    prompts, order = library_prompts(logits, library), torch.randperm(6)
    torch.testing.assert_close(library_prompts(logits[:, :, order], library[order]), prompts, rtol=1e-13, atol=1e-15)
    assert torch.equal(library_prompts(logits.flip(1), library), prompts.flip(1))
    assert torch.equal(library_prompts(logits.flip(0), library), prompts.flip(0))


def test_half_precision_library_mixes_in_float32() -> None:
    logits, library = torch.randn(2, 3, 300).bfloat16(), torch.randn(300, 4).bfloat16()
    prompts = library_prompts(logits, library)
    assert prompts.dtype == torch.bfloat16
    expected = library_prompts(logits.double(), library.double())
    # one rounding to bfloat16 at the end, none on the way
    assert torch.equal(prompts, expected.bfloat16())
    assert mixture(logits, "softmax").dtype == torch.float32


def test_empty_batch_and_strided_logits() -> None:
    library = torch.randn(6, 4)
    assert library_prompts(torch.zeros(0, 3, 6), library).shape == (0, 3, 4)
    logits = torch.randn(6, 3, 2)
    assert torch.equal(
        library_prompts(logits.permute(2, 1, 0), library),
        library_prompts(logits.permute(2, 1, 0).contiguous(), library),
    )


def test_prompts_are_written_into_the_slots_of_a_sequence() -> None:
    logits, library, sequence = torch.randn(2, 3, 6), torch.randn(6, 4), torch.randn(2, 8, 4)
    before = sequence.clone()
    assert library_prompts(logits, library, out=sequence, slot=5) is sequence
    assert torch.equal(sequence[:, :5], before[:, :5])
    assert torch.equal(sequence[:, 5:], library_prompts(logits, library))


def test_what_was_in_the_slots_has_no_gradient() -> None:
    logits, library = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5, 4)))
    sequence = torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True)

    def call(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return library_prompts(a, b, out=c.clone(), slot=1)

    assert torch.autograd.gradcheck(call, (logits, library, sequence))
    [grad] = torch.autograd.grad(call(logits, library, sequence).sum(), sequence)
    assert grad[0, :, 0].tolist() == [1, 0, 0, 0, 1, 1, 1]


def norm_of(width: int, dtype: torch.dtype = torch.float64) -> PreNorm:
    return PreNorm(torch.randn(width, dtype=dtype), torch.randn(width, dtype=dtype), 1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("front", [0, 2])
def test_the_sequence_is_that_of_clip(activation: str, normed: bool, front: int) -> None:
    """[class token and registers, patches, prompts], the former two with their position embedding, then the norm."""
    logits, library = torch.randn(3, 4, 6).double(), torch.randn(6, 5).double()
    patches, prefix = torch.randn(3, 7, 5).double(), torch.randn(1, 2, 5).double()
    position, norm = torch.randn(1, front + 7, 5).double(), norm_of(5) if normed else None
    expected = torch.empty(3, 2 + 7 + 4, 5).double()
    for b in range(3):
        for t in range(2):
            expected[b, t] = prefix[0, t] + (position[0, t] if front else 0)
        for t in range(7):
            expected[b, 2 + t] = patches[b, t] + position[0, front + t]
        expected[b, 9:] = by_hand(logits[b : b + 1], library, activation)[0]
    if norm is not None:
        mean, var = expected.mean(-1, keepdim=True), expected.var(-1, unbiased=False, keepdim=True)
        expected = (expected - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias
    found = library_prompts(
        logits, library, activation, patches=patches, prefix=prefix, position=position, pre_norm=norm
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_patches_alone_and_a_position_without_prefix() -> None:
    logits, library, patches = torch.randn(2, 3, 6), torch.randn(6, 4), torch.randn(2, 5, 4)
    prompts, position = library_prompts(logits, library), torch.randn(1, 5, 4)
    assert torch.equal(library_prompts(logits, library, patches=patches), torch.cat([patches, prompts], dim=1))
    found = library_prompts(logits, library, patches=patches, position=position)
    assert torch.equal(found, torch.cat([patches + position, prompts], dim=1))
    assert library_prompts(logits[:0], library, patches=patches[:0], position=position).shape == (0, 8, 4)


def test_pre_norm_of_a_certain_selection_is_that_of_the_library_row() -> None:
    library, chosen, norm = torch.randn(5, 8), torch.tensor([[3, 0], [4, 4]]), norm_of(8, torch.float32)
    logits = torch.where(torch.nn.functional.one_hot(chosen, 5) == 1, 0.0, float("-inf"))
    expected = torch.nn.functional.layer_norm(library[chosen], (8,), *norm)
    assert torch.equal(library_prompts(logits, library, pre_norm=norm), expected)
    sequence = torch.randn(2, 4, 8)
    library_prompts(logits, library, out=sequence, slot=1, pre_norm=norm)
    assert torch.equal(sequence[:, 1:3], expected)
    prompts = library_prompts(torch.randn(2, 3, 5), library, pre_norm=PreNorm(torch.ones(8), torch.zeros(8), 0.0))
    torch.testing.assert_close(prompts.mean(dim=-1), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(prompts.var(dim=-1, unbiased=False), torch.ones(2, 3), rtol=1e-5, atol=0)


def test_a_sequence_has_the_dtype_of_its_patches_or_slots() -> None:
    logits, library, norm = torch.randn(2, 3, 6), torch.randn(6, 4), norm_of(4, torch.float32)
    prompts = library_prompts(logits, library).bfloat16()
    found = library_prompts(logits, library, patches=torch.randn(2, 5, 4).bfloat16(), pre_norm=norm)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[:, 5:], torch.nn.functional.layer_norm(prompts.float(), (4,), *norm).bfloat16())
    sequence = torch.randn(2, 3, 4).bfloat16()
    assert torch.equal(library_prompts(logits, library, out=sequence), prompts)


def test_gradients_of_everything_that_is_assembled() -> None:
    leaves = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((2, 3, 5), (5, 4), (2, 2, 4), (1, 1, 4), (1, 3, 4), (4,), (4,))
    ]

    def call(
        logits: Tensor, library: Tensor, patches: Tensor, prefix: Tensor, position: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        return library_prompts(
            logits, library, patches=patches, prefix=prefix, position=position, pre_norm=PreNorm(weight, bias, 1e-3)
        )

    assert torch.autograd.gradcheck(call, leaves)
    sequence = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda a, b, c: library_prompts(a, b, out=c.clone(), slot=1, pre_norm=PreNorm(*leaves[5:], 1e-3)),
        (*leaves[:2], sequence),
    )


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gradients(activation: str) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    library = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: library_prompts(a, b, activation), (logits, library))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.zeros(2, 3, 6, dtype=torch.int64)},
            TypeError,
            "logits must be a floating-point tensor",
        ),
        ({"logits": [[0.0]]}, TypeError, "logits must be a floating-point tensor, got <class 'list'>"),
        ({"library": torch.zeros(6, 4, dtype=torch.uint8)}, TypeError, "library must be .* got torch.uint8"),
        ({"logits": torch.zeros(3, 6)}, ValueError, r"logits must have shape \(B, K, M\), got \(3, 6\)"),
        ({"library": torch.zeros(5, 4)}, ValueError, r"M = 6 as in logits, got \(5, 4\)"),
        ({"library": torch.zeros(6)}, ValueError, r"library must have shape \(M, D\)"),
        ({"out": torch.zeros(2, 5, 4).int()}, TypeError, "out must be a floating-point tensor, got torch.int32"),
        ({"out": torch.zeros(2, 5, 3)}, ValueError, r"out must have shape \(2, T, 4\), got \(2, 5, 3\)"),
        ({"out": torch.zeros(2, 5, 4), "slot": 3}, ValueError, "slot must leave room for 3 prompts in 5 rows, got 3"),
        ({"activation": "relu"}, ValueError, "activation must be one of .* got 'relu'"),
        ({"patches": [[0.0]]}, TypeError, "patches must be a floating-point tensor, got <class 'list'>"),
        ({"patches": torch.zeros(2, 9, 3)}, ValueError, r"patches must have shape \(2, N, 4\), got \(2, 9, 3\)"),
        ({"patches": torch.zeros(3, 9, 4)}, ValueError, r"patches must have shape \(2, N, 4\), got \(3, 9, 4\)"),
        ({"patches": torch.zeros(2, 9, 4), "out": torch.zeros(2, 5, 4)}, ValueError, "out must be None where patches"),
        ({"prefix": torch.zeros(1, 1, 4)}, ValueError, "prefix needs patches"),
        ({"position": torch.zeros(1, 9, 4)}, ValueError, "position needs patches"),
        (
            {"patches": torch.zeros(2, 9, 4), "prefix": torch.zeros(2, 1, 4)},
            ValueError,
            r"prefix must have shape \(1, R, 4\), got \(2, 1, 4\)",
        ),
        (
            {"patches": torch.zeros(2, 9, 4), "prefix": torch.zeros(1, 2, 4), "position": torch.zeros(1, 10, 4)},
            ValueError,
            r"position must have shape \(1, 9, 4\) or \(1, 11, 4\), got \(1, 10, 4\)",
        ),
        (
            {"pre_norm": PreNorm(torch.ones(3), torch.zeros(4), 1e-5)},
            ValueError,
            r"pre_norm must hold weight and bias of shape \(4,\), got \(3,\) and \(4,\)",
        ),
        ({"pre_norm": PreNorm(torch.ones(4).int(), torch.zeros(4), 1e-5)}, TypeError, "pre_norm.weight must be a fl"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        library_prompts(**{"logits": torch.zeros(2, 3, 6), "library": torch.zeros(6, 4), **change})
