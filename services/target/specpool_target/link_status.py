"""The speculators of a target, for its status."""

from __future__ import annotations

from specpool.speculation import Member, SpeculationPool
from specpool.speculation.handshake import transport_labels
from specpool.v1 import target_pb2


def link_statuses(pool: SpeculationPool) -> list[target_pb2.SpeculatorLinkStatus]:
    """The status of the link to every speculator that is known, connected or not."""
    return [_link_status(member) for member in pool.members]


def _link_status(member: Member) -> target_pb2.SpeculatorLinkStatus:
    connection = member.connection
    if connection is None:
        return target_pb2.SpeculatorLinkStatus(endpoint=member.address, last_error=member.error)
    return target_pb2.SpeculatorLinkStatus(
        endpoint=member.address,
        speculator=connection.ack.speculator,
        connected=True,
        transport=connection.transport,
        round_trip_ms=connection.measured.round_trip_s * 1e3,
        agreed_transport=transport_labels([connection.ack.transport]),
        group_error=connection.group_error,
    )
