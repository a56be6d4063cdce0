"""Load on `fastprompt serve` over loopback: mixed tenants, hostile clients, dynamic batching against batch size 1.

    python bench/load_serve.py [--clients 16] [--seconds 10] [--rounds 5] [--out results/serve.md]

Two hosts with the same engine, one with batching and one without, are loaded in turn in every round by clients that
send their next picture when the last is answered. Every answer is compared with the engine's output for that picture
alone. `make load` writes results/serve.md; it needs an idle machine.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gc
import io
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cpuinfo
import httpx
import numpy as np
import torch
import tyro
from PIL import Image

import fastprompt as fp
from fastprompt.files import atomic_write
from fastprompt.serve.protocol import BASE, Ask, Work, classify_answer, embeddings_answer
from fastprompt.serve.tenants import HostSettings, answers, load

ROOT = Path(__file__).resolve().parents[1]
ADAPTERS = {
    "vpt-10": fp.VPTConfig(num_prompts=10),
    "vpt-50": fp.VPTConfig(num_prompts=50),
    "vapt-10": fp.VAPTConfig(num_prompts=10),
    "pgn-16": fp.PGNConfig(num_prompts=16),
}
PICTURES = 12
BODY_TIMEOUT = 2.0
MAX_BODY = 2**20
CLASSES = 10
SPREAD = 2.0
"""Standard deviation of a tenant's logits over the pictures, which makes its answers differ."""
FLOOR = {
    "float32": {"features": 1e-4, "log-probabilities": 1e-2},
    "bfloat16": {"features": 2**-8, "log-probabilities": 0.05},
}
"""Least tolerance of an answer, of features relative to their norm; where batches are found to change a tenant's
answers more, twice that. It also has to be nearest to its own among all pictures and tenants, four tolerances apart."""


@dataclass
class Flags:
    """Load test of `fastprompt serve`."""

    backbone: str = "clip-vit-b16"
    image_size: int = 112
    dtype: str = "float32"
    """Data type; in bfloat16, batching may change answers so much that tenants cannot be told apart, an error."""
    batch_size: int = 8
    batch_wait_ms: float = 5.0
    threads: int = 1
    """Number of the engine's threads; leave a core for the web process and the clients."""
    clients: int = 16
    hostile: int = 6
    """Number of additional hostile clients in the last part."""
    seconds: float = 10.0
    rounds: int = 5
    out: Path = ROOT / "results" / "serve.md"


@dataclass
class Round:
    """The results of one round of load."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    refused: dict[str, list[str]] = field(default_factory=dict)

    def rate(self) -> float:
        return len(self.latencies) / self.seconds


def pictures(size: int) -> list[np.ndarray]:
    """Make pictures (3, H, W) that a network can tell apart: noisy coloured stripes of many widths and directions."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    found = []
    for _ in range(PICTURES):
        angle, waves, phase = random.uniform(0, np.pi), random.uniform(1, 12), random.uniform(0, 6, (3, 1, 1))
        stripes = np.sin(2 * np.pi * waves * (np.cos(angle) * x + np.sin(angle) * y) + phase)
        levels = 128 + random.uniform(-60, 60, (3, 1, 1)) + 60 * stripes + random.normal(0, 8, (3, size, size))
        found.append(levels.clip(0, 255).astype(np.uint8))
    return found


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()


def make_adapters(folder: Path, backbone: fp.FrozenViT, shown: list[np.ndarray]) -> dict[str, Path]:
    """Build adapters whose heads read the directions in which the pictures differ most, each in its own mixture."""
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed)
        names = [f"{name}/{i}" for i in range(CLASSES)]
        model = fp.PromptedViT(backbone, config, CLASSES, class_names=names).eval()
        head: Any = model.head
        with torch.no_grad():
            for _, parameter in model.trainable_parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
            features = torch.cat([model.forward_features(torch.from_numpy(picture)[None]) for picture in shown])
            centred = features - features.mean(0)
            _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
            most = min(CLASSES, len(shown)) - 1  # what is left of the last one is rounding
            mixture = torch.linalg.qr(torch.randn(CLASSES, CLASSES)).Q[:, :most]
            weight = mixture @ (directions[:most] / sizes[:most, None].sqrt())
            head.weight.copy_(weight * SPREAD / (centred @ weight.T).std())
            head.bias.copy_(-head.weight @ features.mean(0))
        model.save_pretrained(folder / name)
    return {name: folder / name for name in ADAPTERS}


