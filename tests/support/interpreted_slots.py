"""PGN's forward and training step with the Triton kernels in their interpreter; prints the fused ops that ran.

Run with TRITON_INTERPRET=1, by `tests/vit/test_slots.py`.
"""

from __future__ import annotations

from typing import Any

import gpu_path
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import fastprompt as fp


class Ops(gpu_path.NoConcatenation):
    """Says which forms of the mixture run, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastprompt" and func.overloadpacket.__name__ in (
            "library_prompts",
            "library_prompts_into",
            "library_prompts_assemble",
        ):
            print(func.overloadpacket.__name__)
        return super().__torch_dispatch__(func, types, args, kwargs)


def by_kernels(op: Any) -> Any:
    def run(*arguments: Any, **options: Any) -> Tensor:
        with fp.use_backend("triton"):
            return op(*arguments, **options)

    return run


def gradients(out: Tensor, model: torch.nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().sum(), [p for p in model.parameters() if p.requires_grad]))


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


torch.manual_seed(0)
torch.set_num_threads(1)
config = fp.PGNConfig(num_prompts=3, library_size=5, widths=(4,))
for pre_norm in (False, True):
    vit = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=0, pre_norm=pre_norm, reg_tokens=1
    )
    model = fp.PromptedViT(fp.FrozenViT(vit), config, num_classes=3).train()
    images, mode = torch.randn(2, 3, 16, 16), Ops(32, 16)
    with pytest.MonkeyPatch.context() as patch:
        gpu_path.take(patch, mode, by_kernels)
        with mode:
            ours = model(images)
            of_ours = gradients(ours, model)
            with torch.no_grad():
                served = model.eval()(images)
    close(served, model.reference_forward(images))
    theirs = model.train().reference_forward(images)
    close(ours, theirs)
    for x, y in zip(of_ours, gradients(theirs, model), strict=True):
        close(x, y)

generator = fp.PGN(config, width=32)
images, tokens = torch.randn(2, 3, 16, 16), torch.randn(2, 5, 32, requires_grad=True)
mode = Ops(32, 16)
with pytest.MonkeyPatch.context() as patch:
    gpu_path.take(patch, mode, by_kernels)
    with mode:
        ours = generator.sequence(images, tokens)
theirs = torch.cat([tokens, generator(images)], dim=1)
close(ours, theirs)
for x, y in zip(torch.autograd.grad(ours.sum(), tokens), torch.autograd.grad(theirs.sum(), tokens), strict=True):
    close(x, y)
