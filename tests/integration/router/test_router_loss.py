"""Routers as processes of their own that are killed or stopped under their streams: the clients go on at another."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from router_fakes import NUM_TOKENS, FakeTarget, running, text_of, tokens_of

from specpool import errors
from specpool.client import Client, Completion, ResumePolicy
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2

_MAIN = """
import asyncio, json, sys
from specpool_router.config import RouterConfig
from specpool_router.server import serve
config = RouterConfig(**json.loads(sys.argv[1]), poll_interval_s=0.1)
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True)))
"""
NUM_STREAMS = 60
NEVER = ResumePolicy(max_tries=0)


@asynccontextmanager
async def router_process(**settings: Any) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", _MAIN, json.dumps(settings)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
        finally:
            process.kill()


@asynccontextmanager
async def two_routers(store: str, *targets: str, **settings: Any) -> AsyncIterator[list[tuple[Any, str]]]:
    async with AsyncExitStack() as stack:
        settings = {"targets": targets, "session_store": store, **settings}
        yield [await stack.enter_async_context(router_process(**settings)) for _ in range(2)]


def request_of(seed: int) -> inference_pb2.GenerateRequest:
    sampling = types_pb2.SamplingParams(seed=seed, temperature=1.0)
    return inference_pb2.GenerateRequest(request_id=f"r{seed}", text="x", sampling=sampling)


def targets_of_several_tokens() -> tuple[FakeTarget, FakeTarget]:
    return FakeTarget(delay_s=0.15, num_per_delta=3), FakeTarget(delay_s=0.1, num_per_delta=4)


def check_whole(completion: Completion, seed: int) -> None:
    assert completion.token_ids == tokens_of(seed)
    assert completion.text == text_of(seed)
    assert completion.usage.num_completion_tokens == NUM_TOKENS


async def collect(client: Client, seed: int, into: Completion) -> Completion:
    async for event in client.stream(request_of(seed)):
        into.add(event)
    return into


async def until_all_stream(completions: list[Completion]) -> None:
    async with asyncio.timeout(60):
        while not all(completion.token_ids for completion in completions):
            await asyncio.sleep(0.01)


async def test_streams_of_a_killed_router_go_on_at_another(valkey: Any) -> None:
    async with (
        running(*targets_of_several_tokens()) as targets,
        two_routers(valkey.url, *targets) as [(process, one), (_, other)],
        Client(f"{one},{other}") as client,
    ):
        completions = [Completion() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(collect(client, seed, each)) for seed, each in enumerate(completions)]
        await until_all_stream(completions)
        process.kill()
        for seed, completion in enumerate(await asyncio.gather(*streams)):
            check_whole(completion, seed)


async def resume_by_count(router: str, seed: int, received: Completion) -> None:
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        point = inference_pb2.ResumeRequest(request_id=f"r{seed}", num_tokens_received=len(received.token_ids))
        async for event in stub.Resume(point):
            if not event.HasField("started"):
                received.add(event)


async def test_clients_that_only_count_tokens_get_the_same_text_too(valkey: Any) -> None:
    """Deltas of several tokens, and a journal that lags behind what the clients got when the router was killed."""
    async with (
        running(*targets_of_several_tokens()) as targets,
        two_routers(valkey.url, *targets) as [(process, one), (_, other)],
        Client(one, resume=NEVER) as client,
    ):
        completions = [Completion() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(collect(client, seed, each)) for seed, each in enumerate(completions)]
        await until_all_stream(completions)
        process.kill()
        await asyncio.gather(*streams, return_exceptions=True)
        # Of one that has all tokens a count does not tell whether it has the text that came after the last of them.
        cut = {seed: each for seed, each in enumerate(completions) if len(each.token_ids) < NUM_TOKENS}
        assert cut
        await asyncio.gather(*(resume_by_count(other, seed, each) for seed, each in cut.items()))
        for seed, completion in cut.items():
            check_whole(completion, seed)


@pytest.mark.parametrize("store", ["valkey", "none"])
async def test_a_stream_longer_than_the_routers_grace_goes_on_at_another(valkey: Any, store: str) -> None:
    url = valkey.url if store == "valkey" else "memory://"
    async with (
        running(*targets_of_several_tokens()) as targets,
        two_routers(url, *targets, drain_grace_s=0.5) as [(process, one), (_, other)],
        Client(f"{one},{other}") as client,
    ):
        completions = [Completion() for _ in range(NUM_STREAMS)]
        streams = [asyncio.create_task(collect(client, seed, each)) for seed, each in enumerate(completions)]
        await until_all_stream(completions)
        process.send_signal(signal.SIGTERM)
        for seed, completion in enumerate(await asyncio.gather(*streams)):
            check_whole(completion, seed)
        assert await asyncio.to_thread(process.wait, 20) == 0


async def test_a_stream_that_a_stopping_router_ends_says_so(valkey: Any) -> None:
    async with (
        running(FakeTarget(delay_s=0.5)) as targets,
        two_routers(valkey.url, *targets, drain_grace_s=0.5) as [(process, one), (_, other)],
        Client(one, resume=NEVER) as client,
    ):
        received = Completion()
        stream = asyncio.create_task(collect(client, 0, received))
        await until_all_stream([received])
        process.send_signal(signal.SIGTERM)
        with pytest.raises(errors.Draining) as caught:  # the stream's own; the server's on a busy host
            await stream
        assert caught.value.metadata["retriable"] == "true"
        assert await asyncio.to_thread(process.wait, 20) == 0
        await resume_by_count(other, 0, received)
        check_whole(received, 0)
