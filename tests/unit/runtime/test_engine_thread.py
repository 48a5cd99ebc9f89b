"""The thread of an engine: commands, deadlines, failure once, bounded stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from specpool.errors import EngineFailed, FollowerLost
from specpool_engine.runtime.engine_thread import EngineThread


class Counting:
    """An engine with as much to do as it is given."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.deadline_s: float | None = None
        self.idle = threading.Event()

    def warm_up(self) -> None:
        pass

    def step(self) -> bool:
        if not self.work:
            self.idle.set()
            return False
        self.work.pop(0)()
        return True

    def seconds_to_deadline(self) -> float | None:
        return self.deadline_s


class Bench:
    def __init__(self) -> None:
        self.engine = Counting()
        self.failures: list[EngineFailed] = []
        self.failed = asyncio.Event()
        self.thread = EngineThread(
            self.engine, name="test engine", loop=asyncio.get_running_loop(), on_failed=self._on_failed
        )

    def _on_failed(self, error: EngineFailed) -> None:
        self.failures.append(error)
        self.failed.set()

    async def done(self) -> None:
        done = threading.Event()
        self.thread.call(done.set)
        assert await asyncio.to_thread(done.wait, 20)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    bench.thread.start()
    yield bench
    bench.thread.stop()
    assert await asyncio.to_thread(bench.thread.join, 20)


def broken() -> None:
    raise ValueError("broken")


async def test_commands_run_in_order_between_steps(bench: Bench) -> None:
    ran: list[int] = []
    for number in range(5):
        bench.thread.call(lambda number=number: ran.append(number))
    await bench.done()
    assert ran == [0, 1, 2, 3, 4]


async def test_a_failure_is_told_once_and_refuses_what_comes_after(bench: Bench) -> None:
    bench.thread.call(lambda: bench.engine.work.extend([broken, broken]))
    await asyncio.wait_for(bench.failed.wait(), 20)
    assert await asyncio.to_thread(bench.thread.join, 20)
    bench.thread.abort(FollowerLost("too late"))
    await asyncio.sleep(0)
    (failure,) = bench.failures
    assert failure is bench.thread.failure
    assert "test engine failed: ValueError: broken" in failure.message
    with pytest.raises(EngineFailed):
        bench.thread.submit(lambda: None, lambda: pytest.fail("accepted by an engine that failed"))


async def test_an_abort_does_not_wait_for_the_step_that_runs(bench: Bench) -> None:
    release = threading.Event()
    bench.thread.call(lambda: bench.engine.work.append(lambda: bool(release.wait(20))))
    bench.thread.abort(FollowerLost("rank 1 is gone"))
    try:
        await asyncio.wait_for(bench.failed.wait(), 20)
        assert isinstance(bench.thread.failure, FollowerLost)
    finally:
        release.set()


async def test_what_is_refused_is_not_queued(bench: Bench) -> None:
    ran = threading.Event()
    with pytest.raises(ValueError, match="broken"):
        bench.thread.submit(ran.set, broken)
    await bench.done()
    assert not ran.is_set()


async def test_a_deadline_ends_the_wait_for_commands(bench: Bench) -> None:
    await bench.done()
    bench.engine.deadline_s = 0.01
    bench.thread.call(bench.engine.idle.clear)
    await bench.done()
    bench.engine.idle.clear()
    assert await asyncio.to_thread(bench.engine.idle.wait, 20)  # a step without any command


async def test_a_command_that_comes_within_a_step_runs_after_it(bench: Bench) -> None:
    order: list[str] = []

    def step() -> None:
        bench.thread.call(lambda: order.append("command"))
        bench.thread.defer_a_command(20)
        order.append("step")

    bench.thread.call(lambda: bench.engine.work.append(step))
    await bench.done()
    await bench.done()
    assert order == ["step", "command"]


async def test_a_join_is_bounded(bench: Bench) -> None:
    entered, release = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        release.wait(20)

    bench.thread.call(lambda: bench.engine.work.append(hang))
    assert await asyncio.to_thread(entered.wait, 20)
    age_s = bench.thread.heartbeat.age_s
    await asyncio.sleep(0.05)
    assert bench.thread.heartbeat.age_s > age_s > 0
    assert bench.thread.heartbeat.doing == "in a step"
    bench.thread.stop()
    try:
        assert not bench.thread.join(0.05)
    finally:
        release.set()
