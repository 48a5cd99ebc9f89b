"""Errors, cancellation, health, reflection and graceful stop over real gRPC."""

from __future__ import annotations

import asyncio
import os
import signal

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from specpool import errors
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.rpc.server import bind, create_server, run_until_stopped
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, target_pb2, target_pb2_grpc

from .conftest import Served


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


async def test_error_of_another_service_is_passed_on(served: Served, connection: grpc.aio.Channel) -> None:
    served.target.relay_to = served.endpoint
    stub = target_pb2_grpc.TargetServiceStub(connection)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    assert type(from_rpc_error(caught.value)) is errors.KVCacheFull


async def test_cancelling_closes_the_handler_at_once(served: Served, connection: grpc.aio.Channel) -> None:
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


async def test_health_follows_the_server(served: Served, connection: grpc.aio.Channel) -> None:
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


async def test_sigterm_drains_then_stops(served: Served, connection: grpc.aio.Channel) -> None:
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


async def test_second_signal_ends_the_wait(served: Served, connection: grpc.aio.Channel) -> None:
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
