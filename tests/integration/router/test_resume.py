"""Resuming: what the client says it has is the truth, and what follows continues exactly that."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from redis.asyncio import Redis
from router_fakes import NUM_TOKENS, TEXT_LAG, FakeTarget, running, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from specpool_router.sessions.redis_store import RedisSessionStore
from specpool_router.sessions.session_store import SessionState

SEED = 11


def request_of(**sampling: Any) -> inference_pb2.GenerateRequest:
    rejection = types_pb2.VERIFICATION_MODE_REJECTION if sampling else types_pb2.VERIFICATION_MODE_UNSPECIFIED
    return inference_pb2.GenerateRequest(
        request_id="r",
        model="m",
        text="hello",
        sampling=types_pb2.SamplingParams(seed=SEED, **sampling),
        verification=rejection,
    )


async def receive(router: str, num_tokens: int, request: inference_pb2.GenerateRequest | None = None) -> Completion:
    """The beginning of an answer; then the client is gone."""
    received = Completion()
    async with Client(router) as client:
        async for event in client.stream(request or request_of()):
            received.add(event)
            if len(received.token_ids) >= num_tokens:
                break
    return received


async def resume(router: str, **fields: Any) -> Completion:
    completion = Completion()
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        try:
            async for event in stub.Resume(inference_pb2.ResumeRequest(request_id="r", **fields)):
                completion.add(event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
    return completion


def what_is_said(say: str, received: Completion) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if "count" in say:
        fields["num_tokens_received"] = len(received.token_ids)
    if "chars" in say:
        fields["num_chars_received"] = len(received.text)
    if "ids" in say:
        fields["received_token_ids"] = received.token_ids
    if "request" in say:
        fields["request"] = request_of()
    return fields


def check_whole(received: Completion, rest: Completion) -> None:
    assert received.token_ids + rest.token_ids == tokens_of(SEED)
    assert received.text + rest.text == text_of(SEED)
    assert rest.usage.num_completion_tokens == NUM_TOKENS


@asynccontextmanager
async def detached(url: str) -> AsyncIterator[tuple[RedisSessionStore, str]]:
    """The store and the session's owner, once the session is written as one whose client is gone."""
    store = RedisSessionStore(url)
    try:
        async with asyncio.timeout(10):
            while (session := await store.load("r")) is None or session.state is not SessionState.DETACHED:
                await asyncio.sleep(0.01)
        yield store, session.owner
    finally:
        await store.close()


async def let_journal_lag(url: str, num_entries: int, *instead: bytes) -> None:
    """Leave the journal no more than ``num_entries``, and what another stream wrote instead of the rest."""
    async with detached(url) as (store, owner):
        journal = await store.read_journal("r")
        assert await store.take_over("r", "another", owner)  # only another owner replaces a journal
        await store.append("r", "another", 0, [*journal[:num_entries], *instead])


@pytest.mark.parametrize("num_entries", [0, 1, 2, 3])
@pytest.mark.parametrize("say", ["count", "count chars", "ids", "ids chars", "ids chars request"])
async def test_deltas_of_several_tokens_and_a_journal_that_lags(
    start_router: Any, valkey: Any, say: str, num_entries: int
) -> None:
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0, num_per_delta=5)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9)
        await let_journal_lag(valkey.url, num_entries)
        check_whole(received, await resume(other, **what_is_said(say, received)))
        # It has ended, and the journal is whole, wherever it lagged.
        check_whole(received, await resume(other, **what_is_said(say, received)))
        for num_tokens in (0, 9, NUM_TOKENS):
            chars = max(0, 2 * num_tokens - TEXT_LAG) if num_tokens < NUM_TOKENS else 2 * NUM_TOKENS
            known = Completion(text=text_of(SEED)[:chars], token_ids=tokens_of(SEED)[:num_tokens])
            check_whole(known, await resume(other, **what_is_said("count chars", known)))


@pytest.mark.parametrize("say", ["ids request", "ids chars request", "count request", "count chars request"])
async def test_a_lost_store_is_no_obstacle(start_router: Any, valkey: Any, say: str) -> None:
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0, num_per_delta=5)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9)
        async with detached(valkey.url), Redis.from_url(valkey.url) as store:
            await store.flushall()
        with pytest.raises(errors.SessionNotFound, match="no session 'r'"):
            await resume(other, **what_is_said("ids chars", received))
        check_whole(received, await resume(other, **what_is_said(say, received)))


async def test_a_store_that_is_away_is_no_obstacle(start_router: Any, valkey: Any) -> None:
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0, num_per_delta=5)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9)
        await valkey.kill()
        check_whole(received, await resume(other, **what_is_said("ids chars request", received)))


