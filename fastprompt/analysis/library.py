"""Measure how a PGN uses its token library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastprompt.arguments import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    import torch

    from fastprompt.model import PromptedViT


DEAD = 0.01
"""Share of an equal share of the weight below which a token counts as dead."""


def has_library(model: PromptedViT) -> bool:
    """Whether the model mixes its prompts from a token library, as PGN does: its generator has `mixture(images)`."""
    without = getattr(model.config, "library_size", 1) is None
    return callable(getattr(model.generator, "mixture", None)) and not without


def library_usage(model: PromptedViT, dataset: Any, batch_size: int = 64) -> dict[str, Any]:
    """Measure how a PGN uses its library over a data set.

    `mean_weight` (M,) is each token's mixture weight, averaged over images and prompts. `entropy` (nats) is the mean
    entropy of one mixture, and `effective_tokens` = exp(entropy) the number of tokens that make up one prompt.
    `effective_library` is exp(entropy of `mean_weight`), the number of tokens in use over all images. `dead_tokens` is
    the number of tokens with less than a hundredth of an equal share, and `effective_rank` that of the library's matrix
    (M, D) (`fastprompt.analysis.effective_rank`). Sigmoid mixtures are first normalised to sum to 1.
    """
    import torch

    from fastprompt.analysis.rank import effective_rank

    generator: Any = model.generator
    if not has_library(model):
        raise ArgumentTypeError(
            "model", f"must have a token library, as PGN does, got a {type(generator).__name__} generator"
        )
    was_training = model.training
    model.eval()
    total: torch.Tensor | None = None
    entropy, mixtures = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(dataset), batch_size):
            images = torch.stack([dataset[i][0] for i in range(start, min(start + batch_size, len(dataset)))])
            pixels = model.backbone.normalise(images.to(model.backbone.device)).float()
            weights = generator.mixture(pixels).double()  # (B, K, M)
            weights = weights / weights.sum(-1, keepdim=True)
            entropy += float(-(weights * weights.clamp_min(1e-300).log()).sum())
            mixtures += weights.shape[0] * weights.shape[1]
            batch_total = weights.sum((0, 1))
            total = batch_total if total is None else total + batch_total
    model.train(was_training)
    if total is None:
        raise ArgumentError("dataset", "must hold at least one image, got none")
    mean_weight = total / mixtures  # (M,)
    spread = float(-(mean_weight * mean_weight.clamp_min(1e-300).log()).sum())
    return {
        "mean_weight": [float(w) for w in mean_weight],
        "entropy": entropy / mixtures,
        "effective_tokens": float(torch.tensor(entropy / mixtures).exp()),
        "effective_library": float(torch.tensor(spread).exp()),
        "dead_tokens": int((mean_weight < DEAD / len(mean_weight)).sum()),
        "effective_rank": effective_rank(generator.library),
        "num_images": len(dataset),
    }
