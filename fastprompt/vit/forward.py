"""The optimised forward of a prompted ViT: the same numbers as `reference.py` without computing unused results.

* Prompts that the next block replaces need no query, attention output, projection or MLP. They enter their block as
  keys and values only, and never become rows of the sequence.
* Prompts that are the same for every image have their keys and values computed once instead of once per image; at
  inference, once per adapter.
* The last block computes only the rows that the head reads. With one query row, W_k and W_v are absorbed into the
  query side, so no keys or values are computed at all. A rotary embedding keeps the keys, which it rotates row by row.
* The blocks come from `folding.fold`: their constants have moved into the Linears.
* The backward of the first block reaches only prompts: the tokens of a frozen embedding need no gradient.
* On a GPU, prompts that stay rows of the sequence are written directly to their final place (`slots.py`): PGN's
  mixture together with the whole sequence, others after the attention of their block, within the residual sum.
* Tokens that only query leave the frozen rows as they are, which then carry no gradient (`queries.py`).
* Groups of images with different prompts, prompt counts and readouts share every product with the frozen weights.

All of these are exact in real arithmetic, for outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.prefix_attention.reference import attend, unpacked, with_prefix
from fastprompt.vit import cross, queries, recomputed, reference
from fastprompt.vit.backbone import Backbone
from fastprompt.vit.folding import folded as folded
from fastprompt.vit.linear import linear, outputs_of
from fastprompt.vit.prompts import Apart, Embedding, Group, Prefix, Prompts
from fastprompt.vit.recomputed import ALL, Keep
from fastprompt.vit.rotary import rotated, turned
from fastprompt.vit.slots import LastRows, assembled, in_slots, sums
from fastprompt.vit.weights import Block, Folded, Norm, Turns

Projected = tuple[Tensor, Tensor | None, Tensor | None]
"""Queries, keys and values of tokens as `prefix_attention` takes them, packed or separate."""


Shapes = tuple[tuple[int, int], ...]
"""(B, T) of each of several groups whose rows are packed."""


class Rows(NamedTuple):
    """Token rows (B, T, D) of one group of images, or of several groups packed as (Σ B T, D) with each group's (B, T).

    Row-wise operations run over `data`, once for all groups. Other operations run over `parts`. `normed` is the input
    that the next block's projections read for `data`, if it is already known.
    """

    data: Tensor
    shapes: Shapes = ()
    normed: Tensor | None = None

    @classmethod
    def pack(cls, parts: Sequence[Tensor]) -> Rows:
        """Pack the rows (B, T, D) of each group."""
        if len(parts) == 1:
            return cls(parts[0])
        return cls(torch.cat([part.flatten(0, 1) for part in parts]), tuple((p.shape[0], p.shape[1]) for p in parts))

    def parts(self) -> list[Tensor]:
        """The (B, T, D) rows of each group, without a copy."""
        if not self.shapes:
            return [self.data]
        rows = self.data.split([images * length for images, length in self.shapes])
        return [part.unflatten(0, shape) for part, shape in zip(rows, self.shapes, strict=True)]


class Reads(NamedTuple):
    """The additional inputs of a block for one group of images, and which rows leave the block.

    Attributes:
        rows: the rows that leave, among those that enter; None: all.
        prefix: keys and values of prompts that are only read.
        joining: prompts (1 or B, P, D) that are read and appended to the rows.
        one_query: whether `rows` is the first row alone, computed without keys and values.
        prompts: prompts (1 or B, P, D) that this one query reads.
        constants: how many of the rows that enter, counted from the first, are constants in the backward.
        cross: what the rows that leave read of prompts after their attention (`cross.read_of`).
        turns: the rotation of queries and keys.
    """

    rows: slice | None = None
    prefix: Prefix | None = None
    joining: Tensor | None = None
    one_query: bool = False
    prompts: Tensor | None = None
    constants: int = 0
    cross: Prefix | None = None
    turns: Turns | None = None


class Embedded:
    """An `Embedding` that assembles its rows into one sequence on first access."""

    def __init__(self, vit: Backbone, apart: Apart, grid: tuple[int, int]) -> None:
        self.rows, self.num_prefix, self.grid = apart, vit.num_prefix, grid
        self._tokens: Tensor | None = None

    @property
    def apart(self) -> Apart | None:
        return self.rows if self._tokens is None else None

    @property
    def tokens(self) -> Tensor:
        if self._tokens is None:
            self._tokens = assembled(self.rows)
        return self._tokens

    @property
    def patches(self) -> Tensor:
        return self.tokens[:, self.num_prefix :]


def features(
    vit: Backbone,
    embedded: Embedding,
    groups: Sequence[Group],
    parts: Folded | None,
    recompute: bool = False,
    watch: Callable[[int, int, Rows, Sequence[Reads]], None] | None = None,
    first: int = 0,
    bits: int | None = None,
) -> list[Tensor]:
    """Compute the features that the head reads, (B, D) for each group.

    Args:
        embedded: class token, registers and patches from `embed`, one group after the other.
        groups: Linears and MLPs run over the rows of all groups; prompts and attention run per group.
        parts: the backbone's parts from `folded`.
        recompute: keep only each block's input for the backward and compute the block again there.
        watch: called before block i with i, the number of rows that are no prompts, and what enters the block.
        first: the block that `embedded` enters; its tokens come from the block before it.
        bits: of what the MLPs' activations keep for the backward (`Keep.bits`).
    """
    blocks = read_blocks(vit, parts)
    last = len(blocks) - 1
    turns = vit.turns(embedded.grid, vit.dtype)
    whole = _first_sequence(vit, embedded.apart, groups, last, parts)
    x = embedded.tokens if whole is None else whole.tokens
    own = x.shape[1] if whole is None else whole.own  # non-prompt rows come first
    sizes = [x.shape[0] if group.size is None else group.size for group in groups]
    own_prompts: list[Tensor | None] = [None]
    if whole is None:
        patches = _split(embedded.patches, sizes)
        own_prompts = [_first_prompts(vit, group, of_group) for group, of_group in zip(groups, patches, strict=True)]
        x = x if vit.norm_pre is None or first else vit.norm_pre(x)

    def reads(i: int, group: Group, known: Tensor | None, x: Tensor) -> Reads:
        """The inputs of block i for one group; prompt rows that stay come last."""
        generator = group.generator if has_role(group.generator, "sequence") else None
        layers = () if generator is None else generator.layers
        kept = slice(0, own) if i + 1 in layers else slice(0, None)  # the next block replaces all prompt rows
        if i == last:
            kept = rows_read(vit, group.readout, own)
        rows = None if kept.start == 0 and kept.stop in (None, x.shape[1]) else kept
        prompts = None
        if i == 0 and whole is not None:
            return Reads(rows, constants=own if rows is None and not whole.trains else 0)
        if generator is not None and i in layers:
            if group.prefixes is not None and i in group.prefixes:
                return Reads(rows, prefix=group.prefixes[i])
            prompts = known
            if i > 0 or prompts is None:
                patches = x[:, vit.num_prefix : own]
                prompts = generator.prompts(i, group.context, patches, group.draws).to(x.dtype)
            if prompts_stay(generator, i, last, group.readout):
                return Reads(rows, joining=prompts)
        if one_query(blocks[i], kept):
            return Reads(kept, one_query=True, prompts=prompts)
        return Reads(rows, prefix=None if prompts is None else prompt_keys(blocks[i], prompts))

    def step(i: int, x: Rows, following: Block | None, keep: Keep) -> Rows:
        read = [
            reads(i, *of_group)._replace(turns=turns[i])
            for of_group in zip(groups, own_prompts, x.parts(), strict=True)
        ]
        for j, (group, part) in enumerate(zip(groups, x.parts(), strict=True)):
            if has_role(group.generator, "cross", i):
                read[j] = read[j]._replace(cross=_crossed(vit, blocks[i], i, group, part))
        if watch is not None:
            watch(i, own, x, read)
        return run_block(blocks[i], x, read, following, keep)

    def ask(i: int, x: Rows) -> Rows:
        """Take the answers of the groups whose tokens only query; return x with its norm, which block i reads too."""
        asking = [j for j in querying if has_role(groups[j].generator, "queries", i)]
        if not asking:
            return x
        of_x = normed(blocks[i], x.data) if x.normed is None else x.normed
        x = x._replace(normed=of_x)
        of_groups = list(zip(x.parts(), x._replace(data=of_x).parts(), strict=True))
        for j in asking:
            answered[j].append(_answers(vit, blocks[i], i, groups[j], *of_groups[j], turns[i]))
        return x

    def alone(i: int, data: Tensor, shapes: Shapes, leaving: list[Shapes]) -> Tensor:
        """Compute block i from its rows alone, now and in the backward; append the shapes that leave it."""
        found = step(i, Rows(data, shapes), None, Keep(least, again=bool(leaving)))
        leaving.append(found.shapes)
        return found.data

    querying = [j for j, group in enumerate(groups) if has_role(group.generator, "queries")]
    answered: dict[int, list[Tensor]] = {j: [] for j in querying}
    recompute = recompute and not (querying and parts is not None)  # frozen rows save nothing
    nothing = bits is None and parts is not None and not torch.compiler.is_compiling()
    least = 0 if nothing else bits  # what blocks keep while they are computed again
    rows = Rows(x) if len(groups) == 1 else Rows(x.flatten(0, 1), tuple((size, own) for size in sizes))
    for i in range(first, len(blocks)):
        rows = ask(i, rows)
        if recompute and torch.is_grad_enabled():
            left: list[Shapes] = []
            data = checkpoint(alone, i, rows.data, rows.shapes, left, use_reentrant=False, preserve_rng_state=False)
            rows = Rows(data, left[0])
        else:
            rows = step(i, rows, None if i == last else blocks[i + 1], Keep(bits))
    rows = rows if vit.norm is None else rows._replace(data=vit.norm(rows.data))
    found = [reference.pool(vit, x, group.readout) for group, x in zip(groups, rows.parts(), strict=True)]
    for j in querying:
        generator = groups[j].generator
        assert generator is not None
        found[j] = generator.gather(found[j], answered[j])
    return found


def has_role(generator: Prompts | None, role: str, block: int | None = None) -> bool:
    """Whether there are prompts of this role (`PromptGenerator.role`), and in this block if one is given."""
    return generator is not None and generator.role == role and (block is None or block in generator.layers)


def _answers(vit: Backbone, block: Block, i: int, group: Group, x: Tensor, of_x: Tensor, turns: Turns | None) -> Tensor:
    """What a group's queries become in block i, (B, P, D), from its tokens x (B, T, D) and their norm."""
    generator = group.generator
    assert generator is not None
    if group.prefixes is not None and i in group.prefixes:
        tokens, wanted = group.prefixes[i]
        return queries.answers(block, tokens, of_x, wanted, turns)
    tokens = generator.prompts(i, group.context, x[:, vit.num_prefix :], group.draws).to(x.dtype)
    return queries.answers(block, tokens, of_x, turns=turns)


