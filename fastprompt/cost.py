"""What a forward and a training step cost, by formula: FLOPs, bytes kept for the backward, dispatches.

Every function here is the arithmetic of one function elsewhere, in the same order: `_block` is that of `run_block` of
`fastprompt.vit.forward`, `_papers_block` that of `fastprompt.vit.reference`, and so on. Nothing runs. A change of
those graphs is a change here; `tests/report/test_cost.py` holds the two together.

* FLOPs: matrix products and convolutions, two for a multiplication and its addition. Norms, activations, softmax and
  sums do not count.
* Saved bytes: what a training step's forward leaves allocated for its backward: each tensor once, however many
  operators keep it. Parameters and the images are there anyway.
* Dispatches: ATen operators below autograd, views left out (`bench/cost.py` says which those are), for a batch of at
  least 2 images: of a batch of 1 some copies are views. In float32, of a machine where oneDNN is not the faster
  library (`fastprompt.vit.linear`); where it is, some copies fall away, and "recompute" runs the
  last product of each block again.

A training step is a forward and its backward from the logits, with gradients that start at None, and no loss. The
numbers are those of PyTorch on a CPU: `fastprompt.kernels` has fused kernels for GPUs, which keep and dispatch less. A
Linear is taken to have its bias, as after pretraining: one that is all zeros folds away.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from fastprompt.generators import (
    FreePromptsConfig,
    LinearProbeConfig,
    PGNConfig,
    PixelPromptConfig,
    PromptConfig,
    V2APTConfig,
    VAPTConfig,
    VPTConfig,
)
from fastprompt.kernels.prefix_attention.recompute import BUFFER_SCORES
from fastprompt.kernels.prefix_attention.reference import SMALL_SCORES

if TYPE_CHECKING:
    from fastprompt.vit import FrozenViT

GRAPHS = ("papers", "rewritten", "recompute")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NOISE_CALLS = 2 + 1 + 3 * 3 + 10 * 30 + 1 + 13  # seed, counters, ten rounds of Philox, Box-Muller
READOUTS = ("cls", "patches", "patches+prompts", "prompts")
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu")


class Cost(NamedTuple):
    """FLOPs and saved bytes for one image, dispatches for one call."""

    flops: float
    saved_bytes: float
    dispatches: int


@dataclasses.dataclass(frozen=True)
class Sizes:
    """All that the formulas know of a backbone, a batch and a number format.

    Attributes:
        width: D. depth: blocks. heads: of a block. hidden: of the MLP. patches: N. prefix: class token and registers.
        patch_size: pixels. image_size: (height, width) in pixels. grid: (rows, columns) of patches.
        batch: B. element: bytes of a number in the backbone. training: whether a graph is kept.
        threads: of PyTorch; the backward of attention works through larger parts with more.
        has_cls, position, norm_pre, norm, fc_norm, layer_scale, qkv_bias: what the backbone has.
        activation: of the MLP. num_classes: C of the linear head.
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
    batch: int = 1
    element: int = 2
    training: bool = False
    threads: int = 1
    num_classes: int = 10

    @classmethod
    def of(cls, vit: FrozenViT) -> Sizes:
        """The sizes of a backbone; ValueError, naming the part, where it is not of the plain family."""
        from fastprompt.vit import FrozenSwin

        if isinstance(vit, FrozenSwin):
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
        ):
            if present:
                raise ValueError(f"the cost of a backbone with {name} has no formula ({vit.spec.name})")
        return cls(
            width=vit.width,
            depth=vit.depth,
            heads=block.num_heads,
            hidden=block.mlp.fc1.weight.shape[0],
            patches=vit.num_patches,
            prefix=vit.num_prefix,
            patch_size=vit.patch_size,
            image_size=vit.image_size,
            grid=vit.grid,
            has_cls=vit.spec.has_cls,
            position=vit.pos_embed is not None,
            norm_pre=vit.norm_pre is not None,
            norm=vit.norm is not None,
            fc_norm=vit.fc_norm is not None,
            layer_scale=block.ls1 is not None,
            qkv_bias=block.qkv.bias is not None or block.norm1.bias is not None,
            activation=block.mlp.act,
        )

    @property
    def own(self) -> int:
        """Rows of the sequence that are no prompts."""
        return self.prefix + self.patches

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def cast(self) -> bool:
        """Whether the backbone's numbers are not the generator's float32: what goes between them is cast."""
        return self.element != 4


