"""What the gates know of `adaptive_prompts`."""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import torch
from kernel_bytes import formula as formula
from spec import Case, Draw, Inputs
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.adaptive_prompts import adaptive_prompts, reference
from fastprompt.kernels.dispatch import use_backend

MODULE = "fastprompt.kernels.adaptive_prompts.triton"
EPS = 1e-5


def case(
    name: str,
    b: int,
    n: int,
    p: int,
    d: int,
    hidden: int,
    activation: str = "relu",
    masks: bool = True,
    given: bool = False,
    scale: float | None = None,
    permuted: bool = False,
    trained: tuple[str, ...] = (),
    shares: int = 1,
    **options: object,
) -> Case:
    """A case of the given sizes; the tokens are a slice of a sequence.

    hidden: of the bottleneck, 0: none. given: row statistics are an input. scale: None: a learned one.
    permuted: other strides of every matrix. trained: inputs with gradients, default all.
    shares: of the prompts in the sums of the weights' gradients, for the byte formulas.
    """

    def inputs(draw: Draw) -> Inputs:
        def matrix(*shape: int) -> Tensor:
            return draw(*shape[::-1]).permute(*reversed(range(len(shape)))) if permuted else draw(*shape)

        x: Inputs = {
            "sequence": matrix(b, n + 3, d),
            "norm_weight": draw(2 * d)[::2] if permuted else draw(d),
            "norm_bias": draw(2 * d)[::2] if permuted else draw(d),
            "mix": matrix(p, n),
            "bias": draw(p),
        }
        if hidden:
            x |= {"w1": matrix(hidden, d) * d**-0.5, "w2": matrix(d, hidden)}
            x |= {"scale": draw(1)[0]} if scale is None else {}
            x |= {"hidden_mask": matrix(b, p, hidden).relu()} if masks else {}
        return x | ({"channel_mask": matrix(b, d).relu()} if masks else {})

    def arguments(x: Inputs) -> tuple[object, ...]:
        factor = x.get("scale", 1.0 if scale is None else scale)
        parameters = (x["norm_weight"], x["norm_bias"], x["mix"], x["bias"], x.get("w1"), x.get("w2"), factor)
        return x["sequence"][:, 2 : 2 + n], *parameters, activation, EPS, x.get("channel_mask"), x.get("hidden_mask")

    def statistics(x: Inputs) -> Tensor | None:
        if given and "stats" not in x:  # once per set of inputs, of the numbers as they were rounded
            tokens = x["sequence"].detach()[:, 2 : 2 + n].double()
            x["stats"] = torch.stack([tokens.mean(dim=-1), tokens.var(dim=-1, unbiased=False)], dim=-1).float()
        return x.get("stats")

    def kernel(module: ModuleType, x: Inputs) -> tuple[Tensor]:
        return (module.adaptive_prompts(*arguments(x), statistics(x)),)

    def expected(x: Inputs) -> tuple[Tensor]:
        return (reference.adaptive_prompts(*arguments(x)),)  # type: ignore[arg-type]

    names = (
        ("sequence", "norm_weight", "norm_bias", "mix", "bias")
        + (("w1", "w2") if hidden else ())
        + (("scale",) if hidden and scale is None else ())
    )
    sizes = {
        "B": b,
        "N": n,
        "P": p,
        "D": d,
        "H": hidden,
        "given": int(given),
        "channels": int(masks),
        "hidden": int(masks and hidden > 0),
        "wanted": int(not trained),
        "shares": shares,
    }
    return Case(name, inputs, kernel, expected, trained or names, sizes, **options)  # type: ignore[arg-type]


