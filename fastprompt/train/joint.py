"""One forward of several adapters on one frozen backbone.

What does not depend on the adapters is computed once for all of them: patch embeddings, the blocks in front of the
first prompts, and with VQT, whose tokens only query, the whole backbone; a linear probe needs nothing else. Behind
that, each adapter has rows of its own, which are a group of `fastprompt.vit.forward`: the frozen Linears run over the
rows of all groups, and attention over those of each one. Tokens that only query are rows of one product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.vit import constants
from fastprompt.vit.prompts import NO_DRAWS, Draws, Group
from fastprompt.vit.reference import Sequence as TokenSequence

if TYPE_CHECKING:
    from fastprompt.generators import PromptGenerator
    from fastprompt.model import PromptedViT
    from fastprompt.train.constants import Constants

Outputs = tuple[Tensor, dict[str, Tensor]]
"""Logits (B, C) in float32, and what a loss needs besides them."""


class Part(NamedTuple):
    """Inputs, the models that all of them pass through, and the models' draws, which are the same for each.

    Attributes:
        inputs: images (B, C, H, W), records of constants (B, bytes), or features (B, D) for the heads.
    """

    inputs: Tensor
    models: Sequence[PromptedViT]
    draws: Draws = NO_DRAWS


def check_joint(models: Mapping[str, PromptedViT]) -> None:
    """Raise `ValueError` unless these models, each with a name for messages, can be trained in one forward."""
    name, first = next(iter(models.items()))
    if first.full:
        raise ArgumentError(
            "make_model", f"must leave the backbone frozen, of which {first.config.kind!r} trains a copy per adapter"
        )
    if first.generator is not None and first.generator.changes_images:
        raise ArgumentError(
            "make_model", f"must not change the images, as {first.config.kind!r} does: nothing of them could be shared"
        )
    for other, model in models.items():
        if model.backbone is not first.backbone:
            raise ArgumentError("make_model", f"must use one backbone for all adapters, got another one for {other}")
        for what in ("config", "readout", "num_classes", "training"):
            if getattr(model, what) != getattr(first, what):
                raise ArgumentError(
                    "make_model",
                    f"must give all adapters one {what}, got {getattr(model, what)!r} for {other} and "
                    f"{getattr(first, what)!r} for {name}",
                )


def outputs(parts: Sequence[Part], kept: Constants | None = None, features: bool = False) -> list[Outputs]:
    """Return each model's outputs, those of the first part's models first.

    Args:
        parts: their models fit together (`check_joint`) and are all in training mode or all in eval mode.
        kept: whose records the parts hold. features: the parts hold features.
    """
    models = [model for part in parts for model in part.models]
    if features:
        return [(_head(model, part.inputs), {}) for part in parts for model in part.models]
    first = models[0]
    samples = [[part.draws for part in parts]]
    if not first.training and first.generator is not None:
        samples = [[draws] * len(parts) for draws in first.generator.inference_draws()]
    found = [_features([p._replace(draws=d) for p, d in zip(parts, draws, strict=True)], kept) for draws in samples]
    result = []
    for i, model in enumerate(models):
        logits = model.average([_head(model, sample[i][0]) for sample in found])
        result.append((logits, {**found[-1][i][1], **model.penalty()}))
    return result


def _head(model: PromptedViT, features: Tensor) -> Tensor:
    assert model.head is not None
    return model.head(features).float()


def _features(parts: Sequence[Part], kept: Constants | None) -> list[Outputs]:
    """Return what each model's head reads, and its auxiliary tensors."""
    model = parts[0].models[0]
    if model.generator is None:
        with torch.no_grad():
            of_parts = [model.forward_features(part.inputs) for part in parts]
        return [(found, {}) for found, part in zip(of_parts, parts, strict=True) for _ in part.models]
    if not model.has_constants():
        known = [_constants(part, kept) for part in parts]
        if model.generator.role == "queries":
            return [found for part, of_part in zip(parts, known, strict=True) for found in _answered(part, of_part)]
        return _behind(parts, known)
    return _whole(parts)


