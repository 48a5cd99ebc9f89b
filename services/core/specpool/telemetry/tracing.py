"""OpenTelemetry traces: set-up, W3C context propagation, attribute names, rounds as span events.

Without an endpoint nothing is exported and the SDK is not even imported: spans are the API's no-ops, but an incoming
trace context is still handed on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

import specpool

# GenAI semantic conventions, for the span of a request.
GEN_AI_OPERATION_NAME: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER_NAME: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_MAX_TOKENS: Final = "gen_ai.request.max_tokens"
GEN_AI_REQUEST_TEMPERATURE: Final = "gen_ai.request.temperature"
GEN_AI_REQUEST_SEED: Final = "gen_ai.request.seed"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_USAGE_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_USAGE_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_USAGE_CACHED_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
# Ours, on the same spans.
SPECULATION_MODE: Final = "specpool.speculation.mode"
VERIFICATION_MODE: Final = "specpool.verification.mode"
TENANT: Final = "specpool.tenant"
SPECULATOR: Final = "specpool.speculator"
SEQUENCE: Final = "specpool.sequence"

_TRACEPARENT: Final = "traceparent"
_propagator: Final = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Tracing:
    """The tracing of this process, to be ended with it."""

    enabled: bool
    """Whether spans are exported."""
    _shutdown: Callable[[], None]

    def shutdown(self) -> None:
        """Export what is buffered and stop. Blocks for seconds if the collector is gone."""
        self._shutdown()

    async def aclose(self) -> None:
        """`shutdown` without blocking the event loop."""
        await asyncio.to_thread(self._shutdown)


def setup(service_name: str, instance_id: str, otlp_endpoint: str = "", ratio: float = 1.0) -> Tracing:
    """Export spans to ``otlp_endpoint`` (OTLP over gRPC); empty: don't.

    Args:
        service_name: "specpool-target" and the like.
        instance_id: tells pods of one service apart.
        otlp_endpoint: "host:4317" or "http://host:4317" in clear, "https://host:4317" with TLS.
        ratio: share of traces recorded, for traces that begin here; others follow their parent's decision.
    """
    if not otlp_endpoint:
        return Tracing(False, lambda: None)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    resource = Resource.create(
        {
            "service.name": service_name,
            "service.instance.id": instance_id,
            "service.version": specpool.__version__,
        }
    )
    provider = TracerProvider(resource=resource, sampler=ParentBased(TraceIdRatioBased(ratio)))
    exporter = OTLPSpanExporter(endpoint=otlp_endpoint, insecure=not otlp_endpoint.startswith("https://"), timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return Tracing(True, provider.shutdown)


def tracer() -> Tracer:
    """The tracer of all of SpecPool's spans."""
    return trace.get_tracer("specpool", specpool.__version__)


def inject(context: Context | None = None) -> dict[str, str]:
    """W3C headers of ``context`` (default: the current one); empty outside of a trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, context)
    return carrier


def extract(headers: Iterable[tuple[str, str | bytes]] | Mapping[str, str]) -> Context:
    """The trace context in W3C ``headers`` or gRPC metadata."""
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    carrier = {key: value for key, value in pairs if isinstance(value, str)}
    return _propagator.extract(carrier)


def traceparent(context: Context | None = None) -> str:
    """One-line form of the trace context, for messages of a multiplexed stream; empty outside of a trace."""
    return inject(context).get(_TRACEPARENT, "")


def context_of(traceparent: str) -> Context:
    """The trace context of a `traceparent` header; empty for none or nonsense."""
    return extract({_TRACEPARENT: traceparent} if traceparent else {})


class RoundEvents:
    """Adds a request's rounds to its span as events: the first ``limit`` of them, and a count of all."""

    def __init__(self, span: Span, *, limit: int = 64) -> None:
        self._span = span
        self._limit = limit if span.is_recording() else 0
        self._num_rounds = 0

    def add(
        self,
        *,
        num_draft_tokens: int,
        num_accepted: int,
        outcome: str,
        duration_s: float,
        phases_s: Mapping[str, float] | None = None,
    ) -> None:
        """One more round ended.

        Args:
            num_draft_tokens: tokens verified.
            num_accepted: of these.
            outcome: that of the lookup: hit, partial, late, miss or none.
            duration_s: from the end of the round before.
            phases_s: parts of the duration by name, such as `waiting` for a speculator.
        """
        if self._num_rounds < self._limit:
            phases = {f"specpool.round.{name}_ms": round(s * 1000, 3) for name, s in (phases_s or {}).items()}
            self._span.add_event(
                "specpool.round",
                {
                    "specpool.round.index": self._num_rounds,
                    "specpool.round.num_draft_tokens": num_draft_tokens,
                    "specpool.round.num_accepted": num_accepted,
                    "specpool.round.lookup": outcome,
                    "specpool.round.duration_ms": round(duration_s * 1000, 3),
                    **phases,
                },
            )
        self._num_rounds += 1

    def finish(self) -> None:
        """Write the count. Call before the span ends."""
        self._span.set_attribute("specpool.num_rounds", self._num_rounds)
        self._span.set_attribute("specpool.num_rounds_without_event", max(0, self._num_rounds - self._limit))
