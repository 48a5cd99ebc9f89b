"""A server of two services that do what a test asks of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool import errors
from specpool.rpc.client import channel
from specpool.rpc.server import Health, add_standard_services, bind, create_server
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


class Served:
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
async def served() -> AsyncIterator[Served]:
    """A started server."""
    served = Served()
    await served.server.start()
    yield served
    await served.server.stop(0)


@pytest.fixture
async def connection(served: Served) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to it."""
    async with channel(served.endpoint) as connection:
        yield connection
