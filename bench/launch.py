"""Host time of the ops' Triton path, beside that of PyTorch's own operators: `python bench/launch.py`.

A small batch on a GPU takes as long as the host needs to launch it. Here a driver that launches nothing stands in for
CUDA's, so that no GPU is needed: what is timed is all that Python does until the launch, on tiny tensors. PyTorch's
operators run on the CPU, whose arithmetic on so few numbers takes next to no time.

    python bench/launch.py [--rounds 15] [--most RATIO]

Exit status 1 if a forward of `prefix_attention` takes more than `--most` times its peer's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastprompt.kernels import dispatch, launch
from fastprompt.kernels.adaptive_prompts import adaptive_prompts, reference as adaptive_reference
from fastprompt.kernels.add_norm import add_norm
from fastprompt.kernels.library_prompts import library_prompts, reference as library_reference
from fastprompt.kernels.prefix_attention import prefix_attention
from fastprompt.kernels.vae_prompts import Decoder, reference as vae_reference, vae_prompts

CALLS = 50


class Compiled:
    """A compiled kernel that runs nothing."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, grid: Any, stream: Any, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        pass

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def runner(*args: Any, stream: Any = None) -> None:
            if stream is None:
                stream = driver.active.get_current_stream(driver.active.get_current_device())
            self.run(*grid, stream, self.function, self.packed_metadata, None, None, None, *args)

        return runner


class Driver:
    """A driver of an H100 that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def stubbed() -> Iterator[None]:
    """Within this context kernels are bound, looked up and launched as on a GPU, and nothing runs; CPU tensors are
    taken for a GPU's.
    """

    def compiled(self: JITFunction, key: Any, *rest: Any) -> Compiled:
        return self.device_caches[0][0].setdefault(key, Compiled())

    def decide(op: str, wanted: str, *rest: Any) -> dispatch.Choice:
        kernels = wanted != "reference" and dispatch._has_module(op, "triton")
        return dispatch.Choice("triton" if kernels else "reference", "")

    before = driver._active
    driver.set_active(Driver())
    try:
        with (
            mock.patch.object(JITFunction, "_do_compile", compiled),
            mock.patch.object(dispatch, "_decide", decide),
            mock.patch.object(dispatch, "seconds", lambda step: step() or float("nan")),
            mock.patch.dict(dispatch.measured, clear=True),
            mock.patch.dict(launch._remembered, clear=True),
            mock.patch.dict(dispatch._settled, clear=True),
            mock.patch.object(dispatch, "REMEMBERED_ON", ("cpu",)),
        ):
            yield
    finally:
        driver._active = before


class Pair(NamedTuple):
    """An op and what PyTorch offers in its place, on the same inputs; `leaves` get gradients."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    leaves: list[Tensor]


def pairs() -> list[Pair]:
    """Each op with its eager peer, in its smallest size."""

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, requires_grad=True)

    q, k, v = (leaf(1, 2, 4, 16) for _ in range(3))
    prefix_k, prefix_v = (leaf(1, 2, 2, 16) for _ in range(2))
    logits, library = leaf(1, 2, 4), leaf(4, 16)
    other = leaf(1, 4, 16)
    tokens, weight, bias, mix, shift = leaf(1, 4, 16), leaf(16), leaf(16), leaf(2, 4), leaf(2)
    w1, w2 = leaf(2, 16), leaf(16, 2)
    stats, domain = leaf(1, 4), leaf(2, 1, 16)
    decoder = Decoder(leaf(3, 2), leaf(3), leaf(16, 3), leaf(16))
    bottleneck = (tokens, weight, bias, mix, shift, w1, w2)
    return [
        Pair(
            "prefix_attention",
            lambda: prefix_attention(q, k, v, prefix_k, prefix_v),
            lambda: F.scaled_dot_product_attention(q, torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)),
            [q, k, v, prefix_k, prefix_v],
        ),
        Pair(
            "add_norm",
            lambda: add_norm(tokens, other, 1e-6)[1],
            lambda: F.layer_norm(tokens + other, (16,), eps=1e-6),
            [tokens, other],
        ),
        Pair(
            "library_prompts",
            lambda: library_prompts(logits, library),
            lambda: library_reference.library_prompts(logits, library, "softmax"),
            [logits, library],
        ),
        Pair(
            "adaptive_prompts",
            lambda: adaptive_prompts(*bottleneck),
            lambda: adaptive_reference.adaptive_prompts(*bottleneck, 1.0, "relu", 1e-5, None, None, None),
            list(bottleneck),
        ),
        Pair(
            "vae_prompts",
            lambda: vae_prompts(stats, [decoder], domain)[0],
            lambda: vae_reference.vae_prompts(stats, [decoder], domain, None)[0],
            [stats, domain, *decoder],
        ),
    ]


def microseconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of a call, the ways taking turns."""
    for run in ways.values():
        for _ in range(3):
            run()
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            began = time.process_time()
            for _ in range(CALLS):
                run()
            found[name].append((time.process_time() - began) * 1e6 / CALLS)
    return {name: statistics.median(times) for name, times in found.items()}


def measured(rounds: int) -> list[tuple[str, str, dict[str, float]]]:
    """(op, job, microseconds by way) for every op and job."""
    rows = []
    with stubbed():
        for name, ours, peer, leaves in pairs():

            def under(backend: str, run: Callable[[], Any]) -> Callable[[], Any]:
                def call() -> Any:
                    with dispatch.use_backend(backend):
                        return run()

                return call

            def trained(run: Callable[[], Tensor], leaves: list[Tensor] = leaves) -> Callable[[], Any]:
                grad = torch.ones_like(run())
                return lambda: torch.autograd.grad(run(), leaves, grad)

            def inferred(run: Callable[[], Any]) -> Callable[[], Any]:
                def call() -> Any:
                    with torch.no_grad():
                        return run()

                return call

            for job, of in (("forward", inferred), ("forward and backward", trained)):
                ways = {"triton": of(under("triton", ours)), "auto": of(ours), "peer": of(peer)}
                rows.append((name, job, microseconds(ways, rounds)))
    return rows


def table(rows: list[tuple[str, str, dict[str, float]]]) -> str:
    """A line for each op and job, with the ratios to the peer."""
    lines = [f"{'op':18} {'job':21} {'triton µs':>10} {'auto µs':>9} {'peer µs':>9} {'triton ×':>9} {'auto ×':>7}"]
    for name, job, us in rows:
        lines.append(
            f"{name:18} {job:21} {us['triton']:10.1f} {us['auto']:9.1f} {us['peer']:9.1f} "
            f"{us['triton'] / us['peer']:9.2f} {us['auto'] / us['peer']:7.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=float, help="of a forward of prefix_attention, in times of its peer's")
    given = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 is set: nothing would be launched")
    torch.set_num_threads(1)
    rows = measured(given.rounds)
    print(table(rows))
    first = rows[0][2]
    sys.exit(int(given.most is not None and first["auto"] > given.most * first["peer"]))


if __name__ == "__main__":
    main()
