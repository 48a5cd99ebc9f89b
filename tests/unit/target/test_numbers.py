"""Numbers that mean what they say."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from specpool_target.engine.sequence import SpeculationMode

DEADLINE_S = 0.4


def value(bench, name, **labels):
    return bench.engine.metrics.registry.get_sample_value(name, labels)


async def test_what_several_sequences_wait_at_the_same_time_is_counted_once(bench_for, request_for):
    bench = bench_for(speculation_deadline_ms=DEADLINE_S * 1e3)
    bench.engine.pool.connect()  # to a speculator that never answers
    started_s = asyncio.get_running_loop().time()
    streams = []
    for index in range(8):
        request = replace(request_for(f"s{index}", (1, 2, 3)), mode=SpeculationMode.SD, max_lookahead=4)
        updates: asyncio.Queue = asyncio.Queue()
        bench.engine.submit(request, updates.put_nowait)
        streams.append(updates)
    finishes = [(await bench.collect(updates)).finish for updates in streams]
    wall_s = asyncio.get_running_loop().time() - started_s
    assert sum(finish.stats.seconds_waiting for finish in finishes) > 4 * DEADLINE_S, "each of them waited"
    await bench.idle()
    waited_s = value(bench, "specpool_round_duration_seconds_sum", phase="waiting")
    assert 0.5 * DEADLINE_S < waited_s <= wall_s
    phases = ("waiting", "forward", "verify", "other")
    total_s = sum(value(bench, "specpool_round_duration_seconds_sum", phase=phase) for phase in phases)
    assert total_s <= wall_s


@pytest.mark.parametrize(("committed", "expected"), [((), 1), ((11, 4), 0)])
async def test_a_stream_has_one_first_token_however_many_targets_run_it(bench_for, request_for, committed, expected):
    bench = bench_for()
    got = await bench.run(replace(request_for("a", (1, 2, 3)), committed_tokens=committed))
    assert len(got.tokens) == 20 - len(committed)
    await bench.idle()
    assert value(bench, "vllm:time_to_first_token_seconds_count", model_name="toy") == expected
    assert got.finish.stats.seconds_to_first_token > 0
