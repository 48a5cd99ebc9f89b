"""One stream between a router and a target for all sequences: shared, left, held, and done without."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from router_fakes import NUM_TOKENS, FakeTarget, running, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, target_pb2, types_pb2
from specpool_router.generation.shared_streams import SharedStreams

from .calls import is_whole, until


def request_of(seed: int, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(seed=seed), **{"text": "x", **fields})


async def complete_all(client: Client, seeds: range) -> list[Completion]:
    return await asyncio.gather(*(client.complete(request_of(seed)) for seed in seeds))


async def test_all_sequences_share_one_stream(start_router: Any) -> None:
    target = FakeTarget(delay_s=0.005)
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        assert all(map(is_whole, await complete_all(client, range(1, 21))))
        assert all(map(is_whole, await complete_all(client, range(21, 31))))
    assert target.num_shared_streams == 1


async def test_a_target_without_shared_streams_is_called_for_each_sequence(start_router: Any) -> None:
    target = FakeTarget(delay_s=0.005)
    target.has_shared_streams = False
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        assert all(map(is_whole, await complete_all(client, range(1, 9))))
        assert all(map(is_whole, await complete_all(client, range(9, 13))))
    assert len(target.requests) == 12, "and each only once"


async def test_a_broken_stream_moves_all_its_sequences(start_router: Any) -> None:
    first, second = FakeTarget(), FakeTarget()
    first.cancel_at = 20
    async with running(first, second) as targets, Client(await start_router(targets=tuple(targets))) as client:
        assert all(map(is_whole, await complete_all(client, range(1, 11))))
    started = len(first.requests) + len(second.requests)
    assert started > 10, "some went on elsewhere"
    assert all(len(request.committed_token_ids) <= 20 for request in second.requests)


async def test_an_error_of_one_sequence_leaves_the_others(start_router: Any) -> None:
    target = FakeTarget()
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        others = asyncio.create_task(complete_all(client, range(1, 6)))
        await until(lambda: target.num_running == 5)
        target.error = errors.InvalidArgument("the prompt is empty", reason="EMPTY_PROMPT", metadata={"field": "text"})
        with pytest.raises(errors.InvalidArgument, match="the prompt is empty"):
            await client.complete(request_of(9))
        assert all(map(is_whole, await others))
    assert target.num_shared_streams == 1


async def test_a_large_request_has_a_call_of_its_own(start_router: Any) -> None:
    target = FakeTarget(delay_s=0.0)
    async with running(target) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        assert is_whole(await client.complete(request_of(1, text="x" * 300_000)))
        assert target.num_shared_streams == 0
        assert is_whole(await client.complete(request_of(2)))
        assert target.num_shared_streams == 1


async def test_a_sequence_that_nobody_reads_is_held_and_the_others_go_on() -> None:
    num_tokens = 600
    target = FakeTarget(delay_s=0.002)
    async with running(target) as (endpoint,), channel(endpoint) as connection:
        pod: Any = SimpleNamespace(
            channel=connection, status=None, heard_s=0.0, endpoint=SimpleNamespace(address=endpoint)
        )
        streams = SharedStreams()

        def call(seed: int, num_tokens: int) -> Any:
            request = request_of(seed)
            request.sampling.max_tokens = num_tokens
            return streams.call(pod, target_pb2.RunSequenceRequest(request=request))

        async def rest(call: Any) -> tuple[list[int], str]:
            token_ids, text = [], ""
            async with asyncio.timeout(60):
                while not (event := await call.read()).HasField("finished"):
                    token_ids += event.delta.token_ids
                    text += event.delta.text
            return token_ids, text

        slow = call(1, num_tokens)
        for seed in range(2, 6):
            assert await rest(call(seed, NUM_TOKENS)) == (tokens_of(seed), text_of(seed))
        await asyncio.sleep(1.0)
        assert 64 <= len(slow._events) < 200, "the target keeps what the router has no place for"
        assert await rest(slow) == (tokens_of(1, num_tokens), text_of(1, num_tokens))

        unread = call(7, num_tokens)
        await unread.read()
        unread.cancel()
        with pytest.raises(asyncio.CancelledError):
            await unread.read()
        await until(lambda: target.num_running == 0)
