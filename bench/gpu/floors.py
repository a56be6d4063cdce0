"""What a call takes at least: FLOPs of our graph by formula, bytes that cannot be avoided, and this chip's rates.

`python -m gpu.floors > results/floors.md` writes the floors of every method at an H200's measured rates, without a GPU;
the stages of a device divide the floor by its own rates.

* FLOPs: `fastprompt.cost` of the rewritten graph. The papers' graph computes the same numbers with more.
* Bytes: the folded weights once, in a training step a second time for gradients of activations; images once; in a
  training step what is saved for the backward, written and read once. Other activations may stay on the chip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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


def lines() -> list[str]:
    """The table of all methods and batches of the stages, for ViT-B/16 at 224 px."""
    from cost import on_a_gpu, random_backbone

    from gpu.models import BATCHES, METHODS, NUM_CLASSES

    backbone, small = random_backbone(), random_backbone("vit_tiny_patch16_224", img_size=64)
    found = []
    for name, config in METHODS.items():
        model = fp.PromptedViT(backbone, config, NUM_CLASSES)
        counts = on_a_gpu(fp.PromptedViT(small, config, NUM_CLASSES), torch.randn(2, 3, 64, 64))
        for trains, (ours, _) in zip((False, True), counts, strict=True):
            for batch in sorted(BATCHES):
                of = floor(model, batch, trains)
                by = "FLOPs" if of.flops / PRODUCT > of.nbytes / COPY else "bytes"
                found.append(
                    f"| {name} | {'training step' if trains else 'inference'} | {batch} | {of.flops / 1e9:,.1f} | "
                    f"{of.nbytes / 2**20:,.0f} | {1e3 * of.seconds():.3f} | {by} | {ours} |"
                )
    return found


HEAD = f"""# Floors

What a call takes at least on an H200, computed by `PYTHONPATH=bench python -m gpu.floors`: the longer of its FLOPs at
{PRODUCT / 1e12:.0f} TFLOP/s and its bytes at {COPY / 1e12:.1f} TB/s, which an H200 measured for a bfloat16 product of
8192³ and for a copy. ViT-B/16 at 224 px, backbone in bfloat16, head of 100 classes; a training step is without its
optimizer. Dispatches are those of `results/cost.md`, a launch each at least unless a graph or a compiler joins them.

| method | job | batch | GFLOPs | MiB | floor, ms | by | dispatches |
|---|---|---:|---:|---:|---:|---|---:|
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(HEAD + "\n".join(lines()))
