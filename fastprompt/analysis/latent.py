"""V²APT's latent: how much each unit says about the image, and what it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastprompt.analysis.features import normalised_batches, replaced
from fastprompt.arguments import ArgumentError, ArgumentTypeError
from fastprompt.generators.v2apt import ACTIVE_UNIT_NATS, V2APT
from fastprompt.kernels.vae_prompts.reference import gaussian, kl_per_unit
from fastprompt.train.evaluate import evaluation_mode

if TYPE_CHECKING:
    from fastprompt.model import PromptedViT


@dataclass(frozen=True)
class LatentUse:
    """The result of `latent_use`.

    Attributes:
        kl: (Z,) mean KL of each unit over the images, nats.
        total: its sum.
        active: number of units above 0.01 nats (Burda et al., ICLR 2016).
        mean, std: (Z,) of the posterior means over the images.
    """

    kl: Tensor
    total: float
    active: int
    mean: Tensor
    std: Tensor


def latent_use(model: PromptedViT, data: Any, batch_size: int = 64) -> LatentUse:
    """Measure the KL of every latent unit of a V²APT over a data set.

    Raises:
        TypeError: the model's method is not V²APT.
    """
    generator = _v2apt(model)
    means, kl = [], []
    with evaluation_mode(model), _stats_seen(generator) as seen:
        for images, _ in normalised_batches(model, data, batch_size):
            model(images)
            mu, logvar = gaussian(seen.pop())
            means.append(mu.double().cpu())
            kl.append(kl_per_unit(mu, logvar).double().cpu())
    of_units, mu = torch.cat(kl).mean(0), torch.cat(means)
    active = int((of_units > ACTIVE_UNIT_NATS).sum())
    return LatentUse(of_units, float(of_units.sum()), active, mu.mean(0), mu.std(0, correction=0))


def traverse(model: PromptedViT, images: Tensor, unit: int, values: Sequence[float]) -> Tensor:
    """Return class probabilities while one latent unit takes each of some values and the others their posterior mean.

    Args:
        images: (B, 3, H, W), uint8 or normalised.
        unit: 0 to Z − 1.
        values: of the unit; its prior is N(0, 1).

    Returns:
        (len(values), B, C), on the CPU. Without a head, features (len(values), B, width).

    Raises:
        TypeError, ValueError: the method is not V²APT, or there is no such unit.
    """
    generator = _v2apt(model)
    latent = generator.config.latent
    if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < latent:
        raise ArgumentError("unit", f"must be from 0 to {latent - 1}, got {unit!r}")
    if len(values) == 0:
        raise ArgumentError("values", "must hold at least one number, got none")
    found = []
    for value in values:

        def moved(stats: Tensor, value: float = float(value)) -> Tensor:
            stats = stats.clone()
            stats[:, unit] = value  # [μ, log σ²]
            return stats

        with evaluation_mode(model), _changed_stats(generator, moved):
            outputs = model(images.to(model.backbone.device)).float()
        found.append((outputs if model.head is None else outputs.softmax(-1)).cpu())
    return torch.stack(found)


def most_telling_units(model: PromptedViT, data: Any, count: int = 8, batch_size: int = 64) -> list[int]:
    """Return the latent units with the highest KL, highest first."""
    kl = latent_use(model, data, batch_size).kl
    return kl.argsort(descending=True)[:count].tolist()


def _v2apt(model: PromptedViT) -> V2APT:
    if not isinstance(model.generator, V2APT):
        raise ArgumentTypeError("model", f"must be a V²APT, got {model.config.kind!r}")
    return model.generator


def _changed_stats(generator: Any, change: Callable[[Tensor], Tensor]) -> contextlib.AbstractContextManager[None]:
    """Context in which the encoder's output (B, 2Z) is changed."""
    own = generator.stats
    return replaced(generator, "stats", lambda embeddings: change(own(embeddings)))


@contextlib.contextmanager
def _stats_seen(generator: Any) -> Iterator[list[Tensor]]:
    """Context that collects the encoder's outputs (B, 2Z)."""
    seen: list[Tensor] = []

    def keep(stats: Tensor) -> Tensor:
        seen.append(stats)
        return stats

    with _changed_stats(generator, keep):
        yield seen
