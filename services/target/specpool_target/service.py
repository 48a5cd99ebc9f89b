"""gRPC service of the target."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from opentelemetry.trace import SpanKind

from specpool.discovery.discovery import Discovery
from specpool.errors import Draining, EngineFailed
from specpool.rpc.checks import check_grace
from specpool.telemetry import tracing
from specpool.v1 import target_pb2, target_pb2_grpc, types_pb2
from specpool_target.engine.engine import TargetEngine
from specpool_target.engine.sequence import SequenceUpdate
from specpool_target.link_status import link_statuses
from specpool_target.requests.intake import Intake
from specpool_target.requests.request_reader import RequestReader
from specpool_target.requests.response_stream import Response, ResponseStream
from specpool_target.requests.shared_stream import Message, SharedStream

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class TargetService(target_pb2_grpc.TargetServiceServicer):
    """The servicer of `TargetService`: checks requests, hands them to the engine, and streams what comes back."""

    def __init__(
        self,
        engine: TargetEngine,
        reader: RequestReader,
        *,
        peer: Callable[[], types_pb2.Peer],
        model: types_pb2.ModelInfo,
        connect_deadline_s: float,
        directory: Discovery,
    ) -> None:
        self._engine = engine
        self._reader = reader
        self._peer = peer
        self._model = model
        self._intake = Intake(engine, reader, model=model, connect_deadline_s=connect_deadline_s, directory=directory)
        self._span_name = f"run_sequence {model.name}"
        self._grace_task: asyncio.Task[None] | None = None

    async def RunSequence(
        self, request: target_pb2.RunSequenceRequest, context: Context
    ) -> AsyncGenerator[Response, None]:
        self._intake.open(request)
        stream: ResponseStream | None = None
        span = tracing.tracer().start_span(self._span_name, kind=SpanKind.INTERNAL)
        try:
            stream = await self._intake.read(request, span)
            async with aclosing(self._run(stream, request.request.request_id or stream.request.id)) as responses:
                async for response in responses:
                    yield response
        finally:
            span.end()
            self._intake.close(stream)  # also after a cancellation

    async def _run(self, stream: ResponseStream, request_id: str) -> AsyncGenerator[Response, None]:
        if stream.is_complete is not None:
            for response in stream.whole(request_id, stream.is_complete):
                yield response
            return
        updates: asyncio.Queue[SequenceUpdate] = asyncio.Queue()
        self._intake.submit(stream, updates.put_nowait)
        yield stream.started(request_id)
        is_last = False
        while not is_last:
            update = await updates.get()
            is_last = update.is_last
            for response in stream.responses(update):
                yield response

    async def RunSequences(
        self, request_iterator: AsyncIterator[target_pb2.RunSequencesRequest], context: Context
    ) -> AsyncGenerator[Message, None]:
        self._intake.check_open()
        async with aclosing(SharedStream(self._intake, self._span_name).run(request_iterator)) as messages:
            async for message in messages:
                yield message

    async def GetTargetStatus(
        self, request: target_pb2.GetTargetStatusRequest, context: Context
    ) -> target_pb2.GetTargetStatusResponse:
        if self._engine.failure is not None:
            raise EngineFailed(self._engine.failure.message)
        self._intake.hear_of(request.speculators)
        draining = self._intake.is_draining
        return target_pb2.GetTargetStatusResponse(
            target=self._peer(),
            state=types_pb2.SERVING_STATE_DRAINING if draining else types_pb2.SERVING_STATE_SERVING,
            model=self._model,
            load=self._engine.load(),
            speculators=link_statuses(self._engine.pool),
            max_lookahead=self._reader.max_lookahead,
            plan=self._engine.lookahead.explain(),
            num_steps=self._engine.thread.heartbeat.num_steps,
            seconds_in_step=self._engine.thread.heartbeat.age_s,
            refusals=[
                target_pb2.RequestRefusalCount(reason=reason, num_requests=count)
                for reason, count in sorted(self._intake.refusals.items())
            ],
        )

    async def DrainTarget(
        self, request: target_pb2.DrainTargetRequest, context: Context
    ) -> target_pb2.DrainTargetResponse:
        check_grace(request.grace_seconds)
        self._intake.start_draining()
        if self._grace_task is None:
            self._grace_task = asyncio.create_task(self._end_after(request.grace_seconds))
        return target_pb2.DrainTargetResponse(num_sequences_running=self._intake.num_sequences)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, and return when nothing runs. What still does after ``grace_s`` is ended by the server."""
        self._intake.start_draining()
        await self._intake.drained.wait()

    async def _end_after(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        self._engine.fail_all(Draining(f"this target drained for {grace_s:g} s; continue elsewhere"))
