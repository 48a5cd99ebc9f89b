"""What goes wrong with one sequence ends that sequence, with a typed error; the others go on."""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest

from specpool.algorithm.verification import VerificationMode
from specpool.errors import InvalidArgument, KVCacheFull, SequenceFailed
from specpool.speculation import DraftSource, SequenceHandle
from specpool.speculation.inbox import SpeculationInbox
from specpool_engine.modeling.detokenizer import IncrementalDetokenizer
from specpool_engine.modeling.paged_kv import SequenceKV
from specpool_engine.modeling.toy import ToyTokenizer
from specpool_target.engine.scheduler import _Places
from specpool_target.engine.sequence import SpeculationMode, TargetSequence
from specpool_target.verify import verify_step as verifying

PROMPT = (1, 2, 3)


def broken(*args, **kwargs):
    raise ValueError("broken")


class BrokenDetokenizer(IncrementalDetokenizer):
    """Of a tokenizer that cannot decode what comes."""

    def push(self, tokens):
        broken()


async def assert_only_it_failed(bench, request_for, updates, error=SequenceFailed, beside=None):
    """`updates` are those of the sequence that fails; `beside` runs with it, and others can follow."""
    failed = await bench.collect(updates)
    assert isinstance(failed.error, error)
    good = request_for("other", PROMPT, max_tokens=30)
    got = await bench.run(good)
    assert got.tokens == bench.decode(PROMPT, good.sampling)
    if beside is not None:
        assert len((await bench.collect(beside)).tokens) == 40
    assert bench.engine.failure is None
    assert bench.engine.num_sequences == 0
    return failed


async def test_text_and_stop_strings(bench_for, request_for):
    bench = bench_for()
    request = request_for("bad", PROMPT, stop=("xyz",))
    updates: asyncio.Queue = asyncio.Queue()
    beside = bench.submit(request_for("beside", PROMPT, max_tokens=40))
    bench.engine.submit(request, updates.put_nowait, detokenizer=BrokenDetokenizer(ToyTokenizer(24), stop=("xyz",)))
    failed = await assert_only_it_failed(bench, request_for, updates, beside=beside)
    assert "ValueError: broken" in failed.error.message
    assert failed.error.reason == "SEQUENCE_FAILED"


async def test_committing(bench_for, request_for, monkeypatch):
    bench = bench_for()
    from specpool_target.engine import loop

    whole = loop.commit

    def commit(sequence, *arguments):
        return broken() if sequence.id == "bad" and sequence.round == 2 else whole(sequence, *arguments)

    monkeypatch.setattr(loop, "commit", commit)
    failed = await assert_only_it_failed(bench, request_for, bench.submit(request_for("bad", PROMPT)))
    assert len(failed.tokens) == 2


async def test_verification_inputs(bench_for, request_for, monkeypatch):
    bench = bench_for()
    whole = TargetSequence.verify_item

    def verify_item(self, rows, distribution):
        return broken() if self.id == "bad" else whole(self, rows, distribution)

    monkeypatch.setattr(TargetSequence, "verify_item", verify_item)
    await assert_only_it_failed(bench, request_for, bench.submit(request_for("bad", PROMPT)))


@pytest.mark.parametrize("verification", [VerificationMode.COUPLED, VerificationMode.GREEDY])
async def test_verification_of_a_group(bench_for, request_for, monkeypatch, verification):
    """Batched with others, it must not end them."""
    bench = bench_for()
    whole = verifying._verify_group

    def verify_group(logits, group):
        return broken() if any(item.seed == 666 for item in group) else whole(logits, group)

    monkeypatch.setattr(verifying, "_verify_group", verify_group)
    temperature = 0.0 if verification is VerificationMode.GREEDY else 1.0
    beside = bench.submit(request_for("beside", PROMPT, max_tokens=40, temperature=temperature, seed=5))
    bad = bench.submit(request_for("bad", PROMPT, max_tokens=40, temperature=temperature, seed=666))
    assert isinstance((await bench.collect(bad)).error, SequenceFailed)
    assert len((await bench.collect(beside)).tokens) == 40


async def test_tokens_that_the_model_does_not_have(bench_for, request_for):
    bench = bench_for()
    beside = bench.submit(request_for("beside", PROMPT, max_tokens=40))
    bad = bench.submit(request_for("bad", (1, 2, 999)))
    await assert_only_it_failed(bench, request_for, bad, InvalidArgument, beside=beside)


