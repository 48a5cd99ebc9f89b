"""Context propagation and round events."""

from __future__ import annotations

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specpool.telemetry.tracing import RoundEvents, context_of, setup, traceparent


def test_no_endpoint_exports_nothing() -> None:
    tracing = setup("specpool-test", "0")
    assert not tracing.enabled
    tracing.shutdown()


def test_traceparent_round_trip() -> None:
    header = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert traceparent(context_of(header)) == header
    assert traceparent(context_of("")) == ""
    assert traceparent(context_of("nonsense")) == ""


def test_round_events_are_capped_and_counted() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with provider.get_tracer("test").start_as_current_span("request") as span:
        events = RoundEvents(span, limit=3)
        for _ in range(5):
            events.add(num_draft_tokens=4, num_accepted=2, outcome="hit", duration_s=0.01, phases_s={"waiting": 0.002})
        events.finish()
    (finished,) = exporter.get_finished_spans()
    assert len(finished.events) == 3
    assert finished.events[2].attributes is not None
    assert finished.events[2].attributes["specpool.round.index"] == 2
    assert finished.events[2].attributes["specpool.round.waiting_ms"] == 2.0
    assert finished.attributes is not None
    assert finished.attributes["specpool.num_rounds"] == 5
    assert finished.attributes["specpool.num_rounds_without_event"] == 2


class UnrecordedSpan(trace.NonRecordingSpan):
    """Counts the events it is given in vain."""

    num_events = 0

    def add_event(self, *args: object, **kwargs: object) -> None:
        self.num_events += 1


def test_events_of_an_unrecorded_span_cost_nothing() -> None:
    span = UnrecordedSpan(trace.INVALID_SPAN_CONTEXT)
    events = RoundEvents(span)
    events.add(num_draft_tokens=1, num_accepted=1, outcome="hit", duration_s=0.01)
    events.finish()
    assert span.num_events == 0
