"""A forward that does not come back: streams end with a reason, health says so, the process exits to be started anew.

The toy model takes its time per token: what warms up in a second is stuck for minutes with a long prompt.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from contextlib import suppress

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, speculator_pb2, speculator_pb2_grpc, target_pb2, target_pb2_grpc, types_pb2
from specpool_engine.modeling.tokenizer import tokenizer_fingerprint
from specpool_engine.modeling.toy import ToyTokenizer

MODEL = "toy#vocab=24,row_ms=400"
LIMIT_S = 60.0
"""Far less than the forwards would take, far more than finding out that they hang."""
LONG = [1 + index % 20 for index in range(500)]


class Process:
    """A service of its own, as users start it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.endpoint = ""
        self.lines: list[str] = []
        self._reader: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, role: str, *options: str) -> Process:
        command = "from specpool_tools.cli.main import main; main()"
        flags = ["--model", MODEL, "--max-lookahead", "1", "--stall-timeout-s", "2", *options]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", command, role, *flags),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        started = cls(process)
        serves = asyncio.Event()
        started._reader = asyncio.create_task(started._read(serves))
        await asyncio.wait_for(serves.wait(), LIMIT_S)
        assert started.endpoint, "".join(started.lines)
        return started

    async def _read(self, serves: asyncio.Event) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line.decode())
            if found := re.search(r"serves at (\S+)", line.decode()):
                self.endpoint = found.group(1)
                serves.set()
        serves.set()

    async def exit_status(self) -> int:
        return await asyncio.wait_for(self.process.wait(), LIMIT_S)

    async def end(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        if self._reader is not None:
            await self._reader


@pytest.fixture
async def target() -> AsyncIterator[Process]:
    process = await Process.start("target")
    yield process
    await process.end()


@pytest.fixture
async def speculator() -> AsyncIterator[Process]:
    process = await Process.start("speculator", "--max-prefill-tokens", "500", "--drain-grace-s", "3")
    yield process
    await process.end()


async def health_says(endpoint: str, wanted: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> None:
    """Until health says so, or nobody answers any more."""
    async with channel(endpoint) as connection:
        stub = health_pb2_grpc.HealthStub(connection)
        with suppress(grpc.aio.AioRpcError):
            async for response in stub.Watch(health_pb2.HealthCheckRequest(), timeout=LIMIT_S):
                if response.status == wanted:
                    return
        with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)


async def test_a_target_that_hangs_says_so_and_ends(target: Process) -> None:
    request = inference_pb2.GenerateRequest()
    request.tokens.token_ids.extend(LONG)
    async with channel(target.endpoint) as connection:
        stub = target_pb2_grpc.TargetServiceStub(connection)
        call = stub.RunSequence(target_pb2.RunSequenceRequest(request=request), timeout=LIMIT_S)
        health = asyncio.create_task(health_says(target.endpoint, health_pb2.HealthCheckResponse.NOT_SERVING))
        assert (await call.read()).WhichOneof("event") == "started"
        status = await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest(), timeout=LIMIT_S)
        assert status.seconds_in_step >= 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        await health
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "the target engine hangs" in caught.value.details()
    assert await target.exit_status() not in (0, None)
    await target.end()
    output = "".join(target.lines)
    assert "ENGINE_HUNG" in output
    assert "in forward" in output, "where it hangs"


async def test_a_speculator_that_hangs_says_so_and_ends(speculator: Process) -> None:
    async with channel(speculator.endpoint) as connection:
        call = speculator_pb2_grpc.SpeculatorServiceStub(connection).Speculate(timeout=LIMIT_S)
        fingerprint = tokenizer_fingerprint(ToyTokenizer(24))
        model = types_pb2.ModelInfo(name="toy", vocab_size=24, tokenizer_fingerprint=fingerprint)
        hello = speculator_pb2.Hello(protocol_version=1, model=model, transports=[1], max_lookahead=1)
        await call.write(speculator_pb2.SpeculateRequest(hello=hello))
        assert (await call.read()).WhichOneof("message") == "hello_ack"
        opening = speculator_pb2.OpenSequence(
            sequence_id="s",
            tenant_weight=1.0,
            token_ids=LONG,
            num_prompt_tokens=len(LONG),
            sampling=types_pb2.SamplingParams(temperature=0, max_tokens=10, seed=1),
            verification=types_pb2.VERIFICATION_MODE_COUPLED,
            mode=types_pb2.SPECULATION_MODE_SSD,
            max_lookahead=1,
        )
        await call.write(speculator_pb2.SpeculateRequest(open_sequence=opening))
        await health_says(speculator.endpoint, health_pb2.HealthCheckResponse.NOT_SERVING)
        kinds = set()
        while (response := await call.read()) is not grpc.aio.EOF:
            kinds.add(response.WhichOneof("message"))
            if "go_away" in kinds:
                await call.done_writing()
        assert "go_away" in kinds, "its targets move on"
    assert await speculator.exit_status() not in (0, None)
    await speculator.end()
    assert "ENGINE_HUNG" in "".join(speculator.lines)