@dataclasses.dataclass
class Tally:
    """Sums over one batch: FLOPs, bytes and dispatches, those of the backward apart."""

    forward: int = 0
    backward: int = 0
    saved: int = 0
    calls: int = 0
    backward_calls: int = 0

    def call(self, forward: int = 1, backward: int = 0, saved: int = 0) -> None:
        """Operators without FLOPs: dispatches of the forward and of the backward, bytes that are kept."""
        self.calls += forward
        self.backward_calls += backward
        self.saved += saved

    def product(self, flops: int, gradients: int = 1, calls: int = 1, backward: int | None = None) -> None:
        """A product of `flops` with gradients for `gradients` of its factors, each as large as the product."""
        self.forward += flops
        self.backward += gradients * flops
        self.call(calls, gradients if backward is None else backward)

    def add(self, other: Tally) -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Where prompts enter and what making them costs.

    Attributes:
        count: P. layers: the blocks whose prompts are set.
        shared: how many of the first blocks have prompts that are the same for all images.
        make: adds the cost of block i's prompts to a tally: forward and backward of the generator.
        first: whether they join once, before the pre-norm, behind the patches.
        known: whether they depend on parameters alone, so that inference keeps their keys and values.
        cast: whether they are made in float32 and cast, block by block, to what the backbone takes.
        kept: bytes that live as long as the graph when blocks are computed again: what the blocks read.
        norms: whether their op applies the pre-norm, in float32.
    """

    count: int
    layers: range
    shared: int
    make: Callable[[Tally, int], None]
    first: bool = False
    known: bool = False
    cast: bool = True
    kept: int = 0
    norms: bool = False

    def images(self, i: int, batch: int) -> int:
        """1 or B: how many different sets of prompts block i has."""
        return 1 if i < self.shared else batch


def cost(
    backbone: FrozenViT | Sizes,
    config: PromptConfig,
    readout: str = "cls",
    graph: str = "rewritten",
    training: bool = False,
    dtype: str = "bfloat16",
    batch: int = 1,
    num_classes: int = 10,
    threads: int = 1,
) -> Cost:
    """What one call costs: a forward without graph, or, `training`, a forward and its backward.

    Args:
        backbone: a frozen ViT of the plain family (pre-norm blocks with LayerNorm), or its `Sizes`.
        config: the method, with a linear head on float32 parameters.
        readout: "cls", "patches", "patches+prompts" or "prompts".
        graph: "papers" (`reference_forward`), "rewritten" (`forward`) or "recompute" (the same with
            `set_grad_checkpointing()`).
        dtype: of the backbone: "float32", "bfloat16" or "float16".
        batch: images per call. What they share (static prompts) is divided by it.
        threads: of PyTorch; they change dispatches of the rewritten graph's training step, nothing else.

    Raises:
        ValueError: an argument is none of these, or backbone or method have a part without formula; it is named.
    """
    for name, value, takes in (
        ("readout", readout, READOUTS),
        ("graph", graph, GRAPHS),
        ("dtype", dtype, tuple(BYTES)),
    ):
        if value not in takes:
            raise ValueError(f"{name} must be one of {takes}, got {value!r}")
    for name, number in (("batch", batch), ("num_classes", num_classes), ("threads", threads)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    sizes = backbone if isinstance(backbone, Sizes) else Sizes.of(backbone)
    s = dataclasses.replace(
        sizes, batch=batch, element=BYTES[dtype], training=training, num_classes=num_classes, threads=threads
    )
    if readout == "cls" and not s.has_cls:
        raise ValueError("readout 'cls' needs a class token; this backbone has none")
    if readout == "cls" and s.depth == 1:
        raise ValueError("the cost of readout 'cls' has no formula for a backbone of one block")
    t = Tally()
    prompts = _prompts(t, s, config, graph)
    if "prompts" in readout and prompts is None:
        raise ValueError(f"readout {readout!r} needs prompt tokens; this method has none")
    pixels = isinstance(config, PixelPromptConfig)
    if graph == "papers":
        rows = _papers(t, s, prompts, readout, pixels)
    else:
        rows = _rewritten(t, s, prompts, readout, pixels, graph == "recompute" and training)
    _head(t, s, prompts is not None or pixels, rows if readout == "cls" and not s.fc_norm else 1)
    if not training:
        return Cost(t.forward / batch, 0.0, t.calls)
    return Cost((t.forward + t.backward) / batch, t.saved / batch, t.calls + t.backward_calls)


def _embed(t: Tally, s: Sizes, pixels: bool) -> None:
    """Finite pixels, patch embedding, class token and registers, position embedding."""
    b, flops = s.batch, 2 * s.batch * s.patches * s.width * 3 * s.patch_size**2
    t.call(2)
    if pixels:  # the frame, its sum with the images, and the gradients of its four strips
        t.call(4, 1 + 8)
        t.saved += b * 3 * s.image_size[0] * s.image_size[1] * s.element
    t.call(s.cast, s.cast * pixels)
    t.product(flops, gradients=int(pixels))
    t.call(1 + s.position)


def _norm(t: Tally, s: Sizes, rows: int, trains: bool = True, keeps: bool = True) -> None:
    """A LayerNorm: where it `trains` it keeps mean and 1/std of each row, and the rows, unless others count them."""
    t.call(1, int(trains), (2 * rows * s.element + _tokens(s, rows) * keeps) * trains)


def _tokens(s: Sizes, rows: int, columns: int | None = None) -> int:
    """Bytes of `rows` rows in the backbone's number format."""
    return rows * (s.width if columns is None else columns) * s.element


