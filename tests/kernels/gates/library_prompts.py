"""What the gates know of `library_prompts`."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from kernel_bytes import formula as formula
from parity import same
from spec import Case, Draw, Inputs
from torch import Tensor
from watch import Watch

from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.library_prompts import PreNorm, library_prompts, reference

MODULE = "fastprompt.kernels.library_prompts.triton"
EPS = 1e-5


def case(
    name: str,
    b: int,
    k: int,
    m: int,
    d: int,
    activation: str = "softmax",
    slot: int | None = None,
    permuted: bool = False,
    norm: bool = False,
    patches: int | None = None,
    prefix: int = 0,
    position: int = 0,
    **options: object,
) -> Case:
    """A case of the given sizes.

    slot: written into a sequence there. permuted: strides of all matrices swapped. norm: with a pre-norm.
    patches: into a fresh sequence behind so many, behind `prefix` rows; `position`: rows of the position embedding.
    """

    def inputs(draw: Draw) -> Inputs:
        def rows(n: int, count: int) -> Tensor:
            return draw(d, count, n).permute(2, 1, 0) if permuted else draw(n, count, d)

        found = {
            "logits": 2 * draw(m, k, b).permute(2, 1, 0) if permuted else 2 * draw(b, k, m),
            "library": draw(d, m).t() if permuted else draw(m, d),
        }
        found |= {"sequence": draw(b, slot + k + 3, d)} if slot is not None else {}
        found |= {"patches": rows(b, patches)} if patches is not None else {}
        found |= {"prefix": rows(1, prefix)} if prefix else {}
        found |= {"position": rows(1, position)} if position else {}
        return found | ({"weight": 1 + 0.2 * draw(d), "bias": draw(d)} if norm else {})

    def arguments(x: Inputs) -> dict[str, object]:
        pre_norm = PreNorm(x["weight"], x["bias"], EPS) if norm else None
        return {**{name: x.get(name) for name in ("patches", "prefix", "position")}, "pre_norm": pre_norm}

    def kernel(module: ModuleType, x: Inputs) -> tuple[Tensor]:
        out = {} if slot is None else {"out": x["sequence"].clone(), "slot": slot}
        return (module.library_prompts(x["logits"], x["library"], activation, **out, **arguments(x)),)

    def expected(x: Inputs) -> tuple[Tensor]:
        prompts = reference.library_prompts(x["logits"], x["library"], activation, **arguments(x))  # type: ignore[arg-type]
        if slot is None:
            return (prompts,)
        return (torch.cat([x["sequence"][:, :slot], prompts, x["sequence"][:, slot + k :]], dim=1),)

    grads = ("logits", "library") if slot is None else ("logits", "library", "sequence")
    sizes = {
        "B": b,
        "K": k,
        "M": m,
        "D": d,
        "softmax": int(activation == "softmax"),
        "norm": int(norm),
        "N": patches or 0,
        "F": prefix,
        "P": position,
    }
    return Case(name, inputs, kernel, expected, grads, sizes, **options)  # type: ignore[arg-type]


CASES = [
    case("odd sizes", 2, 5, 70, 33),
    case("sigmoid", 2, 5, 70, 33, "sigmoid"),
    case("sequence with pre-norm", 2, 3, 20, 33, patches=5, prefix=2, position=7, norm=True),
    case("slots with pre-norm", 2, 6, 20, 70, slot=2, norm=True),
    case("one prompt, one token", 1, 1, 1, 1),
    case("empty batch", 0, 3, 6, 8),
    case("permuted", 3, 4, 37, 20, permuted=True),
    case("permuted, sigmoid", 3, 4, 37, 20, "sigmoid", permuted=True),
    case("slots", 2, 3, 20, 24, slot=2),
    case("slots, sigmoid", 2, 3, 20, 24, "sigmoid", slot=0),
    case("sequence, permuted", 3, 4, 19, 20, "sigmoid", patches=9, prefix=1, position=9, permuted=True),
    case("sequence of patches", 2, 2, 5, 24, patches=3),
    case("sequence without prompts", 2, 0, 5, 24, patches=4, prefix=1, position=5, norm=True),
    case("sequence of an empty batch", 0, 2, 5, 24, patches=3, position=3, norm=True),
    case("pre-norm, forty prompts", 2, 40, 40, 40, norm=True),
    case("pre-norm of one channel", 2, 2, 5, 1, norm=True),
    case("seventy prompts", 1, 70, 40, 70),
    case("seventy prompts, gfx942", 1, 70, 70, 33, family="gfx942"),
    case("large library", 1, 2, 530, 70),
]
TRAFFIC = [
    case(f"bytes, {activation}", 4, 16, 64, 128, activation, dtypes=("float16",))
    for activation in ("softmax", "sigmoid")
]
TRAFFIC += [case("bytes, sequence", 4, 16, 64, 128, patches=33, prefix=2, position=35, norm=True, dtypes=("float16",))]
LOADED_ONCE = {"_library_prompts_fwd": ("patches",), "_library_prompts_bwd_norm": ("grad", "mixed")}
ROWS = "A norm takes whole rows, and a matrix instruction takes 16 of them, so there are {} blocks at most."
FEW_PROGRAMS = {
    "_library_prompts_fwd": {"64 prompts with pre-norm": ROWS.format(128), "PGN with pre-norm": ROWS.format(32)}
}


def at_size(batch: int) -> list[Case]:
    """PGN's sizes, alone and with the whole sequence of CLIP's ViT-B, and those of the tables' other rows."""
    return [
        case("PGN on CLIP", batch, 16, 256, 768, patches=196, prefix=1, position=197, norm=True),
        case("PGN", batch, 16, 256, 768),
        case("64 prompts", batch, 64, 1024, 768),
        case("256 prompts", batch, 256, 4096, 768),
        case("sigmoid", batch, 16, 256, 768, "sigmoid", compiled=("float16",)),
        case("PGN with pre-norm", batch, 16, 256, 768, norm=True, compiled=("float16",)),
        case("64 prompts with pre-norm", batch, 64, 1024, 768, norm=True, compiled=("float32", "bfloat16")),
        case(
            "256 prompts in a sequence",
            batch,
            256,
            4096,
            1024,
            patches=256,
            prefix=1,
            norm=True,
            compiled=("float32", "float16"),
        ),
    ]


