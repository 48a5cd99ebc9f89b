"""Routers and real session stores."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from embedded_valkey import EmbeddedValkey

from specpool_router.config import RouterConfig
from specpool_router.metrics import RouterMetrics
from specpool_router.server import serve
from specpool_tools.local.embedded_store import find_binary

# Under --import-mode=importlib a folder of tests is no package: its helper modules are loaded by path.
for _name, _file in (("router_fakes", "fakes.py"), ("store_servers", "store_servers.py")):
    if _name not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_name, Path(__file__).with_name(_file))
        assert _spec is not None
        assert _spec.loader is not None
        sys.modules[_name] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[_name])

StartRouter = Callable[..., Awaitable[str]]


@asynccontextmanager
async def _router(metrics: RouterMetrics | None = None, **settings: Any) -> AsyncIterator[str]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    defaults = {"poll_interval_s": 0.1, "failover_wait_s": 10.0, "request_wait_s": 5.0, "drain_grace_s": 1.0}
    config = RouterConfig(**{**defaults, **settings})
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop, metrics=metrics))
    await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        await task
    try:
        yield await ready
    finally:
        stop.set()
        await task


@pytest.fixture
async def start_router() -> AsyncIterator[StartRouter]:
    async with AsyncExitStack() as stack:

        async def start(metrics: RouterMetrics | None = None, **settings: Any) -> str:
            return await stack.enter_async_context(_router(metrics, **settings))

        yield start


@pytest.fixture
async def valkey() -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(binary=find_binary()) as server:
        yield server


@pytest.fixture(params=["valkey", "redis-server"])
def store_binary(request: pytest.FixtureRequest) -> Path:
    if request.param == "valkey":
        return find_binary()
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not on PATH")
    return Path(binary)


@pytest.fixture
async def any_server(store_binary: Path) -> AsyncIterator[EmbeddedValkey]:
    async with EmbeddedValkey(binary=store_binary) as server:
        yield server
