"""A host on one machine: LitServe passes requests from a web process to a worker with one engine, and batches them.

The web process reads, refuses and decodes. The worker receives only pixels, computes everything that waits in one
engine call, for all clients, and returns numbers.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import signal
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from math import ceil
from queue import Empty
from typing import Any

import litserve
import numpy as np
import uvicorn
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, wrap_litserve_start
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fastprompt.arguments import ArgumentError
from fastprompt.serve.connections import ImpatientProtocol, PatientServer
from fastprompt.serve.protocol import Catalogue, Limits, Refused, Work
from fastprompt.serve.routes import Routes, refuse
from fastprompt.serve.signs import Signs
from fastprompt.serve.supervisor import Supervisor
from fastprompt.serve.tenants import HostSettings, load
from fastprompt.serve.worker import Worker
from fastprompt.terminal import say

logger = logging.getLogger(__name__)

ADDRESSES = ("/v1/models", "/v1/models/{model:path}", "/v1/embeddings", "/v1/classify", "/health")
"""The only endpoints of LitServe that stay; the others reveal details of the machine."""
GRACE = 5.0
"""Seconds that the host may take to shut down, in addition to those that its clients may take."""


class Endpoints(LitSpec):
    """The endpoints of a host, and the path from them to the worker and back."""

    supervisor: Supervisor

    def __init__(self, catalogue: Catalogue, limits: Limits, keys: Sequence[str]) -> None:
        super().__init__()
        self.api_path = "/v1/embeddings"
        self.routes = Routes(catalogue, limits, keys, self.compute, lambda: self.supervisor.is_well())

    def __getstate__(self) -> dict[str, Any]:
        """Drop the endpoints, keys and pending requests, which the worker does not need."""
        without: dict[str, Any] = dict.fromkeys(("routes", "supervisor", "response_buffer", "request_queue"))
        return super().__getstate__() | without | {"_endpoints": []}

    def pre_setup(self, lit_api: litserve.LitAPI) -> None:
        self.add_endpoint("/v1/models", self.routes.models, ["GET", "HEAD"])
        self.add_endpoint("/v1/models/{model:path}", self.routes.model, ["GET", "HEAD"])
        self.add_endpoint("/v1/embeddings", self.routes.embeddings, ["POST"])
        self.add_endpoint("/v1/classify", self.routes.classify, ["POST"])
        self.add_endpoint("/health", self.routes.health, ["GET", "HEAD"])

    async def compute(self, work: Work) -> list[np.ndarray]:
        """Send pictures to the worker and return its answer. Raises Refused if it was too late, failed or was lost."""
        await self.supervisor.ready.wait()
        if self.supervisor.failure:
            raise _lost()
        uid, item = str(uuid.uuid4()), ResponseBufferItem(event=asyncio.Event())
        self.response_buffer[uid] = item
        try:
            request = (self.response_queue_id, uid, time.monotonic(), work)
            await asyncio.to_thread(self.request_queue.put, request)
            await item.event.wait()
        finally:
            self.response_buffer.pop(uid, None)
        answer, status = item.response
        if isinstance(answer, Refused):
            raise answer
        if isinstance(answer, HTTPException) and answer.status_code == 504:
            raise Refused(504, "timeout", "the engine did not come to this request in time; try again")
        if status == LitAPIStatus.ERROR:
            raise Refused(500, "internal_error", "the host failed to compute this request")
        return answer

    def forsake(self) -> None:
        """Answer everything that waits for a lost worker, and keep the next one from computing it."""
        with contextlib.suppress(Empty, OSError, EOFError):
            while True:
                self.request_queue.get_nowait()
        for item in list(self.response_buffer.values()):
            item.response = (_lost(), LitAPIStatus.ERROR)
            item.event.set()


def _lost() -> Refused:
    return Refused(503, "worker_lost", "the worker that had this request was lost; try again")


def run(
    settings: HostSettings,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_wait: float = 0.005,
    origins: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or Ctrl+C. Then answer every request that has reached this machine, and return.

    Backbone and adapters are first loaded and checked here, then released again, since the worker loads its own. A
    worker that died or hangs is replaced, with all adapters; its pending requests are answered 503.

    Args:
        settings: what to serve. limits: what clients may send. keys: API keys; empty: everybody may send requests.
        host, port: the address to listen on; port 0: a free one, which is printed.
        batch_wait: seconds that a request waits for others to join its batch.
        origins: origins of web pages that may send requests from a browser ("https://example.org"; "*": all).

    Raises:
        ValueError, FileNotFoundError: the backbone or an adapter is invalid; see `load`.
        OSError: the address is in use. RuntimeError: the worker failed before it was ready, or too often.
    """
    limits = limits or Limits()
    if not 0 <= batch_wait < limits.answer_seconds:
        raise ArgumentError("batch_wait", f"must be seconds from 0 below {limits.answer_seconds:g}, got {batch_wait}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()  # fail before minutes of loading
    engine, catalogue = load(settings)
    engine.release()
    del engine
    gc.collect()
    endpoints, signs = Endpoints(catalogue, limits, keys), Signs()
    worker = Worker(settings, batch_wait, endpoints, signs)
    server = litserve.LitServer(
        worker,
        accelerator="cuda" if settings.device.startswith("cuda") else "cpu",
        devices=1,
        timeout=limits.answer_seconds,
        healthcheck_path="/litserve/health",  # ours checks the worker, LitServe's only how it started
        disable_openapi_url=True,
        middlewares=[
            (CORSMiddleware, {"allow_origins": list(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]})
        ],
    )
    server.app.add_exception_handler(HTTPException, refuse)
    server.app.router.routes[:] = [route for route in server.app.routes if getattr(route, "path", "") in ADDRESSES]
    server.app.router.redirect_slashes = False

    def end() -> None:
        web.should_exit = True

    def launch() -> Any:
        server.inference_workers[:] = [server.launch_single_inference_worker(worker, 0)]
        return server.inference_workers[0]

    endpoints.supervisor = supervisor = Supervisor(signs, limits.answer_seconds, launch, endpoints.forsake, end)
    protocol = type("Protocol", (ImpatientProtocol,), {"limits": limits})
    web = PatientServer(
        uvicorn.Config(
            server.app,
            http=protocol,
            ws="none",
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=ceil(3 * limits.body_seconds + limits.answer_seconds + GRACE),
        ),
        supervisor.run,
    )
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with (
            wrap_litserve_start(server),
            _killed(server),
            socket.create_server((host, port), family=family) as listener,
        ):
            named = f"[{host}]" if ":" in host else host
            say(
                f"{catalogue.name} ({catalogue.dtype}) and {len(catalogue.adapters)} adapters on "
                f"http://{named}:{listener.getsockname()[1]}; /health tells when they are ready",
            )
            supervisor.process = server.inference_workers[0]
            web.run([listener])
    except (KeyboardInterrupt, _Terminated):
        pass
    finally:
        with _killed(server):  # if shutdown came before LitServe had started
            signal.signal(signal.SIGTERM, before)
    if supervisor.failure:
        raise RuntimeError(supervisor.failure)


@contextlib.contextmanager
def _killed(server: litserve.LitServer) -> Iterator[None]:
    """Kill the worker after the block: it has nothing left to do and ignores SIGTERM."""
    try:
        yield
    finally:
        for process in getattr(server, "inference_workers", []):
            process.kill()


class _Terminated(BaseException):
    """Raised on SIGTERM, like KeyboardInterrupt on SIGINT."""


def _leave(number: int, frame: Any) -> None:
    host = multiprocessing.parent_process()
    if host is None or not host.is_alive():  # this process ends LitServe's other processes
        raise _Terminated
