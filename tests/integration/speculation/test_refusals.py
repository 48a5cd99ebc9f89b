"""Speculators that take nothing, or not this: the sequence goes elsewhere, and nobody waits for them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest
from speculation_engine import FAST, GREEDY, Engine, Known, Named, eventually, running

from specpool.discovery.discovery import Endpoint
from specpool.speculation.review import Review
from specpool.v1 import speculator_pb2, types_pb2

RECOVERY_S = 2.0
FULL = speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES


async def test_a_refused_sequence_goes_elsewhere(speculator_for, pool_for):
    refusing = await speculator_for(refuses=speculator_pb2.SequenceRefused(reason=FULL, retry_after_ms=60_000))
    taking, directory, moves = await speculator_for(), Named(), Counter()
    directory.name(refusing.address)
    engine = Engine(await pool_for(directory, moves=moves))
    async with running(engine, "a"):
        await eventually(lambda: moves["refused"] == 1)
        directory.name(refusing.address, taking.address)
        named_s = time.monotonic()
        assert await engine.until_hits("a") - named_s < RECOVERY_S
    assert len(refusing.opened_at_s["a"]) == 1


async def test_a_speculator_is_asked_again_soon_when_a_sequence_needs_one(speculator_for, pool_for):
    only = await speculator_for(state=types_pb2.SERVING_STATE_DRAINING)
    settings = {"status_interval_s": 3600.0, "urgent_status_interval_s": 0.2}
    engine = Engine(await pool_for(Named([Endpoint(only.address)]), settings=settings))
    async with running(engine, "a"):
        await engine.until("a", lambda kinds: len(kinds) > 5)
        only.state = types_pb2.SERVING_STATE_SERVING
        await engine.until_hits("a")


@pytest.mark.parametrize("why", ["refused", "full", "terminating"])
async def test_a_request_does_not_wait_for_a_speculator_that_takes_nothing(speculator_for, pool_for, why):
    only, directory, moves = await speculator_for(), Named(), Counter()
    directory.name(Endpoint(only.address, terminating=why == "terminating"))
    if why == "refused":
        only.refuses = speculator_pb2.SequenceRefused(reason=FULL, retry_after_ms=60_000)
    elif why == "full":
        only.max_sequences, only.live = 1, {"of another engine": Known([1], 0, [])}
    engine = Engine(await pool_for(directory, moves=moves))
    async with running(engine, "a"):
        await engine.until("a", lambda kinds: len(kinds) > 5)
        if why == "refused":
            await eventually(lambda: moves["refused"] == 1)
        started_s = time.monotonic()
        assert await asyncio.to_thread(engine.pool.wait_settled, 20.0)
        assert time.monotonic() - started_s < 5.0


async def test_a_refusal_costs_those_that_are_served_nothing_and_is_tried_again(speculator_for, pool_for):
    only, moves = await speculator_for(), Counter()
    engine = Engine(await pool_for(Named([Endpoint(only.address)]), moves=moves, settings=FAST))
    async with running(engine, "served"):
        await engine.until_hits("served")
        only.refuses = speculator_pb2.SequenceRefused(reason=FULL, retry_after_ms=1_500)
        waiting = Engine(engine.pool)
        async with running(waiting, "late"):
            await eventually(lambda: moves["refused"] == 1)
            refused_s = time.monotonic()
            await engine.until_hits("served", 100)
            assert engine.hit_rate("served", after_s=refused_s) > 0.5
            only.refuses = None
            await waiting.until_hits("late")
    first_s, second_s = only.opened_at_s["late"]
    assert second_s - first_s >= 1.4
    assert len(only.opened_at_s["served"]) == 1


@pytest.mark.parametrize("reason", [speculator_pb2.REFUSAL_REASON_INVALID, speculator_pb2.REFUSAL_REASON_INTERNAL])
async def test_a_sequence_that_failed_or_is_never_acceptable_is_not_tried_again(speculator_for, pool_for, reason):
    refusal = speculator_pb2.SequenceRefused(reason=reason)
    refusing, other, directory = await speculator_for(refuses=refusal), await speculator_for(), Named()
    directory.name(refusing.address)
    engine = Engine(await pool_for(directory, settings=FAST))
    async with running(engine, "a"):
        await eventually(lambda: "a" in refusing.opened_at_s)
        await asyncio.sleep(1.5)
        assert len(refusing.opened_at_s["a"]) == 1
        directory.name(refusing.address, other.address)
        await engine.until_hits("a")


async def test_a_sequence_is_not_tried_where_it_is_too_long(speculator_for, pool_for):
    short = [await speculator_for(max_context=5) for _ in range(3)]
    directory = Named(Endpoint(s.address) for s in short)
    engine = Engine(await pool_for(directory, settings=FAST))
    async with running(engine, "a", num_prompt_tokens=6):
        await engine.until("a", lambda kinds: len(kinds) > 20)
        long = await speculator_for(max_context=1_000_000)
        directory.name(*(s.address for s in short), long.address)
        await engine.until_hits("a")
    assert not any(s.seen["open_sequence"] for s in short)


async def test_a_speculator_that_is_full_is_not_asked(speculator_for, pool_for):
    small, large = await speculator_for(max_sequences=1), await speculator_for(max_sequences=100)
    engine = Engine(await pool_for(Named([Endpoint(small.address), Endpoint(large.address)]), settings=FAST))
    async with running(engine, *"abcdefgh"):
        for name in "abcdefgh":
            await engine.until_hits(name)
        assert len(small.live) <= 1
        assert small.seen["open_sequence"] <= 1


async def test_many_refusals_at_once_are_looked_at_together(speculator_for, pool_for, monkeypatch):
    num_reviews, run = Counter(), Review.run

    def counted(review, now_s):
        num_reviews.update(["all"])
        run(review, now_s)

    monkeypatch.setattr(Review, "run", counted)
    moves = Counter()
    refusing = await speculator_for(refuses=speculator_pb2.SequenceRefused(reason=FULL, retry_after_ms=60_000))
    pool = await pool_for(Named([Endpoint(refusing.address)]), moves=moves)
    num_before, started_s = num_reviews["all"], time.monotonic()
    for _ in range(300):
        pool.open([7], GREEDY)
    await eventually(lambda: moves["refused"] == 300)
    assert num_reviews["all"] - num_before <= (time.monotonic() - started_s) / 0.01 + 5


async def test_many_speculators_are_asked_no_more_often_than_the_engine_can_spare(speculator_for, pool_for):
    full = [await speculator_for(max_sequences=1) for _ in range(10)]
    for speculator in full:
        speculator.live["of another engine"] = Known([1], 0, [])
    settings = {"urgent_status_interval_s": 0.01, "shortest_status_pause_s": 0.2}
    engine = Engine(await pool_for(Named(Endpoint(s.address) for s in full), settings=settings))
    async with running(engine, "a"):
        num_before, started_s = sum(s.num_asked for s in full), time.monotonic()
        await asyncio.sleep(4.0)
        num_asked = sum(s.num_asked for s in full) - num_before
        assert 0 < num_asked <= 1.5 * (time.monotonic() - started_s) / 0.2 + len(full)
