from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats as scipy_stats
from torch import Tensor

from fastprompt.kernels.vae_prompts import LOGVAR_RANGE, Decoder, vae_prompts
from fastprompt.kernels.vae_prompts.reference import kl_per_unit, philox, philox_normal

Z, H, M, D, L = 3, 5, 2, 4, 3


def decoder(dtype: torch.dtype = torch.float64, latent: int = Z) -> Decoder:
    return Decoder(*(torch.randn(s, dtype=dtype) for s in ((H, latent), (H,), (M * D, H), (M * D,))))


def signed(high: int, low: int) -> int:
    """The int64 whose bits are the two 32-bit words."""
    value = high << 32 | low
    return value - (1 << 64) if value >= 1 << 63 else value


# kat_vectors of Random123, philox4x32-10: counter, key -> words
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    seed = torch.tensor([signed(key[1], key[0]), signed(counter[3], counter[2])])
    block = torch.tensor([signed(counter[1], counter[0])])
    assert philox(seed, block).tolist() == [words]


def test_philox_blocks_are_independent_of_their_neighbours() -> None:
    seed = torch.tensor([123, 4])
    together = philox(seed, torch.arange(5))
    assert torch.equal(together, torch.cat([philox(seed, torch.tensor([i])) for i in range(5)]))
    assert len(set(together.flatten().tolist())) == 20


def test_normals_are_standard() -> None:
    x = philox_normal(torch.tensor([7, 0]), 200_000, torch.float64)
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.015
    assert abs((x**3).mean()) < 0.03
    assert abs((x**4).mean() - 3) < 0.08
    assert scipy_stats.kstest(x.numpy(), "norm").pvalue > 1e-3
    for lag in (1, 2, 3, 4):
        assert abs((x[:-lag] * x[lag:]).mean()) < 0.01


def test_normals_come_from_the_words_by_box_muller() -> None:
    seed = torch.tensor([11, 2])
    words = philox(seed, torch.arange(2)).flatten().tolist()
    expected = []
    for a, b in zip(words[0::2], words[1::2], strict=True):
        u1, u2 = 1 - (a >> 8) / 2**24, (b >> 8) / 2**24
        radius = math.sqrt(-2 * math.log(u1))
        expected += [radius * math.cos(2 * math.pi * u2), radius * math.sin(2 * math.pi * u2)]
    torch.testing.assert_close(philox_normal(seed, 7, torch.float64), torch.tensor(expected[:7]).double())