def _mlp(t: Tally, s: Sizes, rows: int, folded: bool) -> None:
    """norm2, MLP and residual over all rows (images included), which carry a gradient."""
    _norm(t, s, rows)
    t.call(0, 1)  # the rows are read twice: their gradients add up
    t.product(2 * rows * s.width * s.hidden)
    if s.activation == "quick_gelu" and not folded:
        t.call(3, 5, 2 * _tokens(s, rows, s.hidden))
    else:
        t.call(1, 1, _tokens(s, rows, s.hidden))
    t.product(2 * rows * s.width * s.hidden)
    if s.layer_scale and not folded:
        t.call(1, 1)
    t.call(1)


def _papers_block(t: Tally, s: Sizes, rows: int, trains: bool) -> None:
    """A block of the papers' graph over `rows` rows per image."""
    b, h, d = s.batch, s.heads, s.width
    whole = Tally()
    _norm(whole, s, b * rows)
    whole.call(0, 1)
    whole.product(2 * b * rows * d * 3 * d, backward=3)
    scores = b * h * rows * rows
    if s.training and trains and s.cast and rows * rows <= SMALL_SCORES:  # plain products
        whole.call(1, 1)
        copies = 3 * (b > 1)
        whole.product(2 * scores * s.head_dim, 2, calls=1 + copies)
        whole.call(1, 1, scores * s.element)
        whole.product(2 * scores * s.head_dim, 2)
        whole.call(1, int(b > 1), _tokens(s, b * rows, (3 if b > 1 else 4) * d))
    else:
        whole.forward += 4 * scores * s.head_dim
        whole.backward += 10 * scores * s.head_dim
        whole.call(1, 1, _tokens(s, b * rows, 4 * d) + 4 * b * h * rows)
    whole.product(2 * b * rows * d * d)
    if s.layer_scale:
        whole.call(1, 1)
    whole.call(1)
    _mlp(whole, s, b * rows, folded=False)
    t.add(whole if trains else Tally(forward=whole.forward, calls=whole.calls))


