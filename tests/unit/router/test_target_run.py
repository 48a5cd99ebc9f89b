"""How a call to a target ends that is cancelled on this side."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from specpool.v1 import target_pb2
from specpool_router.generation.target_run import Event, TargetLost, TargetRun


class Call:
    """Says nothing until it is cancelled."""

    def __init__(self) -> None:
        self._cancelled = asyncio.Event()

    async def read(self) -> Event:
        await self._cancelled.wait()
        raise asyncio.CancelledError

    def cancel(self) -> None:
        self._cancelled.set()


async def _start() -> tuple[Call, TargetRun, asyncio.Task[Event]]:
    call = Call()
    streams: Any = SimpleNamespace(call=lambda *_: call)
    target: Any = SimpleNamespace(num_streams=0, progressed_s=0.0, heard_s=0.0)
    run = TargetRun(target, target_pb2.RunSequenceRequest(), streams, progress_timeout_s=600.0)

    async def first() -> Event:
        return await anext(run.events())

    reading = asyncio.create_task(first())
    await asyncio.sleep(0)
    return call, run, reading


async def test_a_channel_that_is_closed_is_a_lost_target() -> None:
    """A CANCELLED of our own making must not reach the client without a reason."""
    call, _, reading = await _start()
    call.cancel()
    with pytest.raises(TargetLost, match="its channel was closed"):
        await reading


async def test_a_stopped_stream_is_no_loss_that_counts() -> None:
    _, run, reading = await _start()
    run.cancel()
    with pytest.raises(TargetLost, match="stopped") as caught:
        await reading
    assert not caught.value.ran


async def test_a_caller_that_leaves_is_heard_also_when_the_stream_is_stopped() -> None:
    _, run, reading = await _start()
    run.cancel()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