def test_normals_are_finite_at_the_ends_of_the_uniforms(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastprompt.kernels.vae_prompts import reference

    ends = torch.tensor([[0, 0, 2**32 - 1, 2**32 - 1]])
    monkeypatch.setattr(reference, "philox", lambda seed, blocks: ends)
    for dtype in (torch.float32, torch.float64):
        x = philox_normal(torch.tensor([0, 0]), 4, dtype)
        assert torch.isfinite(x).all()
        assert x[:2].tolist() == [0, 0]
        assert x.abs().max() < 6


def test_float32_and_float64_normals_are_one_stream() -> None:
    seed = torch.tensor([2**40 + 5, 9])
    single, double = philox_normal(seed, 1000, torch.float32), philox_normal(seed, 1000, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=2e-6)


def test_seed_and_offset_choose_the_stream() -> None:
    streams = [philox_normal(torch.tensor(s), 64, torch.float64) for s in ([1, 0], [1, 1], [2, 0], [1 + 2**32, 0])]
    for i, a in enumerate(streams):
        assert torch.equal(a, streams[i])
        for b in streams[:i]:
            assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.5
    assert torch.equal(philox_normal(torch.tensor([1, 0]), 5, torch.float64), streams[0][:5])


def test_kl_is_that_of_torch_distributions() -> None:
    normal = torch.distributions.Normal
    stats = torch.randn(4, 2 * Z).double()
    _, kl = vae_prompts(stats, [decoder()], torch.zeros(L, 1, D).double())
    mu, logvar = stats.chunk(2, dim=1)
    expected = torch.distributions.kl_divergence(normal(mu, (logvar / 2).exp()), normal(0, 1)).sum(1)
    torch.testing.assert_close(kl, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(
        vae_prompts(torch.zeros(4, 2 * Z), [decoder(torch.float32)], torch.zeros(L, 1, D))[1], torch.zeros(4)
    )


def test_log_variance_is_clamped() -> None:
    stats = torch.tensor([[0.0, 100.0], [0.0, -100.0]], dtype=torch.float64)
    _, kl = vae_prompts(stats, [decoder(latent=1)], torch.zeros(L, 1, D).double())
    expected = kl_per_unit(torch.zeros(2).double(), torch.tensor(LOGVAR_RANGE[::-1]).double())
    torch.testing.assert_close(kl, expected)
    assert LOGVAR_RANGE == (-10.0, 4.0)


def decode_by_hand(d: Decoder, z: Tensor) -> Tensor:
    h = d.w1 @ z + d.b1
    h = torch.tensor([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in h.tolist()], dtype=torch.float64)
    return (d.w2 @ h + d.b2).view(M, D)


def test_without_seed_the_latent_is_the_mean() -> None:
    stats, d, domain = torch.randn(2, 2 * Z).double(), decoder(), torch.randn(L, 1, D).double()
    prompts, _ = vae_prompts(stats, [d], domain)
    assert prompts.shape == (L, 2, 1 + M, D)
    for layer in range(L):
        for i in range(2):
            assert torch.equal(prompts[layer, i, :1], domain[layer])
            torch.testing.assert_close(prompts[layer, i, 1:], decode_by_hand(d, stats[i, :Z]))


def test_with_seed_the_latent_is_sampled() -> None:
    stats, d, domain = torch.randn(2, 2 * Z).double(), decoder(), torch.randn(L, 1, D).double()
    seed = torch.tensor([5, 6])
    prompts, _ = vae_prompts(stats, [d], domain, seed)
    mu, logvar = stats.chunk(2, dim=1)
    z = mu + (logvar / 2).exp() * philox_normal(seed, 2 * Z, torch.float64).view(2, Z)
    for i in range(2):
        torch.testing.assert_close(prompts[1, i, 1:], decode_by_hand(d, z[i]))
    assert torch.equal(prompts, vae_prompts(stats, [d], domain, seed)[0])
    assert not torch.allclose(prompts, vae_prompts(stats, [d], domain, torch.tensor([5, 7]))[0])


def test_a_decoder_for_each_layer() -> None:
    stats, decoders, domain = (
        torch.randn(2, 2 * Z).double(),
        [decoder() for _ in range(L)],
        torch.randn(L, 1, D).double(),
    )
    prompts, _ = vae_prompts(stats, decoders, domain)
    for layer, d in enumerate(decoders):
        torch.testing.assert_close(prompts[layer, 1, 1:], decode_by_hand(d, stats[1, :Z]))


def test_no_domain_prompts_and_empty_batch() -> None:
    prompts, kl = vae_prompts(torch.zeros(0, 2 * Z), [decoder(torch.float32)], torch.zeros(L, 0, D))
    assert prompts.shape == (L, 0, M, D)
    assert kl.shape == (0,)


def test_half_precision_statistics_are_read_in_float32() -> None:
    stats = torch.randn(2, 2 * Z).bfloat16()
    prompts, kl = vae_prompts(stats, [decoder(torch.float32)], torch.zeros(L, 1, D, dtype=torch.bfloat16))
    assert (prompts.dtype, kl.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("seed", [None, torch.tensor([3, 4])])
@pytest.mark.parametrize("count", [1, L])
def test_gradients(seed: Tensor | None, count: int) -> None:
    tensors = [
        0.3 * torch.randn(2, 2 * Z),
        torch.randn(L, 1, D),
        *(t for _ in range(count) for t in decoder()),
    ]
    tensors = [t.double().requires_grad_() for t in tensors]

    def call(stats: Tensor, domain: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return vae_prompts(stats, [Decoder(*rest[4 * i : 4 * i + 4]) for i in range(count)], domain, seed)

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"stats": torch.zeros(2, 6).int()}, TypeError, "stats must be a floating-point tensor"),
        ({"domain": None}, TypeError, "domain must be a floating-point tensor"),
        ({"stats": torch.zeros(2, 5)}, ValueError, r"stats must have shape \(B, 2Z\), got \(2, 5\)"),
        ({"stats": torch.zeros(6)}, ValueError, "stats must have shape"),
        ({"domain": torch.zeros(L, D)}, ValueError, r"domain must have shape \(L, P - m, D\)"),
        ({"decoders": [None, None]}, ValueError, r"decoders must be 1 or as many as layers \(3\), got 2"),
        (
            {"stats": torch.zeros(2, 8)},
            ValueError,
            r"decoders\[0\] must map 4 to a multiple of 4, got 3 to 8",
        ),
        ({"domain": torch.zeros(L, 1, 5)}, ValueError, "to a multiple of 5, got 3 to 8"),
        ({"seed": torch.zeros(2)}, TypeError, "seed must be an int64 tensor"),
        ({"seed": torch.zeros(3).long()}, TypeError, r"seed must be an int64 tensor of shape \(2,\)"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "stats": torch.zeros(2, 2 * Z),
        "decoders": [decoder(torch.float32)],
        "domain": torch.zeros(L, 1, D),
    }
    with pytest.raises(error, match=message):
        vae_prompts(**{**good, **change})
