"""Run images of many adapters in one pass through their shared backbone.

Products with the frozen weights run over the rows of all images. Prompts and heads are computed per adapter. Attention
is computed per group of images. Adapters with the same number of prompts in the same blocks form one group, in which
every image has its own prompts, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastprompt.generators import PromptGenerator
from fastprompt.model import PromptedViT
from fastprompt.vit.prompts import NO_DRAWS, Apart, Draws, Group, Prefix, Prompts
from fastprompt.vit.reference import Sequence as TokenSequence
from fastprompt.vit.weights import Folded, Norm


class _Row(NamedTuple):
    """One row of the pass: an image, its model and the draws of one of the model's inference samples."""

    image: int
    model: PromptedViT
    sample: int
    draws: Draws


class _Member(NamedTuple):
    """A model's rows in a group, the positions of their images, and its generator's context for them."""

    model: PromptedViT
    generator: PromptGenerator | None
    draws: Draws
    positions: list[int]
    context: Any


class JointPrompts(Prompts):
    """The prompts of several generators behind one interface: each image gets the prompts of its own generator.

    All have the same number of prompts in the same blocks (`_alike`). Contexts and draws are the members' own; those
    that a graph passes are ignored.
    """

    def __init__(self, members: Sequence[_Member]) -> None:
        self.generators = [(member.generator, member) for member in members if member.generator is not None]
        self.members = [member for _, member in self.generators]

    @property
    def role(self) -> str:
        return self.generators[0][0].role

    @property
    def layers(self) -> tuple[int, ...]:
        return self.generators[0][0].layers

    @property
    def num_prompts(self) -> int:
        return self.generators[0][0].num_prompts

    @property
    def prompts_last(self) -> bool:
        return self.generators[0][0].prompts_last

    @property
    def before_pre_norm(self) -> bool:
        return self.generators[0][0].before_pre_norm

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        return self._joined(tokens, lambda g, m, own: g.prompts(layer, m.context, own, m.draws))

    def plain_prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        return self._joined(tokens, lambda g, m, own: g.plain_prompts(layer, m.context, own, m.draws))

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws, norm: Norm | None) -> Tensor:
        parts = [
            generator.first_prompts(member.context, _take(tokens, member.positions), member.draws, norm)
            for generator, member in self.generators
        ]
        return _in_order(parts, self.members)

    def first_sequence(self, context: Any, apart: Apart, draws: Draws, norm: Norm | None) -> None:
        """Return None: no member writes the rows of others."""

    def prefixes(self, folded: Folded | None) -> dict[int, Prefix]:
        """Map each block to what it reads of prompts that depend on parameters only, with a row for each image."""
        known = [member.model.kept_prefixes(folded) or {} for member in self.members]
        return {
            layer: tuple(
                _in_order(list(parts), self.members)
                for parts in zip(*(prefixes[layer] for prefixes in known), strict=True)
            )
            for layer in known[0]
        }

    def gather(self, features: Tensor, answers: Sequence[Tensor]) -> Tensor:
        parts = [
            generator.gather(_take(features, member.positions), [_take(part, member.positions) for part in answers])
            for generator, member in self.generators
        ]
        return _in_order(parts, self.members)

    def _joined(
        self, tokens: Tensor | None, prompts: Callable[[PromptGenerator, _Member, Tensor | None], Tensor]
    ) -> Tensor:
        """Join the generators' prompts for the group's images: (B, P, D). `tokens`: (B, N, D), the block's input."""
        parts = [
            prompts(generator, member, None if tokens is None else _take(tokens, member.positions))
            for generator, member in self.generators
        ]
        dtype = self.members[0].model.backbone.dtype
        return _in_order([part.to(dtype) for part in parts], self.members)


def outputs(images: Tensor, models: Sequence[PromptedViT]) -> list[Tensor]:
    """Compute each image's output by its own model: logits (C,), or features (D,) for a model without a head.

    Args:
        images: (B, 3, H, W), as the backbone takes them.
        models: B models in eval mode on one backbone; no gradients are computed.
    """
    rows = [
        _Row(image, model, sample, draws)
        for image, model in enumerate(models)
        for sample, draws in enumerate([NO_DRAWS] if model.generator is None else model.generator.inference_draws())
    ]
    shared = [i for i, row in enumerate(rows) if _keeps_size(row.model)]
    alone = [i for i in range(len(rows)) if i not in set(shared)]
    samples: list[list[Tensor]] = [[] for _ in models]
    for run, chosen in ((_together, shared), (_one_after_the_other, alone)):
        found = run(images, [rows[i] for i in chosen]) if chosen else []
        for i, output in zip(chosen, found, strict=True):
            samples[rows[i].image].append(output)
    return [model.average(of_image) for model, of_image in zip(models, samples, strict=True)]


