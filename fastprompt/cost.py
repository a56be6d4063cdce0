"""The cost of a forward and of a training step by formula: FLOPs, bytes saved for the backward, dispatches.

Every function here does the arithmetic of one function elsewhere, in the same order: `_block` that of `run_block` in
`fastprompt.vit.forward`, `_papers_block` that of `fastprompt.vit.reference`, and so on. No model runs. A change to
those graphs needs a change here; `tests/test_cost.py` keeps the two consistent.

* FLOPs: matrix products and convolutions, with two FLOPs for a multiplication and its addition. Norms, activations,
  softmax and sums do not count.
* Saved bytes: what a training step's forward leaves allocated for its backward, with each tensor counted once however
  many operators keep it. Parameters and images are not counted.
* Dispatches: ATen operators below autograd, without views (`bench/cost.py` lists them), for a batch of at least 2
  images; with a batch of 1, some copies are views. The numbers are those of PyTorch's own Linear, which dispatch modes
  see; where oneDNN is the faster library (`fastprompt.vit.linear`), there are fewer copies.

A training step is a forward and its backward from the logits, without a loss and with gradients that start at None.
The numbers are those of PyTorch on a CPU; the fused GPU kernels of `fastprompt.kernels` save and dispatch less. Linears
are assumed to have a non-zero bias, as after pretraining; an all-zero bias folds away.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, NamedTuple

from fastprompt.arguments import ArgumentError
from fastprompt.generators import PromptConfig
from fastprompt.generators.accounting import PromptCost, Sizes, Tally
from fastprompt.generators.registry import method_of
from fastprompt.kernels.prefix_attention.recompute import BUFFER_SCORES
from fastprompt.kernels.prefix_attention.reference import SMALL_SCORES
from fastprompt.vit import compressed, recomputed

if TYPE_CHECKING:
    from fastprompt.vit import FrozenViT

GRAPHS = ("papers", "rewritten", "recompute")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
READOUTS = ("cls", "patches", "patches+prompts", "prompts")


class Cost(NamedTuple):
    """FLOPs and saved bytes for one image, dispatches for one call."""

    flops: float
    saved_bytes: float
    dispatches: int


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
    activation_bits: int | None = None,
) -> Cost:
    """Return the cost of one call: a forward without autograd, or with `training` a forward and its backward.

    Args:
        backbone: a frozen ViT of the plain family (pre-norm blocks with LayerNorm), or its `Sizes`.
        config: the method, with a linear head on float32 parameters.
        readout: "cls", "patches", "patches+prompts" or "prompts".
        graph: "papers" (`reference_forward`), "rewritten" (`forward`) or "recompute" (the same with
            `set_grad_checkpointing()`).
        dtype: dtype of the backbone: "float32", "bfloat16" or "float16".
        batch: images per call. The cost of what they share (static prompts) is divided by it.
        threads: PyTorch's threads. They affect only the dispatches of the rewritten graph's training step.
        activation_bits: 8, 2 or 0, as in `PromptedViT.set_activation_bits`; None: activations keep their inputs.

    Raises:
        ValueError: an argument is not one of the values above, or a part of the backbone or method has no formula; the
            message names it.
    """
    for name, value, takes in (
        ("readout", readout, READOUTS),
        ("graph", graph, GRAPHS),
        ("dtype", dtype, tuple(BYTES)),
    ):
        if value not in takes:
            raise ArgumentError(name, f"must be one of {takes}, got {value!r}")
    for name, number in (("batch", batch), ("num_classes", num_classes), ("threads", threads)):
        if number < 1:
            raise ArgumentError(name, f"must be at least 1, got {number}")
    sizes = backbone if isinstance(backbone, Sizes) else Sizes.of(backbone)
    s = dataclasses.replace(
        sizes,
        batch=batch,
        element=BYTES[dtype],
        training=training,
        num_classes=num_classes,
        threads=threads,
        activation_bits=activation_bits,
        graph=graph,
    )
    if readout == "cls" and not s.has_cls:
        raise ValueError("readout 'cls' needs a class token; this backbone has none")
    if readout == "cls" and s.depth == 1:
        raise ValueError("the cost of readout 'cls' has no formula for a backbone of one block")
    if activation_bits is not None:
        if activation_bits not in recomputed.BITS:
            raise ArgumentError("activation_bits", f"must be 8, 2, 0 or None, got {activation_bits!r}")
        if graph == "papers":
            raise ArgumentError("activation_bits", f"must be None for the papers' graph, got {activation_bits}")
        if activation_bits and s.activation not in compressed.DERIVATIVES:
            raise ArgumentError("activation_bits", f"must be None with the activation {s.activation!r}")
    formula = method_of(config).cost
    if formula is None:
        raise ValueError(f"the cost of {type(config).__name__} has no formula")
    t = Tally()
    made = formula(s, config, t)
    prompts, pixels = made if made.count else None, made.changes_images
    if "prompts" in readout and (prompts is None or prompts.role != "sequence"):
        raise ValueError(f"readout {readout!r} needs prompt tokens; this method has none")
    if activation_bits is not None and ((prompts is None and not pixels) or (prompts and prompts.role == "queries")):
        raise ArgumentError("activation_bits", "must be None, since no gradient passes the frozen MLPs")
    if prompts is not None and prompts.role == "queries":
        _queries(t, s, prompts, readout)
    else:
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
    flops = 2 * s.batch * s.patches * s.width * s.channels * s.patch_size**2
    t.call(2)
    t.call(s.cast, s.cast * pixels)
    t.product(flops, gradients=int(pixels))
    t.call(1 + s.position)


def _angles(t: Tally, s: Sizes, trains: bool) -> None:
    """`Backbone.turns`: sine and cosine in the backbone's dtype, which every block keeps for the backward."""
    if s.rotary:
        t.call(2 * s.cast, 0, s.cast * trains * s.tokens(s.patches, s.head_dim))


