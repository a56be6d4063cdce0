"""What the gates know of `add_norm`."""

from __future__ import annotations

from types import ModuleType

import torch
from kernel_bytes import formula as formula
from parity import same
from spec import Case, Draw, Inputs
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.add_norm import add_norm, reference
from fastprompt.kernels.dispatch import use_backend

MODULE = "fastprompt.kernels.add_norm.triton"
EPS = 1e-5


def case(
    name: str, images: int, rows: int, width: int, strided: bool = False, flat: bool = False, **options: object
) -> Case:
    """A case of the given sizes. strided: rows of longer sequences. flat: the rows of one image, as a matrix."""

    def inputs(draw: Draw) -> Inputs:
        def tokens() -> Tensor:
            if flat:
                return draw(images * rows, width)
            return draw(images, rows + 3, width)[:, 2:-1] if strided else draw(images, rows, width)

        return {"x": 3 * tokens() + 1, "branch": tokens()}

    return Case(
        name,
        inputs,
        lambda module, x: module.add_norm(x["x"], x["branch"], EPS),
        lambda x: reference.add_norm(x["x"], x["branch"], EPS),
        ("x", "branch"),
        {"N": images * rows, "D": width},
        **options,
    )  # type: ignore[arg-type]


CASES = [
    case("odd sizes", 3, 5, 20),
    case("one of everything", 1, 1, 1),
    case("rows of longer sequences", 2, 3, 33, strided=True),
    case("a matrix", 2, 3, 48, flat=True),
    case("wide", 2, 3, 600),
    case("wider than a ViT-L", 1, 3, 1100),
    case("wider than a ViT-L, gfx942", 1, 3, 1100, family="gfx942"),
]
TRAFFIC = [case("bytes", 4, 100, 128, dtypes=("float16",))]
LOADED_ONCE = {"_add_norm_fwd": ("x", "branch"), "_add_norm_bwd": ("grad_added", "grad_normed", "added")}
FEW_PROGRAMS: dict[str, dict[str, str]] = {}


def at_size(batch: int) -> list[Case]:
    """The rows of a ViT-S, a ViT-B and a ViT-g."""
    return [
        case("ViT-B", batch, 197, 768),
        case("ViT-S", batch, 197, 384),
        case("ViT-g", batch, 257, 1408),
    ]


def check_the_sum_is_pytorchs(module: ModuleType) -> None:
    for dtype in (torch.float32, torch.float16):
        x, branch = torch.randn(2, 2, 5, 40).to(dtype).unbind(0)
        added, _ = module.add_norm(x, branch, EPS)
        assert torch.equal(added, x + branch)


def check_either_output_alone(module: ModuleType) -> None:
    leaves, weights = [x.requires_grad_() for x in torch.randn(2, 2, 3, 24).unbind(0)], torch.randn(2, 3, 24)
    for i in range(2):
        found, expected = (
            torch.autograd.grad((call(*leaves, EPS)[i] * weights).sum(), leaves)
            for call in (module.add_norm, reference.add_norm)
        )
        for one, other in zip(found, expected, strict=True):
            same(one, other, 1e-5)


def check_gradients_in_other_layouts(module: ModuleType) -> None:
    leaves = [x.requires_grad_() for x in torch.randn(2, 2, 3, 24).unbind(0)]
    grads = [torch.randn(24, 3, 2).permute(2, 1, 0), torch.randn(1, 1, 24).expand(2, 3, 24)]
    found, expected = (
        torch.autograd.grad(call(*leaves, EPS), leaves, grads) for call in (module.add_norm, reference.add_norm)
    )
    for one, other in zip(found, expected, strict=True):
        same(one, other, 1e-5)


def check_the_norm_in_float32(module: ModuleType) -> None:
    x, branch = torch.randn(2, 2, 5, 40).half().unbind(0)
    added, normed, _ = torch.ops.fastprompt.add_norm(x, branch, EPS, True)
    assert (added.dtype, normed.dtype) == (torch.float16, torch.float32)
    same(normed, torch.nn.functional.layer_norm(added.float(), (40,), eps=EPS), 1e-6)


