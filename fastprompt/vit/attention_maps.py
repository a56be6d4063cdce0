"""What each block of a prompted ViT attends to, in the papers' graph and in the rewritten one."""

from __future__ import annotations

from collections.abc import Sequence as Groups
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.vit import forward, reference
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.linear import linear
from fastprompt.vit.prompts import Draws, Embedding, Group, Prompts
from fastprompt.vit.rotary import turned
from fastprompt.vit.weights import Folded

KINDS = ("cls", "registers", "patches", "prompts")


class AttentionMap(NamedTuple):
    """The attention weights of one block.

    Attributes:
        weights: (B, heads, Q, K); each row is a softmax over the keys.
        queries: kind of token ("cls", "registers", "patches", "prompts") → its rows.
        keys: kind of token → its columns.
    """

    weights: Tensor
    queries: dict[str, slice]
    keys: dict[str, slice]

    def between(self, query: str, key: str) -> Tensor:
        """Return the weights (B, heads, q, k) with which tokens of kind `query` attend to those of kind `key`.

        Raises:
            ValueError: there are no such tokens, or the rewritten graph does not compute these queries.
        """
        for name, value, known in (("query", query, self.queries), ("key", key, self.keys)):
            if value not in known:
                raise ArgumentError(name, f"must be one of {tuple(known)} in this block, got {value!r}")
        return self.weights[:, :, self.queries[query], self.keys[key]]


def papers_maps(
    vit: Backbone, images: Tensor, generator: Prompts | None, context: Any, draws: Draws, embedded: reference.Sequence
) -> list[AttentionMap]:
    """Run `reference.encode` and return each block's attention; every token is a query."""
    maps: list[AttentionMap] = []

    def watch(i: int, x: reference.Sequence) -> None:
        block, turns = vit.blocks[i], vit.turns(x.grid, x.tokens.dtype)[i]
        q, k, _ = forward.heads(block, block.qkv(forward.normed(block, x.tokens)), 3)
        q, k = (h if norm is None else norm(h) for h, norm in ((q, block.q_norm), (k, block.k_norm)))
        if turns is not None:
            turns = turns._replace(first=x.first_patch)
            q, k = reference.rotated(q, turns), reference.rotated(k, turns)
        bias = None if block.bias is None else reference.between_prompts(block.bias(), x.prompt_rows)
        first = vit.num_prefix if x.prompts_last else vit.num_prefix + x.num_prompts
        num_patches = x.tokens.shape[1] - vit.num_prefix - x.num_prompts
        prompts = first + num_patches if x.prompts_last else vit.num_prefix
        names = _own(vit, first, num_patches) | _named("prompts", prompts, x.num_prompts)
        maps.append(AttentionMap(_softmax(q, k, block.scale, bias), names, dict(names)))

    reference.encode(vit, images, generator, context, draws, embedded, watch)
    return maps


def rewritten_maps(vit: Backbone, embedded: Embedding, group: Group, parts: Folded | None) -> list[AttentionMap]:
    """Run `forward.features` on one group and return each block's attention; the queries are those it computes."""
    maps: list[AttentionMap] = []
    blocks = forward.read_blocks(vit, parts)

    def watch(i: int, own: int, x: forward.Rows, reads: Groups[forward.Reads]) -> None:
        block, [read] = blocks[i], reads
        inner, weight, bias = block.num_heads * block.head_dim, block.qkv.weight, block.qkv.bias
        tokens = forward.normed(block, x.data) if x.normed is None else x.normed  # (B, T, D)

        def project(rows: Tensor, part: int) -> Tensor:
            chosen = slice(part * inner, (part + 1) * inner)
            [heads] = forward.heads(block, linear(rows, weight[chosen], None if bias is None else bias[chosen]), 1)
            norm = (block.q_norm, block.k_norm)[part]
            return heads if norm is None else norm(heads)

        length = tokens.shape[1]
        keys = _own(vit, vit.num_prefix, own - vit.num_prefix) | _named("prompts", own, length - own)
        start, stop, _ = (slice(None) if read.rows is None else read.rows).indices(length)
        queries = {
            name: slice(max(at.start, start) - start, min(at.stop, stop) - start)
            for name, at in keys.items()
            if max(at.start, start) < min(at.stop, stop)
        }
        q = turned(project(tokens[:, start:stop], 0), block, read.turns, read.rows)
        k, of_scores = turned(project(tokens, 1), block, read.turns), forward.score_bias(block, x.data, read)
        prompts = read.joining if read.joining is not None else read.prompts
        if prompts is not None or read.prefix is not None:
            rows = None if prompts is None else forward.normed(block, prompts)
            joined = read.prefix[0] if rows is None else project(rows, 1)  # type: ignore[index]
            k = torch.cat([k, joined.expand(len(k), -1, -1, -1)], dim=2)
            keys |= _named("prompts", length, joined.shape[2])
            of_scores = None if of_scores is None else F.pad(of_scores, (0, joined.shape[2]))
            if read.joining is not None:
                assert rows is not None
                queries |= _named("prompts", q.shape[2], joined.shape[2])
                q = torch.cat([q, project(rows, 0).expand(len(q), -1, -1, -1)], dim=2)
        maps.append(AttentionMap(_softmax(q, k, block.scale, of_scores), queries, keys))

    forward.features(vit, embedded, [group], parts, watch=watch)
    return maps


def _softmax(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    return (scores if bias is None else scores + bias).softmax(dim=-1)


def _named(name: str, start: int, length: int) -> dict[str, slice]:
    return {name: slice(start, start + length)} if length else {}


def _own(vit: Backbone, patches: int, num_patches: int) -> dict[str, slice]:
    """The kinds of the backbone's own tokens; `patches` is the first patch's row."""
    classes = int(vit.spec.has_cls)
    return (
        _named("cls", 0, classes)
        | _named("registers", classes, vit.num_prefix - classes)
        | _named("patches", patches, num_patches)
    )
