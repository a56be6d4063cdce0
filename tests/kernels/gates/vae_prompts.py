"""What the gates know of `vae_prompts`."""

from __future__ import annotations

from types import ModuleType
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from kernel_bytes import formula as formula
from parity import same
from spec import Case, Draw, Inputs
from torch import Tensor

from fastprompt.kernels import dispatch
from fastprompt.kernels.dispatch import use_backend
from fastprompt.kernels.vae_prompts import Decoder, reference, vae_prompts

MODULE = "fastprompt.kernels.vae_prompts.triton"
SEED = (2**40 + 5, 2**33 + 9)


def decoders_of(x: Inputs) -> list[Decoder]:
    """The decoders that the inputs w1_0, b1_0, … hold."""
    return [Decoder(*(x[f"{name}_{i}"] for name in Decoder._fields)) for i in range(x["count"])]


def case(
    name: str,
    layers: int,
    batch: int,
    static: int,
    instance: int,
    width: int,
    latent: int,
    hidden: int,
    decoders: int = 1,
    noise: bool = True,
    permuted: bool = False,
    shares: int = 1,
    **options: object,
) -> Case:
    """A case of the given sizes.

    permuted: statistics, domain prompts and decoder with swapped strides. shares: of a decoder's columns, for the byte
    formulas.
    """

    def inputs(draw: Draw) -> Inputs:
        def matrix(rows: int, columns: int) -> Tensor:
            return (draw(columns, rows).t() if permuted else draw(rows, columns)) * columns**-0.5

        found: Inputs = {
            "stats": draw(2 * latent, batch).t() if permuted else draw(batch, 2 * latent),
            "domain": draw(width, static, layers).permute(2, 1, 0) if permuted else draw(layers, static, width),
            "seed": torch.tensor(SEED) if noise else None,
            "count": decoders,
        }
        for i in range(decoders):
            found |= {
                f"w1_{i}": matrix(hidden, latent),
                f"b1_{i}": draw(hidden),
                f"w2_{i}": matrix(instance * width, hidden),
                f"b2_{i}": draw(instance * width),
            }
        return found

    grads = ("stats", "domain", *(f"{field}_{i}" for i in range(decoders) for field in Decoder._fields))
    sizes = {
        "L": layers // decoders,
        "B": batch,
        "S": static,
        "M": instance,
        "D": width,
        "Z": latent,
        "H": hidden,
        "noise": int(noise),
        "n": decoders,
        "shares": shares,
    }
    return Case(
        name,
        inputs,
        lambda module, x: module.vae_prompts(x["stats"], decoders_of(x), x["domain"], x["seed"]),
        lambda x: reference.vae_prompts(x["stats"], decoders_of(x), x["domain"], x["seed"]),
        grads,
        sizes,
        **options,
    )  # type: ignore[arg-type]


CASES = [
    case("odd sizes", 3, 5, 2, 3, 20, 7, 11),
    case("without noise", 3, 5, 2, 3, 20, 7, 11, noise=False),
    case("a decoder for each layer", 3, 4, 1, 2, 12, 6, 9, decoders=3),
    case("one of everything", 1, 1, 1, 1, 1, 1, 1, noise=False),
    case("no domain prompts", 2, 3, 0, 2, 18, 5, 6),
    case("wide", 2, 3, 1, 1, 70, 5, 70, noise=False),
    case("many latent units", 2, 2, 1, 1, 5, 40, 3),
    case("permuted", 2, 3, 2, 2, 12, 6, 9, permuted=True),
    case("a share for each prompt", 1, 2, 1, 18, 6, 5, 6),
    case("many images", 2, 37, 1, 1, 10, 5, 6),
    case("many images, gfx942", 2, 37, 1, 1, 70, 5, 6, family="gfx942"),
]
TRAFFIC = [
    case("bytes", 4, 32, 2, 2, 128, 32, 64, shares=4, dtypes=("float16",)),
    case("bytes, a decoder for each layer", 2, 32, 2, 2, 128, 32, 64, 2, shares=4, dtypes=("float16",)),
]
LOADED_ONCE = {"_vae_prompts_bwd_decoder": ("grad",)}
FEW_PROGRAMS: dict[str, dict[str, str]] = {}


