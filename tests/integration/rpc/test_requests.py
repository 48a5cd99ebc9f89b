"""Requests that are malformed, too large, without credentials, or that make long errors."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool import errors
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.rpc.request_parsing import Authentication
from specpool.rpc.server import add_standard_services, bind, create_server
from specpool.v1 import inference_pb2, inference_pb2_grpc, speculator_pb2, speculator_pb2_grpc

MAX_BYTES = 100_000
KEY = (("authorization", "Bearer secret"),)
GENERATE = "/specpool.v1.InferenceService/Generate"
CANCEL = "/specpool.v1.InferenceService/Cancel"
SPECULATE = "/specpool.v1.SpeculatorService/Speculate"
TRUNCATED = b"\x0a\xff\x01"
BAD_TEXT = b"\x0a\x02\xff\xfe"


class _Inference(inference_pb2_grpc.InferenceServiceServicer):
    async def Generate(self, request: Any, context: Any) -> AsyncIterator[inference_pb2.GenerateResponse]:
        yield inference_pb2.GenerateResponse()
        raise errors.ModelNotFound(
            f"model {request.model!r} is not served", metadata={"field": "model", "value": request.model}
        )

    async def Cancel(self, request: Any, context: Any) -> inference_pb2.CancelResponse:
        return inference_pb2.CancelResponse(cancelled=True)


class _Speculator(speculator_pb2_grpc.SpeculatorServiceServicer):
    async def Speculate(
        self, requests: AsyncIterator[Any], context: Any
    ) -> AsyncIterator[speculator_pb2.SpeculateResponse]:
        async for request in requests:
            assert isinstance(request, speculator_pb2.SpeculateRequest)
            yield speculator_pb2.SpeculateResponse()


def _check(metadata: Any) -> None:
    if ("authorization", "Bearer secret") not in list(metadata):
        raise errors.Unauthenticated("no key")


@pytest.fixture
async def connection() -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server that wants a key."""
    server = create_server(Authentication(_check), max_request_bytes=MAX_BYTES)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(), server)
    speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(_Speculator(), server)
    health = add_standard_services(server, inference_pb2.DESCRIPTOR)
    endpoint = bind(server, "127.0.0.1:0")
    await server.start()
    await health.set_serving()
    async with channel(endpoint) as connection:
        yield connection
    await server.stop(None)


async def _failed(call: Any) -> tuple[grpc.StatusCode, errors.SpecPoolError]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), from_rpc_error(caught.value)


async def _drain(call: Any) -> None:
    async for _ in call:
        pass


@pytest.mark.parametrize("encoded", [TRUNCATED, BAD_TEXT], ids=["truncated", "bad UTF-8"])
@pytest.mark.parametrize("method", [GENERATE, CANCEL, SPECULATE])
async def test_a_malformed_request_is_an_invalid_argument(
    connection: grpc.aio.Channel, method: str, encoded: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if method == GENERATE:
        calls = [_drain(connection.unary_stream(method)(encoded, metadata=metadata)) for metadata in (KEY, ())]
    elif method == CANCEL:
        calls = [connection.unary_unary(method)(encoded, metadata=metadata) for metadata in (KEY, ())]
    else:
        encoded = encoded if encoded is TRUNCATED else b"\x0a\x02\x12\xff"
        calls = [_drain(connection.stream_stream(method)(iter([encoded]), metadata=key)) for key in (KEY, ())]
    code, error = await _failed(calls[0])
    assert (code, error.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_REQUEST")
    code, _ = await _failed(calls[1])
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("num_bytes", [MAX_BYTES + 1, 3 * MAX_BYTES, 20 * MAX_BYTES, 60 * 2**20])
async def test_a_large_request_is_refused_by_size(connection: grpc.aio.Channel, num_bytes: int) -> None:
    request = inference_pb2.GenerateRequest(text="x" * num_bytes)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(connection)
    _, error = await _failed(_drain(stub.Generate(request, metadata=KEY)))
    assert (type(error), error.reason) == (errors.InvalidArgument, "REQUEST_TOO_LARGE")
    assert await stub.Cancel(inference_pb2.CancelRequest(request_id="x"), metadata=KEY)


@pytest.mark.parametrize("letter", ["x", "\N{GRINNING FACE}", "é", "\n"])
async def test_an_error_about_a_long_text_keeps_its_status(connection: grpc.aio.Channel, letter: str) -> None:
    request = inference_pb2.GenerateRequest(model=letter * 5_000)
    call = inference_pb2_grpc.InferenceServiceStub(connection).Generate(request, metadata=KEY)
    code, error = await _failed(_drain(call))
    assert code is grpc.StatusCode.NOT_FOUND
    assert type(error) is errors.ModelNotFound
    assert error.metadata["value"].startswith(letter)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


async def _answer_to_raw_call(endpoint: str, authorization: bytes) -> bytes:
    """One call in HTTP/2 by hand: gRPC's own client refuses to send such a header."""
    headers = {b":method": b"POST", b":scheme": b"http", b":path": CANCEL.encode(), b":authority": b"x"}
    headers |= {b"te": b"trailers", b"content-type": b"application/grpc", b"authorization": authorization}
    literals = (b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in headers.items())
    reader, writer = await asyncio.open_connection(*endpoint.rsplit(":", 1))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
    writer.write(_frame(1, 4, 1, b"".join(literals)) + _frame(0, 1, 1, bytes(5)))
    answer = b""
    async with asyncio.timeout(20):
        while b"grpc-status-details-bin" not in answer:
            answer += await reader.read(65536)
    writer.close()
    return answer


@pytest.mark.parametrize("key", [b"unknown", "schlüssel".encode(), b"\xff\xfe", b"a\nb", b"a\0b"])
async def test_any_bytes_as_key_are_unauthenticated(key: bytes, caplog: pytest.LogCaptureFixture) -> None:
    server = create_server(Authentication(_check))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(_Inference(), server)
    endpoint = bind(server, "127.0.0.1:0")
    await server.start()
    answer = await _answer_to_raw_call(endpoint, b"Bearer " + key)
    await server.stop(None)
    assert b"grpc-status\x0216" in answer
    assert caplog.text == ""


async def test_health_needs_no_key(connection: grpc.aio.Channel) -> None:
    assert await connection.unary_unary("/grpc.health.v1.Health/Check")(b"")
