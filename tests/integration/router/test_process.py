"""The router as a process of its own."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import Any

from router_fakes import FakeTarget, running

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
