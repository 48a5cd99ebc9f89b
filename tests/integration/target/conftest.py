"""A real target server on the toy model, and a scripted speculator on a real gRPC server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import grpc.aio
import pytest

from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_target.config import TargetConfig
from specpool_target.server import serve

from .fake_speculator import LOOKAHEAD, VOCAB, FakeSpeculator, Script


@dataclass
class Generation:
    """A finished stream."""

    started: inference_pb2.GenerationStarted
    tokens: list[int]
    text: str
    finished: inference_pb2.GenerationFinished

    @property
    def stats(self) -> types_pb2.GenerationStats:
        return self.finished.stats


class TargetClient:
    """Calls a target."""

    def __init__(self, endpoint: str, connection: grpc.aio.Channel) -> None:
        self.endpoint = endpoint
        self.stub = target_pb2_grpc.TargetServiceStub(connection)
        self.paired: list[str] = []
        """What was reported, of all streams."""

    def message(
        self,
        prompt: Sequence[int] | str = (1, 2, 3),
        *,
        mode: str = "off",
        verification: str = "coupled",
        speculator: str = "",
        committed: Sequence[int] = (),
        num_text_chars_sent: int = 0,
        **sampling: object,
    ) -> target_pb2.RunSequenceRequest:
        fields = {"temperature": 0.0, "max_tokens": 40, "seed": 11, "ignore_eos": True} | sampling
        request = inference_pb2.GenerateRequest(
            sampling=types_pb2.SamplingParams(**{k: v for k, v in fields.items() if v is not None}),
            mode=f"SPECULATION_MODE_{mode.upper()}",
            verification=f"VERIFICATION_MODE_{verification.upper()}",
            max_lookahead=LOOKAHEAD,
        )
        if isinstance(prompt, str):
            request.text = prompt
        else:
            request.tokens.token_ids.extend(prompt)
        return target_pb2.RunSequenceRequest(
            request=request,
            speculators=[types_pb2.SpeculatorEndpoint(address=speculator)] if speculator else [],
            committed_token_ids=committed,
            num_text_chars_sent=num_text_chars_sent,
        )

    async def run(self, message: target_pb2.RunSequenceRequest, on_delta: Callable[[int], object] | None = None):
        tokens, text, started = [], "", None
        async for response in self.stub.RunSequence(message, timeout=60):
            kind = response.WhichOneof("event")
            if kind == "started":
                assert started is None
                started = response.started
            elif kind == "paired":
                self.paired.append(response.paired.endpoint)
            elif kind == "delta":
                tokens += response.delta.token_ids
                text += response.delta.text
                if on_delta is not None:
                    result = on_delta(len(tokens))
                    if asyncio.iscoroutine(result):
                        await result
            else:
                return Generation(started, tokens, text, response.finished)
        raise AssertionError("the stream ended without `finished`")

    async def generate(self, prompt=(1, 2, 3), *, on_delta=None, **options) -> Generation:
        return await self.run(self.message(prompt, **options), on_delta)

    async def status(self) -> target_pb2.GetTargetStatusResponse:
        return await self.stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())


@pytest.fixture
async def target_for() -> AsyncIterator[Callable[..., TargetClient]]:
    """Starts targets; stops them at the end."""
    running = []

    async def make(model: str = f"toy#vocab={VOCAB},seed=3,sharpness=2", **config: object) -> TargetClient:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        stop = asyncio.Event()
        config = {"block_size": 4, "num_kv_blocks": 256, "speculation_deadline_ms": 100.0, "drain_grace_s": 1} | config
        task = asyncio.create_task(
            serve(TargetConfig(model=model, max_lookahead=LOOKAHEAD, **config), on_ready=ready.set_result, stop=stop)
        )
        await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=60)
        if task.done():
            await task
        connection = channel(ready.result())
        running.append((task, stop, connection))
        return TargetClient(ready.result(), connection)

    yield make
    for task, stop, connection in running:
        await connection.close()
        stop.set()
        await asyncio.wait_for(task, 20)


@pytest.fixture
async def speculator_for() -> AsyncIterator[Callable[..., FakeSpeculator]]:
    """Starts scripted speculators; kills them at the end."""
    running: list[FakeSpeculator] = []

    async def make(port: int = 0, **script: object) -> FakeSpeculator:
        speculator = FakeSpeculator(Script(**script))
        await speculator.start(port)
        running.append(speculator)
        return speculator

    yield make
    for speculator in running:
        await speculator.kill()