def _papers(t: Tally, s: Sizes, prompts: Prompts | None, readout: str, pixels: bool) -> int:
    """`fastprompt.vit.reference.encode` and `read_out`: the rows of an image that are normed."""
    b, rows, trains = s.batch, s.own, pixels
    _embed(t, s, pixels)
    if prompts is not None and prompts.first:
        rows, trains = _papers_insert(t, s, prompts, 0, rows, trains), True
    if s.norm_pre:
        _norm(t, s, b * rows, trains)
    for i in range(s.depth):
        if prompts is not None and i in prompts.layers and not (i == 0 and prompts.first):
            rows, trains = _papers_insert(t, s, prompts, i, rows, trains), True
        _papers_block(t, s, rows, trains)
    if s.norm:
        _norm(t, s, b * rows, trains)
    whole = prompts is None and s.prefix == 0  # the patches are all there is
    slices = {"cls": (0, 1), "patches": (1, 2 - whole), "prompts": (1, 2), "patches+prompts": (2, 4)}[readout]
    t.call(slices[0], slices[1] * trains)
    return rows


def _papers_insert(t: Tally, s: Sizes, prompts: Prompts, i: int, rows: int, trains: bool) -> int:
    """`Sequence.with_prompts`: the rows of the sequence behind it."""
    prompts.make(t, i)
    cast = s.cast and prompts.cast
    t.call(cast + 1, cast + (prompts.images(i, s.batch) < s.batch) + 3 * trains)
    return s.own + prompts.count


def _rewritten(t: Tally, s: Sizes, prompts: Prompts | None, readout: str, pixels: bool, recompute: bool) -> int:
    """`fastprompt.vit.forward.features`: the rows of an image that are normed."""
    b, rows, trains = s.batch, s.own, pixels
    _embed(t, s, pixels)
    if prompts is not None and prompts.first:
        prompts.make(t, 0)
        t.call(s.cast, s.cast)
        if s.norm_pre and prompts.norms:
            t.call(1 + 2 * s.cast)  # affine to float32
        if s.norm_pre:
            _norm(t, dataclasses.replace(s, element=4) if prompts.norms else s, prompts.images(0, b) * prompts.count)
    if s.norm_pre:
        _norm(t, s, b * rows, trains)
    if recompute and prompts is not None:
        t.saved += prompts.kept
    for i in range(s.depth):
        step = Tally()
        entering = rows
        rows = _step(step, s, prompts, readout, i, rows, trains)
        trains = trains or prompts is not None
        if recompute and trains:  # fc2 and the residual behind it keep nothing: they do not run again
            fc2 = 2 * b * rows * s.width * s.hidden
            step = Tally(
                step.forward,
                step.forward - fc2 + step.backward,
                _tokens(s, b * entering),
                step.calls,
                step.calls - 2 + step.backward_calls,
            )
        t.add(step)
    if s.norm:
        _norm(t, s, b * rows, trains)
    slices = {"cls": (0, 1), "patches": (1, 1), "prompts": (1, 1), "patches+prompts": (2, 4)}[readout]
    t.call(slices[0], slices[1] * trains)
    return rows


def _stay(s: Sizes, prompts: Prompts | None, readout: str, i: int) -> bool:
    """`prompts_stay`, of block i's own prompts."""
    if prompts is None or i not in prompts.layers:
        return False
    return "prompts" in readout if i == s.depth - 1 else i + 1 not in prompts.layers


def _output_rows(s: Sizes, prompts: Prompts | None, readout: str, i: int, rows: int) -> int:
    """Rows per image of what leaves block i, which `rows` enter: `rows_read` and the prompts that join."""
    joining = prompts.count if prompts is not None and _stay(s, prompts, readout, i) else 0
    if i < s.depth - 1:
        return rows + joining
    there = rows - s.own + joining
    return {"cls": 1, "patches": s.patches, "prompts": there, "patches+prompts": s.patches + there}[readout]


