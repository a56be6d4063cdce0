"""What the gates know of `library_prompts`."""

from __future__ import annotations

from types import ModuleType

import torch
from kernel_bytes import formula as formula
from spec import Case, Draw, Inputs
from torch import Tensor

from fastprompt.kernels.library_prompts import reference

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


CHECKS = [check_weights_sum_to_one, check_shift_of_the_logits_changes_nothing, check_certain_selection_returns_the_row,
          check_order_of_the_library_changes_nothing, check_extreme_logits]
MUTATIONS = [
    ("lowest instead of highest", "tl.maximum(top, tl.max(a, axis=1))", "tl.minimum(top, tl.max(a, axis=1))"),
]