CASES = [
    case("odd sizes", 2, 9, 3, 33, 5),
    case("statistics given", 2, 37, 20, 70, 8, "gelu", given=True, scale=0.5),
    case("permuted", 2, 19, 17, 40, 20, "silu", permuted=True),
    case("permuted, statistics given", 1, 10, 2, 80, 3, "tanh", permuted=True, given=True),
    case("one of each", 1, 1, 1, 1, 1, "sigmoid"),
    case("no masks, fixed scale", 2, 7, 5, 33, 4, "tanh", masks=False, scale=0.5),
    case("no bottleneck", 2, 7, 5, 33, 0),
    case("tokens without gradient", 2, 7, 5, 33, 4, trained=("norm_weight", "norm_bias", "mix", "bias", "w1", "w2")),
    case("rows in two shares", 3, 2, 30, 20, 4, masks=False),
    case("empty batch", 0, 7, 5, 33, 4),
]
TRAFFIC = [
    case("bytes", 4, 32, 10, 64, 8, scale=1.0, dtypes=("float16",)),
    case(
        "bytes, statistics given", 4, 32, 48, 64, 16, masks=False, given=True, scale=1.0, shares=3, dtypes=("float16",)
    ),
]
LOADED_ONCE = {"_adaptive_prompts_mix": ("tokens",)}
FEW_PROGRAMS = {
    "_adaptive_prompts_mix": {
        "VAPT": "The statistics of a token need its whole row, which is read once: a program has an image's tokens. "
        "Parts of them would each add P rows of float32, for 132 programs as many bytes as the tokens."
    }
}


def at_size(batch: int) -> list[Case]:
    """VAPT in ViT-B at 224 px: the paper's widths, and what is wider."""
    return [
        case("VAPT", batch, 196, 10, 768, 8, shares={1: 1, 32: 5, 128: 4}[batch]),
        case(
            "VAPT, statistics given",
            batch,
            196,
            50,
            768,
            64,
            masks=False,
            given=True,
            scale=1.0,
            shares={1: 2, 32: 4, 128: 4}[batch],
        ),
    ]


def arguments_of(*sizes: int, **options: object) -> list[object]:
    b, n, p, d, hidden = sizes
    shapes = [(b, n, d), (d,), (d,), (p, n), (p,), (hidden, d), (d, hidden)]
    return [torch.randn(shape) for shape in shapes] + [1.0, "relu", EPS]


def check_channel_mask_comes_before_the_bias(module: ModuleType) -> None:
    x = arguments_of(2, 9, 3, 33, 4)
    prompts = module.adaptive_prompts(*x[:5], None, None, *x[7:], torch.zeros(2, 33), None)
    assert torch.equal(prompts, x[4][:, None].expand(2, 3, 33))  # type: ignore[index]


def check_large_mean_is_not_cancelled(module: ModuleType) -> None:
    x = arguments_of(1, 5, 2, 40, 4)
    x[0] = x[0] + 1000  # type: ignore[operator]
    found = module.adaptive_prompts(*x, None, None)
    exact = reference.adaptive_prompts(*[y.double() if isinstance(y, Tensor) else y for y in x], None, None)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), exact, rtol=2e-3, atol=2e-3)


def check_two_calls_give_the_same_bits(module: ModuleType) -> None:
    x = arguments_of(2, 9, 3, 33, 4)
    leaves = [y.requires_grad_() for y in x if isinstance(y, Tensor)]
    outs = [module.adaptive_prompts(*x, None, None) for _ in range(2)]
    assert torch.equal(*outs)
    for a, b in zip(*(torch.autograd.grad(out, leaves, torch.ones_like(out)) for out in outs), strict=True):
        assert torch.equal(a, b)


def check_shares_of_unequal_size(module: ModuleType) -> None:
    x = arguments_of(2, 3, 65, 16, 17)
    leaves = [y.requires_grad_() for y in x if isinstance(y, Tensor)]
    with mock.patch.object(module, "PROGRAMS", 2):  # five blocks of rows are shares of two, two and one
        found = torch.autograd.grad(module.adaptive_prompts(*x, None, None).square().sum(), leaves)
    exact = torch.autograd.grad(reference.adaptive_prompts(*x, None, None).square().sum(), leaves)  # type: ignore[arg-type]
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def check_prompts_of_half_precision_tokens_have_the_dtype_of_mix(module: ModuleType) -> None:
    x = arguments_of(1, 9, 3, 33, 4)
    exact = module.adaptive_prompts(*x, None, None)
    x[0] = x[0].half()  # type: ignore[attr-defined]
    found = module.adaptive_prompts(*x, None, None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, rtol=2e-2, atol=2e-2)


