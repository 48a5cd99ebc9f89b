"""Which speculator has which sequence: connects to those that are needed, and moves running sequences.

Whatever happens (the directory changed, a stream came up or was lost, a speculator drains or refused a sequence) wakes
one `Review` of everything, which runs once a second besides.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from specpool.background import Background
from specpool.discovery.discovery import Discovery, Endpoints
from specpool.speculation.connection import Connection, PlacedSequence
from specpool.speculation.dense import DenseReceiver
from specpool.speculation.identity import PoolIdentity
from specpool.speculation.link import SpeculatorLink
from specpool.speculation.members import Member
from specpool.speculation.pairing_settings import PairingSettings
from specpool.speculation.placement import Placement
from specpool.speculation.review import Review
from specpool.v1 import speculator_pb2

_logger = logging.getLogger(__name__)
_SHORTEST_PAUSE_S: Final = 0.01
"""Between two reviews: each goes over all that wait, and much may happen at once."""
_SHORTEST_REFUSAL_S: Final = 1.0
_LONGEST_REFUSAL_S: Final = 60.0
_OF_ONE_SEQUENCE: Final = (speculator_pb2.REFUSAL_REASON_INVALID, speculator_pb2.REFUSAL_REASON_INTERNAL)
_GRPC: Final = speculator_pb2.DISTRIBUTION_TRANSPORT_GRPC


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolEvents:
    """What an engine is told of the pool, for metrics. Called on any thread; must return at once."""

    on_connections: Callable[[], None] = lambda: None
    """Called when a connection came or went, or draft distributions come another way; on the event loop."""
    on_move: Callable[[str], None] = lambda reason: None
    """Called with the reason when a running sequence lost its speculator or changed it: lost, refused, going_away,
    unlisted, silent, crowded."""
    on_stale: Callable[[], None] = lambda: None
    """Called when a message about an unknown sequence was dropped."""


class Pairing:
    """The pairing of a pool. Belongs to the pool's event loop, except for `placement.place`."""

    def __init__(
        self,
        directory: Discovery,
        identity: PoolIdentity,
        *,
        settings: PairingSettings,
        events: PoolEvents,
        receiver: DenseReceiver | None = None,
    ) -> None:
        self.placement = Placement(identity, events.on_move)
        self._directory = directory
        self._identity = identity
        self._settings = settings
        self._events = events
        self._receiver = receiver
        self._changed = asyncio.Event()
        self._background = Background("speculation pool")
        self._review = Review(
            self.placement,
            settings,
            identity.model.tokenizer_fingerprint,
            connect=self._connect,
            disconnect=self._disconnect,
            forget=self._forget,
        )
        directory.on_change(self._on_endpoints)

    # ---- start and end ----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to look and to connect; returns at once."""
        self._background.keep_running(self._review_forever, name="pairing of sequences")
        await self._directory.start()

    async def close(self) -> None:
        """End all streams cleanly."""
        await self._directory.close()
        await self._background.close()
        members = self.placement.members
        await asyncio.gather(*(member.link.close() for member in members.values() if member.link is not None))
        members.clear()

    def wait_for_place(self, sequence: PlacedSequence) -> None:
        """Give the sequence a speculator as soon as there is one."""
        self.placement.unplaced[sequence.id] = sequence
        self._wake()

    def has_settled(self) -> bool:
        """Whether some speculator takes sequences, or none that is known can be reached now."""
        members, now_s = self.placement.members.values(), time.monotonic()
        if any(member.takes_sequences(now_s) for member in members):
            return True
        # One that is connected and takes nothing (it is full, or goes) is nothing to wait for.
        is_on_its_way = any(not member.was_asked or member.is_connecting(now_s) for member in members)
        return not (is_on_its_way or self._changed.is_set())

    async def _review_forever(self) -> None:
        while True:
            self._changed.clear()
            self._review.run(time.monotonic())
            await asyncio.sleep(_SHORTEST_PAUSE_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), self._settings.review_interval_s)

    def _wake(self) -> None:
        self._changed.set()

    # ---- the directory ----------------------------------------------------------------------------------------

    def _on_endpoints(self, endpoints: Endpoints) -> None:
        members = self.placement.members
        named = {endpoint.address: endpoint for endpoint in endpoints}
        for address, endpoint in named.items():
            member = members.get(address)
            if member is None:
                member = members[address] = Member(address, endpoint.labels)
                self._ask(member)
            member.labels, member.is_terminating = endpoint.labels, endpoint.terminating
        for address, member in members.items():
            member.is_named = address in named
        self._wake()

    def _ask(self, member: Member) -> None:
        def interval_s() -> float:
            settings, placement = self._settings, self.placement
            own_s = settings.urgent_status_interval_s if placement.is_wanted(member) else settings.status_interval_s
            return max(own_s, len(placement.members) * settings.shortest_status_pause_s)

        name = f"status of speculator {member.address}"
        member.task = self._background.keep_running(lambda: member.ask_forever(interval_s, self._wake), name=name)

    def _connect(self, member: Member) -> None:
        transports = (_GRPC,) if self._receiver is None else tuple(self._receiver.transports)
        member.link = SpeculatorLink(
            member.address,
            hello=lambda: self._identity.hello(transports),
            listener=self,
            receiver=self._receiver,
        )

    def _disconnect(self, member: Member) -> None:
        if member.link is not None:
            self._background.run(member.link.close(), name=f"end of the stream to {member.address}")
            member.link = None

    def _forget(self, member: Member) -> None:
        del self.placement.members[member.address]
        if member.task is not None:
            member.task.cancel()

    # ---- links and connections, see `LinkListener` ------------------------------------------------------------

    def connected(self, link: SpeculatorLink, connection: Connection) -> None:
        """Note that a handshake succeeded."""
        member = self.placement.members.get(link.address)
        if member is not None:
            member.leaving_since_s = member.crowded_since_s = None
            member.refused_until_s = 0.0
        self._events.on_connections()
        self._wake()

    def disconnected(self, link: SpeculatorLink, connection: Connection) -> None:
        """Note that a connection has ended."""
        for sequence in connection.placed():
            self.placement.lost(sequence, connection, "lost")
        self._events.on_connections()
        self._wake()

    def attempt_failed(self, link: SpeculatorLink) -> None:
        """Note that an attempt to connect has failed."""
        self._wake()

    def going_away(self, connection: Connection, reason: str) -> None:
        """Note that a speculator drains."""
        _logger.info("speculator %s is draining: %s", connection.address, reason)
        member = self.placement.members.get(connection.address)
        if member is not None and member.leaving_since_s is None:
            member.leaving_since_s = time.monotonic()
        self._wake()

    def refused(self, connection: Connection, refusal: speculator_pb2.SequenceRefused) -> None:
        """Note that a speculator does not hold a sequence (any more)."""
        pause_s = min(max(refusal.retry_after_ms / 1e3, _SHORTEST_REFUSAL_S), _LONGEST_REFUSAL_S)
        if refusal.reason == speculator_pb2.REFUSAL_REASON_INTERNAL:
            pause_s = _LONGEST_REFUSAL_S  # it is likely to fail there again
        until_s = time.monotonic() + pause_s
        member = self.placement.members.get(connection.address)
        if member is not None and refusal.reason not in _OF_ONE_SEQUENCE:
            member.refused_until_s = until_s
        sequence = connection.find(refusal.sequence_id)
        if sequence is not None:
            is_invalid = refusal.reason == speculator_pb2.REFUSAL_REASON_INVALID
            sequence.avoided[connection.address] = float("inf") if is_invalid else until_s
            _logger.debug("speculator %s refused %s: %s", connection.address, sequence.id, refusal.message)
            self.placement.lost(sequence, connection, "refused")
        self._wake()

    def transport_changed(self, connection: Connection) -> None:
        """Note that draft distributions come another way from now on."""
        self._events.on_connections()

    def stale_message(self) -> None:
        """Note that a message about an unknown sequence was dropped."""
        self._events.on_stale()
