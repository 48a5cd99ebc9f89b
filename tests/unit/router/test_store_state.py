"""Up and down of the session store: a write decides, and nothing flaps."""

from __future__ import annotations

import logging

import pytest

from specpool.errors import ConfigError, SessionStoreMisconfigured, SessionStoreRefused, SessionStoreUnavailable
from specpool_router.metrics import RouterMetrics
from specpool_router.sessions.memory_store import MemorySessionStore
from specpool_router.sessions.store_state import StoreState

GONE = SessionStoreUnavailable("gone")


class ProbedStore(MemorySessionStore):
    error: SessionStoreUnavailable | None = None

    async def probe(self, writer: str) -> None:
        if self.error is not None:
            raise self.error


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def make() -> tuple[ProbedStore, Clock, StoreState, RouterMetrics]:
    store, clock, metrics = ProbedStore(), Clock(), RouterMetrics()
    return store, clock, StoreState(store, metrics, clock=clock), metrics


def warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(record.levelno == logging.WARNING for record in caplog.records)


async def test_an_outage_is_one_warning_and_ends_at_once() -> None:
    _, clock, state, metrics = make()
    await state.start()
    assert state.up
    state.failed(GONE)
    assert not state.up
    with pytest.raises(SessionStoreUnavailable):
        state.require()
    assert metrics.registry.get_sample_value("specpool_session_store_up") == 0.0
    clock.now += 1
    await state.look()
    assert state.up
    assert metrics.registry.get_sample_value("specpool_session_store_up") == 1.0


async def test_a_store_whose_writes_fail_while_its_probe_goes_well_is_not_tried_every_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, clock, state, _ = make()
    await state.start()
    for _ in range(10 * 60):  # ten minutes in which every real write fails
        if state.up:
            state.failed(GONE)
        clock.now += 1
        await state.look()
    assert warnings(caplog) < 16
    last_minutes = 0
    for _ in range(5 * 60):
        if state.up:
            state.failed(GONE)
            last_minutes += 1
        clock.now += 1
        await state.look()
    assert last_minutes <= 6


async def test_a_store_that_was_well_for_long_is_trusted_again() -> None:
    _, clock, state, _ = make()
    for _ in range(5):
        state.failed(GONE)
        clock.now += 100
        await state.look()
        assert state.up
    clock.now += 1000
    state.failed(GONE)
    clock.now += 1
    await state.look()
    assert state.up


async def test_one_refused_operation_is_not_the_stores_end(caplog: pytest.LogCaptureFixture) -> None:
    _, clock, state, _ = make()
    for _ in range(100):
        state.failed(SessionStoreRefused("WRONGTYPE"))
        clock.now += 0.1
    assert state.up
    assert warnings(caplog) == 1


async def test_a_start_without_the_store_is_a_start(caplog: pytest.LogCaptureFixture) -> None:
    store, clock, state, _ = make()
    store.error = GONE
    await state.start()
    assert not state.up
    assert warnings(caplog) == 1
    called = []
    state.on_up(lambda: called.append(True))
    for _ in range(10):
        clock.now += 1
        await state.look()
    assert not called
    store.error = None
    clock.now += 1
    await state.look()
    assert state.up
    assert called == [True]
    assert warnings(caplog) == 1


async def test_what_can_never_be_the_store_is_refused_at_the_start_and_survived_later() -> None:
    store, _, state, _ = make()
    store.error = SessionStoreMisconfigured("it is a replica")
    with pytest.raises(ConfigError, match="it is a replica"):
        await state.start()
    await state.look()
    assert not state.up


async def test_an_outage_that_waiting_cannot_end_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    """A router that started while nothing answered finds a replica there, say: only its log can tell the operator."""
    store, clock, state, _ = make()
    store.error = GONE
    await state.start()
    store.error = SessionStoreMisconfigured("it is a replica")
    for _ in range(5):
        clock.now += 1
        await state.look()
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert told == ["the session store will not come back by itself: it is a replica"]
