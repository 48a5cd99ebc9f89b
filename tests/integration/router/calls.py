"""Calls that tests of routers make."""

from __future__ import annotations

import asyncio
from typing import Any

from router_fakes import NUM_TOKENS, text_of, tokens_of

from specpool.client import Client, Completion
from specpool.rpc.client import channel
from specpool.v1 import inference_pb2, inference_pb2_grpc, types_pb2

SEED = 11


def request_of(**fields: Any) -> inference_pb2.GenerateRequest:
    fields = {"text": "hello", "sampling": types_pb2.SamplingParams(seed=SEED), **fields}
    return inference_pb2.GenerateRequest(**fields)


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def is_whole(completion: Completion) -> bool:
    assert completion.token_ids == tokens_of(completion.seed)
    assert completion.text == text_of(completion.seed)
    assert completion.usage.num_completion_tokens == NUM_TOKENS
    assert completion.usage.num_prompt_tokens == 5
    return True


async def cancel(router: str, request_id: str) -> bool:
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        return bool((await stub.Cancel(inference_pb2.CancelRequest(request_id=request_id))).cancelled)


async def collect(
    router: str, request: inference_pb2.GenerateRequest, into: Completion, *, api_key: str = ""
) -> Completion:
    async with Client(router, api_key=api_key) as client:
        async for event in client.stream(request):
            into.add(event)
    return into


async def resume(router: str, request_id: str, num_tokens_received: int, api_key: str = "") -> Completion:
    completion = Completion()
    async with channel(router) as to:
        stub: Any = inference_pb2_grpc.InferenceServiceStub(to)
        request = inference_pb2.ResumeRequest(request_id=request_id, num_tokens_received=num_tokens_received)
        metadata = [("authorization", f"Bearer {api_key}")] if api_key else None
        async for event in stub.Resume(request, metadata=metadata):
            completion.add(event)
    return completion