async def test_a_step_without_room_ends_one_sequence(bench_for, request_for, monkeypatch):
    bench = bench_for()
    whole, calls = bench.model.forward, itertools.count()

    def forward(segments):
        if next(calls) == 3:
            raise KVCacheFull("no room")
        return whole(segments)

    monkeypatch.setattr(bench.model, "forward", forward)
    first, second = (bench.submit(request_for(name, PROMPT, max_tokens=30)) for name in ("first", "second"))
    results = [await bench.collect(first), await bench.collect(second)]
    assert sorted(type(result.error).__name__ for result in results) == ["KVCacheFull", "NoneType"]
    assert bench.engine.failure is None


async def connected(bench, request_for, name, **options):
    """A sequence with a speculator that sends nothing."""
    bench.engine.pool.connect()
    request = replace(request_for(name, PROMPT, **options), mode=SpeculationMode.SSD, max_lookahead=4)
    updates: asyncio.Queue = asyncio.Queue()
    bench.engine.submit(request, updates.put_nowait)
    return updates


async def test_a_sequence_that_does_not_end_well_is_freed(bench_for, request_for, monkeypatch):
    bench = bench_for()
    updates = bench.submit(request_for("bad", PROMPT, max_tokens=200))
    await updates.get()
    monkeypatch.setattr(SequenceKV, "publish_prefix", broken)
    bench.engine.cancel("bad")
    await bench.idle()
    assert bench.engine.failure is None
    assert (bench.engine.num_sequences, bench.pool.num_used) == (0, 0)


async def test_being_admitted(bench_for, request_for, monkeypatch):
    bench = bench_for()
    whole = SequenceKV.from_prefix

    def from_prefix(pool, tokens, salt):
        return broken() if tokens[0] == 7 else whole(pool, tokens, salt)

    monkeypatch.setattr(SequenceKV, "from_prefix", from_prefix)
    beside = bench.submit(request_for("beside", PROMPT, max_tokens=40))
    await assert_only_it_failed(bench, request_for, bench.submit(request_for("bad", (7, 2, 3))), beside=beside)


async def test_a_place_in_a_step(bench_for, request_for, monkeypatch):
    bench = bench_for()
    beside = bench.submit(request_for("beside", PROMPT, max_tokens=40))
    bad = bench.submit(request_for("bad", (7, 2, 3), max_tokens=200))
    await bad.get()
    whole = _Places.add

    def add(self, sequence, num_tokens):
        return broken() if sequence.id == "bad" else whole(self, sequence, num_tokens)

    monkeypatch.setattr(_Places, "add", add)
    await assert_only_it_failed(bench, request_for, bad, beside=beside)


async def test_looking_up_and_choosing(bench_for, request_for, monkeypatch):
    bench = bench_for()
    monkeypatch.setattr(SpeculationInbox, "lookup", broken)
    await assert_only_it_failed(bench, request_for, await connected(bench, request_for, "bad"))


@pytest.mark.parametrize("method", ["next", "started"])
async def test_what_a_speculator_is_told(bench_for, request_for, monkeypatch, method):
    bench = bench_for()
    monkeypatch.setattr(SequenceHandle, method, broken)
    await assert_only_it_failed(bench, request_for, await connected(bench, request_for, "bad", max_tokens=200))


async def test_giving_it_to_the_pool(bench_for, request_for, monkeypatch):
    bench = bench_for()
    monkeypatch.setattr(bench.engine.pool, "open", broken)
    await assert_only_it_failed(bench, request_for, await connected(bench, request_for, "bad"))


async def test_distributions_that_cannot_be_read_are_sample_and_match(bench_for, request_for, monkeypatch):
    from specpool_target.engine import draft_distributions

    bench = bench_for()
    monkeypatch.setattr(draft_distributions, "read_distributions", broken)
    sequence = SimpleNamespace(
        request=SimpleNamespace(sampling=request_for("a", PROMPT, temperature=1.0).sampling,
                                verification=VerificationMode.REJECTION),
        draft=SimpleNamespace(tokens=[1], source=DraftSource.SPECULATOR),
        handle=SimpleNamespace(take_distributions=lambda: None, awaits_distributions=lambda: False), round=1,
        stats=SimpleNamespace(num_sample_and_match_rounds=0),
    )  # fmt: skip
    assert bench.engine.loop._distributions.take([sequence]) == [None]
    assert sequence.stats.num_sample_and_match_rounds == 1


async def test_cancelling_a_sequence_that_fails_frees_it(bench_for, request_for):
    bench = bench_for()
    request = request_for("bad", PROMPT, stop=("xyz",))
    updates: asyncio.Queue = asyncio.Queue()
    bench.engine.submit(request, updates.put_nowait, detokenizer=BrokenDetokenizer(ToyTokenizer(24), stop=("xyz",)))
    bench.engine.cancel("bad")
    await bench.idle()
    assert bench.engine.num_sequences == 0
    assert bench.engine.failure is None
