"""A host on several machines: the same engine, addresses and limits as a Ray Serve deployment.

Each replica has one engine and computes everything that waits for it in one call, for all clients and adapters. (Ray's
model multiplexing would split batches by adapter, which this engine does not need.) Start a file `deploy.py` with

    app = fastprompt.serve.cluster.application(HostSettings(adapters={"birds": Path("birds-adapter")}), replicas=4)

on a Ray cluster with `serve run deploy:app`. Adapter directories must exist on every machine.

Limits, API keys and the memory budget are the host's, per replica. A replica that computes one batch for longer than
requests may take reports itself as unhealthy, and Ray replaces it. Ray's proxies handle connections and shutdown:
requests that no replica takes yet wait there, and if too many wait, a proxy answers 503 with its own message.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from fastprompt.serve.protocol import Limits, Refused, Work
from fastprompt.serve.routes import Routes, read_keys
from fastprompt.serve.supervisor import SHORTEST_BATCH
from fastprompt.serve.tenants import HostSettings, answers, load, warm_up
from fastprompt.vit.source import split_local

try:
    from ray import serve
except ImportError as error:
    raise ImportError("ray is not installed: pip install 'fastprompt[ray]'") from error


class Tenants:
    """One replica: an engine, and the requests that Ray's proxies pass to it."""

    def __init__(self, settings: HostSettings, limits: Limits, keys: Sequence[str], batch_wait: float) -> None:
        self.engine, catalogue = load(settings)
        warm_up(self.engine, settings, catalogue)
        self.routes = Routes(catalogue, limits, keys, self.compute, self.is_well)
        self.batch_seconds, self._since = max(limits.answer_seconds, SHORTEST_BATCH), math.inf
        together: Any = self.together
        together.set_max_batch_size(settings.batch_size)
        together.set_batch_wait_timeout_s(batch_wait)

    async def __call__(self, request: Request) -> Response:
        return await self.routes(request)

    @serve.batch
    async def together(self, works: list[Work]) -> list[list[np.ndarray] | Refused]:
        """Answer all requests in one engine call while the next ones arrive."""
        self._since = time.monotonic()
        try:
            return await asyncio.to_thread(answers, self.engine, works)
        finally:
            self._since = math.inf

    def is_well(self) -> bool:
        """Whether no batch has been running for longer than requests may take."""
        return time.monotonic() - self._since < self.batch_seconds

    def check_health(self) -> None:
        """Ray's periodic health check: it replaces a replica if this raises."""
        if not self.is_well():
            raise RuntimeError(f"one batch has been computed for {time.monotonic() - self._since:.0f} s")

    async def compute(self, work: Work) -> list[np.ndarray]:
        """Answer one request. Raises Refused."""
        answer = await self.together(work)
        if isinstance(answer, Refused):
            raise answer
        return answer


def application(
    settings: HostSettings,
    limits: Limits | None = None,
    keys: Sequence[str] | None = None,
    replicas: int = 1,
    batch_wait: float = 0.005,
) -> serve.Application:
    """Build the application for `ray.serve.run`. Each replica checks the adapters at startup and may fail.

    Args:
        settings: what each replica serves, with a GPU of its own for device "cuda". Relative directories are
            resolved in this process.
        limits: what clients may send; `waiting` applies per replica, and again per Ray proxy.
        keys: API keys; None: those that FASTPROMPT_API_KEYS has here, if any; empty: none needed.
        replicas: number of engines; Ray places them on the cluster's machines.
        batch_wait: seconds that a request waits for others to join its batch.

    Raises:
        ValueError: FASTPROMPT_API_KEYS is set and has no key.
    """
    limits, keys = limits or Limits(), read_keys(None) if keys is None else list(keys)
    local = split_local(settings.backbone or "")
    settings = replace(
        settings,
        adapters={name: Path(path).absolute() for name, path in settings.adapters.items()},
        backbone=settings.backbone if local is None else f"{local[0]}{Path(local[1]).absolute()}",
    )
    deployment = serve.deployment(
        num_replicas=replicas,
        max_queued_requests=limits.waiting,
        max_ongoing_requests=2 * limits.waiting,  # leaves room to receive as many again and refuse them
        ray_actor_options={"num_gpus": 1} if settings.device.startswith("cuda") else {},
    )(Tenants)
    return deployment.bind(settings, limits, keys, batch_wait)