async def test_a_store_that_comes_back_does_not_end_what_went_on_without_it(start_router: Any, valkey: Any) -> None:
    """It knows the stream before as the session's owner."""
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0.4, num_per_delta=2)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9)
        async with detached(valkey.url):
            pass
        os.kill(valkey.pid, signal.SIGSTOP)
        try:
            rest = asyncio.create_task(resume(other, **what_is_said("ids chars request", received)))
            async with asyncio.timeout(20):
                while not second.num_running:
                    await asyncio.sleep(0.01)
        finally:
            os.kill(valkey.pid, signal.SIGCONT)
        check_whole(received, await rest)
        # By now the store has the whole of it.
        check_whole(received, await resume(former, **what_is_said("count", received)))


@pytest.mark.parametrize("num_entries", [1, 3])
async def test_under_rejection_no_two_answers_are_spliced(start_router: Any, valkey: Any, num_entries: int) -> None:
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0, num_per_delta=5)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9, request_of(temperature=1.0))
        await let_journal_lag(valkey.url, num_entries)
        if num_entries == 3:  # the journal has all that the client has
            check_whole(received, await resume(other, **what_is_said("count", received)))
            return
        with pytest.raises(errors.ResumeImpossible, match="the client has 9 tokens, the journal 3") as caught:
            await resume(other, **what_is_said("count", received))
        assert caught.value.metadata["field"] == "received_token_ids"
        assert not second.requests
        check_whole(received, await resume(other, **what_is_said("ids", received)))
        assert list(second.requests[0].committed_token_ids) == received.token_ids


async def test_the_clients_answer_counts_where_the_journal_has_another(start_router: Any, valkey: Any) -> None:
    first, second = FakeTarget(num_per_delta=3), FakeTarget(delay_s=0, num_per_delta=5)
    async with running(first, second) as (one, two):
        former = await start_router(targets=(one,), session_store=valkey.url)
        other = await start_router(targets=(two,), session_store=valkey.url)
        received = await receive(former, 9, request_of(temperature=1.0))
        deltas = [inference_pb2.GenerationDelta(token_ids=[1, 2, 3], text=text) for text in ("of another", "stream")]
        await let_journal_lag(valkey.url, 2, *(delta.SerializeToString() for delta in deltas))
        check_whole(received, await resume(other, **what_is_said("ids chars", received)))
        nothing = Completion()
        check_whole(nothing, await resume(other))


async def test_a_resumed_stream_waits_for_a_full_target(start_router: Any) -> None:
    target = FakeTarget(num_per_delta=3)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,))
        received = await receive(router, 9)
        target.capacity = 0
        rest = asyncio.create_task(resume(router, **what_is_said("ids chars", received)))
        async with asyncio.timeout(20):
            while len(target.requests) < 3:  # refused twice
                await asyncio.sleep(0.01)
        target.capacity = None
        check_whole(received, await rest)


async def test_a_count_inside_a_delta_needs_the_characters(start_router: Any) -> None:
    target = FakeTarget(delay_s=0, num_per_delta=4)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,))
        await receive(router, NUM_TOKENS)
        async with Client(router) as client:
            await client.complete(inference_pb2.GenerateRequest(request_id="s", text="x"))
        with pytest.raises(errors.InvalidArgument, match="ends inside a delta") as caught:
            await resume(router, num_tokens_received=6)
        assert caught.value.metadata["field"] == "num_chars_received"
        known = Completion(text=text_of(SEED)[:11], token_ids=tokens_of(SEED)[:6])
        check_whole(known, await resume(router, **what_is_said("count chars", known)))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"num_tokens_received": 2, "received_token_ids": [1]}, "num_tokens_received"),
        ({"num_tokens_received": NUM_TOKENS + 1}, "num_tokens_received"),
        ({"received_token_ids": [0] * (NUM_TOKENS + 1)}, "num_tokens_received"),
    ],
)
async def test_what_a_client_cannot_have(start_router: Any, fields: dict[str, Any], field: str) -> None:
    target = FakeTarget(delay_s=0)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,))
        async with Client(router) as client:
            await client.complete(request_of())
        with pytest.raises(errors.InvalidArgument) as caught:
            await resume(router, **fields)
        assert caught.value.metadata["field"] == field
        with pytest.raises(errors.ResumeImpossible, match="does not begin with the tokens received"):
            await resume(router, received_token_ids=[0])


async def test_an_answer_that_is_shorter_than_what_the_client_claims(start_router: Any, valkey: Any) -> None:
    target = FakeTarget(num_per_delta=3)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), session_store=valkey.url)
        await receive(router, 9)
        await let_journal_lag(valkey.url, 1)
        with pytest.raises(errors.InvalidArgument, match=f"must be at most {NUM_TOKENS}, the tokens of the whole"):
            await resume(router, num_tokens_received=NUM_TOKENS + 1)
