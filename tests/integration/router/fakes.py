"""A fake target and speculator over real gRPC: the completion is a known function of seed and position."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc

from specpool.errors import SpecPoolError, TargetUnavailable
from specpool.rpc.errors import to_status
from specpool.rpc.server import Health, add_standard_services, bind, create_server
from specpool.v1 import (
    inference_pb2,
    speculator_pb2,
    speculator_pb2_grpc,
    target_pb2,
    target_pb2_grpc,
    types_pb2,
)

NUM_TOKENS = 40
TEXT_LAG = 3


def tokens_of(seed: int, num_tokens: int = NUM_TOKENS) -> list[int]:
    return [(seed * 31 + position * 7) % 90 + 33 for position in range(num_tokens)]


def text_of(seed: int, num_tokens: int = NUM_TOKENS) -> str:
    """One non-BMP character and one letter a token: characters are neither bytes nor UTF-16 units."""
    return "".join("\N{GRINNING FACE}" + chr(token) for token in tokens_of(seed, num_tokens))


async def multiplexed(run: Any, requests: Any, context: Any) -> AsyncIterator[target_pb2.RunSequencesResponse]:
    """A shared stream on top of single ones: a message per event. What ends one of them by `abort` ends all of it."""
    outgoing: asyncio.Queue[Any] = asyncio.Queue()

    class EndsAll:
        async def abort(self, code: grpc.StatusCode) -> None:
            outgoing.put_nowait(code)
            raise grpc.aio.AbortError

    tasks: dict[int, asyncio.Task[None]] = {}
    goes: dict[int, asyncio.Event] = {}

    async def one(start: target_pb2.StartSequence) -> None:
        try:
            async for event in run(start.request, EndsAll()):
                await goes[start.id].wait()
                outgoing.put_nowait(target_pb2.SequenceEvent(id=start.id, event=event))
        except SpecPoolError as error:
            outgoing.put_nowait(target_pb2.SequenceEvent(id=start.id, error=to_status(error).SerializeToString()))
        except grpc.aio.AbortError:
            pass

    async def listen() -> None:
        async for request in requests:
            command = request.WhichOneof("command")
            if command == "start":
                goes[request.start.id] = asyncio.Event()
                goes[request.start.id].set()
                tasks[request.start.id] = asyncio.create_task(one(request.start))
            elif command == "cancel":
                tasks[request.cancel].cancel()
            elif command == "hold":
                goes[request.hold].clear()
            else:
                goes[request.go_on].set()

    listening = asyncio.create_task(listen())
    try:
        while not isinstance(event := await outgoing.get(), grpc.StatusCode):
            yield target_pb2.RunSequencesResponse(events=[event])
        await context.abort(event)
    finally:
        for task in (listening, *tasks.values()):
            task.cancel()


class FakeTarget(target_pb2_grpc.TargetServiceServicer):
    """Emits `num_per_delta` tokens at a time, text `TEXT_LAG` characters behind, as one with stop strings does."""

    def __init__(self, *, model: str = "m", delay_s: float = 0.01, num_per_delta: int = 1) -> None:
        self.model = model
        self.delay_s = delay_s
        self.num_per_delta = num_per_delta
        self.state: Any = types_pb2.SERVING_STATE_SERVING
        self.error: SpecPoolError | None = None
        self.requests: list[target_pb2.RunSequenceRequest] = []
        self.num_running = 0
        self.num_reported = 0
        self.told: list[list[types_pb2.SpeculatorEndpoint]] = []
        self.pairs_with: str | None = None
        self.endpoint = ""
        self.server: Any = None
        self.fail_at: int | None = None
        self.hang_at: int | None = None
        self.num_hanging = 0
        self.cancel_at: int | None = None
        self.error_at: tuple[int, SpecPoolError] | None = None
        self.capacity: int | None = None
        self.status_delay_s = 0.0
        self.num_steps = 0
        self.seconds_in_step = 0.0
        self.has_shared_streams = True
        self.num_shared_streams = 0
        self._stopping: asyncio.Task[None] | None = None

    async def RunSequences(self, request_iterator: Any, context: Any) -> AsyncIterator[target_pb2.RunSequencesResponse]:
        if not self.has_shared_streams:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
        self.num_shared_streams += 1
        async with aclosing(multiplexed(self.RunSequence, request_iterator, context)) as messages:
            async for message in messages:
                yield message

    async def RunSequence(self, request: Any, context: Any) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        self.requests.append(request)
        if self.error is not None:
            raise self.error
        if self.capacity is not None and self.num_running >= self.capacity:
            raise TargetUnavailable("as many sequences are waiting as may", reason="TARGET_OVERLOADED")
        self.num_running += 1
        try:
            async for event in self._run(request, context):
                yield event
        finally:
            self.num_running -= 1

    async def _run(self, request: Any, context: Any) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        sampling = request.request.sampling
        num_tokens = sampling.max_tokens or NUM_TOKENS
        tokens, text = tokens_of(sampling.seed, num_tokens), text_of(sampling.seed, num_tokens)
        started = inference_pb2.GenerationStarted(
            request_id=request.request.request_id, model=self.model, seed=sampling.seed, num_prompt_tokens=5
        )
        num_done, num_chars = len(request.committed_token_ids), request.num_text_chars_sent
        assert list(request.committed_token_ids) == tokens[:num_done]
        if num_done:
            started.num_committed_text_chars = max(0, 2 * num_done - TEXT_LAG)
        yield target_pb2.RunSequenceResponse(started=started)
        if self.pairs_with is not None:
            yield target_pb2.RunSequenceResponse(paired=target_pb2.Paired(endpoint=self.pairs_with))
        for position in range(num_done, num_tokens, self.num_per_delta):
            if self.fail_at is not None and position >= self.fail_at:
                self.fail_at = None
                self._stopping = asyncio.create_task(self.server.stop(None))  # it cancels this very call
                await asyncio.sleep(60)
            if self.hang_at is not None and position >= self.hang_at:
                self.num_hanging += 1
                await asyncio.sleep(600)
            if self.error_at is not None and position >= self.error_at[0]:
                raise self.error_at[1]
            if self.cancel_at is not None and position >= self.cancel_at:
                self.cancel_at = None
                await context.abort(grpc.StatusCode.CANCELLED)
            await asyncio.sleep(self.delay_s)
            committed = tokens[position : position + self.num_per_delta]
            end = max(num_chars, 2 * (position + len(committed)) - TEXT_LAG)
            delta = inference_pb2.GenerationDelta(token_ids=committed, text=text[num_chars:end])
            num_chars = end
            yield target_pb2.RunSequenceResponse(delta=delta)
        yield target_pb2.RunSequenceResponse(delta=inference_pb2.GenerationDelta(text=text[num_chars:]))
        usage = types_pb2.Usage(num_prompt_tokens=5, num_completion_tokens=num_tokens - num_done)
        yield target_pb2.RunSequenceResponse(
            finished=inference_pb2.GenerationFinished(finish_reason=types_pb2.FINISH_REASON_LENGTH, usage=usage)
        )

    async def stopped(self) -> None:
        """Wait for a stop that `fail_at` began."""
        if self._stopping is not None:
            await self._stopping

    async def GetTargetStatus(self, request: Any, context: Any) -> target_pb2.GetTargetStatusResponse:
        self.told.append(list(request.speculators))
        await asyncio.sleep(self.status_delay_s)
        return target_pb2.GetTargetStatusResponse(
            state=self.state,
            model=types_pb2.ModelInfo(name=self.model, tokenizer_fingerprint="f"),
            load=types_pb2.Load(num_sequences_running=self.num_reported),
            num_steps=self.num_steps,
            seconds_in_step=self.seconds_in_step,
        )


class FakeSpeculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    def __init__(self, fingerprint: str = "f") -> None:
        self.fingerprint = fingerprint

    async def Speculate(self, request_iterator: Any, context: Any) -> AsyncIterator[Any]:
        for response in ():
            yield response

    async def GetSpeculatorStatus(self, request: Any, context: Any) -> speculator_pb2.GetSpeculatorStatusResponse:
        return speculator_pb2.GetSpeculatorStatusResponse(
            state=types_pb2.SERVING_STATE_SERVING,
            model=types_pb2.ModelInfo(name="d", tokenizer_fingerprint=self.fingerprint),
        )


async def start(service: FakeTarget | FakeSpeculator, listen: str = "127.0.0.1:0") -> tuple[Any, str, Health]:
    server = create_server()
    if isinstance(service, FakeTarget):
        target_pb2_grpc.add_TargetServiceServicer_to_server(service, server)
        health = add_standard_services(server, target_pb2.DESCRIPTOR)
    else:
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(service, server)
        health = add_standard_services(server, speculator_pb2.DESCRIPTOR)
    endpoint = bind(server, listen)
    await server.start()
    await health.set_serving()
    if isinstance(service, FakeTarget):
        service.server, service.endpoint = server, endpoint
    return server, endpoint, health


@asynccontextmanager
async def running(*services: FakeTarget | FakeSpeculator) -> AsyncIterator[list[str]]:
    started = [await start(service) for service in services]
    try:
        yield [endpoint for _, endpoint, _ in started]
    finally:
        for service, (server, _, _) in zip(services, started, strict=True):
            if isinstance(service, FakeTarget):
                await service.stopped()
            await server.stop(None)
