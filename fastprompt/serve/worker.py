"""The process with the engine, as LitServe runs it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from queue import Empty
from typing import Any

import litserve
import numpy as np
from litserve.loops.simple_loops import BatchedLoop
from litserve.specs.base import LitSpec

from fastprompt.serve.protocol import Refused, Work
from fastprompt.serve.signs import Signs
from fastprompt.serve.tenants import HostSettings, answers, load, warm_up
from fastprompt.terminal import say

PULSE = 0.5
"""Seconds between two signs of life."""
TURN = 1.0
"""Seconds that the worker waits for a request before its loop starts another iteration."""


class Batches(BatchedLoop):
    """LitServe's loop over batches of as many images as the engine takes at once; it blocks while nothing waits."""

    def get_batch_requests(self, lit_api: Any, request_queue: Any, transport: Any) -> tuple[list[Any], list[Any]]:
        """Return ([(web process, id, work)] to compute, [(web process, id)] that waited too long)."""
        lit_api.signs.come_round()
        taken: list[Any] = []
        late: list[Any] = []
        images, until = 0, time.monotonic() + TURN
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
        return taken, late


class Worker(litserve.LitAPI):
    """The process with the engine. It receives `Work` and answers with lists of arrays, or `Refused`."""

    def __init__(self, settings: HostSettings, batch_wait: float, spec: LitSpec, signs: Signs) -> None:
        super().__init__(settings.batch_size, batch_wait, loop=Batches(), spec=spec)
        self.settings, self.signs = settings, signs

    def setup(self, device: str) -> None:
        """Build the engine, prepare its backends, and run everything once."""
        for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the web process ends this one later
            signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=self._live, daemon=True).start()
        self.engine, catalogue = load(self.settings)
        for line in warm_up(self.engine, self.settings, catalogue):
            say(line)
        self.signs.set_ready()

    def _live(self) -> None:
        """Give signs of life, and exit with the web process, whatever the engine does."""
        host = multiprocessing.parent_process()
        while host is None or host.is_alive():
            self.signs.beat()
            time.sleep(PULSE)
        os._exit(1)

    def decode_request(self, request: Any) -> Any:
        return request

    def predict(self, works: list[Work]) -> list[list[np.ndarray] | Refused]:
        """Return one answer per request."""
        self.signs.come_round()
        return answers(self.engine, works)

    def encode_response(self, output: Any) -> Any:
        return output