def _crossed(vit: Backbone, block: Block, i: int, group: Group, x: Tensor) -> Prefix:
    """What the tokens x (B, T, D) of a group that enter block i read of prompts by cross-attention."""
    generator = group.generator
    assert generator is not None
    if group.prefixes is not None and i in group.prefixes:
        return group.prefixes[i]
    return cross.read_of(block, generator.prompts(i, group.context, x[:, vit.num_prefix :], group.draws).to(x.dtype))


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    return [x] if len(sizes) == 1 else x.split(sizes)


class _Whole(NamedTuple):
    """Block 0's sequence with its prompts: rows, how many of them are the backbone's, and whether those train."""

    tokens: Tensor
    own: int
    trains: bool


def _first_sequence(
    vit: Backbone, apart: Apart | None, groups: Sequence[Group], last: int, parts: Folded | None
) -> _Whole | None:
    """Block 0's sequence if the generator writes all of it; None if it does not, or if there are several groups."""
    generator, context, draws, readout, *_ = groups[0]
    if apart is None or len(groups) > 1 or generator is None or not generator.before_pre_norm:
        return None
    if 0 not in generator.layers or not prompts_stay(generator, 0, last, readout):
        return None
    tokens = generator.first_sequence(context, apart, draws, vit.norm_pre)
    if tokens is None:
        return None
    trains = parts is None or any(x is not None and x.requires_grad for x in apart)
    return _Whole(tokens, vit.num_prefix + apart.patches.shape[1], trains)


