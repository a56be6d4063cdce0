"""What the gates know of `prefix_attention`."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
from kernel_bytes import formula as formula
from spec import Case, Draw, Inputs
from torch import Tensor
from watch import Watch

from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.prefix_attention import prefix_attention, reference

MODULE = "fastprompt.kernels.prefix_attention.triton"
ALL = ("q", "k", "v", "prefix_k", "prefix_v")


def case(
    name: str,
    b: int,
    h: int,
    r: int,
    t: int,
    p: int,
    d: int,
    n: int = 1,
    windows: int = 0,
    packed: bool = False,
    grads: tuple[str, ...] | None = None,
    runs: int = 1,
    **options: object,
) -> Case:
    """A case of the given sizes.

    n: prefixes. windows: biases, 0: none. packed: q, k, v are (b, t, 3, h, d) or, with fewer queries than tokens, k and
    v are (b, t, 2, h, d); the prefix is views of (n, p, 2, h, d). runs: into how many the sum over the images of a
    prefix is cut, for the byte formulas.
    """

    def inputs(draw: Draw) -> Inputs:
        x: Inputs = {"q": draw(b, t, 3, h, d)} if packed and r == t else {"q": draw(b, r, h, d).transpose(1, 2)}
        if packed and r < t:
            x["k"] = draw(b, t, 2, h, d)
        elif not packed:
            x |= {"k": draw(b, h, t, d), "v": draw(h, d, b, t).permute(2, 0, 3, 1)}
        if p and packed:
            x["prefix"] = draw(n, p, 2, h, d)
        elif p:
            x |= {"prefix_k": draw(n, h, p, d), "prefix_v": draw(n, h, p, d)}
        return x | ({"bias": draw(windows, h, t, r).transpose(2, 3)} if windows else {})

    def arguments(x: Inputs) -> tuple[Tensor | None, ...]:
        prefix = x.get("prefix_k"), x.get("prefix_v")
        if "prefix" in x:
            prefix = x["prefix"].permute(2, 0, 3, 1, 4).unbind(0)
        return x["q"], x.get("k"), x.get("v"), *prefix, x.get("bias")

    def kernel(module: ModuleType, x: Inputs) -> tuple[Tensor]:
        return (module.prefix_attention(*arguments(x), d**-0.5),)

    def expected(x: Inputs) -> tuple[Tensor]:
        return (reference.prefix_attention(*arguments(x)),)

    def attention_alone(x: Inputs) -> dict[str, Callable[[], Tensor]]:
        *tokens, prefix_k, prefix_v, bias = (y if y is None else y.detach() for y in arguments(x))
        q, k, v = reference.unpacked(*tokens)
        k, v = reference.with_prefix(prefix_k, k), reference.with_prefix(prefix_v, v)
        return (
            {}
            if bias is not None
            else {
                "scaled_dot_product_attention on keys and values concatenated before": lambda: (
                    F.scaled_dot_product_attention(q, k, v)
                )
            }
        )

    if grads is None and packed:
        grads = (*(("q",) if r == t else ("q", "k")), *(("prefix",) if p else ()))
    elif grads is None:
        grads = ALL[: 5 if p else 3]
    sizes = {"B": b, "H": h, "R": r, "T": t, "P": p, "D": d, "n": n, "W": windows, "runs": runs}
    return Case(name, inputs, kernel, expected, grads, sizes, rivals=attention_alone, **options)  # type: ignore[arg-type]


CASES = [
    case("one prefix, strided values", 3, 1, 20, 37, 5, 32),
    case("a prefix per image", 2, 2, 18, 18, 21, 48, n=2),
    case("one query", 3, 2, 1, 35, 10, 64),
    case("one of each", 1, 16, 1, 1, 1, 32),
    case("empty batch", 0, 2, 3, 4, 2, 32),
    case("no prefix", 2, 1, 17, 33, 0, 80),
    case("packed", 2, 2, 19, 19, 3, 64, packed=True),
    case("packed, first block", 2, 2, 19, 19, 18, 32, packed=True, grads=("prefix",)),
    case("packed, one query", 2, 1, 1, 70, 3, 96, packed=True),
    case("queries and prefix", 2, 1, 17, 18, 5, 32, grads=("q", "prefix_k", "prefix_v")),
    case("packed, keys alone", 2, 2, 5, 35, 3, 32, packed=True, grads=("k",)),
    case("no queries", 2, 1, 0, 5, 3, 32, packed=True),
    case("ten images share a prefix", 10, 1, 2, 3, 2, 32),
    case("windows", 4, 1, 9, 9, 5, 32, n=2, windows=2),
    case("windows, packed, no prefix", 4, 1, 49, 49, 0, 32, windows=4, packed=True, dtypes=("float16",)),
    case("wide heads", 1, 1, 33, 40, 3, 128),
    case("wide heads, AMD", 1, 1, 20, 33, 17, 96, family="gfx942"),
]
TRAFFIC = [
    case("bytes, one prefix", 4, 2, 64, 64, 16, 64, runs=4, dtypes=("float16",)),
    case("bytes, one query", 4, 2, 1, 64, 16, 64, n=4, dtypes=("float16",)),
    case("bytes, windows", 8, 1, 49, 49, 10, 32, n=2, windows=4, runs=4, dtypes=("float32",)),
]
LOADED_ONCE = {"_prefix_attention_fwd": ("q",), "_prefix_attention_bwd_queries": ("q", "grad", "out", "lse")}
FEW_PROGRAMS: dict[str, dict[str, str]] = {}


def at_size(batch: int) -> list[Case]:
    """Blocks of ViT-B and of Swin-B at 224 px, heads of 128, and of 80 in a last block."""
    return [
        case("ViT-B", batch, 12, 197, 197, 10, 64, packed=True, compiled=("float32", "float16")),
        case("heads of 128", batch, 8, 197, 197, 50, 128, packed=True, compiled=("float32", "bfloat16")),
        case("one query", batch, 16, 1, 257, 50, 80, n=batch, packed=True, compiled=("float16", "bfloat16")),
        case("Swin", 16 * batch, 8, 49, 49, 50, 32, n=batch, windows=16, packed=True, compiled=("bfloat16",)),
    ]


def check_empty_prefix_is_attention(module: ModuleType) -> None:
    q, k, v = torch.randn(3, 2, 2, 19, 32).unbind(0)
    plain = module.prefix_attention(q, k, v, None, None, None, 0.2)
    assert torch.equal(module.prefix_attention(q, k, v, k[:1, :, :0], v[:1, :, :0], None, 0.2), plain)
    torch.testing.assert_close(plain, torch.softmax(0.2 * q @ k.transpose(2, 3), -1) @ v, rtol=1e-5, atol=1e-6)


def check_shared_prefix_is_the_expanded_one(module: ModuleType) -> None:
    q, k, v = torch.randn(3, 3, 1, 17, 32).unbind(0)
    shared = [x.requires_grad_() for x in torch.randn(2, 1, 1, 5, 32).unbind(0)]
    out = module.prefix_attention(q, k, v, *shared, None, 0.2)
    each = [x.detach().expand(3, -1, -1, -1).clone().requires_grad_() for x in shared]
    expanded = module.prefix_attention(q, k, v, *each, None, 0.2)
    assert torch.equal(out, expanded)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, shared, grad), torch.autograd.grad(expanded, each, grad), strict=True):
        torch.testing.assert_close(a, b.sum(dim=0, keepdim=True), rtol=1e-5, atol=1e-6)


def check_runs_of_unequal_length(module: ModuleType) -> None:
    q, k, v, grad = torch.randn(4, 5, 1, 3, 32).unbind(0)
    prefix = [x.requires_grad_() for x in torch.randn(2, 1, 1, 4, 32).unbind(0)]
    exact = torch.autograd.grad(reference.prefix_attention(q, k, v, *prefix, None, 0.2), prefix, grad)
    with mock.patch.object(module, "PROGRAMS", 2):  # runs of two images, two images, one image
        found = torch.autograd.grad(module.prefix_attention(q, k, v, *prefix, None, 0.2), prefix, grad)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def check_two_calls_give_the_same_bits(module: ModuleType) -> None:
    x = [y.requires_grad_() for y in torch.randn(5, 3, 1, 17, 32).unbind(0)]
    outs = [module.prefix_attention(*x[:3], x[3][:1], x[4][:1], None, 0.2) for _ in range(2)]
    assert torch.equal(*outs)
    for a, b in zip(*(torch.autograd.grad(out, x, torch.ones_like(out)) for out in outs), strict=True):
        assert torch.equal(a, b)


def check_the_heads_of_a_row_lie_side_by_side(module: ModuleType) -> None:
    q, k, v = torch.randn(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4).requires_grad_().unbind(0)
    out = module.prefix_attention(q, k, v, None, None, None, 0.2)
    assert out.transpose(1, 2).is_contiguous()
    for x in torch.autograd.grad(out, (q, k, v), torch.ones_like(out)):
        assert x.transpose(1, 2).flatten(2).data_ptr() == x.data_ptr()


def check_a_packed_gradient_is_written_once(module: ModuleType) -> None:
    """As many bytes are allocated as the backward returns, beside δ: no pass puts the gradients together."""
    qkv, kv, q = torch.randn(2, 5, 3, 2, 32), torch.randn(2, 5, 2, 2, 32), torch.randn(2, 3, 2, 32).transpose(1, 2)
    for leaves in ([qkv.requires_grad_()], [q.requires_grad_(), kv.requires_grad_()]):
        out = module.prefix_attention(*leaves, *[None] * (5 - len(leaves)), None, 0.2)
        with Watch() as watch:
            grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
        assert sorted(watch.allocated.values())[-len(leaves) :] == sorted(x.nbytes for x in grads)
        assert {x.data_ptr() for x in grads} <= set(watch.allocated)
        assert grads[-1].is_contiguous()


def check_tokens_without_gradient_cost_no_launch(module: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 1, 5, 32).unbind(0)
    out = module.prefix_attention(q.requires_grad_(), k, v, None, None, None, 0.2)
    with Watch() as watch:
        out.sum().backward()
    assert [launch.kernel for launch in watch.launches] == ["_prefix_attention_bwd_queries"]


def check_a_masked_block_of_tokens_is_not_seen(module: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 1, 65, 32).unbind(0)
    bias = torch.zeros(1, 1, 65, 65)
    bias[..., :64] = float("-inf")  # the first whole block of keys, whichever row of the table is taken
    out = module.prefix_attention(q, k, v, None, None, bias, 1.0)
    torch.testing.assert_close(out, v[:, :, 64:].expand_as(v))
    out = module.prefix_attention(q, k, v, q[:, :, :2], v[:, :, :2], bias - float("inf"), 1.0)
    torch.testing.assert_close(out, torch.softmax(q @ q[:, :, :2].transpose(2, 3), -1) @ v[:, :, :2])


def check_extreme_scores(module: ModuleType) -> None:
    q, k, v = torch.randn(3, 1, 1, 20, 32).unbind(0)
    k[:, :, 7] = 0
    q, k = torch.full_like(q, -100.0), k.abs() * 100
    k[:, :, 7] = 0  # scores of -10000 and less beside one of 0
    torch.testing.assert_close(module.prefix_attention(q, k, v, None, None, None, 1.0), v[:, :, 7:8].expand_as(v))


def check_offsets_beyond_int32(module: ModuleType) -> None:
    """Rows and images 2³⁰ numbers apart: the third of either lies past 2³¹ (the memory between is never touched)."""
    far = 2**30
    memory = torch.empty(4 * far, dtype=torch.float16)
    q, k, v = (memory.as_strided((2, 1, 3, 32), (96, 32, far, 1), start) for start in (0, 192, 384))
    near = [x.copy_(torch.randn(x.shape)).clone() for x in (q, k, v)]
    assert torch.equal(
        module.prefix_attention(q, k, v, None, None, None, 1.0), module.prefix_attention(*near, None, None, None, 1.0)
    )
    q, k, v = (memory.as_strided((3, 1, 2, 32), (far, 32, 32, 1), start) for start in (0, 192, 384))
    near = [x.copy_(torch.randn(x.shape)).clone() for x in (q, k, v)]
    assert torch.equal(
        module.prefix_attention(q, k, v, k, v, None, 1.0), module.prefix_attention(*near, *near[1:], None, 1.0)
    )


def check_mixed_dtypes_under_autocast(module: ModuleType) -> None:
    q, k, v, pk, pv = (x.requires_grad_() for x in torch.randn(5, 2, 1, 5, 32).unbind(0))
    with torch.autocast("cpu", torch.float16), use_backend("triton"):
        out = prefix_attention(q, k.half(), v, pk[:1], pv[:1].half())
    assert out.dtype == torch.float16
    grads = torch.autograd.grad(out, (q, k, pv), torch.ones_like(out))
    exact = reference.prefix_attention(q, k, v, pk[:1], pv[:1])
    torch.testing.assert_close(out.float(), exact, rtol=1e-2, atol=1e-2)
    for a, b in zip(grads, torch.autograd.grad(exact, (q, k, pv), torch.ones_like(exact)), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def check_the_first_block_costs_one_launch(module: ModuleType) -> None:
    q, k, v, pk, pv = torch.randn(5, 1, 1, 3, 32).unbind(0)
    out = module.prefix_attention(q, k, v, pk.requires_grad_(), pv, None, 0.2)
    with mock.patch.object(module, "_op_backward_tokens", side_effect=AssertionError("tokens need no gradient")):
        out.sum().backward()
    assert pk.grad is not None


def check_registration(module: ModuleType) -> None:
    q, k, v = torch.randn(2, 5, 3, 2, 32).permute(2, 0, 3, 1, 4).unbind(0)
    pk, pv, grad = torch.randn(1, 3, 2, 32).transpose(1, 2), torch.randn(1, 2, 3, 32), torch.randn(2, 2, 32, 5).mT
    ops = torch.ops.fastprompt
    for prefix, bias in (((pk, pv), None), ((None, None), torch.randn(1, 2, 5, 5).mT)):
        out, lse = ops.prefix_attention(q, k, v, *prefix, bias, 0.2)
        torch.library.opcheck(ops.prefix_attention.default, (q, k, v, *prefix, bias, 0.2))
        for packed, wanted in ((True, False), (False, True), (False, False)):
            torch.library.opcheck(
                ops.prefix_attention_backward_tokens.default,
                (grad, q, k, v, *prefix, bias, out, lse, 0.2, packed, wanted),
            )
    out, lse = ops.prefix_attention(q, k, v, pk, pv, None, 0.2)
    torch.library.opcheck(ops.prefix_attention_backward_prefix.default, (grad, q, pk, pv, out, lse, 0.2))


def check_compiles_in_one_graph(module: ModuleType) -> None:
    def step(qkv: Tensor, prefix: Tensor) -> Tensor:
        whole = prefix_attention(2 * qkv, None, None, *prefix.unbind(0))
        parts = prefix_attention(qkv[:, :2, 0].transpose(1, 2), 2 * qkv[:, :, 1:])
        return torch.cat([whole, parts], dim=2).transpose(1, 2).flatten(2)

    leaves = [torch.randn(2, 5, 3, 1, 32, requires_grad=True), torch.randn(2, 1, 1, 3, 32, requires_grad=True)]
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            out = call(*leaves)
        results.append([out, *torch.autograd.grad((out**2).sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["prefix_attention"].backend == "triton"


CHECKS = [
    check_empty_prefix_is_attention,
    check_shared_prefix_is_the_expanded_one,
    check_runs_of_unequal_length,
    check_two_calls_give_the_same_bits,
    check_the_heads_of_a_row_lie_side_by_side,
    check_a_packed_gradient_is_written_once,
    check_tokens_without_gradient_cost_no_launch,
    check_a_masked_block_of_tokens_is_not_seen,
    check_extreme_scores,
    check_offsets_beyond_int32,
    check_mixed_dtypes_under_autocast,
    check_the_first_block_costs_one_launch,
    check_registration,
    check_compiles_in_one_graph,
]
MUTATIONS = [
    ("lowest instead of highest", "tl.maximum(top, tl.max(s, axis=1))", "tl.minimum(top, tl.min(s, axis=1))"),
    ("output not rescaled", "v, acc * rescale[:, None], input", "v, acc, input"),
    ("sum not rescaled", "total * rescale + tl.sum(p, axis=1)", "total + tl.sum(p, axis=1)"),
    ("keys beyond the last are seen", "return tl.where(t[None, :] < S, s, float('-inf'))", "return s"),
    ("natural exponential", "p = tl.exp2(s - higher[:, None])", "p = tl.exp(s - higher[:, None])"),
    ("bias not in base 2", "s += LOG2E * tl.load(bias", "s += tl.load(bias"),
    ("scale dropped", "* (scale * LOG2E)", "* LOG2E"),
    ("-inf as the first maximum", "(BLOCK_R,), FINITE_MIN", '(BLOCK_R,), float("-inf")'),
    (
        "the prefix's keys twice",
        "value = _rows(prefix_v, start, P, stride_pvp, stride_pvd",
        "value = _rows(prefix_k, start, P, stride_pkp, stride_pkd",
    ),
    ("stride of k for v", "_rows(v, start, T, stride_vt, stride_vd", "_rows(v, start, T, stride_kt, stride_kd"),
    ("the image's own prefix", "prefix_k + b // group * stride_pkb", "prefix_k + b * stride_pkb"),
    ("the bias of the wrong window", "bias + b % windows * stride_bw", "bias + b // windows * stride_bw"),
    (
        "heads before rows in the output",
        "out + (b * R * H + h) * D, first, R, H * D, acc",
        "out + (b * H + h) * R * D, first, R, D, acc",
    ),
    (
        "output rows not masked",
        "mask=(row[:, None] < count) & (column[None, :] < D))\n\n@triton.jit\ndef _scores",
        "mask=column[None, :] < D)\n\n@triton.jit\ndef _scores",
    ),
    ("log-sum-exp without the sum", "top + tl.log2(total)", "top"),
    ("delta left out of dq", "input_precision='ieee') - delta[:, None])", "input_precision='ieee'))"),
    ("delta added in dk", "input_precision='ieee') - delta[None, :])", "input_precision='ieee') + delta[None, :])"),
    ("dq not scaled", "acc * scale, D, BLOCK_R", "acc, D, BLOCK_R"),
    ("dk of the tokens not scaled", "acc_k * scale, D, BLOCK_T", "acc_k, D, BLOCK_T"),
    ("dk of the prefix not scaled", "acc_k * scale, D, BLOCK_P", "acc_k, D, BLOCK_P"),
    ("packed rows written as if alone", "*rows.stride()[:2], **constants", "r * h * d, h * d, **constants"),
    ("packed keys written as if alone", "*tokens.stride()[:2], **constants", "t * h * d, h * d, **constants"),
    ("dk in place of dq", "(dq[:, :, 0], dq[:, :, 1:]) if packed", "(dq[:, :, 1], dq[:, :, 1:]) if packed"),
    ("dv in place of dk", "tokens[:, :, 0], tokens[:, :, 1], h", "tokens[:, :, 1], tokens[:, :, 0], h"),
    ("dq skips the prefix", "acc = _query_step(s, row_lse, row_delta, key, value, do, acc)", "acc += 0"),
    ("dv of the unnormalised weights", "p = tl.exp2(s - lse[None, :])", "p = tl.exp2(s)"),
    ("dv overwritten by every block of queries", "do, dv, input_precision", "do, input_precision"),
    ("an image short in each run", "tl.minimum(run, group - begin) *", "tl.minimum(run, group - begin - 1) *"),
    ("images beyond the group", "range(tl.minimum(run, group - begin) * steps)", "range(run * steps)"),
    ("a run forgotten", "(run < runs) & (i", "(run < runs - 1) & (i"),
    ("the last runs alone", "acc_v += tl.sum(tl.load(parts_v", "acc_v = tl.sum(tl.load(parts_v"),
    ("rows addressed in 32 bits", "start + tl.arange(0, BLOCK).to(tl.int64)", "start + tl.arange(0, BLOCK)"),
    ("images addressed in 32 bits", "(i // blocks // H).to(tl.int64)", "i // blocks // H"),
]