def at_size(batch: int) -> list[Case]:
    """V²APT on a ViT-B, with one decoder and with one for each layer."""
    shares = {1: 60, 32: 20, 128: 5}[batch]
    return [
        case("V2APT", 12, batch, 5, 5, 768, 64, 64, shares=shares),
        case("a decoder for each layer", 12, batch, 5, 5, 768, 64, 64, 12, shares=shares, compiled=("float16",)),
    ]


def check_noise_is_the_reference_stream_bit_for_bit(module: ModuleType) -> None:
    for seed in ([0, 0], [-1, -1], list(SEED), [2**63 - 1, 2**31 + 7]):
        key, blocks = torch.tensor(seed), torch.tensor([0, 1, 2, 77, 2**31, 2**32 + 3, 2**40])
        words = torch.empty(4, 4 * len(blocks), dtype=torch.int64)
        numbers = (4 * blocks[:, None] + torch.arange(4)).flatten()
        _words[(1,)](module._philox, key, numbers, words, len(numbers), BLOCK=32)
        assert torch.equal(words.t(), reference.philox(key, blocks).repeat_interleave(4, 0))


def check_normals_are_within_four_ulp(module: ModuleType) -> None:
    key, count = torch.tensor(SEED), 16384
    found = torch.empty(count)
    _normals[(1,)](module._normal, key, found, BLOCK=count)
    expected = reference.philox_normal(key, count, torch.float32)
    ulp = np.spacing(np.abs(expected.numpy()))
    assert (np.abs(found.numpy() - expected.numpy()) <= 4 * ulp).all()


def check_kl_of_a_standard_normal_is_zero(module: ModuleType) -> None:
    weights = Decoder(torch.randn(3, 4), torch.randn(3), torch.randn(10, 3), torch.randn(10))
    _, kl = module.vae_prompts(torch.zeros(5, 8), [weights], torch.randn(2, 1, 5), None)
    assert torch.equal(kl, torch.zeros(5))


def check_log_variance_is_clamped(module: ModuleType) -> None:
    stats = torch.tensor([[0.5, 100.0], [0.5, -100.0], [0.5, 3.9], [0.5, -9.9]], requires_grad=True)
    weights = Decoder(torch.randn(3, 1), torch.randn(3), torch.randn(10, 3), torch.randn(10))
    results = []
    for call in (module.vae_prompts, reference.vae_prompts):
        prompts, kl = call(stats, [weights], torch.zeros(2, 1, 5), torch.tensor(SEED))
        results.append((kl, *torch.autograd.grad(prompts.sum() + kl.sum(), stats)))
    same(results[0][0], results[1][0], 1e-6)
    same(results[0][1], results[1][1], 1e-5)
    assert results[0][1][:2, 1].tolist() == [0, 0]


def check_shares_of_unequal_size(module: ModuleType) -> None:
    leaves = [torch.randn(size, requires_grad=True) for size in ((3, 8), (3, 4), (3,), (25, 3), (25,))]
    results = []
    with mock.patch.object(module, "PROGRAMS", 2):  # five prompts are shares of two, two and one
        for call in (module.vae_prompts, reference.vae_prompts):
            prompts, _ = call(leaves[0], [Decoder(*leaves[1:])], torch.zeros(1, 0, 5), torch.tensor(SEED))
            results.append(torch.autograd.grad((prompts**2).sum(), leaves))
    for found, expected in zip(*results, strict=True):
        same(found, expected, 1e-5)


def check_empty_batch(module: ModuleType) -> None:
    leaves = [torch.randn(size, requires_grad=True) for size in ((3, 4), (3,), (10, 3), (10,))]
    stats, domain = torch.randn(0, 8, requires_grad=True), torch.randn(2, 1, 5, requires_grad=True)
    prompts, kl = module.vae_prompts(stats, [Decoder(*leaves)], domain, None)
    assert (prompts.shape, kl.shape) == ((2, 0, 3, 5), (0,))
    for grad in torch.autograd.grad(prompts.sum() + kl.sum(), [stats, domain, *leaves]):
        assert not grad.any()


def check_mixed_dtypes_under_autocast(module: ModuleType) -> None:
    stats = torch.randn(3, 8).bfloat16().requires_grad_()
    leaves = [torch.randn(size, requires_grad=True) for size in ((3, 4), (3,), (10, 3), (10,), (2, 1, 5))]

    def outputs(call: object) -> list[Tensor]:
        prompts, kl = call(stats, [Decoder(*leaves[:4])], leaves[4], torch.tensor(SEED))  # type: ignore[operator]
        return [prompts, kl, *torch.autograd.grad(prompts.square().sum() + kl.sum(), [stats, *leaves])]

    with torch.autocast("cpu", torch.bfloat16):
        found = outputs(module.vae_prompts)
    for one, other in zip(found, outputs(reference.vae_prompts), strict=True):
        same(one, other, 2**-7 if one.dtype == torch.bfloat16 else 1e-5)


