"""Big requests of one client while another one's stream runs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool.errors import InvalidArgument
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, target_pb2, types_pb2
from specpool_engine.modeling.text_codec import TextCodec

LONGEST_GAP_S = 1.5
"""Far above what refusing takes, far below what reading such a request takes."""
LARGE = "x" * 300_000
MODEL = "toy#vocab=64,seed=3,context=4096,step_ms=5"


def request_of(**fields: Any) -> inference_pb2.GenerateRequest:
    sampling = {"max_tokens": 10_000, "seed": 1, "ignore_eos": True} | fields.pop("sampling", {})
    return inference_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(**sampling), **fields)


BIG = {
    "text": lambda size: request_of(text="word " * (size // 5)),
    "text beyond ASCII": lambda size: request_of(text="🫨" * (size // 4)),
    "chat": lambda size: request_of(
        chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")] * (size // 12))
    ),
    "tokens": lambda size: request_of(tokens=inference_pb2.TokenPrompt(token_ids=[1] * size)),
    "stop": lambda size: request_of(text="hi", sampling={"stop": [f"{i} {i}" for i in range(size // 16)]}),
}
"""Requests of about so many bytes."""


class Gaps:
    """The longest time between two messages of a stream, since `start`."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self._last_s: float | None = None
        self.longest_s = 0.0
        self.flows = asyncio.Event()

    async def run(self) -> None:
        async for event in self._stub.Generate(request_of(text="hello")):
            now = time.perf_counter()
            if self._last_s is not None:
                self.longest_s = max(self.longest_s, now - self._last_s)
                self._last_s = now
            if event.HasField("delta"):
                self.flows.set()

    def start(self) -> None:
        self._last_s = time.perf_counter()


async def _longest_gap_s(service: Any, way: grpc.aio.Channel, method: str, message: bytes) -> float:
    """Of another stream, while a request is refused as an invalid argument."""
    gaps = Gaps(inference_pb2_grpc.InferenceServiceStub(service.router))
    call = way.unary_stream(method)  # of bytes: this side costs nothing
    stream = asyncio.create_task(gaps.run())
    await asyncio.wait_for(gaps.flows.wait(), 30)
    gaps.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call(message):
            pass
    stream.cancel()
    assert isinstance(from_rpc_error(caught.value), InvalidArgument)
    print(f"{len(message) / 1e6:.0f} MB, longest gap {gaps.longest_s:.3f} s")
    return gaps.longest_s


@pytest.mark.parametrize("num_bytes", [7_000_000, 50_000_000])
@pytest.mark.parametrize("kind", BIG)
async def test_a_big_request_is_refused_and_stops_nobody(start_service: Any, kind: str, num_bytes: int) -> None:
    service = await start_service(MODEL, num_kv_blocks=1024)
    message = BIG[kind](num_bytes).SerializeToString()
    gap_s = await _longest_gap_s(service, service.router, "/specpool.v1.InferenceService/Generate", message)
    assert gap_s < LONGEST_GAP_S


@pytest.mark.parametrize("kind", BIG)
async def test_a_target_does_not_stop_either(start_service: Any, kind: str) -> None:
    service = await start_service(MODEL, num_kv_blocks=1024)
    message = target_pb2.RunSequenceRequest(request=BIG[kind](30_000_000)).SerializeToString()
    gap_s = await _longest_gap_s(service, service.target, "/specpool.v1.TargetService/RunSequence", message)
    assert gap_s < LONGEST_GAP_S


class SlowTokenizing:
    """Texts that begin like `LARGE` take until `release`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        self.num_started = 0
        encode = TextCodec.encode

        def slow(codec: TextCodec, text: str, *, add_special_tokens: bool = True) -> list[int]:
            if text.startswith(LARGE[:100]):
                self.num_started += 1
                assert self.release.wait(60)
            return encode(codec, text, add_special_tokens=add_special_tokens)

        monkeypatch.setattr(TextCodec, "encode", slow)


async def _generate(stub: Any, request: inference_pb2.GenerateRequest) -> str:
    return "".join([event.delta.text async for event in stub.Generate(request)])


async def test_a_prompt_that_is_being_tokenized_holds_up_nobody(
    start_service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even those that come after several of its kind."""
    service = await start_service("toy#vocab=64,seed=3,context=200000", num_kv_blocks=1000)
    stub: Any = inference_pb2_grpc.InferenceServiceStub(service.router)
    slow = SlowTokenizing(monkeypatch)
    large = [asyncio.create_task(_generate(stub, request_of(text=LARGE))) for _ in range(4)]
    try:
        async with asyncio.timeout(60):
            while slow.num_started == 0:
                await asyncio.sleep(0.01)
            short = request_of(text="hello", sampling={"max_tokens": 5})
            assert await _generate(stub, short) == await _generate(stub, short) != ""
        assert slow.num_started == 1  # one at a time
        assert not any(task.done() for task in large)
    finally:
        slow.release.set()
    for result in await asyncio.gather(*large, return_exceptions=True):
        assert isinstance(result, grpc.aio.AioRpcError)
        assert result.code() is grpc.StatusCode.INVALID_ARGUMENT  # tokens that no cache here can hold
