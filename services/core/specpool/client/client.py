"""A small asynchronous client of the public API, shared by the command line, the bench and the tests. No torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType

import grpc.aio

from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc, types_pb2


@dataclass(kw_only=True, slots=True)
class Completion:
    """A finished generation."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
    seed: int = 0
    usage: types_pb2.Usage = field(default_factory=types_pb2.Usage)
    stats: types_pb2.GenerationStats = field(default_factory=types_pb2.GenerationStats)

    def add(self, event: inference_pb2.GenerateResponse) -> None:
        """Take in the next event of the stream."""
        if event.HasField("started"):
            self.seed = event.started.seed
        elif event.HasField("delta"):
            self.text += event.delta.text
            self.token_ids.extend(event.delta.token_ids)
        elif event.HasField("finished"):
            self.finish_reason = event.finished.finish_reason
            self.usage = event.finished.usage
            self.stats = event.finished.stats


class Client:
    """Calls a router. Use as an asynchronous context manager. Every method raises `specpool.errors` types."""

    def __init__(self, endpoint: str, *, api_key: str = "") -> None:
        self._channel = channel(endpoint)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._router = router_pb2_grpc.RouterServiceStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def stream(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The events of one generation as they come. Leaving the loop early cancels the request."""
        call = self._inference.Generate(request, metadata=self._metadata)
        try:
            async for event in call:
                yield event
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            call.cancel()

    async def complete(self, request: inference_pb2.GenerateRequest) -> Completion:
        """The whole completion at once."""
        completion = Completion()
        async for event in self.stream(request):
            completion.add(event)
        return completion

    async def cluster_status(self) -> router_pb2.GetClusterStatusResponse:
        """What the router knows of the pods behind it."""
        try:
            status: router_pb2.GetClusterStatusResponse = await self._router.GetClusterStatus(
                router_pb2.GetClusterStatusRequest(), metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        return status