def check_registration(module: ModuleType) -> None:
    weights = [torch.randn(3, 4), torch.randn(3), torch.randn(3, 10).t(), torch.randn(10)]
    stats, domain = torch.randn(8, 3).t(), torch.randn(5, 1, 2).permute(2, 1, 0)
    for seed in (None, torch.tensor(SEED)):
        ops = torch.ops.fastprompt
        torch.library.opcheck(ops.vae_prompts.default, (stats, weights, domain, seed))
        torch.library.opcheck(
            ops.vae_prompts_backward.default, (torch.randn(2, 3, 3, 5), torch.randn(3), stats, weights, domain, seed)
        )


def check_compiles_in_one_graph(module: ModuleType) -> None:
    def step(stats: Tensor, domain: Tensor, seed: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        return vae_prompts(2 * stats, [Decoder(*weights)], domain, seed)

    sizes = ((3, 8), (2, 1, 5), (3, 4), (3,), (10, 3), (10,))
    stats, domain, *weights = leaves = [torch.randn(size, requires_grad=True) for size in sizes]
    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        with use_backend("triton"):
            prompts, kl = call(stats, domain, torch.tensor(SEED), *weights)
        results.append([prompts, kl, *torch.autograd.grad((prompts**2).sum() + kl.sum(), leaves)])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert dispatch.choices["vae_prompts"].backend == "triton"


@triton.jit
def _words(philox: tl.constexpr, seed, numbers, out, count, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox(seed, tl.load(numbers + i, mask=i < count, other=0))
    tl.store(out + i, w0.to(tl.int64), mask=i < count)
    tl.store(out + count + i, w1.to(tl.int64), mask=i < count)
    tl.store(out + 2 * count + i, w2.to(tl.int64), mask=i < count)
    tl.store(out + 3 * count + i, w3.to(tl.int64), mask=i < count)


@triton.jit
def _normals(normal: tl.constexpr, seed, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, normal(seed, i.to(tl.int64)))


CHECKS = [
    check_noise_is_the_reference_stream_bit_for_bit,
    check_normals_are_within_four_ulp,
    check_kl_of_a_standard_normal_is_zero,
    check_log_variance_is_clamped,
    check_shares_of_unequal_size,
    check_empty_batch,
    check_mixed_dtypes_under_autocast,
    check_registration,
    check_compiles_in_one_graph,
]
MUTATIONS = [
    ("other block of words", "block = (tl.load(seed + 1), i // 4)", "block = (tl.load(seed + 1), i // 2)"),
    ("offset left out", "offset.to(tl.uint32),", "(offset * 0).to(tl.uint32),"),
    ("upper half of the counter left out", "(block >> 32).to(tl.uint32)", "(block * 0).to(tl.uint32)"),
    ("all bits of a word", "tl.where(second, w2, w0) >> 8", "tl.where(second, w2, w0) >> 7"),
    ("second pair is the first", "tl.where(second, w3, w1)", "tl.where(second, w1, w1)"),
    ("sine and cosine swapped", "((i + 1) % 2).to", "(i % 2).to"),
    ("sine without its sign", "tl.where(quarter & 2 == 0, value, -value)", "value"),
    (
        "angle reduced in one part",
        "angle - turns * 1.5703125 - turns * 0.0004837512969970703",
        "angle - turns * 1.5703125 - turns * 0.00048375",
    ),
    ("standard deviation for half of it", "mu += tl.exp(0.5 * logvar)", "mu += tl.exp(logvar)"),
    (
        "same noise for every image",
        "_normal(seed, b.to(tl.int64)[:, None] * Z + j[None, :])",
        "_normal(seed, b.to(tl.int64)[:, None] * 0 + j[None, :])",
    ),
    (
        "log variance not clamped from above",
        "_HIGH, propagate",
        "1e9, propagate",
    ),
    ("log variance not clamped from below", "tl.maximum(raw, _LOW", "tl.maximum(raw, -1e9"),
    ("means for log variances", "raw = tl.load(at + Z * stride_sz", "raw = tl.load(at + 0 * stride_sz"),
    ("first bias forgotten", "return acc + bias[None, :]", "return acc"),
    ("second bias forgotten", "acc += tl.load(b2 + c, mask=d < D, other=0.0).to(tl.float32)[None, :]", "acc += 0.0"),
    (
        "hidden units beyond H",
        "mask=(d[:, None] < D) & (h[None, :] < H), other=0.0)\n            acc",
        "mask=d[:, None] < D, other=0.0)\n            acc",
    ),
    ("tanh's GELU", "0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))", "x * tl.sigmoid(1.702 * x)"),
    ("instance prompts one row early", "layer * B * size + (S + row) * D", "layer * B * size + (S + row - 1) * D"),
    ("only the first layer", "in range(L):\n            tl.store(out", "in range(1):\n            tl.store(out"),
    ("domain prompts of the first layer", "tl.load(domain + layer * stride_dl", "tl.load(domain + 0 * stride_dl"),
    ("KL without -1", "tl.exp(logvar) - 1.0 - logvar", "tl.exp(logvar) - logvar"),
    ("KL of the last units", "nats += tl.sum", "nats = tl.sum"),
    ("backward: layers not summed", "g += tl.load(at + layer * stride_gl", "g = tl.load(at + layer * stride_gl"),
    ("backward: rows of the domain", "(S + row) * stride_gp", "row * stride_gp"),
    ("backward: images not summed", "            total += tl.sum(g, axis=0)", "            total = tl.sum(g, axis=0)"),
    ("backward: second weight of the last images", "a.to(w2.dtype.element_ty), acc,", "a.to(w2.dtype.element_ty),"),
    (
        "backward: domain of the last images",
        "total += tl.sum(g.to(tl.float32), axis=0)",
        "total = tl.sum(g.to(tl.float32), axis=0)",
    ),
    ("backward: GELU's slope", "return da * _gelu_slope(x)", "return da * _gelu(x)"),
    ("backward: sign in the slope", "+ x * _NORMAL_DENSITY", "- x * _NORMAL_DENSITY"),
    ("backward: last tile of the prompts", "da = tl.dot(g.to(w.dtype), w, da,", "da = tl.dot(g.to(w.dtype), w,"),
    (
        "backward: the first share of the columns",
        "first = (tl.cdiv(D, BLOCK_D), tl.program_id(2) * share)",
        "first = (tl.cdiv(D, BLOCK_D), 0)",
    ),
    ("backward: the last shares alone", "da += tl.sum(tl.load(shares", "da = tl.sum(tl.load(shares"),
    ("backward: shares beyond the last", "mask=(share < S) & inside[None, :]", "mask=inside[None, :]"),
    ("backward: last hidden units", "dz += tl.sum(of_image", "dz = tl.sum(of_image"),
    ("backward: last latent units of a hidden one", "x += tl.sum(z * w", "x = tl.sum(z * w"),
    ("backward: first bias forgotten", "x = tl.load(b1 + h + 0 * b", "x = 0.0 * tl.load(b1 + h + 0 * b"),
    ("backward: dz of the last decoder", "dz += tl.load(carried", "dz += 0.0 * tl.load(carried"),
    ("backward: sign of the KL's mean", "dz + nats * mu", "dz - nats * mu"),
    ("backward: KL's variance", "0.5 * nats * (tl.exp(logvar) - 1.0)", "0.5 * nats * tl.exp(logvar)"),
    ("backward: reparameterisation", "dlogvar += 0.5 * dz", "dlogvar += dz"),
    ("backward: clamp", "tl.where((raw > _LOW) & (raw < _HIGH), dlogvar, 0.0)", "dlogvar"),
    ("backward: mean and log variance swapped", "tl.store(out + Z, dlogvar", "tl.store(out, dlogvar"),
    ("backward: first bias of the last images", "total += tl.sum(of_unit", "total = tl.sum(of_unit"),
    ("backward: first weight of the last images", "dw += tl.sum(of_unit", "dw = tl.sum(of_unit"),
    ("backward: one image for two", "image = i - H + tl.arange(0, 1)", "image = (i - H) // 2 + tl.arange(0, 1)"),
    ("decoder of the first layer", "domain[i * group:(i + 1) * group]", "domain[:group]"),
]
