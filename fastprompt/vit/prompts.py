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


class Apart(NamedTuple):
    """The rows of a batch before they stand in one sequence.

    Attributes:
        patches: (B, N, D), as the patch embedding leaves them.
        prefix: (1, R, D), class token and registers; None: the backbone has neither.
        position: (1, N, D), the position embedding of the patches, or (1, R + N, D), that of the prefix too, or None.
    """

    patches: Tensor
    prefix: Tensor | None
    position: Tensor | None


class Embedding(Protocol):
    """Class token, registers and patches of a batch, with position embedding, without prompts."""

    @property
    def tokens(self) -> Tensor:
        """(B, R + N, D)."""

    @property
    def patches(self) -> Tensor:
        """(B, N, D), a view of `tokens`."""

    @property
    def num_prefix(self) -> int:
        """R."""

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of the patches."""

    @property
    def apart(self) -> Apart | None:
        """The rows, where they do not stand in one sequence until `tokens` or `patches` is read; None: they do."""


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

    def first_sequence(self, context: Any, apart: Apart, draws: Draws, norm: Norm | None) -> Tensor | None:
        """Block 0's whole sequence, in one pass over its rows; None: prompts alone can be had."""

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