def _constants(part: Part, kept: Constants | None) -> Mapping[str, Tensor]:
    return part.models[0].constants(part.inputs) if kept is None else kept.unpacked(part.inputs)


def _answered(part: Part, known: Mapping[str, Tensor]) -> list[Outputs]:
    """The features with tokens that only query, which ask the same rows side by side."""
    generators, vit = [_generator(model) for model in part.models], part.models[0].backbone
    folded = vit.folded()
    assert folded is not None
    answers: list[Sequence[Tensor]] = []
    for i in generators[0].layers:
        tokens = torch.cat([each.prompts(i, None, None, part.draws) for each in generators], dim=1).to(vit.dtype)
        answers.append(constants.answers(i, tokens, known, folded).chunk(len(generators), dim=1))
    features = known["features"].to(vit.dtype)
    return [
        (each.gather(features, [of_block[k] for of_block in answers]), each.aux(None))
        for k, each in enumerate(generators)
    ]


def _behind(parts: Sequence[Part], known: Sequence[Mapping[str, Tensor]]) -> list[Outputs]:
    """The features from the rows that enter the first prompted block."""
    model = parts[0].models[0]
    vit, folded, known_at = model.backbone, model.backbone.folded(), _generator(model).known_at
    assert folded is not None
    groups: list[Group] = []
    rows: list[Tensor] = []
    for part, of_part in zip(parts, known, strict=True):
        entering = of_part["rows"].to(vit.dtype)
        source = of_part["images"] if known_at == "image" else of_part.get("embeddings")
        for each in part.models:
            x = source if known_at == "image" else None if source is None else source.to(vit.dtype)
            context = _generator(each).context(x, part.draws) if known_at in ("image", "embeddings") else None
            groups.append(_group(each, context, part.draws, len(entering)))
            rows.append(entering)
    grid = known[0]["grid"][0].tolist()
    first = min(_generator(model).layers)
    place, kept_of = (grid[0], grid[1]), (model.recomputes, model.activation_bits)
    found = constants.features_behind(vit, torch.cat(rows), place, first, groups, folded, *kept_of)
    return _with_aux(parts, found, groups)


def _whole(parts: Sequence[Part]) -> list[Outputs]:
    """The features from embeddings that each image has once."""
    model = parts[0].models[0]
    vit, graph = model.backbone, model.backbone.graph
    folded = vit.folded()
    groups: list[Group] = []
    rows: list[Tensor] = []
    for part in parts:
        vit.check_images(part.inputs)
        images = vit.normalise(part.inputs)
        with torch.no_grad():
            embedded = graph.rewritten.embed(vit, part.inputs, images, folded)
            tokens = embedded.tokens
        for each in part.models:
            context = each.prompt_context(images, embedded.patches, part.draws)
            groups.append(_group(each, context, part.draws, len(tokens)))
            rows.append(tokens)
    entering = TokenSequence(torch.cat(rows), embedded.num_prefix, grid=embedded.grid)
    found = graph.rewritten.features(vit, entering, groups, folded, model.recomputes, bits=model.activation_bits)
    return _with_aux(parts, found, groups)


def _group(model: PromptedViT, context: object, draws: Draws, size: int) -> Group:
    prefixes = None if draws else model.kept_prefixes()
    return Group(model.generator, context, draws, model.readout, prefixes, size)


def _with_aux(parts: Sequence[Part], found: Sequence[Tensor], groups: Sequence[Group]) -> list[Outputs]:
    models = [model for part in parts for model in part.models]
    return [
        (features, _generator(model).aux(group.context))
        for model, features, group in zip(models, found, groups, strict=True)
    ]


def _generator(model: PromptedViT) -> PromptGenerator:
    assert model.generator is not None
    return model.generator
