"""What a frozen ViT computes of an image whatever the prompts are, so that training can keep it.

* Tokens that only query leave all rows as they are. Constants are the frozen feature and, for each block, the input of
  its projections (`inputs`), or its keys and values (`keys`).
* Prompts that start at block k leave the rows before it as they are. The constant is what enters block k.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fastprompt.vit import forward, queries, reference
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.prompts import Embedding, Group
from fastprompt.vit.weights import Folded, Turns

KEEPS = ("inputs", "keys")


def of_queries(
    vit: Backbone, embedded: Embedding, layers: Sequence[int], readout: str, parts: Folded, keep: str
) -> dict[str, Tensor]:
    """Return the frozen "features" (B, D), and of each block i in `layers`, with a row per image:

    "inputs.i" (T, D), or with `keep` "keys", "keys.i" and "values.i" (heads, T, d). With a rotary embedding, keys are
    rotated, and beside inputs there is the "grid" (2,) of the patches.
    """
    found, x, turns = dict[str, Tensor](), embedded.tokens, vit.turns(embedded.grid, vit.dtype)
    for i, rows in enumerate(_entering(vit, embedded, parts)):
        x = rows.data
        if i not in layers:
            continue
        block = parts.blocks[i]
        of_x = forward.normed(block, x) if rows.normed is None else rows.normed
        if keep == "inputs":
            found[f"inputs.{i}"] = of_x
        else:
            found[f"keys.{i}"], found[f"values.{i}"] = queries.keys_and_values(block, of_x, turns[i])
    x = x if vit.norm is None else vit.norm(x)
    read = forward.rows_read(vit, readout, x.shape[1])
    if vit.rotary is not None and keep == "inputs":
        found["grid"] = of_grid(embedded, x)
    return {"features": reference.pool(vit, x[:, read], readout), **found}


def of_grid(embedded: Embedding, rows: Tensor) -> Tensor:
    """Return the grid (B, 2) of the patches of each image of `rows` (B, ...)."""
    return torch.tensor(embedded.grid, device=rows.device).expand(len(rows), -1)


def before(vit: Backbone, embedded: Embedding, block: int, parts: Folded) -> Tensor:
    """Return the rows (B, T, D) that enter a block if no block before it has prompts."""
    return next(rows.data for i, rows in enumerate(_entering(vit, embedded, parts)) if i == block)


def _entering(vit: Backbone, embedded: Embedding, parts: Folded) -> Iterator[forward.Rows]:
    """Yield the rows that enter each block without prompts, and at last those that leave the last one."""
    x = embedded.tokens
    rows = forward.Rows(x if vit.norm_pre is None else vit.norm_pre(x))
    turns = vit.turns(embedded.grid, vit.dtype)
    for block, following, of_block in zip(parts.blocks, (*parts.blocks[1:], None), turns, strict=True):
        yield rows
        rows = forward.run_block(block, rows, [forward.Reads(turns=of_block)], following)
    yield rows


def answers(
    block: int, tokens: Tensor, constants: Mapping[str, Tensor], parts: Folded, turns: Turns | None = None
) -> Tensor:
    """Return what queries (1 or B, P, D) become in a block, (B, P, D), from the constants of `of_queries`.

    `turns`: the rotation of its keys on the kept "grid".
    """
    inputs = constants.get(f"inputs.{block}")
    if inputs is not None:
        return queries.answers(parts.blocks[block], tokens, inputs.to(tokens.dtype), turns=turns)
    kv = (constants[f"{name}.{block}"].to(tokens.dtype) for name in ("keys", "values"))
    return queries.answers_from_keys(parts.blocks[block], tokens, *kv)


def features_behind(
    vit: Backbone,
    rows: Tensor,
    grid: tuple[int, int],
    block: int,
    groups: Sequence[Group],
    parts: Folded,
    recompute: bool = False,
    bits: int | None = None,
) -> list[Tensor]:
    """Return the features (B, D) that each group's head reads, from all rows that enter `block` (`before`)."""
    entering = reference.Sequence(rows, vit.num_prefix, grid=grid)
    return forward.features(vit, entering, groups, parts, recompute, first=block, bits=bits)
