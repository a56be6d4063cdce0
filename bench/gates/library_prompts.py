"""What the gates know of `library_prompts`."""

from __future__ import annotations

from types import ModuleType

import torch
from interpret import same
from kernel_bytes import formula as formula
from spec import Case, Draw, Inputs
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.library_prompts import library_prompts, reference

MODULE = "fastprompt.kernels.library_prompts.triton"


def case(name: str, b: int, k: int, m: int, d: int, activation: str = "softmax", slot: int | None = None,
         permuted: bool = False, **options: object) -> Case:
    """A case of the given sizes; `slot`: written into a sequence there; `permuted`: strides of both inputs swapped."""
    def inputs(draw: Draw) -> Inputs:
        found = {"logits": 2 * draw(m, k, b).permute(2, 1, 0) if permuted else 2 * draw(b, k, m),
                 "library": draw(d, m).t() if permuted else draw(m, d)}
        if slot is not None:
            found["sequence"] = draw(b, slot + k + 3, d)
        return found

    def kernel(module: ModuleType, x: Inputs) -> tuple[Tensor]:
        if slot is None:
            return (module.library_prompts(x["logits"], x["library"], activation),)
        return (module.library_prompts(x["logits"], x["library"], activation, x["sequence"].clone(), slot),)

    def expected(x: Inputs) -> tuple[Tensor]:
        prompts = reference.library_prompts(x["logits"], x["library"], activation)
        if slot is None:
            return (prompts,)
        return (torch.cat([x["sequence"][:, :slot], prompts, x["sequence"][:, slot + k:]], dim=1),)

    grads = ("logits", "library") if slot is None else ("logits", "library", "sequence")
    sizes = {"B": b, "K": k, "M": m, "D": d, "softmax": int(activation == "softmax")}
    return Case(name, inputs, kernel, expected, grads, sizes, **options)  # type: ignore[arg-type]


CASES = [
    case("odd sizes", 2, 5, 70, 33),
    case("sigmoid", 2, 5, 70, 33, "sigmoid"),
    case("one prompt, one token", 1, 1, 1, 1),
    case("empty batch", 0, 3, 6, 8),
    case("permuted", 3, 4, 37, 20, permuted=True),
    case("permuted, sigmoid", 3, 4, 37, 20, "sigmoid", permuted=True),
    case("slots", 2, 3, 20, 24, slot=2),
    case("slots, sigmoid", 2, 3, 20, 24, "sigmoid", slot=0),
    case("forty prompts", 2, 40, 40, 40),
    case("seventy prompts", 1, 70, 40, 70),
    case("seventy prompts, gfx942", 1, 70, 70, 33, family="gfx942"),
    case("large library", 1, 2, 530, 70),
]
TRAFFIC = [case(f"bytes, {activation}", 4, 16, 64, 128, activation, dtypes=("float16",))
           for activation in ("softmax", "sigmoid")]
LOADED_ONCE: dict[str, tuple[str, ...]] = {}
FEW_PROGRAMS: dict[str, tuple[str, ...]] = {}


def at_size(batch: int) -> list[Case]:
    """PGN's sizes on a ViT-B, and those that the other rows of the tables are for."""
    return [case("PGN", batch, 16, 256, 768), case("64 prompts", batch, 64, 1024, 768),
            case("256 prompts", batch, 256, 4096, 768),
            case("sigmoid", batch, 16, 256, 768, "sigmoid", compiled=("float16",))]


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
    assert torch.equal(sequence[:, 3:3 + k], module.library_prompts(logits, library, "softmax"))


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


def check_frozen_inputs_cost_no_launch(module: ModuleType) -> None:
    logits, library = torch.randn(1, 2, 9, requires_grad=True), torch.randn(9, 4)
    module.library_prompts(logits, library, "softmax").sum().backward()
    assert logits.grad is not None
    assert library.grad is None


def check_registration(module: ModuleType) -> None:
    logits, library = torch.randn(4, 7, 3).permute(2, 0, 1), torch.randn(6, 7).t()
    sequence = torch.randn(3, 8, 6)
    for softmax in (True, False):
        prompts, rows = torch.ops.fastprompt.library_prompts(logits, library, softmax)
        ops = torch.ops.fastprompt
        for op, arguments in (
            (ops.library_prompts, (logits, library, softmax)),
            (ops.library_prompts_into, (sequence, logits, library, 2, softmax)),
            (ops.library_prompts_grad_logits, (torch.randn(3, 4, 6), logits, library, prompts, rows, softmax)),
            (ops.library_prompts_grad_library, (torch.randn(3, 4, 6), logits, library, rows, softmax)),
        ):
            torch.library.opcheck(op.default, arguments)