def check_offsets_beyond_int32(module: ModuleType) -> None:
    """Tokens, then images, 2³⁰ numbers apart: the third lies past 2³¹ (the memory between is never touched)."""
    far, memory = 2**30, torch.empty(3 * 2**30, dtype=torch.float16)
    for shape, stride in (((1, 3, 40), (40, far, 1)), ((3, 2, 40), (far, 40, 1))):
        x = [y.half() if isinstance(y, Tensor) else y for y in arguments_of(shape[0], shape[1], 2, 40, 4)]
        tokens = memory.as_strided(shape, stride).copy_(x[0])  # type: ignore[arg-type]
        outs = []
        for leaf in (x[0], tokens):
            leaf = leaf.detach().requires_grad_()  # type: ignore[union-attr]
            out = module.adaptive_prompts(leaf, *x[1:], None, None)
            outs.append((out, *torch.autograd.grad(out, leaf, torch.ones_like(out))))
        assert torch.equal(outs[0][0], outs[1][0])
        assert torch.equal(outs[0][1], outs[1][1])


def check_registration(module: ModuleType) -> None:
    x = arguments_of(2, 5, 3, 20, 4)
    x[0] = torch.randn(20, 2, 7).permute(1, 2, 0)[:, 1:6]
    masks, grad, ops = (torch.rand(2, 20), None), torch.randn(3, 2, 20).transpose(0, 1), torch.ops.fastprompt
    for inputs in ([*x[:7], torch.tensor(0.5), *x[7:], *masks], [*x[:5], None, None, None, *x[7:], None, None]):
        _, mixed, sums, stats = ops.adaptive_prompts(*inputs, None)
        torch.library.opcheck(ops.adaptive_prompts.default, (*inputs, None))
        torch.library.opcheck(ops.adaptive_prompts.default, (*inputs, stats))
        for wanted in (True, False):
            torch.library.opcheck(ops.adaptive_prompts_backward.default, (grad, *inputs, stats, mixed, sums, wanted))


