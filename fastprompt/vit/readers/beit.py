"""Reader for timm's models with a relative position bias: `Beit` and `VisionTransformerRelPos`."""

from __future__ import annotations

from typing import Any

import torch
from timm import layers as tl
from timm.models import beit, vision_transformer_relpos as relpos

from fastprompt.vit.readers import timm_layers as layers
from fastprompt.vit.readers.parts import refuse, relative_bias
from fastprompt.vit.weights import Block, Dense, RelativeBias

Pair = tuple[int, int]


def read(model: Any) -> dict[str, Any]:
    """Read the canonical parts of timm's `Beit` or `VisionTransformerRelPos`; see `FrozenViT`.

    A bias that comes from an MLP over coordinates is read as the table that it yields.

    Raises:
        ValueError: a part that cannot be represented. The error names it.
    """
    grid = tuple(model.patch_embed.grid_size)
    read_block = _beit_block if type(model) is beit.Beit else _relpos_block
    shared = model.rel_pos_bias if type(model) is beit.Beit else model.shared_rel_pos
    parts = layers.common(model, [read_block(block, shared, grid) for block in model.blocks])
    if layers.resampled(model):  # timm has resampled all tables
        names = [f"blocks.{i}.bias.table" for i, block in enumerate(parts["blocks"]) if block.bias is not None]
        parts["loaded"] |= dict.fromkeys(names)
    return parts


def _beit_block(module: Any, shared: Any, grid: Pair) -> Block:
    if type(module) is not beit.Block:
        refuse("block", type(module).__name__, "Beit's Block")
    attn: Any = module.attn
    found = (x.relative_position_bias_table for x in (attn, shared) if x is not None)
    tables = [table for table in found if table is not None]
    bias = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    return Block(
        norm1=layers.block_norm(module.norm1),
        qkv=Dense(attn.qkv.weight, bias),
        proj=layers.dense(attn.proj),
        norm2=layers.block_norm(module.norm2),
        mlp=layers.mlp(module.mlp),
        num_heads=attn.num_heads,
        ls1=module.gamma_1,
        ls2=module.gamma_2,
        bias=relative_bias(*tables, grid=grid) if tables else None,
    )


def _relpos_block(module: Any, shared: Any, grid: Pair) -> Block:
    if type(module) not in (relpos.RelPosBlock, relpos.ResPostRelPosBlock):
        refuse("block", type(module).__name__, "RelPosBlock, ResPostRelPosBlock")
    attn, post_norm = module.attn, type(module) is relpos.ResPostRelPosBlock
    position = shared if attn.rel_pos is None else attn.rel_pos
    return Block(
        norm1=layers.block_norm(module.norm1),
        qkv=layers.dense(attn.qkv),
        proj=layers.dense(attn.proj),
        norm2=layers.block_norm(module.norm2),
        mlp=layers.mlp(module.mlp),
        num_heads=attn.num_heads,
        q_norm=layers.norm(attn.q_norm),
        k_norm=layers.norm(attn.k_norm),
        ls1=None if post_norm else layers.layer_scale(module.ls1),
        ls2=None if post_norm else layers.layer_scale(module.ls2),
        post_norm=post_norm,
        bias=None if position is None else _of_position(position, grid),
    )


def _of_position(module: Any, grid: Pair) -> RelativeBias:
    if type(module) is tl.RelPosBias:
        return relative_bias(module.relative_position_bias_table, grid=grid)
    if type(module) is not tl.RelPosMlp:
        refuse("relative position", type(module).__name__, "RelPosBias, RelPosMlp")
    with torch.no_grad():
        table = module.bias_act(module.mlp(module.rel_coords_log)) * (module.bias_gain or 1)
    table = table.reshape(2 * grid[0] - 1, 2 * grid[1] - 1, -1).permute(2, 0, 1)
    return RelativeBias(table, table.new_zeros(len(table), 3) if module.prefix_tokens else None)
