"""Whatever the speculator does, the output is that of mode `off`; and it does what the protocol says."""

from __future__ import annotations

import asyncio
import time

import pytest

from specpool.v1 import target_pb2, types_pb2

GREEDY = {"temperature": 0.0}
SAMPLED = {"temperature": 0.9, "seed": 77}
PROMPT = (1, 2, 3)

SCRIPTS = {
    "right": {},
    "partial": {"tables": "partial"},
    "wrong": {"tables": "wrong", "replies": "wrong"},
    "random": {"tables": "random", "replies": "wrong"},
    "silent": {"tables": "none", "replies": "none"},
    "empty": {"tables": "none", "replies": "empty"},
    "just in time": {"tables": "none"},
    "late": {"tables": "none", "reply_delay_s": 0.3},
    "dies": {"die_after": 4},
    "resync": {"resync_at": 3},
}


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, SAMPLED | {"frequency_penalty": 0.8}], ids=str)
@pytest.mark.parametrize("mode", ["ssd", "sd"])
@pytest.mark.parametrize("script", SCRIPTS)
async def test_output_equals_off(target_for, speculator_for, script, mode, sampling):
    target = await target_for()
    expected = await target.generate(PROMPT, **sampling)
    speculator = await speculator_for(truth={PROMPT: expected.tokens}, **SCRIPTS[script])
    got = await target.generate(PROMPT, mode=mode, speculator=speculator.endpoint, **sampling)
    assert got.tokens == expected.tokens
    assert got.text == expected.text
    assert speculator.violations == []
    assert sum(got.stats.accepted_histogram) == got.stats.num_rounds


async def test_right_tables_are_hits(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=40")
    expected = await target.generate(PROMPT, max_tokens=51)
    speculator = await speculator_for(truth={PROMPT: expected.tokens})
    got = await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint, max_tokens=51)
    stats = got.stats
    assert stats.num_hits == stats.num_rounds == 10  # one token of the prefill, then ten times K + 1
    assert stats.num_misses == stats.num_late == stats.num_backup_rounds == 0
    assert list(stats.accepted_histogram) == [0, 0, 0, 0, 10]
    assert stats.num_accepted_tokens == stats.num_draft_tokens == 40
    # Of the first guess of each position nothing was right, of the second all.
    assert list(stats.hits_by_rank) == [0, 10]
    assert list(stats.lookups_by_position) == list(stats.hits_by_position) == [1, 0, 0, 0, 9]
    assert speculator.seen["speculate_now"] == 0
    assert stats.seconds_hit_rounds >= stats.seconds_hit_rounds_forward > 0.05


async def test_partial_tables_are_used_as_they_are(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=5")
    expected = await target.generate(PROMPT)
    speculator = await speculator_for(truth={PROMPT: expected.tokens}, tables="partial")
    stats = (await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint)).stats
    assert stats.num_partial >= stats.num_rounds - 1
    assert stats.num_draft_tokens == stats.num_accepted_tokens


async def test_sd_asks_each_round_and_starts_with_the_answer(target_for, speculator_for):
    target = await target_for(speculation_deadline_ms=5000.0)
    expected = await target.generate(PROMPT, max_tokens=51)
    speculator = await speculator_for(truth={PROMPT: expected.tokens})
    stats = (await target.generate(PROMPT, mode="sd", speculator=speculator.endpoint, max_tokens=51)).stats
    assert stats.num_rounds == 10
    assert list(stats.accepted_histogram) == [0, 0, 0, 0, 10]
    assert speculator.seen["speculate_now"] == speculator.seen["start_round"] == 10
    assert stats.num_hits == stats.num_misses == 0
    assert stats.seconds_waiting > 0


async def test_silent_speculator_costs_one_deadline(target_for, speculator_for):
    target = await target_for(speculation_deadline_ms=300.0)
    speculator = await speculator_for(tables="none", replies="none")
    started = time.perf_counter()
    stats = (await target.generate(PROMPT, mode="sd", speculator=speculator.endpoint, max_tokens=60)).stats
    assert 0.3 <= time.perf_counter() - started < 0.9
    assert speculator.seen["speculate_now"] == 1
    assert stats.num_rounds == 59


async def test_unreachable_speculator_costs_nothing_noticeable(target_for):
    target = await target_for()
    expected = await target.generate(PROMPT)
    for mode in ("ssd", "sd"):
        started = time.perf_counter()
        got = await target.generate(PROMPT, mode=mode, speculator="127.0.0.1:1")
        assert got.tokens == expected.tokens
        assert time.perf_counter() - started < 1.0
    (link,) = (await target.status()).speculators
    assert not link.connected
    assert link.last_error