def _first_prompts(vit: Backbone, group: Group, patches: Tensor) -> Tensor | None:
    """Block 0's prompts if they pass through the backbone's pre-norm; None if they do not."""
    generator = group.generator
    if generator is None or not generator.before_pre_norm:
        return None
    return generator.first_prompts(group.context, patches, group.draws, vit.norm_pre)


def embed(vit: Backbone, raw: Tensor, images: Tensor, parts: Folded | None) -> Embedding:
    """Compute `reference.embed` of `images`, from the `raw` uint8 pixels they came from if possible."""
    pixels = None
    if raw.dtype == torch.uint8 and parts is not None and parts.pixels is not None and not vit.spec.dynamic_pad:
        images, pixels = raw, parts.pixels
    if not in_slots(images):
        return reference.embed(vit, images.to(vit.dtype), pixels)
    patches, grid = reference.embed_patches(vit, images.to(vit.dtype), pixels)
    prefix: list[Tensor] = [x for x in (vit.cls_token, vit.registers) if x is not None]
    constants = torch.cat(prefix, dim=1) if len(prefix) > 1 else prefix[0] if prefix else None
    return Embedded(vit, Apart(patches, constants, reference.position_embedding(vit, grid)), grid)


def read_blocks(vit: Backbone, parts: Folded | None) -> Sequence[Block]:
    """Return the blocks for the forward: folded unless the weights train."""
    return vit.blocks if parts is None else parts.blocks


