"""Rejection verification with dense distributions over gloo, end to end, and every way to lose them."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import grpc.aio
import pytest
import torch
from scipy.stats import chisquare

from specpool.errors import TransportUnavailable
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2
from specpool_engine.distributions import group as group_module
from specpool_engine.modeling.tokenizer import tokenizer_fingerprint
from specpool_engine.modeling.toy import ToyTable, ToyTokenizer

from .conftest import PROMPT, VOCAB


def is_dense(link) -> bool:
    return link.transport == "gloo"


async def connect(target, speculator: str):
    """Until dense distributions can come."""
    await target.generate(speculator, max_tokens=5)
    return await target.until(is_dense)


def num_pair_threads() -> int:
    return sum(thread.name.startswith("distributions ") for thread in threading.enumerate())


# In SD every round waits for its draft: enough of them for the distribution to tell. In SSD a host that is busy makes
# drafts late, and a late one is not verified.
@pytest.mark.parametrize(("mode", "least_share_drafted"), [("SD", 1.0), ("SSD", 0.1)])
async def test_dense_rejection_has_the_targets_distribution(
    target_for, speculator_for, mode, least_share_drafted
) -> None:
    # A host that stalls for as long as the deadline makes the link go without bodies for a hundred times that.
    target = await target_for(distribution_deadline_ms=5000.0, max_batch_size=64)
    speculator = await speculator_for(saguaro_constant=0.5, max_sequences=512, row_budget=64)
    link = await connect(target, speculator)
    assert (link.agreed_transport, link.group_error) == ("gloo", "")
    # Of the second, third and fourth token: the first one is the prefill's, which nothing was drafted for.
    num_requests = 1200
    results = []
    for first in range(0, num_requests, 24):
        results += await asyncio.gather(
            *(
                target.generate(speculator, seed=100 + seed, max_tokens=4, mode=mode)
                for seed in range(first, first + 24)
            )
        )
    stats = [stats for _, stats in results]
    assert sum(s.num_draft_tokens for s in stats) > num_requests * least_share_drafted
    assert sum(s.num_sample_and_match_rounds for s in stats) < num_requests / 50
    table = ToyTable(VOCAB, 3, sharpness=1.0)
    first = table.logits(PROMPT[-2], PROMPT[-1]).double().softmax(0)
    pairs = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for token in range(VOCAB):
        second = first[token] * table.logits(PROMPT[-1], token).double().softmax(0)
        for following in range(VOCAB):
            pairs[following] += second[following] * table.logits(token, following).double().softmax(0)
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for tokens, _ in results:
        counts[tokens[1], tokens[2]] += 1
    expected = (pairs * num_requests).flatten()
    likely = expected > 5
    observed = torch.cat([counts.flatten()[likely], counts.flatten()[~likely].sum()[None]])
    expected = torch.cat([expected[likely], expected[~likely].sum()[None]])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("mode", ["SSD", "SD"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
async def test_nothing_falls_back_when_all_is_well(target_for, speculator_for, mode, dtype) -> None:
    target = await target_for(distribution_deadline_ms=1000.0)
    speculator = await speculator_for(distribution_dtype=dtype)
    await connect(target, speculator)
    tokens, stats = await target.generate(speculator, max_tokens=80, mode=mode)
    assert len(tokens) == 80
    assert stats.num_draft_tokens > 20
    assert stats.num_sample_and_match_rounds == 0


async def test_many_pairs_in_one_process(target_for, speculator_for) -> None:
    targets = [await target_for(distribution_deadline_ms=1000.0) for _ in range(3)]
    speculators = [await speculator_for() for _ in range(3)]
    pairs = list(zip(targets, speculators, strict=True))
    await asyncio.gather(*(target.generate(speculator, max_tokens=5) for target, speculator in pairs))
    async with asyncio.timeout(20):
        while num_pair_threads() < 6:
            await asyncio.sleep(0.02)
    results = await asyncio.gather(*(t.generate(s, seed=i) for i, (t, s) in enumerate(pairs)))
    assert all(len(tokens) == 40 for tokens, _ in results)
    assert sum(stats.num_draft_tokens for _, stats in results) > 30


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
async def test_losing_the_speculator_process_costs_no_request(target_for, speculator_process, way) -> None:
    target = await target_for(distribution_deadline_ms=20.0, speculation_deadline_ms=100.0)
    speculator, process = await speculator_process()
    await connect(target, speculator)
    running = [asyncio.create_task(target.generate(speculator, seed=seed, max_tokens=200)) for seed in range(4)]
    await asyncio.sleep(0.2)
    process.send_signal(way)
    results = await asyncio.wait_for(asyncio.gather(*running), 20)
    assert all(len(tokens) == 200 for tokens, _ in results)
    started_s = time.monotonic()
    tokens, _ = await target.generate(speculator, max_tokens=50)
    assert len(tokens) == 50
    assert time.monotonic() - started_s < 3
    if way == signal.SIGKILL:
        async with asyncio.timeout(10):
            while num_pair_threads():
                await asyncio.sleep(0.05)


async def test_late_bodies_are_not_waited_for(target_for, speculator_for, monkeypatch) -> None:
    target = await target_for(distribution_deadline_ms=5.0)
    speculator = await speculator_for()
    await connect(target, speculator)
    send = group_module.GlooGroup.send

    def slow(self, body, number, timeout_s=group_module.TRANSFER_S):
        time.sleep(0.1)
        send(self, body, number, timeout_s)

    monkeypatch.setattr(group_module.GlooGroup, "send", slow)
    num_late = 0
    async with asyncio.timeout(60):
        while not num_late:  # on a busy host a short output may end before anything is drafted for it
            tokens, stats = await target.generate(speculator, max_tokens=60)
            assert len(tokens) == 60
            # One wait at its deadline, then none for a while; a busy host may stretch the one.
            assert stats.seconds_waiting < 0.5
            num_late = stats.num_sample_and_match_rounds
    assert is_dense(await target.link())


async def test_a_transfer_that_fails_closes_the_group_and_another_one_is_built(
    target_for, speculator_for, monkeypatch
) -> None:
    target = await target_for(distribution_deadline_ms=20.0)
    speculator = await speculator_for()
    await connect(target, speculator)
    send = group_module.GlooGroup.send

    def broken(self, body, number, timeout_s=group_module.TRANSFER_S):
        if number:
            raise TransportUnavailable("broken by the test")
        send(self, body, number, timeout_s)

    monkeypatch.setattr(group_module.GlooGroup, "send", broken)
    async with asyncio.timeout(60):
        link = await target.link()
        while is_dense(link):  # on a busy host a short output may end before anything is drafted for it
            tokens, _ = await target.generate(speculator, max_tokens=60)
            assert len(tokens) == 60
            link = await target.link()
    assert (link.transport, link.agreed_transport) == ("grpc", "gloo")
    assert link.group_error
    monkeypatch.setattr(group_module.GlooGroup, "send", send)
    link = await target.until(is_dense)
    assert link.group_error == ""
    _, stats = await target.generate(speculator, max_tokens=60)
    assert stats.num_draft_tokens > 0


class NeverJoins(speculator_pb2_grpc.SpeculatorServiceServicer):
    """Agrees on gloo and then does nothing about it."""

    async def Speculate(self, request_iterator, context):
        await context.read()
        ack = speculator_pb2.HelloAck(
            protocol_version=1,
            speculator=types_pb2.Peer(id="never", incarnation=1),
            model=types_pb2.ModelInfo(name="never", tokenizer_fingerprint=tokenizer_fingerprint(ToyTokenizer(VOCAB))),
            transport=speculator_pb2.DISTRIBUTION_TRANSPORT_GLOO,
            max_lookahead=3,
        )
        await context.write(speculator_pb2.SpeculateResponse(hello_ack=ack))
        while await context.read() is not grpc.aio.EOF:
            pass


async def test_a_group_that_is_never_there_holds_nothing_up(target_for) -> None:
    server = grpc.aio.server()
    speculator_pb2_grpc.add_SpeculatorServiceServicer_to_server(NeverJoins(), server)
    endpoint = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        target = await target_for()
        tokens, _ = await target.generate(endpoint, max_tokens=100)
        assert len(tokens) == 100
        link = await target.link()
        assert (link.connected, link.transport, link.agreed_transport) == (True, "grpc", "gloo")
        assert num_pair_threads() == 1
    finally:
        await server.stop(None)
    async with asyncio.timeout(5):
        while num_pair_threads():
            await asyncio.sleep(0.02)


async def test_sparse_distributions_serve_where_both_sides_agree_on_them(target_for, speculator_for) -> None:
    target = await target_for(distribution_transport="auto", distribution_deadline_ms=1000.0)
    speculator = await speculator_for(distribution_transport="grpc")
    _, stats = await target.generate(speculator, max_tokens=60)
    link = await target.link()
    assert (link.transport, link.agreed_transport) == ("grpc", "grpc")
    assert stats.num_draft_tokens > 0
    assert stats.num_sample_and_match_rounds == 0


async def test_a_transport_that_the_speculator_does_not_have_is_an_error_and_no_downgrade(
    target_for, speculator_for
) -> None:
    target = await target_for(distribution_transport="gloo")
    speculator = await speculator_for(distribution_transport="grpc")
    tokens, stats = await target.generate(speculator, max_tokens=20)
    assert len(tokens) == 20
    assert stats.num_hits == stats.num_partial == 0
    link = await target.link()
    assert not link.connected
    assert link.last_error == "the target offers gloo, this speculator grpc"


async def test_nccl_without_cuda_ends_the_start(target_for, speculator_for) -> None:
    for start in (target_for, speculator_for):
        with pytest.raises(TransportUnavailable, match="distribution_transport is nccl, but the model is on cpu"):
            await start(distribution_transport="nccl")