def check_weights_sum_to_one(module: ModuleType) -> None:
    prompts = module.library_prompts(3 * torch.randn(2, 3, 90), torch.ones(90, 5), "softmax")
    torch.testing.assert_close(prompts, torch.ones(2, 3, 5), rtol=2e-6, atol=0)


def check_shift_of_the_logits_changes_nothing(module: ModuleType) -> None:
    logits, library = torch.randint(-8, 9, (2, 3, 70)).float(), torch.randn(70, 5)
    shifted = module.library_prompts(logits + 1024, library, "softmax")
    assert torch.equal(shifted, module.library_prompts(logits, library, "softmax"))


def check_certain_selection_returns_the_row(module: ModuleType) -> None:
    for dtype in (torch.float32, torch.float16):
        library, chosen = torch.randn(70, 9).to(dtype), torch.tensor([[3, 69], [0, 64]])
        certain = torch.nn.functional.one_hot(chosen, 70) == 1
        logits = torch.where(certain, 0.0, float("-inf")).to(dtype)
        assert torch.equal(module.library_prompts(logits, library, "softmax"), library[chosen])


def check_certain_selection_with_a_pre_norm_returns_the_normed_row(module: ModuleType) -> None:
    """Prompts that are library rows leave as the same rows do that stand among the patches, bit for bit."""
    library, chosen = torch.randn(70, 33), torch.tensor([[3, 69], [0, 64]])
    logits = torch.where(torch.nn.functional.one_hot(chosen, 70) == 1, 0.0, float("-inf"))
    norm = PreNorm(torch.randn(33), torch.randn(33), EPS)
    prompts = module.library_prompts(logits, library, "softmax", pre_norm=norm)
    torch.testing.assert_close(
        prompts, torch.nn.functional.layer_norm(library[chosen], (33,), *norm), rtol=1e-5, atol=1e-5
    )
    sequence = module.library_prompts(logits, library, "softmax", patches=library[chosen], pre_norm=norm)
    assert torch.equal(sequence[:, :2], sequence[:, 2:])
    assert torch.equal(sequence[:, 2:], prompts)


