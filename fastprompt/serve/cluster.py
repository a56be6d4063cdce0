"""A host on several machines: the same engine, addresses and limits as a deployment of Ray Serve.

Each replica has one engine and computes what waits at it in one call, whosever it is. (Ray's model multiplexing would
split batches by adapter, which this engine need not.) A file `deploy.py` with

    app = fastprompt.serve.cluster.application(HostSettings(adapters={"birds": Path("birds-adapter")}), replicas=4)

is started on a Ray cluster by `serve run deploy:app`. Directories of adapters have to exist on every machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from fastprompt.serve.protocol import Limits, Refused, Work
from fastprompt.serve.routes import Routes
from fastprompt.serve.tenants import HostSettings, answers, load

try:
    from ray import serve
except ImportError as error:
    raise ImportError("ray is not installed: pip install 'fastprompt[ray]'") from error


class Tenants:
    """One replica: an engine, and the requests that Ray's proxies hand it."""

    def __init__(self, settings: HostSettings, limits: Limits, keys: Sequence[str], batch_wait: float) -> None:
        self.engine, catalogue = load(settings)
        self.routes = Routes(catalogue, limits, keys, self.compute)
        together: Any = self.together
        together.set_max_batch_size(settings.batch_size)
        together.set_batch_wait_timeout_s(batch_wait)

    async def __call__(self, request: Request) -> Response:
        return await self.routes(request)

    @serve.batch
    async def together(self, works: list[Work]) -> list[list[np.ndarray] | Refused]:
        """What the engine says of each request, computed in one call while the next ones come in."""
        return await asyncio.to_thread(answers, self.engine, works)

    async def compute(self, work: Work) -> list[np.ndarray]:
        """What the engine says of one request. Raises Refused."""
        answer = await self.together(work)
        if isinstance(answer, Refused):
            raise answer
        return answer


def application(settings: HostSettings, limits: Limits | None = None, keys: Sequence[str] = (), replicas: int = 1,
                batch_wait: float = 0.005) -> serve.Application:
    """What `ray.serve.run` deploys. The adapters are checked by each replica as it starts, which fails otherwise.

    Args:
        settings: what is served, by each replica. limits: what clients may send. keys: API keys; empty: none needed.
        replicas: engines; Ray places them on the cluster's machines.
        batch_wait: seconds that a request waits for others to join its batch.
    """
    limits = limits or Limits()
    deployment = serve.deployment(num_replicas=replicas, max_ongoing_requests=limits.waiting)(Tenants)
    return deployment.bind(settings, limits, list(keys), batch_wait)
