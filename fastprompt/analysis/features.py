"""What a model computes of every image: generator outputs, mixture weights, features with and without prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.analysis.library import has_library
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.train.batches import Batches
from fastprompt.train.evaluate import evaluation_mode

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT

SOURCES = ("generator", "mixture", "backbone", "prompted")


def normalised_batches(model: PromptedViT, data: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield normalised float images (B, 3, H, W) on the model's device, and labels (B,), in the order of the data."""
    batches = Batches(data, batch_size, name="data", num_classes=2**62, device=model.backbone.device)
    for images, labels in batches.epoch():
        yield model.backbone.normalise(images).float(), labels.cpu()


def collect(model: PromptedViT, data: Any, source: str = "generator", batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Compute one vector per image, in eval mode; the modes of the model's modules are restored.

    Args:
        model: a prompted model.
        data: as in `fastprompt.evaluate`.
        source: "generator": its prompts, flattened (P · D), of the first block, or of the last one if they are computed
            from each block's patches (VAPT); "mixture": the weights of the library's tokens,
            flattened (K · M); "backbone": the frozen backbone's own features; "prompted": the features that the head
            reads.
        batch_size: images per forward.

    Returns:
        (N, size) float32 and labels (N,) int64, on the CPU.

    Raises:
        TypeError, ValueError: an argument is wrong, or the method has no such vectors.
    """
    from fastprompt.model import PromptedViT

    if not isinstance(model, PromptedViT):
        raise ArgumentTypeError("model", f"must be a PromptedViT, got {type(model).__name__}")
    if source not in SOURCES:
        raise ArgumentError("source", f"must be one of {', '.join(SOURCES)}, got {source!r}")
    if source == "mixture" and not has_library(model):
        raise ArgumentError("source", f"must not be 'mixture' for {model.config.kind}, which has no token library")
    generator = model.generator
    depends = generator is not None and generator.num_prompts > 0 and generator.known_at != "static"
    if source == "generator" and not depends:
        raise ArgumentError(
            "source", f"must not be 'generator' for {model.config.kind}, whose prompts do not depend on the image"
        )
    found, labels = [], []
    with evaluation_mode(model):
        for images, of_batch in normalised_batches(model, data, batch_size):
            found.append(_vectors(model, images, source).flatten(1).float().cpu())
            labels.append(of_batch)
    return torch.cat(found), torch.cat(labels)


def _vectors(model: PromptedViT, images: Tensor, source: str) -> Tensor:
    generator: Any = model.generator
    if source == "backbone":
        return model.backbone(images)
    if source == "prompted":
        return model.forward_features(images)
    if source == "mixture":
        return generator.mixture(images)
    if generator.known_at == "image":
        return generator(images)
    seen = recorded(model, images)
    return seen[-1 if generator.known_at == "layer" else 0][1]  # VAPT's first blocks have static prompts


def recorded(model: PromptedViT, images: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Run the papers' graph and return (block, prompts (B or 1, P, D), patch tokens (B, N, D) entering that block)."""
    generator: Any = model.generator
    plain, seen = generator.plain_prompts, list[tuple[int, Tensor, Tensor]]()

    def record(layer: int, context: Any, tokens: Tensor | None = None, draws: Any = None) -> Tensor:
        prompts: Tensor = plain(layer, context, tokens, draws)
        assert tokens is not None
        seen.append((layer, prompts.detach(), tokens.detach()))
        return prompts

    with replaced(generator, "plain_prompts", record), torch.no_grad():
        model.reference_forward(images)
    return seen


@contextlib.contextmanager
def replaced(module: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Context in which `module` has another method of this name."""
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)
