"""Targets as processes of their own, stopped for a while or killed under their streams."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from router_fakes import text_of, tokens_of

from specpool.client import Client, Completion, ResumePolicy
from specpool.v1 import inference_pb2, types_pb2

NEVER = ResumePolicy(max_tries=0)


def request_of(seed: int = 11, **sampling: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="x", sampling=types_pb2.SamplingParams(seed=seed, **sampling))


def check_whole(completion: Completion, seed: int = 11) -> None:
    assert completion.token_ids == tokens_of(seed)
    assert completion.text == text_of(seed)


_TARGET = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
import fakes

async def main():
    _, endpoint, _ = await fakes.start(fakes.FakeTarget(delay_s=0.01))
    print(endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


_TOY_TARGET = """
import asyncio
from specpool_target.config import TargetConfig
from specpool_target.server import serve
config = TargetConfig(model="toy#vocab=24,seed=3,step_ms=5", max_batch_size=4, max_waiting=20)
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True)))
"""


@asynccontextmanager
async def target_process(main: str = _TARGET) -> AsyncIterator[tuple[subprocess.Popen[str], str]]:
    folder = str(Path(__file__).parent)
    with subprocess.Popen([sys.executable, "-c", main, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, (await asyncio.to_thread(process.stdout.readline)).strip()
        finally:
            process.kill()


async def test_a_process_that_is_stopped_for_a_while_refuses_nobody(start_router: Any) -> None:
    async with target_process() as (process, endpoint):
        router = await start_router(targets=(endpoint,))
        async with Client(router, resume=NEVER) as client:
            check_whole(await client.complete(request_of()))
            process.send_signal(signal.SIGSTOP)
            stopped_s, calls = time.monotonic(), []
            while time.monotonic() - stopped_s < 3.5:
                calls.append(asyncio.create_task(client.complete(request_of())))
                await asyncio.sleep(0.25)
            process.send_signal(signal.SIGCONT)
            for completion in await asyncio.gather(*calls):
                check_whole(completion)


async def test_a_process_that_is_killed_loses_no_stream(start_router: Any) -> None:
    async with target_process() as (one, first), target_process() as (_, second):
        router = await start_router(targets=(first, second))
        async with Client(router, resume=NEVER) as client:
            streams = [asyncio.create_task(client.complete(request_of(seed))) for seed in range(40)]
            await asyncio.sleep(0.2)
            one.kill()
            for seed, completion in enumerate(await asyncio.gather(*streams)):
                check_whole(completion, seed)


async def test_a_full_target_takes_what_a_killed_one_had(start_router: Any) -> None:
    """Both have 4 sequences in the batch and more that wait; new requests are refused from 20 waiting on."""
    num_streams = 44

    def request(seed: int) -> inference_pb2.GenerateRequest:
        return request_of(seed, temperature=1.0, max_tokens=40, ignore_eos=True)

    async def run(client: Client, seed: int, into: Completion) -> None:
        async for event in client.stream(request(seed)):
            into.add(event)

    async with target_process(_TOY_TARGET) as (one, first), target_process(_TOY_TARGET) as (_, second):
        router = await start_router(targets=(first, second))
        async with Client(router, resume=NEVER) as client:
            completions = [Completion() for _ in range(num_streams)]
            streams = [asyncio.create_task(run(client, seed, each)) for seed, each in enumerate(completions, 1)]
            async with asyncio.timeout(60):
                while not all(each.seed for each in completions):
                    await asyncio.sleep(0.01)
            one.kill()
            await asyncio.gather(*streams)
            assert all(len(each.token_ids) == 40 and each.finish_reason for each in completions)
            for seed in (1, num_streams):
                undisturbed = await client.complete(request(seed))
                assert undisturbed.token_ids == completions[seed - 1].token_ids
                assert undisturbed.text == completions[seed - 1].text
