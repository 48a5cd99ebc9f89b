"""The router as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from router_fakes import FakeTarget, running, start

from specpool.client import Client
from specpool.v1 import inference_pb2

_MAIN = """
import asyncio, sys
from specpool_router.config import RouterConfig
from specpool_router.server import serve
config = RouterConfig(targets=(sys.argv[1],), session_store=sys.argv[2], poll_interval_s=0.1)
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True)))
"""


async def test_sigterm_ends_the_process(valkey: Any) -> None:
    async with running(FakeTarget(delay_s=0)) as (target,):
        command = [sys.executable, "-c", _MAIN, target, valkey.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            endpoint = (await asyncio.to_thread(process.stdout.readline)).strip()
            async with Client(endpoint) as client:
                assert (await client.complete(inference_pb2.GenerateRequest(text="x"))).token_ids
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, 10) == 0
            assert time.monotonic() - started < 5


async def health_of(endpoint: str, service: str) -> int:
    async with grpc.aio.insecure_channel(endpoint) as to:
        answer = await health_pb2_grpc.HealthStub(to).Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def until_health(endpoint: str, service: str, expected: int) -> None:
    async with asyncio.timeout(10):
        while await health_of(endpoint, service) != expected:
            await asyncio.sleep(0.05)


async def test_ready_only_while_a_target_is_there(start_router: Any) -> None:
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    endpoint = await start_router(targets=(address,), session_store="memory://", request_wait_s=1.0)
    name = "specpool.v1.InferenceService"
    assert await health_of(endpoint, "") == serving
    assert await health_of(endpoint, name) == not_serving
    server, _, health = await start(FakeTarget(delay_s=0), address)
    await until_health(endpoint, name, serving)
    await health.set_serving(False)
    await until_health(endpoint, name, not_serving)
    await health.set_serving()
    await until_health(endpoint, name, serving)
    await server.stop(None)
    await until_health(endpoint, name, not_serving)
    assert await health_of(endpoint, "") == serving


async def test_ready_while_the_only_target_is_replaced(start_router: Any) -> None:
    """Requests wait for it: clients should still find the router."""
    serving, name = health_pb2.HealthCheckResponse.SERVING, "specpool.v1.InferenceService"
    server, address, _ = await start(FakeTarget(delay_s=0))
    endpoint = await start_router(targets=(address,), session_store="memory://", request_wait_s=60.0)
    await until_health(endpoint, name, serving)
    async with Client(endpoint) as client:
        await server.stop(None)
        async with asyncio.timeout(20):
            while any(entry.reachable for entry in (await client.cluster_status()).targets):
                await asyncio.sleep(0.05)
        assert await health_of(endpoint, name) == serving
        waiting = asyncio.create_task(client.complete(inference_pb2.GenerateRequest(text="x")))
        server, _, _ = await start(FakeTarget(delay_s=0), address)
        assert (await waiting).token_ids
    await server.stop(None)
