"""Initial prompts from the training images: means of the tokens that enter the prompts' block, and new directions.

In the manner of VIPAMIN (arXiv 2510.16446), which aligns prompts with groups of image tokens and adds directions that
the pretrained tokens do not have, and of PAE (arXiv 2601.20232), which starts prompts from the data. Neither's code
or constants are used here. For each block with prompts, from the patch tokens X (n, D) that enter it without prompts:

1. Matching: prompts are the P means C of k-means on X (Lloyd, 10 rounds, from P different rows drawn by the seed).
2. Orthogonalising: U (P, D) is Gaussian noise without its part in the span of the first r eigenvectors of XᵀX, which
   hold 90 % of its trace (r < D), each row scaled to length 1. Prompt i is (1 − λ) Cᵢ + λ ‖Cᵢ‖ Uᵢ with λ = 0.25.

n is at most 4,096 tokens, drawn by the seed from those of at most 64 training images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.train.evaluate import evaluation_mode

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

IMAGES, TOKENS, ROUNDS = 64, 4096, 10
SHARE, ENERGY = 0.25, 0.9
"""λ, and the part of the trace of XᵀX that the tokens' own directions hold."""


def check_prompts(model: PromptedViT) -> None:
    """Raise `ValueError` unless the model's prompts are parameters that can be set to tokens."""
    if model.generator is None or not model.generator.free_tokens():
        raise ArgumentError(
            "prompt_init",
            f"must be 'default' unless prompts are learned tokens themselves (VPT without project, free prompts, CVPT, "
            f"VQT), got 'data' for {model.config.kind!r}",
        )


@torch.no_grad()
def prompts_from_data(model: PromptedViT, batches: Iterator[tuple[Tensor, Any]], seed: int) -> None:
    """Set the model's prompts from the first images of `batches`, as the module says.

    Args:
        batches: (images (B, 3, H, W), labels) of the training data.
        seed: of the tokens that are drawn, of the first means and of the noise.
    """
    check_prompts(model)
    assert model.generator is not None
    images: list[Tensor] = []
    for batch, _ in batches:
        images.append(batch[: IMAGES - sum(map(len, images))])
        if sum(map(len, images)) == IMAGES:
            break
    tokens = entering(model, images)
    generator = torch.Generator().manual_seed(seed)
    for block, prompts in model.generator.free_tokens().items():
        rows = tokens[block].float().cpu()
        rows = rows[torch.randperm(len(rows), generator=generator)[:TOKENS]]
        prompts.copy_(initial_prompts(rows, len(prompts), generator))


def entering(model: PromptedViT, images: list[Tensor]) -> dict[int, Tensor]:
    """Return the patch tokens (n, D) that enter each block with prompts, of the images without prompts."""
    vit, generator = model.backbone, model.generator
    assert generator is not None
    found: dict[int, list[Tensor]] = {}

    def keep(block: int) -> Callable[..., None]:
        return lambda _, inputs: found.setdefault(block, []).append(inputs[0][:, vit.num_prefix :].flatten(0, 1))

    hooks = []
    for block in generator.free_tokens():
        norm = vit.norm_pre if block == 0 and generator.before_pre_norm else None
        module = vit.blocks[block] if norm is None else norm
        hooks.append(module.register_forward_pre_hook(keep(block)))
    try:
        with evaluation_mode(model):
            for batch in images:
                vit.graph.papers.encode(vit, vit.normalise(batch))
    finally:
        for hook in hooks:
            hook.remove()
    return {block: torch.cat(parts) for block, parts in found.items()}


def initial_prompts(rows: Tensor, num_prompts: int, generator: torch.Generator) -> Tensor:
    """Return prompts (P, D) from token rows (n, D): means of groups, with directions that the rows lack."""
    means = group_means(rows, num_prompts, generator)
    values, vectors = torch.linalg.eigh(rows.T @ rows)  # ascending
    held = values.flip(0).clamp(min=0).cumsum(0) / values.clamp(min=0).sum().clamp(min=torch.finfo(rows.dtype).tiny)
    own = min(int((held < ENERGY).sum()) + 1, rows.shape[1] - 1)
    basis = vectors[:, -own:]  # (D, r)
    noise = torch.randn(num_prompts, rows.shape[1], generator=generator)
    noise = noise - noise @ basis @ basis.T
    new = noise / noise.norm(dim=1, keepdim=True)
    return (1 - SHARE) * means + SHARE * means.norm(dim=1, keepdim=True) * new


def group_means(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` means (P, D) of k-means on rows (n, D); a group that loses all rows keeps its last mean."""
    order = torch.randperm(len(rows), generator=generator)
    means = rows[order.repeat(-(-count // len(rows)))[:count]].clone()
    for _ in range(ROUNDS):
        nearest = torch.cdist(rows, means).argmin(dim=1)
        sums = torch.zeros_like(means).index_add_(0, nearest, rows)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        means = torch.where(sizes > 0, sums / sizes.clamp(min=1), means)
    return means