def static_prefixes(vit: Backbone, generator: Prompts, readout: str, parts: Folded | None) -> dict[int, Prefix]:
    """Map each block that only reads its prompts to what it reads of them, if they depend on parameters only."""
    blocks = read_blocks(vit, parts)
    last = len(blocks) - 1
    if generator.role == "cross":
        return {i: cross.read_of(blocks[i], generator.prompts(i, None).to(vit.dtype)) for i in generator.layers}
    if generator.role == "queries":
        tokens = {i: generator.prompts(i, None).to(vit.dtype) for i in generator.layers if queries.absorbs(blocks[i])}
        return {i: (of_block, queries.asked(blocks[i], of_block)) for i, of_block in tokens.items()}
    return {
        i: prompt_keys(blocks[i], generator.prompts(i, None).to(vit.dtype))
        for i in generator.layers
        if not prompts_stay(generator, i, last, readout)
        and not (i == 0 and generator.before_pre_norm)
        and not (i == last and one_query(blocks[i], rows_read(vit, readout, 0)))
    }


def prompts_stay(generator: Prompts, i: int, last: int, readout: str) -> bool:
    """Whether prompts that enter block i are rows of its output."""
    return "prompts" in readout if i == last else i + 1 not in generator.layers


def rows_read(vit: Backbone, readout: str, own: int) -> slice:
    """Return the rows of the last block's output that `reference.read_out` reads.

    `own`: the number of class, register and patch tokens.
    """
    if readout == "cls":
        return slice(0, 1)
    if readout == "cls+dist":
        return slice(0, 2)
    if readout == "prompts":
        return slice(own, None)
    if readout == "patches+prompts":
        return slice(vit.num_prefix, None)
    return slice(0 if vit.spec.pool_prefix else vit.num_prefix, own)


def one_query(block: Block, rows: slice) -> bool:
    """Whether `one_query_block` can compute the block's output: one row, and no norm on the keys."""
    return rows == slice(0, 1) and block.k_norm is None


