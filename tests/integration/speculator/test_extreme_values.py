"""Extreme values in every number of every message of a target: another target's sequences are served on."""

from __future__ import annotations

import itertools
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from extreme_values import numeric_fields, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2

Request = speculator_pb2.SpeculateRequest
VOCAB_SIZE = 32
WAIT_S = 60.0
KINDS = ("open_sequence", "outcomes", "speculate_now", "start_round", "close_sequence", "open_group", "group_key")


class Stream:
    """One target's stream, over blocking gRPC."""

    def __init__(self, stub: Any, hello: speculator_pb2.Hello) -> None:
        self._outgoing: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self.incoming: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.is_open = True
        self._outgoing.put(Request(hello=hello))
        self._call = stub.Speculate(iter(self._outgoing.get, None))
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self.incoming.put(response)
        except grpc.RpcError as error:
            self.incoming.put(error)
        self.is_open = False

    def send(self, **message: Any) -> None:
        self._outgoing.put(Request(**message))

    def end(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()


class Pool:
    """A speculator, a target that is served and one that sends whatever it likes."""

    def __init__(self, endpoint: str, pid: int) -> None:
        self.pid = pid
        self.channel = grpc.insecure_channel(endpoint)
        self.stub = speculator_pb2_grpc.SpeculatorServiceStub(self.channel)
        model = self.status().model
        self.hello = speculator_pb2.Hello(protocol_version=1, model=model, max_lookahead=3)
        self.served = Stream(self.stub, self.hello)
        self.round = 0
        self.served.send(open_sequence=opened("served"))
        self.await_table()
        self.hostile = Stream(self.stub, self.hello)
        self._numbers = itertools.count()

    def status(self) -> Any:
        return self.stub.GetSpeculatorStatus(
            speculator_pb2.GetSpeculatorStatusRequest(), timeout=WAIT_S, wait_for_ready=True
        )

    def await_table(self) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while True:
            response = self.served.incoming.get(timeout=max(0.01, deadline_s - time.monotonic()))
            assert isinstance(response, speculator_pb2.SpeculateResponse), response
            assert not response.HasField("sequence_refused"), response
            assert not response.HasField("resync"), response
            if any(table.round == self.round for table in response.tables.tables):
                return

    def check_served(self) -> None:
        """The other target's sequence goes on."""
        outcome = speculator_pb2.Outcome(sequence_id="served", round=self.round, bonus_token=self.round % 7)
        self.served.send(outcomes=speculator_pb2.Outcomes(outcomes=[outcome]))
        self.round += 1
        if self.round == 200:  # before its context is full
            self.served.send(close_sequence=speculator_pb2.CloseSequence(sequence_id="served"))
            self.served.send(open_sequence=opened("served"))
            self.round = 0
        self.await_table()

    def throw(self, kind: str, *changes: tuple[tuple[str, ...], Any]) -> None:
        """A message of this kind with these numbers, for a sequence that was just opened; then what usually follows."""
        if not self.hostile.is_open:
            self.hostile = Stream(self.stub, self.hello)
        name = f"s{next(self._numbers)}"
        message = base_message(kind, name)
        for path, value in changes:
            put(message, path, value)
        if kind != "open_sequence":
            mode = types_pb2.SPECULATION_MODE_SD if kind == "speculate_now" else types_pb2.SPECULATION_MODE_SSD
            self.hostile.send(open_sequence=opened(name, mode=mode))
        if kind == "speculate_now":
            awaits = speculator_pb2.Outcome(sequence_id=name, bonus_token=1, awaits_speculation=True)
            self.hostile.send(outcomes=speculator_pb2.Outcomes(outcomes=[awaits]))
        self.hostile.send(**{kind: message})
        round_ = message.round if kind in ("open_sequence", "start_round") else 0
        outcome = speculator_pb2.Outcome(sequence_id=name, round=round_, bonus_token=3, draft_tokens=[1, 2])
        self.hostile.send(outcomes=speculator_pb2.Outcomes(outcomes=[outcome]))


def cpu_s(pid: int) -> float:
    """Seconds that a process has computed."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def opened(name: str, **fields: Any) -> speculator_pb2.OpenSequence:
    message = speculator_pb2.OpenSequence(
        sequence_id=name, token_ids=[1, 2, 3, 4, 5], num_prompt_tokens=5, max_lookahead=3, draft_tokens=[], **fields
    )
    message.sampling.max_tokens = 1000
    return message


def base_message(kind: str, name: str) -> Any:
    if kind == "open_sequence":
        return opened(name)
    if kind == "outcomes":
        outcome = speculator_pb2.Outcome(sequence_id=name, bonus_token=2, draft_tokens=[3])
        return speculator_pb2.Outcomes(outcomes=[outcome])
    if kind == "speculate_now":
        return speculator_pb2.SpeculateNow(sequence_id=name, num_tokens=2, deadline_ms=100)
    message = getattr(Request(), kind)
    if "sequence_id" in message.DESCRIPTOR.fields_by_name:
        message.sequence_id = name
    return message


CASES = [(kind, *change) for kind in KINDS for change in numeric_fields(base_message(kind, "s"))]


PROCESS = """
import asyncio
from specpool_speculator.config import SpeculatorConfig
from specpool_speculator.server import serve
config = SpeculatorConfig(
    model="toy#vocab=%d,seed=1", max_lookahead=4, num_kv_blocks=4096, drain_grace_s=0.0, num_threads=1
)
asyncio.run(serve(config, on_ready=lambda endpoint: print(endpoint, flush=True)))
"""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    process = subprocess.Popen([sys.executable, "-c", PROCESS % VOCAB_SIZE], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        pool = Pool(process.stdout.readline().strip(), process.pid)
        yield pool
        pool.served.end()
        pool.hostile.end()
        pool.channel.close()
        process.terminate()
        assert process.wait(WAIT_S) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", KINDS)
def test_each_number_alone(pool: Pool, kind: str) -> None:
    cases = [(path, value) for of, path, value in CASES if of == kind]
    for path, value in cases:
        pool.throw(kind, (path, value))
        pool.check_served()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.lists(st.sampled_from(CASES), min_size=1, max_size=6), min_size=1, max_size=4))
def test_many_numbers_together(pool: Pool, messages: list[list[tuple[str, tuple[str, ...], Any]]]) -> None:
    for cases in messages:
        kind = cases[0][0]
        pool.throw(kind, *((path, value) for of, path, value in cases if of == kind))
    pool.check_served()


def test_hello(pool: Pool) -> None:
    for path, value in numeric_fields(speculator_pb2.Hello()):
        hello = speculator_pb2.Hello()
        hello.CopyFrom(pool.hello)
        put(hello, path, value)
        stream = Stream(pool.stub, hello)
        stream.send(open_sequence=opened("s"))
        response = stream.incoming.get(timeout=WAIT_S)
        is_refused = isinstance(response, grpc.RpcError)
        assert not is_refused or response.code() in (
            grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.INVALID_ARGUMENT,
        )  # fmt: skip
        pool.check_served()
        stream.end()


@pytest.mark.parametrize("grace_s", [float("nan"), -1.0, float("inf"), 1e300])
def test_drain(pool: Pool, grace_s: float) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        pool.stub.DrainSpeculator(speculator_pb2.DrainSpeculatorRequest(grace_seconds=grace_s), timeout=WAIT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert pool.status().state == types_pb2.SERVING_STATE_SERVING


def test_nothing_is_left_and_the_engine_rests(pool: Pool) -> None:
    """A deadline that is no number kept the engine busy for ever."""
    pool.hostile.end()
    deadline_s = time.monotonic() + WAIT_S
    while pool.status().load.num_sequences_running > 1:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert {count.reason for count in pool.status().refusals} == {speculator_pb2.REFUSAL_REASON_INVALID}
    pool.check_served()
    while True:
        before_s, started_s = cpu_s(pool.pid), time.monotonic()
        time.sleep(0.5)
        if cpu_s(pool.pid) - before_s < 0.5 * (time.monotonic() - started_s):
            return
        assert time.monotonic() < deadline_s
