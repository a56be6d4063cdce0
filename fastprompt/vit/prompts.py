"""The protocol between the graphs and the prompts that enter them; every prompt generator satisfies it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

from torch import Tensor

from fastprompt.vit.weights import Norm

Draws = Mapping[str, Tensor]
"""The random tensors of one forward by name: dropout masks, latent noise. An empty mapping means no randomness."""

NO_DRAWS: Final[Draws] = {}
"""The draws of a forward without randomness."""

Prefix = tuple[Tensor, ...]
"""What a block reads of prompts that depend on parameters only, each (1 or B, ...): keys and values (heads, P, d) of
prompts in the sequence; of tokens that only query, themselves (P, D) and `queries.asked` (heads · P, D); of prompts
that tokens cross-attend to, `cross.read_of`.
"""


class Apart(NamedTuple):
    """The rows of a batch before they are assembled into one sequence.

    Attributes:
        patches: (B, N, D), the output of the patch embedding.
        prefix: (1, R, D), class token and registers; None if the backbone has neither.
        position: the position embedding: (1, N, D) for the patches, (1, R + N, D) if it covers the prefix too, or None.
    """

    patches: Tensor
    prefix: Tensor | None
    position: Tensor | None


class Embedding(Protocol):
    """Class token, registers and patches of a batch, with position embedding and without prompts."""

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
        """The separate rows, until `tokens` or `patches` is read; None once they form one sequence."""


class Prompts(Protocol):
    """The prompts and the blocks they enter; `PromptGenerator` documents the members."""

    @property
    def role(self) -> str: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def num_prompts(self) -> int: ...
    @property
    def prompts_last(self) -> bool: ...
    @property
    def before_pre_norm(self) -> bool: ...

    def prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        """Return the prompts (1 or B, P, D) of block `layer`."""

    def first_prompts(self, context: Any, tokens: Tensor, draws: Draws, norm: Norm | None) -> Tensor:
        """Return block 0's prompts after the backbone's pre-norm."""

    def first_sequence(self, context: Any, apart: Apart, draws: Draws, norm: Norm | None) -> Tensor | None:
        """Return block 0's whole sequence, written in one pass over its rows; None if only prompts are available."""

    def plain_prompts(self, layer: int, context: Any, tokens: Tensor | None = None, draws: Draws = NO_DRAWS) -> Tensor:
        """Return the same as `prompts`, computed by the paper's own graph."""

    def gather(self, features: Tensor, answers: Sequence[Tensor]) -> Tensor:
        """Return the head's input (B, F) from the frozen features (B, D) and what queries became in their blocks."""


class Group(NamedTuple):
    """Consecutive images of a batch that share their prompts and their readout.

    Attributes:
        generator, context, draws: as for `reference.encode`.
        readout: as for `reference.read_out`.
        prefixes: the result of `static_prefixes` for these prompts; blocks that it lacks compute theirs.
        size: number of images; None: the whole batch.
    """

    generator: Prompts | None
    context: Any
    draws: Draws
    readout: str
    prefixes: Mapping[int, Prefix] | None = None
    size: int | None = None