def prompt_keys(block: Block, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the keys and values of prompts (1 or B, P, D) that enter the block."""
    inner = block.num_heads * block.head_dim
    k, v = heads(block, outputs_of(block.qkv, normed(block, prompts), slice(inner, None)), 2)
    return _norm(block.k_norm, k), v


def run_block(block: Block, x: Rows, reads: Sequence[Reads], following: Block | None = None, keep: Keep = ALL) -> Rows:
    """Run one encoder block over the rows of all groups.

    Returns the rows that leave the block, as each group's `Reads` says, with the input of the `following` block's
    projections.
    """
    if len(reads) == 1 and reads[0].joining is not None and in_slots(x.data):
        data = join(block, x, reads[0])
        of_mlp = data if block.post_norm or keep.bits == 0 else block.norm2(data)
        data, of_data = add_mlp(block, data, of_mlp, following, keep)
        return Rows(data, normed=of_data)
    h = attention(block, x, reads)
    if any(read.rows is not None or read.joining is not None for read in reads):
        x = Rows.pack([_leaving(part, read) for part, read in zip(x.parts(), reads, strict=True)])
    if any(read.cross is not None for read in reads):
        data, of_data = add_crossed(block, x, h, reads, following, keep)
    else:
        data, of_data = add_branches(block, x.data, h, following, keep)
    return x._replace(data=data, normed=of_data)


def _leaving(x: Tensor, read: Reads) -> Tensor:
    x = x if read.rows is None else x[:, read.rows]
    return x if read.joining is None else _append(x, read.joining, dim=1)


def attention(block: Block, x: Rows, reads: Sequence[Reads]) -> Tensor:
    """Compute the projected attention of [x[:, rows], joining] over [prefix or joining, x] for each group.

    x is the block's input. The result has the layout of `Rows.data`.
    """
    constants = reads[0].constants if x.data.requires_grad else 0
    of_x = x._replace(
        data=x.normed if x.normed is not None else normed(block, x.data.detach() if constants else x.data)
    )
    projected = projections(block, of_x, reads)
    if constants:
        rows = block.qkv(normed(block, x.data[:, constants:]))
        projected = [(packed(block, LastRows.apply(projected[0][0].flatten(2), rows), 3), None, None)]
    outs = []
    for of_group, own, read in zip(of_x.parts(), projected, reads, strict=True):
        if read.one_query:
            outs.append(one_query_attention(block, own[0], of_group, read))
            continue
        prefix, norms = read.prefix, block.q_norm is not None or block.k_norm is not None
        if read.turns is not None and read.rows is None and read.joining is None and not norms:
            own = rotated(own[0], read.turns, block.interleaved), None, None
        elif read.turns is not None or read.joining is not None or norms:
            query, k, v = unpacked(*own)
            if read.joining is not None:
                of_prompts = outputs_of(block.qkv, normed(block, read.joining), slice(None)).to(query.dtype)
                prompt_q, prompt_k, prompt_v = heads(block, of_prompts, 3)
                query, prefix = _append(query, prompt_q, dim=2), (_norm(block.k_norm, prompt_k), prompt_v)
            own = (
                turned(_norm(block.q_norm, query), block, read.turns, read.rows),
                turned(_norm(block.k_norm, k), block, read.turns),
                v,
            )
        out = attended(block, *own, prefix, score_bias(block, of_group, read))
        outs.append(out.transpose(1, 2).flatten(2))
    return block.proj(_norm(block.attn_norm, Rows.pack(outs).data))


def attended(
    block: Block, q: Tensor, k: Tensor | None, v: Tensor | None, prefix: Prefix | None, bias: Tensor | None
) -> Tensor:
    """Compute attention over [prefix, k] with a bias (1, heads, R, T) of the scores with k, or none.

    Keys and values of prompts are cast to the queries' dtype, which may be narrower than the rows'.
    """
    prefix_k, prefix_v = (None, None) if prefix is None else (each.to(q.dtype) for each in prefix)
    if bias is None or (in_slots(q) and not bias.requires_grad):
        return prefix_attention(q, k, v, prefix_k, prefix_v, bias=bias, scale=block.scale)
    q, k, v = unpacked(q, k, v)  # the operator would write the bias out for each image
    bias = bias if prefix_k is None else F.pad(bias, (prefix_k.shape[2], 0))
    return attend(q, with_prefix(prefix_k, k), with_prefix(prefix_v, v), bias.to(q.dtype), block.scale)


def score_bias(block: Block, x: Tensor, read: Reads) -> Tensor | None:
    """Return the bias (1, heads, R, T) of the queries that leave the block with all rows of x; 0 for prompts."""
    if block.bias is None:
        return None
    bias: Tensor = block.bias()
    joined = x.shape[1] - bias.shape[3]  # prompts that are rows already come last
    bias = F.pad(bias, (0, joined, 0, joined)) if joined else bias
    bias = bias if read.rows is None else bias[:, :, read.rows]
    return bias if read.joining is None else F.pad(bias, (0, 0, 0, read.joining.shape[1]))


def projections(block: Block, x: Rows, reads: Sequence[Reads]) -> list[Projected]:
    """Compute queries of x[:, rows], keys and values of x for each group. x: the input of the block's projections."""
    inner = block.num_heads * block.head_dim
    if all(read.rows is None for read in reads):
        qkv = x._replace(data=block.qkv(x.data))
        return [(packed(block, rows, 3), None, None) for rows in qkv.parts()]
    parts = x.parts()
    q = Rows.pack([rows if r.rows is None else rows[:, r.rows] for rows, r in zip(parts, reads, strict=True)])
    queries = q._replace(data=outputs_of(block.qkv, q.data, slice(0, inner))).parts()
    projected: list[Projected] = [(packed(block, rows, 1).squeeze(2).transpose(1, 2), None, None) for rows in queries]
    keyed = [i for i, read in enumerate(reads) if not read.one_query]
    if keyed:
        kv = Rows.pack([parts[i] for i in keyed])
        of_kv = kv._replace(data=outputs_of(block.qkv, kv.data, slice(inner, None))).parts()
        for i, rows in zip(keyed, of_kv, strict=True):
            projected[i] = (projected[i][0], packed(block, rows, 2), None)
    return projected


def join(block: Block, x: Rows, read: Reads) -> Tensor:
    """Compute the MLP's input (B, R + P, D) for one group whose prompts join the sequence.

    It is x[:, rows] and the prompts, each plus its projected attention over all of x and the prompts. Each part is
    written directly to its rows.
    """
    prompts, rows = read.joining, x.data if read.rows is None else x.data[:, read.rows]
    assert prompts is not None
    of_x = x._replace(data=normed(block, x.data) if x.normed is None else x.normed)
    query, k, v = unpacked(*projections(block, of_x, [read])[0])
    of_prompts = outputs_of(block.qkv, normed(block, prompts), slice(None)).to(query.dtype)
    prompt_q, prompt_k, prompt_v = heads(block, of_prompts, 3)
    keys, prefix = (turned(_norm(block.k_norm, k), block, read.turns), v), (_norm(block.k_norm, prompt_k), prompt_v)
    query, prompt_q = turned(_norm(block.q_norm, query), block, read.turns, read.rows), _norm(block.q_norm, prompt_q)

    def branch(q: Tensor, bias: Tensor | None) -> Tensor:
        out = attended(block, q, *keys, prefix, bias).transpose(1, 2).flatten(2)
        h = block.proj(_norm(block.attn_norm, out))
        if block.post_norm:
            return block.norm1(h)
        return h if block.ls1 is None else h * block.ls1

    of_prompts = branch(prompt_q.expand(rows.shape[0], -1, -1, -1), None)
    return sums(rows, branch(query, score_bias(block, x.data, read._replace(joining=None))), prompts, of_prompts)


def one_query_attention(block: Block, q: Tensor, rows: Tensor, read: Reads) -> Tensor:
    """Compute attention (B, 1, heads · d) of one query q (B, heads, 1, d) over normed `rows` (B, T, D) and prompts.

    q kᵀ = (q W_k) xᵀ and a v = (a x) W_vᵀ for each head, so no token needs a key or a value. b_k cancels in the
    softmax. With a rotation between W_k and the query, which differs from row to row, rows and prompts need keys.
    """
    inner, (b, t, d) = block.num_heads * block.head_dim, rows.shape
    prompts = None if read.prompts is None else normed(block, read.prompts)
    _, w_k, w_v = block.qkv.weight.split(inner)
    q = _norm(block.q_norm, q) * block.scale
    if read.turns is None:
        q = (q.squeeze(2).transpose(0, 1) @ w_k.view(block.num_heads, -1, d)).transpose(0, 1)  # (B, heads, D)
        scores = q @ rows.transpose(1, 2)  # (B, heads, T)
        of_prompts = None if prompts is None else q @ prompts.transpose(1, 2)
    else:
        bias = None if block.qkv.bias is None else block.qkv.bias[inner : 2 * inner]
        q = turned(q, block, read.turns, read.rows)
        (k,) = heads(block, linear(rows, w_k, bias), 1)  # (B, heads, T, d)
        scores, of_prompts = (q @ turned(k, block, read.turns).transpose(2, 3)).squeeze(2), None
        if prompts is not None:
            (k,) = heads(block, linear(prompts, w_k, bias), 1)
            of_prompts = (q @ k.transpose(2, 3)).squeeze(2)
    if (own := score_bias(block, rows, read)) is not None:
        scores = scores + own.squeeze(2)
    if of_prompts is not None:
        scores = torch.cat([scores, of_prompts], dim=2)
    weights = scores.softmax(dim=2)
    out = weights[:, :, :t] @ rows  # (B, heads, D)
    if prompts is not None:
        out = out + weights[:, :, t:] @ prompts
    out = out.transpose(0, 1) @ w_v.view(block.num_heads, -1, d).transpose(1, 2)  # (heads, B, d)
    out = out.transpose(0, 1).reshape(b, 1, inner)
    return out if block.qkv.bias is None else out + block.qkv.bias[2 * inner :]


def add_branches(
    block: Block, x: Tensor, h: Tensor, following: Block | None = None, keep: Keep = ALL
) -> tuple[Tensor, Tensor | None]:
    """Compute the block's output from its input rows x and their projected attention h, both (B, R, D).

    Also returns the input of the `following` block's projections.
    """
    if block.post_norm:
        x = x + block.norm1(h)
        return add_mlp(block, x, x, following, keep)
    h = h if block.ls1 is None else h * block.ls1
    if keep.bits == 0:
        x = x + h
        return add_mlp(block, x, x, following, keep)
    return add_mlp(block, *added(x, h, block.norm2), following, keep)


def add_crossed(
    block: Block, x: Rows, h: Tensor, reads: Sequence[Reads], following: Block | None, keep: Keep
) -> tuple[Tensor, Tensor | None]:
    """Compute `add_branches` with the cross-attention of groups whose tokens read prompts after their attention."""
    if block.post_norm:
        data = of_data = x.data + block.norm1(h)
    else:
        data, of_data = added(x.data, h if block.ls1 is None else h * block.ls1, block.norm1)
    parts = x._replace(data=of_data).parts()
    h = Rows.pack(
        [
            torch.zeros_like(part) if read.cross is None else cross.attention(block, part, read.cross)
            for part, read in zip(parts, reads, strict=True)
        ]
    ).data
    return add_branches(block, data, h, following, keep)


def add_mlp(
    block: Block, x: Tensor, of_x: Tensor, following: Block | None = None, keep: Keep = ALL
) -> tuple[Tensor, Tensor | None]:
    """Compute the block's output from x (B, R, D), the residual before the MLP, and `of_x`, the MLP's input.

    An MLP that keeps nothing norms x itself, and does not read `of_x`. Returns the same as `add_branches`.
    """
    if keep.bits == 0:
        h = recomputed.mlp(None if block.post_norm else block.norm2, block.mlp, x, keep.again and not block.post_norm)
    else:
        h = reference.mlp(block.mlp, of_x, keep.bits)
    if block.post_norm:
        return x + block.norm2(h), None
    h = h if block.ls2 is None else h * block.ls2
    return (x + h, None) if following is None or following.post_norm else added(x, h, following.norm1)


def added(x: Tensor, h: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Return x + h and its norm."""
    plain = norm.kind == "layernorm" and norm.weight is None and norm.bias is None and not norm.upcast
    if plain and x.dtype == h.dtype and x.shape[-2] > 1:  # one row of an image is not worth a kernel
        return add_norm(x, h, norm.eps)
    x = x + h
    return x, norm(x)


def normed(block: Block, x: Tensor) -> Tensor:
    """Return the input of the block's first Linear for its input rows."""
    return x if block.post_norm else block.norm1(x)


def packed(block: Block, x: Tensor, parts: int) -> Tensor:
    """Reshape (B, T, parts · heads · d) to (B, T, parts, heads, d)."""
    return x.unflatten(-1, (parts, block.num_heads, block.head_dim))


def heads(block: Block, x: Tensor, parts: int) -> tuple[Tensor, ...]:
    """Split (B, T, parts · heads · d) into `parts` tensors (B, heads, T, d)."""
    return packed(block, x, parts).permute(2, 0, 3, 1, 4).unbind(0)


def _norm(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _append(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Append `rows` (1 or B, ...) to x for every image."""
    return torch.cat([x, rows.expand(x.shape[0], *rows.shape[1:])], dim=dim)
