"""A real server over real gRPC, a toy draft model, and a scripted target."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from specpool.errors import ProtocolMismatch, TokenizerMismatch, TransportUnavailable
from specpool.rpc.client import channel
from specpool.rpc.errors import from_rpc_error
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_speculator import service
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve

from .target_stream import MODEL, PROMPT, TIMEOUT_S, Stream


@pytest.fixture
async def stub(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """Of a speculator whose settings a test may change."""
    ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    changes = getattr(request, "param", {})
    config = SpeculatorConfig(
        model=MODEL, id="spec-0", max_lookahead=4, drain_grace_s=1.0, **{"num_kv_blocks": 512, **changes}
    )
    task = asyncio.create_task(serve(config, on_ready=ready.set_result, stop=stop))
    done, _ = await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED, timeout=60)
    if task in done:
        task.result()
    async with channel(ready.result()) as open_channel:
        yield speculator_pb2_grpc.SpeculatorServiceStub(open_channel)
    stop.set()
    await asyncio.wait_for(task, TIMEOUT_S)


async def _status(stub: Any) -> Any:
    return await stub.GetSpeculatorStatus(speculator_pb2.GetSpeculatorStatusRequest())


async def _until_empty(stub: Any) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            status = await _status(stub)
            if not status.targets and status.load.num_sequences_running == 0:
                assert status.load.num_free_kv_blocks == status.load.num_kv_blocks == 512
                return
            await asyncio.sleep(0.02)


async def test_rounds(stub: Any) -> None:
    stream = Stream(stub)
    ack = await stream.hello()
    assert (ack.max_lookahead, ack.row_budget, ack.speculator.id) == (3, 16, "spec-0")
    assert ack.transport == speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC
    await stream.open()
    for round_ in range(5):
        (num_accepted, bonus), tokens = await stream.full_entry(round_)
        await stream.outcome(round_, num_accepted, bonus, tokens)
    async with asyncio.timeout(TIMEOUT_S):
        while not (status := await _status(stub)).confidence_spread:  # outcomes are learned from while nobody waits
            await asyncio.sleep(0.02)
    assert status.load.num_sequences_running == 1
    assert [peer.id for peer in status.targets] == ["target"]
    assert len(status.miss_power_law) == 4
    assert status.confidence_spread <= 1
    await stream.other("load")
    await stream.call.done_writing()
    while await stream.call.read() is not grpc.aio.EOF:
        pass
    assert await stream.call.code() is grpc.StatusCode.OK
    await _until_empty(stub)


async def test_synchronous_rounds_and_resync(stub: Any) -> None:
    stream = Stream(stub)
    await stream.hello()
    await stream.open(mode=types_pb2.SPECULATION_MODE_SD)
    await stream.outcome(0, 0, 5, awaits=True)
    for round_ in range(3):
        now = speculator_pb2.SpeculateNow(sequence_id="s", round=round_, num_tokens=3, deadline_ms=5000)
        await stream.send(speculate_now=now)
        answer = await stream.other("speculation")
        assert (answer.round, len(answer.draft_tokens)) == (round_, 3)
        start = speculator_pb2.StartRound(sequence_id="s", round=round_ + 1, draft_tokens=answer.draft_tokens)
        await stream.send(start_round=start)
        await stream.outcome(round_ + 1, 2, 4, awaits=True)
    await stream.outcome(9, 0, 4)
    assert "round 9" in (await stream.other("resync")).reason
    assert not stream.tables
    stream.call.cancel()
    await _until_empty(stub)


async def test_two_targets_use_the_same_sequence_id(stub: Any) -> None:
    streams = [Stream(stub), Stream(stub)]
    for stream in streams:
        await stream.hello()
        await stream.open()
    entries = await asyncio.gather(*(stream.full_entry(0) for stream in streams))
    assert entries[0] == entries[1]
    streams[0].call.cancel()  # abrupt
    (num_accepted, bonus), tokens = entries[1]
    await streams[1].outcome(0, num_accepted, bonus, tokens)
    await streams[1].full_entry(1)
    assert (await _status(stub)).load.num_sequences_running == 1
    streams[1].call.cancel()
    await _until_empty(stub)


@pytest.mark.parametrize(
    ("stub", "reason"),
    [
        ({"max_sequences": 1}, speculator_pb2.REFUSAL_REASON_TOO_MANY_SEQUENCES),
        ({"num_kv_blocks": 4}, speculator_pb2.REFUSAL_REASON_KV_CACHE_FULL),
    ],
    indirect=["stub"],
)
async def test_a_sequence_that_finds_no_place_is_refused(stub: Any, reason: Any) -> None:
    stream = Stream(stub)
    ack = await stream.hello()
    status = await _status(stub)
    assert ack.max_sequences == status.max_sequences
    assert ack.load.num_kv_blocks == status.load.num_kv_blocks > 0
    await stream.open("served")
    await stream.some_entry("served")
    await stream.open("refused", prompt=PROMPT[::-1])
    async with asyncio.timeout(6 * TIMEOUT_S):
        refusal = await stream.other("sequence_refused")
    assert (refusal.sequence_id, refusal.reason) == ("refused", reason)
    assert refusal.message
    assert refusal.retry_after_ms > 0
    async with asyncio.timeout(TIMEOUT_S):
        while not (status := await _status(stub)).refusals:
            await asyncio.sleep(0.02)
    assert [(count.reason, count.num_sequences) for count in status.refusals] == [(reason, 1)]
    assert status.load.num_sequences_running == 1
    # Given a place, it is taken.
    await stream.send(close_sequence=speculator_pb2.CloseSequence(sequence_id="served"))
    await stream.open("refused", prompt=PROMPT[::-1])
    await stream.some_entry("refused")
    stream.call.cancel()


async def test_closed_sequence_gets_no_tables(stub: Any) -> None:
    stream = Stream(stub)
    await stream.hello()
    await stream.open()
    await stream.full_entry(0)
    await stream.send(close_sequence=speculator_pb2.CloseSequence(sequence_id="s"))
    async with asyncio.timeout(TIMEOUT_S):
        while (await _status(stub)).load.num_sequences_running:
            await asyncio.sleep(0.02)
    await stream.open("next")
    while ("next", 0) not in stream.tables:
        await stream.receive()
    stream.tables.clear()
    await stream.open("last")
    while not any(len(tokens) == 3 for tokens in stream.tables.get(("last", 0), {}).values()):
        await stream.receive()
    assert {name for name, _ in stream.tables} <= {"next", "last"}
    stream.call.cancel()


@pytest.mark.parametrize(
    ("changes", "error_type", "values"),
    [
        (
            {"protocol_version": 7},
            ProtocolMismatch,
            {"target_protocol_version": "7", "speculator_protocol_version": "1"},
        ),
        ({"fingerprint": "beef"}, TokenizerMismatch, {"target_tokenizer_fingerprint": "beef"}),
        ({"vocab_size": 31}, TokenizerMismatch, {"target_vocab_size": "31", "speculator_vocab_size": "32"}),
        (
            {"transports": (speculator_pb2.DISTRIBUTION_TRANSPORT_NCCL,)},
            TransportUnavailable,
            {"target_transports": "nccl", "speculator_transports": "gloo, grpc"},
        ),
    ],
)
async def test_mismatch_is_refused_naming_both_sides(stub: Any, changes: Any, error_type: Any, values: Any) -> None:
    stream = Stream(stub)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.hello(**changes)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    error = from_rpc_error(caught.value)
    assert type(error) is error_type
    assert values.items() <= error.metadata.items()


async def test_something_else_than_hello_first(stub: Any) -> None:
    stream = Stream(stub)
    await stream.open()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.receive()
    assert type(from_rpc_error(caught.value)) is ProtocolMismatch


async def test_whoever_says_nothing_is_not_listened_to_for_ever(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_HELLO_S", 0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Stream(stub).receive()
    assert from_rpc_error(caught.value).message == "no hello within 0.2 s"


async def test_second_hello_ends_the_stream(stub: Any) -> None:
    stream = Stream(stub)
    await stream.hello()
    await stream.open()
    await stream.send(hello=speculator_pb2.Hello())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.other("nothing")
    assert type(from_rpc_error(caught.value)) is ProtocolMismatch
    await _until_empty(stub)


async def test_drain_sends_go_away_and_refuses_new_streams(stub: Any) -> None:
    stream = Stream(stub)
    await stream.hello()
    drain = asyncio.ensure_future(stub.DrainSpeculator(speculator_pb2.DrainSpeculatorRequest(grace_seconds=5)))
    assert (await stream.other("go_away")).reason
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await Stream(stub).hello()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await stream.call.done_writing()
    assert (await drain).num_sequences_running == 0
    assert (await _status(stub)).state == types_pb2.SERVING_STATE_DRAINING
