"""Stopping: clients go elsewhere first, every call ends with a reason, and the end always comes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool import errors
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.rpc.server import Server, add_standard_services, bind, create_server, run_until_stopped
from specpool.v1 import inference_pb2, target_pb2, target_pb2_grpc


class _Target(target_pb2_grpc.TargetServiceServicer):
    """Streams one message and then does as `behave` does; status is answered after a moment."""

    def __init__(self, behave: Callable[[], Any] = lambda: asyncio.sleep(600)) -> None:
        self.behave = behave
        self.num_running = 0

    async def RunSequence(self, request: Any, context: Any) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        self.num_running += 1
        try:
            yield target_pb2.RunSequenceResponse()
            await self.behave()
            yield target_pb2.RunSequenceResponse()
        finally:
            self.num_running -= 1

    async def GetTargetStatus(self, request: Any, context: Any) -> target_pb2.GetTargetStatusResponse:
        await asyncio.sleep(0.01)
        return target_pb2.GetTargetStatusResponse()


async def _start(service: _Target, listen: str = "127.0.0.1:0") -> tuple[Server, str, Any]:
    server = create_server()
    target_pb2_grpc.add_TargetServiceServicer_to_server(service, server)
    health = add_standard_services(server, target_pb2.DESCRIPTOR)
    endpoint = bind(server, listen)
    await server.start()
    await health.set_serving()
    return server, endpoint, health


@asynccontextmanager
async def _running(service: _Target) -> AsyncIterator[tuple[Server, Any, grpc.aio.Channel]]:
    server, endpoint, _ = await _start(service)
    async with channel(endpoint) as connection:
        yield server, target_pb2_grpc.TargetServiceStub(connection), connection
    await server.stop(None)


async def _error_of(call: Any) -> errors.SpecPoolError:
    async with asyncio.timeout(20):
        try:
            while await call.read() is not grpc.aio.EOF:
                pass
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error)
    raise AssertionError("the call ended well")


async def test_a_stream_longer_than_the_grace_ends_with_draining() -> None:
    service = _Target()
    async with _running(service) as (server, stub, _):
        call = stub.RunSequence(target_pb2.RunSequenceRequest())
        await call.read()
        stopping = asyncio.create_task(server.stop(0.2))
        error = await _error_of(call)
        assert type(error) is errors.Draining
        assert error.metadata["retriable"] == "true"
        await asyncio.wait_for(stopping, 10)
        assert service.num_running == 0


async def test_running_calls_go_on_while_new_ones_are_sent_elsewhere() -> None:
    go_on = asyncio.Event()
    service = _Target(go_on.wait)
    async with _running(service) as (server, stub, connection):
        call = stub.RunSequence(target_pb2.RunSequenceRequest())
        await call.read()
        stopping = asyncio.create_task(server.stop(30))
        async with asyncio.timeout(10):
            while connection.get_state() is grpc.ChannelConnectivity.READY:
                await asyncio.sleep(0.01)
        go_on.set()
        assert isinstance(await call.read(), target_pb2.RunSequenceResponse)
        assert await call.read() is grpc.aio.EOF
        await asyncio.wait_for(stopping, 10)


@pytest.mark.parametrize("swallows", ["cancellation", "everything"])
async def test_a_handler_that_does_not_end_does_not_hold_the_stop_up(
    swallows: str, caplog: pytest.LogCaptureFixture
) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        for _ in range(1 if swallows == "cancellation" else 100):
            with suppress(asyncio.CancelledError):
                await release.wait()
        await release.wait()

    async with _running(_Target(stubborn)) as (server, stub, _):
        call = stub.RunSequence(target_pb2.RunSequenceRequest())
        await call.read()
        await asyncio.wait_for(server.stop(0.1), 10)
        assert ("did not end when it was told to" in caplog.text) == (swallows == "everything")
        release.set()


async def test_calls_of_a_burst_that_a_stop_meets_have_a_reason() -> None:
    async with _running(_Target()) as (server, stub, _):
        calls = [asyncio.ensure_future(_status_of(stub)) for _ in range(500)]
        await asyncio.sleep(0.05)  # some are sent by now, few are taken
        await server.stop(5)
        outcomes = Counter(await asyncio.gather(*calls))
    assert set(outcomes) <= {"OK", "DRAINING", "TARGET_UNAVAILABLE"}, outcomes
    assert outcomes["OK"] > 0


async def _status_of(stub: Any) -> str:
    try:
        await stub.GetTargetStatus(target_pb2.GetTargetStatusRequest())
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    return "OK"


async def test_two_thousand_calls_at_once_are_all_answered() -> None:
    async with _running(_Target()) as (_, stub, _unused):
        outcomes = Counter(await asyncio.gather(*(_status_of(stub) for _ in range(2000))))
    assert outcomes == {"OK": 2000}


async def test_more_calls_than_a_server_runs_are_refused_with_a_reason() -> None:
    server = create_server(max_calls=3)
    target_pb2_grpc.add_TargetServiceServicer_to_server(_Target(), server)
    endpoint = bind(server, "127.0.0.1:0")
    await server.start()
    async with channel(endpoint) as connection:
        stub: Any = target_pb2_grpc.TargetServiceStub(connection)
        running = [stub.RunSequence(target_pb2.RunSequenceRequest()) for _ in range(3)]
        for call in running:
            await call.read()
        error = await _error_of(stub.RunSequence(target_pb2.RunSequenceRequest()))
        assert type(error) is errors.Overloaded
        running[0].cancel()
        async with asyncio.timeout(10):
            while await _status_of(stub) != "OK":
                await asyncio.sleep(0.01)
    await server.stop(None)


async def test_rolling_two_servers_under_one_channel_fails_nothing() -> None:
    """Each is replaced in turn by another on the same port, as a Service's addresses are when pods are rolled."""
    stops = [asyncio.Event(), asyncio.Event()]
    runs: list[asyncio.Task[None]] = []
    endpoints = ["127.0.0.1:0", "127.0.0.1:0"]

    async def launch(number: int) -> None:
        stops[number] = asyncio.Event()
        server, endpoints[number], health = await _start(_Target(), endpoints[number])
        run = run_until_stopped(server, health=health, grace_s=10, stop=stops[number])
        runs.append(asyncio.create_task(run))

    for number in (0, 1):
        await launch(number)
    outcomes: Counter[str] = Counter()
    done = asyncio.Event()
    async with channel(",".join(endpoints)) as connection:
        stub = target_pb2_grpc.TargetServiceStub(connection)

        async def keep_calling() -> None:
            while not done.is_set():
                outcomes[await _status_of(stub)] += 1
                await asyncio.sleep(0.02)

        callers = [asyncio.create_task(keep_calling()) for _ in range(4)]
        for number in (0, 1, 0, 1):
            await asyncio.sleep(0.3)
            stops[number].set()
            await asyncio.wait_for(runs[-2], 15)
            await launch(number)
        done.set()
        await asyncio.gather(*callers)
    for stop in stops:
        stop.set()
    await asyncio.gather(*runs)
    assert outcomes["OK"] > 50
    assert outcomes["OK"] == outcomes.total(), outcomes


