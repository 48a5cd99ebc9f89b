"""A real router in front of a real target with a toy model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest

from specpool.rpc.client import channel
from specpool_router.config import RouterConfig
from specpool_router.server import serve as serve_router
from specpool_target.config import TargetConfig
from specpool_target.server import serve as serve_target

Serve = Callable[..., Awaitable[None]]


@dataclass(frozen=True)
class Service:
    """Both ways in."""

    router: grpc.aio.Channel
    target: grpc.aio.Channel


@asynccontextmanager
async def _serving(serve: Serve, config: object) -> AsyncIterator[str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    if task.done():
        await task
    try:
        yield ready.result()
    finally:
        stop.set()
        await asyncio.wait_for(task, 30)


@pytest.fixture
async def start_service() -> AsyncIterator[Callable[..., Awaitable[Service]]]:
    """Starts a target and a router in front of it."""
    async with AsyncExitStack() as stack:

        async def start(model: str = "toy#vocab=64,seed=3,context=64", **settings: Any) -> Service:
            settings = {"block_size": 4, "num_kv_blocks": 64, "drain_grace_s": 1.0, **settings}
            target = await stack.enter_async_context(_serving(serve_target, TargetConfig(model=model, **settings)))
            config = RouterConfig(targets=(target,), poll_interval_s=0.1, drain_grace_s=1.0, failover_wait_s=5.0)
            router = await stack.enter_async_context(_serving(serve_router, config))
            channels = [await stack.enter_async_context(channel(endpoint)) for endpoint in (router, target)]
            return Service(*channels)

        yield start
