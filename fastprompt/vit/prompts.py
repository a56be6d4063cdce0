"""What the graphs ask of the prompts that enter them: the protocol that every prompt generator satisfies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, Protocol

from torch import Tensor

from fastprompt.vit.weights import Norm

Draws = Mapping[str, Tensor]
"""The random tensors of one forward by name: dropout masks, latent noise. Empty: nothing is random."""

NO_DRAWS: Final[Draws] = {}
"""The draws of a forward without randomness."""

Prefix = tuple[Tensor, Tensor]
"""Keys and values of prompts, each (1 or B, heads, P, d)."""


class Prompts(Protocol):
    """Where prompts enter a backbone and which they are; `PromptGenerator` documents the members."""

    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def num_prompts(self) -> int: ...
    @property
    def prompts_last(self) -> bool: ...
    @property
    def before_pre_norm(self) -> bool: ...

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        """(1 or B, P, D) prompts of block `layer`."""

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws, norm: Norm | None) -> Tensor:
        """Block 0's prompts behind the backbone's pre-norm."""

    def plain_prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        """`prompts` by the paper's own graph."""


class Group(NamedTuple):
    """Images that stand side by side in a batch and share their prompts and their readout.

    Attributes:
        generator, context, draws: as for `reference.encode`.
        readout: as for `reference.read_out`.
        prefixes: block → what `static_prefixes` returned for these prompts; other blocks compute theirs.
        size: number of images; None: the whole batch.
    """

    generator: Prompts | None
    context: Any
    draws: Draws
    readout: str
    prefixes: Mapping[int, Prefix] | None = None
    size: int | None = None
