"""The pool client moves running sequences, and whatever happens to speculators the output stays the engine's own."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest
from speculation_engine import LOOKAHEAD, Engine, Known, Named, eventually

from specpool.algorithm.speculation_cache import LookupKind
from specpool.discovery.discovery import Endpoint
from specpool.v1 import speculator_pb2, types_pb2

PROMPT = [7]
RECOVERY_S = 2.0
FAST = {"review_interval_s": 0.05, "status_interval_s": 0.2, "urgent_status_interval_s": 0.05}


@asynccontextmanager
async def running(engine, *names):
    """Sequences that run until the end of the block."""
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(len(names)) as threads:
        runs = [loop.run_in_executor(threads, engine.run, [7 + i], 10**9, name) for i, name in enumerate(names)]
        try:
            yield
        finally:
            engine.stop = True
            outputs = await asyncio.gather(*runs)
    assert all(outputs)


def split(speculators, engine_name="a"):
    """The one that has the sequence, and the other."""
    first, second = speculators
    return (first, second) if engine_name in first.live else (second, first)


async def test_a_hit_needs_no_wait_and_the_speculator_knows_what_is_verified(speculator_for, pool_for):
    speculator = await speculator_for()
    engine = Engine(await pool_for(Named([Endpoint(speculator.address)])), round_s=0.02)
    assert len(await asyncio.to_thread(engine.run, PROMPT, 50, "a")) >= 50
    kinds = [kind for _, kind in engine.rounds["a"]]
    assert len(kinds) <= 14
    assert kinds.count(LookupKind.HIT) >= 9
    await eventually(lambda: speculator.live == {})
    assert speculator.seen["open_sequence"] == speculator.seen["close_sequence"] == 1


async def test_running_sequences_find_a_replacement_at_another_address(speculator_for, pool_for):
    directory, moves = Named(), Counter()
    first = await speculator_for()
    directory.name(first.address)
    engine = Engine(await pool_for(directory, moves=moves))
    async with running(engine, "a", "b"):
        await engine.until_hits("a")
        await first.kill()
        await engine.until("a", lambda kinds: kinds[-5:] == [None] * 5)
        second = await speculator_for()
        directory.name(second.address)
        named_s = time.monotonic()
        for name in ("a", "b"):
            assert await engine.until_hits(name) - named_s < RECOVERY_S
        assert second.seen["open_sequence"] == 2
        assert {known.round > 5 for known in second.live.values()} == {True}
    assert moves["lost"] == 2


async def test_a_lost_speculator_is_replaced_by_another_that_is_known(speculator_for, pool_for):
    both = [await speculator_for(), await speculator_for()]
    engine = Engine(await pool_for(Named(Endpoint(s.address) for s in both)))
    async with running(engine, "a"):
        await engine.until_hits("a")
        lost, other = split(both)
        lost_s = time.monotonic()
        await lost.kill()
        await eventually(lambda: "a" in other.live)
        assert await engine.until_hits("a") - lost_s < RECOVERY_S


async def test_a_speculator_that_comes_back_at_its_address_has_hits_again(speculator_for, pool_for):
    first = await speculator_for()
    engine = Engine(await pool_for(Named([Endpoint(first.address)])))
    async with running(engine, "a"):
        await engine.until_hits("a")
        await first.kill()
        await engine.until("a", lambda kinds: kinds[-1] is None)
        await speculator_for(int(first.address.rpartition(":")[2]))
        await engine.until_hits("a")


async def test_go_away_moves_every_sequence_and_ends_the_stream(speculator_for, pool_for):
    both, moves = [await speculator_for(), await speculator_for()], Counter()
    engine = Engine(await pool_for(Named(Endpoint(s.address) for s in both), moves=moves))
    async with running(engine, "a"):
        await engine.until_hits("a")
        going, other = split(both)
        going.state = types_pb2.SERVING_STATE_DRAINING
        await going.say(go_away=speculator_pb2.GoAway(reason="test"))
        await eventually(lambda: "a" in other.live and going.num_streams == 0)
        assert going.seen["half_close"] == 1
        assert going.seen["close_sequence"] == 1
        await engine.until_hits("a")
    assert moves == {"going_away": 1}


async def test_go_away_of_the_only_one_ends_the_stream_too(speculator_for, pool_for):
    only = await speculator_for()
    engine = Engine(await pool_for(Named([Endpoint(only.address)]), settings=FAST | {"longest_leave_s": 0.2}))
    async with running(engine, "a"):
        await engine.until_hits("a")
        only.state = types_pb2.SERVING_STATE_DRAINING
        await only.say(go_away=speculator_pb2.GoAway(reason="test"))
        await eventually(lambda: only.num_streams == 0)
        await engine.until("a", lambda kinds: kinds[-5:] == [None] * 5)


async def test_a_terminating_speculator_is_left_when_there_is_another(speculator_for, pool_for):
    first, directory = await speculator_for(), Named()
    directory.name(first.address)
    engine = Engine(await pool_for(directory))
    async with running(engine, "a"):
        await engine.until_hits("a")
        directory.name(Endpoint(first.address, terminating=True))
        await engine.until_hits("a", 20)  # it serves on while it is the only one
        second = await speculator_for()
        directory.name(Endpoint(first.address, terminating=True), second.address)
        await eventually(lambda: "a" in second.live and first.num_streams == 0)


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


async def test_a_sequence_that_is_never_acceptable_is_not_tried_again(speculator_for, pool_for):
    invalid = speculator_pb2.SequenceRefused(reason=speculator_pb2.REFUSAL_REASON_INVALID)
    refusing, other, directory = await speculator_for(refuses=invalid), await speculator_for(), Named()
    directory.name(refusing.address)
    engine = Engine(await pool_for(directory, settings=FAST))
    async with running(engine, "a"):
        await eventually(lambda: "a" in refusing.opened_at_s)
        await asyncio.sleep(1.5)
        assert len(refusing.opened_at_s["a"]) == 1
        directory.name(refusing.address, other.address)
        await engine.until_hits("a")


async def test_a_speculator_that_is_full_is_not_asked(speculator_for, pool_for):
    small, large = await speculator_for(max_sequences=1), await speculator_for(max_sequences=100)
    engine = Engine(await pool_for(Named([Endpoint(small.address), Endpoint(large.address)]), settings=FAST))
    async with running(engine, *"abcdefgh"):
        for name in "abcdefgh":
            await engine.until_hits(name)
        assert len(small.live) <= 1
        assert small.seen["open_sequence"] <= 1


async def test_a_silent_speculator_is_left(speculator_for, pool_for):
    both, moves = [await speculator_for(), await speculator_for()], Counter()
    engine = Engine(await pool_for(Named(Endpoint(s.address) for s in both), moves=moves, settings=FAST))
    async with running(engine, "a"):
        await engine.until_hits("a")
        silent, other = split(both)
        silent.is_silent = True
        await eventually(lambda: "a" in other.live)
        await engine.until_hits("a", 20)
    assert moves == {"silent": 1}


async def test_a_crowded_speculator_is_relieved_and_nothing_flaps(speculator_for, pool_for):
    first, directory, moves = await speculator_for(), Named(), Counter()
    directory.name(first.address)
    settings = FAST | {"crowded_for_s": 0.3, "shortest_stay_s": 0.5}
    engine = Engine(await pool_for(directory, moves=moves, settings=settings), round_s=0.02)
    names = [f"s{i}" for i in range(16)]
    async with running(engine, *names):
        await eventually(lambda: len(first.live) == 16)
        second = await speculator_for()
        directory.name(first.address, second.address)
        await eventually(lambda: len(second.live) >= 5)
        await asyncio.sleep(2.0)
        num_moves = moves["crowded"]
        assert num_moves <= 9
        await asyncio.sleep(2.0)
        assert moves["crowded"] <= num_moves + 1
        assert len(first.live) + len(second.live) == 16


async def test_sequences_go_back_to_what_is_near_but_only_after_a_while(speculator_for, pool_for):
    far, near, directory, moves = await speculator_for(), await speculator_for(), Named(), Counter()
    away = Endpoint(far.address, labels={"zone": "other"})
    directory.name(away)
    settings = FAST | {"crowded_for_s": 0.3, "shortest_stay_s": 1.0}
    engine = Engine(await pool_for(directory, moves=moves, settings=settings, labels={"zone": "here"}))
    async with running(engine, "a"):
        placed_s = await engine.until_hits("a", 1)
        directory.name(away, Endpoint(near.address, labels={"zone": "here"}))
        await eventually(lambda: "a" in near.live)
        assert near.opened_at_s["a"][0] - placed_s > 0.5
        await asyncio.sleep(1.0)
    assert moves == {"crowded": 1}


async def test_what_has_another_tokenizer_is_not_used(speculator_for, pool_for):
    other, right = await speculator_for(fingerprint="e" * 64), await speculator_for()
    engine = Engine(await pool_for(Named([Endpoint(other.address), Endpoint(right.address)])))
    await asyncio.to_thread(engine.run, PROMPT, 30, "a")
    assert other.seen == {}
    assert right.seen["open_sequence"] == 1


async def test_an_engine_without_speculators_decodes_alone_and_is_helped_when_one_comes(speculator_for, pool_for):
    directory = Named()
    engine = Engine(await pool_for(directory))
    async with running(engine, "a"):
        await engine.until("a", lambda kinds: len(kinds) > 5)
        speculator = await speculator_for()
        directory.name("127.0.0.1:1", speculator.address)
        named_s = time.monotonic()
        assert await engine.until_hits("a") - named_s < RECOVERY_S
    assert {kind for _, kind in engine.rounds["a"][:5]} == {None}


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_the_output_stays_and_speculators_are_told_the_truth(speculator_for, pool_for, seed):
    chance, directory = random.Random(seed), Named()
    speculators = [await speculator_for() for _ in range(3)]
    settings = FAST | {"crowded_for_s": 0.0, "shortest_stay_s": 0.0, "longest_leave_s": 0.1}
    directory.name(*(s.address for s in speculators))
    engine = Engine(await pool_for(directory, settings=settings), round_s=0.005, waits_s=0.05)
    names = [f"s{i}" for i in range(6)]
    async with running(engine, *names):
        for _ in range(25):
            await asyncio.sleep(0.04)
            one = chance.choice(speculators)
            match chance.randrange(6):
                case 0:
                    speculators.remove(one)
                    await one.kill()
                    speculators.append(await speculator_for())
                case 1:
                    for name in list(one.live):
                        del one.live[name]
                        await one.say(resync=speculator_pb2.Resync(sequence_id=name))
                case 2:
                    await one.say(go_away=speculator_pb2.GoAway(reason="chance"))
                case 3:
                    one.refuses = None if one.refuses else speculator_pb2.SequenceRefused(reason=FULL)
                case 4:
                    one.answers = not one.answers
                case 5:
                    one.guesses = not one.guesses
            directory.name(*(s.address for s in chance.sample(speculators, 2)))
        for one in speculators:
            one.refuses, one.answers, one.guesses = None, True, True
        directory.name(*(s.address for s in speculators))
        for name in names:
            await engine.until_hits(name)
    for one in speculators:
        await eventually(lambda one=one: one.live == {})


async def test_sequences_are_opened_with_the_lookahead_that_was_asked_for(speculator_for, pool_for):
    speculator = await speculator_for()
    pool = await pool_for(Named([Endpoint(speculator.address)]))
    handle = pool.open(PROMPT, types_pb2.SamplingParams(stop=["text"]), max_lookahead=2)
    await eventually(lambda: handle.id in speculator.live)
    assert handle.speculator is not None
    assert handle.speculator.measured.max_lookahead == LOOKAHEAD
    found = handle.next(0, 10)
    assert len(found.tokens) <= 2
    handle.close()
