"""Many sequences over one stream of the target: what each gets, and what ends one, all, or none of them."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import asynccontextmanager

import grpc
import pytest

from specpool.rpc.errors import from_rpc_error, rpc_error_of
from specpool.v1 import target_pb2

Command = target_pb2.RunSequencesRequest


class Stream:
    """A router's side of the stream."""

    def __init__(self, call):
        self.call = call
        self.events = defaultdict(list)
        self.errors = {}
        self.num_messages = 0

    async def start(self, sequence_id, message):
        await self.call.write(Command(start=target_pb2.StartSequence(id=sequence_id, request=message)))

    async def read(self):
        message = await asyncio.wait_for(self.call.read(), 60)
        if message is grpc.aio.EOF:
            return False
        self.num_messages += 1
        for item in message.events:
            if item.HasField("event"):
                self.events[item.id].append(item.event)
            else:
                self.errors[item.id] = from_rpc_error(rpc_error_of(item.error))
        return True

    def is_done(self, sequence_id):
        events = self.events[sequence_id]
        return sequence_id in self.errors or bool(events and events[-1].HasField("finished"))

    async def until_done(self, *ids):
        while not all(map(self.is_done, ids)):
            assert await self.read(), "the stream ended early"

    async def to_its_end(self):
        while await self.read():
            pass

    def tokens(self, sequence_id):
        return [token for event in self.events[sequence_id] for token in event.delta.token_ids]

    def text(self, sequence_id):
        return "".join(event.delta.text for event in self.events[sequence_id])


@asynccontextmanager
async def stream_to(target):
    call = target.stub.RunSequences()
    try:
        yield Stream(call)
    finally:
        call.cancel()


async def eventually_idle(target):
    async with asyncio.timeout(30):
        while (load := (await target.status()).load).num_sequences_running or load.num_sequences_waiting:
            await asyncio.sleep(0.02)


async def test_sequences_of_one_stream_get_what_each_would_get_alone(target_for):
    target = await target_for(max_batch_size=8)
    messages = [target.message((1, 2, 3 + i), temperature=i % 2, seed=i, max_tokens=20 + i) for i in range(12)]
    alone = [await target.run(message) for message in messages]
    async with stream_to(target) as stream:
        for i, message in enumerate(messages, start=1):
            await stream.start(i, message)
        await stream.until_done(*range(1, 13))
        for i, expected in enumerate(alone, start=1):
            assert stream.events[i][0].started.num_prompt_tokens == expected.started.num_prompt_tokens
            assert stream.tokens(i) == expected.tokens
            assert stream.text(i) == expected.text
            assert stream.events[i][-1].finished.usage == expected.finished.usage
        assert stream.num_messages < sum(map(len, stream.events.values())), "messages carry several sequences"
        await stream.call.done_writing()
        await stream.to_its_end()
    await eventually_idle(target)


async def test_an_error_ends_its_sequence_alone(target_for):
    target = await target_for()
    async with stream_to(target) as stream:
        await stream.start(1, target.message(max_tokens=60))
        await stream.start(2, target.message(temperature=-1.0))
        await stream.start(3, target.message(()))
        await stream.until_done(1, 2, 3)
        assert stream.errors[2].message == "temperature must be between 0 and 100, got -1.0"
        assert stream.errors[2].metadata["field"] == "temperature"
        assert stream.errors[3].reason == "EMPTY_PROMPT"
        assert len(stream.tokens(1)) == 60
        assert not stream.events[2]


async def test_a_cancelled_sequence_is_freed_and_the_others_go_on(target_for):
    target = await target_for(max_batch_size=1)
    async with stream_to(target) as stream:
        await stream.start(1, target.message(max_tokens=900))
        while not stream.tokens(1):
            await stream.read()
        await stream.start(2, target.message(max_tokens=5))  # has no place beside the first
        await stream.call.write(Command(cancel=1))
        await stream.call.write(Command(cancel=1))  # it is gone: nothing to say
        await stream.until_done(2)
        assert len(stream.tokens(2)) == 5
        assert not stream.is_done(1)
    await eventually_idle(target)


async def test_a_lost_stream_frees_all_its_sequences(target_for):
    target = await target_for()
    async with stream_to(target) as stream:
        for i in range(1, 5):
            await stream.start(i, target.message(max_tokens=900))
        while not all(stream.tokens(i) for i in range(1, 5)):
            await stream.read()
        assert (await target.status()).load.num_sequences_running == 4
    await eventually_idle(target)


async def test_a_held_sequence_waits_and_loses_nothing(target_for):
    target = await target_for()
    expected = await target.generate(max_tokens=200)
    async with stream_to(target) as stream:
        await stream.start(1, target.message(max_tokens=200))
        await stream.call.write(Command(hold=1))
        await stream.start(2, target.message(max_tokens=200))
        await stream.until_done(2)
        assert not stream.is_done(1)
        await stream.call.write(Command(go_on=1))
        await stream.until_done(1)
        assert stream.tokens(1) == expected.tokens
        assert stream.text(1) == expected.text


@pytest.mark.parametrize(
    ("commands", "field"),
    [
        ([Command()], "command"),
        ([Command(cancel=1)], "cancel"),
        ([Command(hold=0)], "hold"),
        ([Command(go_on=2**63)], "go_on"),
        ([Command(start=target_pb2.StartSequence(id=0))], "start.id"),
        ([Command(start=target_pb2.StartSequence(id=4)), Command(start=target_pb2.StartSequence(id=4))], "start.id"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_no_router_says_ends_the_stream_by_name(target_for, commands, field):
    target = await target_for()
    async with stream_to(target) as stream:
        for command in commands:
            await stream.call.write(command)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.to_its_end()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert from_rpc_error(caught.value).metadata["field"] == field
    assert len((await target.generate()).tokens) == 40, "the target goes on"


async def test_a_target_that_drains_finishes_what_runs_and_ends_the_stream(target_for):
    target = await target_for(drain_grace_s=30)
    async with stream_to(target) as stream:
        await stream.start(1, target.message(max_tokens=300))
        while not stream.tokens(1):
            await stream.read()
        await target.stub.DrainTarget(target_pb2.DrainTargetRequest(grace_seconds=60))
        await stream.start(2, target.message())
        await stream.until_done(1, 2)
        assert len(stream.tokens(1)) == 300
        assert stream.errors[2].reason == "DRAINING"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.to_its_end()
        assert from_rpc_error(caught.value).reason == "DRAINING"