def _rotate(t: Tally, s: Sizes, rows: int, trains: bool, packed: bool = False, joined: int = 0) -> None:
    """`fastprompt.vit.rotary.rotated` of `rows` + `joined` rows of an image: queries or keys, or with values `packed`.

    In 16 bits a copy and four products, and with the sine's negative again backwards. Else the pairs are complex: one
    product, in place, or in training with a new tensor and copies of what is not rotated.
    """
    if s.cast:
        t.call(5, 6 * trains)
        return
    before = s.prefix > 0 and rows >= s.own  # patches are read alone otherwise
    behind = rows + joined - s.prefix * before > s.patches
    written = 3 + before + behind + packed
    t.call(written if s.training else 2, (1 + written) * trains)


def _norm(t: Tally, s: Sizes, rows: int, trains: bool = True, keeps: bool = True) -> None:
    """A LayerNorm: where it `trains` it keeps mean and 1/std of each row, and the rows, unless others count them."""
    t.call(1, int(trains), (2 * rows * s.element + s.tokens(rows) * keeps) * trains)


def _mlp(t: Tally, s: Sizes, rows: int, folded: bool) -> None:
    """norm2, MLP and residual over all rows (images included), which carry a gradient."""
    if folded and s.training and s.activation_bits == 0:
        chunks, product = _chunks(s, rows), 2 * rows * s.width * s.hidden
        t.add(Tally(2 * product, 3 * product, s.tokens(rows), 4 * chunks + (chunks > 1), 7 * chunks + (chunks > 1)))
        t.call(1, 1)  # the residual, and the gradients of rows that are read twice
        return
    _norm(t, s, rows)
    t.call(0, 1)  # the rows are read twice: their gradients add up
    t.product(2 * rows * s.width * s.hidden)
    if folded and s.training and s.activation_bits is not None:
        _compressed(t, s, rows)
    elif s.activation == "quick_gelu" and not folded:
        t.call(3, 5, 2 * s.tokens(rows, s.hidden))
    else:
        t.call(1, 1, s.tokens(rows, s.hidden))
    t.product(2 * rows * s.width * s.hidden)
    if s.layer_scale and not folded:
        t.call(1, 1)
    t.call(1)


