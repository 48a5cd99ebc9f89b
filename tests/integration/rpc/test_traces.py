"""Traces over real gRPC: one across services, and spans that last as long as their streams."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from specpool.telemetry.tracing import tracer
from specpool.v1 import target_pb2, target_pb2_grpc

from .conftest import Served


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Receives every span of this process."""
    exporter = InMemorySpanExporter()
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


async def test_one_trace_across_services(
    served: Served, connection: grpc.aio.Channel, exporter: InMemorySpanExporter
) -> None:
    exporter.clear()
    served.target.relay_to = served.endpoint
    stub = target_pb2_grpc.TargetServiceStub(connection)
    with tracer().start_as_current_span("request"), pytest.raises(grpc.aio.AioRpcError):
        await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    spans = await _spans(exporter, 5)
    root = next(span for span in spans if span.name == "request")
    assert {span.context.trace_id for span in spans} == {root.context.trace_id}
    calls = {(span.name.rpartition("/")[2], span.kind): span for span in spans if span is not root}
    chain = [root]
    for method in ("GetTargetStatus", "GetSpeculatorStatus"):
        for kind in (SpanKind.CLIENT, SpanKind.SERVER):
            span = calls[method, kind]
            assert span.parent.span_id == chain[-1].context.span_id
            assert span.attributes["rpc.system.name"] == "grpc"
            assert span.attributes["rpc.response.status_code"] == "RESOURCE_EXHAUSTED"
            chain.append(span)


async def test_span_of_a_stream_ends_with_the_stream(
    connection: grpc.aio.Channel, exporter: InMemorySpanExporter
) -> None:
    exporter.clear()
    call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest())
    await call.read()
    assert not exporter.get_finished_spans()
    call.cancel()
    spans = await _spans(exporter, 2)
    assert {span.attributes["rpc.response.status_code"] for span in spans} == {"CANCELLED"}
    assert len({span.context.trace_id for span in spans}) == 1


async def _spans(exporter: InMemorySpanExporter, count: int) -> Any:
    for _ in range(100):
        if len(exporter.get_finished_spans()) >= count:
            break
        await asyncio.sleep(0.02)
    spans = exporter.get_finished_spans()
    assert len(spans) == count
    return spans