class Check:
    """The engine's own output for every picture and tenant, and the comparison of an answer with it."""

    def __init__(self, settings: HostSettings, shown: list[np.ndarray]) -> None:
        engine, self.catalogue = load(settings)
        self.names = (BASE, *settings.adapters)
        works = {(name, i): Work([picture], name) for i, picture in enumerate(shown) for name in self.names}
        expected = {key: answers(engine, [work])[0][0] for key, work in works.items()}
        order = list(works)
        np.random.default_rng(0).shuffle(order)
        batched = [(order[start : start + size]) for size in (2, 3, 5, 8) for start in range(0, len(order), size)]
        together = [
            (key, output)
            for keys in batched
            for key, [output] in zip(keys, answers(engine, [works[key] for key in keys]), strict=True)
        ]
        engine.release()
        gc.collect()
        self.features = np.stack([expected[BASE, i] for i in range(len(shown))])
        self.places = [key for key in works if key[0] != BASE]
        logits = np.stack([expected[key] for key in self.places]).astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        self.likely = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        self.tolerance = {name: FLOOR[self.catalogue.dtype][self.kind(name)] for name in self.names}
        self.worst, self.apart = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.names, np.inf)
        for (name, i), output in together:
            noise = self.distances(name, self.entry(name, output))[self.place(name, i)]
            self.tolerance[name] = max(self.tolerance[name], 2 * float(noise))
        for (name, i), output in expected.items():
            others = self.distances(name, self.entry(name, output))
            others[self.place(name, i)] = np.inf
            self.apart[name] = min(self.apart[name], float(others.min()))
        for name, apart in self.apart.items():
            if not apart > 4 * self.tolerance[name]:
                raise RuntimeError(
                    f"{name}: the {self.kind(name)} expected of two pictures or tenants are {apart:.3g} "
                    f"apart, too close to tell answers apart with a tolerance of "
                    f"{self.tolerance[name]:.3g}"
                )

    @staticmethod
    def kind(name: str) -> str:
        return "features" if name == BASE else "log-probabilities"

    def entry(self, name: str, output: np.ndarray) -> dict[str, Any]:
        """Convert an engine's output as the host does."""
        ask = Ask([], None if name == BASE else name, "base64")
        answer = embeddings_answer if name == BASE else classify_answer
        return answer(ask, self.catalogue, [output])["data"][0]

    def place(self, name: str, i: int) -> int:
        """Return the position of a picture's own output in `distances`."""
        return i if name == BASE else self.places.index((name, i))

    def distances(self, name: str, entry: dict[str, Any]) -> np.ndarray:
        """Return the distance of an answer from that of each picture and, if it names classes, of each tenant."""
        if name == BASE:
            found = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
            return np.linalg.norm(self.features - found, axis=-1) / np.linalg.norm(found)
        labels = [p["label"] for p in entry["probabilities"]]
        found = np.log([max(p["probability"], 1e-300) for p in entry["probabilities"]])
        return np.abs(self.likely[:, labels] - found).max(1)

    def is_right(self, name: str, i: int, entry: dict[str, Any]) -> bool:
        own, distances = self.place(name, i), self.distances(name, entry)
        self.worst[name] = max(self.worst[name], float(distances[own]))
        named = all(p["class"] == f"{name}/{p['label']}" for p in entry.get("probabilities", []))
        return bool(named and distances.argmin() == own and distances[own] < self.tolerance[name])


@contextlib.contextmanager
def host(flags: Flags, adapters: dict[str, Path], batch_size: int) -> Iterator[str]:
    """Run `fastprompt serve` and yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    named = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "fastprompt",
            "serve",
            "--backbone",
            flags.backbone,
            "--image-size",
            str(flags.image_size),
            *named,
            "--port",
            str(port),
            "--dtype",
            flags.dtype,
            "--threads",
            str(flags.threads),
            "--batch-size",
            str(batch_size),
            "--batch-wait-ms",
            str(flags.batch_wait_ms if batch_size > 1 else 0),
            "--body-timeout",
            str(BODY_TIMEOUT),
            "--max-body-mb",
            str(MAX_BODY / 2**20),
            "--max-waiting",
            "1000",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(flags.threads)},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"the host ended with {process.returncode}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait(180) != 0:
            raise RuntimeError(f"the host ended with {process.returncode} after SIGTERM")


async def tenant(
    client: httpx.AsyncClient, number: int, files: list[bytes], check: Check, seen: Round, until: float
) -> None:
    """Pictures one after the other as a form, each as another tenant than the one before."""
    names, i = check.names, number
    while time.perf_counter() < until:
        i, name = i + 1, names[i % len(names)]
        picture = i * 7 % len(files)
        path, model = (
            ("/v1/embeddings", {"encoding_format": "base64"}) if name == BASE else ("/v1/classify", {"model": name})
        )
        began = time.perf_counter()
        try:
            answer = await client.post(path, files={"file": ("p.png", files[picture], "image/png")}, data=model)
        except httpx.HTTPError as error:
            seen.failed.append(repr(error))
            continue
        took = time.perf_counter() - began
        if answer.status_code != 200:
            seen.failed.append(f"{answer.status_code} {answer.text[:200]}")
            continue
        seen.latencies.append(took)
        seen.wrong += not check.is_right(name, picture, answer.json()["data"][0])


def huge() -> bytes:
    """Return a PNG that claims to have 60,000 x 60,000 pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in (header, data, b"IEND")
    )