def check_patches_without_a_norm_are_copied_bit_for_bit(module: ModuleType) -> None:
    patches, prefix, position = torch.randn(3, 5, 33), torch.randn(1, 2, 33), torch.randn(1, 7, 33)
    logits, library = torch.randn(3, 4, 20), torch.randn(20, 33)
    sequence = module.library_prompts(logits, library, "softmax", patches=patches, prefix=prefix, position=position)
    embedded = torch.cat([prefix.expand(3, -1, -1), patches], dim=1) + position
    assert torch.equal(sequence, torch.cat([embedded, module.library_prompts(logits, library, "softmax")], dim=1))


def check_inference_keeps_nothing_for_a_backward(module: ModuleType) -> None:
    logits, library = torch.randn(2, 3, 20), torch.randn(20, 33, requires_grad=True)
    norm = PreNorm(torch.randn(33), torch.randn(33), EPS)
    trained = module.library_prompts(logits, library, "softmax", pre_norm=norm)
    with torch.no_grad(), Watch() as watch:
        assert torch.equal(module.library_prompts(logits, library, "softmax", pre_norm=norm), trained)
    assert sum(watch.allocated.values()) == 4 * 2 * 3 * (2 + 33)  # row statistics and prompts


def check_the_patches_are_constants(module: ModuleType) -> None:
    logits, library, patches = torch.randn(1, 2, 9), torch.randn(9, 4), torch.randn(1, 3, 4, requires_grad=True)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="no gradient of patches"):
            library_prompts(logits, library, patches=patches)
        with torch.no_grad():
            library_prompts(logits, library, patches=patches)


def check_order_of_the_library_changes_nothing(module: ModuleType) -> None:
    logits, library, order = torch.randn(2, 3, 70), torch.randn(70, 5), torch.randperm(70)
    prompts = module.library_prompts(logits, library, "softmax")
    mixed = module.library_prompts(logits[:, :, order], library[order], "softmax")
    torch.testing.assert_close(mixed, prompts, rtol=1e-5, atol=1e-6)


def check_extreme_logits(module: ModuleType) -> None:
    logits = torch.tensor([[[-torch.inf] * 70 + [1.0], [1e30] * 70 + [-1e30], [-torch.inf] * 71]])
    library = torch.randn(71, 4)
    prompts = module.library_prompts(logits, library, "softmax")
    assert torch.equal(prompts[0, 0], library[70])
    torch.testing.assert_close(prompts[0, 1], library[:70].mean(dim=0), rtol=1e-5, atol=1e-6)
    assert prompts[0, 2].isnan().all()


def check_far_rows_need_64_bit_offsets(module: ModuleType) -> None:
    stride, k, d = 2**29, 2, 16
    sequence = torch.empty(4 * stride + 8 * d, dtype=torch.float16).as_strided((5, 8, d), (stride, d, 1))
    logits, library = torch.randn(5, k, 6).half(), torch.randn(6, d).half()
    module.library_prompts(logits, library, "softmax", sequence, 3)
    assert torch.equal(sequence[:, 3 : 3 + k], module.library_prompts(logits, library, "softmax"))
    norm, patches = PreNorm(*torch.randn(2, d).half(), EPS), sequence[:, :2].copy_(torch.randn(5, 2, d))
    far = module.library_prompts(logits, library, "softmax", patches=patches, pre_norm=norm)
    assert torch.equal(far, module.library_prompts(logits, library, "softmax", patches=patches.clone(), pre_norm=norm))
    apart = sequence[:, 1:4].transpose(0, 1).copy_(torch.randn(3, 5, d))  # rows of an image lie 2²⁹ numbers apart
    far = module.library_prompts(logits[:3], library, "softmax", patches=apart, pre_norm=norm)
    near = module.library_prompts(logits[:3], library, "softmax", patches=apart.clone(), pre_norm=norm)
    assert torch.equal(far, near)