async def test_killed_speculator_comes_back_and_hits_return(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=10")
    expected = await target.generate(PROMPT, max_tokens=2500, **SAMPLED)
    truth = {PROMPT: expected.tokens}
    first = await speculator_for(truth=truth)
    port = int(first.endpoint.rpartition(":")[2])
    restarted = []

    async def kill_and_restart(num_tokens):
        if num_tokens > 100 and not restarted:
            await first.kill()
            restarted.append(await speculator_for(port, truth=truth))

    got = await target.generate(
        PROMPT, mode="ssd", speculator=first.endpoint, max_tokens=2500, on_delta=kill_and_restart, **SAMPLED
    )
    assert got.tokens == expected.tokens
    (second,) = restarted
    assert [message.round > 0 for message in second.opened] == [True]
    assert second.seen["outcomes"] > 20
    assert second.violations == []
    assert got.stats.num_hits > first.seen["outcomes"] + 20


async def test_a_running_sequence_moves_to_a_replacement_and_says_so(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=10")
    expected = await target.generate(PROMPT, max_tokens=2500, **SAMPLED)
    truth = {PROMPT: expected.tokens}
    first = await speculator_for(truth=truth)
    replaced = []

    async def replace(num_tokens):
        if num_tokens > 100 and not replaced:
            await first.kill()
            replaced.append(await speculator_for(truth=truth))
            known = [types_pb2.SpeculatorEndpoint(address=replaced[0].endpoint)]
            await target.stub.GetTargetStatus(target_pb2.GetTargetStatusRequest(speculators=known))

    got = await target.generate(
        PROMPT, mode="ssd", speculator=first.endpoint, max_tokens=2500, on_delta=replace, **SAMPLED
    )
    assert got.tokens == expected.tokens
    (second,) = replaced
    assert [message.round > 0 for message in second.opened] == [True]
    assert second.seen["outcomes"] > 20
    assert second.violations == []
    assert target.paired == [first.endpoint, "", second.endpoint]


@pytest.mark.parametrize("mode", ["ssd", "sd"])
async def test_waits_end_at_once_when_the_speculator_dies(target_for, speculator_for, mode):
    target = await target_for(speculation_deadline_ms=30_000.0, fallback="wait")
    speculator = await speculator_for(tables="none", replies="none", step_ms=1000.0)
    running = asyncio.create_task(target.generate(PROMPT, mode=mode, speculator=speculator.endpoint))
    await asyncio.sleep(0.3)
    assert not running.done()  # it waits, for up to 30 s
    await speculator.kill()
    assert len((await asyncio.wait_for(running, 10)).tokens) == 40


async def test_cancellation_closes_the_sequence_at_the_speculator_at_once(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,step_ms=20")
    speculator = await speculator_for(tables="random")
    message = target.message(PROMPT, mode="ssd", speculator=speculator.endpoint, max_tokens=500)
    call = target.stub.RunSequence(message)
    for _ in range(4):
        await call.read()
    assert len(speculator.live) == 1
    call.cancel()
    for _ in range(50):
        if not speculator.live and not (await target.status()).load.num_sequences_running:
            break
        await asyncio.sleep(0.02)
    assert speculator.live == {}
    load = (await target.status()).load
    assert load.num_sequences_running == 0
    assert load.num_free_kv_blocks == load.num_kv_blocks


async def test_finished_sequences_are_closed_and_the_stream_is_half_closed(target_for, speculator_for):
    target = await target_for()
    speculator = await speculator_for(tables="none", replies="empty")
    await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint)
    await asyncio.sleep(0.1)
    assert speculator.live == {}
    assert (await target.status()).speculators[0].connected


async def test_a_speculator_that_is_always_late_costs_next_to_nothing(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=20", backup_ngram=0)
    expected = await target.generate(PROMPT, max_tokens=80)
    speculator = await speculator_for(truth={PROMPT: expected.tokens}, tables="none", reply_delay_s=0.2)
    got = await target.generate(PROMPT, mode="ssd", speculator=speculator.endpoint, max_tokens=80)
    assert got.tokens == expected.tokens
    # It says that a step takes 1 ms; the first wait shows otherwise, and there is no other for a long time.
    assert 1 <= speculator.seen["speculate_now"] <= 2
    assert got.stats.seconds_waiting < 0.1


@pytest.mark.parametrize(("distributions", "all_rejection"), [("point", True), ("broken", False), ("none", False)])
async def test_rejection_uses_distributions_that_are_there_and_sound(
    target_for, speculator_for, distributions, all_rejection
):
    deadline_ms = 2000.0 if all_rejection else 50.0  # a busy host is no reason to go on without
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=10", distribution_deadline_ms=deadline_ms)
    greedy = await target.generate(PROMPT, **GREEDY)
    speculator = await speculator_for(truth={PROMPT: greedy.tokens}, tables="random", distributions=distributions)
    got = await target.generate(
        PROMPT, mode="ssd", verification="rejection", speculator=speculator.endpoint, max_tokens=60, **SAMPLED
    )
    assert len(got.tokens) == 60
    assert got.stats.num_draft_tokens > 0
    if all_rejection:
        assert got.stats.num_sample_and_match_rounds == 0
    else:
        assert got.stats.num_sample_and_match_rounds > 0
    histogram = got.stats.accepted_histogram
    assert sum(histogram) == got.stats.num_rounds
    assert sum(accepted * rounds for accepted, rounds in enumerate(histogram)) == got.stats.num_accepted_tokens


async def test_many_sequences_at_once(target_for, speculator_for):
    target = await target_for("toy#vocab=24,seed=3,sharpness=2,step_ms=2", num_kv_blocks=60, max_batch_size=6)
    prompts = [(i, i + 1, i + 2) for i in range(12)]
    expected = await asyncio.gather(*(target.generate(p, **SAMPLED) for p in prompts))
    truth = {p: e.tokens for p, e in zip(prompts, expected, strict=True)}
    speculator = await speculator_for(truth=truth)
    got = await asyncio.gather(
        *(
            target.generate(p, mode=("ssd", "sd", "off")[i % 3], speculator=speculator.endpoint, **SAMPLED)
            for i, p in enumerate(prompts)
        )
    )
    assert [g.tokens for g in got] == [e.tokens for e in expected]
    assert speculator.violations == []
    await asyncio.sleep(0.1)
    load = (await target.status()).load
    assert load.num_free_kv_blocks == load.num_kv_blocks


COSTLY_ROWS = "toy#vocab=24,seed=3,sharpness=2,step_ms=1,row_ms=4"
"""A guessed token takes as long as a certain one."""


def without_lookahead(target, **options):
    """The target chooses K."""
    message = target.message(PROMPT, max_tokens=500, **options)
    message.request.ClearField("max_lookahead")
    return message


@pytest.mark.parametrize(
    ("mode", "verification", "sampling"),
    [
        ("ssd", "coupled", SAMPLED),
        ("sd", "coupled", SAMPLED),
        ("ssd", "rejection", SAMPLED | {"top_k": 1}),  # a distribution of one token, so that the output is known
    ],
)
async def test_speculation_that_does_not_pay_pauses_and_the_output_stays(
    target_for, speculator_for, mode, verification, sampling
):
    target = await target_for(COSTLY_ROWS, num_kv_blocks=1024)
    expected = await target.generate(PROMPT, max_tokens=500, **sampling)
    script = {"tables": "wrong", "replies": "wrong", "distributions": "point"}
    speculator = await speculator_for(truth={PROMPT: expected.tokens}, **script)
    got = await target.run(
        without_lookahead(target, mode=mode, verification=verification, speculator=speculator.endpoint, **sampling)
    )
    assert f"{mode} paused in batches of 1 to 1" in (await target.status()).plan
    assert speculator.seen["close_sequence"] >= 1
    assert 48 < speculator.seen["outcomes"] < 300
    assert speculator.violations == []
    assert got.tokens == expected.tokens


async def test_a_speculator_lost_in_a_pause_is_tried_again_when_it_comes_back(target_for, speculator_for):
    target = await target_for(COSTLY_ROWS, num_kv_blocks=1024)
    expected = await target.generate(PROMPT, max_tokens=500, **SAMPLED)
    script = {"truth": {PROMPT: expected.tokens}, "tables": "wrong", "replies": "wrong"}
    first = await speculator_for(**script)
    port = int(first.endpoint.rpartition(":")[2])
    restarted = []

    async def kill_and_restart(num_tokens):
        if not restarted and "paused" in (await target.status()).plan:
            await first.kill()
            restarted.append(await speculator_for(port, **script))

    message = without_lookahead(target, mode="ssd", speculator=first.endpoint, **SAMPLED)
    got = await target.run(message, kill_and_restart)
    (second,) = restarted
    assert [opened.round > 0 for opened in second.opened] == [True]
    assert second.seen["outcomes"] > 10
    assert first.violations == second.violations == []
    assert got.tokens == expected.tokens
