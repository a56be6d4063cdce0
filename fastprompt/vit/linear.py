"""Products with frozen weights, by the faster of the two CPU matrix libraries that PyTorch ships.

PyTorch multiplies float32 matrices with MKL, which leaves half of the hardware unused on non-Intel CPUs. bfloat16 goes
to oneDNN, but through a wrapper that takes a tenth of the time. oneDNN's own operator has no backward; `linear` adds
one, which needs no gradient of the frozen weight. A dispatch mode, such as a FLOP counter, sees PyTorch's Linear.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.kernels import stopwatch
from fastprompt.kernels.dispatch import observed
from fastprompt.vit.weights import ACTIVATIONS, Block, Dense

CLEARLY_FASTER = 1.3
ROUNDS = 9
PRODUCTS = "float32 products"
"""Key under which a run records whether it uses oneDNN or MKL."""


class FrozenLinear(Dense):
    """A `Dense` whose weight never trains."""

    @classmethod
    def sharing(cls, source: Dense) -> FrozenLinear:
        """Return one with the tensors of another `Dense`."""
        dense = cls(source.weight[:0], None)
        dense.weight, dense.bias = source.weight, source.bias
        return dense

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)

    def part(self, x: Tensor, outputs: slice) -> Tensor:
        """Compute some of the outputs alone, from the weight as it is."""
        return linear(x, self.weight[outputs], None if self.bias is None else self.bias[outputs])

    def input_gradient(self, grad: Tensor) -> Tensor:
        """Compute ẋ = ẏ W for gradients ẏ (..., out) of the outputs."""
        return linear(grad, self.weight.to(grad.dtype).t(), None)


def outputs_of(dense: Dense, x: Tensor, outputs: slice) -> Tensor:
    """Compute some of a Linear's outputs for x (..., in)."""
    if isinstance(dense, FrozenLinear):
        return dense.part(x, outputs)
    return linear(x, dense.weight[outputs], None if dense.bias is None else dense.bias[outputs])


def input_gradient(dense: Dense, grad: Tensor) -> Tensor:
    """Compute ẋ = ẏ W for gradients ẏ (..., out) of a frozen Linear's outputs."""
    if isinstance(dense, FrozenLinear):
        return dense.input_gradient(grad)
    return linear(grad, dense.weight.to(grad.dtype).t(), None)


class PackedLinear(FrozenLinear):
    """A `FrozenLinear` that also keeps its weight in oneDNN's layout and fuses an activation: act(x Wᵀ + b).

    It is for a CPU. Elsewhere, and where a compiler or a dispatch mode looks, it computes the same from the plain
    weight.

    Args:
        trains: keep the layout for the backward, too; no activation is fused then.
    """

    def __init__(self, source: Dense, act: str = "identity", trains: bool = False) -> None:
        super().__init__(source.weight[:0], None)
        self.weight, self.bias, self.act = source.weight, source.bias, act
        weight = source.weight.detach()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self.transposed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous(), None) if trains else None

    def forward(self, x: Tensor) -> Tensor:
        recorded = torch.is_grad_enabled()
        unfit = x.dtype != self.weight.dtype or x.numel() == 0 or (recorded and self.transposed is None)
        if unfit or _not_for_onednn():
            return ACTIVATIONS[self.act](super().forward(x))
        if recorded and x.requires_grad:
            y: Tensor = _PackedProduct.apply(x, self)
            return y
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, *FUSED[self.act])

    def input_gradient(self, grad: Tensor) -> Tensor:
        if self.transposed is None or grad.dtype != self.weight.dtype or grad.numel() == 0 or _not_for_onednn():
            return super().input_gradient(grad)
        return _product(grad, self.transposed, None)


class _PackedProduct(torch.autograd.Function):
    """oneDNN's Linear of a packed weight, and ẋ = ẏ W of the one that is packed for it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: PackedLinear) -> Tensor:
        ctx.module = module
        return _product(x, module.packed, module.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():  # a second derivative needs an operator that has one
            return linear(grad, ctx.module.weight.t(), None), None
        return ctx.module.input_gradient(grad), None


FUSED: dict[str, tuple[str, list[Any], str]] = {
    "identity": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
}
"""oneDNN's names for the activations."""


def pack(block: Block, trains: bool = False) -> None:
    """Turn the Linears of a frozen block into `PackedLinear`s, if that can be faster.

    For inference they fuse the MLP's activation. Compilers and exporters cannot read oneDNN's layout; they see the
    plain weights.
    """
    weight, mlp = block.qkv.weight, block.mlp
    if weight.device.type != "cpu" or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    if weight.dtype == torch.bfloat16:
        pays = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        pays = weight.dtype == torch.float32 and onednn_is_faster()
    if not pays:
        return
    fused = mlp.act in FUSED and mlp.glu == "none" and not trains
    block.qkv, block.proj = PackedLinear(block.qkv, trains=trains), PackedLinear(block.proj, trains=trains)
    mlp.fc1 = PackedLinear(mlp.fc1, mlp.act if fused else "identity", trains)
    mlp.fc2 = PackedLinear(mlp.fc2, trains=trains)
    mlp.act = "identity" if fused else mlp.act


def _not_for_onednn() -> bool:
    """Whether something looks at the operators that run, or changes them."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_autocast_enabled("cpu")
        or observed()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b for x (..., in), weight (out, in) and bias (out,), both without a gradient."""
    if (
        x.device.type != "cpu"
        or x.dtype != weight.dtype
        or weight.requires_grad
        or x.numel() == 0
        or _not_for_onednn()
        or not (
            (x.dtype == torch.float32 and onednn_is_faster()) or (x.dtype == torch.bfloat16 and onednn_has_bfloat16())
        )
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return _OneDNNLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


@functools.cache
def onednn_has_bfloat16() -> bool:
    """Whether oneDNN's operator multiplies bfloat16 in hardware here."""
    return (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        and bfloat16_is_fast(torch.device("cpu"))
    )


def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product is clearly faster than MKL's on this machine.

    This is measured once per process. The two differ in their last bits, so a training run records the answer and uses
    it again when it resumes. If measurements are switched off, the answer is False.
    """
    return stopwatch.decide(PRODUCTS, faster_product, "MKL") == "oneDNN"


@functools.cache
def faster_product() -> str:
    """Name the library that takes the least time for a forward and its backward; the machine may do other work too."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkldnn.is_available():
        return "MKL"
    with torch.inference_mode():
        x, weight = torch.ones(256, 768), torch.ones(768, 768)
        products: tuple[Callable[..., Tensor], ...] = (F.linear, _product)
        best = [math.inf, math.inf]
        for _ in range(ROUNDS):  # by turns: what else the machine does slows down both
            for i, product in enumerate(products):
                began = time.perf_counter()
                product(x, weight, None)
                product(x, weight.t(), None)
                best[i] = min(best[i], time.perf_counter() - began)
    return "oneDNN" if best[0] > CLEARLY_FASTER * best[1] else "MKL"


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware. Elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if not hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 has none; AMX tiles multiply bfloat16, too
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    """oneDNN's Linear with the backward ẋ = ẏ W; the weight and the bias are constants."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return linear(grad, weight.t(), None), None, None
