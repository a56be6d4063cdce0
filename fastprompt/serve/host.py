"""A host on one machine: LitServe carries requests from a web process to a worker with one engine, and batches them.

The web process reads, refuses and decodes; the worker gets pixels alone, computes whatever waits in one call of the
engine, whosever it is, and hands back numbers.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import signal
import socket
import sys
import time
import uuid
from collections.abc import Sequence
from math import ceil
from queue import Empty
from typing import Any

import litserve
import numpy as np
import uvicorn
from litserve.loops.simple_loops import BatchedLoop
from litserve.specs.base import LitSpec
from litserve.utils import LitAPIStatus, ResponseBufferItem, wrap_litserve_start
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fastprompt.serve.connections import ImpatientProtocol, PatientServer
from fastprompt.serve.protocol import BASE, Catalogue, Limits, Refused, Work
from fastprompt.serve.routes import Routes, refuse
from fastprompt.serve.tenants import HostSettings, answers, load
from fastprompt.terminal import say

logger = logging.getLogger(__name__)

ADDRESSES = ("/v1/models", "/v1/models/{model:path}", "/v1/embeddings", "/v1/classify", "/health")
"""What is left of LitServe's; others tell about the machine."""
GRACE = 5.0
"""Seconds that the host takes to end beside those that its clients may take."""


class Batches(BatchedLoop):
    """LitServe's loop over batches of as many images as the engine takes at once; it sleeps where nothing waits."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """([(web process, id, work)] to compute, [(web process, id)] that waited for too long)."""
        taken: list[Any] = []
        late: list[Any] = []
        images, until = 0, time.monotonic() + 1.0
        while images < lit_api.max_batch_size:
            try:
                consumer, uid, since, work = request_queue.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                break
            except (EOFError, OSError):  # the host is gone
                sys.exit()
            now = time.monotonic()
            if now - since > lit_api.request_timeout:
                late.append((consumer, uid))
                continue
            if not taken:
                until = now + lit_api.batch_timeout
            taken.append((consumer, uid, work))
            images += len(work.pictures)
        host = multiprocessing.parent_process()
        if not taken and host is not None and not host.is_alive():
            sys.exit()
        return taken, late


class Worker(litserve.LitAPI):
    """The process with the engine. It gets `Work` and answers with lists of arrays, or `Refused`."""

    def __init__(self, settings: HostSettings, batch_wait: float, spec: LitSpec) -> None:
        super().__init__(settings.batch_size, batch_wait, loop=Batches(), spec=spec)
        self.settings = settings

    def setup(self, device: str) -> None:
        """Build the engine, and run it once."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the web process, which ends this one behind it
        self.engine, catalogue = load(self.settings)
        picture = np.zeros((3, *catalogue.spec.image_size), np.uint8)
        for name in (BASE, *catalogue.adapters):
            answers(self.engine, [Work([picture], name)])

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, works: list[Work]) -> list[list[np.ndarray] | Refused]:
        """One answer to each request."""
        return answers(self.engine, works)

    def encode_response(self, output: Any) -> Any:
        return output


class Endpoints(LitSpec):
    """The addresses of a host, and the way from them to the worker and back."""

    def __init__(self, catalogue: Catalogue, limits: Limits, keys: Sequence[str]) -> None:
        super().__init__()
        self.api_path = "/v1/embeddings"
        self.routes = Routes(catalogue, limits, keys, self.compute)

    def __getstate__(self) -> dict[str, Any]:
        """The worker needs neither addresses nor keys."""
        return super().__getstate__() | {"routes": None, "_endpoints": []}

    def pre_setup(self, lit_api: litserve.LitAPI) -> None:
        self.add_endpoint("/v1/models", self.routes.models, ["GET", "HEAD"])
        self.add_endpoint("/v1/models/{model:path}", self.routes.model, ["GET", "HEAD"])
        self.add_endpoint("/v1/embeddings", self.routes.embeddings, ["POST"])
        self.add_endpoint("/v1/classify", self.routes.classify, ["POST"])

    async def compute(self, work: Work) -> list[np.ndarray]:
        """What the worker says of the pictures. Raises Refused: it came to them too late, or failed."""
        uid, item = str(uuid.uuid4()), ResponseBufferItem(event=asyncio.Event())
        self.response_buffer[uid] = item
        try:
            self.request_queue.put_nowait((self.response_queue_id, uid, time.monotonic(), work))
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


def run(
    settings: HostSettings,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    batch_wait: float = 0.005,
    origins: Sequence[str] = (),
) -> None:
    """Serve until SIGTERM or Ctrl+C: then nothing new is accepted, running requests are finished, and it returns.

    Backbone and adapters are loaded and checked before anything starts, and released again: the worker has them.

    Args:
        settings: what is served. limits: what clients may send. keys: API keys; empty: everybody may ask.
        host, port: to listen at; port 0: one that is free, which is printed.
        batch_wait: seconds that a request waits for others to join its batch.
        origins: of web pages that may ask from a browser ("https://example.org"; "*": all).

    Raises:
        ValueError, FileNotFoundError: backbone or an adapter do not fit; see `load`.
        OSError: the address is taken. RuntimeError: the worker died.
    """
    limits = limits or Limits()
    if not 0 <= batch_wait < limits.answer_seconds:
        raise ValueError(f"batch_wait must be seconds from 0 below {limits.answer_seconds:g}, got {batch_wait}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()  # before minutes of loading
    engine, catalogue = load(settings)
    engine.release()
    del engine
    gc.collect()
    server = litserve.LitServer(
        Worker(settings, batch_wait, Endpoints(catalogue, limits, keys)),
        accelerator="cuda" if settings.device.startswith("cuda") else "cpu",
        devices=1,
        timeout=limits.answer_seconds,
        disable_openapi_url=True,
        middlewares=[
            (CORSMiddleware, {"allow_origins": list(origins), "allow_methods": ["GET", "POST"], "allow_headers": ["*"]})
        ],
    )
    server.app.add_exception_handler(HTTPException, refuse)
    server.app.router.routes[:] = [route for route in server.app.routes if getattr(route, "path", "") in ADDRESSES]
    for route in server.app.routes:
        if route.path == "/health":
            route.methods.add("HEAD")
    server.app.router.redirect_slashes = False
    died = False

    async def watch() -> None:
        """End the host with its worker: what waits is answered, and whoever supervises the host starts it again."""
        nonlocal died
        if not died and not all(process.is_alive() for process in server.inference_workers):
            died = web.should_exit = True
            for item in list(server.response_buffer.values()):
                item.response = (None, LitAPIStatus.ERROR)
                item.event.set()

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
            callback_notify=watch,
            timeout_notify=1,
        )
    )
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with wrap_litserve_start(server), socket.create_server((host, port), family=family) as listener:
            named = f"[{host}]" if ":" in host else host
            say(
                f"{catalogue.name} ({catalogue.dtype}) and {len(catalogue.adapters)} adapters on "
                f"http://{named}:{listener.getsockname()[1]}; /health tells when they are ready",
            )
            web.run([listener])
    except (KeyboardInterrupt, _Terminated):
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in getattr(server, "inference_workers", []):
            process.terminate()  # where the end came before LitServe had started
    if died:
        raise RuntimeError("the worker died; see above for what it said")


class _Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


def _leave(number: int, frame: Any) -> None:
    host = multiprocessing.parent_process()
    if host is None or not host.is_alive():  # LitServe's other processes are ended by this one
        raise _Terminated