def check_compiles_in_one_graph(module: ModuleType) -> None:
    def step(logits: Tensor, library: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
        fresh = library_prompts(2 * logits, library)
        return fresh, library_prompts(logits, library, "sigmoid", out=2 * sequence, slot=1)

    leaves = [torch.randn(size, requires_grad=True) for size in ((2, 3, 9), (9, 4), (2, 5, 4))]
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            fresh, sequence = call(*leaves)
        results.append([fresh, sequence, *torch.autograd.grad((fresh**2).sum() + (sequence**3).sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["library_prompts"].backend == "triton"


CHECKS = [check_weights_sum_to_one, check_shift_of_the_logits_changes_nothing, check_certain_selection_returns_the_row,
          check_order_of_the_library_changes_nothing, check_extreme_logits, check_far_rows_need_64_bit_offsets,
          check_mixed_dtypes_under_autocast, check_frozen_inputs_cost_no_launch, check_registration,
          check_compiles_in_one_graph]
MUTATIONS = [
    ("lowest instead of highest", "tl.maximum(top, tl.max(a, axis=1))", "tl.minimum(top, tl.max(a, axis=1))"),
    ("no shift", "w = tl.exp(a - shift[:, None])", "w = tl.exp(a)"),
    ("rows of -inf unguarded", 'tl.where(higher == float("-inf"), 0.0, higher)', "higher"),
    ("sum not rescaled", "total = total * rescale + tl.sum(w, axis=1)", "total = total + tl.sum(w, axis=1)"),
    ("accumulator not rescaled", "acc = acc * rescale[:, None]", "acc = acc * 1.0"),
    ("maximum not carried", "            top = higher\n", ""),
    ("not divided by the sum", "acc = acc / total[:, None]", "acc = acc * 1.0"),
    ("library tokens beyond M", "(m[:, None] < M) & (d[None, :] < D), other=0.0)", "(d[None, :] < D), other=0.0)"),
    ("logits beyond M",
     "(m[None, :] < M),\n                    other", "(m[None, :] >= 0),\n                    other"),
    ("logits beyond M count as 0", """other=float("-inf")).to(tl.float32)  # (R, M)
        tokens""", """other=0.0).to(tl.float32)  # (R, M)
        tokens"""),
    ("stores beyond D", "mask=(r[:, None] < R) & (d[None, :] < D))\n\n\n@", "mask=(r[:, None] < R))\n\n\n@"),
    ("swapped strides of the library", "tokens = tl.load(library + m[:, None] * stride_lm + d[None, :] * stride_ld",
     "tokens = tl.load(library + m[:, None] * stride_ld + d[None, :] * stride_lm"),
    ("wrong stride of the prompts",
     "tl.store(prompts + b[:, None] * stride_pb + k[:, None] * stride_pk",
     "tl.store(prompts + b[:, None] * stride_pb + k[:, None] * stride_ak"),
    ("32-bit offsets", "(r // K).to(tl.int64)", "(r // K)"),
    ("sigmoid without minus", "            w = tl.sigmoid(a)\n        acc = tl.dot(w.to(tokens",
     "            w = tl.sigmoid(-a)\n        acc = tl.dot(w.to(tokens"),
    ("one slot further", "library, sequence[:, slot:slot + logits", "library, sequence[:, slot + 1:slot + 1 + logits"),
    ("backward: sign of delta", "da = w * (dw - delta[:, None])", "da = w * (dw + delta[:, None])"),
    ("backward: no delta", "da = w * (dw - delta[:, None])", "da = w * dw"),
    ("backward: delta of the last columns", "delta += tl.sum(g", "delta = tl.sum(g"),
    ("backward: derivative of the sigmoid", "da = w * (1.0 - w) * dw", "da = w * dw"),
    ("backward: sum of the row forgotten", "w = tl.exp(a - highest[:, None]) / total[:, None]\n        da",
     "w = tl.exp(a - highest[:, None])\n        da"),
    ("backward: library's weights not normalised", "w = tl.exp(a - highest[:, None]) / total[:, None]\n        else",
     "w = tl.exp(a - highest[:, None])\n        else"),
    ("backward: rows beyond R", """mask=(r[:, None] < R) & (d[None, :] < D), other=0.0)  # (R, D)
        if SOFTMAX:
            highest""", """mask=(d[None, :] < D), other=0.0)  # (R, D)
        if SOFTMAX:
            highest"""),
    ("backward: only the last rows", "acc = tl.dot(tl.trans(w.to(g.dtype)), g, acc,",
     "acc = tl.dot(tl.trans(w.to(g.dtype)), g,"),
    ("backward: stored transposed", "grad_library + m.to(tl.int64)[:, None] * D + d[None, :]",
     "grad_library + m.to(tl.int64)[:, None] + d[None, :] * M"),
    ("backward: slots keep their gradient", "            before[:, ctx.slot:ctx.slot + k] = 0\n", ""),
    ("backward: gradient of the first rows", "(ctx, grad[:, ctx.slot:ctx.slot + k])", "(ctx, grad[:, :k])"),
    ("backward: prompts of the first rows", "prompts = prompts[:, ctx.slot:ctx.slot + logits.shape[1]]",
     "prompts = prompts[:, :logits.shape[1]]"),
]