def _step(t: Tally, s: Sizes, prompts: Prompts | None, readout: str, i: int, rows: int, trains: bool) -> int:
    """Block i over `rows` rows per image; how many rows leave it."""
    leave = _output_rows(s, prompts, readout, i, rows)
    if prompts is None or i not in prompts.layers:
        if i == s.depth - 1 and readout == "cls":
            _one_query(t, s, rows, 0, 0, False, trains)
        else:
            _block(t, s, rows, leave, 0, 0, False, trains)
        return leave
    n, cast = prompts.images(i, s.batch), s.cast and prompts.cast
    stay, one_query = _stay(s, prompts, readout, i), i == s.depth - 1 and readout == "cls"
    ready = prompts.known and not s.training and not stay and not one_query and not (i == 0 and prompts.first)
    if not ready and not (i == 0 and prompts.first):
        prompts.make(t, i)
        t.call(cast, cast)
    if one_query:
        _one_query(t, s, rows, prompts.count, n, cast, trains)
        return leave
    if not ready:
        width = (3 if stay else 2) * s.width
        _norm(t, s, n * prompts.count, keeps=cast or (i == 0 and prompts.first and s.norm_pre))
        t.call(0, int(stay))
        t.product(2 * n * prompts.count * s.width * width, backward=3)
        t.saved += _tokens(s, n * prompts.count, width)
    _block(t, s, rows, leave, prompts.count, n, stay, trains)
    return leave


def _block(t: Tally, s: Sizes, rows: int, leave: int, p: int, n: int, stay: bool, trains: bool) -> None:
    """`run_block`: `rows` rows enter, `leave` leave; p prompts for n images are a prefix or, if they `stay`, join."""
    b, d, shared = s.batch, s.width, p > 0 and n < s.batch
    own = leave - p * stay  # of the rows that enter
    sliced, keys = own < rows, rows + p
    _norm(t, s, b * rows, trains)
    t.call(0, int(trains))
    if sliced:
        bias = int(s.qkv_bias and (b > 1 and own > 0))
        t.product(2 * b * own * d * d, int(trains), calls=1 + bias, backward=int(trains))
        t.product(2 * b * rows * d * 2 * d, int(trains), backward=(1 + 2 * stay) * trains)
        t.call(0, 3 * trains)  # the slices of the norm's output and of the residual, and the sum with the keys' side
        t.saved += _tokens(s, b * own) * (not stay) + _tokens(s, b * rows, 2 * d)
    else:
        t.product(2 * b * rows * d * 3 * d, int(trains), backward=(1 + 2 * stay) * trains)
        t.saved += _tokens(s, b * rows, 3 * d)
    if stay:  # queries and residual get the prompts' rows; attention's output is copied to the projection's layout
        t.call(2, 2 * shared, _tokens(s, b * leave))
        t.call(1)
    t.call(2 * (p > 0))
    t.forward += 4 * b * leave * keys * d
    t.call(1)
    _attention_backward(t, s, leave, rows, p, shared, stay or trains, trains, packed=not (sliced or stay))
    t.product(2 * b * leave * d * d)
    t.call(1)
    _mlp(t, s, b * leave, folded=True)
    if not (p or trains):  # nothing to train
        t.backward = t.backward_calls = t.saved = 0