def check_a_row_of_equal_numbers(module: ModuleType) -> None:
    x = torch.full((1, 2, 40), 1e4, requires_grad=True)
    added, normed = module.add_norm(x, torch.zeros(1, 2, 40), EPS)
    assert not normed.any()
    assert torch.autograd.grad((added + normed).sum(), x)[0].isfinite().all()


def check_empty_batch(module: ModuleType) -> None:
    leaves = [torch.randn(0, 3, 8, requires_grad=True) for _ in range(2)]
    added, normed = module.add_norm(*leaves, EPS)
    assert added.shape == normed.shape == (0, 3, 8)
    assert all(grad.shape == (0, 3, 8) for grad in torch.autograd.grad(added.sum() + normed.sum(), leaves))


def check_registration(module: ModuleType) -> None:
    x, branch = torch.randn(2, 2, 6, 16).unbind(0)
    ops = torch.ops.fastprompt
    torch.library.opcheck(ops.add_norm.default, (x[:, 1:5], branch[:, 1:5], EPS, False))
    torch.library.opcheck(ops.add_norm.default, (x.half(), branch.half(), EPS, True))
    for summed in (x, None):
        torch.library.opcheck(ops.add_norm_backward.default, (summed, branch, x, torch.rand(2, 6, 2)))


def check_compiles_in_one_graph(module: ModuleType) -> None:
    def step(x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        return add_norm(2 * x, branch, EPS)

    leaves = [x.requires_grad_() for x in torch.randn(2, 2, 3, 24).unbind(0)]
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            added, normed = call(*leaves)
        results.append([added, normed, *torch.autograd.grad((added * normed).sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["add_norm"].backend == "triton"


CHECKS = [
    check_the_sum_is_pytorchs,
    check_either_output_alone,
    check_gradients_in_other_layouts,
    check_the_norm_in_float32,
    check_a_row_of_equal_numbers,
    check_empty_batch,
    check_registration,
    check_compiles_in_one_graph,
]
MUTATIONS = [
    ("the sum is not rounded before its norm", "s = s.to(added.dtype.element_ty)", "s = s + 0.0"),
    ("every image is the first", "(i // R).to(tl.int64)", "(i // R * 0).to(tl.int64)"),
    ("rows of all images in one run", "(i % R).to(tl.int64)", "i.to(tl.int64)"),
    ("the branch's rows lie as x's", "r[:, None] * stride_br", "r[:, None] * stride_br * 0"),
    ("the branch is left out", "s += tl.load(branch", "s += 0.0 * tl.load(branch"),
    ("the mean is not taken off", "s - mean[:, None], 0.0", "s, 0.0"),
    ("channels beyond the last in the variance", "tl.where(inside, s - mean[:, None], 0.0)", "s - mean[:, None]"),
    ("eps forgotten", "axis=1) / D + eps", "axis=1) / D"),
    ("the variance is a sum", "tl.sum(s * s, axis=1) / D", "tl.sum(s * s, axis=1)"),
    ("an unbiased variance", "tl.sum(s * s, axis=1) / D", "tl.sum(s * s, axis=1) / (D - 1)"),
    (
        "the variance for its root",
        "1.0 / tl.sqrt(tl.sum(s * s, axis=1) / D + eps)",
        "1.0 / (tl.sum(s * s, axis=1) / D + eps)",
    ),
    ("saved: no mean", "tl.store(stats + 2 * i, mean", "tl.store(stats + 2 * i, 0.0 * mean"),
    ("saved: mean and scale swapped", "tl.store(stats + 2 * i + 1, scale", "tl.store(stats + 2 * i + 1, mean"),
    ("backward: the mean of the gradient stays", "g - tl.sum(g, axis=1)[:, None] / D", "g"),
    ("backward: what lies along the row stays", "- s * along", ""),
    ("backward: not scaled", "x = scale * (g", "x = (g"),
    ("backward: rows not normed", "- mean) * scale", "- mean)"),
    ("backward: the sum's gradient is left out", "x += tl.load(grad_added", "x += 0.0 * tl.load(grad_added"),
    ("backward: the sum's gradient is the norm's", "x += tl.load(grad_added", "x += tl.load(grad_normed"),
]
