"""Keep one worker alive: watch it, and replace it if it dies or hangs."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from fastprompt.serve.signs import Signs

logger = logging.getLogger(__name__)

TICK = 0.5
"""Seconds between two checks of the worker."""
SILENT, LOST = 3.0, 10.0
"""Seconds without a pulse after which a worker counts as unhealthy, and after which it is replaced."""
STARTING = 1800.0
"""Seconds without a pulse that are allowed while a worker imports and loads."""
SHORTEST_BATCH = 5.0
"""Minimum time limit in seconds for a batch, however short the time limit for requests is."""
REPLACED, WINDOW = 5, 600.0
"""Maximum number of replaced workers within that many seconds; a host that loses more ends."""


class Supervisor:
    """Keeps a worker running.

    A worker is replaced if its process has ended or stopped, or if it computes one batch for longer than requests may
    take, since no client waits for that batch any more. If a worker fails before it is ready, or workers fail too
    often, the host ends.

    Args:
        signs: the worker's signs of life. answer_seconds: time limit for a request's answer.
        launch: starts a worker; it may raise OSError or EOFError.
        forsake: called when a worker is lost, to answer its pending requests.
        end: called when the host must end, with the reason in `failure`.

    Attributes:
        ready: set while the worker accepts requests, and permanently once the host ends.
        failure: why the host must end; empty if it need not.
    """

    def __init__(
        self,
        signs: Signs,
        answer_seconds: float,
        launch: Callable[[], BaseProcess],
        forsake: Callable[[], None],
        end: Callable[[], None],
    ) -> None:
        self.signs, self.launch, self.forsake, self.end = signs, launch, forsake, end
        self.batch_seconds = max(answer_seconds, SHORTEST_BATCH)
        self.ready, self.failure = asyncio.Event(), ""
        self.process: BaseProcess | None = None
        self._looked, self._lost = time.monotonic(), list[float]()

    def is_well(self) -> bool:
        """Whether the worker accepts requests and gives signs of life."""
        return self.ready.is_set() and not self.failure and not self._trouble(SILENT)

    async def run(self) -> None:
        """Watch the worker until the host ends."""
        while not self.failure:
            await self.look()
            await asyncio.sleep(TICK)

    async def look(self) -> None:
        """Check the worker once, and replace it if needed."""
        now = time.monotonic()
        slept, self._looked = now - self._looked > SILENT, now
        if self.signs.ready:
            self.ready.set()
        trouble = self._trouble(LOST if self.signs.ready else STARTING)
        if trouble and (self._is_dead() or not slept):  # if this process was suspended, let the worker run first
            await self._replace(trouble)

    def _is_dead(self) -> bool:
        return self.process is None or not self.process.is_alive()

    def _trouble(self, silent: float) -> str:
        """Return what is wrong with the worker if it has no pulse for `silent` seconds or another fault; else empty."""
        now = time.monotonic()
        if self.process is None or not self.process.is_alive():
            return f"died with exit code {None if self.process is None else self.process.exitcode}"
        if now - self.signs.pulse > silent:
            return f"gave no sign of life for {now - self.signs.pulse:.0f} s"
        if self.signs.ready and now - self.signs.turn > self.batch_seconds:
            return f"has computed one batch for {now - self.signs.turn:.0f} s"
        return ""

    async def _replace(self, trouble: str) -> None:
        was_ready, process = self.ready.is_set(), self.process
        self.ready.clear()
        now = time.monotonic()
        self._lost = [*(lost for lost in self._lost if now - lost < WINDOW), now]
        if process is not None:
            process.kill()
            await asyncio.to_thread(process.join)
        self.forsake()
        if not was_ready:
            self._fail(f"the worker {trouble} before it was ready; see above for what it said")
            return
        if len(self._lost) > REPLACED:
            self._fail(f"{len(self._lost)} workers were lost within {WINDOW / 60:.0f} minutes; the last {trouble}")
            return
        logger.error("the worker %s; another one is started", trouble)
        self.signs.reset()
        try:
            self.process = await asyncio.to_thread(self.launch)
        except (OSError, EOFError) as error:
            self._fail(f"the worker {trouble}, and no other one could be started: {error!r}")
        self._looked = time.monotonic()

    def _fail(self, failure: str) -> None:
        self.failure = failure
        self.ready.set()  # wake up whoever waits for it
        self.end()
