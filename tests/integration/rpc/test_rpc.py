"""Errors, cancellation, health, reflection, traces and graceful stop over real gRPC."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from specpool import errors
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.rpc.server import Health, add_standard_services, bind, create_server, run_until_stopped
from specpool.telemetry.tracing import tracer
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, target_pb2, target_pb2_grpc


def _raise(what: str) -> None:
    match what:
        case "field":
            raise errors.InvalidArgument(
                "temperature must be >= 0, got -1",
                reason="BAD_TEMPERATURE",
                metadata={"field": "temperature", "value": -1},
            )
        case "quota":
            raise errors.QuotaExceeded("too much", metadata={"tenant": "a"})
        case "defect":
            raise KeyError("secret")


class _Target(target_pb2_grpc.TargetServiceServicer):
    """Fails as the tenant says."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self.relay_to = ""

    async def RunSequence(
        self, request: target_pb2.RunSequenceRequest, context: Any
    ) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        try:
            yield target_pb2.RunSequenceResponse()
            _raise(request.tenant)
            await asyncio.sleep(60)
        finally:
            self.closed.set()

    async def GetTargetStatus(self, request: object, context: Any) -> target_pb2.GetTargetStatusResponse:
        if self.relay_to:
            async with channel(self.relay_to) as other:
                stub = speculator_pb2_grpc.SpeculatorServiceStub(other)
                await stub.GetSpeculatorStatus(speculator_pb2.GetSpeculatorStatusRequest())
        _raise("defect")
        return target_pb2.GetTargetStatusResponse()


class _Speculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    async def Speculate(
        self, requests: AsyncIterator[speculator_pb2.SpeculateRequest], context: Any
    ) -> AsyncIterator[speculator_pb2.SpeculateResponse]:
        async for _ in requests:
            yield speculator_pb2.SpeculateResponse()
            raise errors.TokenizerMismatch("not the same", metadata={"target": "a", "speculator": "b"})

    async def GetSpeculatorStatus(self, request: object, context: Any) -> speculator_pb2.GetSpeculatorStatusResponse:
        raise errors.KVCacheFull("no block left")


class _Served:
    """Both services on one server."""

    def __init__(self) -> None:
        self.target = _Target()
        self.server = create_server()
        target_pb2_grpc.add_TargetServiceServicer_to_server(self.target, self.server)
        speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(_Speculator(), self.server)
        files = (target_pb2.DESCRIPTOR, speculator_pb2.DESCRIPTOR)
        self.health: Health = add_standard_services(self.server, *files)
        self.endpoint = bind(self.server, "127.0.0.1:0")


@pytest.fixture
async def served() -> AsyncIterator[_Served]:
    """A started server."""
    served = _Served()
    await served.server.start()
    yield served
    await served.server.stop(0)


@pytest.fixture
async def connection(served: _Served) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to it."""
    async with channel(served.endpoint) as connection:
        yield connection


async def test_stream_error_has_rich_details(connection: grpc.aio.Channel) -> None:
    call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest(tenant="field"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [event async for event in call]
    status = await rpc_status.aio.from_call(call)
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(bad_request)
    assert (info.reason, info.domain, info.metadata["value"]) == ("BAD_TEMPERATURE", "specpool", "-1")
    assert bad_request.field_violations[0].field == "temperature"
    error = from_rpc_error(caught.value)
    assert type(error) is errors.InvalidArgument
    assert (error.reason, str(error)) == ("BAD_TEMPERATURE", "temperature must be >= 0, got -1")


async def test_stream_delivers_what_came_before_the_error(connection: grpc.aio.Channel) -> None:
    call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest(tenant="quota"))
    assert isinstance(await call.read(), target_pb2.RunSequenceResponse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert type(from_rpc_error(caught.value)) is errors.QuotaExceeded


async def test_bidirectional_stream_error(connection: grpc.aio.Channel) -> None:
    call = speculator_pb2_grpc.SpeculatorServiceStub(connection).Speculate()
    await call.write(speculator_pb2.SpeculateRequest())
    assert isinstance(await call.read(), speculator_pb2.SpeculateResponse)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    error = from_rpc_error(caught.value)
    assert type(error) is errors.TokenizerMismatch
    assert error.metadata == {"target": "a", "speculator": "b"}
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_defect_is_logged_and_not_leaked(connection: grpc.aio.Channel, caplog: pytest.LogCaptureFixture) -> None:
    stub = target_pb2_grpc.TargetServiceStub(connection)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    error = from_rpc_error(caught.value)
    assert "secret" not in str(caught.value)
    assert error.metadata["error_id"] in caplog.text
    assert "KeyError: 'secret'" in caplog.text


async def test_error_of_another_service_is_passed_on(served: _Served, connection: grpc.aio.Channel) -> None:
    served.target.relay_to = served.endpoint
    stub = target_pb2_grpc.TargetServiceStub(connection)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    assert type(from_rpc_error(caught.value)) is errors.KVCacheFull


async def test_cancelling_closes_the_handler_at_once(served: _Served, connection: grpc.aio.Channel) -> None:
    call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest())
    await call.read()
    call.cancel()
    await asyncio.wait_for(served.target.closed.wait(), 2)


async def test_unreachable_peer() -> None:
    async with channel("127.0.0.1:1") as connection:
        stub = target_pb2_grpc.TargetServiceStub(connection)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    assert type(from_rpc_error(caught.value)) is errors.TargetUnavailable


def test_port_in_use() -> None:
    async def bind_twice() -> None:
        first, second = create_server(), create_server()
        endpoint = bind(first, "127.0.0.1:0")
        with pytest.raises(errors.ConfigError, match="cannot listen on 127"):
            bind(second, endpoint)
        await first.stop(0)
        await second.stop(0)

    asyncio.run(bind_twice())


async def test_health_follows_the_server(served: _Served, connection: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(connection)

    async def state(service: str) -> int:
        response = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(response.status)

    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert await state("") == await state("specpool.v1.TargetService") == not_serving
    await served.health.set_serving()
    assert await state("") == await state("specpool.v1.SpeculatorService") == serving
    await served.health.stop_serving()
    await served.health.set_serving()
    assert await state("") == not_serving


async def test_reflection_lists_and_describes_services(connection: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(connection)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="specpool.v1.TargetService"),
    ]
    listed, described = [answer async for answer in stub.ServerReflectionInfo(iter(requests))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"specpool.v1.TargetService", "specpool.v1.SpeculatorService", "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


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
    served: _Served, connection: grpc.aio.Channel, exporter: InMemorySpanExporter
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


async def test_sigterm_drains_then_stops(served: _Served, connection: grpc.aio.Channel) -> None:
    await served.health.set_serving()
    watch = health_pb2_grpc.HealthStub(connection).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    seen: list[tuple[int, float]] = []

    async def drain(grace_s: float) -> None:
        seen.append(((await watch.read()).status, grace_s))

    running = asyncio.create_task(run_until_stopped(served.server, drain, health=served.health, grace_s=5))
    await asyncio.sleep(0.05)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.wait_for(running, 10)
    ((status, left_s),) = seen
    assert status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert 0 < left_s < 5


async def test_second_signal_ends_the_wait(served: _Served, connection: grpc.aio.Channel) -> None:
    call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest())
    await call.read()
    stop = asyncio.Event()
    running = asyncio.create_task(run_until_stopped(served.server, grace_s=60, stop=stop))
    stop.set()
    await asyncio.sleep(0.1)
    assert not running.done()
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.wait_for(running, 3)
    assert served.target.closed.is_set()
