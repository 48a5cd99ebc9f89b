"""More sequences than a real speculator takes: it serves those that it has, the others go on without it."""

from __future__ import annotations

import asyncio
from typing import Any

from specpool.rpc.client import channel
from specpool.v1 import speculator_pb2, speculator_pb2_grpc
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve

MODEL = "toy#vocab=24,seed=3,step_ms=25,context=2048"
DRAFT = "toy#vocab=24,seed=3,step_ms=2,context=2048"
NUM_TOKENS = 60


async def test_those_that_find_no_place_go_on_without(target_for) -> None:
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    config = SpeculatorConfig(model=DRAFT, max_sequences=2, max_lookahead=4, num_kv_blocks=1024, drain_grace_s=0.0)
    speculator = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    try:
        address = await asyncio.wait_for(ready, 60)
        target = await target_for(MODEL, num_kv_blocks=1024)
        prompts = [range(1, 4 + i) for i in range(5)]
        plain = [await target.generate(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
        options: dict[str, Any] = {"mode": "ssd", "speculator": address, "max_tokens": NUM_TOKENS}
        speculated = await asyncio.gather(*(target.generate(prompt, **options) for prompt in prompts))
        assert [each.tokens for each in speculated] == [each.tokens for each in plain]
        assert any(each.stats.num_hits + each.stats.num_partial for each in speculated)
        async with channel(address) as connection:
            stub = speculator_pb2_grpc.SpeculatorServiceStub(connection)
            async with asyncio.timeout(60):
                while True:
                    status = await stub.GetSpeculatorStatus(speculator_pb2.GetSpeculatorStatusRequest())
                    if not status.load.num_sequences_running:
                        break
                    await asyncio.sleep(0.02)
        assert {count.reason for count in status.refusals} <= {speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES}
    finally:
        stop.set()
        await asyncio.wait_for(speculator, 60)
