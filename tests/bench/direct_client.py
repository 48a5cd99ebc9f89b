"""Requests to targets without a router between: what a router costs is the difference."""

from __future__ import annotations

import itertools
import uuid
from types import TracebackType
from typing import Any

import grpc.aio

from specpool.client import Client, Completion
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, router_pb2, target_pb2, target_pb2_grpc, types_pb2


class DirectClient(Client):
    """A client whose requests go to the targets of a router, in turn; the rest is asked of the router."""

    def __init__(self, endpoint: str, status: router_pb2.GetClusterStatusResponse) -> None:
        super().__init__(endpoint)
        self._channels = [channel(target.endpoint) for target in status.targets]
        self._speculators = [types_pb2.SpeculatorEndpoint(address=one.endpoint) for one in status.speculators]
        self._turns = itertools.cycle(self._channels)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for one in self._channels:
            await one.close()
        await super().__aexit__(kind, error, traceback)

    async def complete(self, request: inference_pb2.GenerateRequest) -> Completion:
        """Wait for the whole completion."""
        request.request_id = uuid.uuid4().hex
        stub: Any = target_pb2_grpc.TargetServiceStub(next(self._turns))
        message = target_pb2.RunSequenceRequest(request=request, tenant="bench", speculators=self._speculators)
        completion = Completion()
        try:
            async for event in stub.RunSequence(message):
                completion.add(event)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return completion
