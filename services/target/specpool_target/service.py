"""gRPC service of the target."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Any, TypeAlias

import grpc.aio
from opentelemetry import trace
from opentelemetry.trace import Span, SpanKind

from specpool.discovery.discovery import Discovery
from specpool.discovery.messages import from_messages
from specpool.discovery.told import ToldDiscovery
from specpool.errors import Draining, EngineFailed, SpecPoolError
from specpool.rpc.checks import check_grace
from specpool.telemetry import tracing
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc, types_pb2
from specpool_target.engine.engine import TargetEngine
from specpool_target.engine.sequence import Finish, FinishReason, SequenceRequest, SpeculationMode
from specpool_target.link_status import link_statuses
from specpool_target.requests.reader_threads import ReaderThreads
from specpool_target.requests.request_reader import RequestReader
from specpool_target.requests.response_stream import Response, ResponseStream

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
        self._threads = ReaderThreads()
        self._peer = peer
        self._model = model
        self._connect_deadline_s = connect_deadline_s
        self._told = directory if isinstance(directory, ToldDiscovery) else None
        self._refusals: Counter[str] = Counter()
        """Requests that were not taken, by reason."""
        self._is_draining = False
        self._num_streams = 0
        self._drained = asyncio.Event()
        self._grace_task: asyncio.Task[None] | None = None

    async def RunSequence(
        self, request: target_pb2.RunSequenceRequest, context: Context
    ) -> AsyncGenerator[Response, None]:
        with self._counted():
            if self._is_draining:
                raise Draining("this target is draining and takes no new sequences")
        self._hear_of(request.speculators)
        span = tracing.tracer().start_span(f"run_sequence {self._model.name}", kind=SpanKind.INTERNAL)
        self._num_streams += 1
        try:
            with self._counted():
                self._reader.check_sizes(request)
                stream = await self._threads.run(request.ByteSize(), partial(self._read, request, span))
            _describe(span, stream.request)
            async with aclosing(self._run(request, stream)) as responses:
                async for response in responses:
                    yield response
        finally:
            span.end()
            self._num_streams -= 1
            self._check_drained()

    def _read(self, request: target_pb2.RunSequenceRequest, span: Span) -> ResponseStream:
        traceparent = tracing.traceparent(trace.set_span_in_context(span))
        return ResponseStream(
            self._reader.read(request, traceparent=traceparent),
            self._reader.codec,
            span,
            num_text_chars_sent=request.num_text_chars_sent,
            model_name=self._model.name,
            max_length=self._engine.scheduler.max_length,
        )

    async def _run(
        self, request: target_pb2.RunSequenceRequest, stream: ResponseStream
    ) -> AsyncGenerator[Response, None]:
        sequence = stream.request
        request_id = request.request.request_id or sequence.id
        if stream.is_complete is not None:
            yield stream.started(request_id)
            if stream.pending_text:
                yield Response(delta=inference_pb2.GenerationDelta(text=stream.pending_text))
            yield stream.finished(_nothing_left(stream.is_complete))
            return
        if sequence.mode is not SpeculationMode.OFF:
            await self._engine.pool.settled(self._connect_deadline_s)
        try:
            with self._counted():
                self._engine.submit(sequence, stream.updates.put_nowait, detokenizer=stream.engine_detokenizer)
            yield stream.started(request_id)
            async with aclosing(stream.responses()) as responses:
                async for response in responses:
                    yield response
        finally:
            # Also after a cancellation: both engines learn of it now.
            self._engine.cancel(sequence.id)

    async def GetTargetStatus(
        self, request: target_pb2.GetTargetStatusRequest, context: Context
    ) -> target_pb2.GetTargetStatusResponse:
        if self._engine.failure is not None:
            raise EngineFailed(self._engine.failure.message)
        self._hear_of(request.speculators)
        draining = self._is_draining
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
                for reason, count in sorted(self._refusals.items())
            ],
        )

    def _hear_of(self, speculators: Sequence[types_pb2.SpeculatorEndpoint]) -> None:
        if self._told is not None and speculators:
            self._told.tell(from_messages(speculators))

    async def DrainTarget(
        self, request: target_pb2.DrainTargetRequest, context: Context
    ) -> target_pb2.DrainTargetResponse:
        check_grace(request.grace_seconds)
        self._start_draining()
        if self._grace_task is None:
            self._grace_task = asyncio.create_task(self._end_after(request.grace_seconds))
        return target_pb2.DrainTargetResponse(num_sequences_running=self._num_streams)

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, and return when nothing runs. What still does after ``grace_s`` is ended by the server."""
        self._start_draining()
        await self._drained.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """A context in which a refusal is counted for status."""
        try:
            yield
        except SpecPoolError as error:
            self._refusals[error.reason] += 1
            raise

    def _start_draining(self) -> None:
        self._is_draining = True
        self._check_drained()

    def _check_drained(self) -> None:
        if self._is_draining and self._num_streams == 0:
            self._drained.set()

    async def _end_after(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        self._engine.fail_all(Draining(f"this target drained for {grace_s:g} s; continue elsewhere"))


def _nothing_left(reason: FinishReason) -> Finish:
    return Finish(reason=reason, stats=types_pb2.GenerationStats(), num_cached_prompt_tokens=0)


def _describe(span: Span, sequence: SequenceRequest) -> None:
    if span.is_recording():
        span.set_attributes(
            {
                tracing.GEN_AI_OPERATION_NAME: "text_completion",
                tracing.GEN_AI_REQUEST_MAX_TOKENS: sequence.sampling.max_tokens,
                tracing.GEN_AI_REQUEST_TEMPERATURE: sequence.sampling.temperature,
                tracing.GEN_AI_USAGE_INPUT_TOKENS: len(sequence.prompt_tokens),
                tracing.SPECULATION_MODE: sequence.mode.value,
                tracing.VERIFICATION_MODE: sequence.verification.value,
                tracing.TENANT: sequence.tenant,
                tracing.SEQUENCE: sequence.id,
            }
        )
