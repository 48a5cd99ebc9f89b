"""How requests become sequences of the engine, whichever call brought them: counted, read, submitted, freed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Final

from opentelemetry import trace
from opentelemetry.trace import Span

from specpool.discovery.discovery import Discovery
from specpool.discovery.messages import from_messages
from specpool.discovery.told import ToldDiscovery
from specpool.errors import Draining, Overloaded, SpecPoolError
from specpool.telemetry import tracing
from specpool.v1 import target_pb2, types_pb2
from specpool_target.engine.engine import TargetEngine
from specpool_target.engine.sequence import SequenceRequest, SpeculationMode
from specpool_target.engine.streams import Emit
from specpool_target.requests.reader_threads import ReaderThreads
from specpool_target.requests.request_reader import RequestReader
from specpool_target.requests.response_stream import ResponseStream

_MAX_SEQUENCES: Final = 20_000
"""Most sequences of all calls together that are read, wait or run: as many as the server takes calls."""


class Intake:
    """Takes requests while the target does not drain, and knows how many there are."""

    def __init__(
        self,
        engine: TargetEngine,
        reader: RequestReader,
        *,
        model: types_pb2.ModelInfo,
        connect_deadline_s: float,
        directory: Discovery,
    ) -> None:
        self.refusals: Counter[str] = Counter()
        """Requests that were not taken, by reason."""
        self.is_draining = False
        self.num_sequences = 0
        """Number of sequences whose call or shared stream is not done with them."""
        self.drained = asyncio.Event()
        """Set once the target drains and has nothing left."""
        self._on_draining: set[Callable[[], None]] = set()
        self._engine = engine
        self._reader = reader
        self._threads = ReaderThreads()
        self._model = model
        self._connect_deadline_s = connect_deadline_s
        self._told = directory if isinstance(directory, ToldDiscovery) else None

    # ---- who may come -----------------------------------------------------------------------------------------

    def start_draining(self) -> None:
        """Take nothing new from now on."""
        self.is_draining = True
        for callback in list(self._on_draining):
            callback()
        self._check_drained()

    @contextmanager
    def telling_of_drain(self, callback: Callable[[], None]) -> Iterator[None]:
        """A context in which ``callback`` is called when the target begins to drain."""
        self._on_draining.add(callback)
        try:
            yield
        finally:
            self._on_draining.discard(callback)

    def hear_of(self, speculators: Sequence[types_pb2.SpeculatorEndpoint]) -> None:
        """Take note of the speculators that a router names."""
        if self._told is not None and speculators:
            self._told.tell(from_messages(speculators))

    @contextmanager
    def counted(self) -> Iterator[None]:
        """A context in which a refusal is counted for status."""
        try:
            yield
        except SpecPoolError as error:
            self.refusals[error.reason] += 1
            raise

    def check_open(self) -> None:
        """Refuse whoever comes while the target drains. Raises Draining."""
        if self.is_draining:
            raise Draining("this target is draining and takes no new sequences")

    # ---- one sequence -----------------------------------------------------------------------------------------

    def open(self, request: target_pb2.RunSequenceRequest) -> None:
        """Count a request in, until `close`. Raises Draining or Overloaded."""
        with self.counted():
            self.check_open()
            if self.num_sequences >= _MAX_SEQUENCES:
                raise Overloaded(
                    f"this target has {_MAX_SEQUENCES} sequences and takes no more; try again",
                    metadata={"max_sequences": _MAX_SEQUENCES, "retriable": "true"},
                )
        self.hear_of(request.speculators)
        self.num_sequences += 1

    async def read(self, request: target_pb2.RunSequenceRequest, span: Span) -> ResponseStream:
        """The stream of a request, checked and tokenized beside the event loop. Raises what is wrong with it."""
        with self.counted():
            self._reader.check_sizes(request)
            stream = await self._threads.run(request.ByteSize(), partial(self._read, request, span))
        _describe(span, stream.request)
        if stream.is_complete is None and stream.request.mode is not SpeculationMode.OFF:
            await self._engine.pool.settled(self._connect_deadline_s)
        return stream

    def submit(self, stream: ResponseStream, emit: Emit) -> None:
        """Have the engine run it; ``emit`` gets its updates on the event loop. Raises at once what can never run."""
        with self.counted():
            self._engine.submit(stream.request, emit, detokenizer=stream.engine_detokenizer)

    def close(self, stream: ResponseStream | None) -> None:
        """Count a request out, and free its sequence, wherever that is: both engines learn of it now."""
        if stream is not None:
            self._engine.cancel(stream.request.id)
        self.num_sequences -= 1
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

    def _check_drained(self) -> None:
        if self.is_draining and self.num_sequences == 0:
            self.drained.set()


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
