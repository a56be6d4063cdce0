"""What a call takes at least: FLOPs of our graph by formula, bytes that cannot be avoided, and this chip's rates.

`python -m gpu.floors` prints the floors of every method at an H200's measured rates, without a GPU.

* FLOPs: `fastprompt.cost` of the rewritten graph. The papers' graph computes the same numbers with more.
* Bytes: the folded weights once, in a training step a second time for gradients of activations; images once; in a
  training step what is saved for the backward, written and read once. Other activations may stay on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import fastprompt as fp
from fastprompt.cost import cost

COPY, PRODUCT = 4.3e12, 790e12  # bytes per second, reads and writes counted, and bfloat16 FLOP/s, as an H200 measured


class Floor(NamedTuple):
    """Of one call."""

    flops: float
    nbytes: float

    def seconds(self, copied: float = COPY, multiplied: float = PRODUCT) -> float:
        """The longer of both, as products and copies can overlap.

        copied: bytes per second. multiplied: FLOP/s.
        """
        return max(self.flops / multiplied, self.nbytes / copied)


def floor(model: fp.PromptedViT, batch: int, trains: bool) -> Floor:
    """The floor of a forward, or of a training step without its optimizer."""
    backbone = model.backbone
    dtype = str(backbone.dtype).split(".")[1]
    of_ours = cost(
        backbone, model.config, model.readout, "rewritten", trains, dtype, batch, num_classes=model.num_classes or 1
    )
    h, w = backbone.image_size
    nbytes = resident(model) * (1 + trains) + batch * (4 * 3 * h * w + 2 * of_ours.saved_bytes)
    return Floor(of_ours.flops * batch, nbytes)


def resident(model: fp.PromptedViT, papers: bool = False) -> int:
    """Bytes of the weights that a forward of our graph or of the papers' reads, each memory once."""
    tensors = list(model.parameters())
    folded = model.backbone.folded()
    if not papers and folded is not None:
        unread = {id(p) for block in model.backbone.blocks for p in block.parameters()}
        tensors = [p for p in tensors if id(p) not in unread]
        tensors += [x for block in folded.blocks for x in (*block.parameters(), *block.buffers())]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())