@pytest.mark.parametrize("fails", [True, False])
async def test_a_drain_that_fails_or_hangs_does_not_hold_the_stop_up(
    fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    release = asyncio.Event()

    async def drain(grace_s: float) -> None:
        if fails:
            raise OSError("no store")
        while not release.is_set():
            with suppress(asyncio.CancelledError):
                await release.wait()

    server, _, health = await _start(_Target())
    stop = asyncio.Event()
    stop.set()
    await asyncio.wait_for(run_until_stopped(server, drain, health=health, grace_s=0.2, stop=stop), 20)
    assert ("draining failed" if fails else "draining did not end") in caplog.text
    release.set()


async def test_a_second_signal_ends_streams_with_a_reason() -> None:
    server, endpoint, health = await _start(_Target())
    stop = asyncio.Event()
    running = asyncio.create_task(run_until_stopped(server, health=health, grace_s=60, stop=stop))
    async with channel(endpoint) as connection:
        call = target_pb2_grpc.TargetServiceStub(connection).RunSequence(target_pb2.RunSequenceRequest())
        await call.read()
        stop.set()
        while not health.servicer._gracefully_shutting_down:
            await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
        assert type(await _error_of(call)) is errors.Draining
        await asyncio.wait_for(running, 10)


class _Talker(_Target):
    """Its first response does not fit into what a client takes in before it reads."""

    async def RunSequence(self, request: Any, context: Any) -> AsyncIterator[target_pb2.RunSequenceResponse]:
        self.num_running += 1
        delta = inference_pb2.GenerationDelta(text="x" * (16 * 2**20))
        yield target_pb2.RunSequenceResponse(delta=delta)
        await asyncio.sleep(600)


async def test_a_call_that_is_ended_in_its_first_write_has_a_reason() -> None:
    service = _Talker()
    async with _running(service) as (server, stub, _):
        call = stub.RunSequence(target_pb2.RunSequenceRequest())
        async with asyncio.timeout(20):
            while service.num_running == 0:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # now it writes, and waits for somebody to read
        stopping = asyncio.create_task(server.stop(0))
        await asyncio.sleep(0.3)
        assert type(await _error_of(call)) is errors.Draining
        await stopping