def _chunks(s: Sizes, rows: int) -> int:
    """How often some rows are computed where the MLP keeps nothing (`fastprompt.vit.recomputed`), on a CPU."""
    return math.ceil(rows / max(1, recomputed.CHUNK["cpu"] // s.hidden))


def _compressed(t: Tally, s: Sizes, rows: int) -> None:
    """`fastprompt.vit.compressed.activation` over all rows (images included), with 2 or 4 float32 values for each."""
    packed, chunks = math.ceil(s.hidden * (s.activation_bits or 8) / 8), math.ceil(rows / compressed.chunk(s.hidden))
    forward, backward, values = (11, 3, 2) if s.activation_bits == 8 else (54, 12, 4)
    several = int(chunks > 1)  # what the chunks give is joined
    t.call(
        2 + chunks * (forward + s.cast) + 2 * several,
        chunks * (backward + s.cast) + several,
        rows * (packed + 4 * values),
    )


def _papers_block(t: Tally, s: Sizes, rows: int, trains: bool) -> None:
    """A block of the papers' graph over `rows` rows per image."""
    whole = Tally()
    _papers_attention(whole, s, rows, trains)
    _mlp(whole, s, s.batch * rows, folded=False)
    t.add(whole if trains else _constant(whole))


def _constant(t: Tally) -> Tally:
    """The cost of what has nothing to train."""
    return Tally(forward=t.forward, calls=t.calls)


def _papers_attention(whole: Tally, s: Sizes, rows: int, trains: bool) -> None:
    """The attention of a block of the papers' graph, with its norm and residual."""
    b, h, d = s.batch, s.heads, s.width
    _norm(whole, s, b * rows)
    whole.call(0, 1)
    whole.product(2 * b * rows * d * 3 * d, backward=3)
    if s.rotary:
        whole.call(16, 26)
    scores = b * h * rows * rows
    if s.training and trains and s.cast and rows * rows <= SMALL_SCORES:  # plain products
        whole.call(1, 1)
        copies = (1 if s.rotary else 3) * (b > 1)  # rotated queries and keys lie as products read them
        whole.product(2 * scores * s.head_dim, 2, calls=1 + copies)
        whole.call(1, 1, scores * s.element)
        whole.product(2 * scores * s.head_dim, 2)
        whole.call(1, int(b > 1), s.tokens(b * rows, (3 if b > 1 else 4) * d))
    else:
        whole.forward += 4 * scores * s.head_dim
        whole.backward += 10 * scores * s.head_dim
        whole.call(1, 1, s.tokens(b * rows, (6 if s.rotary else 4) * d) + 4 * b * h * rows)
        whole.call(int(s.rotary))  # the output is copied to the projection's layout
    whole.product(2 * b * rows * d * d)
    if s.layer_scale:
        whole.call(1, 1)
    whole.call(1)


def _papers(t: Tally, s: Sizes, prompts: PromptCost | None, readout: str, pixels: bool) -> int:
    """`fastprompt.vit.reference.encode` and `read_out`: the rows of an image that are normed."""
    b, rows, trains = s.batch, s.own, pixels
    _embed(t, s, pixels)
    _angles(t, s, pixels or prompts is not None)
    if prompts is not None and prompts.first:
        rows, trains = _papers_insert(t, s, prompts, 0, rows, trains), True
    if s.norm_pre:
        _norm(t, s, b * rows, trains)
    for i in range(s.depth):
        if prompts is not None and i in prompts.layers and prompts.role == "cross":
            _papers_cross_block(t, s, prompts, i, trains)
            trains = True
            continue
        if prompts is not None and i in prompts.layers and not (i == 0 and prompts.first):
            rows, trains = _papers_insert(t, s, prompts, i, rows, trains), True
        _papers_block(t, s, rows, trains)
    if s.norm:
        _norm(t, s, b * rows, trains)
    whole = prompts is None and s.prefix == 0  # the patches are all there is
    slices = {"cls": (0, 1), "patches": (1, 2 - whole), "prompts": (1, 2), "patches+prompts": (2, 4)}[readout]
    t.call(slices[0], slices[1] * trains)
    return rows


def _papers_cross_block(t: Tally, s: Sizes, prompts: PromptCost, i: int, trains: bool) -> None:
    """`reference.run_cross_block`."""
    b, d, p, rows = s.batch, s.width, prompts.count, s.own
    prompts.make(t, i)
    t.call(s.cast, s.cast)
    own = Tally()
    _papers_attention(own, s, rows, trains)
    t.add(own if trains else _constant(own))
    t.call(0, 1 + trains)  # the images share the prompts; the rows are read twice
    _norm(t, s, b * p, keeps=False)
    t.saved += s.tokens(p)
    t.product(2 * b * p * d * 2 * d, backward=3)
    _norm(t, s, b * rows, trains)
    t.product(2 * b * rows * d * d, int(trains), backward=3 * trains)
    scores = b * s.heads * rows * p
    if s.training and s.cast and rows * p <= SMALL_SCORES:  # plain products
        t.call(1, int(trains))
        t.product(2 * scores * s.head_dim, 1 + trains, calls=1 + 2 * (b > 1))
        t.call(1, 1, scores * s.element)
        t.product(2 * scores * s.head_dim, 2, calls=1 + (b > 1))
        t.call(1, 1, s.tokens(b * rows) + (1 + trains) * s.tokens(b * p))
    else:
        t.forward += 4 * scores * s.head_dim
        t.backward += 10 * scores * s.head_dim
        t.call(1, 1, s.tokens(b * rows, 2 * d) + s.tokens(b * p, 2 * d) + 4 * b * s.heads * rows)
    t.product(2 * b * rows * d * d)
    if s.layer_scale:
        t.call(1, 1)
    t.call(1)
    _mlp(t, s, b * rows, folded=False)


def _papers_insert(t: Tally, s: Sizes, prompts: PromptCost, i: int, rows: int, trains: bool) -> int:
    """`Sequence.with_prompts`: the rows of the sequence behind it."""
    prompts.make(t, i)
    cast = s.cast and prompts.cast
    t.call(cast + 1, cast + (prompts.images(i, s.batch) < s.batch) + 3 * trains)
    return s.own + prompts.count


def _rewritten(t: Tally, s: Sizes, prompts: PromptCost | None, readout: str, pixels: bool, recompute: bool) -> int:
    """`fastprompt.vit.forward.features`: the rows of an image that are normed."""
    b, rows, trains = s.batch, s.own, pixels
    if recompute and s.activation_bits is None:
        s = dataclasses.replace(s, activation_bits=0)
    _embed(t, s, pixels)
    _angles(t, s, pixels or prompts is not None)
    if prompts is not None and prompts.known and not s.training:
        t.call(1)  # the prompts are compared with those whose keys and values are kept
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
        trains = trains or (prompts is not None and i in prompts.layers)
        if recompute and trains:  # fc2 and the residual behind it keep nothing: they do not run again
            product, chunks = 2 * b * rows * s.width * s.hidden, _chunks(s, b * rows)
            once, calls = product, 2
            if s.activation_bits == 0:  # nor does the MLP, whose result is only allocated
                once, calls = 2 * product, 4 * chunks + (chunks > 1)
            step = Tally(
                step.forward,
                step.forward - once + step.backward,
                s.tokens(b * entering),
                step.calls,
                step.calls - calls + step.backward_calls,
            )
        t.add(step)
    if s.norm:
        _norm(t, s, b * rows, trains)
    slices = {"cls": (0, 1), "patches": (1, 1), "prompts": (1, 1), "patches+prompts": (1, 1)}[readout]
    t.call(slices[0], slices[1] * trains)
    return rows


def _stay(s: Sizes, prompts: PromptCost | None, readout: str, i: int) -> bool:
    """`prompts_stay`, of block i's own prompts."""
    if prompts is None or i not in prompts.layers:
        return False
    return "prompts" in readout if i == s.depth - 1 else i + 1 not in prompts.layers


def _output_rows(s: Sizes, prompts: PromptCost | None, readout: str, i: int, rows: int) -> int:
    """Rows per image of what leaves block i, which `rows` enter: `rows_read` and the prompts that join."""
    joining = prompts.count if prompts is not None and _stay(s, prompts, readout, i) else 0
    if i < s.depth - 1:
        return rows + joining
    there = rows - s.own + joining
    return {"cls": 1, "patches": s.patches, "prompts": there, "patches+prompts": s.patches + there}[readout]


def _step(t: Tally, s: Sizes, prompts: PromptCost | None, readout: str, i: int, rows: int, trains: bool) -> int:
    """Block i over `rows` rows per image; how many rows leave it."""
    here = None if prompts is None or i not in prompts.layers else prompts
    joined = None if here is None or here.role != "sequence" else here
    leave, attention, mlp = _output_rows(s, joined, readout, i, rows), Tally(), Tally()
    _attention(attention, s, joined, readout, i, rows, leave, trains)
    t.add(attention if joined is not None or trains else _constant(attention))
    if here is not None and here.role == "cross":
        _cross(t, s, here, i, leave, trains)
    if here is None and not trains:
        _mlp(mlp, dataclasses.replace(s, activation_bits=None), s.batch * leave, folded=True)
        mlp = _constant(mlp)
    else:
        _mlp(mlp, s, s.batch * leave, folded=True)
    t.add(mlp)
    return leave


def _attention(
    t: Tally, s: Sizes, prompts: PromptCost | None, readout: str, i: int, rows: int, leave: int, trains: bool
) -> None:
    """Block i up to its MLP, with prompts that enter its sequence."""
    one_query = i == s.depth - 1 and readout == "cls"
    if prompts is None:
        if one_query:
            _one_query(t, s, rows, 0, 0, False, trains)
        else:
            _block(t, s, rows, leave, 0, 0, False, trains)
        return
    n, cast = prompts.images(i, s.batch), s.cast and prompts.cast
    stay = _stay(s, prompts, readout, i)
    ready = prompts.known and not s.training and not stay and not one_query and not (i == 0 and prompts.first)
    if not ready and not (i == 0 and prompts.first):
        prompts.make(t, i)
        t.call(cast, cast)
    if one_query:
        _one_query(t, s, rows, prompts.count, n, cast, trains)
        return
    if not ready:
        width = (3 if stay else 2) * s.width
        _norm(t, s, n * prompts.count, keeps=cast or (i == 0 and prompts.first and s.norm_pre))
        t.call(0, int(stay))
        t.product(2 * n * prompts.count * s.width * width, backward=3)
        t.saved += s.tokens(n * prompts.count, width)
    _block(t, s, rows, leave, prompts.count, n, stay, trains)


def _cross(t: Tally, s: Sizes, prompts: PromptCost, i: int, rows: int, trains: bool) -> None:
    """`cross.read_of` of prompts that all images share, unless they are known, and `forward.add_crossed`."""
    b, d, p, columns = s.batch, s.width, prompts.count, s.heads * prompts.count
    if p * (s.heads - 1) >= d:
        raise ValueError(f"the cost of {p} prompts of role 'cross', more than are folded, has no formula")
    if s.training or not prompts.known:
        prompts.make(t, i)
        t.call(s.cast, s.cast)
        _norm(t, s, p, keeps=s.cast)
        t.product(2 * p * d * 2 * d, backward=3)
        t.call(1, 1)  # scale
        t.product(2 * p * d * d)
        if s.qkv_bias:
            t.product(2 * p * d)
            t.call(0, 1)
        else:
            t.call(1)
        t.product(2 * p * d * d)
        t.call(2)  # the projection's bias
    _norm(t, s, b * rows, trains)
    t.call(0, int(trains))  # the rows are read twice
    t.product(2 * b * rows * d * columns, 1 + trains)
    t.call(1 + 1, 1 + s.qkv_bias, b * rows * columns * s.element)  # offsets and softmax
    t.product(2 * b * rows * columns * d, 2)
    t.saved += s.tokens(b * rows) + (1 + trains) * s.tokens(columns)
    t.call(1)


def _block(t: Tally, s: Sizes, rows: int, leave: int, p: int, n: int, stay: bool, trains: bool) -> None:
    """`run_block` up to its MLP: `rows` rows enter, `leave` leave; p prompts for n images are a prefix, or `stay`."""
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
        t.saved += s.tokens(b * own) * (not stay) + s.tokens(b * rows, 2 * d)
    else:
        t.product(2 * b * rows * d * 3 * d, int(trains), backward=(1 + 2 * stay) * trains)
        t.saved += s.tokens(b * rows, 3 * d)
    if s.rotary and not (sliced or stay):
        _rotate(t, s, rows, trains, packed=True)
    elif s.rotary:  # keys, and queries if there are patches among them
        _rotate(t, s, rows, trains)
        t.call(0, 2 * (trains and not stay), s.tokens(b * rows))  # backwards keys' and values' gradients join
        if own >= s.patches:
            _rotate(t, s, own, trains or stay, joined=p * stay)
    if stay:  # queries and residual get the prompts' rows; attention's output is copied to the projection's layout
        t.call(2, 2 * shared, s.tokens(b * leave))
        t.call(1)
    t.call(2 * (p > 0))
    t.forward += 4 * b * leave * keys * d
    t.call(1)
    _attention_backward(t, s, leave, rows, p, shared, stay or trains, trains, packed=not (sliced or stay))
    t.product(2 * b * leave * d * d)
    t.call(1)


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
    t.call(0, 1, s.tokens(b * rows))  # the normed rows
    if p:
        _norm(t, s, n * p, keeps=cast)
        t.saved += s.tokens(n * p)
    t.product(2 * b * d * d, calls=1 + (s.qkv_bias and b > 1), backward=1)
    t.call(1, 3)  # the scale; backwards also the stack of heads, the slice of the row and the sum of its gradients
    t.call(0, 1)
    if s.rotary:
        t.product(2 * b * rows * d * d)  # keys
        _rotate(t, s, rows, True)
        t.call(0, int(not s.cast))  # the keys' gradient comes transposed and is copied
        t.product(2 * b * rows * d, 2)
        t.call(1, 1, s.tokens(b * rows))
    else:
        t.product(2 * b * d * d)  # q W_k
        t.product(2 * b * h * rows * d, 2)
    t.call(1, 1, b * h * (rows + p) * s.element)  # softmax
    t.product(2 * b * h * rows * d, 2)
    t.call(0, 1)  # the two gradients of the normed rows
    t.saved += s.tokens(b * h)
    if p and s.rotary:
        t.product(2 * n * p * d * d)
        t.product(2 * b * p * d, 2)
        t.product(2 * b * h * p * d, 2, backward=2 + shared)
        t.call(3, 7 + shared)
    elif p:
        t.product(2 * b * h * p * d, 2, calls=1 + (shared and s.training))
        t.saved += s.tokens(b * h) * shared  # the copy that a product with shared prompts makes
        t.product(2 * b * h * p * d, 2, backward=2 + shared)
        t.call(2, 5)  # the joined scores and the sum of both reads; backwards the slices and sums
    t.product(2 * b * d * d)  # W_v
    t.call(1 + s.qkv_bias)
    t.product(2 * b * d * d)
    t.call(1, 1)  # the residual, of one row


def _queries(t: Tally, s: Sizes, prompts: PromptCost, readout: str) -> None:
    """Frozen rows, what the queries become in their blocks, and the head behind both.

    "recompute" is "rewritten": frozen rows save nothing.
    """
    rewritten = s.graph != "papers"
    frozen, answers = Tally(), Tally()
    if rewritten:
        _rewritten(frozen, s, None, readout, False, False)
    else:
        _papers(frozen, s, None, readout, False)
    if s.fc_norm:
        _norm(frozen, s, s.batch)
    t.add(_constant(frozen))
    ready = rewritten and not s.training
    t.call(ready)  # the queries are compared with those whose share of the work is kept
    for i in prompts.layers:
        if not ready or s.rotary:
            prompts.make(answers, i)
            answers.call(s.cast and prompts.cast, s.cast and prompts.cast)
        (_answers if rewritten else _papers_answers)(answers, s, prompts.count, s.cast and prompts.cast)
    prompts.gather(answers, 0)
    t.add(answers)
    _head(t, dataclasses.replace(s, width=prompts.features, fc_norm=False), True, 1)


def _answers(t: Tally, s: Sizes, p: int, cast: bool) -> None:
    """`fastprompt.vit.queries.answers` of p queries that all images share."""
    b, d, h, rows = s.batch, s.width, s.heads, s.own
    if s.training or s.rotary:
        _norm(t, s, p, keeps=cast)
        t.call(0, 1)  # the queries are read twice
        t.product(2 * p * d * d)
        t.call(1, 1)
    if s.rotary:
        t.product(2 * b * rows * d * d, 0)  # keys
        _rotate(t, s, rows, False)
        t.product(2 * b * p * rows * d, calls=1 + 2 * (b > 1), backward=1 + 2 * (b > 1))
        t.saved += s.tokens(b * rows)
    else:
        if s.training:
            t.product(2 * p * d * d, backward=2)
        t.product(2 * b * h * p * rows * d, calls=1 + (s.training and b > 1), backward=1 + (b > 1))
    t.call(1, 1, b * h * p * rows * s.element)  # softmax
    t.product(2 * b * h * p * rows * d)
    t.saved += s.tokens(b * rows)  # the normed rows
    t.call(1, 1)
    t.product(2 * b * p * d * d)  # W_v
    t.call(1 + s.qkv_bias)
    t.product(2 * b * p * d * d)
    t.call(1, 1)  # the residual, shared by images
    _mlp(t, s, b * p, folded=True)


def _papers_answers(t: Tally, s: Sizes, p: int, cast: bool) -> None:
    """The queries' part of `reference.run_asked_block`: p rows for each image."""
    b, d, h, rows = s.batch, s.width, s.heads, s.own
    t.call(0, 1)  # the images share the queries
    _norm(t, s, b * p, keeps=False)
    t.saved += s.tokens(p)
    t.call(0, 1)
    t.product(2 * b * p * d * d, backward=3)
    scores = b * h * p * rows
    if s.training and s.cast and p * rows <= SMALL_SCORES:  # plain products
        t.call(1, 1)
        t.product(2 * scores * s.head_dim, calls=1 + (2 - s.rotary) * (b > 1))  # rotated keys lie as products read them
        t.call(1, 1, scores * s.element)
        t.product(2 * scores * s.head_dim, calls=1 + (b > 1))
        t.call(1, 1, s.tokens(b * rows, 2 * d))
    else:
        t.forward += 4 * scores * s.head_dim
        t.backward += 10 * scores * s.head_dim
        t.call(1, 1, s.tokens(b * rows, (3 + s.rotary) * d) + s.tokens(b * p, 2 * d) + 4 * b * h * p)
    t.product(2 * b * p * d * d)
    if s.layer_scale:
        t.call(1, 1)
    t.call(1)
    _mlp(t, s, b * p, folded=False)


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