async def attacker(client: httpx.AsyncClient, number: int, file: bytes, seen: Round, until: float) -> None:
    """Send one hostile request after the other and record the outcomes in `seen.refused`."""

    def chunks(total: int) -> Any:
        async def send() -> Any:
            for _ in range(total // 2**16):
                yield b"x" * 2**16

        return send()

    def image(data: bytes) -> dict[str, Any]:
        return {"files": {"file": ("p.png", data, "image/png")}}

    kinds: dict[str, Any] = {
        "truncated PNG": lambda: image(file[: len(file) // 2]),
        "PNG of 60000 x 60000": lambda: image(huge()),
        "text instead of a picture": lambda: image(b"<html>" * 100),
        "input of a wrong type": lambda: {"json": {"input": {"a": 3}}},
        "bad base64": lambda: {"json": {"input": "data:image/png;base64,@@@@"}},
        "JSON 100,000 lists deep": lambda: {"content": b"[" * 100_000, "headers": {"Content-Type": "application/json"}},
        "body of 4 MiB": lambda: {"content": b" " * 2**22, "headers": {"Content-Type": "application/json"}},
        "endless chunks": lambda: {"content": chunks(2**22), "headers": {"Content-Type": "application/json"}},
    }
    for turn in range(number, 10**9):
        if time.perf_counter() > until:
            return
        kind = [*kinds, "slow body", "slow headers"][turn % (len(kinds) + 2)]
        if kind.startswith("slow"):
            outcome = await slow(client.base_url.port or 80, kind == "slow body")
        else:
            try:
                outcome = str((await client.post("/v1/embeddings", **kinds[kind]())).status_code)
            except httpx.HTTPError as error:
                outcome = f"closed ({type(error).__name__})"
        seen.refused.setdefault(kind, []).append(outcome)


async def slow(port: int, body: bool) -> str:
    """Send part of a request, one byte every half second; return the status, or that the connection was closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    writer.write(head + (b"Content-Length: 1000\r\n\r\n{" if body else b"X-"))
    reading = asyncio.ensure_future(reader.read(15))
    with contextlib.suppress(OSError):
        while not reading.done():
            writer.write(b" " if body else b"a")
            await asyncio.wait([reading], timeout=0.5)
    answer = await reading if not reading.exception() else b""
    writer.close()
    return answer[9:12].decode() or "closed"


async def load_round(url: str, flags: Flags, files: list[bytes], check: Check, clients: int, hostile: int) -> Round:
    seen = Round()
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, limits=limits, headers={"Accept-Encoding": "identity"}) as client,
        httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as bad,
    ):
        began = time.perf_counter()
        until = began + flags.seconds
        await asyncio.gather(
            *(tenant(client, i, files, check, seen, until) for i in range(clients)),
            *(attacker(bad, i * 3, files[0], seen, until) for i in range(hostile)),
        )
        seen.seconds = time.perf_counter() - began
    return seen


def percentile(values: list[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else float("nan")


def row(title: str, rounds: list[Round]) -> str:
    """Format images per second and latencies over all rounds, with the lowest and highest round in brackets."""
    rates = [r.rate() for r in rounds]
    together = [latency for r in rounds for latency in r.latencies]
    p50, p99 = (1000 * percentile(together, share) for share in (0.5, 0.99))
    p99s = [1000 * percentile(r.latencies, 0.99) for r in rounds]
    return (
        f"| {title} | {statistics.median(rates):.1f} ({min(rates):.1f}–{max(rates):.1f}) | {p50:.0f} | {p99:.0f} "
        f"({min(p99s):.0f}–{max(p99s):.0f}) | {len(together)} | {sum(r.wrong for r in rounds)} | "
        f"{sum(len(r.failed) for r in rounds)} |"
    )


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    torch.set_num_threads(flags.threads)
    busy = os.getloadavg()[0]
    shown = pictures(flags.image_size)
    files = [png(picture) for picture in shown]
    measured: dict[tuple[str, int], list[Round]] = {}
    with tempfile.TemporaryDirectory() as folder:
        backbone = fp.load_backbone(flags.backbone, flags.image_size)
        adapters = make_adapters(Path(folder), backbone, shown)
        del backbone
        settings = HostSettings(
            flags.backbone, flags.image_size, False, adapters, flags.dtype, flags.batch_size, flags.threads
        )
        check = Check(settings, shown)
        batching, single = f"batches up to {flags.batch_size}", "batch size 1"
        with host(flags, adapters, flags.batch_size) as one, host(flags, adapters, 1) as two:
            for number in range(flags.rounds + 1):
                for clients in (flags.clients, 1):
                    for title, url in ((batching, one), (single, two)):
                        seen = asyncio.run(load_round(url, flags, files, check, clients, 0))
                        print(f"round {number}, {clients} clients, {title}: {seen.rate():.1f} images/s", flush=True)
                        if number:  # the first warms up
                            measured.setdefault((title, clients), []).append(seen)
            attacked = [
                asyncio.run(load_round(one, flags, files, check, flags.clients, flags.hostile))
                for _ in range(flags.rounds)
            ]
    every = [*(r for rounds in measured.values() for r in rounds), *attacked]
    ratios = sorted(
        a.rate() / b.rate()
        for a, b in zip(measured[batching, flags.clients], measured[single, flags.clients], strict=True)
    )
    outcomes: dict[str, dict[str, int]] = {}
    for seen in attacked:
        for kind, found in seen.refused.items():
            for outcome in found:
                outcomes.setdefault(kind, {}).setdefault(outcome, 0)
                outcomes[kind][outcome] += 1
    info = cpuinfo.get_cpu_info()
    lines = [
        "# `fastprompt serve` under load",
        "",
        f"`make load` on {info.get('brand_raw', 'an unknown processor')}, {os.cpu_count()} cores, torch "
        f"{torch.__version__}, loopback; hosts and clients share the machine, load average "
        f"{busy:.1f} before they started. {flags.backbone} at {flags.image_size} "
        f"px in {check.catalogue.dtype}, {flags.threads} engine thread(s), tenants {', '.join(ADAPTERS)} and plain "
        f"embeddings in turn, one PNG a request. {flags.rounds} rounds of {flags.seconds:g} s for each line, "
        f"the lines interleaved, after one round of warming up; a batch waits {flags.batch_wait_ms:g} ms for others. "
        "Images/s: median of the rounds (lowest–highest). Latency over all rounds, as clients see it; p99 also of the "
        "lowest and highest round.",
        "",
        "| host, clients | images/s | p50, ms | p99, ms | answers | wrong | failed |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(
            row(f"{title}, {clients} client{'s' * (clients > 1)}", rounds)
            for (title, clients), rounds in measured.items()
        ),
        row(f"{batching}, {flags.clients} clients and {flags.hostile} hostile ones", attacked),
        "",
        f"Dynamic batching at {flags.clients} clients: {statistics.median(ratios):.2f} × the images/s of batch size 1 "
        f"({ratios[0]:.2f}–{ratios[-1]:.2f}).",
        "",
        "Every answer was compared with the engine's for that picture and tenant alone: features relative to their "
        "norm, of classes the log-probabilities of the five likeliest. It had to be nearest to its own, and within "
        "twice what batches were found to change, or the least tolerance of the number format:",
        "",
        "| tenant | tolerance | worst answer | nearest other picture or tenant |",
        "|---|---:|---:|---:|",
        *(
            f"| {name.strip('_')} | {check.tolerance[name]:.2g} | {check.worst[name]:.2g} | {check.apart[name]:.2g} |"
            for name in check.names
        ),
        "",
        f"What hostile clients got, beside the last line's others (body limit {MAX_BODY >> 20} MiB, timeout "
        f"{BODY_TIMEOUT:g} s):",
        "",
        "| request | outcomes |",
        "|---|---|",
        *(
            f"| {kind} | {', '.join(f'{outcome}: {count}' for outcome, count in sorted(found.items()))} |"
            for kind, found in outcomes.items()
        ),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    atomic_write(flags.out, text)
    bad = [
        f"{kind}: {outcome}"
        for kind, found in outcomes.items()
        for outcome in found
        if not outcome.startswith(("4", "closed"))
    ]
    failed = [text for r in every for text in r.failed]
    if bad or failed or any(r.wrong for r in every):
        sys.exit(f"{sum(r.wrong for r in every)} wrong answers, failed: {failed[:5]}, not refused: {bad}")


if __name__ == "__main__":
    main()
