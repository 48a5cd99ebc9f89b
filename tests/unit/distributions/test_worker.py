"""Pairs over real gloo: transfers in order, many pairs at once, and every way to lose a group."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from specpool.errors import TransportUnavailable
from specpool_engine.distributions import worker as worker_module
from specpool_engine.distributions.stream_store import MAX_KEYS, StreamStore, local_address
from specpool_engine.distributions.transport import Transport

SPECULATOR, TARGET = 0, 1


def test_bodies_arrive_in_order_over_many_pairs(side_for) -> None:
    pairs = [(side_for(f"pair {i}", SPECULATOR), side_for(f"pair {i}", TARGET)) for i in range(12)]
    bodies = {}
    for index, (sender, receiver) in enumerate(pairs):
        assert sender.up.wait(10)
        assert receiver.up.wait(10)
        for number in range(5):
            body = torch.randn(1 + number, 37).to((torch.float16, torch.bfloat16, torch.float32)[number % 3])
            assert sender.send(body, number)
            received = torch.empty_like(body)
            bodies[index, number] = body, received, receiver.receive(received, number)
    for body, received, done in bodies.values():
        assert done.wait(10)
        assert torch.equal(body, received)


def test_nothing_is_taken_before_the_group_is_there(side_for) -> None:
    sender = side_for("pair", SPECULATOR)
    assert not sender.send(torch.zeros(1), 1)
    side_for("pair", TARGET)
    assert sender.up.wait(10)
    assert sender.worker.is_up


def test_a_full_queue_refuses(side_for, monkeypatch) -> None:
    monkeypatch.setattr(worker_module, "MAX_QUEUED_BYTES", 100)
    sender, receiver = side_for("pair", SPECULATOR), side_for("pair", TARGET)
    assert sender.up.wait(10)
    assert receiver.up.wait(10)
    assert not sender.send(torch.zeros(26), 1)
    held = torch.zeros(25)
    assert sender.send(held, 1)
    assert not sender.send(torch.zeros(1), 2)
    assert receiver.receive(torch.empty(25), 1).wait(10)
    deadline_s = time.monotonic() + 5
    while not sender.send(held, 2):
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    assert receiver.receive(torch.empty(25), 2).wait(10)


def test_the_other_side_never_comes(side_for) -> None:
    side = side_for("pair", TARGET, creation_s=0.3)
    assert side.down.wait(5)
    assert isinstance(side.error, TransportUnavailable)
    assert side.ends_within(1)
    assert not side.up.is_set()


def test_closing_ends_the_wait_for_the_other_side(side_for) -> None:
    side = side_for("pair", TARGET, creation_s=60.0)
    time.sleep(0.1)
    side.worker.close()
    assert side.ends_within(2)
    assert side.error is None


def test_a_sender_that_closes_ends_the_receiver_at_once(side_for) -> None:
    sender, receiver = side_for("pair", SPECULATOR), side_for("pair", TARGET)
    assert receiver.up.wait(10)
    receiver.receive(torch.empty(10), 1, timeout_s=60.0)
    sender.worker.close()
    assert receiver.down.wait(5)
    assert receiver.ends_within(1)


def test_a_transfer_that_does_not_come_ends_the_group(side_for) -> None:
    _, receiver = side_for("pair", SPECULATOR), side_for("pair", TARGET)
    assert receiver.up.wait(10)
    done = receiver.receive(torch.empty(10), 1, timeout_s=0.2)
    assert receiver.down.wait(5)
    assert not done.is_set()
    assert not receiver.worker.is_up


def test_bodies_of_another_number_do_not_match(side_for) -> None:
    sender, receiver = side_for("pair", SPECULATOR), side_for("pair", TARGET)
    assert sender.up.wait(10)
    assert receiver.up.wait(10)
    sender.send(torch.zeros(10), 1)
    assert not receiver.receive(torch.empty(10), 2, timeout_s=0.2).wait(1)
    assert receiver.down.wait(5)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_lost_in_the_middle_of_a_transfer(side_for, other_process, way) -> None:
    receiver = side_for("process", TARGET, creation_s=60.0, other=other_process())
    assert receiver.up.wait(60)
    body = torch.empty(8)
    assert receiver.receive(body, 1).wait(10)
    assert body.tolist() == list(range(8))
    num_threads = threading.active_count()
    done = receiver.receive(torch.empty(8), 2, timeout_s=1.0)
    os.kill(receiver.other.process.pid, way)
    assert receiver.down.wait(5)
    assert not done.is_set()
    assert receiver.ends_within(1)
    assert threading.active_count() <= num_threads - 1


def test_a_store_is_not_filled_without_bound() -> None:
    store = StreamStore(lambda key, value: None, 0.05)
    for index in range(MAX_KEYS + 5):
        store.receive(str(index), b"1")
    assert store.get("0") == b"1"
    with pytest.raises(RuntimeError, match="in time"):
        store.get(str(MAX_KEYS))


def test_the_address_on_the_way_to_a_peer() -> None:
    assert local_address("127.0.0.1", 1) == "127.0.0.1"
    assert local_address("no such host", 1) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bodies_arrive_over_nccl(side_for, other_process, monkeypatch) -> None:
    """Two processes on one GPU: nccl takes them for two machines, by NCCL_HOSTID."""
    other = other_process("nccl", NCCL_HOSTID="sender")
    monkeypatch.setenv("NCCL_HOSTID", "receiver")
    device = torch.device("cuda", 0)
    receiver = side_for(
        "process", TARGET, creation_s=60.0, transport=Transport.NCCL, device=device, other=other
    )  # fmt: skip
    assert receiver.up.wait(60), receiver.error
    body = torch.empty(8, device=device)
    assert receiver.receive(body, 1).wait(10)
    torch.cuda.synchronize()
    assert body.tolist() == list(range(8))
    receiver.receive(torch.empty(8, device=device), 2, timeout_s=1.0)
    assert receiver.down.wait(10)
    assert receiver.ends_within(5)
