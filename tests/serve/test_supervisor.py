"""A worker that dies, stops or hangs, without any process: when it is replaced, and when the host gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from fastprompt.serve import signs, supervisor as module
from fastprompt.serve.signs import Signs
from fastprompt.serve.supervisor import LOST, REPLACED, SILENT, STARTING, Supervisor


class Process:
    """A worker's process, as far as a supervisor sees it."""

    exitcode: int | None = None

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        if self.exitcode is None:
            self.exitcode = -9

    def join(self) -> None:
        assert self.exitcode is not None


class Scene:
    """A supervisor with its worker, and a clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer_seconds: float = 30.0) -> None:
        self.now, self.forsaken, self.ended = 1000.0, 0, 0
        for seen in (module, signs):
            monkeypatch.setattr(seen, "time", SimpleNamespace(monotonic=lambda: self.now))  # asyncio keeps its own
        self.signs, self.launched = Signs(), list[Process]()
        self.supervisor = Supervisor(self.signs, answer_seconds, self.launch, self.forsake, self.end)
        self.supervisor.process = self.launch()

    def launch(self) -> Any:
        self.launched.append(Process())
        return self.launched[-1]

    def forsake(self) -> None:
        assert self.launched[-1].exitcode is not None, "a worker that lives could still answer"
        self.forsaken += 1

    def end(self) -> None:
        self.ended += 1

    async def ready(self) -> None:
        self.signs.beat()
        self.signs.set_ready()
        await self.supervisor.look()

    async def passes(self, seconds: float, *, pulse: bool = True, turn: bool = True) -> None:
        """Time, in which the web process looks every second."""
        for _ in range(int(seconds)):
            self.now += 1
            if pulse:
                self.signs.beat()
            if turn:
                self.signs.come_round()
            await self.supervisor.look()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scene(), 60))  # type: ignore[arg-type]


def test_a_worker_that_lives_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch)
        await scene.passes(STARTING, pulse=False, turn=False)  # imports
        assert not scene.supervisor.is_well()
        assert not scene.supervisor.ready.is_set()
        await scene.ready()
        assert scene.supervisor.is_well()
        await scene.passes(1000)
        await scene.passes(30, turn=False)  # one long batch
        await scene.passes(1000)
        assert scene.supervisor.is_well()
        assert (len(scene.launched), scene.forsaken, scene.ended) == (1, 0, 0)

    run(story)


@pytest.mark.parametrize("trouble", ["dies", "stops", "hangs"])
def test_a_worker_that_is_lost_is_replaced(monkeypatch: pytest.MonkeyPatch, trouble: str) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch)
        await scene.ready()
        await scene.passes(100)
        if trouble == "dies":
            scene.launched[0].exitcode = 1
            assert not scene.supervisor.is_well()
            await scene.supervisor.look()
        elif trouble == "stops":
            await scene.passes(SILENT, pulse=False, turn=False)
            assert scene.supervisor.is_well()
            await scene.passes(1, pulse=False, turn=False)
            assert not scene.supervisor.is_well()
            assert len(scene.launched) == 1
            await scene.passes(LOST - SILENT, pulse=False, turn=False)
        else:
            await scene.passes(30, turn=False)
            assert scene.supervisor.is_well()
            await scene.passes(1, turn=False)
        assert scene.launched[0].exitcode == (1 if trouble == "dies" else -9)
        assert (len(scene.launched), scene.forsaken) == (2, 1)
        assert not scene.supervisor.is_well()
        assert not scene.supervisor.ready.is_set()
        await scene.passes(20, turn=False)  # loads
        assert not scene.supervisor.is_well()
        await scene.ready()
        assert scene.supervisor.is_well()
        await scene.passes(100)
        assert (len(scene.launched), scene.ended) == (2, 0)

    run(story)


def test_short_deadlines_leave_a_batch_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch, answer_seconds=0.5)
        await scene.ready()
        await scene.passes(5, turn=False)
        assert scene.supervisor.is_well()
        await scene.passes(1, turn=False)
        assert len(scene.launched) == 2

    run(story)


def test_a_worker_is_not_blamed_for_a_pause_of_the_web_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both were stopped, the worker has a turn before it is judged."""

    async def story() -> None:
        scene = Scene(monkeypatch)
        await scene.ready()
        scene.now += 3600
        await scene.supervisor.look()
        assert len(scene.launched) == 1
        await scene.passes(100)
        assert scene.supervisor.is_well()
        scene.now += 3600
        await scene.supervisor.look()
        await scene.passes(1, pulse=False, turn=False)
        assert len(scene.launched) == 2

    run(story)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_that_never_gets_ready_ends_the_host(monkeypatch: pytest.MonkeyPatch, restarted: bool) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch)
        if restarted:
            await scene.ready()
            scene.launched[0].exitcode = -9
            await scene.supervisor.look()
        scene.launched[-1].exitcode = 0
        await scene.supervisor.run()  # to its end
        assert "before it was ready" in scene.supervisor.failure
        assert (len(scene.launched), scene.ended) == (1 + restarted, 1)
        assert scene.supervisor.ready.is_set(), "who waits is told"
        assert not scene.supervisor.is_well()

    run(story)


def test_a_worker_that_is_lost_again_and_again_ends_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch)
        for i in range(REPLACED + 1):
            await scene.ready()
            assert len(scene.launched) == i + 1
            scene.launched[-1].exitcode = -9
            await scene.supervisor.look()
        assert f"{REPLACED + 1} workers were lost within 10 minutes" in scene.supervisor.failure
        assert scene.ended == 1
        scene = Scene(monkeypatch)
        for _ in range(3 * REPLACED):  # but not where it happens now and then
            await scene.ready()
            await scene.passes(200)
            scene.launched[-1].exitcode = -9
            await scene.supervisor.look()
        assert not scene.supervisor.failure

    run(story)


def test_a_host_that_cannot_start_another_worker_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        scene = Scene(monkeypatch)
        await scene.ready()

        def launch() -> Any:
            raise ConnectionRefusedError("the queue is gone")

        scene.supervisor.launch = launch
        scene.launched[0].exitcode = -9
        await scene.supervisor.look()
        assert "the queue is gone" in scene.supervisor.failure
        assert scene.ended == 1

    run(story)
