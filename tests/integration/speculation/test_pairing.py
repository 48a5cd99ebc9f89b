"""The pool client moves running sequences, and whatever happens to speculators the output stays the engine's own."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest
from speculation_engine import FAST, LOOKAHEAD, Engine, Named, eventually, running

from specpool.algorithm.speculation_cache import LookupKind
from specpool.discovery.discovery import Endpoint
from specpool.v1 import speculator_pb2, types_pb2

PROMPT = [7]
RECOVERY_S = 2.0


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
                    one.refuses = None if one.refuses else speculator_pb2.SequenceRefused(retry_after_ms=1)
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


async def test_a_speculator_that_went_away_and_comes_back_at_its_address_has_hits_again(speculator_for, pool_for):
    first = await speculator_for()
    engine = Engine(await pool_for(Named([Endpoint(first.address)]), settings={"longest_leave_s": 0.1}))
    async with running(engine, "a"):
        await engine.until_hits("a")
        first.state = types_pb2.SERVING_STATE_DRAINING
        await first.say(go_away=speculator_pb2.GoAway(reason="rollout"))
        await eventually(lambda: first.num_streams == 0)
        await first.kill()
        await asyncio.sleep(2.5)
        num_before = first.seen["hello"]
        second = await speculator_for(int(first.address.rpartition(":")[2]))
        started_s = time.monotonic()
        assert await engine.until_hits("a") - started_s < RECOVERY_S + 1
    assert first.seen["hello"] == num_before
    assert second.seen["open_sequence"] == 1