def check_compiles_in_one_graph(module: ModuleType) -> None:
    x = arguments_of(2, 9, 3, 33, 4)
    leaves = [y.requires_grad_() for y in x if isinstance(y, Tensor)]

    def step(tokens: Tensor, *weights: Tensor) -> Tensor:
        return adaptive_prompts(2 * tokens, *weights, activation="gelu")

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            out = call(*leaves)
        results.append([out, *torch.autograd.grad((out**2).sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["adaptive_prompts"].backend == "triton"


def check_mixed_dtypes_under_autocast(module: ModuleType) -> None:
    x = arguments_of(2, 9, 3, 33, 4)
    leaves = [y.requires_grad_() for y in x if isinstance(y, Tensor)]
    exact = torch.autograd.grad(adaptive_prompts(*leaves).sum(), leaves)
    with torch.autocast("cpu", torch.float16), use_backend("triton"):
        out = adaptive_prompts(leaves[0].half(), *leaves[1:])
    for a, b in zip(torch.autograd.grad(out.sum(), leaves), exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()


CHECKS = [
    check_channel_mask_comes_before_the_bias,
    check_large_mean_is_not_cancelled,
    check_two_calls_give_the_same_bits,
    check_shares_of_unequal_size,
    check_prompts_of_half_precision_tokens_have_the_dtype_of_mix,
    check_offsets_beyond_int32,
    check_registration,
    check_compiles_in_one_graph,
    check_mixed_dtypes_under_autocast,
]
MUTATIONS = [
    ("mean of the padded row", "tl.sum(x.to(tl.float32), axis=1) / D", "tl.sum(x.to(tl.float32), axis=1) / BLOCK_D"),
    (
        "padding counted in the variance",
        "tl.where(d[None, :] < D, x.to(tl.float32) - mean[:, None], 0.0)",
        "x.to(tl.float32) - mean[:, None]",
    ),
    ("one row sum per block", "total += tl.sum(m.to(tl.float32), axis=1)", "total = tl.sum(m.to(tl.float32), axis=1)"),
    ("eps forgotten", "tl.rsqrt(variance + eps)", "tl.rsqrt(variance)"),
    ("mean and variance swapped", "variance = tl.load(row + stride_ss, mask", "variance = tl.load(row, mask"),
    (
        "strides of mix swapped",
        "_tile(mix, p, n, P, N, stride_mp, stride_mn)\n        row",
        "_tile(mix, p, n, P, N, stride_mn, stride_mp)\n        row",
    ),
    ("tokens of the first image", "_tile(tokens + b * stride_xb, n, d", "_tile(tokens, n, d"),
    ("channel mask of the wrong image", "channel_mask + (r // P)[:, None]", "channel_mask + (r % P)[:, None]"),
    ("norm bias not weighted", "x += tl.load(sums + p)[:, None] * _row(norm_bias", "x += _row(norm_bias"),
    (
        "channel mask of the bias too",
        "return x + tl.load(bias + p * stride_p).to(tl.float32)[:, None]",
        "return _channels(x + tl.load(bias + p * stride_p).to(tl.float32)[:, None], channel_mask, r, d, R, P, D,\n"
        "                     stride_cb, stride_cd, HAS_CHANNELS)",
    ),
    ("gelu is silu", "below = 0.5 + 0.5 * tl.erf(a * 0.7071067811865476)", "below = tl.sigmoid(a)"),
    ("slope of relu", "tl.where(a > 0.0, 1.0, 0.0)", "tl.where(a > 0.0, 1.0, 0.1)"),
    ("slope of tanh", "4.0 * e / ((1.0 + e) * (1.0 + e))", "4.0 * e / (1.0 + e)"),
    ("no residual", "u += factor * tl.dot(", "u = factor * tl.dot("),
    (
        "learned scale ignored",
        "            factor = tl.load(scale).to(tl.float32)\n    first",
        "            factor = factor\n    first",
    ),
    (
        "hidden mask of the wrong prompt",
        "hidden_mask + (r // P).to(tl.int64)[:, None] * stride_hb + (r % P)",
        "hidden_mask + (r // P).to(tl.int64)[:, None] * stride_hb + (r // P)",
    ),
    ("gradient past the hidden mask", "da = factor * t * mask * slope", "da = factor * t * slope"),
    ("gradient without the scale", "da = factor * t * mask * slope", "da = t * mask * slope"),
    ("dbias of the last channels only", "dbias += tl.sum(g.to", "dbias = tl.sum(g.to"),
    (
        "dbias past the bottleneck",
        "dbias += tl.sum(da.to(dtype).to(tl.float32) * total[None, :], axis=1)",
        "dbias += 0.0",
    ),
    ("the first share alone", "first = tl.program_id(1) * share", "first = 0"),
    ("dv past the channel mask", "du = _channels(du, channel_mask", "_channels(du, channel_mask"),
    ("mean of the gradient dropped", "(dx - mean_g[:, None] - normed", "(dx - normed"),
    ("sign of the variance's gradient", "- normed * mean_gx[:, None]) * rstd", "+ normed * mean_gx[:, None]) * rstd"),
    ("dM without the norm's bias", "q + sum_b[:, None],", "q,"),
    ("the last block of prompts alone", "mean_gx += tl.sum(m * q, axis=0) / D", "mean_gx = tl.sum(m * q, axis=0) / D"),
    ("dM of the last channels", "tl.trans(normed.to(dtype)), q, input", "tl.trans(normed.to(dtype)), input"),
    ("dW2 without the scale", "acc_2 * factor, mask", "acc_2, mask"),
    ("dW1 of the last rows", "u.to(dtype), acc_1, input_precision", "u.to(dtype), input_precision"),
    ("dscale of a wrong pair", "hidden * t, 0.0), axis=1)", "hidden * a, 0.0), axis=1)"),
    ("a share forgotten", "share[:, None] < count) &", "share[:, None] < count - 1) &"),
    ("the rows of the first share", "first = tl.program_id(1) * share\n    acc_w", "first = 0\n    acc_w"),
    ("norm's bias in place of its weight", "tl.store(dbias + i - D, acc", "tl.store(dweight + i - D, acc"),
    ("dW1 from the front", "first, second = (i - 2 * D,", "first, second = (i - D,"),
    ("token rows in 32 bits", "base + row[:, None].to(tl.int64) * stride_r", "base + row[:, None] * stride_r"),
    ("images in 32 bits", "(i // blocks_d // blocks_p).to(tl.int64)", "i // blocks_d // blocks_p"),
]
