"""What the client makes of streams that are cut in odd places."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from specpool import errors
from specpool.client import Client
from specpool.rpc.server import bind, create_server
from specpool.v1 import inference_pb2, inference_pb2_grpc


class Router(inference_pb2_grpc.InferenceServiceServicer):
    """Is lost after the last event and before the status."""

    num_resumed = 0

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse(started=inference_pb2.GenerationStarted(request_id="r"))
        yield inference_pb2.GenerateResponse(delta=inference_pb2.GenerationDelta(text="x", token_ids=[1]))
        yield inference_pb2.GenerateResponse(finished=inference_pb2.GenerationFinished())
        raise errors.Draining("the end")

    async def Resume(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.ResumeResponse]:
        self.num_resumed += 1
        yield inference_pb2.ResumeResponse(started=inference_pb2.GenerationStarted(request_id="r"))
        yield inference_pb2.ResumeResponse(finished=inference_pb2.GenerationFinished())


async def test_an_answer_that_is_complete_is_not_asked_for_again() -> None:
    service, server = Router(), create_server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)
    endpoint = bind(server, "127.0.0.1:0")
    await server.start()
    try:
        async with Client(endpoint) as client:
            events = [event.WhichOneof("event") async for event in client.stream(inference_pb2.GenerateRequest())]
    finally:
        await server.stop(None)
    assert events == ["started", "delta", "finished"]
    assert service.num_resumed == 0