def _keeps_size(model: PromptedViT) -> bool:
    """Whether the model's prompts leave the number of patches of an image unchanged."""
    return model.generator is None or not model.generator.changes_size


def _together(images: Tensor, rows: list[_Row]) -> list[Tensor]:
    """Compute (C,) or (D,) for each row in one pass through the backbone."""
    backbone, graph = rows[0].model.backbone, rows[0].model.backbone.graph
    pixels = backbone.normalise(images)
    folded = backbone.folded()
    embedded = graph.rewritten.embed(backbone, images, pixels, folded)
    tokens = _take(embedded.tokens, [row.image for row in rows])  # (rows, T, D)
    for of_model in _by(range(len(rows)), lambda i: id(rows[i].model)):
        generator = rows[of_model[0]].model.generator
        if generator is not None and generator.changes_images:
            prompted = generator.prompt_images(_take(pixels, [rows[i].image for i in of_model]))
            tokens = tokens.clone() if tokens is embedded.tokens else tokens
            tokens[of_model] = graph.papers.embed(backbone, prompted.to(backbone.dtype)).tokens
    order, groups, members = [], [], []
    for of_group in _by(range(len(rows)), lambda i: _alike(rows[i].model)):
        patches = _take(tokens, of_group)[:, embedded.num_prefix :]
        group = []
        for of_member in _by(of_group, lambda i: (id(rows[i].model), rows[i].sample)):
            row, positions = rows[of_member[0]], [of_group.index(i) for i in of_member]
            own = _take(pixels, [rows[i].image for i in of_member])
            context = row.model.prompt_context(own, _take(patches, positions), row.draws)
            group.append(_Member(row.model, row.model.generator, row.draws, positions, context))
        generator, readout = row.model.generator, row.model.readout
        joint = None if generator is None or generator.num_prompts == 0 else JointPrompts(group)
        prefixes = (
            None if generator is None or joint is None or generator.known_at != "static" else joint.prefixes(folded)
        )
        groups.append(Group(joint, None, NO_DRAWS, readout, prefixes, len(of_group)))
        members.append(group)
        order += of_group
    ordered = TokenSequence(_take(tokens, order), embedded.num_prefix, grid=embedded.grid)
    found = graph.rewritten.features(backbone, ordered, groups, folded)
    of_rows: list[Any] = [None] * len(rows)
    start = 0
    for group, features in zip(members, found, strict=True):
        for member in group:
            own = _take(features, member.positions)
            own = own if member.model.head is None else member.model.head(own)
            for i, output in zip(member.positions, own, strict=True):
                of_rows[order[start + i]] = output
        start += len(features)
    return of_rows


def _one_after_the_other(images: Tensor, rows: list[_Row]) -> list[Tensor]:
    """Compute (C,) or (D,) for each row, one pass per model: prompts that make images taller add patches."""
    of_rows: list[Any] = [None] * len(rows)
    for positions in _by(range(len(rows)), lambda i: (id(rows[i].model), rows[i].sample)):
        row = rows[positions[0]]
        own = row.model(_take(images, [rows[i].image for i in positions]), draws=row.draws)
        for i, output in zip(positions, own, strict=True):
            of_rows[i] = output
    return of_rows


def _alike(model: PromptedViT) -> tuple[Any, ...]:
    """Return a key that is equal for images that share their attention."""
    generator = model.generator
    if generator is None or generator.num_prompts == 0:
        return (model.readout,)
    return (
        model.readout,
        generator.role,
        generator.layers,
        generator.num_prompts,
        model.feature_width,
        generator.before_pre_norm,
        generator.known_at == "static",
    )


def _by(items: Sequence[int], key: Any) -> list[list[int]]:
    """Group the items by key, in the order in which keys appear."""
    groups: dict[Any, list[int]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _take(x: Tensor, positions: list[int]) -> Tensor:
    """Return x[positions], or x itself if these are all of its rows in order."""
    return x if positions == list(range(len(x))) else x[positions]


def _in_order(parts: list[Tensor], members: list[_Member]) -> Tensor:
    """Join each member's (1 or n, ...) into one tensor, with a row for each of the group's images in order."""
    rows = [part.expand(len(member.positions), *part.shape[1:]) for part, member in zip(parts, members, strict=True)]
    positions = [i for member in members for i in member.positions]
    if positions == sorted(positions):
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    return torch.cat(rows)[torch.tensor(positions).argsort()]
