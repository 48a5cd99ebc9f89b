"""The speculators that the directory names, and what is known of each without a stream to it."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from specpool.rpc.client import channel
from specpool.speculation.choice import Candidate
from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.link import SpeculatorLink
from specpool.v1 import speculator_pb2, speculator_pb2_grpc, types_pb2

_STATUS_TIMEOUT_S: Final = 2.0
_LOOK_S: Final = 1.0
"""How often it is looked whether to ask sooner than was thought."""
_HOPEFUL_S: Final = 1.0
_ROUND_TRIPS: Final = 12
_UNKNOWN_ROW_BUDGET: Final = 64
_FREE_KV_SHARE: Final = 0.02


@dataclass(slots=True)
class Member:
    """A speculator of the directory. Belongs to the pool's event loop; engines read it."""

    address: str
    labels: Mapping[str, str]
    is_named: bool = True
    """Whether the directory names it."""
    is_terminating: bool = False
    """Whether the directory names it as one that goes."""
    link: SpeculatorLink | None = None
    status: speculator_pb2.GetSpeculatorStatusResponse | None = None
    """Status that it answered last."""
    was_asked: bool = False
    """Whether a status call has ended, well or not."""
    is_reachable: bool = False
    """Whether the last status call was answered."""
    round_trip_s: float = 0.0
    """Shortest round trip of the last few status calls, in seconds."""
    refused_until_s: float = 0.0
    """Time (`monotonic`) before which it takes no further sequences."""
    idle_since_s: float | None = None
    """Time (`monotonic`) since which it has had no sequence."""
    leaving_since_s: float | None = None
    """Time (`monotonic`) at which it said that it goes away."""
    crowded_since_s: float | None = None
    """Time (`monotonic`) since which there has been a better place for its sequences."""
    task: asyncio.Task[None] | None = None
    _round_trips_s: deque[float] = field(default_factory=lambda: deque(maxlen=_ROUND_TRIPS))

    @property
    def connection(self) -> Connection | None:
        """The live connection to it, if there is one."""
        link = self.link
        return None if link is None else link.connection

    @property
    def error(self) -> str:
        """Why it is not connected; empty if it is, or need not be."""
        if self.link is not None:
            return self.link.last_error
        return "it cannot be reached" if self.was_asked and not self.is_reachable else ""

    def placed(self) -> list[PlacedSequence]:
        """Sequences of this pool that it has."""
        connection = self.connection
        return [] if connection is None else connection.placed()

    def is_connecting(self, now_s: float) -> bool:
        """Whether the first attempt is still running, and not for long."""
        link = self.link
        is_first = link is not None and link.connection is None and not link.has_failed
        return is_first and link is not None and now_s - link.created_at_s < _HOPEFUL_S

    def takes_sequences(self, now_s: float) -> bool:
        """Whether it is connected, stays, and refuses nothing."""
        connection = self.connection
        return (
            connection is not None
            and connection.is_open
            and self.is_named
            and not self.is_terminating
            and self.leaving_since_s is None
            and now_s >= self.refused_until_s
        )

    def is_silent(self, now_s: float) -> bool:
        """Whether its engine has owed an answer for long."""
        connection = self.connection
        return connection is not None and connection.is_stalled(now_s)

    def reason_to_leave(self, now_s: float) -> str | None:
        """Why its sequences should go elsewhere; None if they should not."""
        if self.leaving_since_s is not None:
            return "going_away"
        if not self.is_named or self.is_terminating:
            return "unlisted"
        return "silent" if self.is_silent(now_s) else None

    def is_worth_connecting(self, now_s: float, fingerprint: str) -> bool:
        """Whether it is not connected, and nothing is known that speaks against it."""
        stays = self.is_named and not self.is_terminating
        if self.link is not None or not stays or not self.was_asked or now_s < self.refused_until_s:
            return False
        if self.leaving_since_s is not None:  # until it says that it serves, perhaps as another process
            return False
        status = self.status
        return status is None or (
            status.state == types_pb2.SERVING_STATE_SERVING and status.model.tokenizer_fingerprint == fingerprint
        )

    def has_context_for(self, num_tokens: int) -> bool:
        """Whether its model can read so many, as far as is known."""
        connection = self.connection  # read once: it may be lost meanwhile
        told = self.status if connection is None else connection.ack
        return told is None or not told.model.max_context or num_tokens <= told.model.max_context

    def candidate(self, own_labels: Mapping[str, str]) -> Candidate:
        """The speculator as the choice of a place sees it."""
        connection, status = self.connection, self.status
        told: speculator_pb2.HelloAck | speculator_pb2.GetSpeculatorStatusResponse
        if connection is not None:
            told, load, num_reported_ours = connection.ack, connection.measured.load, connection.measured.num_placed
            num_ours = connection.num_placed
        else:
            told = status or speculator_pb2.GetSpeculatorStatusResponse()
            load, num_ours, num_reported_ours = told.load, 0, 0
        num_reported = load.num_sequences_running + load.num_sequences_waiting
        return Candidate(
            address=self.address,
            num_sequences=max(num_ours, num_reported - num_reported_ours + num_ours),
            row_budget=told.row_budget or _UNKNOWN_ROW_BUDGET,
            max_sequences=told.max_sequences,
            num_labels_apart=sum(self.labels.get(key, value) != value for key, value in own_labels.items()),
            round_trip_s=self.round_trip_s,
            has_free_kv=load.num_free_kv_blocks >= _FREE_KV_SHARE * load.num_kv_blocks,
        )

    async def ask_forever(self, interval_s: Callable[[], float], on_answer: Callable[[], None]) -> None:
        """Ask for its status now and then, over a connection that is closed again; soon where that becomes urgent."""
        task = asyncio.current_task()
        # An answer that fails while this is being cancelled hides the cancellation.
        while task is not None and not task.cancelling():
            await self._ask()
            self.was_asked = True
            on_answer()
            asked_s = time.monotonic()
            while (left_s := asked_s + interval_s() - time.monotonic()) > 0:
                await asyncio.sleep(min(left_s, _LOOK_S) * random.uniform(0.8, 1.2))

    async def _ask(self) -> None:
        try:
            async with channel(self.address) as to:
                self.is_reachable = await asyncio.wait_for(self._ask_over(to), _STATUS_TIMEOUT_S)
        except (grpc.aio.AioRpcError, TimeoutError):
            self.is_reachable = False

    async def _ask_over(self, to: grpc.aio.Channel) -> bool:
        if not await _is_connected(to):
            return False
        asked_s = time.perf_counter()
        stub: Any = speculator_pb2_grpc.SpeculatorServiceStub(to)
        try:
            self.status = await stub.GetSpeculatorStatus(speculator_pb2.GetSpeculatorStatusRequest())
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:
                return False
        self._round_trips_s.append(time.perf_counter() - asked_s)
        self.round_trip_s = min(self._round_trips_s)
        if self.link is None and (self.status is None or self.status.state == types_pb2.SERVING_STATE_SERVING):
            self.leaving_since_s = None
        return True


async def _is_connected(to: grpc.aio.Channel) -> bool:
    """Connect, and wait for how that ends; returns whether it succeeded."""
    state = to.get_state(try_to_connect=True)
    while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
        await to.wait_for_state_change(state)
        state = to.get_state()
    return state is grpc.ChannelConnectivity.READY