def check_mixed_dtypes_under_autocast(module: ModuleType) -> None:
    logits = torch.randn(2, 3, 20).bfloat16().requires_grad_()
    library = torch.randn(20, 6, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.library_prompts(logits, library, "softmax")
        found.square().sum().backward()
    grads = logits.grad, library.grad
    logits.grad = library.grad = None
    expected = reference.library_prompts(logits, library, "softmax")
    expected.square().sum().backward()
    same(found, expected, 1e-6)
    same(grads[0], logits.grad, 2**-7)
    same(grads[1], library.grad, 1e-5)


def check_a_sequence_in_sixteen_bits_of_a_library_in_float32(module: ModuleType) -> None:
    logits, library = torch.randn(2, 3, 20, requires_grad=True), torch.randn(20, 33, requires_grad=True)
    patches = torch.randn(2, 4, 33).half()
    # what is rounded to sixteen bits on the way back: the prompts, and with a norm their gradient
    for norm, exactly in ((None, 1e-6), (PreNorm(torch.randn(33), torch.randn(33).half(), EPS), 2**-8)):
        results = []
        for call in (module.library_prompts, reference.library_prompts):
            sequence = call(logits, library, "softmax", patches=patches, pre_norm=norm)
            results.append([sequence, *torch.autograd.grad(sequence[:, 4:].float().sum(), [logits, library])])
        for found, expected, tolerance in zip(*results, (2**-10, 2**-8, exactly), strict=True):
            same(found, expected, tolerance)


def check_frozen_inputs_cost_no_launch(module: ModuleType) -> None:
    logits, library = torch.randn(1, 2, 9, requires_grad=True), torch.randn(9, 4)
    module.library_prompts(logits, library, "softmax").sum().backward()
    assert logits.grad is not None
    assert library.grad is None


def check_registration(module: ModuleType) -> None:
    logits, library = torch.randn(4, 7, 3).permute(2, 0, 1), torch.randn(6, 7).t()
    sequence, patches, grad = torch.randn(3, 8, 6), torch.randn(6, 2, 3).permute(2, 1, 0), torch.randn(3, 4, 6)
    weight, position, ops = torch.randn(6), torch.randn(1, 2, 6), torch.ops.fastprompt
    for norm in ((True, None, None, 0.0, False), (False, weight, weight, EPS, True)):
        prompts, rows, _ = ops.library_prompts(logits, library, *norm)
        for op, arguments in (
            (ops.library_prompts, (logits, library, *norm)),
            (ops.library_prompts_into, (sequence, logits, library, 2, *norm)),
            (ops.library_prompts_assemble, (logits, library, patches, None, position, *norm)),
            (ops.library_prompts_assemble, (logits, library, patches, position[:, :1], None, *norm)),
            (ops.library_prompts_grad_logits, (grad, logits, library, prompts, rows, norm[0])),
            (ops.library_prompts_grad_library, (grad, logits, library, rows, norm[0])),
        ):
            torch.library.opcheck(op.default, arguments)
    torch.library.opcheck(ops.library_prompts_grad_norm.default, (grad, grad.clone(), weight, EPS))


def check_compiles_in_one_graph(module: ModuleType) -> None:
    def step(logits: Tensor, library: Tensor, sequence: Tensor) -> tuple[Tensor, ...]:
        fresh = library_prompts(2 * logits, library)
        whole = library_prompts(logits, library, patches=2 * sequence.detach(), position=position, pre_norm=norm)
        return fresh, whole, library_prompts(logits, library, "sigmoid", out=2 * sequence, slot=1, pre_norm=norm)

    leaves = [torch.randn(size, requires_grad=True) for size in ((2, 3, 9), (9, 4), (2, 5, 4))]
    norm, position = PreNorm(torch.randn(4), torch.randn(4), EPS), torch.randn(1, 5, 4)
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            outputs = call(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum((x**3).sum() for x in outputs), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["library_prompts"].backend == "triton"


CHECKS = [
    check_weights_sum_to_one,
    check_shift_of_the_logits_changes_nothing,
    check_certain_selection_returns_the_row,
    check_certain_selection_with_a_pre_norm_returns_the_normed_row,
    check_patches_without_a_norm_are_copied_bit_for_bit,
    check_inference_keeps_nothing_for_a_backward,
    check_the_patches_are_constants,
    check_order_of_the_library_changes_nothing,
    check_extreme_logits,
    check_far_rows_need_64_bit_offsets,
    check_mixed_dtypes_under_autocast,
    check_a_sequence_in_sixteen_bits_of_a_library_in_float32,
    check_frozen_inputs_cost_no_launch,
    check_registration,
    check_compiles_in_one_graph,
]
MUTATIONS = [
    ("lowest instead of highest", "tl.maximum(top, tl.max(a, axis=1))", "tl.minimum(top, tl.max(a, axis=1))"),
    ("no shift", "w = tl.exp(a - shift[:, None])", "w = tl.exp(a)"),
    ("rows of -inf unguarded", "tl.where(higher == float('-inf'), 0.0, higher)", "higher"),
    ("sum not rescaled", "total = total * rescale + tl.sum(w, axis=1)", "total = total + tl.sum(w, axis=1)"),
    ("accumulator not rescaled", "acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    ("maximum not carried", "            top = higher\n", ""),
    ("not divided by the sum", "acc = acc / total[:, None]", "acc = acc * 1.0"),
    ("library tokens beyond M", "(m[:, None] < M) & (d[None, :] < D), other=0.0)", "(d[None, :] < D), other=0.0)"),
    (
        "logits beyond M",
        "& (m[None, :] < M), other",
        "& (m[None, :] >= 0), other",
    ),
    (
        "logits beyond M count as 0",
        "other=float('-inf')).to(tl.float32)\n        tokens",
        "other=0.0).to(tl.float32)\n        tokens",
    ),
    (
        "stores beyond D",
        "acc.to(mixed.dtype.element_ty), mask=(r[:, None] < R) & (d[None, :] < D))",
        "acc.to(mixed.dtype.element_ty), mask=(r[:, None] < R))",
    ),
    (
        "swapped strides of the library",
        "tokens = tl.load(library + m[:, None] * stride_lm + d[None, :] * stride_ld",
        "tokens = tl.load(library + m[:, None] * stride_ld + d[None, :] * stride_lm",
    ),
    (
        "wrong stride of the prompts",
        "tl.store(mixed + b[:, None] * stride_mb + k[:, None] * stride_mk",
        "tl.store(mixed + b[:, None] * stride_mb + k[:, None] * stride_ak",
    ),
    (
        "32-bit offsets",
        "b, k = ((r // K).to(tl.int64), (r % K).to(tl.int64))\n        tile",
        "b, k = r // K, r % K\n        tile",
    ),
    (
        "sigmoid without minus",
        "            w = tl.sigmoid(a)\n        acc = tl.dot(w.to(tokens",
        "            w = tl.sigmoid(-a)\n        acc = tl.dot(w.to(tokens",
    ),
    (
        "one slot further",
        "sequence[:, slot:slot + logits.shape[1]], rows",
        "sequence[:, slot + 1:slot + 1 + logits.shape[1]], rows",
    ),
    ("norm of the first channels alone", "for _ in range(tiles if NORM else 1)", "for _ in range(1)"),
    (
        "statistics of the last tile's rows",
        "mask=(r < R) & (tile == 0))\n                tl.store(rows + 2 * r + 1",
        "mask=(r < R) & (tile == 1))\n                tl.store(rows + 2 * r + 1",
    ),
    ("mean not taken off", "x - mean[:, None], 0.0)", "x, 0.0)"),
    (
        "channels beyond D count",
        "centred = tl.where(d[None, :] < D, x - mean[:, None], 0.0)",
        "centred = x - mean[:, None]",
    ),
    ("epsilon forgotten", "/ D + eps)", "/ D)"),
    ("standard deviation of the sum", "tl.sum(centred * centred, axis=1) / D", "tl.sum(centred * centred, axis=1)"),
    ("norm without its weight", "x *= tl.load(weight + d", "x += 0.0 * tl.load(weight + d"),
    ("norm without its bias", "return x + tl.load(bias + d", "return x + 0.0 * tl.load(bias + d"),
    ("norm of the first prompts alone", "for start in range(0, BLOCK_R, ROWS):", "for start in range(0, ROWS, ROWS):"),
    ("patches from the front", "(t - F) * stride_xn", "t * stride_xn"),
    ("class token left out", "mask=known & (t < F)", "mask=known & (t < 0)"),
    ("class token added to a patch", "mask=known & (t < F)", "mask=known & (t < F + 1)"),
    ("position one row off", "(t - skip) * stride_on", "(t - skip + 1) % N * stride_on"),
    ("position of the prefix on the patches", "f + n - position.shape[1]", "0"),
    ("patches of the first image", "patches + ((i - programs) // blocks).to(tl.int64) * stride_xb", "patches"),
    ("patches addressed in 32 bits", "tl.arange(0, ROWS)).to(tl.int64)[:, None]", "tl.arange(0, ROWS))[:, None]"),
    (
        "images addressed in 32 bits",
        "patches + ((i - programs) // blocks).to(tl.int64)",
        "patches + ((i - programs) // blocks)",
    ),
    ("patches not normed", "y = _normed(y, weight, bias, columns, D, eps)", "y += 0.0"),
    (
        "prompts before the patches",
        "sequence[:, sequence.shape[1] - logits.shape[1]:]",
        "sequence[:, :logits.shape[1]]",
    ),
    ("backward: norm is the identity", "grad = _op_grad_norm(grad, prompts, weight, ctx.eps)", "grad = grad"),
    ("backward: mean of the gradient", "dx = g - tl.sum(g, axis=1)[:, None] / D - x", "dx = g - x"),
    ("backward: sign of the projection", "/ D - x * (tl.sum", "/ D + x * (tl.sum"),
    ("backward: not scaled", "(dx * scale[:, None])", "(dx)"),
    ("backward: norm's weight forgotten", "g *= tl.load(weight + d", "g += 0.0 * tl.load(weight + d"),
    (
        "backward: norm's gradient of the first image",
        "grad + b * stride_gb + k * stride_gk + d[None, :] * stride_gd,",
        "grad + k * stride_gk + d[None, :] * stride_gd,",
    ),
    ("backward: prompts after the norm", "written if weight is None else mixed", "written"),
    ("backward: sign of delta", "da = w * (dw - delta[:, None])", "da = w * (dw + delta[:, None])"),
    ("backward: no delta", "da = w * (dw - delta[:, None])", "da = w * dw"),
    ("backward: delta of the last columns", "delta += tl.sum(g", "delta = tl.sum(g"),
    ("backward: derivative of the sigmoid", "da = w * (1.0 - w) * dw", "da = w * dw"),
    (
        "backward: sum of the row forgotten",
        "w = tl.exp(a - highest[:, None]) / total[:, None]\n        da",
        "w = tl.exp(a - highest[:, None])\n        da",
    ),
    (
        "backward: library's weights not normalised",
        "w = tl.exp(a - highest[:, None]) / total[:, None]\n        else",
        "w = tl.exp(a - highest[:, None])\n        else",
    ),
    (
        "backward: rows beyond R",
        "mask=(r[:, None] < R) & (d[None, :] < D), other=0.0)\n        if SOFTMAX:\n            highest",
        "mask=d[None, :] < D, other=0.0)\n        if SOFTMAX:\n            highest",
    ),
    (
        "backward: only the last rows",
        "g.to(grad_library.dtype.element_ty), acc,",
        "g.to(grad_library.dtype.element_ty),",
    ),
    (
        "backward: library's gradient in the sequence's dtype",
        "tl.trans(w.to(grad_library.dtype.element_ty))",
        "tl.trans(w.to(g.dtype).to(grad_library.dtype.element_ty))",
    ),
    (
        "backward: stored transposed",
        "grad_library + m.to(tl.int64)[:, None] * D + d[None, :]",
        "grad_library + m.to(tl.int64)[:, None] + d[None, :] * M",
    ),
    ("backward: slots keep their gradient", "saved_tensors[0].shape[1]] = 0", "saved_tensors[0].shape[1]] *= 1"),
    (
        "backward: gradient of the first rows",
        "grad = grad[:, ctx.slot:ctx.slot + logits.shape[1]]",
        "grad = grad[:, :logits.shape[1]]",
    ),
    (
        "backward: prompts of the first rows",
        "prompts = prompts[:, ctx.slot:ctx.slot + logits.shape[1]]",
        "prompts = prompts[:, :logits.shape[1]]",
    ),
]
