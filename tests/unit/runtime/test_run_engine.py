"""An engine that hangs is found, one that works or waits is left alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from specpool.errors import EngineFailed, EngineHung
from specpool_engine.modeling.interface import CausalModel
from specpool_engine.modeling.paged_kv import BlockPool
from specpool_engine.modeling.toy import ToyModel, ToyTable
from specpool_engine.runtime.engine_thread import EngineThread
from specpool_engine.runtime.run_engine import running


class Hanging:
    """Its steps, or its warm-up, end when they are released."""

    def __init__(self, *, hangs_in: str = "step") -> None:
        self.released = threading.Event()
        self.has_work = False
        self._hangs_in = hangs_in

    def warm_up(self) -> None:
        if self._hangs_in == "warm-up":
            self.released.wait(30)

    def step(self) -> bool:
        if self.has_work:
            self.released.wait(30)
        return False

    def seconds_to_deadline(self) -> float | None:
        return None


def model() -> CausalModel:
    return ToyModel(ToyTable(8, 1), BlockPool(4, 4))


def thread_of(engine: Hanging, failures: list[EngineFailed]) -> EngineThread:
    return EngineThread(engine, name="test engine", loop=asyncio.get_running_loop(), on_failed=failures.append)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    engine = Hanging()
    yield engine
    engine.released.set()


async def until(failures: list[EngineFailed]) -> EngineFailed:
    async with asyncio.timeout(20):
        while not failures:
            await asyncio.sleep(0.01)
    return failures[0]


async def test_a_step_that_does_not_end_fails_the_engine(hanging: Hanging) -> None:
    failures: list[EngineFailed] = []
    thread = thread_of(hanging, failures)

    async def run() -> None:
        async with running(thread, model(), stall_timeout_s=0.2):
            hanging.has_work = True
            thread.call(lambda: None)
            assert isinstance(await until(failures), EngineHung)

    with pytest.raises(EngineHung, match="has been in a step for"):
        await run()
    assert not thread.join(0.0), "its end is not waited for"


async def test_an_engine_that_waits_for_work_does_not_hang(hanging: Hanging) -> None:
    failures: list[EngineFailed] = []
    async with running(thread_of(hanging, failures), model(), stall_timeout_s=0.05):
        await asyncio.sleep(0.5)
    assert failures == []


async def test_a_warm_up_may_take_longer_but_not_for_ever() -> None:
    engine, failures = Hanging(hangs_in="warm-up"), []
    thread = thread_of(engine, failures)

    async def run() -> None:
        async with running(thread, model(), stall_timeout_s=0.1):
            raise AssertionError("it is not warm")

    with pytest.raises(EngineHung, match="warming up for"):
        await run()
    engine.released.set()
