"""A peer that stops in the middle of busy streams is noticed, whatever ping was on its way to it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc.aio
import pytest

from specpool.rpc.client import channel
from specpool.v1 import target_pb2, target_pb2_grpc

_SERVER = """
import asyncio
from specpool.rpc.server import bind, create_server
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc

class Busy(target_pb2_grpc.TargetServiceServicer):
    async def RunSequence(self, request, context):
        while True:
            yield target_pb2.RunSequenceResponse(delta=inference_pb2.GenerationDelta(text="x" * 100))
            await asyncio.sleep(0.02)

async def main():
    server = create_server()
    target_pb2_grpc.add_TargetServiceServicer_to_server(Busy(), server)
    print(bind(server, "127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

asyncio.run(main())
"""
NUM_CONNECTIONS = 8
PING_MS = 10_000
NOTICED_S = 35.0
"""A ping within ten seconds, fifteen for its answer, and what a busy machine takes; a minute is gRPC's default."""


@pytest.fixture
async def busy_server() -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
        finally:
            process.kill()


async def _read_until_lost(connection: grpc.aio.Channel, flows: asyncio.Event) -> float:
    num_read = 0
    try:
        async for _ in target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest()):
            num_read += 1
            if num_read == 50:
                flows.set()
    except grpc.aio.AioRpcError:
        return time.monotonic()
    raise AssertionError("the stream has no end")


async def test_a_server_that_stops_is_noticed_by_every_busy_connection(
    busy_server: tuple[subprocess.Popen[str], str],
) -> None:
    process, endpoint = busy_server
    async with AsyncExitStack() as stack:
        connections = [
            await stack.enter_async_context(channel(endpoint, keepalive_ms=PING_MS, own_connection=True))
            for _ in range(NUM_CONNECTIONS)
        ]
        flow = [asyncio.Event() for _ in connections]
        reading = [
            asyncio.create_task(_read_until_lost(connection, flows))
            for connection, flows in zip(connections, flow, strict=True)
        ]
        async with asyncio.timeout(60):
            await asyncio.gather(*(flows.wait() for flows in flow))
        process.send_signal(signal.SIGSTOP)
        stopped_s = time.monotonic()
        lost_s = await asyncio.wait_for(asyncio.gather(*reading), 120)
    assert max(lost_s) - stopped_s < NOTICED_S, [round(at_s - stopped_s, 1) for at_s in lost_s]
