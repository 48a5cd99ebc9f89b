"""One sequence of a shared stream, between a slow client and a target."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from specpool.v1 import inference_pb2, target_pb2
from specpool_router.generation.sequence_call import Event, SequenceCall, broken


def _event(token_id: int) -> Event:
    return Event(delta=inference_pb2.GenerationDelta(token_ids=[token_id]))


class Told:
    """A call, and the commands that its target was told."""

    def __init__(self) -> None:
        self.call = SequenceCall(3, target_pb2.RunSequenceRequest(tenant="t"), "", lambda _: self.waiting.append(1))
        self.waiting: list[int] = []
        self.commands: list[str] = []

    def write(self) -> list[str]:
        while (command := self.call.command()) is not None:
            self.commands.append(str(command.WhichOneof("command")))
        return self.commands


async def test_a_slow_reader_has_its_sequence_held_and_gets_everything() -> None:
    told = Told()
    assert told.write() == ["start"]
    for number in range(100):
        told.call.put(_event(number))
    assert told.write() == ["start", "hold"]
    read = [list((await told.call.read()).delta.token_ids) for _ in range(100)]
    assert read == [[number] for number in range(100)]
    assert told.write() == ["start", "hold", "go_on"]


async def test_a_target_that_does_not_hold_loses_the_sequence() -> None:
    told = Told()
    told.write()
    for number in range(20_000):
        if not told.call.is_over:
            told.call.put(_event(number))
    assert told.write()[-1] == "cancel"
    for _ in range(10_000):
        await told.call.read()
    with pytest.raises(grpc.aio.AioRpcError, match="does not hold"):
        await told.call.read()


async def test_what_was_never_sent_needs_no_cancel() -> None:
    told = Told()
    told.call.cancel()
    assert told.write() == []
    with pytest.raises(asyncio.CancelledError):
        await told.call.read()


async def test_a_flapping_reader_leaves_no_queue_of_commands() -> None:
    told = Told()
    told.write()
    for _ in range(5):
        for number in range(64):
            told.call.put(_event(number))
        for _ in range(64):
            await told.call.read()
    assert told.write() == ["start"]


async def test_a_broken_stream_is_told_after_the_events_before_it() -> None:
    told = Told()
    told.write()
    told.call.put(_event(1))
    told.call.end(broken("gone"))
    assert list((await told.call.read()).delta.token_ids) == [1]
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError, match="gone"):
            await told.call.read()
    told.call.cancel()
    assert told.write() == ["start"]


async def test_a_target_without_shared_streams_gets_the_same_request() -> None:
    told, made = Told(), []
    told.write()
    told.call.replace(made.append)
    assert [request.tenant for request in made] == ["t"]
