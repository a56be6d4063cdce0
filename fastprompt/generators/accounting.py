"""Inputs and outputs of a method's cost formula; `fastprompt.cost` adds its result to the backbone's cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastprompt.vit import FrozenViT

ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a backbone, a batch and a dtype that the formulas use.

    Attributes:
        width: D. depth: number of blocks. heads: heads per block. hidden: hidden width of the MLP. patches: N.
        prefix: number of class and register tokens.
        patch_size: in pixels. image_size: (height, width) in pixels. grid: (rows, columns) of patches.
        batch: B. element: bytes per number in the backbone. training: whether autograd records the forward.
        threads: PyTorch's threads; with more of them, the backward of attention works on larger chunks.
        has_cls, position, norm_pre, norm, fc_norm, layer_scale, qkv_bias: whether the backbone has this part.
        rotary: whether patches are rotated, by the same angles in every block.
        channels: of images. activation: activation of the MLP. num_classes: C of the linear head.
        activation_bits: bits in which the derivatives of activations are kept for the backward; None: their inputs.
        graph: "papers" (`reference_forward`), "rewritten" (`forward`) or "recompute" (with gradient checkpointing).
    """

    width: int
    depth: int
    heads: int
    hidden: int
    patches: int
    prefix: int
    patch_size: int
    image_size: tuple[int, int]
    grid: tuple[int, int]
    has_cls: bool = True
    position: bool = True
    norm_pre: bool = False
    norm: bool = True
    fc_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    activation: str = "gelu"
    rotary: bool = False
    channels: int = 3
    batch: int = 1
    element: int = 2
    training: bool = False
    threads: int = 1
    num_classes: int = 10
    activation_bits: int | None = None
    graph: str = "rewritten"

    @classmethod
    def of(cls, vit: FrozenViT) -> Sizes:
        """Return the sizes of a backbone; raise a ValueError naming the part that is not of the plain family."""
        if vit.staged:
            raise ValueError("the cost of a Swin transformer has no formula")
        block = vit.blocks[0]
        for name, present in (
            ("q- and k-norm", block.q_norm is not None or block.k_norm is not None),
            ("a norm behind attention", block.attn_norm is not None),
            ("a norm within the MLP", block.mlp.norm is not None),
            ("a norm behind each branch (res-post-norm)", block.post_norm),
            ("a gated MLP", block.mlp.glu != "none"),
            (f"the activation {block.mlp.act}", block.mlp.act not in ACTIVATIONS),
            ("RMSNorm", block.norm1.kind != "layernorm" or block.norm2.kind != "layernorm"),
            ("a norm in float32", block.norm1.upcast or block.norm2.upcast),
            ("a norm of the patch embedding", vit.patch_norm is not None),
            ("zero-padded images", vit.spec.dynamic_pad),
            ("a convolutional stem", vit.stem is not None),
            ("a relative position bias", block.bias is not None),
            ("rotary frequencies of each block", vit.rotary is not None and vit.rotary.sin.shape[:2] != (1, 1)),
        ):
            if present:
                raise ValueError(f"the cost of a backbone with {name} has no formula ({vit.spec.name})")
        return cls(
            width=vit.patch_width,
            depth=len(vit.blocks),
            heads=block.num_heads,
            hidden=block.mlp.fc1.num_outputs,
            patches=vit.num_patches,
            prefix=vit.num_prefix,
            patch_size=vit.patch_size,
            image_size=vit.image_size,
            grid=vit.spec.grid,
            has_cls=vit.spec.has_cls,
            position=vit.pos_embed is not None,
            norm_pre=vit.norm_pre is not None,
            norm=vit.norm is not None,
            fc_norm=vit.fc_norm is not None,
            layer_scale=block.ls1 is not None,
            qkv_bias=block.qkv.bias is not None or block.norm1.bias is not None,
            activation=block.mlp.act,
            rotary=vit.rotary is not None,
            channels=vit.channels,
        )

    @property
    def own(self) -> int:
        """Number of rows of the sequence that are not prompts."""
        return self.prefix + self.patches

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def cast(self) -> bool:
        """Whether tensors between generator and backbone are cast, because the backbone is not float32."""
        return self.element != 4

    def tokens(self, rows: int, columns: int | None = None) -> int:
        """Return the bytes of `rows` rows of `columns` numbers (None is D) in the backbone's dtype."""
        return rows * (self.width if columns is None else columns) * self.element


@dataclasses.dataclass
class Tally:
    """Sums of FLOPs, bytes and dispatches over one batch, with the backward counted separately."""

    forward: int = 0
    backward: int = 0
    saved: int = 0
    calls: int = 0
    backward_calls: int = 0

    def call(self, forward: int = 1, backward: int = 0, saved: int = 0) -> None:
        """Add operators without FLOPs: dispatches of forward and backward, and saved bytes."""
        self.calls += forward
        self.backward_calls += backward
        self.saved += saved

    def product(self, flops: int, gradients: int = 1, calls: int = 1, backward: int | None = None) -> None:
        """Add a product of `flops` FLOPs with gradients for `gradients` of its factors, each costing the same."""
        self.forward += flops
        self.backward += gradients * flops
        self.call(calls, gradients if backward is None else backward)

    def add(self, other: Tally) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def _no_cost(tally: Tally, block: int) -> None:
    """Add nothing: the prompts exist once the generator has run."""


@dataclasses.dataclass(frozen=True)
class PromptCost:
    """The result of a cost formula: where prompts enter, and the cost of computing the prompts of one block.

    A formula `cost(sizes, config, tally)` adds to the tally what the generator does once per call, with `Tally.call`
    for operators without FLOPs and `Tally.product` for matrix products, and returns a `PromptCost`.

    Attributes:
        count: P; 0 if the method makes no tokens.
        layers: the blocks whose prompts are set.
        shared: number of first blocks with prompts shared by all images.
        make: function that adds the cost of block i's prompts, forward and backward, to a tally.
        first: whether the prompts join once, before the pre-norm, after the patches
            (`PromptGenerator.before_pre_norm`).
        known: whether the prompts depend only on parameters, so that inference caches their keys and values.
        cast: whether the prompts are made in float32 and cast to the backbone's dtype block by block.
        kept: bytes read by the blocks that stay alive with the graph if blocks are recomputed.
        norms: whether the prompts' op applies the pre-norm, in float32.
        changes_images: whether the method trains something that it adds to the images, so that they have a gradient.
        role: what the prompts do in a block (`PromptGenerator.role`).
        features: the width of the head's input; 0 is the backbone's.
        gather: function that adds the cost of `PromptGenerator.gather`, with the number of images that share features.
    """

    count: int
    layers: Collection[int]
    shared: int = 0
    make: Callable[[Tally, int], None] = _no_cost
    first: bool = False
    known: bool = False
    cast: bool = True
    kept: int = 0
    norms: bool = False
    changes_images: bool = False
    role: str = "sequence"
    features: int = 0
    gather: Callable[[Tally, int], None] = _no_cost

    def images(self, i: int, batch: int) -> int:
        """Return the number of different sets of prompts of block i, 1 or B."""
        return 1 if i < self.shared else batch


CostFormula = Callable[[Sizes, Any, Tally], PromptCost]
"""`cost(sizes, config, tally)`; raises `ValueError` for options without a formula."""
