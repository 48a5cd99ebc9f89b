"""A small asynchronous client of the public API, shared by the command line, the bench and the tests. No torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import grpc.aio

from specpool.client.checks import checked_api_key
from specpool.client.resumable_stream import Request, ResumableStream, ResumePolicy
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, router_pb2, router_pb2_grpc, types_pb2


@dataclass(kw_only=True, slots=True)
class Completion:
    """A generation, as far as its events have come."""

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

    def __init__(self, endpoint: str, *, api_key: str = "", resume: ResumePolicy | None = None) -> None:
        self._metadata = (("authorization", f"Bearer {checked_api_key(api_key)}"),) if api_key else ()
        self._endpoint = endpoint
        self._resume = resume or ResumePolicy()
        self._channel = channel(endpoint)
        self._router = router_pb2_grpc.RouterServiceStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def stream(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """The events of one generation as they come. Leaving the loop early cancels the request.

        When the router stops or is lost, the rest is asked for over a new connection, as the `ResumePolicy` says.
        """
        async with _Connections(self._endpoint, self._channel, self._metadata) as connections:
            events = ResumableStream(request, self._resume).events(connections.call)
            async with aclosing(events):
                async for event in events:
                    yield event

    async def complete(self, request: inference_pb2.GenerateRequest) -> Completion:
        """Wait for the whole completion. Raises the typed error of a request that fails."""
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


class _Connections:
    """The connections of one stream: the client's, then new ones, one at a time."""

    def __init__(self, endpoint: str, shared: grpc.aio.Channel, metadata: Any) -> None:
        self._endpoint = endpoint
        self._shared = shared
        self._metadata = metadata
        self._own: grpc.aio.Channel | None = None

    async def __aenter__(self) -> _Connections:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._own is not None:
            await self._own.close()

    async def call(self, request: Request, is_new: bool) -> Any:
        """The call that streams the answer to a request, over a new connection or the client's."""
        if is_new:
            if self._own is not None:
                await self._own.close()
            self._own = channel(self._endpoint, own_connection=True)
        stub: Any = inference_pb2_grpc.InferenceServiceStub(self._own or self._shared)
        method = stub.Generate if isinstance(request, inference_pb2.GenerateRequest) else stub.Resume
        return method(request, metadata=self._metadata)
