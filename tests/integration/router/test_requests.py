"""Requests that nobody could answer, as a client sees it: before they are sent, or from a router."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from router_fakes import FakeTarget, running, text_of, tokens_of

from specpool import errors
from specpool.client import Client
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2

KEY = "secret"


@pytest.fixture
def tenants_file(tmp_path: Path) -> str:
    """One tenant, acme."""
    path = tmp_path / "tenants.yaml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    path.write_text(f"tenants:\n  - name: acme\n    key_sha256: {digest}\n")
    return str(path)


async def test_who_has_no_key_learns_nothing_of_a_malformed_request(start_router: Any, tenants_file: str) -> None:
    router = await start_router(tenants_file=tenants_file)
    async with channel(router) as connection:
        for service, method in (("Inference", "Generate"), ("Inference", "Resume"), ("Router", "DrainRouter")):
            call: Any = connection.unary_stream(f"/specpool.v1.{service}Service/{method}")
            codes = []
            for metadata in ((), (("authorization", f"Bearer {KEY}"),)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    async for _ in call(b"\xff\xff", metadata=metadata):
                        pass
                codes.append(caught.value.code())
            assert codes == [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.INVALID_ARGUMENT]


@pytest.mark.parametrize("key", ["a\nb", "schlüssel", "\N{KEY}", "a\x00b", "a\x7f", "\udcff", " secret"])
async def test_a_key_that_cannot_be_sent_is_refused_at_once(key: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(errors.Unauthenticated, match="printable ASCII"):
        Client("127.0.0.1:1", api_key=key)
    assert capfd.readouterr().err == ""


async def test_the_largest_request_reaches_the_target(start_router: Any) -> None:
    target = FakeTarget(delay_s=0)
    max_bytes = 300_000
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), max_request_bytes=max_bytes)
        async with Client(router) as client:
            request = inference_pb2.GenerateRequest(text="x" * (max_bytes - 100))
            assert (await client.complete(request)).token_ids
            request.text += "x" * 101
            with pytest.raises(errors.InvalidArgument) as caught:
                await client.complete(request)
    assert (caught.value.reason, caught.value.metadata["accepted"]) == ("REQUEST_TOO_LARGE", str(max_bytes))
    assert len(target.requests) == 1


async def test_the_largest_request_can_be_resumed(start_router: Any) -> None:
    """A client that resumes sends the request again, with all that it has of the answer."""
    max_bytes = 300_000
    sampling = types_pb2.SamplingParams(seed=5, max_tokens=220)
    async with running(FakeTarget(delay_s=0)) as (endpoint,):
        router = await start_router(targets=(endpoint,), max_request_bytes=max_bytes)
        request = inference_pb2.GenerateRequest(
            text="x" * (max_bytes - 100), request_id="r", model="m", sampling=sampling
        )
        point = inference_pb2.ResumeRequest(
            request_id="r", request=request, num_tokens_received=200, received_token_ids=tokens_of(5, 200)
        )
        assert point.ByteSize() > max_bytes
        point.num_chars_received = len(text_of(5, 200))
        async with channel(router) as connection:
            call = inference_pb2_grpc.InferenceServiceStub(connection).Resume(point)
            events = [event async for event in call]
    rest = [token for event in events for token in event.delta.token_ids]
    assert rest == tokens_of(5, 220)[200:]


async def test_the_largest_setting_leaves_room_for_what_the_router_adds(start_router: Any) -> None:
    target = FakeTarget(delay_s=0)
    async with running(target) as (endpoint,):
        router = await start_router(targets=(endpoint,), max_request_bytes=32 * 2**20)
        async with Client(router) as client:
            request = inference_pb2.GenerateRequest(
                text="x" * (32 * 2**20 - 100), sampling=types_pb2.SamplingParams(max_tokens=1)
            )
            assert (await client.complete(request)).token_ids


async def test_requests_of_sixty_megabytes_do_not_hold_other_streams_up(start_router: Any) -> None:
    """They are refused while they arrive: nobody parses, copies or stores them."""
    gaps: list[float] = []
    async with running(FakeTarget(delay_s=0.01)) as (endpoint,):
        router = await start_router(targets=(endpoint,))
        async with Client(router) as client, channel(router) as connection:
            generate: Any = connection.unary_stream("/specpool.v1.InferenceService/Generate")
            huge = bytes(60 * 2**20)
            refused = asyncio.gather(*(_refusal(generate(huge)) for _ in range(3)))
            last_s = None
            sampling = types_pb2.SamplingParams(seed=1, max_tokens=100)
            async for _ in client.stream(inference_pb2.GenerateRequest(text="x", sampling=sampling)):
                now_s = time.monotonic()
                if last_s is not None:
                    gaps.append(now_s - last_s)
                last_s = now_s
            assert [error.reason for error in await refused] == ["REQUEST_TOO_LARGE"] * 3
    assert max(gaps) < 2


async def _refusal(call: Any) -> errors.SpecPoolError:
    try:
        async for _ in call:
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("nobody refused it")


async def test_a_model_with_a_long_name_is_an_invalid_argument(start_router: Any) -> None:
    async with running(FakeTarget()) as (endpoint,), Client(await start_router(targets=(endpoint,))) as client:
        with pytest.raises(errors.InvalidArgument, match="model must be"):
            await client.complete(inference_pb2.GenerateRequest(text="x", model="\N{GRINNING FACE}" * 5_000))


async def test_a_server_says_unauthenticated_to_a_key_that_is_no_text(start_router: Any, tenants_file: str) -> None:
    """Another client than ours may send any byte that HTTP/2 can carry."""
    router = await start_router(tenants_file=tenants_file)
    async with channel(router) as connection:
        call: Any = connection.unary_unary("/specpool.v1.InferenceService/ListModels")
        for value in ("Bearer ~" + "~" * 3000, "Bearer", "Basic abc", "Bearer  ", ""):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(b"", metadata=(("authorization", value),))
            assert type(from_rpc_error(caught.value)) is errors.Unauthenticated
