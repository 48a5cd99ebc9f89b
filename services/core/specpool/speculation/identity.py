"""Who uses the pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from specpool.speculation.handshake import PROTOCOL_VERSION
from specpool.v1 import speculator_pb2, types_pb2


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolIdentity:
    """An engine, as speculators see it."""

    peer: types_pb2.Peer
    """Id, incarnation and endpoint of the engine; read at each handshake."""
    model: types_pb2.ModelInfo
    """The engine's model: vocabulary size and tokenizer fingerprint decide which speculators fit."""
    max_lookahead: int = 8
    """Largest lookahead K."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Where the engine is (zone, node): a speculator whose labels say otherwise is farther away."""

    def hello(self, transports: tuple[int, ...]) -> speculator_pb2.Hello:
        """The first message of a stream."""
        return speculator_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            target=self.peer,
            model=self.model,
            transports=transports,  # type: ignore[arg-type]
            max_lookahead=self.max_lookahead,
        )
