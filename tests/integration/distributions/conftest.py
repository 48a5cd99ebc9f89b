"""Real targets and real speculators on toy models, over real gRPC and real gloo."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve as serve_speculator
from specpool_target.config import TargetConfig
from specpool_target.server import serve as serve_target

VOCAB = 6
TARGET_MODEL = f"toy#vocab={VOCAB},seed=3,sharpness=1,step_ms=2"
DRAFT_MODEL = f"toy#vocab={VOCAB},seed=4,sharpness=1"
PROMPT = (1, 2, 3)


class Target:
    """Calls a target."""

    def __init__(self, endpoint: str, connection: Any) -> None:
        self.endpoint = endpoint
        self.stub = target_pb2_grpc.TargetServiceStub(connection)

    async def generate(self, speculator: str, *, seed: int = 1, max_tokens: int = 40, mode: str = "SSD") -> Any:
        """Tokens and stats of one rejection request."""
        request = inference_pb2.GenerateRequest(
            sampling=types_pb2.SamplingParams(temperature=1.0, max_tokens=max_tokens, seed=seed, ignore_eos=True),
            mode=f"SPECULATION_MODE_{mode}",
            verification=types_pb2.VERIFICATION_MODE_REJECTION,
            max_lookahead=3,
        )
        request.tokens.token_ids.extend(PROMPT)
        tokens: list[int] = []
        known = [types_pb2.SpeculatorEndpoint(address=speculator)]
        message = target_pb2.RunSequenceRequest(request=request, speculators=known)
        async for response in self.stub.RunSequence(message, timeout=60):
            if response.WhichOneof("event") == "delta":
                tokens += response.delta.token_ids
            elif response.WhichOneof("event") == "finished":
                return tokens, response.finished.stats
        raise AssertionError("the stream ended without `finished`")

    async def link(self) -> Any:
        """Status of the first link."""
        status = await self.stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
        return status.speculators[0]

    async def until(self, condition: Callable[[Any], bool], timeout_s: float = 20.0) -> Any:
        """The link's status once it fulfils the condition."""
        async with asyncio.timeout(timeout_s):
            while not condition(link := await self.link()):
                await asyncio.sleep(0.02)
        return link


async def _start(serve: Any, config: Any) -> tuple[str, asyncio.Task[None], asyncio.Event]:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
    if task.done():
        task.result()
    return ready.result(), task, stop


async def _stop(task: asyncio.Task[None], stop: asyncio.Event) -> None:
    stop.set()
    await asyncio.wait_for(task, 20)


@pytest.fixture
async def target_for() -> AsyncIterator[Callable[..., Awaitable[Target]]]:
    running = []

    async def make(**settings: Any) -> Target:
        fields = {"block_size": 4, "num_kv_blocks": 1024, "drain_grace_s": 1, "distribution_transport": "gloo"}
        config = TargetConfig(model=TARGET_MODEL, max_lookahead=4, **(fields | settings))
        endpoint, task, stop = await _start(serve_target, config)
        running.append((task, stop, channel(endpoint)))
        return Target(endpoint, running[-1][2])

    yield make
    for task, stop, connection in running:
        await connection.close()
        await _stop(task, stop)


@pytest.fixture
async def speculator_for() -> AsyncIterator[Callable[..., Awaitable[str]]]:
    running = []

    async def make(**settings: Any) -> str:
        fields = {"num_kv_blocks": 1024, "max_lookahead": 4, "drain_grace_s": 1}
        endpoint, task, stop = await _start(
            serve_speculator, SpeculatorConfig(model=DRAFT_MODEL, **(fields | settings))
        )
        running.append((task, stop))
        return endpoint

    yield make
    for task, stop in running:
        await _stop(task, stop)


@pytest.fixture
async def speculator_process() -> AsyncIterator[Callable[[], Awaitable[tuple[str, Any]]]]:
    """Endpoint and process of a speculator that can be killed and stopped."""
    running = []

    async def make() -> tuple[str, Any]:
        script = str(Path(__file__).with_name("speculator_process.py"))
        process = await asyncio.create_subprocess_exec(
            sys.executable, script, DRAFT_MODEL, stdout=asyncio.subprocess.PIPE
        )
        running.append(process)
        return (await asyncio.wait_for(process.stdout.readline(), 60)).decode().strip(), process

    yield make
    for process in running:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
