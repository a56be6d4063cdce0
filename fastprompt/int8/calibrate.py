"""Round the weights of a folded ViT to int8 so that its features stay as they are.

Rounding each weight to the nearest int8 moves the features of a ViT-S/14 almost twice as far as bfloat16. Here the
rounding errors of a Linear compensate each other on the inputs it really gets (Frantar et al., 2023, "GPTQ"): with
H = Σ x xᵀ over the calibration tokens, columns are rounded one after the other, and the error of each is spread over
the columns that are not rounded yet, so that ‖(W − Ŵ) x‖² stays small. Blocks are rounded in order, each on what the
rounded blocks before it compute.

Where activations will have 8 bits, each input of a Linear is multiplied by a factor, and its weights are divided by it
(Xiao et al., 2023, "SmoothQuant"). What the factors balance, the sizes of inputs and of weights, is chosen for each
Linear by the error of its outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastprompt.arguments import ArgumentError
from fastprompt.int8.arithmetic import (
    HIGHEST_WEIGHT,
    MOST_INNER,
    Rounded,
    round_rows,
    round_weight,
    weight_scale,
)
from fastprompt.int8.linear import LINEARS, linear_of, set_linear
from fastprompt.vit.forward import Reads, Rows, embed, run_block
from fastprompt.vit.frozen import FrozenViT
from fastprompt.vit.linear import FrozenLinear
from fastprompt.vit.weights import Block, Dense

DAMPING = 0.01
"""Added to the diagonal of H, × its mean: inputs that the calibration images hardly have keep their weights."""
COLUMNS = 128
"""Columns whose errors are spread within their group first."""
STRENGTHS = (0.0, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Exponents α of SmoothQuant's factors, max |W|^(1 − α) / max |x|^α, that are tried; 0 stands for no factors."""
SAMPLES = 1024
"""Rows on which they are compared."""


class _Watched(Dense):
    """A Linear that sums up H (K, K) of its inputs, and keeps some of them and the largest of each."""

    def __init__(self, source: Dense, rows_of_batch: int) -> None:
        super().__init__(source.weight, source.bias)
        self.weight, self.bias = source.weight, source.bias
        self.rows_of_batch = rows_of_batch
        self.hessian = torch.zeros(source.weight.shape[1], source.weight.shape[1], dtype=torch.float64)
        self.largest = torch.zeros(source.weight.shape[1])
        self.rows: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        self.hessian += (rows.t() @ rows).double()
        self.largest = torch.maximum(self.largest, rows.abs().amax(dim=0))
        self.rows.append(rows[:: max(1, len(rows) // self.rows_of_batch)].clone())
        return super().forward(x)

    def rounded(self, bits: int) -> Rounded:
        """Round the weight for activations of these bits."""
        weight = self.weight.detach()
        factor = torch.ones(weight.shape[1]) if bits == 12 else smoothing(weight, self.largest, torch.cat(self.rows))
        wide = factor.double()
        rounded, scale = compensated(weight / factor, self.hessian * wide * wide[:, None])
        return Rounded(rounded, scale, factor, bits)


def smoothing(weight: Tensor, largest: Tensor, rows: Tensor) -> Tensor:
    """Return the factors (K,) of inputs with which 8 bits change a Linear's outputs least.

    Args:
        weight: (N, K). largest: (K,), of |x| in each column. rows: (R, K), inputs on which outputs are compared.
    """
    exact, least = rows @ weight.t(), torch.inf
    of_rows, of_weight = largest.clamp_min(1e-5), weight.abs().amax(dim=0).clamp_min(1e-5)
    best = torch.ones_like(largest)
    for strength in STRENGTHS:
        factor = of_weight ** (1 - strength) / of_rows**strength if strength else best
        factor = factor / factor.log().mean().exp()
        v, step = round_rows(rows * factor, 8)
        scale = weight_scale(weight / factor)
        rounded = round_weight(weight / factor, scale).float() * scale[:, None]
        error = float((v * step @ rounded.t() - exact).square().mean())
        if error < least:
            best, least = factor, error
    return best


def round_blocks(backbone: FrozenViT, batches: Sequence[Tensor], bits: int) -> list[dict[str, Rounded]]:
    """Round the Linears of all blocks; their float32 weights are replaced by the rounded ones.

    Args:
        backbone: a private copy in float32 on the CPU.
        batches: images as the backbone takes them; all of them are in memory as tokens.
        bits: of activations.
    """
    parts = backbone.folded()
    if parts is None:
        raise ArgumentError("backbone", "must have tensors that were not made in inference mode")
    embedded = [embed(backbone, images, backbone.normalise(images), parts) for images in batches]
    turns = [backbone.turns(each.grid, torch.float32) for each in embedded]
    tokens = [each.tokens if backbone.norm_pre is None else backbone.norm_pre(each.tokens) for each in embedded]
    found = []
    for i, block in enumerate(parts.blocks):
        reads = [[Reads(turns=of_batch[i])] for of_batch in turns]
        kept = max(1, SAMPLES // len(batches))
        watched = {name: _Watched(linear_of(block, name), kept) for name in _roundable(block)}
        for name, dense in watched.items():
            set_linear(block, name, dense)
        for x, read in zip(tokens, reads, strict=True):
            run_block(block, Rows(x), read)
        rounded = {name: dense.rounded(bits) for name, dense in watched.items()}
        for name, dense in watched.items():
            plain = FrozenLinear(rounded[name].plain, None)
            plain.bias = dense.bias
            set_linear(block, name, plain)
        tokens = [run_block(block, Rows(x), read).data for x, read in zip(tokens, reads, strict=True)]
        found.append(rounded)
    return found


def _roundable(block: Block) -> list[str]:
    """The names of the Linears whose sums fit 32 bits."""
    return [name for name in LINEARS if linear_of(block, name).weight.shape[1] <= MOST_INNER]


def compensated(weight: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (N, K) to int8 and its scale, with errors that compensate each other under H (K, K).

    Columns with large inputs come first, so that others can still make up for their errors.
    """
    k, scale = weight.shape[1], weight_scale(weight.detach())
    order = hessian.diagonal().argsort(descending=True, stable=True)
    left, wide = weight.detach().double()[:, order], scale.double()[:, None]
    damping = DAMPING * hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    regular = hessian[order][:, order] + damping * torch.eye(k, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regular))
    spread = torch.linalg.cholesky(inverse, upper=True)  # row i: how column i's error moves the later columns
    rounded = torch.empty(left.shape, dtype=torch.int8)
    for start in range(0, k, COLUMNS):
        stop = min(start + COLUMNS, k)
        group, errors = left[:, start:stop], torch.empty(left.shape[0], stop - start, dtype=torch.float64)
        for j in range(stop - start):
            column = (group[:, j : j + 1] / wide).round().clamp(-HIGHEST_WEIGHT, HIGHEST_WEIGHT)
            rounded[:, order[start + j]] = column[:, 0].to(torch.int8)
            errors[:, j] = (group[:, j] - (column * wide)[:, 0]) / spread[start + j, start + j]
            group[:, j + 1 :] -= torch.outer(errors[:, j], spread[start + j, start + j + 1 : stop])
        left[:, stop:] -= errors @ spread[start:stop, stop:]
    return rounded, scale
