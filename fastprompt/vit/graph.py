"""The graphs of each architecture: the papers' own and the optimised one, behind the same functions."""

from __future__ import annotations

from collections.abc import Sequence as Groups
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from fastprompt.vit import attention_maps, forward, reference, swin_forward, swin_reference
from fastprompt.vit.attention_maps import AttentionMap
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.prompts import NO_DRAWS, Draws, Embedding, Group, Prefix, Prompts
from fastprompt.vit.reference import Sequence
from fastprompt.vit.weights import Folded


class Papers(Protocol):
    """The papers' own graph, unoptimised. `reference.py` documents the functions."""

    def embed(self, vit: Backbone, images: Tensor) -> Sequence: ...

    def encode(
        self,
        vit: Backbone,
        images: Tensor,
        generator: Prompts | None = None,
        context: Any = None,
        draws: Draws = NO_DRAWS,
        embedded: Sequence | None = None,
    ) -> Sequence: ...

    def read_out(self, vit: Backbone, sequence: Sequence, readout: str) -> Tensor: ...


class Rewritten(Protocol):
    """The same numbers without computing unused results. `forward.py` documents the functions."""

    def embed(self, vit: Backbone, raw: Tensor, images: Tensor, parts: Folded | None) -> Embedding: ...

    def features(
        self,
        vit: Backbone,
        embedded: Embedding,
        groups: Groups[Group],
        parts: Folded | None,
        recompute: bool = False,
        *,
        bits: int | None = None,
    ) -> list[Tensor]: ...

    def static_prefixes(
        self, vit: Backbone, generator: Prompts, readout: str, parts: Folded | None
    ) -> dict[int, Prefix]: ...

    def folded(self, vit: Backbone) -> Folded | None: ...


class Maps(Protocol):
    """What each block attends to, by the two graphs. `attention_maps.py` documents the functions."""

    def papers_maps(
        self, vit: Backbone, images: Tensor, generator: Prompts | None, context: Any, draws: Draws, embedded: Sequence
    ) -> list[AttentionMap]: ...

    def rewritten_maps(
        self, vit: Backbone, embedded: Embedding, group: Group, parts: Folded | None
    ) -> list[AttentionMap]: ...


class Graph(NamedTuple):
    """The computation of one architecture's backbones.

    Attributes:
        papers, rewritten: the two graphs.
        maps: attention maps; None where attention runs in windows.
        prompted_readout: the readout that the papers use for a prompted model; None: that of the backbone's own head.
    """

    papers: Papers
    rewritten: Rewritten
    maps: Maps | None = None
    prompted_readout: str | None = None


VIT = Graph(reference, forward, attention_maps)
SWIN = Graph(swin_reference, swin_forward, prompted_readout="patches+prompts")
