"""Big requests of one client while another one's stream runs."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool.rpc.errors import from_rpc_error
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from specpool_engine.modeling.text_codec import TextCodec

LONGEST_GAP_S = 1.5
"""Far above what refusing takes, far below what reading such a request takes."""
LARGE = "x" * 300_000


def request_of(**fields: Any) -> inference_pb2.GenerateRequest:
    sampling = {"max_tokens": 10_000, "seed": 1, "ignore_eos": True} | fields.pop("sampling", {})
    return inference_pb2.GenerateRequest(sampling=types_pb2.SamplingParams(**sampling), **fields)


BIG = {
    "text": lambda: request_of(text="word " * 10_000_000),
    "text beyond ASCII": lambda: request_of(text="🫨" * 12_000_000),
    "chat": lambda: request_of(
        chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")] * 500_000)
    ),
    "tokens": lambda: request_of(tokens=inference_pb2.TokenPrompt(token_ids=[1] * 30_000_000)),
    "stop": lambda: request_of(text="hi", sampling={"stop": [f"{i} {i}" for i in range(500_000)]}),
}


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


@pytest.mark.parametrize("kind", BIG)
async def test_a_big_request_is_refused_and_stops_nobody(start_service: Any, kind: str) -> None:
    model = "toy#vocab=64,seed=3,context=4096,step_ms=5"
    service = await start_service(model, num_kv_blocks=1024, block_size=4)
    gaps = Gaps(inference_pb2_grpc.InferenceServiceStub(service.router))
    message = BIG[kind]().SerializeToString()
    call = service.router.unary_stream("/specpool.v1.InferenceService/Generate")  # of bytes: this side costs nothing
    stream = asyncio.create_task(gaps.run())
    await asyncio.wait_for(gaps.flows.wait(), 30)
    gaps.start()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call(message):
            pass
    stream.cancel()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, from_rpc_error(caught.value)
    print(f"{kind}: {len(message) / 1e6:.0f} MB, longest gap {gaps.longest_s:.3f} s")
    assert gaps.longest_s < LONGEST_GAP_S


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