def _attention_backward(
    t: Tally, s: Sizes, queries: int, tokens: int, p: int, shared: bool, wants_q: bool, wants_tokens: bool, packed: bool
) -> None:
    """`fastprompt.kernels.prefix_attention.recompute`: dispatches by chunk of the scores, FLOPs by product.

    `packed`: queries, keys and values have one gradient. Where nothing needs a gradient the caller drops all of it.
    """
    b, h = s.batch, s.heads
    scores, room = max(1, queries * (p + tokens)), BUFFER_SCORES * s.threads
    read = (p + tokens) if p and wants_tokens else tokens if wants_tokens else p
    images, group = max(1, min(b, room // (h * scores))), max(1, min(h, room // scores))
    chunks = math.ceil(b / images) * math.ceil(h / group)
    prefix = int(p > 0)
    t.call(0, (wants_q and not packed) + wants_tokens + 1 + 2 * prefix + 7)
    t.call(0, chunks * (4 + 2 * prefix + 4 + 2 * wants_q + 2 * (1 + prefix * (1 + shared) + wants_tokens)))
    t.call(0, 2 * prefix * s.cast)
    per_key = 2 * b * queries * s.width
    t.backward += per_key * ((2 + wants_q) * (p + tokens) + 2 * read)


def _one_query(t: Tally, s: Sizes, rows: int, p: int, n: int, cast: bool, trains: bool) -> None:
    """`one_query_block` over `rows` rows and p prompts for n images, which were `cast` for it."""
    b, d, h, shared = s.batch, s.width, s.heads, p > 0 and n < s.batch
    _norm(t, s, b * rows)
    t.call(0, 1, _tokens(s, b * rows))  # the normed rows
    if p:
        _norm(t, s, n * p, keeps=cast)
        t.saved += _tokens(s, n * p)
    t.product(2 * b * d * d, calls=1 + (s.qkv_bias and b > 1), backward=1)
    t.call(1, 3)  # the scale; backwards also the stack of heads, the slice of the row and the sum of its gradients
    t.call(0, 1)
    t.product(2 * b * d * d)  # q W_k
    t.product(2 * b * h * rows * d, 2)
    t.call(1, 1, b * h * (rows + p) * s.element)  # softmax
    t.product(2 * b * h * rows * d, 2)
    t.call(0, 1)  # the two gradients of the normed rows
    t.saved += _tokens(s, b * h)
    if p:
        t.product(2 * b * h * p * d, 2, calls=1 + (shared and s.training))
        t.saved += _tokens(s, b * h) * shared  # the copy that a product with shared prompts makes
        t.product(2 * b * h * p * d, 2, backward=2 + shared)
        t.call(2, 5)  # the joined scores and the sum of both reads; backwards the slices and sums
    t.product(2 * b * d * d)  # W_v
    t.call(1 + s.qkv_bias)
    t.product(2 * b * d * d)
    t.call(1, 1)  # the residual, of one row
    _mlp(t, s, b, folded=True)
    if not (p or trains):
        t.backward = t.backward_calls = t.saved = 0


def _head(t: Tally, s: Sizes, trains: bool, rows: int) -> None:
    """The norm behind pooling, the features in float32, a linear head that trains; the logits stay alive.

    Features that are not cast are a view of `rows` rows.
    """
    b, d, c = s.batch, s.width, s.num_classes
    if s.fc_norm:
        _norm(t, s, b, trains)
    t.call(s.cast, s.cast * trains, 4 * b * d * (1 if s.cast else rows))
    t.product(2 * b * d * c, 1 + trains)
    t.call(0, 1, 4 * b * c)


def _prompts(t: Tally, s: Sizes, config: PromptConfig, graph: str) -> Prompts | None:
    """The method's prompts; what it does once per call is added to `t`."""
    plain = graph == "papers"
    if isinstance(config, (LinearProbeConfig, PixelPromptConfig)):
        return None
    if isinstance(config, FreePromptsConfig):
        kept = _tokens(s, config.num_prompts) * (s.cast or s.norm_pre)
        return Prompts(config.num_prompts, range(1), 1, lambda t, i: None, first=True, known=True, kept=kept)
    if isinstance(config, VPTConfig):
        if config.project is not None:
            raise ValueError("the cost of VPTConfig.project has no formula")
        return _static(t, s, config.num_prompts, s.depth if config.deep else 1, config.prompt_dropout, plain)
    if type(config) is PGNConfig:
        return _pgn(t, s, config, plain)
    if isinstance(config, V2APTConfig):
        return _v2apt(t, s, config, graph)
    if isinstance(config, VAPTConfig):
        return _vapt(t, s, config, plain)
    raise ValueError(f"the cost of {type(config).__name__} has no formula")


def _static(t: Tally, s: Sizes, count: int, layers: int, dropout: float, plain: bool) -> Prompts:
    """`StaticPrompts`, each layer's slice of one parameter, masked for each image where there is dropout."""
    masked = s.training and dropout > 0
    mask = 4 * s.batch * count * s.width * masked
    t.call(3 * masked, 0, layers * mask)

    def make(t: Tally, i: int) -> None:
        t.call(int(masked), 1 + (i > 0) + masked * (1 + (s.batch > 1)), mask * (not s.cast and not plain))

    return Prompts(count, range(layers), 0 if masked else layers, make, known=not masked)


def _pgn(t: Tally, s: Sizes, config: PGNConfig, plain: bool) -> Prompts:
    """ResNet-10, the mixture's weights and the mixture, all in float32."""
    if config.trunk != "resnet10":
        raise ValueError(f"the cost of PGNConfig.trunk {config.trunk!r} has no formula")
    b, k, m = s.batch, config.num_prompts, config.library_size
    height, width = s.image_size
    if config.resolution is not None and s.image_size != (config.resolution, config.resolution):
        height = width = config.resolution
        t.call(1, 0, 4 * b * 3 * height * width)

    def convolution(inputs: int, outputs: int, kernel: int, positions: int, gradients: int = 2) -> None:
        t.product(2 * b * positions * outputs * inputs * kernel**2, gradients, backward=1)

    def batch_norm(channels: int, positions: int) -> None:
        t.call(2 + s.training, 1, 4 * b * channels * positions + 8 * channels)

    def kept(channels: int, positions: int) -> int:
        return 4 * b * channels * positions

    height, width = (height + 1) // 2, (width + 1) // 2
    channels = config.widths[0]
    convolution(3, channels, 3, height * width, 1)
    batch_norm(channels, height * width)
    t.call(1, 1, kept(channels, height * width))
    if config.stem_pool:
        height, width = (height + 1) // 2, (width + 1) // 2
        t.call(1, 1, 3 * kept(channels, height * width))  # its output and the int64 place of each maximum
    for i, outputs in enumerate(config.widths):
        if i > 0:
            height, width = (height + 1) // 2, (width + 1) // 2
        positions = height * width
        convolution(channels, outputs, 3, positions)
        batch_norm(outputs, positions)
        t.call(1, 1, kept(outputs, positions))
        convolution(outputs, outputs, 3, positions)
        batch_norm(outputs, positions)
        if i > 0 or channels != outputs:
            convolution(channels, outputs, 1, positions)
        t.call(2, 2, kept(outputs, positions))  # sum and ReLU; backwards the sum of the two paths
        channels = outputs
    t.call(1, 1, 4 * b * channels)  # mean over positions
    t.product(2 * b * channels * k * m, 2)
    t.call(1 + 1, 1 + 1, 4 * b * k * m)  # bias; softmax or sigmoid, which keep their output
    copied = plain and not s.cast  # the gradient, rows of the sequence's, which a cast would have copied
    t.product(2 * b * k * m * s.width, 2, backward=2 + copied)
    wide = 4 * b * k * s.width
    t.saved += wide * (not s.cast and not s.norm_pre and not plain)
    held = 4 * b * k * m + _tokens(s, b * k) * (s.cast or s.norm_pre)  # the logits, and the prompts made of them
    return Prompts(k, range(1), 0, lambda t, i: None, first=True, kept=held, norms=True)


def _v2apt(t: Tally, s: Sizes, config: V2APTConfig, graph: str) -> Prompts:
    """Encoder, noise and decoders in float32; the prompts (L, B, P, D) of all layers as the backbone takes them."""
    if config.inference_samples:
        raise ValueError("the cost of V2APTConfig.inference_samples has no formula")
    b, d, z, h, m, depth = s.batch, s.width, config.latent, config.hidden, config.num_instance, s.depth
    decoders = 1 if config.share == "all" else depth
    t.call(s.norm_pre + s.cast + 2)  # norm and mean over patches
    t.call(2, 3, 2 * 4 * b * d)  # the norm's affine
    t.product(2 * b * d * h, 2, backward=3)
    t.call(1, 1, 2 * 4 * b * h)  # a GELU keeps its input, the Linear behind it the output
    t.product(2 * b * h * 2 * z, 2, backward=3)
    t.call(2 * 2 + 2 * 7, 0, 4 * b * 2 * z)  # clamped statistics and KL, for the loss and for the prompts
    t.call(0, 5 + 1)  # of the clamp and of the split into mean and log variance
    if s.training:
        t.call(NOISE_CALLS + 4, 3, 2 * 4 * b * z + 16 * math.ceil(b * z / 4))  # σ, z and the noise
    for _ in range(decoders):
        t.product(2 * b * z * h, 2, backward=3)
        t.call(1, 1, 2 * 4 * b * h)
        t.product(2 * b * h * m * d, 2, backward=3)
    t.call(2 * s.cast, 2 * s.cast)  # domain and instance prompts
    wide = _tokens(s, depth * b * config.num_prompts)
    t.call(2, (b > 1) + (decoders < depth) + decoders - 1, wide * (graph != "papers"))
    kept = 2 * 4 * b * z + 4 * b + 16  # the KL and the seed are held, too
    return Prompts(config.num_prompts, range(depth), 0, lambda t, i: t.call(0, 1 + (i > 0)), cast=False, kept=kept)


def _vapt(t: Tally, s: Sizes, config: VAPTConfig, plain: bool) -> Prompts:
    """Static prompts of the first blocks; from then on M · LN(X), the bottleneck and its residual, in float32."""
    for name, plainest in (
        ("conv", True),
        ("channelwise", True),
        ("feature_projector", True),
        ("share_projector", True),
        ("learnable_scale", False),
        ("project", None),
        ("activation", "relu"),
    ):
        if getattr(config, name) != plainest:
            raise ValueError(f"the cost of VAPTConfig.{name} = {getattr(config, name)!r} has no formula")
    b, d, n, p, r = s.batch, s.width, s.patches, config.num_prompts, config.hidden
    first, adaptive = config.static_layers, s.depth - config.static_layers
    grow = 2 * config.padding - config.kernel + 1
    windows = (s.grid[0] + grow) * (s.grid[1] + grow)
    channels, hidden = (s.training and rate > 0 for rate in (config.channel_dropout, config.hidden_dropout))
    static = _static(t, s, p, first, config.prompt_dropout, plain) if first else None
    for masked, size in ((channels, b * d), (hidden, b * p * r)):
        t.call(3 * masked, 0, 4 * adaptive * size * masked)

    def make(t: Tally, i: int) -> None:
        if static is not None and i < first:
            static.make(t, i)
            return
        taps = config.kernel**2
        trains = i > 0  # whether the tokens carry a gradient
        tokens = s.own + p * (i > 0 and plain)
        sliced = plain or s.prefix > 0
        t.call(s.cast, (s.cast + sliced + 1) * trains)
        t.call(1, 1)
        if plain:
            t.saved += 4 * b * d * (n if s.cast else tokens) + 8 * b * n + 4 * b * n * d  # the norm's input and output
            t.product(2 * b * d * windows * taps, 2)
            t.call(channels + 1, channels + 1, 4 * b * d * windows)  # mask and copy
            t.product(2 * b * d * windows * p, 2)
            t.call(1 + 1, 1)  # bias and copy
        else:
            t.product(2 * p * windows * taps, 2, backward=1)
            t.product(2 * b * d * n * p, 2, calls=3 if s.training else 1, backward=5)
            t.call(channels + 1, channels + 1, 4 * p * n + s.element * b * tokens * d * (not trains))
            t.call(0, 1 + s.cast)  # the norm is computed again
            t.saved += 4 * b * p * d * (not s.cast)
        t.saved += 4 * b * p * d
        t.product(2 * b * p * d * r, 2)
        t.call(1 + hidden, 1 + hidden, 4 * b * p * r * (1 + hidden))
        t.product(2 * b * p * r * d, 2)
        t.call(2, 2 + 2 * (i > first))  # scale and residual; the gradients of the bottleneck add up

    return Prompts(p, range(s.depth), 0 if static is None else static.shared, make)
